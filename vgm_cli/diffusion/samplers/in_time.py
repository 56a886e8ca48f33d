"""Samplers in the path's own time: the probability-flow ODE, reverse SDEs, flow matching's Euler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion import solvers, timesteps
from vgm_cli.diffusion.denoiser import Denoiser, convert, flow_velocity
from vgm_cli.diffusion.samplers.base import (
    GaussianSampler,
    Grid,
    default_grid,
    grid_of,
    reaches_data,
    report,
)
from vgm_cli.ranges import NonNegative, Positive, Steps

Method = Literal["euler", "midpoint", "heun", "heun3", "rk4", "rk38", "dopri5"]


@dataclass(kw_only=True)
class ODESampler(GaussianSampler):
    """Probability-flow ODE in t: dx/dt = u.

    method: euler, midpoint, heun, heun3, rk4, rk38 on a grid, or dopri5 to rtol, atol. grid: None is uniform
    in t (EDM's path: karras).
    """

    method: Method = "heun"
    grid: Grid | None = None
    rtol: Positive = 1e-5
    atol: Positive = 1e-5

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        low, high = model.t_range()
        whole = reaches_data(model, low)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return model.predict(x, t, "velocity", **request.cond)

        def x0_of(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
            return convert(v, x, t, model.path, "velocity", "x0")

        x = request.randn() * model.path.sigma(high)
        reporting: dict[str, Any] = {"callback": report(request, steps), "x0_of": x0_of}
        if self.method == "dopri5":
            x = solvers.dopri5(velocity, x, high, low, rtol=self.rtol, atol=self.atol, **reporting)
        elif whole or steps > 1:
            grid = self.grid or default_grid(model)
            times = timesteps.time_grid(model.path, steps if whole else steps - 1, grid, low, high)
            x = solvers.ODE[self.method][0](velocity, x, times, **reporting)
        else:
            low = high
        return x if whole else model.predict(x, low, "x0", **request.cond)


@dataclass(kw_only=True)
class EulerSampler(ODESampler):
    method: Method = "euler"


@dataclass(kw_only=True)
class Dopri5Sampler(ODESampler):
    method: Method = "dopri5"


@dataclass(kw_only=True)
class SDESampler(GaussianSampler):
    """Reverse SDE. form: "g" e^2 = scale g(t)^2 (scale 1: the exact time reversal), "sigma" e^2 = scale sigma(t)."""

    steps: Steps = 250
    form: Literal["g", "sigma"] = "g"
    scale: NonNegative = 1.0
    grid: Grid | None = None

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        path = model.path
        times, _, _ = grid_of(model, steps, self.grid, need_alpha=True)
        low = model.t_range()[0]
        whole = reaches_data(model, low)
        if whole:
            times = torch.cat([times, times.new_full((1,), low)])

        def drift_score(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            x0, eps = model.predict_both(x, t, **request.cond)
            return path.alpha_prime(t) * x0 + path.sigma_prime(t) * eps, -eps / path.sigma(t)

        def diffusion(t: Tensor) -> Tensor:
            return (self.scale * (path.g2(t) if self.form == "g" else path.sigma(t))).sqrt()

        def x0_of(x: Tensor, t: Tensor, score: Tensor) -> Tensor:
            return convert(score, x, t, path, "score", "x0")

        x = request.randn() * path.sigma(times[0])
        reporting: dict[str, Any] = {"callback": report(request, steps), "x0_of": x0_of}
        x = solvers.reverse_sde(drift_score, x, times, diffusion, noise=request.randn, **reporting)
        return x if whole else model.predict(x, times[-1], "x0", **request.cond)


@dataclass(kw_only=True)
class FlowEulerSampler(GaussianSampler):
    """Euler on the flow (1 - s) x0 + s eps at shifted levels s; networks of other paths are asked at equal noise level.

    shift: SD3's, above 1 spends more steps on noise. stochastic: each step renoises its estimate of x0.
    """

    steps: Steps = 28
    shift: Positive = 1.0
    stochastic: bool = False

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        levels = timesteps.shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64).numpy(), self.shift)
        sigmas = torch.from_numpy(levels)
        cond: dict[str, Any] = request.cond

        def velocity(x: Tensor, i: int) -> Tensor:
            return flow_velocity(model, x, sigmas[i], **cond)

        noise, reporting = request.randn if self.stochastic else None, report(request, steps)
        return solvers.flow_euler(
            velocity, request.randn(), sigmas, stochastic=self.stochastic, noise=noise, callback=reporting
        )
