"""Sampling by average velocities: z_r = z_t - (t - r) u(z_t, r, t). Geng et al. 2025 (2505.13447), eq. 12, alg. 2."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap, few_step
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import each
from vgm_cli.ranges import NonNegative, Steps


@dataclass(kw_only=True)
class MeanFlowSampler:
    """One evaluation from noise to data, or a few from time to time; no noise is added in between.

    Guided with a scale, u + scale (u_c - u), where guidance is not in the network's weights already. VgmError: a
    network of one time, guidance that is in the weights, times that do not descend.
    """

    steps: Steps | None = None  # evaluations at evenly spaced times; None: as many as there are times, else one
    times: tuple[NonNegative, ...] | None = None  # times of the evaluations, 1 (noise) first; the last jump is to data

    def __call__(self, view: Any, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        if not isinstance(view, FlowMap) or view.second_time is None:
            raise VgmError("this sampler needs a network of average velocities", "--sampler few-step takes any", USAGE)
        scale = 1.0 if request.guidance_scale is None else request.guidance_scale
        if scale != 1 and view.guided:
            hint = "leave --guidance-scale away; objective.omega and objective.kappa set it in training"
            raise VgmError("guidance is in this network's weights, more of it would spoil its images", hint, USAGE)
        network: Denoiser = view
        if scale != 1:
            network = ClassifierFreeGuidance(view, scale, interval=request.guidance_interval, null=request.null or None)
        times = self.times_for(view, request.steps or self.steps)
        before, callback = network.nfe, request.callback

        def jump(z: Tensor, t: float, r: float) -> Tensor:
            u = view.interpret(network.raw(z, t, s=each(z, r), **request.cond), z, t, "velocity")
            return z - (t - r) * u

        x = few_step(
            jump,
            request.randn() * view.noise_scale(times[0]),
            times,
            callback=None if callback is None else lambda i, z, x0: callback(i, len(times) - 1, z, x0),
        )
        request.info["nfe"] = network.nfe - before
        return x.float()

    def times_for(self, view: FlowMap, steps: int | None) -> list[float]:
        """The times from noise to data, data's own included. VgmError: they do not descend on the network's path."""
        own = list(self.times) if self.times and steps in (None, len(self.times)) else view.times_of(steps)
        times = [*own, view.end()]
        if times[0] > view.path.t_max or any(r >= t for t, r in pairwise(times)):
            hint = f"from at most {view.path.t_max:g} to above {view.end():g}"
            raise VgmError(f"times {own} do not descend to data", hint, USAGE)
        return times
