"""SiT's samplers: the probability-flow ODE, the family of SDEs with a free diffusion coefficient, and the likelihood.

Ma et al. 2024 (2401.08740); behaviour of willisma/SiT@947f95b transport/. t = 0 is noise, t = 1 data, and N steps are N
grid points. Deviations: drift and score share one network evaluation (the official code makes two), the noise of each
image is its own, and the ODE's default method is Heun on a fixed grid: dopri5's error norm mixes the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.shapes import each
from vgm_cli.ranges import NonNegative, Positive, Steps

from .ode import METHODS, integrate
from .transport import VP, Form, Network, Transport, transport_of

Draw = Callable[[], Tensor]
LAST_STEPS = ("Mean", "Tweedie", "Euler")


def grid_of(t0: float, t1: float, steps: int) -> Tensor:
    """`steps` grid points from t0 to t1. VgmError: fewer than two."""
    if steps < 2:
        raise VgmError("steps counts grid points here, at least 2 are needed", "steps=250", USAGE)
    return torch.linspace(t0, t1, steps)


def sample_ode(
    model: Network,
    x: Tensor,
    transport: Transport,
    method: str = "dopri5",
    steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    reverse: bool = False,
) -> Iterator[tuple[float, Tensor]]:
    """Yields (t, x_t) at `steps` grid points, the initial one included. x: (B, ...) noise; data when reverse."""

    def field(t: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        now = each(y[0], t, y[0].dtype)
        return (transport.velocity(model(y[0], now), y[0], now),)

    t0, t1 = transport.interval(train=False, reverse=reverse)
    # VP's sigma is not a number beyond the data end, where an overshooting step would ask for it
    overshoot = not (isinstance(transport.plan, VP) and transport.prediction == "noise")
    grid = grid_of(t0, t1, steps)
    for t, (state,) in integrate(field, (x,), grid, method, atol, rtol, overshoot):
        yield t, state


def sample_sde(
    model: Network,
    x: Tensor,
    transport: Transport,
    noise: Draw,
    method: str = "Euler",
    form: str = "sigma",
    norm: float = 1.0,
    last_step: str | None = "Mean",
    last_step_size: float = 0.04,
    steps: int = 250,
) -> Iterator[tuple[float, Tensor]]:
    """dx = [velocity + w score] dt + sqrt(2 w) dW, then the last step; yields (t, x_t) `steps` times, the end last.

    x: (B, ...) noise; noise(): one standard normal draw like x, called steps - 1 times. form, norm: w_t, see
    Linear.diffusion. last_step: Mean | Tweedie | Euler | None. VgmError: unknown names, or w_t infinite at the start.
    """
    if method not in ("Euler", "Heun"):
        raise unknown("SDE method", method, ("Euler", "Heun"))
    if last_step not in (None, *LAST_STEPS):
        raise unknown("last step", str(last_step), LAST_STEPS)
    if last_step is None:
        last_step_size = 0.0
    t0, t1 = transport.interval(train=False, sde=True, form=form, last_step_size=last_step_size)
    plan = transport.plan
    if form == "SBDM" and t0 == 0 and not isinstance(plan, VP):
        raise VgmError("the SBDM diffusion is infinite at t = 0 on this path", "form=sigma", USAGE)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t)
        return transport.velocity(output, x, t) + plan.diffusion(x, t, form, norm) * transport.score(output, x, t)

    grid = grid_of(t0, t1, steps)
    times, dt = grid.tolist(), float(grid[1] - grid[0])
    for now, later in pairwise(times):
        t = each(x, now, x.dtype)
        kick = torch.sqrt(2 * plan.diffusion(x, t, form, norm)) * (noise() * math.sqrt(dt))
        if method == "Euler":
            x = x + drift(x, t) * dt + kick
        else:
            x = x + kick
            first = drift(x, t)
            x = x + 0.5 * dt * (first + drift(x + dt * first, t + dt))
        yield later, x
    t = each(x, t1, x.dtype)
    if last_step == "Mean":
        x = x + drift(x, t) * last_step_size
    elif last_step == "Euler":
        x = x + transport.velocity(model(x, t), x, t) * last_step_size
    elif last_step == "Tweedie":
        alpha, sigma = float(plan.alpha(t)[0][0]), float(plan.sigma(t)[0][0])
        x = x / alpha + sigma**2 / alpha * transport.score(model(x, t), x, t)
    yield 1.0, x


def log_likelihood(
    model: Network,
    x: Tensor,
    transport: Transport,
    rademacher: Draw,
    method: str = "dopri5",
    steps: int = 50,
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """log p(x) in nats (B,) and the latent z that x flows to, by the change of variables along the ODE.

    x: (B, ...) data. rademacher(): a draw of +-1 like x for Hutchinson's trace estimate, one per evaluation.
    """

    def field(s: float, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        probe = rademacher()
        with torch.enable_grad():
            x = y[0].detach().requires_grad_(True)
            t = each(x, 1 - s, x.dtype)
            velocity = transport.velocity(model(x, t), x, t)
            gradient = torch.autograd.grad((velocity * probe).sum(), x)[0]
        return -velocity.detach(), (gradient * probe).flatten(1).sum(1)

    t0, t1 = transport.interval(train=False)
    state = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    *_, (_, (z, change)) = integrate(field, state, grid_of(t0, t1, steps), method, atol, rtol)
    prior = -0.5 * z[0].numel() * math.log(2 * math.pi) - z.square().flatten(1).sum(1) / 2
    return prior - change, z


# -- samplers of recipes ---------------------------------------------------------------------------------------------


class Guided:
    """The view's network in SiT's time, guided where asked; counts evaluations of one image."""

    def __init__(self, view: Any, request: Request, cfg_channels: int | None):
        self.network, self.cond, self.nfe = view.network, request.cond, 0
        scale = 1.0 if request.guidance_scale is None else request.guidance_scale
        self.guidance = Guidance(scale, cfg_channels, request.guidance_interval)
        self.guides = scale != 1.0 and bool(self.cond)
        if self.guides:
            self.null = unconditional(self.network, self.cond, request.null)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.guides:
            self.nfe += 1
            return self.network(x, t, **self.cond).float()
        self.nfe += 2 if self.guidance.active(1 - t) else 1
        return self.guidance(self.network, x, t, self.cond, self.null, 1 - t).float()


def estimate(view: Any, model: Guided, x: Tensor, t: float) -> Tensor:
    """The network's estimate of the data, x0 (B, ...), at x (B, ...) and SiT's time t, for a callback that shows the
    progress. This evaluation is not counted in view.nfe."""
    low, high = view.t_range()
    if 1 - t <= low:
        return x
    counted = model.nfe
    x0: Tensor = view.interpret(model(x, each(x, t, x.dtype)), x, min(1 - t, high), "x0")
    model.nfe = counted
    return x0


def run(
    view: Any,
    request: Request,
    cfg_channels: int | None,
    sample_eps: float | None,
    steps: int,
    trajectory: Callable[[Network, Tensor, Transport], Iterator[tuple[float, Tensor]]],
) -> Tensor:
    """Sample for a request: `trajectory(network, noise, transport)` yields the (t, x) of a solver, the last of which
    is the result."""
    model = Guided(view, request, cfg_channels)
    states = trajectory(model, request.randn(), transport_of(view, sample_eps))
    for i, (t, x) in enumerate(states):
        if request.callback is not None:
            request.callback(i, steps, x, estimate(view, model, x, t))
    request.info["nfe"] = model.nfe
    return x


class ODESampler:
    """Probability-flow ODE from the view of a flow-matching network.

    method: euler, midpoint, heun2, heun3 or rk4 on a fixed grid; adaptive_heun, fehlberg2, bosh3 or dopri5 (the
    paper's) to the tolerances atol and rtol. steps: grid points. cfg_channels: leading channels that guidance applies
    to, None for all. sample_eps: time left out at the singular ends, None for the paper's.
    """

    def __init__(
        self,
        method: str = "heun2",
        steps: Steps = 50,
        atol: Positive = 1e-6,
        rtol: Positive = 1e-3,
        cfg_channels: int | None = None,
        sample_eps: NonNegative | None = None,
    ):
        if method not in METHODS:
            raise unknown("ODE method", method, METHODS)
        self.method, self.steps, self.atol, self.rtol = method, steps, atol, rtol
        self.cfg_channels, self.sample_eps = cfg_channels, sample_eps

    def __call__(self, view: Any, request: Request) -> Tensor:
        """Gives (N, *request.shape)."""
        steps = request.steps or self.steps

        def trajectory(model: Network, x: Tensor, transport: Transport) -> Iterator[tuple[float, Tensor]]:
            return sample_ode(model, x, transport, self.method, steps, self.atol, self.rtol)

        return run(view, request, self.cfg_channels, self.sample_eps, steps, trajectory)


class SDESampler:
    """Samples by the reverse SDE, whose diffusion coefficient is norm * form(t). The paper's best is the default."""

    def __init__(
        self,
        method: Literal["Euler", "Heun"] = "Euler",  # solver of a step
        steps: Steps = 250,  # grid points, the last step included
        form: Form = "sigma",  # of the diffusion coefficient over time
        norm: NonNegative = 1.0,  # factor on the diffusion coefficient
        last_step: Literal["Mean", "Tweedie", "Euler"] | None = "Mean",  # of the remaining time
        last_step_size: Positive = 0.04,  # the remaining time to the data
        cfg_channels: int | None = None,  # leading channels that guidance applies to; None: all
        sample_eps: NonNegative | None = None,  # time left out at the singular end; None: the path's
    ):
        self.method, self.steps, self.form, self.norm = method, steps, form, norm
        self.last_step, self.last_step_size = last_step, last_step_size
        self.cfg_channels, self.sample_eps = cfg_channels, sample_eps

    def __call__(self, view: Any, request: Request) -> Tensor:
        """Gives (N, *request.shape)."""
        steps = request.steps or self.steps

        def trajectory(model: Network, x: Tensor, transport: Transport) -> Iterator[tuple[float, Tensor]]:
            last = (self.last_step, self.last_step_size)
            return sample_sde(model, x, transport, request.randn, self.method, self.form, self.norm, *last, steps=steps)

        return run(view, request, self.cfg_channels, self.sample_eps, steps, trajectory)
