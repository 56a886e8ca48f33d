"""Networks of the paper's experiments (section 5, appendix C) and pythae's default, as constructor keywords.
Torch-free."""

MNIST = {"size": 28, "channels": 1, "hidden": [500], "activation": "tanh", "likelihood": "bernoulli"}
FREY = {"size": (28, 20), "channels": 1, "hidden": [200], "activation": "tanh", "likelihood": "gaussian"}

PRESETS = {
    **{f"mnist-{n}": {**MNIST, "latent_dim": n} for n in (3, 5, 10, 20, 200)},
    **{f"frey-{n}": {**FREY, "latent_dim": n} for n in (2, 5, 10, 20)},
    "mnist-marginal": {**MNIST, "hidden": [100], "latent_dim": 3},
    "pythae": {**MNIST, "hidden": [512], "activation": "relu", "latent_dim": 20},
}
