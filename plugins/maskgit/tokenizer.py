"""MaskGIT's tokenizer: a VQGAN of convolutions alone, images in [0, 1]. Chang et al. 2022 (arXiv 2202.04200), sec. 3.1.

Official code: google-research/maskgit@1db2359 maskgit/nets/vqgan_tokenizer.py; parameter names are those of its PyTorch
port (open-muse, TiTok, RandAR). Where a residual block changes the number of channels, the 1x1 convolution of its
shortcut sees what the block has made, not what went in: such a block has no skip. Deviation: the host's images in
[-1, 1] are halved and shifted inside. The Gumbel quantizer and batch normalisation, which no released model has, are
not brought.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nets.autoencoder import Pyramid, norm
from vgm_cli.nets.first_stage import QuantizedStage
from vgm_cli.nn.quantize import EntropyTargets, VectorQuantizer
from vgm_cli.ranges import Blocks, Fraction, NonNegative, Positive, Vocabulary, Whole, Width

Activation = Literal["swish", "relu"]


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of every position: (B, C, h, w) -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.over_channels = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.over_channels(x.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class Kind:
    """What all levels of a tokenizer have in common."""

    groups: int  # of the group normalisations; 0: layer normalisation over the channels
    activation: Activation
    strided: bool  # levels are halved by convolutions; false: by means

    def norm(self, channels: int) -> nn.Module:
        return norm(channels, self.groups) if self.groups else ChannelNorm(channels)

    def act(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.activation == "swish" else F.relu(x)


class ResBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kind: Kind):
        super().__init__()
        self.act = kind.act
        self.norm1, self.conv1 = kind.norm(in_channels), conv(in_channels, out_channels)
        self.norm2, self.conv2 = kind.norm(out_channels), conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


def conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


def blocks(widths: Sequence[int], kind: Kind) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(a, b, kind) for a, b in itertools.pairwise(widths))


class Level(nn.Module):
    """Residual blocks of one resolution, and the convolution that halves it, or in a decoder that after the
    doubling."""

    def __init__(self, widths: Sequence[int], kind: Kind, halves: bool = False, doubles: bool = False):
        super().__init__()
        self.block = blocks(widths, kind)
        if halves:
            self.downsample_conv = nn.Conv2d(widths[-1], widths[-1], 4, stride=2, padding=1)
        if doubles:
            self.upsample_conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)


class Encoder(Pyramid):
    """Images (B, C, H, W) in [0, 1] -> (B, embed_dim, H / f, W / f), f = 2^(levels - 1)."""

    def __init__(self, channels: int, ch: int, ch_mult: Sequence[int], depth: int, embed_dim: int, kind: Kind):
        super().__init__()
        self.act, self.strided = kind.act, kind.strided
        self.conv_in = conv(channels, ch)
        widths = [ch, *(ch * m for m in ch_mult)]
        self.down = nn.ModuleList(
            Level([a, *[b] * depth], kind, halves=kind.strided and i < len(ch_mult) - 1)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.mid = blocks([widths[-1]] * (depth + 1), kind)
        self.norm_out = kind.norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            if i:
                h = self.down[i - 1].downsample_conv(h) if self.strided else F.avg_pool2d(h, 2)  # type: ignore[operator]
            for block in level.block:  # type: ignore[union-attr]
                h = self.run(block, h)
        for block in self.mid:
            h = self.run(block, h)
        return self.conv_out(self.act(self.norm_out(h)))


class Decoder(Pyramid):
    """(B, embed_dim, h, w) -> images (B, C, f h, f w) about [0, 1]. up[0] is the highest resolution."""

    def __init__(self, channels: int, ch: int, ch_mult: Sequence[int], depth: int, embed_dim: int, kind: Kind):
        super().__init__()
        self.act = kind.act
        widths = [*(ch * m for m in ch_mult), ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(embed_dim, widths[-1], 3, padding=1)
        self.mid = blocks([widths[-1]] * (depth + 1), kind)
        self.up = nn.ModuleList(
            Level([above, *[own] * depth], kind, doubles=i > 0)
            for i, (own, above) in enumerate(itertools.pairwise(widths))
        )
        self.norm_out = kind.norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid:
            h = self.run(block, h)
        for i in reversed(range(len(self.up))):
            for block in self.up[i].block:  # type: ignore[union-attr]
                h = self.run(block, h)
            if i:
                h = self.up[i].upsample_conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))  # type: ignore[operator]
        return self.conv_out(self.act(self.norm_out(h)))


class MaskGITTokenizer(QuantizedStage):
    """Codec of tokens, or of latents before they are quantised. VgmError: channels that do not divide into groups."""

    def __init__(
        self,
        n_embed: Vocabulary = 1024,  # number of codes
        embed_dim: Width = 256,  # dimensions of a code
        ch: Width = 128,  # width of the highest resolution
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),  # widths per level; each level after the first halves the size
        num_res_blocks: Blocks = 2,  # per level in both halves, and at the bottleneck
        in_channels: Width = 3,  # channels of the images
        norm_groups: Whole = 32,  # groups of the group normalisations; 0: layer normalisation over the channels
        activation: Activation = "swish",  # behind every normalisation
        conv_downsample: bool = False,  # levels are halved by strided convolutions; false: by means
        beta: NonNegative = 0.25,  # weight of the commitment
        entropy_weight: NonNegative = 0.1,  # of the loss that spreads the use of codes
        entropy_targets: EntropyTargets = "softmax",  # assignments in that loss: of all codes, or of the likeliest
        entropy_temperature: Positive = 0.01,  # of the assignments in that loss
        latent_stats: bool = False,  # measure the latents while training, so that diffusion finds them at unit scale
        tile: Width | None = None,  # encode and decode in tiles of this many pixels; None: never
        tile_overlap: Fraction = 0.25,  # share of a tile that its neighbour covers, too
    ):
        sizes = (in_channels, ch, ch_mult, num_res_blocks, embed_dim, Kind(norm_groups, activation, conv_downsample))
        factor, convs = 2 ** (len(ch_mult) - 1), (nn.Identity(), nn.Identity())
        stats = ((1.0, 0.0), latent_stats, tile, tile_overlap)
        super().__init__(Encoder(*sizes), Decoder(*sizes), convs, in_channels, embed_dim, factor, *stats)
        spread = (entropy_weight, entropy_targets, entropy_temperature)
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta, False, False, *spread)
        limit = math.sqrt(3 / n_embed)  # the official initial values, of variance 1 / n_embed
        nn.init.uniform_(self.quantize.embedding.weight, -limit, limit)

    def moments(self, x: Tensor) -> Tensor:
        return self.encoder((x + 1) / 2)

    def reconstruct(self, z: Tensor) -> Tensor:
        return 2 * self.decoder(z) - 1
