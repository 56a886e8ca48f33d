"""Published VAR networks and tokenizers as constructor keywords. Torch-free.

Official files: FoundationVision/VAR@78b9539 models/__init__.py (widths, drop path), utils/arg_util.py and
demo_zero_shot_edit.ipynb (sides of the grids).
"""

from __future__ import annotations

from typing import Any

LADDERS: dict[int, tuple[int, ...]] = {  # side of the finest grid -> sides of all grids
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # images of 256 pixels
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),  # 512
    64: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),  # 1024
}


def ladder(side: int) -> tuple[int, ...]:
    """Sides of the grids that end at `side`: the published ones, else halves, rounded up."""
    if side in LADDERS:
        return LADDERS[side]
    return (*ladder((side + 1) // 2), side) if side > 1 else (1,)


def squares(sides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((side, side) for side in sides)


def drop_path_of(depth: int) -> float:
    """The published drop path of the last block."""
    return round(0.1 * depth / 24, 10)


VAR: dict[str, dict[str, Any]] = {
    f"VAR-d{depth}": {"depth": depth, "drop_path": drop_path_of(depth), "init_gamma": gamma}
    for depth, gamma in ((16, 1e-3), (20, 1e-3), (24, 1e-4), (30, 1e-5))
}
VAR["VAR-d36-s"] = {
    "depth": 36,
    "drop_path": drop_path_of(36),
    "init_gamma": 5e-6,
    "shared_aln": True,
    "scales": squares(LADDERS[32]),
}

PUBLISHED = {
    "n_embed": 4096,
    "embed_dim": 32,
    "ch": 160,
    "ch_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "in_channels": 3,
}
TOKENIZER: dict[str, dict[str, Any]] = {
    "var-vq": PUBLISHED,
    "small": {
        "n_embed": 128,
        "embed_dim": 8,
        "ch": 16,
        "ch_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "attn_type": "none",
        "norm_groups": 8,
    },
}
