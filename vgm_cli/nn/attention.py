"""Attention: causal with and without a cache, and of every position to every other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.nn.kv_cache import KVCache


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    cache: KVCache | None = None,
    layer: int = 0,
) -> Tensor:
    """q: (B, heads, T, d); k, v: (B, kv_heads, T, d), each repeated for heads / kv_heads neighbouring queries.

    With a cache the T positions follow those in it (or overwrite some of them, see KVCache), are written to it, and
    attend to all up to their own. mask: bool or float, broadcast to (B, heads, T, S), in place of the causal one; S
    counts the cached positions too. -> (B, heads, T, d).
    """
    past = 0
    if cache is not None:
        past = cache.filled
        k, v = cache.write(layer, k, v)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if mask is None and cache is not None and cache.positions is not None:
        mask = torch.arange(k.shape[2], device=q.device) <= cache.positions[:, None]
    elif mask is None and past and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return attend(q, k, v, mask, dropout, mask is None and not past and q.shape[2] > 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v by the kernel that is fastest where it runs. q, k, v: (B, heads, T or S, d);
    mask: bool or float, broadcast to (B, heads, T, S); dropout: share of the weights that is dropped."""
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled() and k.shape[2] <= SHORT:
        return written_out(q, k, v, mask, dropout, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def block_causal(sizes: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The mask (L, L) bool, L the sum of the sizes, of blocks one after the other: a position sees its own block and
    all before it. Its rows and columns of the first blocks are the mask of those alone, so that a forward with a cache
    takes the rows of the new positions and the columns up to their last."""
    repeats = torch.tensor(sizes, device=device)
    block = torch.arange(len(sizes), device=device).repeat_interleave(repeats, output_size=sum(sizes))
    return block[:, None] >= block


SHORT = 512  # the fused kernel's backward on a CPU is several times slower than this below some hundred positions


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ v
