"""MeanFlow's transformer: DiT (vgm_cli/nets/dit.py) that is told two times and gives an average velocity.

Gsunshine/meanflow@d70cb55 models/models_dit.py and zhuyu-cs/MeanFlow@04d183c sit.py, which are the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgm_cli.nets.dit import DiT
from vgm_cli.ranges import Depth, Positive, Side, Whole, Width


class MeanFlowDiT(DiT):
    """u(x, t, s = t - r, y): the velocity of the flow averaged from r to t, 0 <= r <= t <= 1, t = 0 being data.

    Both times are told as they are, not in thousandths; s=None is r = t, the velocity at t itself. There is always a
    null class, and no variance.
    """

    def __init__(
        self,
        input_size: Side = 32,  # side of x (latents: image size / 8)
        patch_size: Width = 2,  # side of a token's patch
        in_channels: Width = 4,  # channels of x
        hidden_size: Width = 1152,  # width D
        depth: Depth = 28,  # number of blocks
        num_heads: Depth = 16,  # attention heads; D must divide by it
        mlp_ratio: Positive = 4.0,  # hidden width of the MLP over D
        num_classes: Whole = 1000,  # the null class is one more
    ):
        super().__init__(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio,
            num_classes=num_classes,
            learn_sigma=False,
            second_time=True,
        )

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return DiT.example({**config, "second_time": True})
