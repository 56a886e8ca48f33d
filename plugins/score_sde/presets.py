"""Published objectives and classifier, as constructor keywords. Torch-free. (Networks: nets/ncsnpp_presets.)"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

VE: Config = {"sde": "ve", "reduce_mean": False}
VP: Config = {"sde": "vp", "reduce_mean": True}
OBJECTIVES: dict[str, Config] = {
    "ve": VE,
    "vp": VP,
    "subvp": {"sde": "subvp", "reduce_mean": True},
    "ve-discrete": {**VE, "continuous": False},
    "vp-discrete": {**VP, "continuous": False},
}
CLASSIFIERS: dict[str, Config] = {
    "cifar10": {
        "image_size": 32,
        "in_channels": 3,
        "num_classes": 10,
        "blocks_per_group": 4,
        "channel_multiplier": 10,
    }
}
