"""StyleGAN: style-based generator and progressively grown discriminator.

Karras, Laine, Aila, CVPR 2019 (arXiv 1812.04948), sec. 2 and app. B, C. Official code: NVlabs/stylegan@1e0d5c7
training/networks_stylegan.py (TensorFlow). Deviation: sides other than powers of two, from a constant of another side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.example import label, noise
from vgm_cli.nn.fir import fir_kernel, upfirdn2d
from vgm_cli.nn.precision import full_precision
from vgm_cli.ranges import Blocks, Positive, Side, Whole, Width

from .layers import EqualConv, EqualLinear, StyleGenerator, minibatch_stddev, one_hot, pixel_norm, sides

GAIN = math.sqrt(2)
EPS = 1e-8


def feature_maps(levels: int, base: int, limit: int) -> list[int]:
    """Channels of level 0 (the constant) to the last, and in front of them those of the discriminator's last layer."""
    return [min(int(base / 2**stage), limit) for stage in range(levels + 1)]


BLUR = (1.0, 2.0, 1.0)


def blur(x: Tensor, taps: Sequence[float] = BLUR) -> Tensor:
    """The filter taps x taps, of sum 1: (B, C, H, W) -> (B, C, H, W)."""
    before = (len(taps) - 1) // 2
    return upfirdn2d(x, fir_kernel(taps, x), pad=(before, len(taps) - 1 - before))


def enlarge(x: Tensor, factor: int = 2) -> Tensor:
    """Every pixel becomes factor x factor."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="nearest")


def shrink(x: Tensor, factor: int = 2) -> Tensor:
    """Means of factor x factor pixels."""
    return x if factor == 1 else F.avg_pool2d(x, factor)


def _spread(weight: Tensor) -> Tensor:
    """(o, i, 3, 3) -> (o, i, 4, 4): what a 3x3 convolution and a doubling (or averaging) of pixels do together."""
    w = F.pad(weight, (1, 1, 1, 1))
    return w[..., 1:, 1:] + w[..., :-1, 1:] + w[..., 1:, :-1] + w[..., :-1, :-1]


def enlarge_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """enlarge, then a 3x3 convolution, as one transposed convolution with 16 taps instead of 36."""
    return F.conv_transpose2d(x, _spread(weight).flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)


def conv_shrink(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution, then shrink, as one convolution with stride 2."""
    return F.conv2d(x, _spread(weight) / 4, bias, stride=2, padding=1)


def split_lod(lod: float, levels: int) -> tuple[int, float]:
    """Level of detail (0 is all of it) -> the last level in use and how much of the level before is shown instead."""
    lod = min(max(lod, 0.0), levels - 1.0)
    return levels - 1 - int(lod), lod - int(lod)


class MappingNetwork(nn.Module):
    """Eight dense layers from z (and a label) to w (sec. 2, app. C)."""

    def __init__(self, latent: int, classes: int, w_dim: int, layers: int, width: int, lr_multiplier: float):
        super().__init__()
        self.label = nn.Parameter(torch.randn(classes, latent)) if classes else None
        widths = [latent * (2 if classes else 1), *[width] * (layers - 1), w_dim]
        self.layers = nn.ModuleList(EqualLinear(a, b, GAIN, lr_multiplier) for a, b in itertools.pairwise(widths))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z: (B, latent), y: (B,) -> w: (B, w_dim), in single precision."""
        with full_precision(z.device):
            x = z.float()
            if self.label is not None:
                x = torch.cat([x, one_hot(y, len(self.label)) @ self.label], dim=1)
            x = pixel_norm(x)
            for layer in self.layers:
                x = F.leaky_relu(layer(x), 0.2)
            return x


class Layer(nn.Module):
    """Convolution (none on the constant), then noise, bias, leaky ReLU, instance norm and style, in this order."""

    def __init__(
        self,
        fan_in: int,  # channels of the input
        out: int,  # channels of the output
        side: int,  # of the output in pixels
        w_dim: int,  # length of the style w
        conv: bool = True,  # false for the layer on the constant
        up: bool = False,  # doubles the side
        blur_filter: Sequence[float] = BLUR,  # taps of the filter that follows the doubling
    ):
        super().__init__()
        self.up, self.blur_filter = up, blur_filter
        self.conv = EqualConv(fan_in, out, 3, GAIN, bias=False) if conv else None
        self.noise_strength = nn.Parameter(torch.zeros(out))
        self.bias = nn.Parameter(torch.zeros(out))
        self.style = EqualLinear(w_dim, 2 * out)
        self.register_buffer("noise", torch.randn(side, side))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x: (B, in, h, w) or twice as small where `up`, w: (B, w_dim), noise: (B or 1, 1, h, w)."""
        if self.conv is not None:
            x = blur(enlarge_conv(x, self.conv.scaled()), self.blur_filter) if self.up else self.conv(x)
        if noise is not None:
            x = torch.addcmul(x, noise.to(x.dtype), self.noise_strength.to(x.dtype).view(-1, 1, 1))
        x = F.leaky_relu(x + self.bias.to(x.dtype).view(-1, 1, 1), 0.2)
        x = F.group_norm(x, x.shape[1], eps=EPS).to(x.dtype)  # one channel per group: an instance norm, but faster
        scale, shift = self.style(w).view(len(x), 2, -1, 1, 1).to(x.dtype).unbind(1)
        return torch.addcmul(shift, x, scale + 1)


