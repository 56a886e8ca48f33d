"""The order in which the codes of a grid are predicted: fixed ones by name, and one of its own for every item.

Official code: CompVis/taming-transformers@3ba01b2 taming/modules/transformer/permuter.py; for halton (Besnier et al.
2025, arXiv 2503.17076) valeoai/Halton-MaskGIT@f61b0a1 Sampler/halton_sampler.py; for the hierarchical ones (Pang et al.
2024, arXiv 2412.01827) ziqipang/RandAR@d374a72 RandAR/applications/resolution_extrapolation.py.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError

Order = Literal["raster", "subsample", "z-curve", "spiral-out", "spiral-in", "random", "alternate", "halton"]


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
    elif kind == "halton":
        order = halton(height, width)
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
    """(..., N): when each raster position comes; what undoes the order."""
    return order.argsort(-1)


def random_orders(u: Tensor) -> Tensor:
    """(B, N) uniform draws, each row from its item's own stream -> (B, N) int64: one random order per item."""
    return u.argsort(stable=True, dim=-1)


def hierarchical_orders(u: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width) uniform draws -> an order per item, coarse to fine: first the cells of even rows and columns,
    shuffled, then all others, shuffled."""
    cells = torch.arange(height * width, device=u.device)
    late = (cells // width % 2 > 0) | (cells % width % 2 > 0)
    return random_orders(u + late)


def rolled(order: Tensor, shifts: Tensor) -> Tensor:
    """An order (N,) per item, begun elsewhere: row b of (B, N) is torch.roll(order, shifts[b]). shifts: (B,) int64."""
    places = torch.arange(len(order), device=order.device) - shifts[:, None]
    return order[places % len(order)]


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


def halton(height: int, width: int) -> np.ndarray:
    """The cells in the order in which the Halton sequence (base 2 down, base 3 across) first visits them: every
    beginning of the order is spread evenly over the grid."""
    points = 4 * height * width
    while True:
        index = np.arange(1, points + 1)
        cells = scaled_radical_inverse(index, 2, height) * width + scaled_radical_inverse(index, 3, width)
        visited, first = np.unique(cells, return_index=True)
        if len(visited) == height * width:
            return visited[first.argsort()]
        points *= 2


def scaled_radical_inverse(index: np.ndarray, base: int, size: int) -> np.ndarray:
    """floor(size * x) in whole numbers, x in [0, 1) being the digits of index behind the point in reverse."""
    numerator, denominator = np.zeros_like(index), 1
    while index.any():
        index, digit = np.divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return size * numerator // denominator
