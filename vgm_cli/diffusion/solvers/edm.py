"""EDM's samplers in VE coordinates: algorithm 2, and the generalised one of its ablations.

Karras et al. 2022 (2206.00364); behaviour of NVlabs/edm@008a4e5 generate.py. `denoise(x, sigma) -> x0` with sigma (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from vgm_cli.diffusion.path import VPPath
from vgm_cli.diffusion.solvers.common import Callback, Denoise, Draw, estimate, notify
from vgm_cli.diffusion.timesteps import append_zero, karras_levels
from vgm_cli.errors import unknown


def edm_heun(
    denoise: Denoise,
    latents: Tensor,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,  # the last level before 0
    sigma_max: float = 80.0,  # the first
    rho: float = 7.0,  # above 1 there are more levels near data
    S_churn: float = 0.0,  # amount of stochasticity, 0 is the ODE
    S_min: float = 0.0,  # noise is added at levels from S_min ...
    S_max: float = math.inf,  # ... to S_max
    S_noise: float = 1.0,  # deviation of the noise that is added
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,  # to the levels that the network knows
    noise: Draw | None = None,  # the next draw like latents; None: no stochasticity
    callback: Callback = None,
) -> Tensor:
    """EDM's sampler (Karras et al. 2022, alg. 2): float64 states, float32 network, levels of their eq. 5.

    latents: (B, ...) standard normal. Gives float64.
    """
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    sigmas = append_zero(round_sigma(karras_levels(ramp, sigma_min, sigma_max, rho)))

    x = latents.double() * sigmas[0]
    for i in range(num_steps):
        x, sigma = edm_churn(x, sigmas[i], num_steps, (S_churn, S_min, S_max, S_noise), round_sigma, noise)
        x0 = in_float32(denoise, x, sigma)
        notify(callback, i, x, x0)
        d, dt = (x - x0) / sigma, sigmas[i + 1] - sigma
        if i < num_steps - 1:
            x_next = x + dt * d
            d = 0.5 * d + 0.5 * (x_next - in_float32(denoise, x_next, sigmas[i + 1])) / sigmas[i + 1]
        x = x + dt * d
    return x


def edm_churn(
    x: Tensor,
    sigma: Tensor,
    num_steps: int,
    options: tuple[float, float, float, float],
    round_sigma: Callable[[Tensor], Tensor],
    noise: Draw | None,
) -> tuple[Tensor, Tensor]:
    """EDM's own churn: the raised level is rounded to one that the network knows."""
    S_churn, S_min, S_max, S_noise = options
    if not S_churn or noise is None:
        return x, sigma
    gamma = min(S_churn / num_steps, 2**0.5 - 1) if S_min <= sigma <= S_max else 0.0
    raised = round_sigma(sigma + gamma * sigma)
    return x + (raised**2 - sigma**2).clamp(min=0).sqrt() * S_noise * noise(), raised


