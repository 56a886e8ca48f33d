"""Where diffusers' schedulers stop (huggingface/diffusers@58eb52c): the grids of the golden cases, from their configs."""

import math

import numpy as np
import torch
from torch import Tensor

from vgm_cli.diffusion.timesteps import SPACINGS, karras_levels, shift_sigmas, spaced_timesteps
from vgm_cli.errors import unknown


def betas(schedule: str = "linear", steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Betas as diffusers makes them, in float32: (steps,). VgmError: unknown schedule."""
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


def multistep_timesteps(
    n: int, steps: int, spacing: str = "linspace", offset: int = 0, last: int | None = None
) -> np.ndarray:
    """The same as DPM-Solver and UniPC take them: n + 1 indices without the cleanest one. last: only those below."""
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
