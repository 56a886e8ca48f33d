"""Rotary positions on a grid. Su et al. 2021 (arXiv 2104.09864); the 2-D form of LlamaGen (arXiv 2406.06525): half of a
head's channels turn with the row, half with the column. Official code: FoundationVision/LlamaGen@ce98ec4
autoregressive/models/gpt.py."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles_2d(height: int, width: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """(height * width, head_dim / 2) float32, raster order: first the angles of the row, then those of the column.

    Angle j of either is position * base^(-2j / (head_dim / 2)).
    """
    frequencies = rope_frequencies(head_dim, base)
    return angles_on_grid(*(torch.outer(torch.arange(n), frequencies) for n in (height, width)))


def rope_frequencies(head_dim: int, base: float = 10000.0) -> Tensor:
    """(head_dim / 4,) float32, falling from 1: the angles of position 1 in a row or in a column."""
    half = head_dim // 2
    return 1.0 / base ** (torch.arange(0, half, 2)[: half // 2].float() / half)


def angles_on_grid(rows: Tensor, columns: Tensor) -> Tensor:
    """The angles of every row (height, k) and of every column (width, k) -> those of every cell in raster order,
    (height * width, 2k)."""
    height, width = len(rows), len(columns)
    rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def rope_table(angles: Tensor, prefix: int = 0) -> Tensor:
    """(T, d/2) angles -> (prefix + T, d/2, 2) cosines, sines; the prefix rows are ZERO: what they multiply vanishes."""
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(prefix, *table.shape[1:]), table])


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent channel pairs (2i, 2i + 1). x: (B, T, heads, d); table: (T, d/2, 2), or (B, T, d/2, 2) where every
    item has positions of its own. In float32, cast back."""
    pairs, table = x.float().unflatten(-1, (-1, 2)), table.unsqueeze(-3)  # (B, T, heads, d/2, 2); (..., T, 1, d/2, 2)
    if torch.compiler.is_compiling():  # complex numbers are not fused
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).type_as(x)
