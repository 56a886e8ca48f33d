"""Frechet distance between Gaussians fitted to features: FID, sFID, their uncertainty, FID of infinitely many samples.

Papers: Heusel et al., GANs Trained by a Two Time-Scale Update Rule (arXiv:1706.08500), eq. 6; Nash et al., Generating
Images with Sparse Representations (arXiv:2103.03841) for sFID; Chong and Forsyth, Effectively Unbiased FID
(arXiv:1911.07023) for the extrapolation. The matrix square root of bioinf-jku/TTUR is replaced by the eigenvalues of a
symmetric matrix with the same spectrum: the same number, half the time, no imaginary parts, no scipy.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.metrics.moments import Moments
from vgm_cli.ranges import Few, Steps, Whole


def _factor(sigma: Tensor) -> Tensor:
    """L: (D, R) with L L^T = sigma for a positive semi-definite sigma; directions without variance are left out."""
    values, vectors = torch.linalg.eigh(sigma)
    keep = positive(values)
    return vectors[:, keep] * values[keep].sqrt()


def positive(values: Tensor) -> Tensor:
    """Which of the ascending eigenvalues (D,) are above 0 but for rounding; of identical images none is."""
    return values > values[-1:].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps


def _distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, trace2: float, factor2: Tensor) -> float:
    # the eigenvalues of sigma1 sigma2 are those of the symmetric L2^T sigma1 L2
    values = torch.linalg.eigvalsh(factor2.T @ sigma1 @ factor2)
    cross = values.clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + trace2 - 2 * cross)


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). mu: (D,), sigma: (D, D); computed in float64."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(t).double() for t in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise VgmError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared", code=USAGE)
    return _distance(mu1, sigma1, mu2, float(sigma2.trace()), _factor(sigma2))


def frechet_spread(features: Tensor, mu: Tensor, sigma: Tensor, resamples: int = 20, seed: int = 0) -> float:
    """Standard deviation of the distance over bootstrap resamples of the samples; the reference stays fixed.

    features: (N, D). mu, sigma: of the reference. Costs resamples times the cube of the smaller of N and D.
    """
    x, g = features.double(), np.random.default_rng(seed)
    mu, sigma = mu.double(), sigma.double()
    y, squares = x @ _factor(sigma), x.square().sum(1)  # (N, R), (N,): the eigenvalues of sigma1 sigma2 are y's alone
    n, values = len(x), []
    for _ in range(resamples):
        rows = torch.from_numpy(g.integers(0, n, n))
        mean, part = x[rows].mean(0), y[rows]
        part = part - part.mean(0)
        gram = part @ part.T if n < part.shape[1] else part.T @ part
        cross = (torch.linalg.eigvalsh(gram).clamp(min=0) / (n - 1)).sqrt().sum()
        trace = (squares[rows].sum() - n * mean.square().sum()) / (n - 1)
        values.append(float((mean - mu).square().sum() + trace + sigma.trace() - 2 * cross))
    return float(np.std(values, ddof=1))


def frechet_with_error(features: Tensor, mu: Tensor, sigma: Tensor) -> tuple[float, float]:
    """(distance, its standard error to first order in 1/N): the delta method, from what each sample adds.

    The gradient of the distance in the samples' covariance S is I - L (L^T S L)^(-1/2) L^T with L L^T = sigma. Costs
    little more than the distance. Where the distance is near 0, its least, or N below D, it errs on the large side.
    features: (N, D). mu, sigma: of the reference.
    """
    x, mu, sigma = features.double(), mu.double(), sigma.double()
    factor, own = _factor(sigma), Moments.of(x)
    values, vectors = torch.linalg.eigh(factor.T @ own.cov @ factor)
    keep = positive(values)
    roots = values.clamp(min=0).sqrt()
    centred, offset = x - own.mean, own.mean - mu
    turned = centred @ (factor @ vectors[:, keep])  # (N, R)
    quadratic = centred.square().sum(1) - (turned.square() / roots[keep]).sum(1)
    influence = 2 * centred @ offset + quadratic
    distance = offset.square().sum() + own.cov.trace() + sigma.trace() - 2 * roots.sum()
    return float(distance), float(influence.std() / len(x) ** 0.5)


def frechet_infinity(
    features: Tensor, mu: Tensor, sigma: Tensor, points: int = 15, smallest: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """(FID_inf, standard error of the intercept): a line through the distance against 1/N, read off at 1/N = 0.

    features: (N, D). The distance of `points` subset sizes from `smallest` (default: the larger of N/10 and 5,000,
    at most N/2) to N, each a fresh random subset (Chong and Forsyth's fit with plain random draws).
    Raises VgmError when there are fewer than 20 samples.
    """
    n = len(features)
    if n < 20:
        raise VgmError(f"an extrapolation in the number of samples needs at least 20, there are {n}", code=USAGE)
    smallest = min(smallest or max(n // 10, 5000), n // 2)
    x, g = features.double(), np.random.default_rng(seed)
    factor, trace = _factor(sigma.double()), float(sigma.trace())
    sizes = np.linspace(smallest, n, points).astype(int)
    values = []
    for size in sizes:
        m = Moments.of(x[torch.from_numpy(g.choice(n, size, replace=False))])
        values.append(_distance(m.mean, m.cov, mu.double(), trace, factor))
    design = np.stack([1 / sizes, np.ones(points)], 1)
    fit, *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    residual = np.array(values) - design @ fit
    variance = residual @ residual / max(points - 2, 1) * np.linalg.inv(design.T @ design)[1, 1]
    return float(fit[1]), float(np.sqrt(variance))


class FID(MetricBase):
    """Frechet distance of pooled features with its standard error: of first order, or by `bootstrap` resamples; 0 makes
    none, and then no sample's features are kept. The value itself is biased upwards at small N: see fid-inf."""

    name = "fid"
    needs_reference = frozenset({"moments"})

    def __init__(self, bootstrap: Whole | None = None):
        if bootstrap == 1:
            raise VgmError(f"{self.name}:bootstrap=1: 0, or at least 2 resamples", code=USAGE)
        self.bootstrap = bootstrap
        self.uses_seed = bool(bootstrap)
        self.needs_samples = frozenset({"moments"} if bootstrap == 0 else {"moments", "pool"})

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        s, r = samples.moments, reference.moments
        assert s is not None and r is not None
        if self.bootstrap == 0:
            return [Value(self.name, frechet_distance(s.mean, s.cov, r.mean, r.cov))]
        assert samples.pool is not None
        if self.bootstrap is None:
            return [Value(self.name, *frechet_with_error(samples.pool, r.mean, r.cov), {"uncertainty": "first order"})]
        value = frechet_distance(s.mean, s.cov, r.mean, r.cov)
        spread = frechet_spread(samples.pool, r.mean, r.cov, self.bootstrap, seed)
        return [Value(self.name, value, spread, {"uncertainty": f"bootstrap of {self.bootstrap}"})]


class FDDINOv2(FID):
    """Frechet distance of DINOv2's class token (Stein et al., arXiv:2306.04675): ViT-L/14 in published numbers."""

    name = "fd-dinov2"
    network = "dinov2"


class SpatialFID(MetricBase):
    """Frechet distance of spatial features (sFID)."""

    needs_samples = needs_reference = frozenset({"spatial"})

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        s, r = samples.spatial, reference.spatial
        assert s is not None and r is not None
        return [Value("sfid", frechet_distance(s.mean, s.cov, r.mean, r.cov))]


class FIDInfinity(MetricBase):
    """The FID that infinitely many samples would have, by extrapolation in 1/N. points: subset sizes in the fit."""

    needs_samples = frozenset({"pool"})
    needs_reference = frozenset({"moments"})
    uses_seed = True

    def __init__(self, points: Few = 15, smallest: Steps | None = None):
        if points < 3 or (smallest or 2) < 2:
            raise VgmError("fid-inf: a line needs at least 3 points, each of at least 2 samples", code=USAGE)
        self.points = points
        self.smallest = smallest

    def check(self, n: int | None, n_reference: int | None, shape: tuple[int, int, int]) -> None:
        if n is not None and n < 20:
            text = f"an extrapolation in the number of samples needs at least 20, there are {n}"
            raise VgmError(text, code=USAGE)

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.pool is not None and reference.moments is not None
        r = reference.moments
        value, error = frechet_infinity(samples.pool, r.mean, r.cov, self.points, self.smallest, seed)
        half = len(samples.pool) // 2
        remarks: tuple[str, ...] = ()
        if self.smallest is not None and self.smallest > half:
            remarks = (f"fid-inf: subsets begin at {half} samples, half of those there are, not at {self.smallest}",)
        return [Value("fid-inf", value, error, {"points": self.points}, remarks=remarks)]
