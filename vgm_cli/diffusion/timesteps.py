"""Where samplers stop on the way from noise to data: noise levels, integer timesteps, time grids.

Karras et al. 2022 (2206.00364), crowsonkb/k-diffusion@4601bf0, huggingface/diffusers@58eb52c (schedulers), Lu et al.
2022 (uniform log-SNR), Esser et al. 2024 (shift), Lin et al. 2023 (trailing spacing, zero terminal SNR).
Levels `sigma` are those of x / alpha (variance-exploding coordinates) unless a function says "flow"; all descend.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vgm_cli.diffusion.path import Path, VPPath
from vgm_cli.errors import USAGE, VgmError, unknown

Level = TypeVar("Level", Tensor, np.ndarray)
SPACINGS = ("leading", "trailing", "linspace")

# -- k-diffusion's noise levels: (n + 1,), the last 0 ----------------------------------------------------------------


def append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Polynomial in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    return append_zero(karras_levels(torch.linspace(0, 1, n, dtype=dtype), sigma_min, sigma_max, rho))


def karras_levels(ramp: Level, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Level:
    """The level at fractions `ramp` of the way down, 0 being sigma_max and 1 sigma_min; shaped like ramp."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def exponential(n: int, sigma_min: float, sigma_max: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in ln sigma."""
    return append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, dtype=dtype).exp())


def polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """ln sigma along a power of a uniform ramp."""
    low, high = math.log(sigma_min), math.log(sigma_max)
    return append_zero(torch.exp(torch.linspace(1, 0, n, dtype=dtype) ** rho * (high - low) + low))


def vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The levels of the continuous VP process at uniform times from 1 to eps_s."""
    return append_zero(VPPath(beta_min, beta_min + beta_d).ve_sigma(torch.linspace(1, eps_s, n, dtype=dtype)))


# -- discrete processes as in diffusers ------------------------------------------------------------------------------


def spaced_timesteps(n: int, steps: int, spacing: str = "leading", offset: int = 0) -> np.ndarray:
    """n of the indices 0..steps - 1, descending, as DDIM and DDPM take them: (n,) int64 (table 2 of Lin et al. 2023).

    offset: added to "leading" ones. VgmError: unknown spacing, more indices than there are.
    """
    _check_count(n, steps)
    if spacing == "linspace":
        return np.linspace(0, steps - 1, n).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(n) * (steps // n))[::-1].astype(np.int64) + offset
    if spacing == "trailing":
        return np.round(np.arange(steps, 0, -steps / n)).astype(np.int64) - 1
    raise unknown("timestep spacing", spacing, SPACINGS)


def _check_count(n: int, steps: int) -> None:
    if not 1 <= n <= steps:
        raise VgmError(f"{n} sampling steps of a process with {steps}", f"steps between 1 and {steps}", USAGE)


# -- flow ------------------------------------------------------------------------------------------------------------


def shift_sigmas(
    sigmas: np.ndarray, shift: float = 1.0, mu: float | None = None, kind: str = "exponential"
) -> np.ndarray:
    """Flow levels pushed towards noise: shift s / (1 + (shift - 1) s), or by a resolution-dependent mu."""
    if mu is None:
        return shift * sigmas / (1 + (shift - 1) * sigmas)
    factor = math.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / sigmas - 1))


def flow_sigmas(
    n: int, steps: int = 1000, shift: float = 1.0, mu: float | None = None, shift_type: str = "exponential"
) -> np.ndarray:
    """Flow matching's levels t = sigma as diffusers' Euler takes them, without the final 0: (n,) float64.

    The ends of the training grid are shifted once, then the levels between them again: SD3's own convention.
    """
    ends = np.array([1.0, 1 / steps])
    if mu is None:
        ends = shift_sigmas(ends.astype(np.float32), shift).astype(np.float64)
    return shift_sigmas(np.linspace(ends[0] * steps, ends[1] * steps, n) / steps, shift, mu, shift_type)


# -- time grids on any path ------------------------------------------------------------------------------------------


def time_grid(
    path: Path, n: int, schedule: str = "uniform", low: float | None = None, high: float | None = None
) -> Tensor:
    """n + 1 times from noise (high) to data (low), (n + 1,) float64. VgmError: unknown schedule.

    uniform: equal steps in t | logsnr: equal steps in log-SNR | quadratic: denser near data | karras, exponential:
    in sigma / alpha. The last three need low above data; None takes the path's ends.
    """
    low, high = path.t_min if low is None else low, path.t_max if high is None else high
    ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if schedule == "uniform":
        return high + ramp * (low - high)
    if schedule == "quadratic":
        return (high**0.5 + ramp * (low**0.5 - high**0.5)) ** 2
    if schedule not in ("logsnr", "exponential", "karras"):
        raise unknown("time grid", schedule, ("uniform", "quadratic", "logsnr", "exponential", "karras"))
    smallest, largest = level_range(path, low, high)
    make = karras if schedule == "karras" else exponential
    times = path.t_of_ve_sigma(make(n + 1, smallest, largest, dtype=torch.float64)[:-1])
    times[0], times[-1] = (high if math.isfinite(float(path.ve_sigma(high))) else times[0]), low
    return times


def level_range(path: Path, low: float | None = None, high: float | None = None) -> tuple[float, float]:
    """The levels sigma / alpha between two times that solvers in VE coordinates use: at least EDM's 0.002, and at most
    160, about VP's, on paths that scale the data down."""
    low, high = path.t_min if low is None else low, path.t_max if high is None else high
    smallest, largest = float(path.ve_sigma(low)), float(path.ve_sigma(high))
    return max(smallest, 0.002), largest if float(path.alpha(high)) == 1 else min(largest, 160.0)
