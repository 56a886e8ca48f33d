"""Comparisons of tensors and states: bit for bit, up to rounding, and by distance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, NaN and signed zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one state has, or that differ in a bit."""
    return sorted(a.keys() ^ b.keys()) + [k for k in a if k in b and not same(a[k], b[k])]


def rounded(theirs: Tensor, made: Tensor) -> bool:
    """Whether a float64 tensor of a file equals our float32 one once it is rounded."""
    return theirs.dtype == torch.float64 and theirs.shape == made.shape and same(theirs.float(), made.float())


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    if a.shape != b.shape or same(a, b):
        return a.shape == b.shape
    return torch.allclose(a.double(), b.to(a.dtype).double(), rtol=1e-3, atol=1e-5, equal_nan=True)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value. Infinite where shapes differ, where one is
    finite and the other is not, or where nothing is finite."""
    a, b = a.float().flatten(), b.float().flatten()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if len(a) else float("inf")
