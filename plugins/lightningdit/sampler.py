"""LightningDiT's sampler: the flow's ODE on a shifted grid of times. Yao et al. 2025.

hustvl/LightningDiT@2725fed transport/integrators.py, models/lightningdit.py (forward_with_cfg). t = 0 is noise, t = 1
is data, opposite to the host's times. Deviation: dopri5 steps every image by itself and never beyond the data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion import solvers
from vgm_cli.diffusion.denoiser import Denoiser, convert
from vgm_cli.diffusion.path import LinearPath, shift_time
from vgm_cli.diffusion.samplers import GaussianSampler, report
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Fraction, NonNegative, Positive, Steps


def grid_of(points: int, shift: float = 0.0) -> Tensor:
    """`points` times from noise (0) to data (1), (points,) float64: s t / (1 + (s - 1) t) of evenly spaced t, where the
    shift s is not 0. s < 1 puts more of them near the noise. VgmError: fewer than two."""
    if points < 2:
        raise VgmError("steps counts grid points here, at least 2 are needed", "steps=250", USAGE)
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    return shift_time(t, shift) if shift > 0 else t


@dataclass(kw_only=True)
class ShiftedODESampler(GaussianSampler):
    """Probability-flow ODE of networks that were trained on straight paths. `steps` counts grid points: Euler's method
    evaluates the network one time less.

    method: torchdiffeq's names, whose rk4 is Kutta's 3/8 rule. cfg_channels: the official code guides the first 3
    channels whatever the latents, so that the published scales (10 and 6.7) are for cfg_channels=3; with all channels
    about 4 does as much.
    """

    steps: Steps = 250
    method: Literal["euler", "midpoint", "heun", "heun2", "heun3", "rk4", "dopri5"] = "euler"
    shift: NonNegative = 0.0  # of the grid, see grid_of; 0: none, as published 0.3
    cfg_start: Fraction = 0.0  # time t from which on samples are guided
    rtol: Positive = 1e-3  # of dopri5
    atol: Positive = 1e-6  # of dopri5

    def guided(self, view: Denoiser, request: Request) -> Denoiser:
        """The view, guided from cfg_start on where the request names no interval."""
        if request.guidance_interval is None and self.cfg_start > 0:
            request = copy.copy(request)
            request.guidance_interval = (0.0, 1 - self.cfg_start)
        return super().guided(view, request)

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        if model.path != LinearPath() or model.prediction != "velocity":
            hint = "`vgm ls samplers` shows others"
            raise VgmError("this sampler is for networks that predict velocities on straight paths", hint, USAGE)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return model.predict(x, t, "velocity", **request.cond)

        def x0_of(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
            return convert(v, x, t, model.path, "velocity", "x0")

        times = 1 - grid_of(steps, self.shift)
        reporting: dict[str, Any] = {"callback": report(request, steps - 1), "x0_of": x0_of}
        if self.method == "dopri5":
            return solvers.dopri5(velocity, request.randn(), 1.0, 0.0, rtol=self.rtol, atol=self.atol, **reporting)
        method = {"heun2": "heun", "rk4": "rk38"}.get(self.method, self.method)  # torchdiffeq's names
        return solvers.ODE[method][0](velocity, request.randn(), times, **reporting)
