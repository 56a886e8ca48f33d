"""The contract between metrics and `engine.evaluate`: what a metric needs measured of either side, and its numbers."""

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
from vgm_cli.offers import MetricBase as MetricBase

# moments, spatial: mean and covariance of pooled and of spatial features; pool, logits: features of every image;
# images: uint8 (N, H, W, C); pixels: small copies for distances; labels: int64 (N,);
# texts: what each was asked for by
NEEDS = ("moments", "spatial", "pool", "logits", "images", "pixels", "labels", "texts")
OF_NETWORK = {"moments": "pool", "pool": "pool", "spatial": "spatial", "logits": "logits"}  # need -> the net's output


@dataclass
class Measured:
    """What was measured of one side of a comparison. Only what the metrics need is filled in.

    pool: (N, D), logits: (N, K), pixels: (N, P) in [0, 1], all fp32; images: uint8 (N, H, W, C); labels: (N,) int64;
    items: which pictures they are; texts: N of them.
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
    texts: list[str] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """One number of a metric.

    uncertainty: its standard deviation, if known. options: what it depends on, for the protocol. facts: what was
    observed while computing it. n: how many images it was made of, where that is not the number of samples. remarks:
    sentences that a reader needs. unbounded: infinity is a right value.
    """

    metric: str
    value: float
    uncertainty: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    n: int | None = None
    remarks: tuple[str, ...] = ()
    unbounded: bool = False


class Metric(Protocol):
    """A metric of two sets of images."""

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]: ...


@dataclass
class Subject:
    """The trained model that a metric evaluates.

    view: what a sampler would receive. dataset: the reference. n: how many images are wanted; None: the metric's own
    number. shares(items, work): [work(item) for item in items], spread over processes.
    """

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
    """A metric of a model: needs_model is true."""

    def __call__(self, subject: Subject, seed: int) -> list[Value]: ...
