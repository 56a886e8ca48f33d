"""Published networks as constructor keywords. Torch-free.

sonnet-cifar, zalando-cifar: the example and the notebook as they are. The paper gives 256 hidden units, the number of
layers, K and the grids; it does not state the width inside the residual blocks nor D, which are 256 and 64 here.
"""

from __future__ import annotations

from typing import Any

EXAMPLE: dict[str, Any] = {
    "channels": 128,
    "residual_channels": 32,
    "residual_layers": 2,
    "embed_dim": 64,
    "n_embed": 512,
    "image_channels": 3,
}
PAPER = EXAMPLE | {"layout": "paper", "channels": 256, "residual_channels": 256, "quantizer": "loss"}

AUTOENCODER: dict[str, dict[str, Any]] = {
    "sonnet-cifar": {**EXAMPLE, "layout": "sonnet", "quantizer": "ema", "flavour": "sonnet"},
    "zalando-cifar": {**EXAMPLE, "layout": "zalando", "quantizer": "ema", "flavour": "zalando"},
    "paper-cifar": {**PAPER, "groups": 10, "likelihood": "discretised-logistic"},
    "paper-imagenet128": PAPER,
    "small": {
        "layout": "sonnet",
        "channels": 64,
        "residual_channels": 32,
        "residual_layers": 2,
        "embed_dim": 16,
        "n_embed": 128,
    },
}
PRIOR: dict[str, dict[str, Any]] = {
    "imagenet128": {"channels": 256, "n_layer": 20, "kernel_size": 5, "head_channels": 1024},
    "small": {"channels": 64, "n_layer": 8, "kernel_size": 3, "head_channels": 128, "dropout": 0.1},
}
