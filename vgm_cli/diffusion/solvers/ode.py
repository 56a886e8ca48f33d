"""Ordinary differential equations dx/dt = velocity(x, t) in the path's own time: fixed steps and Dormand-Prince.

`x0_of(x, t, slope)` is what the callback is told of x0; without it, it is told None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vgm_cli.diffusion.solvers.common import Callback, Estimate, Velocity, notify_slope
from vgm_cli.errors import DIVERGED, VgmError
from vgm_cli.nn.shapes import each, expand


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


# stages as (time, weights of the slopes so far), then the weights of all slopes
HEUN3 = (((1 / 3, (1 / 3,)), (2 / 3, (0.0, 2 / 3))), (1 / 4, 0.0, 3 / 4))  # Heun's third-order method
KUTTA38 = (((1 / 3, (1 / 3,)), (2 / 3, (-1 / 3, 1.0)), (1.0, (1.0, -1.0, 1.0))), (1 / 8, 3 / 8, 3 / 8, 1 / 8))


def ode_stages(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    stages: Sequence[tuple[float, Sequence[float]]],
    weights: Sequence[float],
    *,
    callback: Callback = None,
    x0_of: Estimate = None,
) -> Tensor:
    """Any explicit Runge-Kutta method: HEUN3, or KUTTA38, the 3/8 rule of order 4 that torchdiffeq calls rk4."""
    for i in range(len(times) - 1):
        t, h = times[i], times[i + 1] - times[i]
        k = [velocity(x, t)]
        notify_slope(callback, i, x, t, k[0], x0_of)
        for c, row in stages:
            k.append(velocity(x + combine(h, row, k), times[i + 1] if c == 1.0 else t + c * h))
        x = x + combine(h, weights, k)
    return x


ODE: dict[str, tuple[Callable[..., Tensor], int]] = {  # name: (method, evaluations a step)
    "euler": (ode_euler, 1),
    "midpoint": (ode_midpoint, 2),
    "heun": (ode_heun, 2),
    "heun3": (partial(ode_stages, stages=HEUN3[0], weights=HEUN3[1]), 3),
    "rk4": (ode_rk4, 4),
    "rk38": (partial(ode_stages, stages=KUTTA38[0], weights=KUTTA38[1]), 4),
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
    t = each(x, t0)
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
        keep = expand(accept, x)
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


def combine(h: Tensor, weights: Sequence[float], k: list[Tensor]) -> Tensor:
    """h, () or (B,), times the weighted sum of slopes k."""
    total = sum(w * slope for w, slope in zip(weights, k) if w)
    assert isinstance(total, Tensor)
    return (expand(h, total) if h.ndim else h).to(total.dtype) * total


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
