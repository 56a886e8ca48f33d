"""Flow matching on an interpolant, as SiT trains it. Ma et al. 2024 (2401.08740); willisma/SiT@947f95b.

The network is told t as it is: 0 for noise, 1 for data. `view` says so to the host, whose time runs the other way.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.ranges import NonNegative

from .transport import Prediction, Transport, Weight, view_of


class FlowMatching(ObjectiveBase):
    """Regression on the velocity, score or noise of x_t = alpha(t) data + sigma(t) noise."""

    shardable = True

    def __init__(
        self,
        model: nn.Module,  # network(x (B, C, H, W), t (B,), **cond) that is trained
        path: Literal["linear", "gvp", "vp"] = "linear",  # linear | gvp | vp: the functions alpha and sigma
        prediction: Prediction = "velocity",  # what the network gives
        weight: Weight | None = None,  # of score and noise losses: none, velocity's or likelihood's
        time_sampling: Literal["uniform", "logit-normal"] = "uniform",  # how t is drawn; the paper's is uniform
        time_mean: float = 0.0,  # of logit-normal draws: mean of logit(t)
        time_std: NonNegative = 1.0,  # of logit-normal draws: standard deviation of logit(t)
        train_eps: NonNegative | None = None,  # time left out at the singular end; None: the paper's
    ):
        self.model, self.networks = model, {"model": model}
        self.transport = Transport(path, prediction, weight, train_eps)
        self.time_sampling, self.time_mean, self.time_std = time_sampling, time_mean, time_std

    def times(self, n: int, step: Step) -> Tensor:
        """(n,) times in the trained interval."""
        if self.time_sampling == "uniform":
            u = step.rand(n, "t")
        else:
            u = torch.sigmoid(self.time_mean + self.time_std * step.randn((n,), "t"))
        t0, t1 = self.transport.interval()
        return u * (t1 - t0) + t0

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network."""
        x1 = batch["x"]
        t, x0 = self.times(len(x1), step), step.randn(x1.shape, "noise")
        cond = batch.get("cond", {})
        return self.transport.losses(lambda x, s: self.model(x, s, **cond), x1, x0, t).mean(), {}

    def view(self) -> dict[str, Any]:
        return view_of(self.transport)
