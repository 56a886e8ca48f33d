"""k-diffusion's samplers in VE coordinates x / alpha (crowsonkb/k-diffusion@4601bf0; Karras et al. 2022, 2206.00364).

Each takes `denoise(x, sigma) -> x0` with sigma (B,), a state x (B, ...) at level sigmas[0], and levels that descend and
end with 0. The levels are a CPU tensor, in whose precision coefficients are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vgm_cli.diffusion.solvers.common import Callback, Denoise, Draw, add, ancestral_step, estimate, notify, slope
from vgm_cli.errors import unknown


def churn(
    x: Tensor,
    sigma: Tensor,
    steps: int,
    noise: Draw | None,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> tuple[Tensor, Tensor]:
    """Raise the noise level of x before a step: (x_hat, sigma_hat) (Karras et al. 2022, alg. 2, lines 4-6)."""
    if not s_churn or noise is None:
        return x, sigma
    eps = noise() * s_noise  # drawn even outside of [s_tmin, s_tmax]
    if not s_tmin <= sigma <= s_tmax:
        return x, sigma
    sigma_hat = sigma * (min(s_churn / steps, 2**0.5 - 1) + 1)
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
    steps = len(sigmas) - 1
    for i in range(steps):
        x, sigma_hat = churn(x, sigmas[i], steps, noise, s_churn, s_tmin, s_tmax, s_noise)
        x0 = estimate(denoise, x, sigma_hat)
        notify(callback, i, x, x0)
        x = x + slope(x, sigma_hat, x0) * (sigmas[i + 1] - sigma_hat)
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
    steps = len(sigmas) - 1
    for i in range(steps):
        x, sigma_hat = churn(x, sigmas[i], steps, noise, s_churn, s_tmin, s_tmax, s_noise)
        x0 = estimate(denoise, x, sigma_hat)
        notify(callback, i, x, x0)
        d, dt = slope(x, sigma_hat, x0), sigmas[i + 1] - sigma_hat
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
    steps = len(sigmas) - 1
    for i in range(steps):
        x, sigma_hat = churn(x, sigmas[i], steps, noise, s_churn, s_tmin, s_tmax, s_noise)
        x0 = estimate(denoise, x, sigma_hat)
        notify(callback, i, x, x0)
        d = slope(x, sigma_hat, x0)
        if sigmas[i + 1] > 0:
            d = middle_slope(denoise, x, sigma_hat, sigmas[i + 1], d)
        x = x + d * (sigmas[i + 1] - sigma_hat)
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


def exponential_step(x: Tensor, x0: Tensor, l: Tensor, l_next: Tensor) -> Tensor:
    """The exact step for a constant x0 in l = -ln sigma: DPM-Solver++ of order 1."""
    return (torch.exp(-l_next) / torch.exp(-l)) * x - (l - l_next).expm1() * x0


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
