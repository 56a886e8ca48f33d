"""When two tensors, states or outputs are the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and signed zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names that only one has, or whose tensors differ in a bit."""
    return sorted(a.keys() ^ b.keys()) + [k for k in a if k in b and not same(a[k], b[k])]


def rounded(theirs: Tensor, made: Tensor) -> bool:
    """float64 in the file, float32 in our network: equal when rounded."""
    return theirs.dtype == torch.float64 and theirs.shape == made.shape and same(theirs.float(), made.float())


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding."""
    if a.shape != b.shape or same(a, b):
        return a.shape == b.shape
    return torch.allclose(a.double(), b.to(a.dtype).double(), rtol=1e-3, atol=1e-5, equal_nan=True)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where shapes or finiteness differ, or all are NaN."""
    a, b = a.float().flatten(), b.float().flatten()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if len(a) else float("inf")
