"""Nearest-training-neighbour check: do samples lie closer to training images than other real images do?

Paper: Meehan, Chaudhuri and Dasgupta, A Non-Parametric Test to Detect Data-Copying (arXiv:2004.05675), section 2: the
Mann-Whitney statistic of distances to the training set, of samples against held-out images. Without held-out images the
training images stand in for them, each measured to the nearest other one (a deviation, named in the result).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.metrics.manifold import distance_blocks
from vgm_cli.ranges import Fraction

SHOWN = 16  # closest samples listed


def nearest(x: Tensor, y: Tensor, itself: bool = False) -> tuple[Tensor, Tensor]:
    """(distance (N,), index (N,)) of the row of y: (M, D) nearest to every row of x: (N, D); itself: x is y, and a row
    is not its own neighbour."""
    index = torch.empty(len(x), dtype=torch.long)
    for rows, d in distance_blocks(x, y):
        if itself:
            i = torch.arange(rows.start, rows.stop)
            d[i - rows.start, i] = torch.inf
        index[rows] = d.argmin(1)
    return (x.double() - y[index].double()).norm(dim=1), index  # anew: exactly 0 for a copy, which blocks only approach


def closer(samples: Tensor, real: Tensor) -> tuple[float, float]:
    """(P(sample distance > real distance), ties counting half; its standard deviation under equality).

    samples: (N,), real: (M,) distances to the training set. 0.5: samples are as far as real images; 0: all copies.
    """
    ordered = real.sort().values
    below = torch.searchsorted(ordered, samples) + torch.searchsorted(ordered, samples, right=True)
    n, m = len(samples), len(real)
    return float(below.double().mean() / (2 * m)), math.sqrt((n + m + 1) / (12 * n * m))


class Memorisation(MetricBase):
    """Whether samples copy the training set, in feature space and in pixels.

    "memorisation" is the statistic of `closer`; "copies" is the share of samples that are nearer to a training image
    than `quantile` of real images are, about `quantile` when nothing was copied.
    """

    gives = ("memorisation", "copies", "memorisation-pixels", "copies-pixels")
    needs_samples = needs_reference = frozenset({"pool", "pixels"})
    uses_held_out = True

    def __init__(self, quantile: Fraction = 0.01):
        if not 0 < quantile < 1:
            raise VgmError(f"quantile={quantile} is not between 0 and 1", code=USAGE)
        self.quantile = quantile

    def __call__(
        self, samples: Measured, reference: Measured, seed: int, held_out: Measured | None = None
    ) -> list[Value]:
        values = []
        against = f"{held_out.n} held-out images" if held_out is not None else "training images, leaving one out"
        for space in ("pool", "pixels"):
            x, train = getattr(samples, space), getattr(reference, space)
            own, index = nearest(x, train)
            real = (
                nearest(train, train, itself=True)[0]
                if held_out is None
                else nearest(getattr(held_out, space), train)[0]
            )
            share, error = closer(own, real)
            limit = real.sort().values[int(self.quantile * (len(real) - 1))]
            copies = float((own <= limit).double().mean())
            options = {"against": against, "space": "features" if space == "pool" else "pixels"}
            facts: dict[str, Any] = {
                "median_distance": float(own.median()),
                "median_distance_real": float(real.median()),
            }
            order = own.argsort()[:SHOWN].tolist()
            facts["closest"] = [{"sample": i, "training": int(index[i]), "distance": float(own[i])} for i in order]
            suffix = "" if space == "pool" else "-pixels"
            values.append(Value(f"memorisation{suffix}", share, error, options, facts))
            spread = math.sqrt(copies * (1 - copies) / len(own))
            values.append(Value(f"copies{suffix}", copies, spread, {**options, "quantile": self.quantile}))
        return values
