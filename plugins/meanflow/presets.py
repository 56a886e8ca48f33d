"""Published networks and objectives, as constructor keywords. Torch-free."""

from __future__ import annotations

from typing import Any

from vgm_cli.nets.dit_presets import SIZES

M = {"depth": 16, "hidden_size": 1024, "num_heads": 16}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    f"MF-{size}/{patch}": {**keywords, "patch_size": patch}
    for size, keywords in {**SIZES, "M": M}.items()
    for patch in (2, 4, 8)
}
UNETS: dict[str, dict[str, Any]] = {"cifar10": {"img_resolution": 32, "in_channels": 3, "augment_dim": 6}}
CIFAR: dict[str, Any] = {
    "equal": 0.25,
    "rows": "coin",
    "dropped": 0.0,
    "norm_p": 0.75,
    "norm_eps": 0.001,
    "augment": {"p": 0.12, "xflip": 1.0e8, "scale": 1, "aniso": 1, "translate_frac": 1},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "imagenet": {"P_mean": -0.4, "P_std": 1.0, "equal": 0.75, "omega": 1.0, "kappa": 0.5},
    # the paper's times, and the ones of the released CIFAR-10 network
    "cifar10-v0": {**CIFAR, "P_mean": -2.0, "P_std": 2.0},
    "cifar10-v1": {**CIFAR, "P_mean": -0.6, "P_std": 1.6, "r_mean": -4.0, "r_std": 1.6, "order": "cap"},
}
