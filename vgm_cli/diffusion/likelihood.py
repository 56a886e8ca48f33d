"""The likelihood of any Denoiser: by the change of variables along its probability-flow ODE, or bounded by its ELBO.

ODE: Song et al. 2021 (2011.13456, app. D.2), Grathwohl et al. 2019 (FFJORD): d log p / dt = -div u, the divergence
being exact or Hutchinson's estimate. The prior is N(0, sigma(t_max)^2).

ELBO: Kingma et al. 2021 (VDM, 2107.00630): -log p(x) <= diffusion + prior + reconstruction in nats, where diffusion is
1/2 int E||eps_hat - eps||^2 dlambda between the ends of the log-SNR lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.path import Path
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

    method: dopri5 to rtol and atol, or a fixed one (euler, midpoint, heun, heun3, rk4, rk38) with `steps`.
    VgmError: unknown method.
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


# -- the ELBO ----------------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """The three parts of the ELBO in nats, (B,) each; their sum bounds -log p(x) from above."""

    diffusion: Tensor
    prior: Tensor
    reconstruction: Tensor


CLEANEST, NOISIEST = 13.3, -15.0  # log-SNRs where the bound ends on paths that reach data, or noise
BLURRED = 1 / 255  # half the distance of 8-bit levels: noise above it hides a pixel's value


def eps_errors(model: Denoiser, x: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
    """||eps_hat - eps||^2, summed over dimensions, at x noised to times t (B,), whatever the network predicts: (B,)."""
    t = t.double()
    z = model.path.add_noise(x, noise, t)
    return (model.predict(z, t, "eps", **cond) - noise).square().flatten(1).sum(1)


def prior_nats(path: Path, x: Tensor, t: Tensor, std: float | None = None) -> Tensor:
    """KL of x (B, ...) at the noisiest time t (1,) from N(0, std^2), by default of variance alpha^2 + sigma^2: (B,)."""
    alpha, sigma = path.alpha(t.double()), path.sigma(t.double())
    variance = alpha**2 + sigma**2 if std is None else torch.full_like(alpha, std**2)
    ratio = sigma**2 / variance
    mean = (alpha**2 / variance * x.flatten(1).double().square()).sum(1)
    return 0.5 * (mean + x[0].numel() * (ratio - 1 - ratio.log()))


def pixel_levels(count: int = 256, device: torch.device | None = None) -> Tensor:
    """The values that pixels of so many levels take in [-1, 1]: (count,)."""
    return torch.linspace(-1, 1, count, device=device)


def level_logits(centre: Tensor, spread: Tensor, levels: Tensor) -> Tensor:
    """Log-odds of each level under a Gaussian about centre (...): (..., len(levels))."""
    return -0.5 * ((centre[..., None] - levels) / spread) ** 2


def pixel_nats(path: Path, x: Tensor, t: Tensor, noise: Tensor, levels: Tensor, centre: Tensor | None = None) -> Tensor:
    """-log p(x | z) of pixels x (B, ...), which take the values `levels`, by VDM's decoder: (B,).

    z is x at the cleanest time t (1,) with noise like x. Each pixel's value has the odds of a Gaussian about z / alpha,
    or about `centre` (the network's estimate of x from z), of standard deviation sigma / alpha.
    """
    spread = path.ve_sigma(t.double()).to(x.dtype)
    logits = level_logits(x + spread * noise if centre is None else centre, spread, levels)
    true = ((x + 1) * ((len(levels) - 1) / 2)).round().long().clamp(0, len(levels) - 1)
    return F.cross_entropy(logits.flatten(0, -2), true.flatten(), reduction="none").view(len(x), -1).sum(1)


def latent_nats(path: Path, x: Tensor, t: Tensor) -> Tensor:
    """-E log N(x; z / alpha, (sigma / alpha)^2) of continuous x (B, ...), z being at the cleanest time t (1,): (B,)."""
    spread = path.ve_sigma(t.double())
    return (x[0].numel() * (0.5 + spread.log() + 0.5 * math.log(2 * math.pi))).expand(len(x))


def bound_ends(model: Denoiser) -> tuple[float, float]:
    """The times between which the bound integrates: the path's own, or where it is at CLEANEST and NOISIEST."""
    low, high = model.t_range()
    if not float(model.path.logsnr(low)) < 20:
        low = float(model.path.t_of_logsnr(CLEANEST))
    if not float(model.path.logsnr(high)) > -20:
        high = float(model.path.t_of_logsnr(NOISIEST))
    return low, high


def elbo(
    model: Denoiser,
    x: Tensor,
    u: Tensor,
    randn: Callable[[], Tensor],
    levels: Tensor | None = None,
    **cond: Any,
) -> Bound:
    """The ELBO of x (B, ...) in continuous time, by Monte Carlo over uniform log-SNRs.

    u: (K, B) in [0, 1), the K noise levels that each item is tried at. randn(): the next standard normal draw like x.
    levels: the values that pixels take, None for continuous x.
    Where the cleanest z hides the values of pixels, the decoder sees the network's estimate. Networks of discrete steps
    are asked between them.
    """
    path = model.path
    low, high = bound_ends(model)
    first, last = float(path.logsnr(low)), float(path.logsnr(high))
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for row in u.double():
        t = path.t_of_logsnr(first + row * (last - first))
        total += 0.5 * (first - last) * eps_errors(model, x, t, randn(), **cond).double()
    ends = x.new_tensor([low, high], dtype=torch.float64)
    if levels is None:
        reconstruction = latent_nats(path, x, ends[:1])
    else:
        noise, centre = randn(), None
        if float(path.ve_sigma(low)) > BLURRED:
            z = path.add_noise(x, noise, ends[:1].expand(len(x)))
            centre = model.predict(z, low, "x0", **cond)
        reconstruction = pixel_nats(path, x, ends[:1], noise, levels, centre)
    return Bound(total / len(u), prior_nats(path, x, ends[1:]), reconstruction.double())
