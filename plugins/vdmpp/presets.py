"""Published networks of google-research/vdm@dc27b98a configs/. Torch-free."""

CIFAR10 = {"n_embd": 128, "n_layer": 32, "dropout": 0.1, "gamma": "learnable_scalar"}
AUGMENTED = {"n_embd": 256, "n_layer": 32, "dropout": 0.05, "gamma": "learnable_nnet", "pinned": False}

PRESETS = {
    "cifar10": CIFAR10,
    "cifar10-aug": AUGMENTED,
    "cifar10-aug-paper": {**AUGMENTED, "attention": True},
    "imagenet32": {**CIFAR10, "n_embd": 256},
    "imagenet64": {**CIFAR10, "n_embd": 256, "n_layer": 64},
}
