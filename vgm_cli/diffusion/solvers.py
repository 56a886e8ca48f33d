"""Samplers as pure functions: from a network's estimate and a grid to data. Randomness comes in as a callable.

Four families, each short and named after its algorithm:
- VE coordinates (x / alpha), `denoise(x, sigma) -> x0` with sigma (B,): crowsonkb/k-diffusion@4601bf0 and
  NVlabs/edm@008a4e5 (Karras et al. 2022). `sigmas` descends and ends with 0.
- native coordinates, `predict(x, i) -> (x0, eps)` at grid point i with alphas[i], sigmas[i] (N + 1 each, the last is
  where sampling ends): DDIM, DDPM, DPM-Solver(++), UniPC, as in huggingface/diffusers@58eb52c.
- host time, `velocity(x, t) -> dx/dt`: Euler, midpoint, Heun, RK4, Dormand-Prince; and the family of reverse SDEs.
  `x0_of(x, t, slope)` is what the callback is told of x0, None without it.
- score-SDE's predictor-corrector (Song et al. 2021).
`noise()` gives the next standard normal draw like x; it is called exactly when the official code draws, except that
noise which a sampler multiplies by zero throughout (churn 0, eta 0) is not drawn. `callback(i, x, x0)` sees the state
at which step i estimated x0. Grids are CPU tensors, in whose precision coefficients are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import DIVERGED, USAGE, VgmError, unknown

Denoise = Callable[[Tensor, Tensor], Tensor]
Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Velocity = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Tensor]
Callback = Callable[[int, Tensor, Tensor | None], None] | None
Estimate = Callable[[Tensor, Tensor, Tensor], Tensor] | None  # (x, t, slope) -> x0

# -- VE coordinates: k-diffusion -------------------------------------------------------------------------------------


def estimate(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """x0 at one noise level for the whole batch."""
    return denoise(x, sigma.to(x.device).expand(len(x)))


def slope(x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """dx/dsigma of the probability flow."""
    return (x - x0) / sigma


def ancestral_step(sigma: Tensor, sigma_next: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(level to step down to, standard deviation of the noise to add) so that the sum has level sigma_next."""
    if not eta:
        return sigma_next, torch.zeros_like(sigma_next)
    up = torch.minimum(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def churn(
    x: Tensor, sigmas: Tensor, i: int, noise: Draw | None, options: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    """Temporarily more noise: (x_hat, sigma_hat) (Karras et al. 2022, alg. 2, lines 4-6)."""
    s_churn, s_tmin, s_tmax, s_noise = options
    sigma = sigmas[i]
    if not s_churn or noise is None:
        return x, sigma
    eps = noise() * s_noise  # drawn even outside of [s_tmin, s_tmax]
    if not s_tmin <= sigma <= s_tmax:
        return x, sigma
    sigma_hat = sigma * (min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) + 1)
    return x + eps * (sigma_hat**2 - sigma**2) ** 0.5, sigma_hat


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Euler steps of Karras et al. 2022, algorithm 2."""
    for i in range(len(sigmas) - 1):
        x, sigma = churn(x, sigmas, i, noise, (s_churn, s_tmin, s_tmax, s_noise))
        x0 = estimate(denoise, x, sigma)
        notify(callback, i, x, x0)
        x = x + slope(x, sigma, x0) * (sigmas[i + 1] - sigma)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Heun steps of Karras et al. 2022, algorithm 2; the step to 0 is Euler's."""
    for i in range(len(sigmas) - 1):
        x, sigma = churn(x, sigmas, i, noise, (s_churn, s_tmin, s_tmax, s_noise))
        x0 = estimate(denoise, x, sigma)
        notify(callback, i, x, x0)
        d, dt = slope(x, sigma, x0), sigmas[i + 1] - sigma
        if sigmas[i + 1] > 0:
            x_next = x + d * dt
            d = (d + slope(x_next, sigmas[i + 1], estimate(denoise, x_next, sigmas[i + 1]))) / 2
        x = x + d * dt
    return x


def dpm_2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """DPM-Solver-2 steps with the churn of Karras et al. 2022: the slope at the middle in ln sigma."""
    for i in range(len(sigmas) - 1):
        x, sigma = churn(x, sigmas, i, noise, (s_churn, s_tmin, s_tmax, s_noise))
        x0 = estimate(denoise, x, sigma)
        notify(callback, i, x, x0)
        d = slope(x, sigma, x0)
        if sigmas[i + 1] > 0:
            d = middle_slope(denoise, x, sigma, sigmas[i + 1], d)
        x = x + d * (sigmas[i + 1] - sigma)
    return x


def middle_slope(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, d: Tensor) -> Tensor:
    """The slope at the geometric mean of two levels, reached by an Euler step along d."""
    middle = sigma.log().lerp(sigma_next.log(), 0.5).exp()
    x_mid = x + d * (middle - sigma)
    return slope(x_mid, middle, estimate(denoise, x_mid, middle))


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Ancestral sampling with Euler steps (k-diffusion)."""
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        down, up = ancestral_step(sigmas[i], sigmas[i + 1], eta)
        x = x + slope(x, sigmas[i], x0) * (down - sigmas[i])
        x = add(x, s_noise * up, noise)
    return x


def dpm_2_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver-2 steps (k-diffusion)."""
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        down, up = ancestral_step(sigmas[i], sigmas[i + 1], eta)
        d = slope(x, sigmas[i], x0)
        if down > 0:
            d = middle_slope(denoise, x, sigmas[i], down, d)
        x = x + d * (down - sigmas[i])
        if down > 0:  # a step to level 0 is left without noise
            x = add(x, s_noise * up, noise)
    return x


def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, *, order: int = 4, callback: Callback = None) -> Tensor:
    """Linear multistep (Adams-Bashforth in sigma, k-diffusion); the weights are integrated exactly."""
    slopes: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        slopes = [slope(x, sigmas[i], x0), *slopes[: order - 1]]
        weights = adams_weights(sigmas[max(0, i + 1 - order) : i + 2].double().tolist())
        x = x + sum(w * d for w, d in zip(weights, slopes))
    return x


