"""Published networks and sampling settings as constructor keywords. Torch-free.

LTH14/mar@fe470ac models/mar.py (mar_base, mar_large, mar_huge), README.md (evaluation), main_mar.py (the training
script's head of 3 layers and 1024 channels).
"""

from __future__ import annotations

from typing import Any


def mar(width: int, depth: int, heads: int, layers: int, head_width: int) -> dict[str, Any]:
    """depth: blocks of the encoder, and as many of the decoder; layers, head_width: of the diffusion head."""
    halves = {"width": width, "depth": depth, "heads": heads}
    return {
        **{f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in halves.items()},
        "buffer_size": 64,
        "head_depth": layers,
        "head_width": head_width,
    }


MAR = {
    "mar-base": mar(768, 12, 12, 6, 1024),
    "mar-large": mar(1024, 16, 16, 8, 1280),
    "mar-huge": mar(1280, 20, 16, 12, 1536),
    "mar-large-3x1024": mar(1024, 16, 16, 3, 1024),
}
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}  # scale of the README's evaluation by the encoder's width
SAMPLER: dict[str, dict[str, Any]] = {
    "table": {"steps": 256, "diffusion_steps": 100, "temperature": 1.0, "ramp": "linear"},
    "table-unguided": {"steps": 256, "diffusion_steps": 100, "temperature": 0.95, "guidance_scale": 1.0},
    "ablation": {"steps": 64, "diffusion_steps": 100, "temperature": 1.0, "ramp": "linear"},
}