class Generator(StyleGenerator):
    """StyleGAN's generator: a mapping network z (B, latent_size) -> w, and a synthesis network w -> image.

    A level of side 4 * 2^i has min(fmap_base / 2^(i + 1), fmap_max) channels. VgmError: a size that does not grow by
    doubling.
    """

    lod: Tensor

    def __init__(
        self,
        size: Side = 1024,  # side of the images in pixels
        in_channels: Width = 3,  # channels of an image
        num_classes: Whole = 0,  # 0 is unconditional
        latent_size: Width = 512,  # length of z
        w_dim: Width = 512,  # length of w
        mapping_layers: Blocks = 8,  # layers of the mapping network
        mapping_width: Width = 512,  # width of the mapping network
        lr_multiplier: Positive = 0.01,  # factor on the mapping network's learning rate
        fmap_base: Width = 8192,  # numerator of the channels of a level, see above
        fmap_max: Width = 512,  # most channels of a level
        base: Width | None = None,  # side of the learned constant; None: see layers.sides
        blur_filter: Sequence[float] = BLUR,  # taps of the filter that follows every doubling
    ):
        super().__init__()
        self.sides = sides(size, base)
        maps = feature_maps(len(self.sides), fmap_base, fmap_max)[1:]
        self.size, self.in_channels, self.num_classes = size, in_channels, num_classes
        self.latent_size, self.w_dim, self.num_layers = latent_size, w_dim, 2 * len(self.sides)
        self.noise_shapes = [(1, s, s) for s in self.sides for _ in (0, 1)]
        self.mapping = MappingNetwork(latent_size, num_classes, w_dim, mapping_layers, mapping_width, lr_multiplier)
        self.const = nn.Parameter(torch.ones(1, maps[0], self.sides[0], self.sides[0]))
        first = [
            Layer(maps[0], maps[0], self.sides[0], w_dim, conv=False),
            Layer(maps[0], maps[0], self.sides[0], w_dim),
        ]
        rest = [
            Layer(a if up else b, b, side, w_dim, up=up, blur_filter=blur_filter)
            for a, b, side in zip(maps, maps[1:], self.sides[1:])
            for up in (True, False)
        ]
        self.layers = nn.ModuleList([*first, *rest])
        self.to_rgb = nn.ModuleList(EqualConv(c, in_channels, 1) for c in maps)
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("lod", torch.zeros(()))

    def map(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z: (B, latent_size), y: (B,) -> w: (B, w_dim)."""
        return self.mapping(z, y)  # type: ignore[no-any-return]

    def fixed_noise(self) -> list[Tensor]:
        layers: Iterable[Any] = self.layers
        return [layer.noise[None, None] for layer in layers]

    def active_layers(self, lod: float) -> int:
        """Layers in use at a level of detail."""
        return self.num_layers - 2 * int(lod)

    def synthesis(self, ws: Tensor, noise: Sequence[Tensor] | None = None, lod: float | None = None) -> Tensor:
        """ws: (B, num_layers, w_dim), noise: num_layers tensors (B or 1, 1, h, w), or None for none; lod: None for the
        one that the weights were trained to -> (B, C, size, size)."""
        if lod is None:
            lod = 0.0 if self.lod.is_meta else float(self.lod)
        top, before = split_lod(lod, len(self.sides))
        x = last = self.const.expand(len(ws), -1, -1, -1)
        for level in range(top + 1):
            last = x
            for i in (2 * level, 2 * level + 1):
                x = self.layers[i](x, ws[:, i], None if noise is None else noise[i])
        image = self.to_rgb[top](x).float()
        if before > 0:
            image = torch.lerp(image, enlarge(self.to_rgb[top - 1](last).float()), before)
        return enlarge(image, self.size // self.sides[top])


class Block(nn.Module):
    """Discriminator level: convolution, then blur, convolution and halving."""

    def __init__(self, fan_in: int, out: int, blur_filter: Sequence[float] = BLUR):
        super().__init__()
        self.blur_filter = blur_filter
        self.conv0 = EqualConv(fan_in, fan_in, 3, GAIN)
        self.conv1 = EqualConv(fan_in, out, 3, GAIN)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h / 2, w / 2)."""
        x = F.leaky_relu(self.conv0(x), 0.2)
        x = conv_shrink(blur(x, self.blur_filter), self.conv1.scaled(), self.conv1.bias)
        return F.leaky_relu(x, 0.2)


class Discriminator(nn.Module):
    """Scores of images, one per class of which the label selects one (Mescheder et al. 2018)."""

    lod: Tensor

    def __init__(
        self,
        size: Side = 1024,  # side of the images in pixels
        in_channels: Width = 3,  # channels of an image
        num_classes: Whole = 0,  # 0 is unconditional
        fmap_base: Width = 8192,  # numerator of the channels of a level, as the generator's
        fmap_max: Width = 512,  # most channels of a level
        group_size: Width = 4,  # images over which the minibatch standard deviation is taken; 1: none
        group_features: Width = 1,  # channels that it adds
        base: Width | None = None,  # side at the last level; None: see layers.sides
        blur_filter: Sequence[float] = BLUR,  # taps of the filter before every halving
    ):
        super().__init__()
        self.sides, self.size, self.num_classes = sides(size, base), size, num_classes
        self.group_size, self.group_features = group_size, group_features
        maps = feature_maps(len(self.sides), fmap_base, fmap_max)
        self.from_rgb = nn.ModuleList(EqualConv(in_channels, c, 1, GAIN) for c in maps[1:])
        self.blocks = nn.ModuleList(Block(a, b, blur_filter) for a, b in zip(maps[2:], maps[1:]))  # of level 1 and up
        self.conv = EqualConv(maps[1] + (group_features if group_size > 1 else 0), maps[1], 3, GAIN)
        self.dense = EqualLinear(maps[1] * self.sides[0] ** 2, maps[0], GAIN)
        self.out = EqualLinear(maps[0], max(num_classes, 1))
        self.register_buffer("lod", torch.zeros(()))

    def entry(self, image: Tensor, level: int) -> Tensor:
        """The image at a level's side, as its features."""
        return F.leaky_relu(self.from_rgb[level](shrink(image, self.size // self.sides[level])), 0.2)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        x = noise(1, config["in_channels"], config["size"], config["size"])
        return {"x": x, **label(config["num_classes"])}

    def forward(self, x: Tensor, y: Tensor | None = None, lod: float | None = None) -> Tensor:
        """x: (B, C, size, size) about [-1, 1], y: (B,) -> scores (B, 1) in single precision."""
        if lod is None:
            lod = 0.0 if self.lod.is_meta else float(self.lod)
        image = x
        top, before = split_lod(lod, len(self.sides))
        x = self.entry(image, top)
        for level in range(top, 0, -1):
            x = self.blocks[level - 1](x)
            if level == top and before > 0:
                x = torch.lerp(x, self.entry(image, top - 1).to(x.dtype), before)
        with full_precision(x.device):
            x = x.float()
            if self.group_size > 1:
                x = minibatch_stddev(x, self.group_size, self.group_features)
            x = F.leaky_relu(self.conv(x), 0.2)
            x = F.leaky_relu(self.dense(x.flatten(1)), 0.2)
            scores = self.out(x)
            if self.num_classes:
                scores = (scores * one_hot(y, self.num_classes)).sum(1, keepdim=True)
        return scores  # type: ignore[no-any-return]
