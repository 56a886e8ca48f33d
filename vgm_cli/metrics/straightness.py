"""How straight a flow is: S = int_0^1 E ||(Z_data - Z_noise) - v(Z_t, t)||^2 dt along its own ODE.

Liu, Gong & Liu 2023 (arXiv:2209.03003), sec. 2.2: 0 if and only if every trajectory is a straight line at constant
speed, in which case one Euler step is exact. Given per dimension, so that sizes of images compare.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import generators, seed_of
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import MetricBase, Subject, Value
from vgm_cli.ranges import Count, NonNegative, Steps

IMAGES = 256  # trajectories where -n does not say


@torch.no_grad()
def straightness(view: Denoiser, noise: Tensor, steps: int = 100, **cond: Any) -> Tensor:
    """S per dimension of every trajectory that starts at sigma * noise (B, ...): (B,), by `steps` Euler steps."""
    low, high = view.t_range()
    x = noise * float(view.path.sigma(high))
    squares, mean = (torch.zeros(s, dtype=torch.float64, device=x.device) for s in (len(x), x.shape))
    grid = torch.linspace(high, low, steps + 1, dtype=torch.float64)
    for t, later in pairwise(grid):
        v = view.predict(x, float(t), "velocity", **cond)
        squares += v.double().square().flatten(1).mean(1) / steps
        mean += v.double() / steps
        x = x + float(later - t) * v
    # Z_data - Z_noise is the mean velocity times the elapsed time, so the integral is the velocity's variance over time
    return squares - mean.square().flatten(1).mean(1)


class Straightness(MetricBase):
    """Straightness of the flow along its own trajectories, from noise that is drawn for every class in turn.

    n: trajectories. steps: Euler steps of each. guidance_scale: of the flow that is measured; 1 is the network itself.
    """

    needs_model = True
    needs_data = False

    def __init__(self, n: Count | None = None, steps: Steps = 100, guidance_scale: NonNegative = 1.0):
        self.n, self.steps, self.guidance_scale = n, steps, guidance_scale

    def __call__(self, subject: Subject, seed: int) -> list[Value]:
        """uncertainty: the standard error over trajectories. Raises VgmError when the model is no flow."""
        view = subject.view
        if not isinstance(view, Denoiser):
            raise VgmError("straightness is that of a diffusion or flow model's ODE", code=USAGE)
        n = self.n or subject.n or IMAGES
        shape, conditions, flow = tuple(subject.header.data["sample_shape"]), subject.conditions, view
        if self.guidance_scale != 1 and conditions:
            flow = ClassifierFreeGuidance(view, self.guidance_scale, null=conditions.null(subject.device))

        def work(part: range) -> Tensor:
            gens = generators(seed_of("straightness", seed, i) for i in part)
            noise = torch.stack([torch.randn(shape, generator=g) for g in gens]).to(subject.device)
            cond = conditions.encode({name: p.in_turn(part) for name, p in conditions.parts.items()}, subject.device)
            return straightness(flow, noise, self.steps, **cond).cpu()

        spans = [range(i, min(i + subject.batch_size, n)) for i in range(0, n, subject.batch_size)]
        values = torch.cat(subject.shares(spans, work))
        spread = float(values.std()) / n**0.5 if n > 1 else None
        options = {"steps": self.steps, "guidance_scale": self.guidance_scale}
        return [Value("straightness", float(values.mean()), spread, options, n=n)]
