"""Sampling with a consistency function: one step, or several with fresh noise; progressive distillation's few steps.

Song et al. 2023 (2303.01469), alg. 1; openai/consistency_models@e32b69e cm/karras_diffusion.py (sample_onestep,
stochastic_iterative_sampler, sample_progdist). x: (B, C, H, W) at its noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap, few_step
from vgm_cli.diffusion.samplers import GaussianSampler, report
from vgm_cli.diffusion.solvers.common import estimate, slope
from vgm_cli.diffusion.solvers.k_diffusion import churn, euler
from vgm_cli.diffusion.timesteps import karras, level_range
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import each
from vgm_cli.ranges import NonNegative, Positive, Steps, Unbounded

from .function import RHO, SIGMA_MAX, SIGMA_MIN, level_of

Function = Callable[[Tensor, Tensor], Tensor]
Levels = tuple[float, float, float]  # sigma_min, sigma_max, rho
LEVELS: Levels = (SIGMA_MIN, SIGMA_MAX, RHO)


def multistep(
    f: Function,
    x: Tensor,
    ts: Sequence[float],
    noise: Callable[[], Tensor],
    grid: int = 40,
    levels: Levels = LEVELS,
    change: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[int, int, Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """len(ts) - 1 evaluations: f at level ts[i] of a descending grid, then noise up to level ts[i + 1].

    The noise added has variance ts[i + 1]^2 - sigma_min^2. ts: indices, 0 is sigma_max and grid - 1 sigma_min. noise():
    like x, called wherever some is added. change: of every estimate of x0 before it is noised (clipping, editing).
    """
    low, high, rho = levels

    def renoise(x0: Tensor, sigma: float) -> Tensor:
        extra = min(max(sigma, low), high) ** 2 - low**2
        return x0 + noise() * extra**0.5 if extra > 1e-12 else x0

    return few_step(
        lambda x, sigma, _: f(x, each(x, sigma)),
        x,
        level_of(torch.tensor(ts, dtype=torch.float64), grid, low, high, rho).tolist(),
        renoise=renoise,
        change=change,
        callback=None if callback is None else lambda i, x, x0: callback(i, len(ts) - 1, x, x0),
    )


def progressive(denoise: Function, x: Tensor, steps: int, levels: Levels = LEVELS) -> Tensor:
    """`steps` Euler steps from sigma_max to sigma_min; what is left of the noise stays."""
    return euler(denoise, x, level_of(torch.arange(steps + 1), steps + 1, *levels))


def dpm_2_karras(
    denoise: Function,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = inf,
    s_noise: float = 1.0,
    noise: Callable[[], Tensor] | None = None,
    callback: Callable[[int, Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """The official sampler "dpm" of the teachers: second-order steps over the middle in sigma^(1/3), also to level 0.

    sigmas: descending, the last 0. s_churn, s_tmin, s_tmax, s_noise: the churn of Karras et al. 2022.
    """
    for i, (sigma, then) in enumerate(pairwise(sigmas)):
        x, now = churn(x, sigma, len(sigmas) - 1, noise, s_churn, s_tmin, s_tmax, s_noise)
        middle = ((now ** (1 / 3) + then ** (1 / 3)) / 2) ** 3
        x0 = estimate(denoise, x, now)
        if callback is not None:
            callback(i, x, x0)
        x_mid = x + slope(x, now, x0) * (middle - now)
        x = x + slope(x_mid, middle, estimate(denoise, x_mid, middle)) * (then - now)
    return x


def spread(steps: int, grid: int) -> list[int]:
    """steps + 1 indices, evenly from 0 to grid - 1."""
    return [round(i * (grid - 1) / steps) for i in range(steps + 1)]


def levels_of(view: Denoiser, rho: float = RHO) -> Levels:
    """The student's own ends, or what there is of the official ones on another network's path."""
    if isinstance(view, FlowMap) and view.boundary == "skip":
        return view.sigma_min, view.sigma_max, rho
    low, high = level_range(view.path, *view.t_range())
    return max(low, SIGMA_MIN), min(high, SIGMA_MAX), rho


@dataclass(kw_only=True)
class ConsistencySampler:
    """steps: evaluations, when the request does not say; ts: where, as indices into `grid` levels, None is evenly (for
    the official points give ts: 0, 22, 39 is the paper's for two steps on ImageNet 64). clip: estimates to [-1, 1], for
    pixels. kind: multistep, or progdist for a student of progressive distillation. VgmError: the view is no Denoiser.
    """

    steps: Steps = 1
    ts: tuple[int, ...] | None = None
    grid: int = 40
    rho: Positive = RHO
    clip: bool = False
    kind: Literal["multistep", "progdist"] = "multistep"

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        if not isinstance(view, Denoiser):
            raise VgmError("this sampler needs a diffusion or flow network", "`vgm ls samplers` shows others", USAGE)
        levels, before = levels_of(view, self.rho), view.nfe
        steps = request.steps or (len(self.ts) - 1 if self.ts else self.steps)

        def f(x: Tensor, sigma: Tensor) -> Tensor:
            x0 = view.denoise_ve(x, sigma, **request.cond)
            return x0.clamp(-1, 1) if self.clip else x0

        x = request.randn() * levels[1]
        if self.kind == "progdist":
            x = progressive(f, x, steps, levels)
        else:
            chosen = self.ts if self.ts and request.steps is None else spread(steps, self.grid)
            grid = max(self.grid, steps + 1)
            chosen = chosen if grid == self.grid else spread(steps, grid)
            x = multistep(f, x, chosen, request.randn, grid, levels, callback=request.callback)
        request.info["nfe"] = view.nfe - before
        return (x.clamp(-1, 1) if self.clip else x).float()


@dataclass(kw_only=True)
class DPM2KarrasSampler(GaussianSampler):
    """dpm_2_karras on any path. s_churn to s_noise: as there."""

    steps: Steps = 20
    s_churn: NonNegative = 0.0
    s_tmin: NonNegative = 0.0
    s_tmax: Unbounded = inf
    s_noise: NonNegative = 1.0

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        low, high, rho = levels_of(model)
        sigmas = karras(steps, low, high, rho, dtype=torch.float64)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model.denoise_ve(x, sigma, **request.cond)

        options = {k: getattr(self, k) for k in ("s_churn", "s_tmin", "s_tmax", "s_noise")}
        x = request.randn() * sigmas[0]
        return dpm_2_karras(denoise, x, sigmas, noise=request.randn, callback=report(request, steps), **options)
