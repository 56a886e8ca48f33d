"""LightningDiT's objective: velocities of straight paths by their size and by their direction. Yao et al. 2025.

hustvl/LightningDiT@2725fed transport/transport.py. t = 0 is noise and t = 1 is data, opposite to the host's times, and
the network is told t as it is: `view` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.nn.shapes import expand
from vgm_cli.ranges import NonNegative, Whole

VIEW = {"name": "denoiser", "path": {"name": "linear"}, "prediction": "velocity", "time": "reversed"}


def velocity_losses(
    network: Callable[[Tensor, Tensor], Tensor],  # (x, t) -> velocity, like x
    data: Tensor,  # (B, C, ...)
    noise: Tensor,  # (B, C, ...)
    t: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:
    """Of the velocity data - noise at x = t data + (1 - t) noise: the mean squared error (B,), and one minus the cosine
    of the angle between the channel vectors at each place, averaged over places (B,)."""
    at = expand(t, data)
    velocity = data - noise
    output = network(at * data + (1 - at) * noise, t).float()
    squared = (output - velocity).square().flatten(1).mean(1)
    turned = (1 - F.cosine_similarity(output, velocity, dim=1)).flatten(1).mean(1)
    return squared, turned


def times_from(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Logit-normal times (B,) of standard normal draws (B,): their sigmoid in float64, rounded to float32."""
    return torch.sigmoid(mean + std * normal.double()).float()


class VelocityDirection(ObjectiveBase):
    """Regression on the velocity of straight paths, with a loss on its direction (weight cosine_weight).

    The 800-epoch network was trained with logit-normal times up to step 600,000 and uniform ones from there on.
    """

    shardable = True

    def __init__(
        self,
        model: nn.Module,  # network(x (B, C, H, W), t (B,), **cond) that is trained
        time_sampling: Literal["logit-normal", "uniform"] = "logit-normal",  # how t is drawn
        time_mean: float = 0.0,  # of logit-normal draws: mean of logit(t)
        time_std: NonNegative = 1.0,  # of logit-normal draws: standard deviation of logit(t)
        uniform_from: Whole | None = None,  # step from which on t is uniform; None: never
        cosine_weight: NonNegative = 1.0,  # of the loss on the direction; 0: none
    ):
        self.model, self.networks = model, {"model": model}
        self.time_sampling, self.time_mean, self.time_std = time_sampling, time_mean, time_std
        self.uniform_from, self.cosine_weight = uniform_from, cosine_weight

    def times(self, n: int, step: Step) -> Tensor:
        """(n,) times in [0, 1)."""
        late = self.uniform_from is not None and step.index >= self.uniform_from
        if self.time_sampling == "uniform" or late:
            return step.rand(n, "t")
        return times_from(step.randn((n,), "t"), self.time_mean, self.time_std)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network. Logs mse (what the official code logs as its loss) and
        cosine."""
        x, cond = batch["x"], batch.get("cond", {})
        t, noise = self.times(len(x), step), step.randn(x.shape, "noise")
        squared, turned = velocity_losses(lambda z, s: self.model(z, s, **cond), x, noise, t)
        mse, cosine = squared.mean(), turned.mean()
        return mse + self.cosine_weight * cosine, {"mse": mse.detach(), "cosine": cosine.detach()}

    def view(self) -> dict[str, Any]:
        return dict(VIEW)
