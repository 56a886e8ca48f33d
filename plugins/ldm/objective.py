"""Latent diffusion's objective: the noise, its scale per timestep, and a share of the variational bound.

Rombach et al. 2022 (arXiv 2112.10752), eq. 2. Official code: CompVis/latent-diffusion@a506df5
ldm/models/diffusion/ddpm.py LatentDiffusion.p_losses. Defaults are those of every published model: the mean squared
error of the noise, timesteps uniform.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, Phase, Step
from vgm_cli.diffusion.objectives import GaussianObjective, output_and_target
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.ranges import Fraction, NonNegative, Rate, Steps


def bound_weights(path: DiscreteVPPath, prediction: str = "eps", posterior: float = 0.0) -> Tensor:
    """The weights that the official code gives the squared error as the variational bound's terms: (steps,) float32,
    rounded where it rounds. Of the noise they are these terms', of x0 they are not quite, the first as the second; of v
    they are 1. posterior: see LatentDiffusion."""
    betas, bar = path.betas, path.alphas_cumprod
    if prediction == "v":
        return torch.ones_like(betas.float())
    if prediction == "x0":
        weights = 0.5 * bar.float().sqrt() / (2 - bar.float())
    else:
        before = torch.cat([bar.new_ones(1), bar[:-1]])
        variance = (1 - posterior) * betas * (1 - before) / (1 - bar) + posterior * betas
        weights = betas.float() ** 2 / (2 * variance.float() * (1 - betas).float() * (1 - bar.float()))
    return torch.cat([weights[1:2], weights[1:]])


class LogVariance(nn.Module):
    """One number for every timestep."""

    def __init__(self, steps: int, start: float):
        super().__init__()
        self.logvar = nn.Parameter(torch.full((steps,), start))

    def forward(self, index: Tensor) -> Tensor:
        return self.logvar[index]


class LatentDiffusion(GaussianObjective):
    """Denoising of latents at discrete timesteps. batch x: (B, C, H, W), cond: keywords of the network.

    The loss of an item is simple_weight (error / exp(logvar) + logvar), plus bound_weight times the weighted error.
    """

    def __init__(
        self,
        model: nn.Module,  # the network that is trained: (x, t, **cond) -> like x
        schedule: str = "scaled_linear",  # of beta, see vgm_cli/diffusion/discrete/betas.py
        beta_start: Rate = 0.0015,  # beta of the first timestep
        beta_end: Rate = 0.0195,  # beta of the last
        steps: Steps = 1000,  # timesteps
        prediction: Literal["eps", "x0", "v"] = "eps",  # what the network gives
        error: Literal["l2", "l1"] = "l2",  # squared, or absolute
        simple_weight: NonNegative = 1.0,  # of the error
        bound_weight: NonNegative = 0.0,  # of the variational bound
        logvar: float = 0.0,  # logarithm of the error's variance
        learn_logvar: bool = False,  # it is trained, one for each timestep
        posterior: Fraction = 0.0,  # share of beta in the variance that the bound takes; the rest is the posterior's
        betas: list[float] | None = None,  # of every timestep; schedule, its ends and steps do not count then
    ):
        named = {"schedule": schedule, "steps": steps, "beta_start": beta_start, "beta_end": beta_end}
        super().__init__(model, {"name": "vp-discrete", **(named if betas is None else {"betas": betas})}, prediction)
        assert isinstance(self.path, DiscreteVPPath)
        self.error, self.simple_weight, self.bound_weight = error, simple_weight, bound_weight
        self.weights = bound_weights(self.path, prediction, posterior)
        self.logvar = LogVariance(self.path.steps, logvar)
        self.logvar.requires_grad_(learn_logvar)
        self.learns = learn_logvar
        if learn_logvar:
            self.networks = {"model": model, "logvar": self.logvar}

    def phases(self) -> list[Phase]:
        return [Phase("main", ("model", "logvar") if self.learns else ("model",))]

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.weights = self.weights.to(device)
        self.logvar.to(device)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = batch["x"]
        t, noise = self.times(len(x0), step), step.randn(x0.shape, "noise")
        return self.loss_of(x0, t, noise, batch.get("cond", {}))

    def loss_of(self, x0: Tensor, t: Tensor, noise: Tensor, cond: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at host times t (B,), and its parts."""
        output, target = output_and_target(self.denoiser, x0, t, noise, **cond)
        gap = output.float() - target.float()
        plain = (gap.abs() if self.error == "l1" else gap.square()).flatten(1).mean(1)  # (B,)
        assert isinstance(self.path, DiscreteVPPath)
        index = self.path.timestep(t).round().long().to(x0.device)
        logvar = self.logvar(index)
        loss = self.simple_weight * (plain / logvar.exp() + logvar).mean()
        logs = {"simple": plain.detach().mean()}
        if self.bound_weight:
            bound = (self.weights[index] * plain).mean()
            loss, logs["bound"] = loss + self.bound_weight * bound, bound.detach()
        return loss, logs
