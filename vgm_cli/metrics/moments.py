"""Mean and covariance of a stream of features, mergeable over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from vgm_cli.nn.collectives import gather_objects


@dataclass
class Moments:
    """Mean and covariance of a stream of vectors, float64. n: count; mean: (D,); scatter: (D, D), the centred sum of
    outer products. Parts of a stream are merged by Chan, Golub and LeVeque's formula, without cancellation."""

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """x: (N, D), any floating type."""
        x = x.detach().double()
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean.cpu(), (centred.T @ centred).cpu())

    @classmethod
    def given(cls, mu: Tensor, sigma: Tensor, n: int | None) -> Moments:
        """From a published mean and covariance; an unknown count is 0 (such moments cannot be merged)."""
        return cls(n or 0, mu.double(), sigma.double() * max((n or 2) - 1, 1))

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def cov(self) -> Tensor:
        """(D, D), the unbiased estimate (n - 1)."""
        return self.scatter / max((self.n or 2) - 1, 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both streams together."""
        if not other.n or not self.n:
            return self if self.n else other
        n = self.n + other.n
        delta = other.mean - self.mean
        outer = torch.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), self.scatter + other.scatter + outer)

    def update(self, x: Tensor) -> None:
        """Add a batch x: (B, D) in place."""
        if len(x):
            merged = self.merge(Moments.of(x))
            self.n, self.mean, self.scatter = merged.n, merged.mean, merged.scatter

    def gather(self) -> Moments:
        """The moments of all processes of torch.distributed together, on every process; itself without it."""
        return reduce(Moments.merge, gather_objects(self), Moments.empty(self.dim))
