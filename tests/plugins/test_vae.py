"""VAE against the paper's equations and pythae@6419e21 (golden cases), sizes, bounds with known answers,
likelihoods."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vgm_plugins.vae import bounds
from vgm_plugins.vae.bounds import Terms
from vgm_plugins.vae.checkpoints import CONVERTER, names
from vgm_plugins.vae.hmc import chain, log_px_by_hmc
from vgm_plugins.vae.model import VAE
from vgm_plugins.vae.objective import VAEObjective, log_prior_of_parameters
from vgm_plugins.vae.presets import PRESETS
from vgm_plugins.vae.sampler import ManifoldSampler, ReconstructionSampler, VAESampler, manifold

from vgm_cli.api import Request, Step, generators
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import VgmError
from vgm_cli.images import to_uint8
from vgm_cli.losses.pixels import LEVELS, DiscretisedLogistic, make_likelihood
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("vae")

# -- golden: the paper's equations -----------------------------------------------------------------------------------

APPENDIX_C = {
    "enc_h": "encoder.layers.0.0", "enc_mu": "encoder.embedding", "enc_logvar": "encoder.log_var",
    "dec_h": "decoder.layers.0.0", "dec_mu": "decoder.layers.1.0", "dec_logvar": "decoder.scale",
}  # fmt: skip


def paper_model(case: GoldenCase) -> VAE:
    """The network of appendix C in float64. A Bernoulli case carries a variance head that it does not use."""
    name = case.config["likelihood"]
    pixels, hidden = case.state["W_dec_mu"].shape
    model = VAE(
        size=(1, pixels), latent_dim=case.state["W_enc_mu"].shape[0], hidden=[hidden], activation="tanh",
        likelihood=name.partition("_")[0], squash={"": False, "sigmoid_mean": True}[name.partition("_")[2]],
    )  # fmt: skip
    state = {f"{ours}.weight": case.state[f"W_{theirs}"] for theirs, ours in APPENDIX_C.items()}
    state |= {f"{ours}.bias": case.state[f"b_{theirs}"] for theirs, ours in APPENDIX_C.items()}
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
    return model.double()


@golden.check(lambda c: c.kind == "aevb_terms")
def paper_terms(case: GoldenCase) -> None:
    model, out = paper_model(case), case.outputs
    x = case.inputs["x"].double()[:, None, None]
    eps, size = case.inputs["eps"].double(), case.config["dataset_size"]
    mu, logvar = model.posterior(x)
    z = bounds.reparameterise(mu, logvar, eps)
    terms = model.terms(x, eps)
    l_b = bounds.estimator_b(terms)
    estimate = bounds.minibatch(l_b, size)
    got = {
        "mu": mu, "logvar": logvar, "z": z, "neg_kl": terms.neg_kl, "log_px_given_z": terms.log_px,
        "log_prior": terms.log_prior, "log_q": terms.log_q, "log_w": terms.log_w, "L_B": l_b,
        "L_A": bounds.estimator_a(terms), "minibatch_estimate_full_data": estimate,
        "importance_weighted_log_px": bounds.importance_weighted(terms),
        "appendixD_log_px": bounds.from_posterior_samples(case.inputs["log_q_fit"].double(), terms),
        "recon_mean": model.likelihood.mean(model.parameters_of(z)[0]).flatten(2),
    }  # fmt: skip
    estimate.backward()
    params = dict(model.named_parameters())
    for theirs, ours in APPENDIX_C.items():
        if f"grad_W_{theirs}" in out:
            got[f"grad_W_{theirs}"] = params[f"{ours}.weight"].grad
        if f"grad_b_{theirs}" in out:
            got[f"grad_b_{theirs}"] = params[f"{ours}.bias"].grad
    assert set(got) == set(out)
    for name, value in out.items():
        assert_close(got[name], value, 1e-10, name)


@golden.check(lambda c: c.kind == "aevb_full_cov_kl")
def closed_form(case: GoldenCase) -> None:
    mu, logvar = case.inputs["mu"].double(), case.inputs["logvar"].double()
    assert_close(bounds.neg_kl_per_dim(mu, logvar), case.outputs["neg_kl_per_dim"], 1e-10, "per dimension")
    assert_close(bounds.neg_kl(mu, logvar), case.outputs["neg_kl"], 1e-10, "sum")
    assert_close(manifold(case.inputs["unit_square"].double()), case.outputs["manifold_z"], 1e-10, "manifold")


# -- golden: pythae --------------------------------------------------------------------------------------------------


@golden.check(lambda c: c.kind == "pythae_vae")
def pythae(case: GoldenCase) -> None:
    config, out, x = case.config, case.outputs, case.inputs["x"]
    channels, height, width = config["input_dim"]
    gaussian = {"bce": False, "mse": True}[config["recon"]]
    read = {"hidden": [len(case.state["encoder.layers.0.0.bias"])]}
    if channels == 1 and height == width:
        read = CONVERTER.config(case.state)
        assert read["latent_dim"] == config["latent_dim"] and read["size"] == height
    model = VAE(
        size=(height, width), channels=channels, latent_dim=config["latent_dim"], hidden=read["hidden"],
        activation="relu", likelihood="gaussian" if gaussian else "bernoulli", scale=1.0,
    )  # fmt: skip
    model.load_state_dict(CONVERTER.to_ours(case.state))
    # their Gaussian leaves out its constant, and outside get_nll half the squared error is meant
    constant = 0.5 * math.log(2 * math.pi) * x[0].numel() if gaussian else 0.0

    eps = case.inputs["eps"]
    iwae = {"vae": False, "iwae": True}[config["model"]]
    if iwae:
        assert eps.shape[1] == config["number_samples"]
    else:
        case.ignore("number_samples", why="a VAE draws one")
    eps = eps.transpose(0, 1) if iwae else eps[None]  # (L, B, D)
    mu, logvar = model.posterior(x)
    z = bounds.reparameterise(mu, logvar, eps)
    terms = model.terms(x, eps)
    terms = terms._replace(log_px=terms.log_px + constant)
    kl = (terms.log_q - terms.log_prior).mean() if iwae else -terms.neg_kl.mean()
    loss = -(bounds.iwae_surrogate(terms) if iwae else bounds.estimator_b(terms)).mean()
    objective = -(bounds.importance_weighted(terms) if iwae else bounds.estimator_b(terms)).mean()
    objective.backward()
    got = {
        "mu": mu, "log_var": logvar, "z": z[0], "kl": kl, "recon_loss": -terms.log_px.mean(), "loss": loss,
        "recon_x": model.mean(z[0]),
    }  # fmt: skip
    got |= {f"grad.{k}": p.grad for k, p in model.named_parameters() if f"grad.{k}" in out}
    if "nll_mean_log_p" in out:
        draws = case.inputs["nll_eps"].transpose(0, 1)  # (L, B, D)
        assert len(draws) == config["nll_batch"]
        with torch.no_grad():
            log_w = model.double().terms(x.double(), draws.double()).log_w
        got["nll_mean_log_p"] = bounds.log_mean_exp(log_w).mean()
    assert set(got) == set(out)
    for name, value in out.items():
        assert_close(got[name].double(), value.double(), 1e-4 if name.startswith("grad") else 1e-5, name)


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {"mnist-3": 790_290, "mnist-20": 815_824, "frey-2": 338_724, "pythae": 835_384}


def formula(pixels: int, hidden: int, latent: int, gaussian: bool) -> int:
    """Appendix C: (XH + H) + 2 (HD + D) + (DH + H) + (HX + X), and (HX + X) again for a variance."""
    out = hidden * pixels + pixels
    return pixels * hidden + hidden + 2 * (hidden * latent + latent) + latent * hidden + hidden + (1 + gaussian) * out


@pytest.mark.parametrize("name", PRESETS)
def test_preset_size(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "vae", "preset": name})
    p = PRESETS[name]
    count = sum(q.numel() for q in model.parameters())
    assert count == formula(math.prod(model.shape), p["hidden"][0], p["latent_dim"], p["likelihood"] == "gaussian")
    assert count == SIZES.get(name, count)


# -- likelihoods -----------------------------------------------------------------------------------------------------


def levels() -> Tensor:
    return torch.arange(LEVELS + 1, dtype=torch.float64).view(-1, 1, 1, 1) / LEVELS


@pytest.mark.parametrize("scale", [5e-4, 3e-3, 0.1, 2.0])
@pytest.mark.parametrize("mean", [-0.2, 0.0, 0.3, 1.0])
def test_discretised_logistic_sums_to_one(mean: float, scale: float) -> None:
    likelihood = DiscretisedLogistic(squash=False)
    h, s = torch.full((1, 1, 1), mean, dtype=torch.float64), torch.tensor(math.log(scale), dtype=torch.float64)
    log_prob = likelihood.log_prob(levels(), h, s)
    assert abs(log_prob.exp().sum().item() - 1) < 1e-9
    centre, half = levels().flatten(), 0.5 / LEVELS
    cdf = torch.sigmoid((centre + half - mean) / scale) - torch.sigmoid((centre - half - mean) / scale)
    inside = (cdf > 1e-6) & (centre > 0) & (centre < 1)
    torch.testing.assert_close(log_prob[inside], cdf[inside].log(), rtol=1e-6, atol=1e-6)


def test_discretised_logistic_stays_finite_far_out() -> None:
    """Where the difference of two sigmoids is zero in fp32: -d/s, and gradients that pull the mean."""
    h = torch.zeros(1, 1, 1, requires_grad=True)
    log_prob = DiscretisedLogistic(squash=False).log_prob(torch.full((1, 1, 1, 1), 128 / 255), h, torch.tensor(-6.0))
    log_prob.sum().backward()
    assert -300 < log_prob.item() < -150 and h.grad is not None and h.grad.item() > 100
    zeros, s = torch.zeros(1, 1, 1, 1), torch.tensor(-200.0, requires_grad=True)  # a pixel that is always black
    log_prob = DiscretisedLogistic(squash=True).log_prob(zeros, torch.full((1, 1, 1), -20.0), s)
    log_prob.sum().backward()
    assert -0.2 < log_prob.item() <= 0 and s.grad is not None and s.grad == 0


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "discretised-logistic"])
def test_samples_have_the_likelihoods_distribution(name: str) -> None:
    """Mean log-probability of samples against minus the entropy, by the sum (or integral) over all values."""
    likelihood = make_likelihood(name, squash=True)
    h, s = torch.tensor(0.4, dtype=torch.float64).view(1, 1, 1), torch.tensor(-4.5, dtype=torch.float64)
    u = torch.rand(20_000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = likelihood.sample(h, s, u)
    assert x.min() >= 0 and x.max() <= 1
    grid, width = levels(), 1.0
    if name == "bernoulli":
        grid = grid[[0, -1]]
    elif name == "gaussian":
        grid, width = torch.linspace(0, 1, 2001, dtype=torch.float64).view(-1, 1, 1, 1), 1 / 2000
    log_prob = likelihood.log_prob(grid, h, s)
    entropy = -(width * log_prob.exp() * log_prob).sum()
    assert abs(likelihood.log_prob(x, h, s).mean() + entropy) < 0.03
    assert abs(x.mean() - (width * log_prob.exp() * grid.flatten()).sum()) < 0.01


# -- bounds with a known answer ----------------------------------------------------------------------------------------


def linear_model(sigma: float = 0.3) -> tuple[VAE, Tensor, Tensor]:
    """A decoder that is (all but) linear, x = W z + b + sigma eps, so that log p(x) = log N(x; b, W W' + sigma^2)."""
    torch.manual_seed(0)
    tiny = 1e-3  # tanh(tiny a) / tiny is a to 1e-6
    model = VAE(size=(1, 4), latent_dim=2, hidden=[2], likelihood="gaussian", squash=False, scale=sigma).double()
    w, b = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    state = model.state_dict()
    state["decoder.layers.0.0.weight"], state["decoder.layers.0.0.bias"] = tiny * torch.eye(2), torch.zeros(2)
    state["decoder.layers.1.0.weight"], state["decoder.layers.1.0.bias"] = w / tiny, b
    model.load_state_dict(state)
    return model, b, w @ w.T + sigma**2 * torch.eye(4, dtype=torch.float64)


def test_bounds_order_and_converge_to_a_known_likelihood() -> None:
    model, b, covariance = linear_model()
    g = torch.Generator().manual_seed(1)
    x = torch.distributions.MultivariateNormal(b, covariance).sample((6,))
    want = torch.distributions.MultivariateNormal(b, covariance).log_prob(x)
    eps = torch.randn(20_000, 6, 2, dtype=torch.float64, generator=g)
    with torch.no_grad():
        terms = model.terms(x[:, None, None], eps)
    elbo = bounds.estimator_b(terms)
    many = bounds.importance_weighted(terms)
    some = Terms(*(t.view(2000, 10, 6).transpose(0, 1) if t.ndim == 2 else t for t in terms))
    ten = bounds.log_mean_exp(some.log_w).mean(0)  # the 10-sample bound, averaged over 2000 repetitions
    assert torch.all(elbo < ten) and torch.all(ten < want + 0.02)
    torch.testing.assert_close(many, want, rtol=0, atol=0.1)
    torch.testing.assert_close(bounds.estimator_a(terms), elbo, rtol=0.03, atol=0.3)


def test_appendix_d_with_the_true_posterior() -> None:
    """Any normalised density fitted to posterior draws gives 1 / p(x)."""
    model, b, covariance = linear_model()
    x = torch.distributions.MultivariateNormal(b, covariance).sample((1,))
    w = model.state_dict()["decoder.layers.1.0.weight"] * 1e-3
    precision = torch.eye(2, dtype=torch.float64) + w.T @ w / 0.3**2
    mean = torch.linalg.solve(precision, w.T @ (x[0] - b) / 0.3**2)
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    torch.manual_seed(0)
    z = posterior.sample((20_000, 1))
    with torch.no_grad():
        log_px = model.likelihood.log_prob(x[:, None, None], *model.parameters_of(z))
    terms = Terms(log_px, bounds.log_normal(z), log_px, log_px[0])
    fitted = torch.distributions.MultivariateNormal(mean + 0.02, precision_matrix=1.5 * precision)
    got = bounds.from_posterior_samples(fitted.log_prob(z), terms)
    want = torch.distributions.MultivariateNormal(b, covariance).log_prob(x)
    torch.testing.assert_close(got, want, rtol=0, atol=0.03)


def test_hybrid_monte_carlo_finds_a_known_likelihood() -> None:
    model, b, covariance = linear_model(sigma=0.5)
    normal = torch.distributions.MultivariateNormal(b, covariance)
    torch.manual_seed(0)
    x = normal.sample((3,))[:, None, None]
    with torch.no_grad():
        start = model.posterior(x)[0]
    log_px = lambda z: model.likelihood.log_prob(x, *model.parameters_of(z))
    got = log_px_by_hmc(log_px, start, generators(range(3)), samples=60, burn_in=30, steps=4)
    torch.testing.assert_close(got, normal.log_prob(x[:, 0, 0]), rtol=0, atol=0.25)


def test_hybrid_monte_carlo_is_an_estimate_of_bits_per_dim(vgm: Any, tmp_path: Path) -> None:
    """`bits-per-dim:estimator=hmc` lies near the importance-weighted bound of many draws."""
    torch.manual_seed(0)
    config = {"size": 28, "latent_dim": 2, "hidden": [8]}
    facts = {"sample_shape": [1, 28, 28], "image_size": 28, "image_channels": 1}
    header = ckpt.Header({"kind": "model", "name": "vae", "kwargs": config}, data=facts)
    ckpt.save_network(tmp_path / "v.safetensors", VAE(**config).state_dict(), header)
    metrics = "bits-per-dim:samples=400,bits-per-dim:estimator=hmc:samples=20"
    args = ("evaluate", tmp_path / "v.safetensors", "--reference", "mnist5k", "-n", 2, "--metrics", metrics, "--json")
    code, out, err = vgm(*args)
    assert code == 0, err
    a, b = (m["value"] for m in json.loads(out))
    assert abs(a - b) < 0.01 and "hybrid Monte Carlo, 20 draws" in out
    code, _, err = vgm(*args[:-2], "bits-per-dim:estimator=magic")
    assert code == 2 and "hmc" in err


def test_hybrid_monte_carlo_samples_its_target() -> None:
    """A correlated Gaussian: moments of the chains' states; adaptation accepts about nine proposals in ten."""
    g = torch.Generator().manual_seed(0)
    want = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0], dtype=torch.float64), want)
    start = torch.zeros(64, 2, dtype=torch.float64)
    momenta, uniforms = (lambda: torch.randn(64, 2, generator=g).double()), (lambda: torch.rand(64, generator=g))
    states = chain(target.log_prob, start, momenta, uniforms, steps=5, adapt=60)
    z, accepted = zip(*(next(states) for _ in range(160)))
    seen, share = torch.cat(z[60:]), torch.stack(accepted[60:]).double().mean()
    torch.testing.assert_close(seen.mean(0), target.mean, rtol=0, atol=0.07)
    torch.testing.assert_close(seen.T.cov(), want, rtol=0, atol=0.07)
    assert 0.8 < share < 0.99


