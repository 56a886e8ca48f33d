"""The networks of rosinality/style-based-gan-pytorch@07fa60b, a widely used port of StyleGAN with other conventions.

Unlike the paper's code: every equalised gain is sqrt(2), the noise strengths' too; no multiplier on the mapping's
weights; one noise map and one style per side; biases before blur and noise; instance norm with eps 1e-5, its scale not
1 + s; doubling fused with a convolution divides by 4 from side 128 on; the discriminator widens in its first
convolutions and compares the whole batch. Nine levels whatever the size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import noise
from vgm_cli.ranges import Blocks, Side, Width

from .layers import EqualConv, EqualLinear, StyleGenerator, minibatch_stddev, pixel_norm
from .model import GAIN, blur, conv_shrink, enlarge, enlarge_conv, shrink, split_lod

WIDTHS = (512, 512, 512, 512, 256, 128, 64, 32, 16)  # of sides 4 to 1024
FUSED_FROM = 5  # side 128


def level_of(size: int) -> int:
    """4 -> 0, 8 -> 1, ... 1024 -> 8."""
    level = size.bit_length() - 3
    if 4 << level != size or not 0 <= level < len(WIDTHS):
        raise VgmError(f"size={size}", "the port makes powers of two from 4 to 1024", USAGE)
    return level


class AdaIN(nn.Module):
    """gamma * instance norm + beta, both affine in w."""

    def __init__(self, channels: int, w_dim: int):
        super().__init__()
        self.style = EqualLinear(w_dim, 2 * channels, GAIN)
        with torch.no_grad():
            self.style.bias[:channels] = 1

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        gamma, beta = self.style(w)[:, :, None, None].to(x.dtype).chunk(2, dim=1)
        return torch.addcmul(beta, F.instance_norm(x, eps=1e-5), gamma)


class Level(nn.Module):
    """Two convolutions (a constant for the first at level 0), each with noise, leaky ReLU and AdaIN."""

    def __init__(self, fan_in: int, out: int, w_dim: int, first: bool, fused: bool):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, out, 4, 4)) if first else None
        self.conv1 = None if first else EqualConv(fan_in, out, 3, GAIN / 4 if fused else GAIN)
        self.conv2 = EqualConv(out, out, 3, GAIN)
        self.noise1, self.noise2 = (nn.Parameter(torch.zeros(out)) for _ in (1, 2))
        self.adain1, self.adain2 = (AdaIN(out, w_dim) for _ in (1, 2))

    def forward(self, x: Tensor | None, w: Tensor, noise: Tensor | None) -> Tensor:
        if self.conv1 is None:
            assert self.input is not None
            x = self.input.expand(len(w), -1, -1, -1)
        else:
            assert x is not None
            x = blur(enlarge_conv(x, self.conv1.scaled(), self.conv1.bias))
        x = self.adain1(self.activate(x, noise, self.noise1), w)
        return self.adain2(self.activate(self.conv2(x), noise, self.noise2), w)  # type: ignore[no-any-return]

    @staticmethod
    def activate(x: Tensor, noise: Tensor | None, strength: Tensor) -> Tensor:
        if noise is not None:
            scaled = strength * math.sqrt(2 / len(strength))
            x = torch.addcmul(x, noise.to(x.dtype), scaled.to(x.dtype).view(-1, 1, 1))
        return F.leaky_relu(x, 0.2)


class Generator(StyleGenerator):
    """size: of the images, 4 to 1024; widths: channels of the nine levels. VgmError: another size."""

    def __init__(
        self, size: Side = 1024, w_dim: Width = 512, mapping_layers: Blocks = 8, widths: Sequence[int] = WIDTHS
    ):
        super().__init__()
        self.size, self.in_channels, self.num_classes = size, 3, 0
        self.step = level_of(size)
        self.latent_size = self.w_dim = w_dim
        self.num_layers = len(widths)
        self.noise_shapes = [(1, 4 << i, 4 << i) for i in range(self.step + 1)]
        self.style = nn.ModuleList(EqualLinear(w_dim, w_dim, GAIN) for _ in range(mapping_layers))
        self.levels = nn.ModuleList(
            Level(widths[max(i - 1, 0)], c, w_dim, i == 0, i >= FUSED_FROM) for i, c in enumerate(widths)
        )
        self.to_rgb = nn.ModuleList(EqualConv(c, 3, 1, GAIN) for c in widths)
        self.register_buffer("w_avg", torch.zeros(w_dim))

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"z": noise(1, config["w_dim"])}

    def map(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z: (B, w_dim) -> w: (B, w_dim)."""
        x = pixel_norm(z.float())
        for layer in self.style:
            x = F.leaky_relu(layer(x), 0.2)
        return x

    def center(self) -> Tensor:
        """The running mean where training left one; the layout holds none, and 10 x 1024 draws make up for it."""
        if not self.w_avg.any():
            z = torch.randn(10240, self.latent_size, generator=torch.Generator().manual_seed(0))
            self.w_avg.copy_(self.map(z.to(self.w_avg.device)).mean(0))
        return self.w_avg

    def active_layers(self, lod: float) -> int:
        return self.step + 1 - int(lod)

    def synthesis(self, ws: Tensor, noise: Sequence[Tensor] | None = None, lod: float | None = None) -> Tensor:
        """ws: (B, 9, w_dim), noise: one (B, 1, h, w) per side -> (B, 3, size, size)."""
        top, before = split_lod(lod or 0.0, self.step + 1)
        x = last = None
        for i in range(top + 1):
            last, x = x, self.levels[i](x, ws[:, i], None if noise is None else noise[i])
        image = self.to_rgb[top](x).float()
        if before > 0:
            image = torch.lerp(image, enlarge(self.to_rgb[top - 1](last).float()), before)
        return enlarge(image, self.size // (4 << top))


class Block(nn.Module):
    """Widening convolution, then blur, convolution and halving; the last one ends at a single pixel."""

    def __init__(self, fan_in: int, out: int, last: bool = False):
        super().__init__()
        self.last = last
        self.conv1 = EqualConv(fan_in, out, 3, GAIN)
        self.conv2 = EqualConv(out, out, 4 if last else 3, GAIN)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        if self.last:
            x = F.conv2d(x, self.conv2.scaled(), self.conv2.bias)
        else:
            x = conv_shrink(blur(x), self.conv2.scaled(), self.conv2.bias)
        return F.leaky_relu(x, 0.2)


class Discriminator(nn.Module):
    """size, widths: as the generator's. from_rgb_activate: a leaky ReLU after the entry."""

    def __init__(self, size: Side = 1024, widths: Sequence[int] = WIDTHS, from_rgb_activate: bool = False):
        super().__init__()
        self.size, self.step, self.num_classes, self.from_rgb_activate = size, level_of(size), 0, from_rgb_activate
        first = Block(widths[0] + 1, widths[0], last=True)
        self.blocks = nn.ModuleList([first, *(Block(b, a) for a, b in itertools.pairwise(widths))])
        self.from_rgb = nn.ModuleList(EqualConv(3, c, 1, GAIN) for c in widths)
        self.linear = EqualLinear(widths[0], 1, GAIN)

    def entry(self, image: Tensor, level: int) -> Tensor:
        x = self.from_rgb[level](shrink(image, self.size // (4 << level)))
        return F.leaky_relu(x, 0.2) if self.from_rgb_activate else x

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, 3, config["size"], config["size"])}

    def forward(self, x: Tensor, y: Tensor | None = None, lod: float | None = None) -> Tensor:
        """x: (B, 3, size, size) -> scores (B, 1)."""
        image = x
        top, before = split_lod(lod or 0.0, self.step + 1)
        x = self.entry(image, top)
        for i in range(top, -1, -1):
            x = self.blocks[i](x if i else minibatch_stddev(x, None))
            if 0 < i == top and before > 0:
                x = torch.lerp(x, self.entry(image, top - 1).to(x.dtype), before)
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]
