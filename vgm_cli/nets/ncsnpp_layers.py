"""Layers of NCSN++ and DDPM++ (Song et al. 2021, arXiv 2011.13456): blocks, attention, changes of size by FIR filters.

Official code: yang-song/score_sde_pytorch@cb1f359 models/layerspp.py, layers.py and up_or_down_sampling.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.fir import conv_downsample_fir, downsample_fir, upsample_conv_fir, upsample_fir


@torch.no_grad()
def scaled_uniform(weight: Tensor, scale: float = 1.0) -> None:
    """DDPM's initialisation: uniform, variance scale / mean of fan in and out; scale 0 means almost zero."""
    receptive = weight[0, 0].numel()
    fan = (weight.shape[0] + weight.shape[1]) / 2 * receptive
    bound = math.sqrt(3 * (scale or 1e-10) / fan)
    weight.uniform_(-bound, bound)


def initialised(layer: Any, scale: float = 1.0) -> Any:
    """The layer with DDPM's weights and no bias."""
    scaled_uniform(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(in_ch: int, out_ch: int, scale: float = 1.0, **keywords: Any) -> nn.Conv2d:
    return initialised(nn.Conv2d(in_ch, out_ch, 3, **{"padding": 1, **keywords}), scale)


def conv1x1(in_ch: int, out_ch: int) -> nn.Conv2d:
    return initialised(nn.Conv2d(in_ch, out_ch, 1))


def group_norm(channels: int, groups: int | None = None) -> nn.GroupNorm:
    """So many groups; None: 32, fewer where a group would be narrower than 4 channels or they do not divide."""
    if groups is None:
        groups = min(channels // 4, 32)
        while channels % groups:
            groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


class NIN(nn.Module):
    """A linear map of the channels, y = x W + b with W (in, out): the official layout."""

    def __init__(self, in_ch: int, out_ch: int, scale: float = 0.1):
        super().__init__()
        self.W = nn.Parameter(torch.empty(in_ch, out_ch))
        self.b = nn.Parameter(torch.zeros(out_ch))
        scaled_uniform(self.W, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.W.T, self.b)

    def pixels(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return F.conv2d(x, self.W.T[:, :, None, None], self.b)


class Fourier(nn.Module):
    """(B,) -> (B, 2 size): sine and cosine of fixed random frequencies, drawn once with deviation `scale`."""

    def __init__(self, size: int, scale: float):
        super().__init__()
        self.W = nn.Parameter(torch.randn(size) * scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, None].float() * self.W * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def positions(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): sines then cosines of t * 10000^(-i / (dim / 2 - 1)), fp32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(steps * (-math.log(10000) / (half - 1)))
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


class FIRConv(nn.Module):
    """A 3x3 convolution with a filtered change of size, the official Conv2d_0."""

    def __init__(self, in_ch: int, out_ch: int, taps: Sequence[float], up: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_ch, in_ch, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_ch))
        scaled_uniform(self.weight)
        self.taps, self.up = tuple(taps), up

    def forward(self, x: Tensor) -> Tensor:
        x = (upsample_conv_fir if self.up else conv_downsample_fir)(x, self.weight, self.taps)
        return x + self.bias[:, None, None]


class Resample(nn.Module):
    """Twice or half the size, by a FIR filter (taps) or naively, with a 3x3 convolution if with_conv."""

    def __init__(
        self, up: bool, taps: Sequence[float] | None, in_ch: int = 0, out_ch: int = 0, with_conv: bool = False
    ):
        super().__init__()
        self.up, self.taps, self.with_conv = up, taps, with_conv
        if with_conv and taps:
            self.Conv2d_0 = FIRConv(in_ch, out_ch, taps, up)
        elif with_conv:
            self.Conv_0 = conv3x3(in_ch, out_ch) if up else conv3x3(in_ch, out_ch, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.taps:
            if self.with_conv:
                return self.Conv2d_0(x)
            return upsample_fir(x, self.taps) if self.up else downsample_fir(x, self.taps)
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            return self.Conv_0(x) if self.with_conv else x
        return self.Conv_0(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


class Combine(nn.Module):
    """Mixes the image pyramid (B, a, H, W) into the features (B, b, H, W): their sum, or side by side."""

    def __init__(self, pyramid_ch: int, channels: int, how: Literal["sum", "cat"]):
        super().__init__()
        self.Conv_0 = conv1x1(pyramid_ch, channels)
        self.how = how

    def forward(self, pyramid: Tensor, h: Tensor) -> Tensor:
        p = self.Conv_0(pyramid)
        return p + h if self.how == "sum" else torch.cat([p, h], dim=1)


class Attention(nn.Module):
    """One head over all positions, with a residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, scale: float, rescale: bool, groups: int | None = None):
        super().__init__()
        self.GroupNorm_0 = group_norm(channels, groups)
        self.NIN_0, self.NIN_1, self.NIN_2 = (NIN(channels, channels) for _ in range(3))
        self.NIN_3 = NIN(channels, channels, scale)
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.GroupNorm_0(x).permute(0, 2, 3, 1).reshape(b, 1, height * width, c)  # (B, 1 head, T, C)
        h = F.scaled_dot_product_attention(self.NIN_0(tokens), self.NIN_1(tokens), self.NIN_2(tokens))
        h = self.NIN_3(h).reshape(b, height, width, c).permute(0, 3, 1, 2)
        return residual(x, h, self.rescale)


def residual(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    """x + h, divided by the square root of 2 if rescale, so that the variance stays."""
    return (x + h) * math.sqrt(0.5) if rescale else x + h


class ResBlock(nn.Module):
    """Residual block: (B, in_ch, H, W) -> (B, out_ch, H', W'), told of time by temb: (B, temb_dim)."""

    def __init__(
        self,
        in_ch: int,  # channels of the input
        out_ch: int,  # channels of the output
        temb_dim: int | None,  # width of the embedding; None: no time
        act: Callable[[Tensor], Tensor],  # nonlinearity
        dropout: float,  # share of activations dropped
        scale: float,  # of the last convolution's initial weights
        rescale: bool,  # the sum of the two branches is divided by sqrt(2)
        biggan: bool,  # the shortcut is a convolution; false (DDPM): a linear map
        resample: Resample | None = None,  # change of size after the first activation, of biggan
        groups: int | None = None,  # of the normalisations, see group_norm
    ):
        super().__init__()
        self.act, self.rescale, self.out_ch, self.resample = act, rescale, out_ch, resample
        self.GroupNorm_0 = group_norm(in_ch, groups)
        self.Conv_0 = conv3x3(in_ch, out_ch)
        if temb_dim is not None:
            self.Dense_0 = initialised(nn.Linear(temb_dim, out_ch))
        self.GroupNorm_1 = group_norm(out_ch, groups)
        self.Dropout_0 = nn.Dropout(dropout)
        self.Conv_1 = conv3x3(out_ch, out_ch, scale)
        if biggan and (in_ch != out_ch or resample):
            self.Conv_2 = conv1x1(in_ch, out_ch)
        elif in_ch != out_ch:
            self.NIN_0 = NIN(in_ch, out_ch)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.act(self.GroupNorm_0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.Conv_0(h)
        if temb is not None:
            h = h + self.Dense_0(self.act(temb))[:, :, None, None]
        h = self.Conv_1(self.Dropout_0(self.act(self.GroupNorm_1(h))))
        if hasattr(self, "Conv_2"):
            x = self.Conv_2(x)
        elif hasattr(self, "NIN_0"):
            x = self.NIN_0.pixels(x)
        return residual(x, h, self.rescale)


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "elu": F.elu, "relu": F.relu, "lrelu": leaky}