def adams_weights(points: Sequence[float]) -> list[float]:
    """Integrals of the Lagrange polynomials on points[:-1] over the last interval, the latest point's first."""
    *nodes, end = points
    nodes = nodes[::-1]
    roots, weights = np.polynomial.legendre.leggauss(len(nodes) // 2 + 1)  # exact for their degree
    half, centre = (end - nodes[0]) / 2, (end + nodes[0]) / 2
    tau = centre + half * roots
    out = []
    for j, node in enumerate(nodes):
        basis = np.prod([(tau - n) / (node - n) for k, n in enumerate(nodes) if k != j], axis=0)
        out.append(float(half * np.sum(weights * basis)))
    return out


def dpm_step(
    denoise: Denoise, x: Tensor, l: Tensor, l_next: Tensor, eps: Tensor, order: int, r1: float, eps_r1: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One singlestep DPM-Solver step of order 1 to 3 in l = -ln sigma; eps at (x, l) is given, so may eps_r1 be.

    Lu et al. 2022 (2206.00927). Gives x at l_next and the intermediate estimate, for an embedded step to use again.
    """
    h, sigma_next = l_next - l, torch.exp(-l_next)
    whole = sigma_next * h.expm1()
    if order == 1:
        return x - whole * eps, None

    def eps_at(x: Tensor, l: Tensor) -> Tensor:
        sigma = torch.exp(-l)
        return slope(x, sigma, estimate(denoise, x, sigma))

    if eps_r1 is None:
        l1 = l + r1 * h
        eps_r1 = eps_at(x - torch.exp(-l1) * (r1 * h).expm1() * eps, l1)
    if order == 2:
        return x - whole * eps - sigma_next / (2 * r1) * h.expm1() * (eps_r1 - eps), eps_r1
    r2 = 2 / 3
    l2, part = l + r2 * h, (r2 * h).expm1()
    sigma2 = torch.exp(-l2)
    x2 = x - sigma2 * part * eps - sigma2 * (r2 / r1) * (part / (r2 * h) - 1) * (eps_r1 - eps)
    eps_r2 = eps_at(x2, l2)
    return x - whole * eps - sigma_next / r2 * (h.expm1() / h - 1) * (eps_r2 - eps), eps_r1


def dpm_ancestral(l: Tensor, l_next: Tensor, l_end: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Where a DPM-Solver step with noise goes, and the noise's standard deviation."""
    if not eta:
        return l_next, torch.zeros_like(l_next)
    down, _ = ancestral_step(torch.exp(-l), torch.exp(-l_next), eta)
    l_down = torch.minimum(l_end, -down.log())
    return l_down, (torch.exp(-l_next) ** 2 - torch.exp(-l_down) ** 2) ** 0.5


def dpm_fast(
    denoise: Denoise,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    nfe: int,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """DPM-Solver-fast: steps of order 3, the last ones lower, `nfe` evaluations in all (Lu et al. 2022, app. D.4)."""
    l_start, l_end = _log_levels(sigma_max, sigma_min, dtype)
    m = nfe // 3 + 1
    grid = torch.linspace(float(l_start), float(l_end), m + 1, dtype=dtype)
    orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
    for i, order in enumerate(orders):
        l, l_next = grid[i], grid[i + 1]
        l_down, up = dpm_ancestral(l, l_next, l_end, eta)
        x0 = estimate(denoise, x, torch.exp(-l))
        notify(callback, i, x, x0)
        eps = slope(x, torch.exp(-l), x0)
        x, _ = dpm_step(denoise, x, l, l_down, eps, order, 1 / 3 if order == 3 else 1 / 2, None)
        if eta and noise is not None:
            x = x + up * s_noise * noise()
    return x


def dpm_adaptive(
    denoise: Denoise,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
    dtype: torch.dtype = torch.float32,
    info: dict[str, int] | None = None,
) -> Tensor:
    """DPM-Solver-12 or -23 with a PID step size (k-diffusion). Its error mixes the batch: pass one image at a time to
    keep images independent. callback: after every attempt. info: receives steps, nfe, n_accept, n_reject."""
    if order not in (2, 3):
        raise VgmError(f"dpm_adaptive has order 2 or 3, not {order}", code=USAGE)
    l, l_end = _log_levels(sigma_max, sigma_min, dtype)
    accept_step = PID(h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
    counts = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0} if info is None else info
    counts |= {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    x_prev = x
    while l < l_end - 1e-5:
        l_next = torch.minimum(l_end, l + accept_step.h)
        l_down, up = dpm_ancestral(l, l_next, l_end, eta)
        sigma = torch.exp(-l)
        x0 = estimate(denoise, x, sigma)
        eps = slope(x, sigma, x0)
        r1 = 1 / 3 if order == 3 else 1 / 2
        low, eps_r1 = dpm_step(denoise, x, l, l_down, eps, order - 1, r1, None)
        high, _ = dpm_step(denoise, x, l, l_down, eps, order, r1, eps_r1)
        scale = torch.clamp(rtol * torch.maximum(low.abs(), x_prev.abs()), min=atol)
        error = float(torch.linalg.norm((low - high) / scale)) / x.numel() ** 0.5
        if accept_step(error):
            x_prev, x, l = low, high, l_next
            if eta and noise is not None:
                x = x + up * s_noise * noise()
            counts["n_accept"] += 1
        else:
            counts["n_reject"] += 1
        notify(callback, counts["steps"], x, x0)
        counts["nfe"] += order
        counts["steps"] += 1
        if not math.isfinite(error):
            raise VgmError("the sampler cannot go on: its error is not finite", "a fixed-step solver", DIVERGED)
    return x


class PID:
    """Step-size controller: calling it with an error says whether the step is accepted and updates h."""

    def __init__(self, h: float, p: float, i: float, d: float, order: float, accept_safety: float):
        self.h, self.accept_safety = h, accept_safety
        self.powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.inverse: list[float] = []

    def __call__(self, error: float) -> bool:
        now = 1 / (error + 1e-8)
        self.inverse = [now, *(self.inverse[1:] or [now, now])]
        factor = 1 + math.atan(math.prod(e**p for e, p in zip(self.inverse, self.powers)) - 1)
        accept = factor >= self.accept_safety
        if accept:
            self.inverse = [now, now, self.inverse[1]]
        self.h *= factor
        return accept


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver++(2S) steps (Lu et al. 2022, 2211.01095)."""
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        down, up = ancestral_step(sigmas[i], sigmas[i + 1], eta)
        if down == 0:
            x = x + slope(x, sigmas[i], x0) * (down - sigmas[i])
        else:
            l, l_next = -sigmas[i].log(), -down.log()
            middle = l + 0.5 * (l_next - l)
            x_mid = exponential_step(x, x0, l, middle)
            x = exponential_step(x, estimate(denoise, x_mid, torch.exp(-middle)), l, l_next)
        x = add(x, s_noise * up, noise)
    return x


def exponential_step(x: Tensor, x0: Tensor, l: Tensor, l_next: Tensor) -> Tensor:
    """The exact step for a constant x0 in l = -ln sigma: DPM-Solver++ of order 1."""
    return (torch.exp(-l_next) / torch.exp(-l)) * x - (l - l_next).expm1() * x0


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Stochastic DPM-Solver++ (k-diffusion): two estimates and two draws a step."""
    factor = 1 / (2 * r)
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        if sigmas[i + 1] == 0:
            x = x + slope(x, sigmas[i], x0) * (sigmas[i + 1] - sigmas[i])
            continue
        l, l_next = -sigmas[i].log(), -sigmas[i + 1].log()
        l_mid = l + (l_next - l) * r
        down, up = ancestral_step(torch.exp(-l), torch.exp(-l_mid), eta)
        x_mid = add(exponential_step(x, x0, l, -down.log()), s_noise * up, noise)
        x0_mid = estimate(denoise, x_mid, torch.exp(-l_mid))
        down, up = ancestral_step(torch.exp(-l), torch.exp(-l_next), eta)
        x = exponential_step(x, (1 - factor) * x0 + factor * x0_mid, l, -down.log())
        x = add(x, s_noise * up, noise)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, *, callback: Callback = None) -> Tensor:
    """DPM-Solver++(2M): multistep, the first and the last step of order 1 (Lu et al. 2022, 2211.01095)."""
    old: Tensor | None = None
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        l, l_next = -sigmas[i].log(), -sigmas[i + 1].log()
        mixed = x0
        if old is not None and sigmas[i + 1] > 0:
            r = (l + sigmas[i - 1].log()) / (l_next - l)
            mixed = (1 + 1 / (2 * r)) * x0 - (1 / (2 * r)) * old
        x = exponential_step(x, mixed, l, l_next)
        old = x0
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """DPM-Solver++(2M) SDE, midpoint or heun correction (k-diffusion); the last step is the estimate itself."""
    if solver_type not in ("midpoint", "heun"):
        raise unknown("solver type", solver_type, ("midpoint", "heun"))
    old: Tensor | None = None
    h_last = torch.ones(())
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        if sigmas[i + 1] == 0:
            return x0
        h = sigmas[i].log() - sigmas[i + 1].log()
        a = h + eta * h
        gain = -torch.expm1(-a)
        x = sigmas[i + 1] / sigmas[i] * torch.exp(-eta * h) * x + gain * x0
        if old is not None:
            r = h_last / h
            weight = 0.5 * gain if solver_type == "midpoint" else gain / -a + 1
            x = x + weight * (1 / r) * (x0 - old)
        if eta:
            x = add(x, sigmas[i + 1] * (-torch.expm1(-2 * eta * h)).sqrt() * s_noise, noise)
        old, h_last = x0, h
    return x


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """DPM-Solver++(3M) SDE (k-diffusion)."""
    before: list[tuple[Tensor, Tensor]] = []  # (x0, h) of earlier steps, latest first
    for i in range(len(sigmas) - 1):
        x0 = estimate(denoise, x, sigmas[i])
        notify(callback, i, x, x0)
        if sigmas[i + 1] == 0:
            return x0
        h = sigmas[i].log() - sigmas[i + 1].log()
        a = h * (eta + 1)
        x = torch.exp(-a) * x - torch.expm1(-a) * x0
        phi_2 = torch.expm1(-a) / a + 1
        if len(before) == 1:
            (x0_1, h_1) = before[0]
            x = x + phi_2 * (x0 - x0_1) / (h_1 / h)
        elif before:
            (x0_1, h_1), (x0_2, h_2) = before
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / a - 0.5) * d2
        if eta:
            x = add(x, sigmas[i + 1] * (-torch.expm1(-2 * h * eta)).sqrt() * s_noise, noise)
        before = [(x0, h), *before[:1]]
    return x


K_DIFFUSION: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "dpm_2": dpm_2,
    "lms": lms,
    "euler_ancestral": euler_ancestral,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}


def notify(callback: Callback, i: int, x: Tensor, x0: Tensor | None) -> None:
    if callback is not None:
        callback(i, x, x0)


def add(x: Tensor, scale: Tensor | float, noise: Draw | None) -> Tensor:
    """x + scale noise; nothing is drawn where scale is 0."""
    return x + noise() * scale if noise is not None and scale > 0 else x


def _log_levels(sigma_max: float, sigma_min: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if sigma_min <= 0 or sigma_max <= 0:
        raise VgmError("this solver works in ln sigma: sigma_min and sigma_max must be above 0", code=USAGE)
    return -torch.tensor(sigma_max, dtype=dtype).log(), -torch.tensor(sigma_min, dtype=dtype).log()


# -- VE coordinates: EDM ---------------------------------------------------------------------------------------------


def edm_heun(
    denoise: Denoise,
    latents: Tensor,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """EDM's sampler (Karras et al. 2022, alg. 2): float64 states, float32 network, levels of their eq. 5.

    latents: (B, ...) standard normal. round_sigma: to the levels that the network knows. Gives float64.
    """
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = round_sigma((high + ramp * (low - high)) ** rho)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])

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
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    net_sigma_min: float = 0.0,
    net_sigma_max: float = math.inf,
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """EDM's generalised sampler (Karras et al. 2022, app. D): any pairing of solver, time steps, schedule and scaling.

    solver: euler | heun (second order of parameter alpha). discretization: vp | ve | iddpm | edm time steps; schedule:
    sigma(t) vp | ve | linear; scaling: s(t) vp | none. float64 states, float32 network. VgmError: unknown names.
    """
    for what, value, known in (
        ("solver", solver, ("euler", "heun")),
        ("discretization", discretization, ("vp", "ve", "iddpm", "edm")),
        ("schedule", schedule, ("vp", "ve", "linear")),
        ("scaling", scaling, ("vp", "none")),
    ):
        if value not in known:
            raise unknown(what, value, known)
    defaults = {"vp": (vp_level(epsilon_s), vp_level(1.0)), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}
    low, high = defaults.get(discretization, (0.002, 80.0))
    low = max(low if sigma_min is None else sigma_min, net_sigma_min)
    high = min(high if sigma_max is None else sigma_max, net_sigma_max)

    # the VP process that passes through both ends
    beta_d = 2 * (math.log(low**2 + 1) / epsilon_s - math.log(high**2 + 1)) / (epsilon_s - 1)
    beta_0 = math.log(high**2 + 1) - 0.5 * beta_d

    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    if discretization == "vp":
        vp_times = 1 + ramp * (epsilon_s - 1)
        levels = torch.expm1(0.5 * beta_d * vp_times**2 + beta_0 * vp_times).sqrt()
    elif discretization == "ve":
        levels = (high**2 * (low**2 / high**2) ** ramp).sqrt()
    elif discretization == "iddpm":
        known_levels = iddpm_levels(M, C_1, C_2)
        inside = known_levels[(known_levels >= low) & (known_levels <= high)]
        levels = inside[((len(inside) - 1) * ramp).round().long()]
    else:
        levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    def sigma_of(t: Tensor) -> Tensor:
        if schedule == "vp":
            return torch.expm1(0.5 * beta_d * t**2 + beta_0 * t).sqrt()
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

    times = time_of(round_sigma(levels))
    times = torch.cat([times, times.new_zeros(1)])
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


def vp_level(t: float, beta_d: float = 19.9, beta_min: float = 0.1) -> float:
    """sigma / alpha of the VP process at time t."""
    return math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t))


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


