"""Sampling with a consistency model in continuous time: one step, two, or more. Lu & Song 2025 (2410.11081), sec. 5.

Every step goes to data and back up to a smaller time with fresh noise: x = f(z, t_max), then x = f(cos(t) x + sin(t)
z', t). Schedules: the paper's 1.1 for the second step, and SANA-Sprint's (huggingface/diffusers@58eb52c SCMScheduler).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap, few_step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import NonNegative, Positive, Steps

from .view import GuidedStudent, boundary_of, highest, own_time

Schedule = Literal["paper", "sana"]
SECOND = 1.1  # the paper's second time, on every data set


def schedule_of(name: Schedule, steps: int, first: float) -> list[float]:
    """TrigFlow times of so many steps, noise first.

    paper: first, then 1.1, and for more than two steps further ones evenly from 1.1 down to 0, which is this project's
    choice (the paper names no times). sana: 1.5708, and 1.3 as the second of two; other numbers of steps are spread
    evenly from 1.5708 down to 0.
    """
    if name == "sana":
        return [1.5708, 1.3] if steps == 2 else [1.5708 * (1 - i / steps) for i in range(steps)]
    return [first, *(SECOND * (1 - i / max(steps - 1, 1)) for i in range(steps - 1))]


def consistency_steps(
    flow: FlowMap,
    noise: Callable[[], Tensor],  # the next draw (B, ...), standard normal
    times: list[float],  # TrigFlow times of the evaluations, noise first
    limit: bool = False,  # the first step leaves cos(t) x out, as at pi / 2
    change: Callable[[Tensor], Tensor] | None = None,  # of every estimate of x0
    callback: Callable[[int, Tensor, Tensor | None], None] | None = None,
    **cond: Tensor,
) -> Tensor:
    """x0 (B, ...). TrigFlow's times are asked on the student's own path, at equal noise level."""
    sd, path = flow.sigma_data, flow.path
    own = own_time(flow, torch.tensor(times, dtype=torch.float64), sd).tolist()
    end = flow.end()

    def jump(x: Tensor, t: float, s: float) -> Tensor:
        if not (limit and t == own[0]):
            return flow.jump(x, t, None, **cond)
        return -sd * flow.interpret(flow.raw(x, t, **cond), x, t, "trig")

    def renoise(x0: Tensor, s: float) -> Tensor:
        return x0 if s <= end else flow.renoise(x0, s, noise())

    alpha, sigma = float(path.alpha(own[0])), float(path.sigma(own[0]))
    x = noise() * (sigma**2 + (alpha * sd) ** 2) ** 0.5  # TrigFlow's z: noise as wide as x_t
    return few_step(jump, x, [*own, end], renoise=renoise, change=change, callback=callback)


@dataclass(kw_only=True)
class SCMSampler:
    """One or more steps of a consistency model, or of any other diffusion or flow network.

    A student that is told its guidance scale (objective.guidance_range) takes --guidance-scale; in others guidance is
    in the weights, and it is refused. VgmError: also times that do not descend.
    """

    steps: Steps | None = None  # evaluations; None: as many as there are times, else one
    times: tuple[NonNegative, ...] | None = None  # TrigFlow times of the evaluations, noise first; None: schedule's
    schedule: Schedule = "paper"  # see schedule_of
    sigma_max: Positive = 80.0  # noise level at which the paper's schedule starts, at most what the network knows
    limit: bool = False  # the first step leaves cos(t) x out, as at pi / 2
    clip: bool = False  # estimates of x0 to [-1, 1], for pixels

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        if not isinstance(view, Denoiser):
            raise VgmError("this sampler needs a diffusion or flow network", "`vgm ls samplers` shows others", USAGE)
        flow = view if isinstance(view, FlowMap) else FlowMap(view.network, view, boundary_of(view.prediction))
        cond, scale = dict(request.cond), request.guidance_scale
        if isinstance(flow, GuidedStudent):
            if scale is not None:
                cond["guidance"] = torch.full((len(request),), float(scale))
        elif scale not in (None, 1.0):
            hint = "--guidance-scale 1, or train with objective.guidance_range=[1,2] model.second_time=true"
            raise VgmError("this sampler does not guide: guidance is in a student's weights", hint, USAGE)
        times, before, callback = self.times_for(flow, request.steps or self.steps), flow.nfe, request.callback
        x = consistency_steps(
            flow,
            request.randn,
            times,
            self.limit,
            (lambda x0: x0.clamp(-1, 1)) if self.clip else None,
            None if callback is None else lambda i, x, x0: callback(i, len(times), x, x0),
            **cond,
        )
        request.info["nfe"] = flow.nfe - before
        return x.float()

    def times_for(self, flow: FlowMap, steps: int | None) -> list[float]:
        """TrigFlow times of so many evaluations. VgmError: they do not descend."""
        if self.times and steps in (None, len(self.times)):
            times = list(self.times)
        else:
            first = math.atan(min(self.sigma_max, highest(flow)) / flow.sigma_data)
            times = schedule_of(self.schedule, steps or 1, first)
        if times[0] > math.pi / 2 + 1e-5 or times[-1] <= 0 or any(s >= t for t, s in pairwise(times)):
            raise VgmError(f"times {times} do not descend from pi / 2 to 0", "sampler.times=[1.5645,1.1]", USAGE)
        return times
