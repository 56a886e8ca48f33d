"""The order in which the codes of a grid are predicted. Official code: CompVis/taming-transformers@3ba01b2
taming/modules/transformer/permuter.py."""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError

Order = Literal["raster", "subsample", "z-curve", "spiral-out", "spiral-in", "random", "alternate"]


def order_of(kind: Order, height: int, width: int) -> Tensor:
    """(height * width,) int64: which raster position comes n-th; codes[:, order] puts codes into it.

    Raises VgmError for a grid that the order does not know.
    """
    if kind not in get_args(Order):
        raise VgmError(f"no order '{kind}'", f"known: {', '.join(get_args(Order))}", USAGE)
    grid = np.arange(height * width).reshape(height, width)
    if kind == "subsample":
        order = subsample(grid)
    elif kind == "z-curve":
        order = np.argsort([interleave(i, j) for i in range(height) for j in range(width)], kind="stable")
    elif kind in ("spiral-out", "spiral-in"):
        order = spiral(grid)[:: 1 if kind == "spiral-out" else -1]
    elif kind == "random":
        order = np.random.RandomState(1).permutation(height * width)
    else:
        if kind == "alternate":
            grid[1::2] = grid[1::2, ::-1].copy()  # every other row backwards
        order = grid.ravel()
    return torch.from_numpy(np.ascontiguousarray(order).astype(np.int64))


@cache
def permutation_on(kind: Order, height: int, width: int, device: torch.device) -> Tensor:
    """order_of, copied to a device once."""
    return order_of(kind, height, width).to(device)


def inverse(order: Tensor) -> Tensor:
    return order.argsort()


def subsample(grid: np.ndarray) -> np.ndarray:
    """Coarse to fine: the four interleaved half grids one after the other, each split in the same way."""
    height, width = grid.shape
    if height != width or height & (height - 1):
        raise VgmError(f"order 'subsample' needs a square grid of a power of two, not {height}x{width}", code=USAGE)
    parts = grid[None]  # (4^n, height / 2^n, width / 2^n)
    while parts.shape[1] > 1:
        n, h, w = parts.shape
        parts = parts.reshape(n, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3).reshape(4 * n, h // 2, w // 2)
    return parts.ravel()


def interleave(i: int, j: int) -> int:
    """The place of row i and column j on the Z-curve: their bits interleaved, the column's first."""
    return sum((j >> bit & 1) << 2 * bit | (i >> bit & 1) << 2 * bit + 1 for bit in range(32))


def spiral(grid: np.ndarray) -> np.ndarray:
    """From the middle outwards: up, right, down, left, with arms of 1, 1, 2, 2, 3, 3, ..."""
    size, width = grid.shape
    if size != width or size % 2:
        raise VgmError(f"spiral orders need an even square grid, not {size}x{width}", code=USAGE)
    i, j = size // 2, size // 2 - 1
    order = [grid[i, j]]
    for arm in range(1, size + 1):
        for di, dj in ((-1, 0), (0, 1)) if arm % 2 else ((1, 0), (0, -1)):
            for _ in range(arm if len(order) + arm <= grid.size else grid.size - len(order)):  # the last arm is cut
                i, j = i + di, j + dj
                order.append(grid[i, j])
    return np.array(order)
