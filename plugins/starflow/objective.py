"""Exact maximum likelihood of noisy data, as means over all numbers, and the learned denoiser's regression.

Gu et al. 2025 (arXiv 2506.06276), sec. 3; Zhai et al. 2024 (arXiv 2412.06329), sec. 2. Official code:
apple/ml-starflow@e565a46 train.py, whose optimizer never steps in the published script; here it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Phase, Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import NonNegative

from .model import Encoding, Flow, TARFlow, dequantised

Noise = Literal["gaussian", "uniform", "none"]
USUAL = 0.3  # the deviation at which `weigh_noise` changes nothing


def flow_loss(encoding: Encoding, latent_norm: float = 0.0, weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood per number in nats, without the constant of the normal density, and its parts.

    weight: of the likelihood. latent_norm: of the mean squares of the images and of what comes out of every block but
    the last, summed: it keeps what lies between the blocks small.
    """
    loss_z = 0.5 * encoding.outputs[-1].square().mean()
    loss_logdet = -torch.stack([logdet.mean() for logdet in encoding.logdets]).sum()
    loss = weight * (loss_z + loss_logdet)
    parts = {"loss_z": loss_z.detach(), "loss_logdet": loss_logdet.detach()}
    if latent_norm:
        loss = loss + latent_norm * torch.stack([o.square().mean() for o in encoding.outputs[:-1]]).sum()
    return loss, parts


class FlowObjective(ObjectiveBase):
    """Trains a TARFlow or a STARFlow. batch x: (B, C, H, W) in [-1, 1] or latents, cond: {"y"} or {"context"}.

    A network with a learned denoiser has a second phase, which predicts the gradient of the first phase's loss at the
    same noisy x, times the number of values and the noise's deviation; it costs one more pass of the flow.
    """

    def __init__(
        self,
        model: Flow,
        noise: Noise = "gaussian",  # gaussian: of model.noise_std; uniform: dequantises 8-bit pixels; none
        latent_norm: NonNegative = 0.0,  # see flow_loss
        weigh_noise: bool = False,  # the likelihood counts noise_std / 0.3 times
    ):
        if noise == "gaussian" and not model.noise_std:
            raise VgmError("objective.noise=gaussian needs a deviation", "model.noise_std=0.3 or another noise", USAGE)
        if noise != "gaussian" and model.noise_std:
            hint = "model.noise_std=0 objective.noise=uniform"
            raise VgmError(f"noise_std={model.noise_std:g} is that of noise=gaussian, not {noise}", hint, USAGE)
        self.model: Flow = model
        self.networks: Mapping[str, nn.Module] = {"model": model}
        self.noise, self.latent_norm = noise, latent_norm
        self.weight = model.noise_std / USUAL if weigh_noise else 1.0
        self.shardable = not model.has_denoiser

    def phases(self) -> list[Phase]:
        if not self.model.has_denoiser:
            return [Phase("main")]
        own = Phase("denoiser", trains=("model.learnable_self_denoiser",), optimizer="denoiser")
        return [Phase("main", trains=("model.blocks",)), own]

    def noisy(self, x: Tensor, step: Step) -> Tensor:
        """x as the network sees it."""
        if self.noise == "gaussian":
            return x + self.model.noise_std * step.randn(x.shape, "noise")
        if self.noise == "uniform":
            levels = ((x + 1) * 127.5).round()
            return dequantised(levels, step.rand(x.shape, "dequantisation"))
        return x

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        x, cond = self.noisy(batch["x"], step), batch.get("cond", {})
        if phase == "denoiser":
            return self.denoiser_loss(x, cond), {}
        encoding = self.model(x, **cond)
        model = self.model
        if isinstance(model, TARFlow) and not model.nvp and model.training and torch.is_grad_enabled():
            model.update_prior(encoding.outputs[-1])
        return flow_loss(encoding, self.latent_norm, self.weight)

    def denoiser_loss(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of the learned denoiser at noisy x (B, C, H, W)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss, _ = flow_loss(self.model(x, **cond), self.latent_norm, self.weight)
            (gradient,) = torch.autograd.grad(loss, x)
        target = gradient.detach() * x.numel() * self.model.noise_std
        return F.mse_loss(self.model(x.detach(), **cond, denoise=True).float(), target)
