"""Published configurations of NCSN++, DDPM++ and DDPM as constructor keywords. Torch-free.

Sources: yang-song/score_sde_pytorch@cb1f359 configs/ and gnobitab/RectifiedFlow@5a1fd4d ImageGeneration/configs/.
Names say the network and its data; "rf-" ones were trained as rectified flows. Data are in [-1, 1] where `centered` is
left alone (true), in [0, 1] where it is false.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

DDPMPP: Config = {"image_size": 32, "in_channels": 3, "num_classes": 0, "nf": 128, "ch_mult": [1, 2, 2, 2]}
DDPMPP |= {"num_res_blocks": 4, "attn_resolutions": [16], "dropout": 0.1}
NCSNPP: Config = DDPMPP | {"fir": True, "progressive_input": "residual"}
VE: Config = {"scale_by_sigma": True, "centered": False}
DEEP: Config = {"num_res_blocks": 8}
SKIPS: Config = {"fir": True, "progressive": "output_skip", "progressive_input": "input_skip"}
PYRAMID: Config = (
    VE | SKIPS | {"embedding_type": "fourier", "attn_resolutions": [16], "dropout": 0.0, "num_scales": 2000}
)
LARGE: Config = PYRAMID | {"image_size": 256, "in_channels": 3, "num_classes": 0, "nf": 128, "num_res_blocks": 2}
LARGE |= {"ch_mult": [1, 1, 2, 2, 2, 2, 2], "sigma_max": 378}
HUGE: Config = PYRAMID | {"image_size": 1024, "in_channels": 3, "num_classes": 0, "nf": 16, "num_res_blocks": 1}
HUGE |= {"ch_mult": [1, 2, 4, 8, 16, 32, 32, 32], "sigma_max": 1348}

DDPM: Config = DDPMPP | {"num_res_blocks": 2, "resblock_type": "ddpm", "skip_rescale": False, "norm_groups": 32}

PRESETS: dict[str, Config] = {
    "ddpm-cifar10": DDPM,
    "ddpm-cifar10-ve": DDPM | VE,
    "ddpm-256": DDPM | {"image_size": 256, "ch_mult": [1, 1, 2, 2, 4, 4], "dropout": 0.0},
    "ddpmpp-cifar10": DDPMPP,
    "ddpmpp-cifar10-deep": DDPMPP | DEEP,
    "ncsnpp-cifar10": NCSNPP | VE | {"embedding_type": "fourier"},
    "ncsnpp-cifar10-deep": NCSNPP | VE | DEEP | {"embedding_type": "fourier"},
    "ncsnpp-cifar10-discrete": NCSNPP | VE,
    "ncsnpp-cifar10-vp": NCSNPP,
    "ncsnpp-cifar10-vp-deep": NCSNPP | DEEP,
    "ncsnpp-celeba64": NCSNPP | VE | {"image_size": 64, "sigma_max": 90},
    "ncsnpp-bedroom256": LARGE,
    "ncsnpp-church256": LARGE | {"sigma_max": 380},
    "ncsnpp-celebahq256": LARGE | {"sigma_max": 348},
    "ncsnpp-ffhq256": LARGE | {"sigma_max": 348},
    "ncsnpp-1024": HUGE,
    "rf-cifar10": DDPMPP | {"dropout": 0.15},
    "rf-256": LARGE | {"centered": True},  # CelebA-HQ, AFHQ cat
    "rf-lsun256": LARGE,
}
