"""Published configurations of Glow (openai/glow README), as constructor keywords. Torch-free."""

AFFINE_8 = {"coupling": "affine", "n_bits": 8, "num_classes": 0}
ADDITIVE_5 = {"coupling": "additive", "n_bits": 5, "num_classes": 0}
PORT = {
    "style": "rosinality", "size": 64, "levels": 4, "depth": 32, "permutation": "lu", "n_bits": 5, "num_classes": 0,
}  # fmt: skip

PRESETS = {
    # likelihood
    "cifar10": {"size": 32, "levels": 3, "depth": 32, **AFFINE_8},
    "imagenet32": {"size": 32, "levels": 3, "depth": 48, **AFFINE_8},
    "imagenet64": {"size": 64, "levels": 4, "depth": 48, **AFFINE_8},
    "lsun64": {"size": 64, "levels": 3, "depth": 48, **AFFINE_8},
    # pictures
    "celebahq256": {"size": 256, "levels": 6, "depth": 32, **ADDITIVE_5},
    "lsun96": {"size": 96, "levels": 5, "depth": 64, **ADDITIVE_5},
    "lsun128": {"size": 128, "levels": 5, "depth": 64, **ADDITIVE_5},
    "cifar10-conditional": {
        "size": 32, "levels": 3, "depth": 32, **ADDITIVE_5, "num_classes": 10, "classifier": True,
    },
    "imagenet32-conditional": {
        "size": 32, "levels": 3, "depth": 48, **ADDITIVE_5, "num_classes": 1000, "classifier": True,
    },
    # rosinality/glow-pytorch's train.py
    "rosinality": {**PORT, "coupling": "affine"},
    "rosinality-additive": {**PORT, "coupling": "additive"},
}  # fmt: skip