def test_surrogate_has_the_bounds_gradient_but_not_its_value() -> None:
    log_px = torch.randn(5, 3, requires_grad=True)
    rest = torch.randn(5, 3)
    terms = Terms(log_px, rest, torch.zeros(5, 3), torch.zeros(3))
    bound, surrogate = bounds.importance_weighted(terms), bounds.iwae_surrogate(terms)
    a, b = (torch.autograd.grad(v.sum(), log_px, retain_graph=True)[0] for v in (bound, surrogate))
    torch.testing.assert_close(a, b)
    assert (bound - surrogate).abs().min() > 1e-3


# -- model, objective, samplers ----------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"size": 8, "latent_dim": 3, "hidden": [12]}


def filled(**kwargs: Any) -> VAE:
    torch.manual_seed(0)
    model = VAE(**{**TINY, **kwargs})
    suites.randomise(model, 0, 0.1)
    return model.eval()


def pixels(n: int = 4, channels: int = 1) -> Tensor:
    return torch.randint(0, 256, (n, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


KINDS = [
    {},
    {"binarise": "dynamic"},
    {"binarise": "threshold"},
    {"likelihood": "gaussian"},
    {"likelihood": "gaussian", "scale": "shared", "squash": False},
    {
        "likelihood": "discretised-logistic",
        "architecture": "conv",
        "hidden": [4, 6],
        "channels": 3,
        "activation": "silu",
    },
    {"likelihood": "discretised-logistic", "scale": 0.1, "hidden": [12, 10]},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_likelihood_is_a_bound_per_image(kind: dict[str, Any]) -> None:
    model = filled(**kind)
    x = pixels(4, model.shape[0])
    elbo, how = model.log_likelihood(x, generators(range(4)), samples=1)
    tight, other = model.log_likelihood(x, generators(range(4)), samples=200)
    alone, _ = model.log_likelihood(x[1:2], generators([1]), samples=200)
    torch.testing.assert_close(alone, tight[1:2])
    assert how.startswith("ELBO") and other.startswith("IWAE-200") and torch.isfinite(tight).all()
    assert tight.mean() > elbo.mean() - 0.5
    assert ("binarised" in how) == (model.likelihood.heads == 1)


@torch.no_grad()
def test_dequantised_density_is_an_8_bit_probability() -> None:
    """A Gaussian decoder much wider than a level: its dequantised bound is the probability mass of the level."""
    model = filled(likelihood="gaussian", scale=0.5, squash=False)
    for p in (model.encoder.embedding, model.encoder.log_var, model.decoder.layers[0][0]):
        p.weight.zero_(), p.bias.zero_()  # z is nothing
    model.decoder.layers[-1][0].bias.fill_(0.5)
    x = pixels(2)
    nats, _ = model.log_likelihood(x, generators(range(2)), samples=3)
    normal = torch.distributions.Normal(0.5, 0.5)
    level, half = x.double() / LEVELS, 0.5 / LEVELS
    mass = (normal.cdf(level + half) - normal.cdf(level - half)).log().sum((1, 2, 3))
    torch.testing.assert_close(nats, mass, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("estimator", ["a", "b", "iwae"])
def test_objective_is_the_bound_at_the_steps_draws(estimator: Any) -> None:
    model = filled(binarise="dynamic")
    objective = VAEObjective(model, estimator=estimator, samples=3, map_over=100)
    batch, step = {"x": pixels(5) / 127.5 - 1}, Step(4, seed=2)
    loss, logs = objective.loss("main", batch, step)
    x = (step.rand(5 * 64, "pixels").view(5, 1, 8, 8) < (batch["x"] + 1) / 2).float()
    terms = model.terms(x, step.randn((5, 3, 3), "eps").transpose(0, 1))
    bound = {"a": bounds.estimator_a, "b": bounds.estimator_b, "iwae": bounds.importance_weighted}[estimator](terms)
    torch.testing.assert_close(loss, -bound.mean() - log_prior_of_parameters(model) / 100)
    torch.testing.assert_close(logs["bits_per_dim"], -bound.mean().detach() / (64 * math.log(2)))
    assert set(torch.unique(x).tolist()) == {0.0, 1.0}


def test_exact_levels_reach_a_discretised_likelihood() -> None:
    """0 and 255 must meet the open ends of the distribution after the way to [-1, 1] and back."""
    objective = VAEObjective(filled(likelihood="discretised-logistic"))
    x = pixels(8)
    assert torch.equal(objective.pixels({"x": x / 127.5 - 1}, Step(0)), x.float() / LEVELS)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(VgmError, match="halved"):
        VAE(size=10, architecture="conv", hidden=[4, 4])
    with pytest.raises(VgmError, match="binarise"):
        VAE(likelihood="gaussian", binarise="dynamic")
    with pytest.raises(VgmError, match="scale"):
        VAE(likelihood="gaussian", scale=-1.0)
    with pytest.raises(VgmError, match="kl_weight"):
        VAEObjective(filled(), estimator="iwae", kl_weight=2.0)
    with pytest.raises(VgmError, match="2 latents"):
        ManifoldSampler()(filled(), request(1))
    with pytest.raises(VgmError, match="reconstruct"):
        ReconstructionSampler()(filled(), request(1))
    with pytest.raises(VgmError, match="no square"):
        CONVERTER.config(VAE(size=(3, 4), hidden=[5]).state_dict())


def request(n: int, items: range | None = None, **kwargs: Any) -> Request:
    items = items or range(n)
    return Request(shape=(1, 8, 8), generators=generators(items), index=list(items), **kwargs)


@torch.no_grad()
def test_samples_and_reconstructions() -> None:
    model = filled(architecture="conv", hidden=[4, 6])
    images = pixels(3) / 127.5 - 1
    mean = VAESampler()(model, request(4))
    binary = VAESampler(pixels="sample")(model, request(4))
    assert mean.abs().max() <= 1 and set(torch.unique(binary).tolist()) <= {-1.0, 1.0}
    pairs = ReconstructionSampler()(model, request(6, images=images))
    assert torch.equal(pairs[::2], images)
    torch.testing.assert_close(pairs[1::2], ReconstructionSampler(pairs=False)(model, request(3, images=images)))
    torch.testing.assert_close(pairs[3:5], ReconstructionSampler()(model, request(2, range(3, 5), images=images)))


@torch.no_grad()
def test_manifold_is_a_picture_of_equal_masses() -> None:
    model = filled(latent_dim=2)
    grid = ManifoldSampler(side=3)(model, request(9))
    centre = model.mean(torch.zeros(1, 2)) * 2 - 1
    torch.testing.assert_close(grid[4:5], centre)
    torch.testing.assert_close(grid[5:7], ManifoldSampler(side=3)(model, request(2, range(5, 7))))


@torch.no_grad()
def test_it_is_a_codec() -> None:
    model = filled(likelihood="gaussian")
    x = pixels(4) / 127.5 - 1
    moments = model.encode(x)
    assert moments.shape == (4, 6, 1, 1) and model.latent_shape((1, 8, 8)) == (3, 1, 1)
    noise = torch.randn(4, 3, 1, 1)
    z = model.latents(moments, noise)
    recon, mu, logvar = model((x + 1) / 2, noise.flatten(1))
    torch.testing.assert_close(model.decode(z), recon * 2 - 1)
    torch.testing.assert_close(moments.flatten(1), torch.cat([mu, logvar], dim=1))
    with pytest.raises(VgmError, match="images"):
        model.latent_shape((3, 8, 8))


def test_pythae_layout_round_trip() -> None:
    torch.manual_seed(0)
    model = VAE(**{**PRESETS["pythae"], "hidden": [9, 7]})
    state = model.state_dict()
    assert CONVERTER.recognise(state) and sorted(names(2)) == sorted(state)
    other = VAE(**CONVERTER.config(state))
    other.load_state_dict(CONVERTER.to_ours(state))
    back = CONVERTER.from_ours(other.state_dict())
    assert all(torch.equal(v, back[k]) for k, v in state.items())
    with pytest.raises(KeyError):
        CONVERTER.to_ours({k: v for k, v in state.items() if k != "encoder.log_var.bias"})


# -- through the engine ------------------------------------------------------------------------------------------------

SMALL = ("model.hidden=[4,6]", "model.latent_dim=3", "train.ema=[0.9]")


class TestTraining(suites.ObjectiveSuite):
    recipe = "vae/mnist"
    overrides = SMALL


class TestSampling(suites.SamplerSuite):
    recipe = "vae/mnist"
    overrides = SMALL


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted((Path(__file__).parents[2] / "recipes" / "vae").glob("*.yaml"))]
)
def test_recipes(name: str) -> None:
    suite = suites.RecipeSuite()
    suite.recipe = f"vae/{name}"
    suite.test_validates_and_builds()
    suite.test_opens_with_what_it_is()


def test_train_sample_and_reconstruct(vgm: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ("train.steps=4", "train.batch_size=8", "train.preview_n=4", "train.save_every=4", "train.compile=off")
    code, _, err = vgm("train", "vae", "--out", run, f"data.path={tiny_dataset}", *SMALL, *short)
    assert code == 0, err
    assert vgm("sample", run, "-n", 4, "--out", tmp_path / "a.png", "pixels=sample")[0] == 0
    bits = "bits-per-dim:n=8:samples=1,bits-per-dim:n=8:samples=5"
    code, out, err = vgm("evaluate", run, "--metrics", bits, "--json")
    assert code == 0, err
    kinds = [v["protocol"]["options"]["likelihood"] for v in json.loads(out)]
    assert kinds == ["ELBO, pixels binarised at random", "IWAE-5 bound, pixels binarised at random"]
    assert all(v["metric"] == "bits-per-dim" and 0 < v["value"] < 2 for v in json.loads(out))
    code, _, err = vgm(
        "sample", run, "-n", 6, "--sampler", "vae-reconstruct", "--input", tiny_dataset, "--out", tmp_path / "b.npz"
    )
    assert code == 0, err
    import numpy as np

    from vgm_cli.data import open_dataset

    first = to_uint8(open_dataset(tiny_dataset, size=28, channels=1).pixels(range(3))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(tmp_path / "b.npz")["arr_0"][::2], first)
    given = ("--sampler", "vae-reconstruct", "--input", tiny_dataset)
    assert vgm("sample", run, "-n", 6, *given, "--out", tmp_path / "c.png")[0] == 0
    code, _, err = vgm("rerun", tmp_path / "c.png")
    assert code == 0 and "identical" in err, err
