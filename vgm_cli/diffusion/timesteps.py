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

from vgm_cli.diffusion.path import Path
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.limits import check_levels

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
    return append_zero(vp_levels(torch.linspace(1, eps_s, n, dtype=dtype), beta_d, beta_min))


def vp_levels(t: Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> Tensor:
    """sigma / alpha of the continuous VP process at times t in [0, 1]; shaped like t."""
    return torch.expm1(0.5 * beta_d * t**2 + beta_min * t).sqrt()


# -- discrete processes as in diffusers ------------------------------------------------------------------------------


def betas(schedule: str = "linear", steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Betas as diffusers makes them, in float32: (steps,). VgmError: unknown schedule."""
    check_levels(steps)
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (beta_end - beta_start) + beta_start
    bars = {
        "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
        "exp": lambda t: math.exp(-12.0 * t),
        "laplace": _laplace_bar,
    }
    if schedule not in bars:
        raise unknown("beta schedule", schedule, ("linear", "scaled_linear", "sigmoid", *bars))
    bar = bars[schedule]
    return torch.tensor([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])


def _laplace_bar(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas shifted and scaled so that nothing of the data is left at the last step (Lin et al. 2023, alg. 1)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


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


def multistep_timesteps(
    n: int, steps: int, spacing: str = "linspace", offset: int = 0, last: int | None = None
) -> np.ndarray:
    """The same as DPM-Solver and UniPC take them: n + 1 indices without the cleanest one. last: only those below."""
    _check_count(n, steps)
    last = steps if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, n + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(n + 1) * (last // (n + 1)))[::-1][:-1].astype(np.int64) + offset
    if spacing == "trailing":
        return np.arange(last, 0, -steps / n).round().astype(np.int64) - 1
    raise unknown("timestep spacing", spacing, SPACINGS)


def euler_timesteps(n: int, steps: int, spacing: str = "linspace", offset: int = 0) -> np.ndarray:
    """The same as Euler and Heun take them: "linspace" is fractional. (n,) float32."""
    if spacing == "linspace":
        return np.linspace(0, steps - 1, n, dtype=np.float32)[::-1].copy()
    return spaced_timesteps(n, steps, spacing, offset).astype(np.float32)


def _check_count(n: int, steps: int) -> None:
    if not 1 <= n <= steps:
        raise VgmError(f"{n} sampling steps of a process with {steps}", f"steps between 1 and {steps}", USAGE)


def respace_sigmas(sigma_min: float, sigma_max: float, n: int, schedule: str) -> np.ndarray:
    """n levels from sigma_max to sigma_min, both included: karras | exponential | beta (float64, descending)."""
    if schedule == "karras":
        return karras_levels(np.linspace(0, 1, n), sigma_min, sigma_max)
    if schedule == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), n))
    if schedule == "beta":
        ranks = [beta_quantile(float(q), 0.6, 0.6) for q in 1 - np.linspace(0, 1, n)]
        return sigma_min + np.array(ranks) * (sigma_max - sigma_min)
    raise unknown("noise schedule", schedule, ("karras", "exponential", "beta"))


def timestep_of_sigma(sigma: float, log_sigmas: np.ndarray) -> float:
    """The fractional index whose level is sigma, log-linear in a table of ascending ln sigma."""
    at = np.log(np.maximum(sigma, 1e-10))
    low = int(np.clip(np.searchsorted(log_sigmas, at, side="right") - 1, 0, len(log_sigmas) - 2))
    w = np.clip((log_sigmas[low] - at) / (log_sigmas[low] - log_sigmas[low + 1]), 0, 1)
    return float((1 - w) * low + w * (low + 1))


def beta_quantile(q: float, a: float, b: float) -> float:
    """The inverse distribution function of Beta(a, b) by bisection, for "beta sigmas" (Lee et al. 2024)."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_cdf(middle, a, b) < q else (low, middle)
    return (low + high) / 2


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _beta_cdf(1 - x, b, a)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 200):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            total *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * total / a


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


def dpm_flow_sigmas(n: int, steps: int = 1000, shift: float = 1.0) -> np.ndarray:
    """The same as DPM-Solver takes them: strictly below 1, where its log-SNR is finite. (n,) float64."""
    return shift_sigmas(1 - np.linspace(1, 1 / steps, n + 1), shift)[::-1][:-1].copy()


def unipc_flow_sigmas(
    n: int,
    steps: int = 1000,
    shift: float = 1.0,
    mu: float | None = None,
    shift_type: str = "exponential",
    terminal: float | None = None,
) -> np.ndarray:
    """The same as UniPC takes them: from 1, which is lowered by 1e-6. (n,) float64."""
    sigmas = shift_sigmas(np.linspace(1, 1 / steps, n + 1)[:-1], shift, mu, shift_type)
    if terminal:
        sigmas = stretch_to_terminal(sigmas, terminal)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    return sigmas


def stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Scale 1 - sigma so that the last level is `terminal`."""
    return 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


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
