"""MeanFlow's networks, told two times, which give an average velocity: DiT (vgm_cli/nets/dit.py) and EDM's DDPM++
(vgm_cli/nets/song_unet.py).

Gsunshine/meanflow@d70cb55 models/models_dit.py and zhuyu-cs/MeanFlow@04d183c sit.py, which are the same function;
Gsunshine/py-meanflow@1f6d72d meanflow/models/unet.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vgm_cli.nets.dit import DiT
from vgm_cli.nets.song_unet import SongUNet
from vgm_cli.ranges import Depth, Positive, Rate, Side, Whole, Width


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
        qknorm: bool = False,  # queries and keys are normalised per head, by a LayerNorm with weights
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
            qknorm=qknorm,
        )

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return DiT.example({**config, "second_time": True})


class MeanFlowUNet(SongUNet):
    """u(x, t, s = t - r, augment): the same average velocity on CIFAR-10, told how its image was augmented."""

    def __init__(
        self,
        img_resolution: Side = 32,  # side of x
        in_channels: Width = 3,  # channels of x
        out_channels: Width | None = None,  # None: as many
        augment_dim: Whole = 0,  # numbers that say how an image was augmented; 0: it is not told
        model_channels: Width = 128,  # width that the multipliers are of
        channel_mult: Sequence[int] = (2, 2, 2),  # of every level, each half the size of the one before
        channel_mult_emb: Width = 4,  # of the embedding
        num_blocks: Depth = 4,  # residual blocks of a level
        attn_resolutions: Sequence[int] = (16,),  # sides at which attention follows a block
        dropout: Rate = 0.2,  # inside blocks
        channel_mult_noise: Width = 2,  # of each time's waves
        resample_filter: Sequence[int] = (1, 3, 3, 1),  # taps of the filter of every change of size
    ):
        super().__init__(
            img_resolution,
            in_channels,
            out_channels,
            augment_dim,
            model_channels,
            channel_mult,
            channel_mult_emb,
            num_blocks,
            attn_resolutions,
            dropout,
            channel_mult_noise,
            resample_filter,
            second_time=True,
        )

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return SongUNet.example({**config, "second_time": True})
