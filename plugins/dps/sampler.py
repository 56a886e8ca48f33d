"""DPS, MCG and projection as samplers: an ancestral (or DDIM) walk that is corrected by the measurement at every step.

Chung et al. 2022 (2209.14687), algorithms 1 and 2. Official code: DPS2022/diffusion-posterior-sampling@effbde7.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import no_denoiser
from vgm_cli.diffusion.discrete import Variance
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.ranges import Few, NonNegative, Steps

from . import conditioning, official
from .prior import UNCLIPPED, Prior, prior_of

Walk = Iterator[tuple[Tensor, Tensor, Tensor]]
# (x_t, x_next, x0, i) -> x_next corrected, distance (B,); x_t carries the graph
Correct = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def denoising_steps(
    prior: Prior,
    x: Tensor,
    correct: Correct,
    noise: Callable[[], Tensor],
    sampler: Literal["ddpm", "ddim"] = "ddpm",
    eta: float = 0.0,
) -> Walk:
    """Denoise from noise x (B, C, H, W) along the prior's chain, each step corrected by `correct`; yields (x_{t-1}, x0,
    distance to the measurement) after every step.

    noise(): one draw like x per step; the last step's is not used. sampler, eta: ancestral, or DDIM.
    """
    for i in reversed(range(prior.steps)):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            p = prior.posterior(x, i)
            t = prior.index(x, i)
            if sampler == "ddpm":
                x_next = prior.process.p_sample(p, t, noise())
            else:
                x_next = prior.process.ddim_sample(p, x, t, eta, noise())
            x_next, value = correct(x, x_next, p.x0, i)
        x = x_next.detach()
        yield x, p.x0.detach(), value.detach()


def measured(request: Request, method: str) -> tuple[Operator, Tensor]:
    """The request's degradation and what was measured. VgmError: there is none."""
    if request.operator is None or request.measurement is None:
        raise VgmError(f"{method} restores images: it needs a measurement", "vgm restore --method …", USAGE)
    return request.operator, request.measurement


def finish(view: Any, request: Request, steps: int, states: Walk) -> Tensor:
    """Run a chain to its end and return the last state. The request is told of every step; info["residual"] is a
    list of the distances |y - A(x0)| (B,) of the network's estimates."""
    before, x = view.nfe, None
    residuals: list[Tensor] = []
    for i, (x, x0, value) in enumerate(states):
        residuals.append(value.float().cpu())
        if request.callback is not None:
            request.callback(i, steps, x, x0)
    assert x is not None
    request.info["nfe"], request.info["residual"] = view.nfe - before, residuals
    return x


class Restorer(ABC):
    """What all methods of this family share: the prior, the clipping, the report of steps.

    steps: N, "a,b,c" or "ddimN", as for respaced processes; a request's own number goes before. clip: limit x0 to [-1,
    1]; None: for images, not for latents. variance: of the reverse step; None: the network's own.
    """

    name = ""

    def __init__(self, steps: Steps | str, clip: bool | None = None, variance: Variance | None = None):
        self.steps, self.clip, self.variance = steps, clip, variance

    def prior(self, view: Any, request: Request, operator: Operator, **options: Any) -> Prior:
        """The prior of a view for this request. options: see prior_of."""
        clip = not operator.latent if self.clip is None else self.clip
        steps = self.steps if request.steps is None else request.steps
        if str(self.steps).startswith("ddim") and isinstance(steps, int):
            steps = f"ddim{steps}"
        highest = UNCLIPPED if operator.latent and not clip else math.inf
        return prior_of(view, steps, request.cond, clip, variance=self.variance, highest=highest, **options)

    def __call__(self, view: Any, request: Request) -> Tensor:
        """view: a Denoiser. request.operator, request.measurement: (N, *measurement_shape). Gives (N, *request.shape).

        VgmError: no measurement, another kind of network, an operator that the method cannot handle.
        """
        operator, y = measured(request, self.name)
        self.check(operator)
        return self.restore(view, request, operator, y)

    def accepts(self, model: Any, codec: Any) -> str | None:
        """None for any diffusion or flow network, otherwise the reason why not."""
        return no_denoiser(model)

    def check(self, operator: Operator) -> None:  # noqa: B027, most methods take every operator
        """VgmError: the method needs more of the operator (its pseudo-inverse) than it has."""

    @abstractmethod
    def restore(self, view: Any, request: Request, operator: Operator, y: Tensor) -> Tensor:
        """Sample images (B, C, H, W) that agree with the measurement y."""


def need_pinv(operator: Operator, method: str) -> None:
    if not operator.has_pinv:
        hint = "--method dps, or a prior of pixels" if operator.latent else "--method dps"
        raise VgmError(f"{method} needs a pseudo-inverse, which {operator.name} does not have", hint, USAGE)


