"""One number per item against a batch: what every formula with a time or a noise level needs."""

from __future__ import annotations

import torch
from torch import Tensor


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) shaped (B, 1, ...) so that it broadcasts against x (B, ...); a 0-dim tensor, or one that has x's number of
    dimensions already, stays as it is."""
    return t if t.ndim in (0, x.ndim) else t.reshape(-1, *[1] * (x.ndim - 1))


def along(t: Tensor, x: Tensor) -> Tensor:
    """`expand` in x's precision."""
    return expand(t.to(x.dtype), x)


def each(x: Tensor, value: float | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """One number for every row of x (B, ...): (B,), on x's device."""
    return torch.full((len(x),), float(value), dtype=dtype, device=x.device)
