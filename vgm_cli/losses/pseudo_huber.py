"""The pseudo-Huber distance (Song & Dhariwal 2023, 2310.14189, eq. 7): a square near zero, a length far from it."""

from __future__ import annotations

from torch import Tensor


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c over all of an item's values: a, b (B, ...) -> (B,).

    c: where the square ends; None is improved consistency training's 0.00054 sqrt(dimensions).
    """
    c = 0.00054 * a[0].numel() ** 0.5 if c is None else c
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c
