"""The small U-Net of the MNIST reimplementation: ShuffleNet blocks scaled by a pixel-normed time embedding.

Same function and parameter names as xandergos/sCM-mnist@2d285393 unet.py Unet (after bot66/MNISTDiffusion); 10 to the
power of -i / (half - 1) are the frequencies of its embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import images
from vgm_cli.nn.features import places
from vgm_cli.nn.norm import pixel_norm
from vgm_cli.ranges import Width


class Waves(nn.Module):
    """(N,) times -> (N, width): sines, then cosines."""

    freqs: Tensor

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.register_buffer("freqs", torch.exp(torch.arange(half) * (-math.log(10) / (half - 1))))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.freqs.float()
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 8), channels)


class ConvNorm(nn.Module):
    """Convolution, group norm, SiLU."""

    def __init__(self, cin: int, cout: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2)
        self.gn = norm(cout)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gn(self.conv(x)))


def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)


def shuffled(x: Tensor) -> Tensor:
    """The two halves of the channels, taking turns: (N, C, H, W)."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class Bottleneck(nn.Module):
    """ShuffleNet v2's unit (Ma et al. 2018): (N, cin, H, W) -> (N, cout, H, W)."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        half = cin // 2
        self.branch1 = nn.Sequential(depthwise(half), norm(half), ConvNorm(half, cout // 2, 1))
        self.branch2 = nn.Sequential(ConvNorm(half, half, 1), depthwise(half), norm(half), ConvNorm(half, cout // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return shuffled(torch.cat([self.branch1(first), self.branch2(second)], dim=1))


class Downsample(nn.Module):
    """ShuffleNet v2's unit that halves the size: (N, cin, H, W) -> (N, cout, H / 2, W / 2)."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        half = cout // 2
        self.branch1 = nn.Sequential(depthwise(cin, 2), norm(cin), ConvNorm(cin, half, 1))
        self.branch2 = nn.Sequential(ConvNorm(cin, half, 1), depthwise(half, 2), norm(half), ConvNorm(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        return shuffled(torch.cat([self.branch1(x), self.branch2(x)], dim=1))


class TimeScale(nn.Module):
    """x (N, C, H, W) times the pixel norm of 1 + mlp(emb), then SiLU."""

    def __init__(self, emb: int, hidden: int, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(emb, hidden), nn.SiLU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return F.silu(x * pixel_norm(self.mlp(emb) + 1)[:, :, None, None].to(x.dtype))


class EncoderBlock(nn.Module):
    def __init__(self, cin: int, cout: int, emb: int):
        super().__init__()
        self.conv0 = nn.Sequential(*(Bottleneck(cin, cin) for _ in range(3)), Bottleneck(cin, cout // 2))
        self.time_mlp = TimeScale(emb, cout, cout // 2)
        self.conv1 = Downsample(cout // 2, cout)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on, half the size, and what goes across."""
        across = self.conv0(x)
        return self.conv1(self.time_mlp(across, emb)), across


class DecoderBlock(nn.Module):
    def __init__(self, cin: int, cout: int, emb: int):
        super().__init__()
        self.conv0 = nn.Sequential(*(Bottleneck(cin, cin) for _ in range(3)), Bottleneck(cin, cin // 2))
        self.time_mlp = TimeScale(emb, cin, cin // 2)
        self.conv1 = Bottleneck(cin // 2, cout // 2)

    def forward(self, x: Tensor, across: Tensor, emb: Tensor) -> Tensor:
        x = F.interpolate(x, size=across.shape[2:], mode="bilinear", align_corners=False)
        return self.conv1(self.time_mlp(self.conv0(torch.cat([x, across], dim=1)), emb))


class ShuffleUNet(nn.Module):
    """F(x, t) of images of any even size, t in [0, pi / 2]: a Denoiser's network of prediction "trig". It is told no
    class. VgmError: an odd width."""

    num_classes = 0

    def __init__(
        self,
        time_embedding_dim: Width = 256,  # width of the embedding
        in_channels: Width = 1,  # channels of x
        out_channels: Width | None = None,  # None: as many
        base_dim: Width = 64,  # width of the first level, a multiple of 4
        dim_mults: Sequence[int] = (2, 4),  # of every level that follows, each half the size of the one before
    ):
        super().__init__()
        if base_dim % 4 or time_embedding_dim % 2 or time_embedding_dim < 4:
            said = f"base_dim={base_dim} must divide by 4, time_embedding_dim={time_embedding_dim} by 2"
            raise VgmError(said, code=USAGE)
        widths = [base_dim, *(base_dim * m for m in dim_mults)]
        pairs = list(pairwise(widths))
        self.init_conv = ConvNorm(in_channels, base_dim, 3)
        self.time_embedding = Waves(time_embedding_dim)
        self.encoder_blocks = nn.ModuleList(EncoderBlock(a, b, time_embedding_dim) for a, b in pairs)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(b, a, time_embedding_dim) for a, b in pairs[::-1])
        last = widths[-1]
        self.mid_block = nn.Sequential(Bottleneck(last, last), Bottleneck(last, last), Bottleneck(last, last // 2))
        self.logvar_linear = nn.Linear(time_embedding_dim, 1)
        self.final_conv = nn.Conv2d(base_dim // 2, out_channels or in_channels, 1)

    def log_variance(self, t: Tensor) -> Tensor:
        """(N,) -> (N,): see weight.KnowsError."""
        return self.logvar_linear(self.time_embedding(t))[:, 0]

    def reset_log_variance(self) -> None:
        self.logvar_linear.reset_parameters()

    @property
    def middle(self) -> str:
        return "mid_block"

    def features(self, x: Tensor, t: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """Maps (N, C, h, w) behind "encoder_blocks.0", "mid_block" or "decoder_blocks.0"; see api.HasFeatures."""
        down = [f"encoder_blocks.{i}" for i in range(len(self.encoder_blocks))]
        up = [f"decoder_blocks.{i}" for i in range(len(self.decoder_blocks))]
        at, found = places(layers, [*down, "mid_block", *up]), self.run(x, t)
        return [found[i] for i in at]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return images(config["in_channels"], 4 * 2 ** len(config["dim_mults"]))

    def run(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """What each of the blocks gives, in their order: maps (N, C, h, w)."""
        emb = self.time_embedding(t)
        x = self.init_conv(x)
        skips: list[Tensor] = []
        found: list[Tensor] = []
        for block in self.encoder_blocks:
            x, across = block(x, emb)
            skips.append(across)
            found.append(x)
        found.append(self.mid_block(x))
        for block in self.decoder_blocks:
            found.append(block(found[-1], skips.pop(), emb))
        return found

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (N, C, H, W); t: (N,). Gives (N, out_channels, H, W)."""
        return self.final_conv(self.run(x, t)[-1])  # type: ignore[no-any-return]