class DPS(Restorer):
    """Diffusion posterior sampling: after every step, one gradient step towards the measurement y of the image.

    Published step sizes zeta (see presets) are for 1000 steps on images of 256 pixels. zeta=None is 0.3 * 1000 / steps,
    the released step size spread over fewer steps, and limited so that small images are not thrown past their
    measurement.
    """

    name = "dps"

    def __init__(
        self,
        steps: Steps | str = 100,  # of the process, or a respacing such as "ddim50"
        zeta: NonNegative | None = None,  # step size along the gradient; None: see above
        sampler: Literal["ddpm", "ddim"] = "ddpm",  # ancestral, or DDIM
        eta: NonNegative = 0.0,  # DDIM's share of noise
        clip: bool | None = None,  # the estimate of x0 is limited to [-1, 1]; None: for pixels, not for latents
        dynamic_threshold: bool = False,  # limit the estimate of x0 to a quantile of its own instead
        particles: Few = 0,  # average the gradient over so many perturbed estimates (DPS+); 0: none
        variance: Variance | None = None,  # of a reverse step; None: the training's
    ):
        super().__init__(steps, clip, variance)
        self.zeta, self.sampler, self.eta = zeta, sampler, eta
        self.dynamic_threshold, self.particles = dynamic_threshold, particles

    def restore(self, view: Any, request: Request, operator: Operator, y: Tensor) -> Tensor:
        prior = self.prior(view, request, operator, threshold=self.dynamic_threshold)
        zeta = 0.3 * 1000 / prior.steps if self.zeta is None else self.zeta
        step = self.correction(prior, request, operator, y, zeta)
        states = denoising_steps(prior, request.randn(), step, request.randn, self.sampler, self.eta)
        return finish(view, request, prior.steps, states)

    def correction(self, prior: Prior, request: Request, operator: Operator, y: Tensor, zeta: float) -> Correct:
        noise, limited = operator.noise.name, self.zeta is None

        def correct(x_t: Tensor, x_next: Tensor, x0: Tensor, i: int) -> tuple[Tensor, Tensor]:
            if self.particles:
                draws = [request.rand(tuple(x0.shape[1:])) for _ in range(self.particles)]
                return conditioning.posterior_sampling_plus(operator, x_t, x_next, x0, y, zeta, draws)
            return conditioning.posterior_sampling(operator, x_t, x_next, x0, y, zeta, noise, limited)

        return correct


class MCG(DPS):
    """Manifold-constrained gradients: DPS, and a projection onto the noised measurement after every step."""

    name = "mcg"

    def __init__(
        self,
        steps: Steps | str = 100,  # of the process, or a respacing such as "ddim50"
        zeta: NonNegative | None = None,  # step size of the gradient, see DPS
        sampler: Literal["ddpm", "ddim"] = "ddpm",  # ancestral, or DDIM
        eta: NonNegative = 0.0,  # DDIM's share of noise
        clip: bool | None = None,  # the estimate of x0 is limited to [-1, 1]; None: for pixels, not for latents
        dynamic_threshold: bool = False,  # limit the estimate of x0 to a quantile of its own instead
        projection: Literal["pinv", "official"] = "pinv",  # pinv: see linear.py; official: see official.py
        variance: Variance | None = None,  # of a reverse step; None: the training's
    ):
        super().__init__(steps, zeta, sampler, eta, clip, dynamic_threshold, 0, variance)
        self.projection = projection

    def check(self, operator: Operator) -> None:
        if self.projection == "pinv" or operator.latent:
            need_pinv(operator, self.name)

    def project(self, operator: Operator) -> conditioning.Project:
        if self.projection == "pinv":
            return conditioning.projection(operator)
        return lambda x, y: official.project(operator, x, y)

    def noised(self, prior: Prior, request: Request, y: Tensor, i: int) -> Tensor:
        """The measurement y (B, ...) with the noise that it would have at step i of the chain."""
        return prior.process.q_sample(y, prior.index(y, i), request.randn(tuple(y.shape[1:])))

    def correction(self, prior: Prior, request: Request, operator: Operator, y: Tensor, zeta: float) -> Correct:
        project, noise, limited = self.project(operator), operator.noise.name, self.zeta is None

        def correct(x_t: Tensor, x_next: Tensor, x0: Tensor, i: int) -> tuple[Tensor, Tensor]:
            y_t = self.noised(prior, request, y, i)
            return conditioning.manifold_constrained(operator, x_t, x_next, x0, y, y_t, zeta, noise, project, limited)

        return correct


class Projection(MCG):
    """After every step, the projection onto the noised measurement alone; no gradient is taken."""

    name = "projection"

    def correction(self, prior: Prior, request: Request, operator: Operator, y: Tensor, zeta: float) -> Correct:
        project = self.project(operator)

        @torch.no_grad()
        def correct(x_t: Tensor, x_next: Tensor, x0: Tensor, i: int) -> tuple[Tensor, Tensor]:
            x = project(x_next, self.noised(prior, request, y, i))
            return x, conditioning.distance(operator, x0, y)

        return correct
