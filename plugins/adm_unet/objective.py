"""Training of ADM's two companions: the classifier of noisy images and the upsampler.

Dhariwal & Nichol 2021 (arXiv 2105.05233), sec. 4 and app. C, D. Official code: openai/guided-diffusion@22e0df8
scripts/classifier_train.py and scripts/super_res_train.py. The gradient that guides a sampler is
vgm_cli.diffusion.iddpm.classifier_gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.diffusion.discrete import DiscreteDiffusion, named_betas
from vgm_cli.diffusion.iddpm import IDDPM
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Steps, Width


class NoisyClassifier(ObjectiveBase):
    """Cross entropy of the label of x_t, t uniform over the process's steps.

    schedule, steps: of the diffusion model that will be guided. noised: false trains on clean images, t = 0.
    """

    def __init__(self, model: nn.Module, schedule: str = "linear", steps: Steps = 1000, noised: bool = True):
        self.model, self.networks, self.noised = model, {"model": model}, noised
        self.process = DiscreteDiffusion(named_betas(schedule, steps))

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), label: (B,). Logs the share of labels that are the first guess. VgmError: no
        labels."""
        x, y = batch["x"], batch.get("label")
        if y is None:
            raise VgmError("a classifier needs labelled images", "one folder per class", USAGE)
        t = step.randint(self.process.steps, len(x), "t")
        if self.noised:
            x = self.process.q_sample(x, t, step.randn(x.shape, "noise"))
        else:
            t = t * 0
        logits = self.model(x, self.process.model_timesteps(t)).float()
        accuracy = (logits.argmax(1) == y).float().mean()
        return F.cross_entropy(logits, y), {"accuracy": accuracy.detach()}


class Upsampling(IDDPM):
    """IDDPM's objective for a network with super_res=true, which also sees the image at `small_size` pixels."""

    def __init__(
        self,
        model: nn.Module,  # the U-Net that is trained
        small_size: Width = 64,  # side of the images that will be enlarged
        schedule: str = "linear",  # of the betas, see discrete.named_betas
        steps: Steps = 1000,  # of the process
        learn_sigma: bool = True,  # the network gives twice the channels, the second half for the variance
        resampler: Literal["uniform", "loss-second-moment"] = "uniform",  # how timesteps are drawn
    ):
        super().__init__(model, schedule, steps, learn_sigma, resampler=resampler)
        self.small_size = small_size

    def keywords_of(self, batch: Batch) -> dict[str, Any]:
        low_res = F.interpolate(batch["x"], self.small_size, mode="area")  # (B, C, small, small)
        return super().keywords_of(batch) | {"low_res": low_res}
