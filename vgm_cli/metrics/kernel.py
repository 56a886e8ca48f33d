"""Maximum mean discrepancy of features: KID (cubic kernel, random subsets) and CMMD (Gaussian kernel, CLIP).

Papers: Binkowski et al., Demystifying MMD GANs (arXiv:1801.01401); subsets are drawn in toshas/torch-fidelity's order
from numpy's RandomState, so the same features and its seed (2020) give its number. Jayasumana et al., Rethinking FID
(arXiv:2401.09603), as google-research/google-research cmmd/distance.py: the biased estimate, sigma 10, times 1000.
Sums are float64 here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.ranges import Few, NonNegative, Positive, Steps, Width


def polynomial_mmd(x: Tensor, y: Tensor, degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> float:
    """Unbiased MMD^2 of x: (M, D), y: (M, D) with kernel (gamma a.b + coef0)^degree; gamma defaults to 1/D."""
    x, y = x.double(), y.double()
    gamma = 1 / x.shape[1] if gamma is None else gamma
    m, k = len(x), len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (gamma * (a @ b.T) + coef0) ** degree

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (k * (k - 1))
    return float(within - 2 * xy.mean())


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, degree: int = 3, seed: int = 2020
) -> tuple[float, float]:
    """(mean, standard deviation) of the MMD^2 over random subsets. x: (N, D), y: (M, D), at least subset_size long."""
    if min(len(x), len(y)) < subset_size or subset_size < 2:
        raise VgmError(
            f"kid subsets of {subset_size} need as many samples and references, there are {len(x)} and {len(y)}",
            "choose a smaller subset_size (at least 2)",
            USAGE,
        )
    rng = np.random.RandomState(seed % 2**32)
    values = []
    for _ in range(subsets):
        rows = torch.from_numpy(rng.choice(len(x), subset_size, replace=False))
        columns = torch.from_numpy(rng.choice(len(y), subset_size, replace=False))
        values.append(polynomial_mmd(x[rows], y[columns], degree))
    return float(np.mean(values)), float(np.std(values))


class KID(MetricBase):
    """Kernel inception distance: mean of the unbiased MMD^2 over random subsets.

    Subsets shrink to the smaller side when there are fewer images, and the result says so. Where every subset is the
    whole of both sides there is one value, and no spread of them.
    """

    needs_samples = needs_reference = frozenset({"pool"})
    uses_seed = True

    def __init__(self, subsets: Steps = 100, subset_size: Width = 1000, degree: Few = 3):
        if subset_size < 2:
            raise VgmError("kid:subset_size=1: at least 2 images are needed", code=USAGE)
        self.subsets = subsets
        self.subset_size = subset_size
        self.degree = degree

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.pool is not None and reference.pool is not None
        n, m = len(samples.pool), len(reference.pool)
        size = min(self.subset_size, n, m)
        subsets = 1 if size == n == m else self.subsets
        mean, spread = kernel_distance(samples.pool, reference.pool, subsets, size, self.degree, seed)
        options = {"subsets": subsets, "subset_size": size, "degree": self.degree}
        facts, remarks = {}, []
        if size < self.subset_size:
            facts["subset_size_asked"] = self.subset_size
            remarks.append(f"kid: subsets of {size} instead of {self.subset_size}, of {n} samples and {m} references")
        if size == n == m:
            remarks.append("kid: every subset is the whole of both sides, so there is one value and no uncertainty")
        elif size in (n, m):
            one, count = ("samples", n) if size == n else ("references", m)
            remarks.append(f"kid: every subset has all {count} {one}, so the uncertainty is that of the others alone")
        elif subsets == 1:
            remarks.append("kid: one subset has no uncertainty")
        return [Value("kid", mean, None if subsets == 1 else spread, options, facts, remarks=tuple(remarks))]


BLOCK = 2048  # rows of a kernel matrix in memory at once


def _row_means(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """Mean over y of exp(-|a - b|^2 / (2 sigma^2)) for every row a of x: (N,)."""
    gamma = 1 / (2 * sigma**2)
    parts = [torch.exp(-gamma * torch.cdist(part, y).square()).mean(1) for part in x.split(BLOCK)]
    return torch.cat(parts)


def gaussian_mmd(x: Tensor, y: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> tuple[float, float]:
    """(scale times the biased MMD^2, its standard error over the rows of x). x: (N, D), y: (M, D).

    The error is of first order: that of the mean of 2 (E k(x, x') - E k(x, y)), the reference being fixed.
    """
    x, y = x.double(), y.double()
    within, across = _row_means(x, x, sigma), _row_means(x, y, sigma)
    value = within.mean() + _row_means(y, y, sigma).mean() - 2 * across.mean()
    error = 2 * (within - across).std() / len(x) ** 0.5
    return float(scale * value), float(scale * error)


class CMMD(MetricBase):
    """Maximum mean discrepancy of unit-length CLIP image embeddings (ViT-L/14 at 336 pixels in published numbers).
    sigma: of the Gaussian kernel."""

    network = "clip"
    needs_samples = needs_reference = frozenset({"pool"})

    def __init__(self, sigma: NonNegative = 10.0, scale: Positive = 1000.0):
        if not sigma > 0:
            raise VgmError(f"cmmd:sigma={sigma} is not above 0", code=USAGE)
        self.sigma = sigma
        self.scale = scale

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.pool is not None and reference.pool is not None
        value, error = gaussian_mmd(samples.pool, reference.pool, self.sigma, self.scale)
        return [Value("cmmd", value, error, {"sigma": self.sigma, "scale": self.scale, "estimate": "biased"})]
