"""ControlNet's objective: the base's own denoising loss, the network being told a hint, too.

Zhang, Rao and Agrawala 2023 (arXiv 2302.05543), eq. 5. Official code: lllyasviel/ControlNet@ed85cd1 cldm/cldm.py. Half
of the prompts are left out, as the paper says; the released training script leaves that to the data set.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, NullCondition, Step
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.objectives import GaussianObjective, TimeSampling, Weighting
from vgm_cli.ranges import Fraction

STABLE = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


class ControlObjective(GaussianObjective):
    """Denoising by a steered network on the path of its base. batch x: (B, C, H, W), cond: keywords of the network.

    What is trained is the network's own state: the copy, and of an unlocked network the decoder's copy (the authors
    advise a learning rate of 2e-6 then, in place of 1e-5).
    """

    def __init__(
        self,
        model: nn.Module,  # the network that is trained, told a hint
        base: Any = None,  # the frozen network, whose path and prediction these are; None: Stable Diffusion's noise
        text_dropout: Fraction = 0.5,  # share of rows that are told no prompt or class, so that the hint must do
        prediction: Literal["eps", "v"] = "eps",  # where the base's file does not say it
        weighting: Weighting = "uniform",  # of the noise levels, see weight_of
        time_sampling: TimeSampling = "uniform",  # how noise levels are drawn, see `times`
        time_mean: float | None = None,  # of the normal draw; above 0: more of the noisy times
    ):
        seen = base if isinstance(base, Denoiser) else Denoiser(model, STABLE, prediction, time="index")
        kind: Any = seen.prediction
        super().__init__(model, seen.path.config(), kind, weighting, time_sampling, time_mean=time_mean)
        self.denoiser = Denoiser(model, seen.path, kind, **seen.options())
        self.path, self.text_dropout = self.denoiser.path, text_dropout

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return super().loss(phase, {**batch, "cond": self.dropped(batch, step)}, step)

    def dropped(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The keywords, some rows without what guidance leads away from: the prompt or the class, not the hint."""
        cond, null = batch.get("cond", {}), batch.get("null", {})
        if not cond or not self.text_dropout or not (null or isinstance(self.model, NullCondition)):
            return cond
        other = unconditional(self.model, cond, null)
        away = step.rand(len(batch["x"]), "text dropout") < self.text_dropout
        return {k: torch.where(away.view(-1, *[1] * (v.ndim - 1)), other[k].to(v), v) for k, v in cond.items()}