# -- native coordinates ----------------------------------------------------------------------------------------------


def ddim(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    clip: Callable[[Tensor], Tensor] | None = None,
    use_clipped_eps: bool = False,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16) on any alpha and sigma; on the linear path with eta = 0 the flow's Euler.

    eta: 0 deterministic, 1 as noisy as DDPM. clip: applied to x0; use_clipped_eps: eps then follows it.
    """
    for i in range(len(alphas) - 1):
        x0, eps = predict(x, i)
        if clip is not None:
            x0 = clip(x0)
            if use_clipped_eps:
                eps = (x - alphas[i] * x0) / sigmas[i]
        notify(callback, i, x, x0)
        std = eta * posterior_std(alphas, sigmas, i)
        x = alphas[i + 1] * x0 + (sigmas[i + 1] ** 2 - std**2).clamp(min=0) ** 0.5 * eps
        if eta and noise is not None:
            x = x + std * noise()
    return x


def posterior_std(alphas: Tensor, sigmas: Tensor, i: int) -> Tensor:
    """Standard deviation of q(x_{i+1} | x_i, x0), i + 1 being the cleaner point."""
    ratio = alphas[i] / alphas[i + 1]
    return sigmas[i + 1] / sigmas[i] * (sigmas[i] ** 2 - (ratio * sigmas[i + 1]) ** 2).clamp(min=0) ** 0.5


def ddpm(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    variance: str = "fixed_small",
    clip: Callable[[Tensor], Tensor] | None = None,
    final_noise: bool = False,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, eq. 7): the posterior's mean, and noise of fixed_small (the posterior's) or
    fixed_large (the transition's) variance, "_log" forms being the same. final_noise: the last step has noise too."""
    if variance.removesuffix("_log") not in ("fixed_small", "fixed_large"):
        raise unknown("variance", variance, ("fixed_small", "fixed_large"))
    for i in range(len(alphas) - 1):
        x0, _ = predict(x, i)
        if clip is not None:
            x0 = clip(x0)
        notify(callback, i, x, x0)
        ratio = alphas[i] / alphas[i + 1]
        beta = sigmas[i] ** 2 - (ratio * sigmas[i + 1]) ** 2
        x = alphas[i + 1] * beta / sigmas[i] ** 2 * x0 + ratio * (sigmas[i + 1] / sigmas[i]) ** 2 * x
        if noise is not None and (final_noise or i < len(alphas) - 2):
            small = variance.startswith("fixed_small")
            std = posterior_std(alphas, sigmas, i).clamp(min=1e-10) if small else beta**0.5
            x = x + std * noise()
    return x


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Imagen's dynamic thresholding (Saharia et al. 2022): clip each image at its quantile, if above 1, and rescale."""
    edge = torch.quantile(x0.flatten(1).abs().float(), ratio, dim=1).clamp(min=1, max=max_value)
    edge = expand_like(edge, x0).to(x0.dtype)
    return torch.clamp(x0, -edge, edge) / edge


ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")


