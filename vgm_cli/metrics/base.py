"""What a metric is to `engine.evaluate`: which measurements it needs of either side, and numbers made of them.

A metric is any object with `needs_samples`, `needs_reference` (subsets of NEEDS) and
`__call__(samples, reference, seed) -> list[Value]`; constructor keywords are its options. It may set
`network = "mnist" | "dinov2" | "clip"` to insist on one kind of features, and `gives`, the names of its numbers where
that is not its own name alone, `uses_seed`, and `check(n, n_reference, shape)`, called before the work, which raises
VgmError where so many images (None: not known) of that (H, W, C) cannot be measured.

A model metric looks at the trained model instead of at images: `needs_model = True` and
`__call__(subject, seed) -> list[Value]`. It shares its work over processes by `subject.shares`, and sets
`needs_data = False` where it looks at no images of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vgm_cli.conditioning import Conditions
from vgm_cli.metrics.moments import Moments
from vgm_cli.metrics.pictures import Items

# moments, spatial: mean and covariance of pooled and of spatial features; pool, logits: features of every image;
# images: uint8 (N, H, W, C); pixels: small copies for distances; labels: int64 (N,)
NEEDS = ("moments", "spatial", "pool", "logits", "images", "pixels", "labels")
OF_NETWORK = {"moments": "pool", "pool": "pool", "spatial": "spatial", "logits": "logits"}  # need -> the net's output


@dataclass
class Measured:
    """One side of a comparison. Only what the metrics asked for is there.

    pool: (N, D), logits: (N, K), pixels: (N, P) in [0, 1], all fp32; images: uint8 (N, H, W, C), labels: (N,) int64;
    items: which pictures they are.
    """

    n: int | None
    moments: Moments | None = None
    spatial: Moments | None = None
    pool: Tensor | None = None
    logits: Tensor | None = None
    images: np.ndarray | None = None
    pixels: Tensor | None = None
    labels: np.ndarray | None = None
    items: Items | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """One number. uncertainty: a standard deviation where there is one; options: what it depends on, for the protocol;
    facts: what was seen on the way; n: images it was made of, where that is not the number of samples; remarks: what
    a reader has to know, as sentences; unbounded: infinity is the right value."""

    metric: str
    value: float
    uncertainty: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    n: int | None = None
    remarks: tuple[str, ...] = ()
    unbounded: bool = False


class Metric(Protocol):
    needs_samples: frozenset[str]
    needs_reference: frozenset[str]

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]: ...


@dataclass
class Subject:
    """A trained model under test. view: what a sampler would be handed; conditions: what the network is told; dataset:
    the reference; n: images wanted, None for the metric's own number; shares(items, work): [work(item) for item in
    items], spread over processes."""

    view: Any
    codec: Any
    header: Any
    dataset: Any
    device: torch.device
    batch_size: int
    n: int | None
    shares: Callable[[list[Any], Callable[[Any], Any]], list[Any]]
    conditions: Conditions = field(default_factory=Conditions)


class ModelMetric(Protocol):
    needs_model: bool

    def __call__(self, subject: Subject, seed: int) -> list[Value]: ...
