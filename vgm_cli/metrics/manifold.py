"""Nearest-neighbour metrics of fidelity and variety: improved precision and recall, density and coverage.

Papers: Kynkaanniemi et al., Improved Precision and Recall (arXiv:1904.06991), as openai/guided-diffusion
evaluations/evaluator.py computes it (k = 3, distance <= radius); Naeem et al., Reliable Fidelity and Diversity Metrics
(arXiv:2002.09797), as clovaai/generative-evaluation-prdc does (k = 5, distance < radius).
Deviation: distances in float64, where ADM's evaluator first tries half precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.ranges import Few

BLOCK = 2048  # rows of the distance matrix in memory at once


def distance_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, distances (R, M)) for x: (N, D) against y: (M, D), block by block of rows."""
    y = y.double()
    for first in range(0, len(x), BLOCK):
        rows = slice(first, min(first + BLOCK, len(x)))
        yield rows, torch.cdist(x[rows].double(), y)


def check_neighbours(k: int, *counts: int | None) -> None:
    """VgmError (exit code 2): a side has no k-th neighbour."""
    for n in counts:
        if n is not None and n <= k:
            raise VgmError(f"{k} nearest neighbours need more than {k} images, there are {n}", code=USAGE)


def radii(x: Tensor, k: int) -> Tensor:
    """Distance of every row of x: (N, D) to its k-th nearest other row -> (N,). Needs more than k rows."""
    check_neighbours(k, len(x))
    out = torch.empty(len(x), dtype=torch.float64)
    for rows, d in distance_blocks(x, x):
        i = torch.arange(rows.start, rows.stop)
        d[i - rows.start, i] = -1.0  # itself comes first whatever rounding makes of its zero distance
        out[rows] = d.kthvalue(k + 1, dim=1).values
    return out


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of samples within some reference's ball, and the other way round.

    samples: (N, D), reference: (M, D); a ball reaches to the k-th neighbour within its own set.
    """
    r_samples, r_reference = radii(samples, k), radii(reference, k)
    precise = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    for rows, d in distance_blocks(samples, reference):  # (R, M)
        precise += int((d <= r_reference).any(1).sum())
        recalled |= (d <= r_samples[rows, None]).any(0)
    return precise / len(samples), float(recalled.double().mean())


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """(density, coverage): reference balls per sample over k, and the share of reference balls with a sample inside."""
    r = radii(reference, k)
    inside = 0
    nearest = torch.full((len(reference),), torch.inf, dtype=torch.float64)
    for _, d in distance_blocks(samples, reference):
        inside += int((d < r).sum())
        nearest = torch.minimum(nearest, d.amin(0))
    return inside / (k * len(samples)), float((nearest < r).double().mean())


class PrecisionRecall(MetricBase):
    """k: neighbour that sets the radius."""

    gives = ("precision", "recall")
    needs_samples = needs_reference = frozenset({"pool"})

    def __init__(self, k: Few = 3):
        self.k = k

    def check(self, n: int | None, n_reference: int | None, shape: tuple[int, int, int]) -> None:
        check_neighbours(self.k, n, n_reference)

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.pool is not None and reference.pool is not None
        precision, recall = precision_recall(samples.pool, reference.pool, self.k)
        return [Value("precision", precision, None, {"k": self.k}), Value("recall", recall, None, {"k": self.k})]


class DensityCoverage(MetricBase):
    """k: neighbour that sets the radius."""

    gives = ("density", "coverage")
    needs_samples = needs_reference = frozenset({"pool"})

    def __init__(self, k: Few = 5):
        self.k = k

    def check(self, n: int | None, n_reference: int | None, shape: tuple[int, int, int]) -> None:
        check_neighbours(self.k, n_reference)

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.pool is not None and reference.pool is not None
        density, coverage = density_coverage(samples.pool, reference.pool, self.k)
        return [Value("density", density, None, {"k": self.k}), Value("coverage", coverage, None, {"k": self.k})]
