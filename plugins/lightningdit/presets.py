"""Published sizes, as constructor keywords. Torch-free.

hustvl/LightningDiT@2725fed models/lightningdit.py (the options as in configs/), vavae/configs/.
"""

from __future__ import annotations

from typing import Any

from vgm_cli.nets.dit_presets import SIZES

OPTIONS: dict[str, Any] = {"learn_sigma": False, "swiglu": True, "rope": True, "rmsnorm": True}
LARGER = {
    "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
    "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}
PUBLISHED = (("B", 1), ("B", 2), ("L", 2), ("XL", 1), ("XL", 2), ("1p0B", 1), ("1p0B", 2), ("1p6B", 1), ("1p6B", 2))
TRANSFORMERS: dict[str, dict[str, Any]] = {"LightningDiT": OPTIONS} | {  # the first has the options alone
    f"LightningDiT-{size}/{patch}": {**{**SIZES, **LARGER}[size], "patch_size": patch, **OPTIONS}
    for size, patch in PUBLISHED
}
CODECS: dict[str, dict[str, Any]] = {
    "f16d32": {
        "ch": 128,
        "ch_mult": (1, 1, 2, 2, 4),
        "num_res_blocks": 2,
        "attn_resolutions": (16,),
        "resolution": 256,
        "z_channels": 32,
        "embed_dim": 32,
        "in_channels": 3,
        "out_ch": 3,
        "feature_dim": 1024,
    }
}