def dpm_solver(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Multistep DPM-Solver and DPM-Solver++ of order 1 to 3, ODE and SDE (Lu et al. 2022, 2206.00927 and 2211.01095).

    algorithm: with ++ the solver extrapolates x0, without it eps. lower_order_final: fewer than 15 steps end with lower
    orders; a last step to sigma = 0 is always of order 1. VgmError: unknown names, order 3 of sde-dpmsolver.
    """
    if algorithm not in ALGORITHMS:
        raise unknown("algorithm", algorithm, ALGORITHMS)
    if solver_type not in ("midpoint", "heun"):
        raise unknown("solver type", solver_type, ("midpoint", "heun"))
    if order not in (1, 2, 3) or (order == 3 and algorithm == "sde-dpmsolver"):
        raise VgmError(f"{algorithm} has no order {order}", "orders 1 to 3; sde-dpmsolver 1 and 2", USAGE)
    lambdas = torch.log(alphas) - torch.log(sigmas)
    steps, data = len(alphas) - 1, algorithm.endswith("++")
    outputs: list[Tensor] = []
    for i in range(steps):
        x0, eps = predict(x, i)
        notify(callback, i, x, x0)
        outputs = [x0 if data else eps, *outputs[: order - 1]]
        few = lower_order_final and steps < 15
        use = min(order, len(outputs))
        if i == steps - 1 and (euler_at_final or few or sigmas[-1] == 0):
            use = 1
        elif i == steps - 2 and few:
            use = min(use, 2)
        draw = noise() if algorithm.startswith("sde") and noise is not None else None
        x = dpm_multistep(x, outputs[:use], alphas, sigmas, lambdas, i, algorithm, solver_type, draw)
    return x


def dpm_multistep(
    x: Tensor,
    outputs: list[Tensor],
    alphas: Tensor,
    sigmas: Tensor,
    lambdas: Tensor,
    i: int,
    algorithm: str,
    solver_type: str,
    draw: Tensor | None,
) -> Tensor:
    """One step from grid point i with the latest outputs first; its order is their number.

    The step integrates e^k times the polynomial through the outputs; k is -h for x0, h for eps, doubled by x0's SDE.
    """
    h = lambdas[i + 1] - lambdas[i]
    sde, data = algorithm.startswith("sde"), algorithm.endswith("++")
    if data:
        k, keep, scale = -2.0 * h if sde else -h, sigmas[i + 1] / sigmas[i], alphas[i + 1]
        keep = keep * torch.exp(-h) if sde else keep
    else:
        k, keep, scale = h, alphas[i + 1] / alphas[i], sigmas[i + 1] * (2.0 if sde else 1.0)
    grow = torch.exp(k) - 1.0
    change = grow * outputs[0]
    if len(outputs) > 1:
        r0 = (lambdas[i] - lambdas[i - 1]) / h  # infinite after a step from alpha = 0: that output then has no weight
        d1 = (1.0 / r0) * (outputs[0] - outputs[1])
        if len(outputs) == 2 and solver_type == "midpoint":
            change = change + 0.5 * grow * d1
        elif len(outputs) == 2:
            change = change + (grow / k - 1.0) * d1
        else:
            r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
            gap = d1 - (1.0 / r1) * (outputs[1] - outputs[2])
            d1, d2 = d1 + (r0 / (r0 + r1)) * gap, (1.0 / (r0 + r1)) * gap
            # diffusers adds the half for the SDE where the expansion subtracts it; parity keeps that
            half = 0.5 if sde else -0.5
            change = change + (grow / k - 1.0) * d1 + ((grow - k) / k**2 + half) * d2
    x = keep * x - scale * change
    if draw is not None:
        x = x + sigmas[i + 1] * torch.sqrt(1.0 - torch.exp(-2.0 * h) if data else torch.exp(2.0 * h) - 1.0) * draw
    return x


def unipc(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
    callback: Callback = None,
) -> Tensor:
    """UniPC (Zhao et al. 2023, 2302.04867): a multistep predictor, corrected by the next estimate at no extra cost.

    solver_type: bh1 (B = h) | bh2 (B = e^h - 1). disable_corrector: steps whose result is not corrected; all of them
    make it UniP. The grid starts with alpha > 0. VgmError: unknown solver type.
    """
    if solver_type not in ("bh1", "bh2"):
        raise unknown("solver type", solver_type, ("bh1", "bh2"))
    lambdas = torch.log(alphas) - torch.log(sigmas)
    steps = len(alphas) - 1
    outputs: list[Tensor] = []
    last, use = x, 1
    for i in range(steps):
        x0, eps = predict(x, i)
        notify(callback, i, x, x0)
        output = x0 if predict_x0 else eps
        if i > 0 and i - 1 not in disable_corrector:
            x = unipc_step(last, outputs, alphas, sigmas, lambdas, i - 1, use, solver_type, predict_x0, output)
        outputs = [output, *outputs[: order - 1]]
        use = min(order, len(outputs), steps - i if lower_order_final else order)
        last = x
        x = unipc_step(x, outputs, alphas, sigmas, lambdas, i, use, solver_type, predict_x0, None)
    return x


def unipc_step(
    x: Tensor,
    outputs: list[Tensor],
    alphas: Tensor,
    sigmas: Tensor,
    lambdas: Tensor,
    i: int,
    order: int,
    solver_type: str,
    predict_x0: bool,
    new: Tensor | None,
) -> Tensor:
    """From grid point i to i + 1: UniP of `order`, or UniC when `new`, the output at i + 1, is known."""
    h = lambdas[i + 1] - lambdas[i]
    hh = -h if predict_x0 else h
    grow = torch.expm1(hh)
    B = hh if solver_type == "bh1" else grow
    keep, scale = (sigmas, alphas) if predict_x0 else (alphas, sigmas)
    x = keep[i + 1] / keep[i] * x - scale[i + 1] * grow * outputs[0]

    ratios = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, order)]
    gaps = [(outputs[k] - outputs[0]) / ratios[k - 1] for k in range(1, order)]
    if new is not None:
        ratios, gaps = [*ratios, torch.ones_like(h)], [*gaps, new - outputs[0]]
    if not gaps:
        return x
    if (new is None and order == 2) or (new is not None and order == 1):
        weights = [torch.full_like(h, 0.5)]  # the official shortcut
    else:
        points, phi, factorial, right = torch.stack(ratios), grow / hh - 1, 1, []
        for k in range(1, len(ratios) + 1):
            right.append(phi * factorial / B)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        powers = torch.stack([points**k for k in range(len(ratios))])
        weights = list(torch.linalg.solve(powers, torch.stack(right)))
    return x - scale[i + 1] * B * sum(w.to(x.dtype) * g for w, g in zip(weights, gaps))


def euler_discrete(
    output: Callable[[Tensor, int], Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    prediction: str = "eps",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """diffusers' Euler for discrete networks: x in VE coordinates, output(x / sqrt(sigma^2 + 1), i) of kind eps, v, x0.

    Unlike k-diffusion's, the network sees x before the churn's noise, which is drawn only where it is used.
    """
    if prediction not in ("eps", "v", "x0"):
        raise unknown("prediction", prediction, ("eps", "v", "x0"))
    for i in range(len(sigmas) - 1):
        sigma = sigmas[i]
        pred = output(x / (sigma**2 + 1) ** 0.5, i)
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (gamma + 1)
        if gamma > 0 and noise is not None:
            x = x + noise() * s_noise * (raised**2 - sigma**2) ** 0.5
        if prediction == "eps":
            x0 = x - raised * pred
        else:
            x0 = pred if prediction == "x0" else pred * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
        notify(callback, i, x, x0)
        x = x + slope(x, raised, x0) * (sigmas[i + 1] - raised)
    return x


def flow_euler(
    velocity: Callable[[Tensor, int], Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    stochastic: bool = False,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Flow matching's Euler steps in sigma = t (Esser et al. 2024); stochastic: each step renoises its x0 estimate."""
    for i in range(len(sigmas) - 1):
        v = velocity(x, i)
        x0 = x - sigmas[i] * v
        notify(callback, i, x, x0)
        if stochastic and noise is not None:
            x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * noise()
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


def predictor_corrector(
    score: Callable[[Tensor, int], Tensor],
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    predictor: str = "reverse-diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    noise: Draw,
    callback: Callback = None,
) -> Tensor:
    """Score-SDE's predictor-corrector (Song et al. 2021, alg. 2 to 5): Langevin steps, then one down the grid.

    predictor: reverse-diffusion | ancestral | none. The last step's mean is returned, without its noise. Deviation: the
    Langevin step size uses each image's own norms, the official one the batch's mean. VgmError: unknown predictor.
    """
    if predictor not in ("reverse-diffusion", "ancestral", "none"):
        raise unknown("predictor", predictor, ("reverse-diffusion", "ancestral", "none"))
    mean = x
    for i in range(len(alphas) - 1):
        ratio = alphas[i] / alphas[i + 1]
        for _ in range(corrector_steps):
            gradient, draw = score(x, i), noise()
            size = snr * per_item(torch.linalg.vector_norm, draw) / per_item(torch.linalg.vector_norm, gradient)
            step = 2 * ratio**2 * size**2
            mean = x + step * gradient
            x = mean + (2 * step) ** 0.5 * draw
        gradient = score(x, i)
        notify(callback, i, x, (x + sigmas[i] ** 2 * gradient) / alphas[i])
        if predictor == "none":
            continue
        variance = sigmas[i] ** 2 - (ratio * sigmas[i + 1]) ** 2
        if predictor == "ancestral":
            mean = (x + variance * gradient) / ratio
            variance = variance * (sigmas[i + 1] / sigmas[i]) ** 2
        else:
            mean = (2 - ratio) * x + variance * gradient
        x = mean + variance**0.5 * noise()
    return mean


def notify_slope(callback: Callback, i: int, x: Tensor, t: Tensor, v: Tensor, x0_of: Estimate) -> None:
    """As `notify`, with the estimate of x0 that the slope v at (x, t) means."""
    if callback is not None:
        callback(i, x, None if x0_of is None else x0_of(x, t, v))


def per_item(reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A reduction over everything but the batch: (B, 1, ...)."""
    return reduce(x.flatten(1), dim=1).reshape(-1, *[1] * (x.ndim - 1))


# -- host time: ordinary differential equations ----------------------------------------------------------------------


def ode_euler(
    velocity: Velocity, x: Tensor, times: Tensor, *, callback: Callback = None, x0_of: Estimate = None
) -> Tensor:
    """Euler's method on dx/dt = velocity(x, t), t a 0-dim tensor of the grid."""
    for i in range(len(times) - 1):
        v = velocity(x, times[i])
        notify_slope(callback, i, x, times[i], v, x0_of)
        x = x + (times[i + 1] - times[i]) * v
    return x


def ode_midpoint(
    velocity: Velocity, x: Tensor, times: Tensor, *, callback: Callback = None, x0_of: Estimate = None
) -> Tensor:
    """The explicit midpoint rule, order 2."""
    for i in range(len(times) - 1):
        h, v = times[i + 1] - times[i], velocity(x, times[i])
        notify_slope(callback, i, x, times[i], v, x0_of)
        x = x + h * velocity(x + h / 2 * v, times[i] + h / 2)
    return x


def ode_heun(
    velocity: Velocity, x: Tensor, times: Tensor, *, callback: Callback = None, x0_of: Estimate = None
) -> Tensor:
    """Heun's method (explicit trapezoid), order 2."""
    for i in range(len(times) - 1):
        h, v = times[i + 1] - times[i], velocity(x, times[i])
        notify_slope(callback, i, x, times[i], v, x0_of)
        x = x + h / 2 * (v + velocity(x + h * v, times[i + 1]))
    return x


def ode_rk4(
    velocity: Velocity, x: Tensor, times: Tensor, *, callback: Callback = None, x0_of: Estimate = None
) -> Tensor:
    """The classical Runge-Kutta method, order 4."""
    for i in range(len(times) - 1):
        t, h = times[i], times[i + 1] - times[i]
        k1 = velocity(x, t)
        notify_slope(callback, i, x, t, k1, x0_of)
        k2 = velocity(x + h / 2 * k1, t + h / 2)
        k3 = velocity(x + h / 2 * k2, t + h / 2)
        k4 = velocity(x + h * k3, times[i + 1])
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


ODE: dict[str, tuple[Callable[..., Tensor], int]] = {  # name: (method, evaluations a step)
    "euler": (ode_euler, 1),
    "midpoint": (ode_midpoint, 2),
    "heun": (ode_heun, 2),
    "rk4": (ode_rk4, 4),
}

# Dormand & Prince 1980: stage times and weights, the fifth-order solution being the last stage; then its error
DORMAND_PRINCE = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
DORMAND_PRINCE_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(
    velocity: Velocity,
    x: Tensor,
    t0: float,
    t1: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 10_000,
    info: dict[str, Any] | None = None,
    callback: Callback = None,
    x0_of: Estimate = None,
) -> Tensor:
    """Dormand-Prince 5(4) from t0 to t1, either way; velocity(x, t) gets t (B,) float64, never beyond [t0, t1].

    Every item has its own step size, so that it does not depend on the batch it is in. info receives nfe (evaluations
    of the batch) and steps. callback: after every step. VgmError: not finite, or more than max_steps steps.
    """
    way = 1.0 if t1 >= t0 else -1.0
    t = torch.full((len(x),), t0, dtype=torch.float64, device=x.device)
    k: list[Tensor] = [velocity(x, t)]
    h = first_step(velocity, x, t, k[0], abs(t1 - t0), way, rtol, atol)
    nfe, steps = 2, 0
    left = (t1 - t) * way  # (B,), what remains
    while bool((left > 0).any()):
        if steps == max_steps or not bool(torch.isfinite(h).all()):
            raise VgmError(
                "the ODE solver cannot go on", "looser rtol and atol, or a fixed method such as heun", DIVERGED
            )
        last = h >= left
        h = torch.minimum(h, left)
        for c, weights in DORMAND_PRINCE:
            at = torch.where(last, t1, t + way * h) if c == 1.0 else t + way * c * h
            x_new = x + combine(way * h, weights, k)
            k.append(velocity(x_new, at))
        nfe, steps = nfe + len(DORMAND_PRINCE), steps + 1
        ratio = error_ratio(combine(h, DORMAND_PRINCE_ERROR, k), x, x_new, rtol, atol)
        accept = ratio <= 1
        keep = expand_like(accept, x)
        x, k = torch.where(keep, x_new, x), [torch.where(keep, k[-1], k[0])]
        t = torch.where(accept, torch.where(last, t1, t + way * h), t)
        notify_slope(callback, steps - 1, x, t, k[0], x0_of)
        factor = (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
        h = h * torch.where(accept, factor, factor.clamp(max=1.0))
        left = (t1 - t) * way
        h = torch.where(left > 0, h, torch.zeros_like(h))
    if info is not None:
        info |= {"nfe": nfe, "steps": steps}
    return x


def expand_like(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) against x."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


def combine(h: Tensor, weights: Sequence[float], k: list[Tensor]) -> Tensor:
    """h (B,) times the weighted sum of slopes k."""
    total = sum(w * slope for w, slope in zip(weights, k) if w)
    assert isinstance(total, Tensor)
    return expand_like(h, total).to(total.dtype) * total


def error_ratio(error: Tensor, x: Tensor, x_new: Tensor, rtol: float, atol: float) -> Tensor:
    """Root mean square of the error over what is tolerated, per item: (B,) float64."""
    scaled = error / (atol + rtol * torch.maximum(x.abs(), x_new.abs()))
    return scaled.double().flatten(1).square().mean(1).sqrt()


def first_step(
    velocity: Velocity, x: Tensor, t: Tensor, k: Tensor, span: float, way: float, rtol: float, atol: float
) -> Tensor:
    """A careful first step size per item (Hairer et al. 1993, II.4): (B,) float64."""
    d0, d1 = (error_ratio(v, x, x, rtol, atol) for v in (x, k))
    h = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=span)
    later = velocity(x + combine(way * h, (1.0,), [k]), t + way * h)
    d2 = error_ratio(later - k, x, x, rtol, atol) / h
    steepest = torch.maximum(d1, d2)
    wish = torch.where(steepest <= 1e-15, (h * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * h, wish).clamp(max=span)


# -- host time: the family of reverse SDEs ---------------------------------------------------------------------------


def reverse_sde(
    drift_score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    times: Tensor,
    diffusion: Callable[[Tensor], Tensor],
    *,
    noise: Draw,
    callback: Callback = None,
    x0_of: Estimate = None,
) -> Tensor:
    """Euler-Maruyama on dx = (u - e^2 / 2 score) dt + e dW, t descending: any e(t) >= 0 keeps the marginals.

    drift_score(x, t) -> (u, score), the score being x0_of's slope; diffusion(t) -> e. e = 0 is the ODE, e^2 =
    path.g2(t) the exact time reversal. The last step adds no noise.
    """
    for i in range(len(times) - 1):
        u, score = drift_score(x, times[i])
        notify_slope(callback, i, x, times[i], score, x0_of)
        e, dt = diffusion(times[i]), times[i + 1] - times[i]
        x = x + dt * (u - e**2 / 2 * score)
        if i < len(times) - 2:
            x = add(x, e * dt.abs().sqrt(), noise)
    return x
