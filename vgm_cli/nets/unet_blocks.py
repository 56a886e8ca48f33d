"""The blocks of the ADM U-Net, of which latent diffusion's is made, too. Dhariwal & Nichol 2021 (arXiv 2105.05233).

Official code: openai/guided-diffusion@22e0df8 guided_diffusion/unet.py. Parameter names are the official ones.
Attention is fused: q and k scaled by ch^-1/4 each is SDPA's ch^-1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.sdpa import sdpa


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """(N,) timesteps, whole or not -> (N, dim) cosines then sines of t * max_period^(-k / (dim / 2)), fp32."""
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(max_period) * k / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """32 groups (or as many as asked for), computed in fp32 whatever the input's type is."""

    def __init__(self, channels: int, groups: int = 32):
        if channels % groups:
            raise VgmError(
                f"{channels} channels do not divide into {groups} groups", f"a multiple of {groups} does", USAGE
            )
        super().__init__(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then 3x3 if use_conv."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Half the size: 3x3 stride 2, or 2x2 means."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block: (N, in_channels, h, w) -> (N, out_channels, h', w'), told of time and class by the embedding."""

    def __init__(
        self,
        in_channels: int,  # channels of the input
        out_channels: int,  # channels of the output
        emb_channels: int,  # width of the embedding emb (N, emb_channels) of time and class
        dropout: float,  # share of activations dropped before the last convolution
        scale_shift: bool,  # emb scales and shifts the second normalisation (AdaGN); false: it is added before it
        resample: Literal["up", "down"] | None = None,  # size changes after the first activation (BigGAN)
        groups: int = 32,  # groups of the group normalisations
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            GroupNorm32(in_channels, groups), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        kind = {"up": Upsample, "down": Downsample}
        self.resample = kind[resample](in_channels, False) if resample else nn.Identity()  # no parameters
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels, groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))  # (N, out, h', w')
        e = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


def attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Multi-head attention on qkv: (N, T, 3C) -> (N, T, C).

    The 3C channels are laid out (q|k|v, head, ch) in the new order and (head, q|k|v, ch) in the legacy one: the shapes
    are equal, so weights loaded under the wrong flag give silent garbage.
    """
    n, length, width = qkv.shape
    ch = width // (3 * heads)
    if new_order:
        parts = qkv.view(n, length, 3, heads, ch).permute(2, 0, 3, 1, 4)  # (3, N, heads, T, ch)
    else:
        parts = qkv.view(n, length, heads, 3, ch).permute(3, 0, 2, 1, 4)
    q, k, v = parts.unbind(0)
    return sdpa(q, k, v).transpose(1, 2).reshape(n, length, heads * ch)


def pointwise(conv: Any, x: Tensor) -> Tensor:
    """A convolution of width 1 (an nn.Conv1d) on tokens, (N, T, C) -> (N, T, C'), which keeps the memory layout."""
    return F.linear(x, conv.weight[:, :, 0], conv.bias)


class AttentionBlock(nn.Module):
    """Self-attention over positions, with a residual: (N, C, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int, heads: int, new_order: bool, groups: int = 32):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNorm32(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)  # (N, T, C)
        h = pointwise(self.proj_out, attend(pointwise(self.qkv, tokens), self.heads, self.new_order))
        return x + h.view(n, height, width, c).permute(0, 3, 1, 2)


def zero(module: nn.Module) -> nn.Module:
    """The module with its parameters set to 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def check_side(side: int, channel_mult: Sequence[float], patch: int = 1) -> None:
    """VgmError: skip connections would meet features of another size."""
    halvings = max(len(channel_mult) - 1, 0)
    if side % (patch * 2**halvings):
        hint = f"data.size a multiple of {patch * 2**halvings}, or fewer entries in model.channel_mult"
        raise VgmError(f"{side} pixels cannot be halved {halvings} times in patches of {patch}", hint, USAGE)
