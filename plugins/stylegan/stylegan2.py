"""StyleGAN2 generator and discriminator, as in StyleGAN2-ADA.

Karras et al., CVPR 2020 (arXiv 1912.04958), sec. 2 and 4; Karras et al., NeurIPS 2020 (arXiv 2006.06676), app. D.
Official code: NVlabs/stylegan2-ada-pytorch@d72cc7d training/networks.py.
Deviations: styles scale activations, never weights (the same numbers, without grouped convolutions); the filter of all
layers is one buffer; precision is the trainer's, not a number of layers; sides other than powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.example import label, noise
from vgm_cli.nn.fir import upfirdn2d
from vgm_cli.nn.precision import full_precision
from vgm_cli.ranges import Blocks, Positive, Side, Whole, Width

from .layers import (
    ACTIVATIONS,
    EqualConv,
    EqualLinear,
    StyleGenerator,
    bias_act,
    minibatch_stddev,
    one_hot,
    pixel_norm,
    sides,
)

Architecture = Literal["orig", "skip", "resnet"]
HALF = math.sqrt(0.5)


def setup_filter(taps: Sequence[float]) -> Tensor:
    """(n,) taps -> (n, n) kernel of sum 1, from eight taps on the (n,) taps of a separable one."""
    f = torch.tensor(taps, dtype=torch.float32)
    f = torch.outer(f, f) if len(taps) < 8 else f
    return f / f.sum()


def upsample(x: Tensor, f: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W) through the filter f: (n, n), or (n,) separable."""
    n = f.shape[0]
    return upfirdn2d(x, (f * 2**f.ndim).to(x), up=2, pad=((n + 1) // 2, (n - 2) // 2))


def downsample(x: Tensor, f: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2) through the filter f."""
    n = f.shape[0]
    return upfirdn2d(x, f.to(x), down=2, pad=((n - 1) // 2, (n - 2) // 2))


def conv(x: Tensor, weight: Tensor, f: Tensor | None = None, up: bool = False, down: bool = False) -> Tensor:
    """Convolution that keeps the side, with doubling (weight turned round, as a transposed convolution has it) or
    halving through the filter f: (B, in, H, W) -> (B, out, ...)."""
    k = weight.shape[-1]
    if not up and not down:
        return F.conv2d(x, weight, padding=k // 2)
    assert f is not None
    n = f.shape[0]
    if up:
        if k == 1:
            return upsample(F.conv2d(x, weight), f)
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        return upfirdn2d(
            x, (f * 2**f.ndim).to(x), pad=(k // 2 + (n + 1) // 2 - (k - 1), k // 2 + (n - 2) // 2 - (k - 2))
        )
    if k == 1:
        return F.conv2d(downsample(x, f), weight)
    x = upfirdn2d(x, f.to(x), pad=(k // 2 + (n - 1) // 2, k // 2 + (n - 2) // 2))
    return F.conv2d(x, weight, stride=2)


def modulated_conv(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    demodulate: bool = True,
    f: Tensor | None = None,
    up: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Convolution whose input channels are scaled by styles (B, in), its output divided by the norm of the scaled
    weights (eq. 1 and 3 of arXiv 1912.04958), then noise (broadcast to the output) added. gain: on all of it, which
    costs nothing with demodulation. Activations are scaled; of a single image the weights, where they are fewer."""
    if demodulate and x.dtype == torch.float16:  # keep half precision away from its limits
        weight = weight / (weight.abs().amax((1, 2, 3), keepdim=True) * math.sqrt(weight[0].numel()))
        styles = styles / styles.abs().amax(1, keepdim=True)
    d = styles.new_full((1, len(weight)), gain)
    if demodulate:
        with full_precision(x.device):
            power = weight.float().square().flatten(1)  # (out, in k k): a product is faster than sums over k k
            scales = styles.float().square().repeat_interleave(weight[0, 0].numel(), 1)
            d = (scales @ power.T + 1e-8).rsqrt() * gain
    if len(x) == 1 and x.numel() > weight.numel() and not styles.requires_grad:
        out = conv(x, weight * styles[0, :, None, None] * d[0, :, None, None, None], f, up)
        return out if noise is None else out + (noise * gain).to(out.dtype)
    out = conv(x * styles.to(x.dtype)[:, :, None, None], weight, f, up)
    d = d.to(out.dtype)[:, :, None, None]
    if noise is not None:
        return torch.addcmul((noise * gain).to(out.dtype), out, d)
    return out * d if demodulate or gain != 1 else out


class MappingNetwork(nn.Module):
    """z (B, z_dim) and a label (B, classes), each normalised, to w (B, w_dim)."""

    def __init__(
        self,
        z_dim: int,  # 0 for a label alone, as in the discriminator
        classes: int,  # 0 for z alone
        w_dim: int,  # length of the output
        layers: int,  # fully connected layers
        width: int,  # of the hidden layers
        embed: int,  # width of the embedded label
        lr_multiplier: float,  # factor on the learning rate of these layers
        act: str,  # nonlinearity
    ):
        super().__init__()
        self.act, self.z_dim, self.classes, self.depth = act, z_dim, classes, layers
        if classes:
            self.embed = EqualLinear(classes, embed)
        widths = [z_dim + (embed if classes else 0), *[width] * (layers - 1), w_dim]
        for i in range(layers):
            self.add_module(f"fc{i}", EqualLinear(widths[i], widths[i + 1], 1.0, lr_multiplier))

    def forward(self, z: Tensor | None, y: Tensor | None = None) -> Tensor:
        """z: (B, z_dim), y: (B,) -> (B, w_dim), in single precision."""
        device = (z if z is not None else y).device  # type: ignore[union-attr]
        with full_precision(device):
            parts = [pixel_norm(z.float())] if z is not None else []
            if self.classes:
                parts.append(pixel_norm(self.embed(one_hot(y, self.classes))))
            x = torch.cat(parts, dim=1)
            for i in range(self.depth):
                x = bias_act(self.get_submodule(f"fc{i}")(x), act=self.act)
            return x


class Layer(nn.Module):
    """Modulated 3x3 convolution, then noise, bias and activation."""

    def __init__(
        self,
        fan_in: int,  # channels of the input
        out: int,  # channels of the output
        w_dim: int,  # length of the style w
        side: int,  # of the output in pixels
        up: bool,  # doubles the side
        use_noise: bool,  # adds learned amounts of noise
        act: str,  # nonlinearity
    ):
        super().__init__()
        self.up, self.act = up, act
        self.affine = EqualLinear(w_dim, fan_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out, fan_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(side, side))
            self.noise_strength = nn.Parameter(torch.zeros(()))

    def forward(
        self, x: Tensor, w: Tensor, noise: Tensor | None, f: Tensor, gain: float = 1.0, clamp: float | None = None
    ) -> Tensor:
        """x: (B, in, h, w), w: (B, w_dim), noise: (B or 1, 1, H, W)."""
        if noise is not None:
            noise = noise * self.noise_strength
        limit, gain = None if clamp is None else clamp * gain, ACTIVATIONS[self.act][1] * gain
        early = gain if self.act != "swish" else 1.0  # the others let positive factors through: scale small tensors
        x = modulated_conv(x, self.weight, self.affine(w), noise, f=f, up=self.up, gain=early)
        return bias_act(x, self.bias * early, self.act, gain / early, limit)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation."""

    def __init__(self, fan_in: int, channels: int, w_dim: int):
        super().__init__()
        self.affine = EqualLinear(w_dim, fan_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, fan_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, w: Tensor, clamp: float | None = None) -> Tensor:
        styles = self.affine(w) / math.sqrt(self.weight.shape[1])
        return bias_act(modulated_conv(x, self.weight, styles, demodulate=False), self.bias, clamp=clamp)


class Block(nn.Module):
    """All layers of the synthesis network at one side."""

    def __init__(
        self,
        fan_in: int,  # channels of the input; 0: the constant
        out: int,  # channels of the output
        w_dim: int,  # length of the style w
        side: int,  # of the output in pixels
        rgb: int,  # channels of the image that it gives; 0: none
        skip: bool,  # residual connection (architecture "resnet")
        use_noise: bool,  # adds learned amounts of noise
        act: str,  # nonlinearity
    ):
        super().__init__()
        self.first = fan_in == 0
        if self.first:
            self.const = nn.Parameter(torch.randn(out, side, side))
        else:
            self.conv0 = Layer(fan_in, out, w_dim, side, True, use_noise, act)
        self.conv1 = Layer(out, out, w_dim, side, False, use_noise, act)
        self.torgb = ToRGB(out, rgb, w_dim) if rgb else None
        self.skip = EqualConv(fan_in, out, 1, bias=False) if skip and not self.first else None

    def convs(self) -> list[Layer]:
        return [self.conv1] if self.first else [self.conv0, self.conv1]

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        ws: Iterator[Tensor],
        noise: Iterator[Tensor | None],
        f: Tensor,
        clamp: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        w = next(ws)
        if x is None:
            x = self.conv1(self.const.expand(len(w), -1, -1, -1), w, next(noise), f, clamp=clamp)
        else:
            gain = 1.0 if self.skip is None else HALF
            y = None if self.skip is None else conv(x, self.skip.scaled(), f, up=True) * HALF
            x = self.conv0(x, w, next(noise), f, clamp=clamp)
            x = self.conv1(x, next(ws), next(noise), f, gain, clamp)
            x = x if y is None else x + y
        if image is not None:
            image = upsample(image, f)
        if self.torgb is not None:
            rgb = self.torgb(x, next(ws), clamp).float()
            image = rgb if image is None else image + rgb
        return x, image


class Generator(StyleGenerator):
    """StyleGAN2's generator: a mapping network z (B, latent_size) -> w, and a synthesis network w -> image.

    Side s has min(channel_base / s, channel_max) channels.
    """

    def __init__(
        self,
        size: Side = 1024,  # side of the images in pixels
        in_channels: Width = 3,  # channels of an image
        num_classes: Whole = 0,  # 0 is unconditional
        latent_size: Width = 512,  # length of z
        w_dim: Width = 512,  # length of w
        mapping_layers: Blocks = 8,  # layers of the mapping network
        mapping_width: Width | None = None,  # width of the mapping network; None: w_dim
        embed: Width | None = None,  # width of the embedded label; None: w_dim
        lr_multiplier: Positive = 0.01,  # factor on the mapping network's learning rate
        channel_base: Width = 32768,  # numerator of the channels of a side, see above
        channel_max: Width = 512,  # most channels of a side
        architecture: Architecture = "skip",  # skip: images of all sides are summed; resnet, orig: only the last's
        activation: str = "lrelu",  # nonlinearity of the synthesis network
        mapping_activation: str = "lrelu",  # nonlinearity of the mapping network
        use_noise: bool = True,  # layers add learned amounts of noise
        clamp: Positive | None = None,  # limit of activations, against half precision's overflow
        taps: Sequence[float] = (1, 3, 3, 1),  # of the resampling filter
        base: Width | None = None,  # side of the learned constant; None: see layers.sides
    ):
        super().__init__()
        self.sides = sides(size, base)
        widths = side_channels(len(self.sides), channel_base, channel_max)
        self.size, self.in_channels, self.num_classes = size, in_channels, num_classes
        self.latent_size, self.w_dim, self.num_layers = latent_size, w_dim, 2 * len(self.sides)
        self.clamp = clamp
        self.mapping = MappingNetwork(
            latent_size, num_classes, w_dim, mapping_layers, mapping_width or w_dim, embed or w_dim, lr_multiplier,
            mapping_activation,
        )  # fmt: skip
        for i, (side, width) in enumerate(zip(self.sides, widths)):
            rgb = in_channels if architecture == "skip" or i == len(self.sides) - 1 else 0
            self.add_module(
                f"b{side}",
                Block(
                    widths[i - 1] if i else 0, width, w_dim, side, rgb, architecture == "resnet", use_noise, activation
                ),
            )
        self.noise_shapes = (
            [(1, s, s) for s, b in zip(self.sides, self.blocks()) for _ in b.convs()] if use_noise else []
        )
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("resample_filter", setup_filter(taps))

    def blocks(self) -> list[Block]:
        return [self.get_submodule(f"b{s}") for s in self.sides]  # type: ignore[misc]

    def map(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z: (B, latent_size), y: (B,) -> w: (B, w_dim)."""
        return self.mapping(z, y)  # type: ignore[no-any-return]

    def fixed_noise(self) -> list[Tensor] | None:
        if not self.noise_shapes:
            return None
        layers: list[Any] = [layer for b in self.blocks() for layer in b.convs()]
        return [layer.noise_const[None, None] for layer in layers]

    def active_layers(self, lod: float) -> int:
        return self.num_layers

    def synthesis(self, ws: Tensor, noise: Sequence[Tensor] | None = None, lod: float | None = None) -> Tensor:
        """ws: (B, num_layers, w_dim); a block's image layer shares its style with the next block's first layer.
        noise: one (B or 1, 1, h, w) per convolution, None for none. lod: not grown, has no meaning here."""
        x = image = None
        start = 0
        maps: Iterator[Tensor | None] = iter(noise) if noise else iter([None] * self.num_layers)
        styles = ws.unbind(1)
        for block in self.blocks():
            x, image = block(x, image, iter(styles[start:]), maps, self.resample_filter, self.clamp)
            start += len(block.convs())
        assert image is not None
        return image


def side_channels(levels: int, base: int, limit: int) -> list[int]:
    """Channels from the constant's level up; a level counts as side 4 * 2^i whatever its pixels."""
    return [min(base // (4 << i), limit) for i in range(levels)]


class Conv(EqualConv):
    """Equalised convolution, activation and clamping of the discriminator."""

    def __init__(self, fan_in: int, out: int, kernel: int, act: str = "lrelu", down: bool = False):
        super().__init__(fan_in, out, kernel)
        self.act, self.down = act, down

    def forward(self, x: Tensor, f: Tensor | None = None, gain: float = 1.0, clamp: float | None = None) -> Tensor:
        x = conv(x, self.scaled(), f, down=self.down)
        return bias_act(
            x, self.bias, self.act, ACTIVATIONS[self.act][1] * gain, None if clamp is None else clamp * gain
        )


class DiscriminatorBlock(nn.Module):
    """One side of the discriminator; rgb: channels of an image that enters here, or 0."""

    def __init__(self, width: int, out: int, rgb: int, architecture: Architecture, act: str):
        super().__init__()
        self.passes_image, residual = architecture == "skip", architecture == "resnet"
        self.fromrgb = Conv(rgb, width, 1, act) if rgb else None
        self.conv0 = Conv(width, width, 3, act)
        self.conv1 = Conv(width, out, 3, act, down=True)
        self.skip = EqualConv(width, out, 1, bias=False) if residual else None

    def forward(
        self, x: Tensor | None, image: Tensor | None, f: Tensor, clamp: float | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.fromrgb is not None and image is not None:
            y = self.fromrgb(image, clamp=clamp)
            x = y if x is None else x + y
            image = downsample(image, f) if self.passes_image else None
        assert x is not None
        y = None if self.skip is None else conv(x, self.skip.scaled(), f, down=True) * HALF
        x = self.conv1(self.conv0(x, clamp=clamp), f, 1.0 if y is None else HALF, clamp)
        return (x if y is None else x + y), image


class Epilogue(nn.Module):
    """Minibatch standard deviation and the discriminator's last layers, in single precision."""

    def __init__(
        self,
        width: int,  # channels of the input
        out: int,  # length of the output
        side: int,  # of the input in pixels
        rgb: int,  # channels of the image that joins (architecture "skip"); 0: none
        group_size: int | None,  # images over which the deviation is taken; None: the whole batch
        features: int,  # channels that it adds; 0: none
        act: str,  # nonlinearity
    ):
        super().__init__()
        self.group_size, self.features, self.act = group_size, features, act
        self.fromrgb = Conv(rgb, width, 1, act) if rgb else None
        self.conv = Conv(width + features, width, 3, act)
        self.fc = EqualLinear(width * side**2, width)
        self.out = EqualLinear(width, out)

    def forward(self, x: Tensor, image: Tensor | None, clamp: float | None) -> Tensor:
        with full_precision(x.device):
            x = x.float()
            if self.fromrgb is not None and image is not None:
                x = x + self.fromrgb(image.float())
            if self.features:
                x = minibatch_stddev(x, self.group_size, self.features)
            x = self.conv(x, clamp=clamp)
            return self.out(bias_act(self.fc(x.flatten(1)), act=self.act))  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """StyleGAN2's discriminator; a label enters by projection (Miyato and Koyama 2018)."""

    def __init__(
        self,
        size: Side = 1024,  # side of the images in pixels
        in_channels: Width = 3,  # channels of an image
        num_classes: Whole = 0,  # 0 is unconditional
        channel_base: Width = 32768,  # numerator of the channels of a side, as the generator's
        channel_max: Width = 512,  # most channels of a side
        architecture: Architecture = "resnet",  # how the image enters, as it leaves the generator
        activation: str = "lrelu",  # nonlinearity
        group_size: Width | None = 4,  # images of the minibatch standard deviation; None: the whole batch
        group_features: Width = 1,  # channels that it adds; 0: none
        mapping_layers: Blocks = 8,  # layers of the label's mapping network
        mapping_width: Width | None = None,  # width of the label's mapping network; None: cmap_dim
        embed: Width | None = None,  # width of the embedded label; None: cmap_dim
        lr_multiplier: Positive = 0.01,  # factor on the mapping network's learning rate
        mapping_activation: str = "lrelu",  # nonlinearity of the mapping network
        cmap_dim: Width | None = None,  # length of the mapped label; None: the last width
        clamp: Positive | None = None,  # limit of activations, against half precision's overflow
        taps: Sequence[float] = (1, 3, 3, 1),  # of the resampling filter
        freeze_layers: Blocks = 0,  # so many first layers are never trained (Freeze-D)
        base: Width | None = None,  # side at the last level; None: see layers.sides
    ):
        super().__init__()
        self.sides, self.size, self.num_classes, self.clamp = sides(size, base), size, num_classes, clamp
        widths = side_channels(len(self.sides), channel_base, channel_max)
        self.cmap_dim = (cmap_dim or widths[0]) if num_classes else 0
        skip = architecture == "skip"
        for i in range(len(self.sides) - 1, 0, -1):
            rgb = in_channels if skip or i == len(self.sides) - 1 else 0
            block = DiscriminatorBlock(widths[i], widths[i - 1], rgb, architecture, activation)
            self.add_module(f"b{self.sides[i]}", block)
        if num_classes:
            d = self.cmap_dim
            self.mapping = MappingNetwork(
                0, num_classes, d, mapping_layers, mapping_width or d, embed or d, lr_multiplier, mapping_activation
            )
        self.add_module(
            f"b{self.sides[0]}",
            Epilogue(widths[0], self.cmap_dim or 1, self.sides[0], in_channels if skip else 0, group_size,
                     group_features, activation),
        )  # fmt: skip
        self.register_buffer("resample_filter", setup_filter(taps))
        layers = [m for s in reversed(self.sides[1:]) for m in self.get_submodule(f"b{s}").children()]
        for layer in layers[:freeze_layers]:
            layer.requires_grad_(False)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        x = noise(1, config["in_channels"], config["size"], config["size"])
        return {"x": x, **label(config["num_classes"])}

    def forward(self, x: Tensor, y: Tensor | None = None, lod: float | None = None) -> Tensor:
        """x: (B, C, size, size) about [-1, 1], y: (B,) -> scores (B, 1) in single precision."""
        image: Tensor | None = x
        features: Tensor | None = None
        for side in reversed(self.sides[1:]):
            features, image = self.get_submodule(f"b{side}")(features, image, self.resample_filter, self.clamp)
        scores = self.get_submodule(f"b{self.sides[0]}")(features, image, self.clamp)
        if self.num_classes:
            scores = (scores * self.mapping(None, y)).sum(1, keepdim=True) / math.sqrt(self.cmap_dim)
        return scores  # type: ignore[no-any-return]
