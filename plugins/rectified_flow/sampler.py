"""The official samplers of rectified flows, and their inverse. Behaviour of gnobitab/RectifiedFlow@5a1fd4d sampling.py.

Any network on the linear path can be sampled by them, and rectified flows by any of the host's samplers, which start
from the state at t = eps instead of the noise itself. Deviations: noise and step sizes are an image's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.path import LinearPath
from vgm_cli.diffusion.samplers import GaussianSampler, report
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import NonNegative, Positive, Steps

from .flow import EPS, SDE, euler, rk45
from .objective import velocity_of


def linear(view: Denoiser) -> tuple[float, float]:
    """(noise_scale, eps) of a view. VgmError: it is not on the linear path."""
    if not isinstance(view.path, LinearPath):
        raise VgmError(
            f"this sampler is for rectified flows, the network is on the path {view.path.name}",
            "`vgm ls samplers` shows others",
            USAGE,
        )
    high = view.t_range()[1]
    return view.path.noise_scale, (1 - high if high < 1 else EPS)


@dataclass(kw_only=True)
class RectifiedFlowSampler(GaussianSampler):
    """rk45 to the tolerance ode_tol (the published numbers), or euler with `steps`.

    sigma_var: above 0 adds noise to Euler's steps, see flow.euler; sde: "official" formula or the "exact" one.
    data_range: "unit" for networks of data in [0, 1] (the published LSUN ones); images are given in [-1, 1] anyway.
    """

    method: Literal["rk45", "euler"] = "rk45"
    steps: Steps = 100
    sigma_var: NonNegative = 0.0
    sde: SDE = "official"
    ode_tol: Positive = 1e-5
    data_range: Literal["centered", "unit"] = "centered"

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        scale, eps = linear(model)
        velocity, x = velocity_of(model, **request.cond), request.randn() * scale
        if self.method == "rk45":
            x, _ = rk45(velocity, x, tol=self.ode_tol, eps=eps, callback=report(request, steps))
        else:
            x = euler(
                velocity,
                x,
                steps,
                eps=eps,
                sigma_var=self.sigma_var,
                sde=self.sde,
                noise_scale=scale,
                noise=request.randn,
                callback=report(request, steps),
            )
        return 2 * x - 1 if self.data_range == "unit" else x

    def invert(self, view: Denoiser, x: Tensor, **cond: Tensor) -> Tensor:
        """The noise (B, ...) that the flow takes to the images x: (B, ...) in [-1, 1]."""
        _, eps = linear(view)
        data = (x + 1) / 2 if self.data_range == "unit" else x
        return rk45(velocity_of(view, **cond), data, tol=self.ode_tol, eps=eps, reverse=True)[0]
