"""The causal transformer inside every flow block of TARFlow and STARFlow: one attention, one cache, both families.

Official code: apple/ml-starflow@e565a46 and apple/ml-tarflow@313120e transformer_flow.py, whose parameter names are
ours. Deviation: keys are cached after their rotation, not before; what is attended to is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.attention import causal_attention
from vgm_cli.nn.kv_cache import KVCache
from vgm_cli.nn.sdpa import sdpa

from .rope import Pairs, rotate

Norm = Literal["layer_norm", "rms_norm"]


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a transformer."""

    channels: int  # width
    layers: int  # attention blocks
    head_dim: int = 64  # channels of a head
    num_heads: int | None = None  # None: channels / head_dim
    num_kv_heads: int | None = None  # heads of keys and values; None: num_heads
    expansion: float = 4.0  # width of the MLP over channels
    norm: Norm = "layer_norm"  # before attention and MLP
    swiglu: bool = False  # a gated MLP
    bias: bool = True  # in attention and MLP
    qk_norm: bool = False  # queries and keys of unit mean square
    post_norm: bool = False  # a norm after attention and MLP, too
    final_norm: bool = False  # a norm behind the last block
    pairs: Pairs = "adjacent"  # channels that are rotated together

    @property
    def heads(self) -> int:
        return self.num_heads or self.channels // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.heads

    def check(self) -> None:
        """VgmError: heads that do not fit."""
        if not self.num_heads and self.channels % self.head_dim:
            hint = "model.head_dim=DIVISOR or model.num_heads=N"
            raise VgmError(f"channels={self.channels} are no whole heads of {self.head_dim}", hint, USAGE)
        if self.heads % self.kv_heads:
            raise VgmError(f"{self.heads} heads do not share {self.kv_heads} heads of keys evenly", code=USAGE)


class OffsetRMSNorm(nn.Module):
    """x / rms(x) times (1 + weight), in float32, cast back: Gemma's, whose weight starts at zero. x: (..., dim)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).type_as(x)


def make_norm(kind: Norm, dim: int) -> nn.Module:
    return nn.LayerNorm(dim) if kind == "layer_norm" else OffsetRMSNorm(dim)


class Attention(nn.Module):
    """Norm, one fused projection with rows (q, k, v), rotation, attention, projection."""

    def __init__(self, shape: Shape, causal: bool):
        super().__init__()
        self.shape, self.causal = shape, causal
        width = shape.heads * shape.head_dim
        self.norm = make_norm(shape.norm, shape.channels)
        self.qkv = nn.Linear(shape.channels, width + 2 * shape.kv_heads * shape.head_dim, bias=shape.bias)
        self.proj = nn.Linear(width, shape.channels, bias=shape.bias)
        self.query_norm = OffsetRMSNorm(shape.head_dim) if shape.qk_norm else None
        self.key_norm = OffsetRMSNorm(shape.head_dim) if shape.qk_norm else None
        self.post_norm = OffsetRMSNorm(shape.channels) if shape.post_norm else None

    def forward(
        self, x: Tensor, table: Tensor | None, cache: KVCache | None, layer: int, temperature: float | Tensor
    ) -> Tensor:
        heads, turning = self.shape.heads, self.shape.heads + self.shape.kv_heads
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, self.shape.head_dim))  # (B, T, heads + 2 kv_heads, d)
        qk, v = qkv[:, :, :turning], qkv[:, :, turning:].transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            qk = torch.cat([self.query_norm(qk[:, :, :heads]), self.key_norm(qk[:, :, heads:])], dim=2)
        if table is not None:
            qk = rotate(qk, table, self.shape.pairs)
        q, k = qk.transpose(1, 2).split([heads, turning - heads], dim=1)
        if isinstance(temperature, Tensor) or temperature != 1:
            q = (q / temperature).type_as(k)
        if self.causal:
            out = causal_attention(q, k, v, cache=cache, layer=layer)
        else:
            k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
            out = sdpa(q, k, v)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out if self.post_norm is None else self.post_norm(out)


class MLP(nn.Module):
    """Norm and two layers with a GELU between; with swiglu three, of which one gates another (GeGLU, tanh)."""

    def __init__(self, shape: Shape):
        super().__init__()
        channels, hidden = shape.channels, int(shape.channels * shape.expansion)
        self.norm = make_norm(shape.norm, channels)
        self.post_norm = OffsetRMSNorm(channels) if shape.post_norm else None
        self.swiglu = shape.swiglu
        if shape.swiglu:
            self.gate_proj = nn.Linear(channels, hidden, bias=shape.bias)
            self.up_proj = nn.Linear(channels, hidden, bias=shape.bias)
            self.down_proj = nn.Linear(hidden, channels, bias=shape.bias)
        else:
            into, out = (nn.Linear(*sides, bias=shape.bias) for sides in ((channels, hidden), (hidden, channels)))
            self.main = nn.Sequential(into, nn.GELU(), out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.swiglu:
            x = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        else:
            x = self.main(x)
        return x if self.post_norm is None else self.post_norm(x)


class AttentionBlock(nn.Module):
    """Attention and MLP, each added to what came in."""

    def __init__(self, shape: Shape, causal: bool):
        super().__init__()
        self.attention, self.mlp = Attention(shape, causal), MLP(shape)

    def forward(
        self, x: Tensor, table: Tensor | None, cache: KVCache | None, layer: int, temperature: float | Tensor
    ) -> Tensor:
        x = x + self.attention(x, table, cache, layer, temperature)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Attention blocks and, where there is one, the final norm. checkpointing: activations are computed again in the
    backward pass."""

    checkpointing = False

    def __init__(self, shape: Shape, causal: bool = True):
        super().__init__()
        shape.check()
        self.shape = shape
        self.attn_blocks = nn.ModuleList(AttentionBlock(shape, causal) for _ in range(shape.layers))
        self.final_norm = OffsetRMSNorm(shape.channels) if shape.final_norm else None

    def run(
        self,
        h: Tensor,
        table: Tensor | None = None,
        cache: KVCache | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Embedded positions (B, T, channels) -> the same shape. table: rotations of these positions (T, d / 2, 2),
        None: they are not rotated. With a cache they follow those in it. temperature: divides the logits of attention,
        one for all or (B, 1, 1, 1)."""
        for i, block in enumerate(self.attn_blocks):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                h = checkpoint(block, h, table, cache, i, temperature, use_reentrant=False)
            else:
                h = block(h, table, cache, i, temperature)
        if cache is not None:
            cache.advance(h.shape[1])
        return h if self.final_norm is None else self.final_norm(h)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` positions."""
        weight, shape = next(self.parameters()), self.shape
        return KVCache(shape.layers, batch, shape.kv_heads, length, shape.head_dim, weight.device, weight.dtype)
