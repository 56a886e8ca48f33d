"""Log-likelihood of any Denoiser by the change of variables along its probability-flow ODE.

Song et al. 2021 (2011.13456, app. D.2), Grathwohl et al. 2019 (FFJORD): d log p / dt = -div u, the divergence being
exact or Hutchinson's estimate. The prior is N(0, sigma(t_max)^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.solvers.ode import ODE, dopri5
from vgm_cli.diffusion.timesteps import time_grid
from vgm_cli.errors import unknown


class Likelihood(NamedTuple):
    """log_prob (B,) in nats, the noise z (B, ...) that x flows to, and the network's evaluations."""

    log_prob: Tensor
    z: Tensor
    nfe: int


def rademacher(uniform: Tensor) -> Tensor:
    """+-1 from a uniform draw: the probe with the least variance."""
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)


def divergence(velocity: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """velocity(x) and its divergence (B,): exact with probe None (one gradient per dimension), else probe' J probe."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        v = velocity(x)
        if probe is not None:
            gradient = torch.autograd.grad((v * probe).sum(), x)[0]
            return v.detach(), (gradient * probe).flatten(1).sum(1)
        flat = v.flatten(1)
        rows = [torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0] for i in range(flat.shape[1])]
        return v.detach(), sum((row.flatten(1)[:, i] for i, row in enumerate(rows)), torch.zeros(len(x)).to(flat))


def log_likelihood(
    model: Denoiser,
    x: Tensor,
    probe: Tensor | None = None,
    *,
    method: str = "dopri5",
    steps: int = 100,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **cond: Any,
) -> Likelihood:
    """log p(x) of x (B, ...) in nats. probe: like x, drawn once (rademacher or normal); None computes the exact trace.

    method: dopri5 to rtol and atol, or a fixed one (euler, midpoint, heun, rk4) with `steps`. VgmError: unknown method.
    """
    low, high = model.t_range()
    evaluations = 0

    def field(y: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        state = y[:, :-1].reshape(x.shape).to(x.dtype)
        v, trace = divergence(lambda s: model.predict(s, t, "velocity", **cond), state, probe)
        return torch.cat([v.flatten(1), trace[:, None]], dim=1).to(y.dtype)

    y = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    if method == "dopri5":
        y = dopri5(field, y, low, high, rtol=rtol, atol=atol)
    elif method in ODE:
        y = ODE[method][0](field, y, time_grid(model.path, steps, low=low, high=high).flip(0))
    else:
        raise unknown("ODE method", method, ("dopri5", *ODE))
    z, change = y[:, :-1].reshape(x.shape), y[:, -1]
    sigma = float(model.path.sigma(high))
    dim = z[0].numel()
    prior = -z.flatten(1).square().sum(1) / (2 * sigma**2) - dim * (0.5 * math.log(2 * math.pi) + math.log(sigma))
    return Likelihood(prior + change, z, evaluations)


def bits_per_dim(log_prob: Tensor, dim: int, levels: int = 256, width: float = 2.0) -> Tensor:
    """Bits per dimension of dequantised data of `levels` values spread over an interval of `width` ([-1, 1]: 2)."""
    return -log_prob / (dim * math.log(2)) + math.log2(levels / width)
