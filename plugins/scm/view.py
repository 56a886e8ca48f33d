"""How sCM's students are looked at, and where on their own paths TrigFlow's times lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.diffusion.denoiser import Denoiser, Network
from vgm_cli.diffusion.flow_map import Boundary, FlowMap
from vgm_cli.diffusion.path import Time, TrigPath

from .losses import LAST

EPS_LEVEL = 20.0  # beyond this sigma / alpha the x0 of a network of eps is an error over nearly nothing


def boundary_of(prediction: str) -> Boundary:
    """Networks of x0 are made the identity without noise by EDM's scalings, all others are it (f = cos x - sin F)."""
    return "skip" if prediction in ("x0", "x_prev") else "trig"


def highest(view: Denoiser) -> float:
    """The largest noise level sigma / alpha at which a network may be asked: what its path reaches, 20 for eps."""
    with torch.device("cpu"):
        level = float(view.path.ve_sigma(view.t_range()[1]))
    return min(level, EPS_LEVEL) if view.prediction in ("eps", "score", "x_prev") else level


def last_time(view: Denoiser, sigma_data: float) -> float:
    """The latest TrigFlow time at which a network may be asked."""
    return min(math.atan(highest(view) / sigma_data), LAST)


def own_time(view: Denoiser, t: Tensor, sigma_data: float) -> Tensor:
    """TrigFlow times (B,) as times of equal noise level on a network's own path: (B,) float64."""
    if view.path == TrigPath(sigma_data):
        return t.double()
    own = view.path.t_of_ve_sigma(sigma_data * torch.tan(t.double().clamp(max=LAST)))
    return own.clamp(view.path.t_min, view.t_range()[1])


class GuidedStudent(FlowMap):
    """A student that is told the guidance scale: network(x, t, s=scale, **cond). A sampler gives the keyword
    `guidance`, one scale for each item; any other sampler gets `scale`. Nothing may be added to it."""

    def __init__(
        self,
        network: Network,  # network(x (B, ...), t (B,), s (B,), **cond) -> (B, ...)
        denoiser: Denoiser | Mapping[str, Any],  # how the network is asked and read, or the config of one
        boundary: Boundary = "trig",  # see FlowMap
        sigma_min: float = 0.002,  # of the boundary "skip"
        sigma_max: float = 80.0,  # of the boundary "skip"
        sigma_data: float | None = None,  # of the boundary "skip"; None: the denoiser's
        scale: float = 1.0,  # what it is told where nobody says
        scales: tuple[float, float] | None = None,  # between which it was trained
    ):
        super().__init__(network, denoiser, boundary, sigma_min, sigma_max, sigma_data)
        self.scale, self.scales = scale, None if scales is None else (scales[0], scales[1])

    def view(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        scales = {} if self.scales is None else {"scales": list(self.scales)}
        return {**super().view(), "name": "scm-guided", "scale": self.scale, **scales}

    def raw(
        self, x_t: Tensor, t: Time, *, s: Time | None = None, guidance: Tensor | None = None, **cond: Any
    ) -> Tensor:
        """As Denoiser's. s, the end of a jump, is not told: every jump of it goes to data."""
        told = torch.full((len(x_t),), self.scale) if guidance is None else guidance
        return Denoiser.raw(self, x_t, t, s=told.to(x_t.device, torch.float32), **cond)