def in_float32(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """The network in float32 inside a float64 solver."""
    return estimate(denoise, x.float(), sigma.float()).double()


def edm_ablation(
    denoise: Denoise,
    latents: Tensor,
    *,
    num_steps: int = 18,
    sigma_min: float | None = None,  # the last level before 0; None: the discretization's
    sigma_max: float | None = None,  # the first; None: the discretization's
    rho: float = 7.0,  # of the discretization edm
    solver: str = "heun",  # euler | heun
    discretization: str = "edm",  # the time steps: vp | ve | iddpm | edm
    schedule: str = "linear",  # sigma(t): vp | ve | linear
    scaling: str = "none",  # s(t): vp | none
    epsilon_s: float = 1e-3,  # the last time of VP
    C_1: float = 0.001,  # of iddpm: the smallest ratio of neighbouring alpha-bars
    C_2: float = 0.008,  # of iddpm: the offset of its cosine
    M: int = 1000,  # of iddpm: its number of levels
    alpha: float = 1.0,  # of heun: where the second slope is taken, 1 Heun, 0.5 midpoint
    S_churn: float = 0.0,  # see edm_heun, like the three below
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    net_sigma_min: float = 0.0,  # the lowest level that the network knows
    net_sigma_max: float = math.inf,  # the highest
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,  # to the levels that the network knows
    noise: Draw | None = None,  # the next draw like latents; None: no stochasticity
    callback: Callback = None,
) -> Tensor:
    """EDM's generalised sampler (Karras et al. 2022, app. D): any pairing of solver, time steps, schedule and scaling.

    latents: (B, ...) standard normal. float64 states, float32 network. Gives float64. VgmError: unknown names.
    """
    for what, value, known in (
        ("solver", solver, ("euler", "heun")),
        ("discretization", discretization, ("vp", "ve", "iddpm", "edm")),
        ("schedule", schedule, ("vp", "ve", "linear")),
        ("scaling", scaling, ("vp", "none")),
    ):
        if value not in known:
            raise unknown(what, value, known)
    usual_vp = VPPath()
    vp_ends = float(usual_vp.ve_sigma(epsilon_s)), float(usual_vp.ve_sigma(1.0))
    defaults = {"vp": vp_ends, "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}
    low, high = defaults.get(discretization, (0.002, 80.0))
    low = max(low if sigma_min is None else sigma_min, net_sigma_min)
    high = min(high if sigma_max is None else sigma_max, net_sigma_max)

    # the VP process that passes through both ends
    beta_d = 2 * (math.log(low**2 + 1) / epsilon_s - math.log(high**2 + 1)) / (epsilon_s - 1)
    beta_0 = math.log(high**2 + 1) - 0.5 * beta_d
    vp = VPPath(beta_0, beta_0 + beta_d)

    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    if discretization == "vp":
        levels = vp.ve_sigma(1 + ramp * (epsilon_s - 1))
    elif discretization == "ve":
        levels = (high**2 * (low**2 / high**2) ** ramp).sqrt()
    elif discretization == "iddpm":
        known_levels = iddpm_levels(M, C_1, C_2)
        inside = known_levels[(known_levels >= low) & (known_levels <= high)]
        levels = inside[((len(inside) - 1) * ramp).round().long()]
    else:
        levels = karras_levels(ramp, low, high, rho)

    def sigma_of(t: Tensor) -> Tensor:
        if schedule == "vp":
            return vp.ve_sigma(t)
        return t.sqrt() if schedule == "ve" else t

    def sigma_slope(t: Tensor) -> Tensor:
        if schedule == "vp":
            return 0.5 * (beta_0 + beta_d * t) * (sigma_of(t) + 1 / sigma_of(t))
        return 0.5 / t.sqrt() if schedule == "ve" else torch.ones_like(t)

    def time_of(sigma: Tensor) -> Tensor:
        if schedule == "vp":
            return ((beta_0**2 + 2 * beta_d * (sigma**2).log1p()).sqrt() - beta_0) / beta_d
        return sigma**2 if schedule == "ve" else sigma

    def scale_of(t: Tensor) -> Tensor:
        return 1 / (1 + sigma_of(t) ** 2).sqrt() if scaling == "vp" else torch.ones_like(t)

    def derivative(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma, d_sigma, s = sigma_of(t), sigma_slope(t), scale_of(t)
        x0 = in_float32(denoise, x / s, sigma)
        log_s_slope = -sigma * d_sigma * s**2 if scaling == "vp" else 0.0
        return (d_sigma / sigma + log_s_slope) * x - d_sigma * s / sigma * x0, x0

    times = append_zero(time_of(round_sigma(levels)))
    x = latents.double() * (sigma_of(times[0]) * scale_of(times[0]))
    for i in range(num_steps):
        t = times[i]
        if S_churn and noise is not None:
            sigma = sigma_of(t)
            gamma = min(S_churn / num_steps, 2**0.5 - 1) if S_min <= sigma <= S_max else 0.0
            raised = time_of(round_sigma(sigma + gamma * sigma))
            added = (sigma_of(raised) ** 2 - sigma**2).clamp(min=0).sqrt() * scale_of(raised) * S_noise
            x, t = scale_of(raised) / scale_of(t) * x + added * noise(), raised
        h = times[i + 1] - t
        d, x0 = derivative(x, t)
        notify(callback, i, x, x0)
        if solver == "heun" and i < num_steps - 1:
            second, _ = derivative(x + alpha * h * d, t + alpha * h)
            d = (1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * second
        x = x + h * d
    return x


@cache
def iddpm_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008, dtype: torch.dtype = torch.float64) -> Tensor:
    """The levels of iDDPM's cosine schedule from noisiest to 0, as EDM writes them: (M + 1,).

    alpha-bar is float32 whatever the dtype, as officially: its rounding decides the smallest levels.
    """
    bar = (0.5 * math.pi * torch.arange(M + 1) / M / (C_2 + 1)).sin() ** 2
    ratios = (bar[:-1] / bar[1:]).clip(min=C_1).unbind()
    levels = [torch.zeros((), dtype=dtype)]
    for ratio in reversed(ratios):
        levels.append(((levels[-1] ** 2 + 1) / ratio - 1).sqrt())
    return torch.stack(levels[::-1])
