"""How well a sample's edges follow those of a picture: what a network that is told a hint has to be measured by."""

from __future__ import annotations

import numpy as np
import torch

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.metrics.pictures import Items, pairs
from vgm_cli.operators.canny import canny, dilate
from vgm_cli.ranges import NonNegative, Whole


def near_by(height: int, width: int) -> int:
    """Pixels by which an edge may be off where nobody says: 0.75 % of the diagonal, as the benchmark of boundaries has
    it (Martin, Fowlkes & Malik 2004; BSDS500's maxDist). None at 32x32, 5 at 512x512."""
    return int(0.0075 * (height**2 + width**2) ** 0.5)


def edge_f1(x: np.ndarray, y: np.ndarray, tolerance: int) -> np.ndarray:
    """The harmonic mean of precision (edges of x that have one of y near by) and recall (the other way round) of edge
    maps (N, H, W) bool: (N,). near by: at most `tolerance` pixels away along either side. Two empty maps agree."""
    found = []
    for own, other in ((x, y), (y, x)):
        hit = (own & dilate(other, tolerance)).sum((1, 2))
        found.append(hit / np.maximum(own.sum((1, 2)), 1))
    precision, recall = found
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    empty = ~x.any((1, 2)) & ~y.any((1, 2))
    return np.where(empty, 1.0, f1)


class EdgeF1(MetricBase):
    """Agreement of Canny edges of every sample with those of its reference, 0 to 1; and, as "edge-f1-other", with those
    of the next reference, which a sample that follows its hint does not agree with.

    low, high: thresholds of Canny's gradients. tolerance: pixels by which an edge may be off; None: see near_by.
    """

    needs_samples = needs_reference = frozenset({"images"})
    pairs = True
    gives = ("edge-f1", "edge-f1-other")

    def __init__(self, low: NonNegative = 100, high: NonNegative = 200, tolerance: Whole | None = None):
        self.low, self.high, self.tolerance = low, high, tolerance

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        a, b = samples.images, reference.images
        assert a is not None and b is not None
        if a.shape[1:3] != b.shape[1:3]:
            sizes = " and ".join(f"{s.shape[2]}×{s.shape[1]}" for s in (a, b))
            raise VgmError(f"edge-f1 compares pairs, these are of {sizes}", "reference images of the same size", USAGE)
        found = pairs(*(s.items or Items(range(len(x)), len(x)) for s, x in ((samples, a), (reference, b))))
        own, there = (self.edges(x, rows) for x, rows in ((a, found.samples), (b, found.reference)))
        tolerance = near_by(*a.shape[1:3]) if self.tolerance is None else self.tolerance
        options = {"low": self.low, "high": self.high, "tolerance": tolerance}
        n, values = len(own), []
        for name, partner in (("edge-f1", there), ("edge-f1-other", np.roll(there, -1, axis=0))):
            f1 = torch.from_numpy(edge_f1(own, partner, tolerance))
            spread = float(f1.std()) / n**0.5 if n > 1 else None
            values.append(Value(name, float(f1.mean()), spread, options, found.facts(), n, found.remarks()))
        return values

    def edges(self, images: np.ndarray, rows: list[int]) -> np.ndarray:
        parts = [canny(images[rows[i : i + 64]], self.low, self.high) for i in range(0, len(rows), 64)]
        return np.concatenate(parts)
