"""Attention over the positions of a feature map and to a sequence of vectors, as in latent diffusion's U-Net.

Rombach et al. 2022 (arXiv 2112.10752), app. E.2.1. Official code: CompVis/latent-diffusion@a506df5
ldm/modules/attention.py, and Stability-AI/stablediffusion@cf1d67a for projections by linear layers. Parameter names are
the official ones; attention is fused.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nets.unet_blocks import zero
from vgm_cli.nn.sdpa import sdpa


class CrossAttention(nn.Module):
    """Multi-head attention of x (N, T, width) to a context (N, L, context_width), or to itself where there is none."""

    def __init__(self, width: int, context_width: int, heads: int, head_channels: int, dropout: float):
        super().__init__()
        self.heads, inner = heads, heads * head_channels
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width, inner, bias=False)
        self.to_v = nn.Linear(context_width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T or L, head_channels)
            for layer, source in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the GELU of its second (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Four times the width, gated, and back."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm: attention over positions, attention to the context, two layers. (N, T, width) -> (N, T, width)."""

    def __init__(
        self,
        width: int,  # of the positions' vectors
        context_width: int | None,  # of the context's vectors; None: the second attention is over positions, too
        heads: int,  # attention heads
        head_channels: int,  # width of a head
        dropout: float,  # share of activations dropped behind attention and inside the two layers
        self_attention: bool = True,  # False: the first attention is to the context as well
    ):
        super().__init__()
        other = context_width or width
        self.self_attention = self_attention
        self.attn1 = CrossAttention(width, width if self_attention else other, heads, head_channels, dropout)
        self.ff = FeedForward(width, dropout)
        self.attn2 = CrossAttention(width, other, heads, head_channels, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), None if self.self_attention else context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a map, with a residual: (N, C, h, w) -> (N, C, h, w)."""

    def __init__(
        self,
        channels: int,  # of the map
        heads: int,  # attention heads
        head_channels: int,  # width of a head
        depth: int = 1,  # number of blocks
        context_width: int | None = None,  # of the context's vectors
        linear: bool = False,  # projections are linear layers on positions, not 1x1 convolutions on the map
        dropout: float = 0.0,  # share of activations dropped
        groups: int = 32,  # groups of the group normalisation
        self_attention: bool = True,  # False: attention is to the context only
    ):
        super().__init__()
        inner = heads * head_channels
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, context_width, heads, head_channels, dropout, self_attention) for _ in range(depth)
        )
        self.proj_out = zero(nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # (N, T, inner)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            return x + self.proj_out(h).transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (height, width)))
