"""Rectified flow as pure functions: times, losses, and the ways along the flow. Liu, Gong & Liu 2023 (2209.03003).

Behaviour of gnobitab/RectifiedFlow@5a1fd4d ImageGeneration/{losses,sampling,sde_lib}.py. Convention of this plugin,
opposite to the host's: t = 0 is NOISE, t = 1 is DATA, z_t = t x1 + (1 - t) z0, and a velocity is x1 - z0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.diffusion import solvers
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import each, expand

EPS = 1e-3  # networks are trained and asked in [EPS, 1]
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t (B,)) -> dx/dt (B, ...)
Perceptual = Callable[[Tensor, Tensor], Tensor]
Schedule = Literal["uniform", "t0", "t1"] | int
Loss = Literal["l2", "lpips", "lpips+l2"]
SDE = Literal["official", "exact"]

# -- training ----------------------------------------------------------------------------------------------------------


def times(draw: Tensor, schedule: Schedule = "uniform", eps: float = EPS) -> Tensor:
    """(B,) times in [eps, 1].

    uniform: draw is uniform in [0, 1). t0: all eps, one-step distillation. t1: all 1, the reverse (fast embedding).
    k: draw counts 0..k - 1, the times at which k Euler steps ask. VgmError: k below 1.
    """
    draw = draw.float()
    if schedule == "uniform":
        return draw * (1 - eps) + eps
    if schedule in ("t0", "t1"):
        return torch.full_like(draw, float(schedule == "t1")) * (1 - eps) + eps
    if not isinstance(schedule, int) or schedule < 1:
        raise VgmError(f"t_schedule={schedule} is not a schedule", "uniform, t0, t1 or a number of steps", USAGE)
    return draw * (1 - eps) / schedule + eps


def flow_losses(
    velocity: Velocity,
    z0: Tensor,
    x1: Tensor,
    t: Tensor,
    loss: Loss = "l2",
    reduce_mean: bool = True,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and the plain squared error of the velocity (mean over an image's values), per image: (B,), (B,).

    z0: (B, ...) noise coupled with data x1. l2: on the velocity. lpips: perceptual(z0 + v, x1), which makes sense at
    t = eps alone; lpips+l2: their sum. reduce_mean: mean over an image, false: half the sum. VgmError: the network's
    output has another shape, no perceptual distance.
    """
    s = expand(t, x1)
    v = velocity(s * x1 + (1 - s) * z0, t)
    if v.shape != x1.shape:
        raise VgmError(
            f"the network gives {tuple(v.shape[1:])} for {tuple(x1.shape[1:])}",
            "model.learn_sigma=false, or model.name=sit, which throws the variance half away",
            USAGE,
        )
    square = (v.float() - (x1 - z0).float()).square().flatten(1)  # (B, D)
    plain = square.mean(1)
    if loss == "l2":
        terms = square
    else:
        if perceptual is None:
            raise VgmError(f"loss={loss} needs a perceptual distance", "roles.perceptual={name: lpips, ...}", USAGE)
        terms = perceptual(z0 + v, x1).float().reshape(len(x1), -1)
        if loss == "lpips+l2":
            terms = terms + plain[:, None]
    return (terms.mean(1) if reduce_mean else 0.5 * terms.sum(1)), plain


# -- along the flow ----------------------------------------------------------------------------------------------------


def euler(
    velocity: Velocity,
    x: Tensor,
    steps: int,
    *,
    eps: float = EPS,
    sigma_var: float = 0.0,
    sde: SDE = "official",
    noise_scale: float = 1.0,
    noise: Callable[[], Tensor] | None = None,
    callback: Callable[[int, Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    """From noise x (B, ...) to data in `steps` Euler steps of dt = 1 / steps at t_i = i / steps (1 - eps) + eps.

    The grid and dt disagree by eps, as they do officially; one step is x + v(x, eps). sigma_var > 0 adds noise of
    deviation s = (1 - t) sigma_var and the drift that goes with it: "official" is the published code's formula, "exact"
    keeps the marginals, v + s^2 / 2 score with score = (t v - x) / ((1 - t) noise_scale^2). noise(): a draw like x.
    """
    dt = 1 / steps
    gain = sigma_var**2 / (2 * noise_scale**2)
    for i in range(steps):
        t = i / steps * (1 - eps) + eps
        v = velocity(x, each(x, t, torch.float32))
        if callback is not None:
            callback(i, x, x + (1 - t) * v)
        if sigma_var == 0:
            x = x + v * dt
            continue
        if noise is None:
            raise VgmError("sigma_var above 0 needs noise", code=USAGE)
        if sde == "official":
            drift = v + gain * (0.5 * t * (1 - t) * v - 0.5 * (2 - t) * x)
        else:
            drift = v + gain * (1 - t) * (t * v - x)
        x = x + drift * dt + (1 - t) * sigma_var * math.sqrt(dt) * noise()
    return x


def rk45(
    velocity: Velocity,
    x: Tensor,
    *,
    tol: float = 1e-5,
    eps: float = EPS,
    reverse: bool = False,
    joint: bool = False,
    callback: Callable[[int, Tensor, Tensor | None], None] | None = None,
) -> tuple[Tensor, int]:
    """Dormand-Prince from eps to 1 (reverse: from data back to noise), rtol = atol = tol: (B, ...), evaluations.

    The state is float64, the network sees float32. Step sizes are an image's own; joint: one for the whole batch, by
    its mean error, as scipy's RK45 takes it in the official code.
    """
    shape = x.shape

    def field(y: Tensor, t: Tensor) -> Tensor:
        now = t.expand(shape[0]).float() if joint else t.float()
        return velocity(y.reshape(shape).float(), now).double().reshape(y.shape)

    def x0_of(y: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return y + (1 - expand(t, y)) * v

    info: dict[str, int] = {}
    start = x.double().reshape(1, -1) if joint else x.double()
    ends = (1.0, eps) if reverse else (eps, 1.0)
    y = solvers.dopri5(field, start, *ends, rtol=tol, atol=tol, info=info, callback=callback, x0_of=x0_of)
    return y.reshape(shape).float(), info["nfe"]
