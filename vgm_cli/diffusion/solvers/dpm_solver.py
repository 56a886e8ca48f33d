"""DPM-Solver, DPM-Solver++ and UniPC.

Multistep solvers work in the path's own coordinates: `predict(x, i) -> (x0, eps)` at point i of a grid with alphas[i],
sigmas[i] (N + 1 each), as in huggingface/diffusers@58eb52c. The singlestep ones, dpm_fast and dpm_adaptive, are
k-diffusion's (crowsonkb/k-diffusion@4601bf0): VE coordinates, `denoise(x, sigma) -> x0`, between two levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vgm_cli.diffusion.solvers.common import (
    Callback,
    Denoise,
    Draw,
    Predict,
    ancestral_step,
    estimate,
    notify,
    slope,
)
from vgm_cli.errors import DIVERGED, USAGE, VgmError, unknown

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")


def dpm_solver(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    order: int = 2,  # 1 to 3
    algorithm: str = "dpmsolver++",  # one of ALGORITHMS: with ++ the solver extrapolates x0, without it eps
    solver_type: str = "midpoint",  # of order 2: midpoint | heun
    lower_order_final: bool = True,  # fewer than 15 steps end with lower orders
    euler_at_final: bool = False,  # the last step is of order 1; one to sigma = 0 always is
    noise: Draw | None = None,  # the next draw like x, for the SDEs
    callback: Callback = None,
) -> Tensor:
    """Multistep DPM-Solver and DPM-Solver++ of order 1 to 3, ODE and SDE (Lu et al. 2022, 2206.00927 and 2211.01095).

    VgmError: unknown names, order 3 of sde-dpmsolver.
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


def _log_levels(sigma_max: float, sigma_min: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if sigma_min <= 0 or sigma_max <= 0:
        raise VgmError("this solver works in ln sigma: sigma_min and sigma_max must be above 0", code=USAGE)
    return -torch.tensor(sigma_max, dtype=dtype).log(), -torch.tensor(sigma_min, dtype=dtype).log()
