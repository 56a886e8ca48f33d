"""The student as a generator: one step, or a few with fresh noise in between.

Yin et al. 2024 (2311.18828, 2405.14867 sec. 4.4, 4.5); behaviour of tianweiy/DMD2@8d8fa55 main/sd_unified_model.py
(sample_backward) and its demo loops. Times are the host's: 0 data, path.t_max noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FewStepSampler, FlowMap, level_times
from vgm_cli.errors import USAGE, VgmError

# sigma / alpha at index 399 of Stable Diffusion's process, where DMD2's one-step SDXL is asked: dividing an error in
# eps by the alpha of pure noise (0.07 in Stable Diffusion, 0.006 in DDPM) would drown the image
EPS_LEVEL = 1.16


def denoising_times(view: Denoiser, steps: int, first: float | None = None, count: int | None = None) -> list[float]:
    """Times at which a generator of `steps` steps is asked, noise first: every 1000/steps-th level from the last.

    first: the first one; None is pure noise, except for one step of a network that predicts eps or the score, which is
    asked at EPS_LEVEL. count: of the `count` cleanest levels alone (DMD2's denoising_timestep), None of all. VgmError:
    more steps than levels.
    """
    levels = level_times(view)[:count]
    if not 1 <= steps <= len(levels):
        raise VgmError(f"denoising_steps={steps} of {len(levels)} levels", "1 to 4 are usual", USAGE)
    interval = len(levels) // steps
    times = levels[torch.arange(len(levels) - 1, -1, -interval)[:steps]].tolist()
    if first is not None:
        times[0] = first
    elif steps == 1 and view.prediction in ("eps", "score"):
        times[0] = float(view.path.t_of_ve_sigma(EPS_LEVEL))
    return times


@dataclass(kw_only=True)
class GeneratorSampler(FewStepSampler):
    """The student's own sampling. steps: None for as many as it was trained with; fewer stop early, more are spread
    as in training. Guidance is already in the weights. VgmError: the view is no Denoiser."""

    def times_for(self, flow: FlowMap, steps: int | None) -> list[float]:
        if self.times is not None and steps in (None, len(self.times)):
            return list(self.times)
        trained = flow.times or denoising_times(flow, steps or 1)
        return trained[:steps] if steps is None or steps <= len(trained) else denoising_times(flow, steps)
