"""Rotary positions of a grid of tokens behind the tokens of a text. Su et al. 2021 (arXiv 2104.09864).

Official code: apple/ml-starflow@e565a46 misc/pe.py. Rows and columns are normalised: a grid of any sides spans as much
as a square of `side` positions, so that a network of one size reads another. Where there may be a text, the last eight
pairs of a head turn with a third coordinate: a text token's place, an image token's frame (0 of a picture).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vgm_cli.nn.embed import apply_rope

THETA = 10000.0
TEXT_PAIRS = 8  # pairs of a head that turn with the third coordinate

Pairs = Literal["adjacent", "halves"]


def positions(
    height: int, width: int, text: int = 0, side: int | None = None, axes: Literal[1, 2, 3] = 3, frames: int = 0
) -> Tensor:
    """Coordinates (text + tokens, axes) float32, those of the text first, then the grid's in raster order.

    side: positions that the mean side of the grid spans; None: itself. axes: 1, a plain count; 2, row and column; 3,
    row, column and the place in the text or the number of the frame. frames: grids one after the other, 0 for one.
    """
    if axes == 1:
        return torch.arange(text + height * width)[:, None].float()
    mean = (height * width) ** 0.5
    rows, columns = (torch.arange(n) / mean * (side or mean) for n in (height, width))
    grid = [c.flatten() for c in torch.meshgrid(rows, columns, indexing="ij")]
    if axes == 2:
        return torch.stack(grid, dim=-1)
    third = torch.arange(frames or 1).repeat_interleave(height * width).float()
    image = torch.stack([*(c.repeat(frames or 1) for c in grid), third], dim=-1)
    places = torch.zeros(text, 3)
    places[:, 2] = torch.arange(text) / max(text, 1) * (side or mean)
    return torch.cat([places, image])


def angles(positions: Tensor, head_dim: int) -> Tensor:
    """(T, axes) coordinates -> (T, head_dim / 2) angles, one for each pair of a head's channels."""
    half, axes = head_dim // 2, positions.shape[-1]
    if axes == 1:
        return positions * frequencies(half)
    plane = half - TEXT_PAIRS if axes == 3 else half
    parts = [positions[:, i : i + 1] * frequencies(plane // 2) for i in range(2)]
    if axes == 3:
        parts.append(positions[:, 2:] * frequencies(TEXT_PAIRS))
    return torch.cat(parts, dim=-1)


def frequencies(n: int) -> Tensor:
    """theta^(-i/n) for i = 0 to n - 1."""
    return 1.0 / (THETA ** (torch.arange(0, 2 * n, 2).float() / (2 * n)))


def rotate(x: Tensor, table: Tensor, pairs: Pairs = "adjacent") -> Tensor:
    """Turn x (B, T, heads, d) by a table of cosines and sines (T, d / 2, 2). pairs: which channels are turned together,
    neighbours, or channel i and channel i + d / 2 (as in transformers' Llama and Gemma)."""
    if pairs == "adjacent":
        return apply_rope(x, table)
    mixed = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return apply_rope(mixed, table).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
