"""What the samplers share: guidance and counting, and where on a path they stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import HasSampleShape, Request
from vgm_cli.diffusion import solvers, timesteps
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.guidance import Autoguidance, ClassifierFreeGuidance, ClassifierGuidance
from vgm_cli.diffusion.path import DiscreteVPPath, EDMPath
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Fraction, NonNegative, Steps
from vgm_cli.registry import registry

Grid = Literal["uniform", "logsnr", "quadratic", "karras", "exponential", "leading", "trailing", "linspace"]


@dataclass(kw_only=True)
class GaussianSampler(ABC):
    """What every sampler here shares: guidance, evaluation counts, callbacks."""

    steps: Steps = 50
    cfg_channels: int | None = None  # leading channels that classifier-free guidance applies to; None: all
    guidance_rescale: Fraction = 0.0  # see Guidance.rescale
    classifier: Any = None  # RUN of a classifier of noisy images: guides towards the class asked for
    classifier_scale: NonNegative = 1.0  # 1: exactly the classifier's gradient
    autoguidance: Any = None  # RUN of a worse version of the network, to be guided away from
    autoguidance_scale: NonNegative = 2.0  # 1: the network itself

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape). VgmError: the view is no Denoiser, fewer than one step."""
        if not isinstance(view, Denoiser):
            raise VgmError("this sampler needs a diffusion or flow network", "`vgm ls samplers` shows others", USAGE)
        steps = self.steps if request.steps is None else request.steps
        if steps < 1:
            raise VgmError(f"steps={steps}: at least one is needed", code=USAGE)
        model, before = self.guided(view, request), view.nfe
        x = self.solve(model, request, steps)
        request.info["nfe"] = model.nfe - (before if model is view else 0)
        return x.float()

    def guided(self, view: Denoiser, request: Request) -> Denoiser:
        """The view, guided as the request asks, by the classifier, and away from the worse network."""
        scale = request.guidance_scale
        if scale is not None and scale != 1.0 and request.cond:
            interval = request.guidance_interval
            own = self.cfg_channels, interval, self.guidance_rescale
            view = ClassifierFreeGuidance(view, scale, *own, null=request.null)
        if self.classifier is not None:
            view = ClassifierGuidance(view, self.classifier, request.classes(), self.classifier_scale)
        if self.autoguidance is not None:
            if not isinstance(self.autoguidance, Denoiser):
                hint = "autoguidance=RUN of a smaller network, or of a shorter training"
                raise VgmError("autoguidance needs another diffusion or flow network", hint, USAGE)
            other = self.autoguidance.network
            if isinstance(other, HasSampleShape) and tuple(other.sample_shape) != tuple(request.shape):
                what = f"the network of autoguidance makes {other.sample_shape}, the sampled one {tuple(request.shape)}"
                raise VgmError(what, "autoguidance=RUN of the same data and codec", USAGE)
            view = Autoguidance(view, self.autoguidance, self.autoguidance_scale, request.guidance_interval)
        return view

    @abstractmethod
    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        """From noise to data."""


def solver_of(node: Mapping[str, Any]) -> Any:
    """The sampler that a keyword of another one describes, {name: ddim, …}, for samplers that steer others."""
    return registry().build("sampler", node)


def report(request: Request, total: int) -> Callable[[int, Tensor, Tensor | None], None] | None:
    """A callback for solvers, (i, x, x0), that calls the request's with the total number of steps added."""
    callback = request.callback
    return None if callback is None else lambda i, x, x0: callback(i, total, x, x0)


def default_grid(model: Denoiser) -> Grid:
    """Uniform in t, except where t is the noise level itself."""
    return "karras" if isinstance(model.path, EDMPath) else "uniform"


def reaches_data(model: Denoiser, low: float) -> bool:
    """Whether the state at t = low has no noise left."""
    return float(model.path.sigma(low)) == 0


def grid_of(model: Denoiser, steps: int, grid: str | None, need_alpha: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Times at which the network is evaluated (n,), and alphas, sigmas (n + 1,) that end with data (1, 0).

    On discrete paths grid may be a spacing of the integer timesteps. need_alpha: start where alpha > 0.
    """
    low, high = model.t_range()
    if need_alpha and float(model.path.alpha(high)) == 0:
        high -= 1e-3
    if grid in timesteps.SPACINGS:
        if not isinstance(model.path, DiscreteVPPath):
            raise VgmError(f"grid={grid} spaces discrete timesteps, this path is continuous", "grid=uniform", USAGE)
        times = model.path.t_of_timestep(
            torch.from_numpy(timesteps.spaced_timesteps(steps, model.path.steps, str(grid)).copy())
        )
    else:
        grid = grid or default_grid(model)
        if reaches_data(model, low):
            times = timesteps.time_grid(model.path, steps, grid, low, high)[:-1]
        elif steps == 1:
            times = torch.tensor([high], dtype=torch.float64)
        else:
            times = timesteps.time_grid(model.path, steps - 1, grid, low, high)
    alphas = torch.cat([model.path.alpha(times), torch.ones(1, dtype=torch.float64)])
    sigmas = torch.cat([model.path.sigma(times), torch.zeros(1, dtype=torch.float64)])
    return times, alphas, sigmas


Clip = bool | float | Literal["dynamic"]


def clip_of(clip: Clip) -> Callable[[Tensor], Tensor] | None:
    """x0 clipped to [-1, 1], to +-clip, or to each image's own quantile ("dynamic": Saharia et al. 2022)."""
    if clip == "dynamic":
        return solvers.dynamic_threshold
    edge = float(clip)
    return (lambda x0: x0.clamp(-edge, edge)) if edge else None
