"""Samplers in variance-exploding coordinates x / alpha, where time is the noise level: k-diffusion's and EDM's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion import solvers, timesteps
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.samplers.base import (
    GaussianSampler,
    report,
)
from vgm_cli.errors import unknown
from vgm_cli.nn.shapes import each
from vgm_cli.ranges import NonNegative, Positive, Steps, Unbounded, ordered


@dataclass(kw_only=True)
class KDiffusionSampler(GaussianSampler):
    """k-diffusion's samplers in VE coordinates. Options that are None are the solver's own.

    VgmError: unknown solver, or an option that the solver lacks.
    """

    steps: Steps = 25
    solver: str = "dpmpp_2m"  # a key of solvers.K_DIFFUSION, dpm_fast or dpm_adaptive
    schedule: Literal["karras", "exponential", "polyexponential", "vp"] = "karras"  # of the noise levels
    rho: Positive | None = None  # of the schedules karras and polyexponential
    sigma_min: Positive | None = None  # the last level before 0; None: the path's, at least 0.002
    sigma_max: Positive | None = None  # the first level; None: the path's
    eta: NonNegative | None = None  # of ancestral and SDE solvers: share of noise that is renewed
    s_noise: NonNegative | None = None  # deviation of the noise that is added
    s_churn: NonNegative | None = None  # of euler, heun, dpm_2: noise added before each step
    s_tmin: NonNegative | None = None  # levels at which s_churn adds noise: from here ...
    s_tmax: Unbounded | None = None  # ... to here
    r: float | None = None  # of dpmpp_sde: where within a step the middle lies
    order: int | None = None  # of lms and dpm_adaptive
    solver_type: Literal["midpoint", "heun"] | None = None  # of dpmpp_2m_sde
    rtol: Positive | None = None  # relative tolerance of dpm_adaptive
    atol: Positive | None = None  # absolute tolerance of dpm_adaptive

    def __post_init__(self) -> None:
        ordered(self.sigma_min, self.sigma_max, "sigma_min, sigma_max")
        known: dict[str, Callable[..., Tensor]] = {
            **solvers.K_DIFFUSION,
            "dpm_fast": solvers.dpm_fast,
            "dpm_adaptive": solvers.dpm_adaptive,
        }
        self.solver = self.solver.replace("-", "_")
        if self.solver not in known:
            raise unknown("solver", self.solver, known)
        self.function = known[self.solver]
        self.takes = inspect.signature(self.function).parameters
        names = ("eta", "s_noise", "s_churn", "s_tmin", "s_tmax", "r", "order", "solver_type", "rtol", "atol")
        self.options = {k: getattr(self, k) for k in names if getattr(self, k) is not None}
        for key in self.options:
            if key not in self.takes:
                raise unknown("option", key, [n for n in names if n in self.takes], f"solver '{self.solver}'")

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        if self.solver == "dpm_adaptive" and len(request) > 1:  # its step size would depend on the batch
            return torch.cat([self.solve(model, item, steps) for item in single_items(request)])
        low, high = timesteps.level_range(model.path, *model.t_range())
        low, high = self.sigma_min or low, self.sigma_max or high

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model.denoise_ve(x, sigma, **request.cond)

        keywords: dict[str, Any] = {**self.options, "callback": report(request, steps)}
        if "noise" in self.takes:
            keywords["noise"] = request.randn
        if self.solver in ("dpm_fast", "dpm_adaptive"):
            counts = (steps,) if self.solver == "dpm_fast" else ()
            x = self.function(denoise, request.randn() * high, low, high, *counts, dtype=torch.float64, **keywords)
            return denoise(x, each(x, low))
        sigmas = self.sigmas(steps, low, high)
        return self.function(denoise, request.randn() * sigmas[0], sigmas, **keywords)

    def sigmas(self, steps: int, low: float, high: float) -> Tensor:
        """(steps + 1,) float64, the last 0."""
        if self.schedule == "vp":
            return timesteps.vp(steps, dtype=torch.float64)
        rho = {} if self.rho is None or self.schedule == "exponential" else {"rho": self.rho}
        return getattr(timesteps, self.schedule)(steps, low, high, dtype=torch.float64, **rho)


@dataclass(kw_only=True)
class DPMpp2MSampler(KDiffusionSampler):
    solver: str = "dpmpp_2m"


@dataclass(kw_only=True)
class DPMpp2MSDESampler(KDiffusionSampler):
    solver: str = "dpmpp_2m_sde"


@dataclass(kw_only=True)
class DPMpp3MSDESampler(KDiffusionSampler):
    solver: str = "dpmpp_3m_sde"


@dataclass(kw_only=True)
class EulerAncestralSampler(KDiffusionSampler):
    solver: str = "euler_ancestral"


@dataclass(kw_only=True)
class EDMSampler(GaussianSampler):
    """EDM's Heun sampler, stochastic with S_churn > 0: float64 states."""

    steps: Steps = 18
    sigma_min: Positive | None = None  # the last level before 0; None: the path's, at least 0.002
    sigma_max: Positive | None = None  # the first level; None: the path's
    rho: Positive = 7.0  # above 1 there are more levels near data
    S_churn: NonNegative = 0.0  # amount of stochasticity, 0 is the ODE
    S_min: NonNegative = 0.0  # noise is added at levels from here ...
    S_max: Unbounded = math.inf  # ... to here
    S_noise: NonNegative = 1.0  # deviation of the noise that is added

    def __post_init__(self) -> None:
        ordered(self.sigma_min, self.sigma_max, "sigma_min, sigma_max")

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        low, high = timesteps.level_range(model.path, *model.t_range())

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model.denoise_ve(x, sigma, **request.cond)

        return self.integrate(
            denoise,
            request.randn(),
            num_steps=steps,
            sigma_min=self.sigma_min or low,
            sigma_max=self.sigma_max or high,
            rho=self.rho,
            S_churn=self.S_churn,
            S_min=self.S_min,
            S_max=self.S_max,
            S_noise=self.S_noise,
            noise=request.randn,
            callback=report(request, steps),
        )

    def integrate(self, denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, **keywords: Any) -> Tensor:
        return solvers.edm_heun(denoise, latents, **keywords)


@dataclass(kw_only=True)
class EDMAblationSampler(EDMSampler):
    """EDM's generalised sampler (Karras et al. 2022, app. D): any pairing of the choices of table 1.

    solver: euler, or heun of parameter alpha (1: Heun, 0.5: midpoint). discretization: the time steps. schedule:
    sigma(t). scaling: s(t).
    """

    solver: Literal["euler", "heun"] = "heun"
    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm"
    schedule: Literal["vp", "ve", "linear"] = "linear"
    scaling: Literal["vp", "none"] = "none"
    alpha: float = 1.0

    def integrate(self, denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, **keywords: Any) -> Tensor:
        names = ("solver", "discretization", "schedule", "scaling", "alpha")
        return solvers.edm_ablation(denoise, latents, **{n: getattr(self, n) for n in names}, **keywords)


def single_items(request: Request) -> list[Request]:
    """One request per item, sharing the item's generator."""
    return [
        replace(request, generators=[g], cond={k: v[i : i + 1] for k, v in request.cond.items()})
        for i, g in enumerate(request.generators)
    ]
