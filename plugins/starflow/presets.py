"""Published networks as constructor keywords. Torch-free.

TARFlow: the readme of apple/ml-tarflow@313120e and its digits notebook. STARFlow: transformer_flow.py and
configs/starflow_3B_t2i_256x256.yaml of apple/ml-starflow@e565a46; the class-conditional configuration of the paper is
its XLv2 network with the flags of that file.
"""

from __future__ import annotations

from typing import Any

TARFLOW: dict[str, dict[str, Any]] = {
    "img64": {"img_size": 64, "patch_size": 2, "channels": 768, "noise_std": 0.05},
    "img64-likelihood": {"img_size": 64, "patch_size": 2, "channels": 768, "noise_std": 0.0},
    "img128": {"img_size": 128, "patch_size": 4, "channels": 1024, "noise_std": 0.15, "num_classes": 1000},
    "afhq256": {"img_size": 256, "patch_size": 8, "channels": 768, "noise_std": 0.07, "num_classes": 3},
    "digits": {
        "in_channels": 1,
        "img_size": 28,
        "patch_size": 4,
        "channels": 128,
        "num_blocks": 4,
        "layers_per_block": 4,
        "noise_std": 0.1,
        "num_classes": 10,
    },
}
WIDE = {"channels": 3072}
CLASSES = {"num_classes": 1000}
STARFLOW: dict[str, dict[str, Any]] = {
    "XL/1": {**CLASSES, "layers_per_block": (2, 2, 2, 2, 10, 10)},
    "XL/2": {**CLASSES, "layers_per_block": (2, 2, 2, 2, 10, 10), "patch_size": 2},
    "XLv2/1": {**CLASSES, "layers_per_block": (2, 2, 2, 2, 2, 18)},
    "XXL/1": {**CLASSES, **WIDE, "layers_per_block": (2, 2, 2, 2, 13, 13)},
    "XXLv2/1": {**CLASSES, **WIDE, "layers_per_block": (2, 2, 2, 2, 2, 24)},
    "3B-text": {**WIDE, "layers_per_block": (2, 2, 2, 2, 2, 24), "txt_size": 128, "txt_dim": 2048},
}
