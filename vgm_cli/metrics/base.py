"""What a metric is to `engine.evaluate`: which measurements it needs of either side, and numbers made of them.

A metric is any object with `needs_samples`, `needs_reference` (subsets of NEEDS) and
`__call__(samples, reference, seed) -> list[Value]`; constructor keywords are its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from vgm_cli.metrics.frechet import Moments

# moments, spatial: mean and covariance of pooled and of spatial features; pool, logits: features of every image;
# images: uint8 (N, H, W, C); labels: int64 (N,)
NEEDS = ("moments", "spatial", "pool", "logits", "images", "labels")


@dataclass
class Measured:
    """One side of a comparison. Only what the metrics asked for is there.

    pool: (N, D) fp32, logits: (N, K) fp32, images: uint8 (N, H, W, C), labels: (N,) int64.
    """

    n: int
    moments: Moments | None = None
    spatial: Moments | None = None
    pool: Tensor | None = None
    logits: Tensor | None = None
    images: np.ndarray | None = None
    labels: np.ndarray | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """One number. uncertainty: a standard deviation where there is one; options: what it depends on, for the protocol."""

    metric: str
    value: float
    uncertainty: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Metric(Protocol):
    needs_samples: frozenset[str]
    needs_reference: frozenset[str]

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]: ...
