"""Published networks and objectives, as constructor keywords. Torch-free."""

from __future__ import annotations

from typing import Any

CHANNELS = {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}
EDM2: dict[str, dict[str, Any]] = {f"EDM2-{size}": {"model_channels": width} for size, width in CHANNELS.items()}
UNETS: dict[str, dict[str, Any]] = {"mnist": {}}
FASTGEN = {"tangent": "rms", "prior": True, "divide": True}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cifar10": {"P_mean": -1.0, "P_std": 1.4},
    "imagenet64": {"P_mean": -1.0, "P_std": 1.6},
    "imagenet512": {"P_mean": -0.8, "P_std": 1.6},
    "fastgen": {"P_mean": -1.0, "P_std": 1.8, **FASTGEN},  # sCT from EDM's network on CIFAR-10
    "fastgen-imagenet64": {"P_mean": -1.0, "P_std": 1.6, **FASTGEN},
    "mnist": {"P_mean": -2.0, "P_std": 1.6, "warmup": 1000, "tangent": "rms"},
}
DIFFUSION: dict[str, dict[str, Any]] = {
    "cifar10": {"P_mean": -1.0, "P_std": 1.4},
    "imagenet64": {"P_mean": -0.8, "P_std": 1.6},
    "imagenet512": {"P_mean": -0.4, "P_std": 1.0},
    "mnist": {"P_mean": -1.73, "P_std": 1.4},
}
