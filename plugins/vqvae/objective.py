"""Training of both stages of VQ-VAE. van den Oord et al. 2017 (arXiv 1711.00937), eq. 3 and sec. 3.3.

Official code of the first: google-deepmind/sonnet@26b0518 examples/vqvae_example.ipynb. The quantizer's terms and the
moving averages are the quantizer's own (vgm_cli/nn/quantize.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.losses.pixels import LEVELS
from vgm_cli.nn.collectives import total
from vgm_cli.nn.quantize import code_counts, code_usage
from vgm_cli.ranges import Count, Positive, Whole

from .model import VQVAE, uniform_prior_bits
from .prior import CodePrior

Logs = dict[str, Tensor]
NEVER = -(10**9)  # a step before all others


class VQVAEObjective(ObjectiveBase):
    """Reconstruction + the quantizer's loss: mean squared error over the data's variance, or of a model with a discrete
    likelihood its nats per dimension. batch x: (B, C, H, W) in [-1, 1].

    Logs besides both terms the perplexity and the number of codes of the batch, and codebook_usage, the share of codes
    that were chosen within the last usage_over images, all processes together.
    """

    def __init__(
        self,
        model: VQVAE,
        data_variance: Positive | None = None,  # of pixels in [0, 1]; None: measured on the first images
        place_codes: bool = False,  # start the codes on latents of the first images; the paper does not
        restart_every: Whole = 0,  # codes unused for so many steps move onto latents; 0: never, as the paper
        usage_over: Count = 50_000,  # images over which usage is counted: about an epoch
    ):
        self.model, self.networks = model, {"model": model}
        self.given, self.place_codes = data_variance, place_codes
        self.restart_every, self.usage_over = restart_every, usage_over
        self.prepare_size = 1024  # the same images on every process
        self.variance = torch.tensor(data_variance or 1.0)
        self.last_used = torch.full((model.codebook_size,), NEVER, device="cpu")
        self.latest: Tensor | None = None

    def to(self, device: torch.device) -> None:
        self.variance, self.last_used = self.variance.to(device), self.last_used.to(device)

    def prepare(self, first_batch: Batch, step: Step) -> None:
        """Measure the variance. VgmError: the images are not finite, or all one colour."""
        x = first_batch["x"].float()
        if not bool(x.isfinite().all()):
            raise VgmError("the first images hold NaN or infinities, the reconstruction error would too", code=USAGE)
        if self.given is None:
            self.variance = ((x + 1) / 2).var(correction=0)
        if not float(self.variance) > 0:
            hint = "objective.data_variance=V divides the squared error by V"
            raise VgmError("all pixels of the first images are the same: their variance is 0", hint, USAGE)
        if self.place_codes:
            with torch.no_grad():
                self.model.quantize.place(self.model.moments(x[:64]))

    def reconstruction(self, x: Tensor, heads: Tensor, ids: Tensor) -> tuple[Tensor, Logs]:
        """What the first term is, and what to log of it."""
        dims = x[0].numel()
        if self.model.likelihood is None:
            mse = F.mse_loss(heads.float(), x) / 4  # of pixels in [0, 1]
            return mse / self.variance, {"rec_loss": mse.detach() / self.variance, "psnr": -10 * mse.detach().log10()}
        levels = ((x + 1) / 2 * LEVELS).round() / LEVELS  # exact again: the map to [-1, 1] and back rounds
        nll = self.model.nll(levels, heads).mean()
        bits = uniform_prior_bits(nll.detach(), ids[0].numel(), self.model.codes_each, dims)
        return nll / dims, {"rec_loss": nll.detach() / dims, "bits_per_dim": bits}

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, Logs]:
        x = batch["x"]
        heads, quant_loss, ids = self.model(x)
        rec, logs = self.reconstruction(x, heads, ids)
        logs |= {"quant_loss": quant_loss.detach(), **self.usage(ids, step)}
        if self.restart_every:
            self.latest = x
        return rec + quant_loss, logs

    @torch.no_grad()
    def usage(self, ids: Tensor, step: Step) -> Logs:
        """How the batch uses the codebook, and the share of codes chosen lately."""
        if ids.is_meta:
            return {}
        n = self.model.codebook_size
        counts = total(code_counts(ids, n))
        self.last_used = torch.where(counts > 0, step.index, self.last_used)
        window = math.ceil(self.usage_over / (len(ids) * step.world * step.micros))
        lately = step.index - self.last_used < window
        return {**code_usage(ids, n), "codebook_usage": lately.float().mean()}

    def after_step(self, step: Step) -> None:
        if not self.restart_every or (step.index + 1) % self.restart_every or self.latest is None:
            return
        dead = step.index - self.last_used >= self.restart_every
        draws = torch.rand(len(dead), generator=step.generator("restart")).to(dead.device)
        with torch.no_grad():
            self.model.quantize.restart(dead, self.model.moments(self.latest), draws)
        self.last_used = torch.where(dead, step.index, self.last_used)

    def view(self) -> dict[str, Any]:
        return {"name": "codec"}

    def state_dict(self) -> dict[str, Tensor]:
        return {"variance": self.variance, "last_used": self.last_used}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.variance = state["variance"].to(self.variance)
        self.last_used = state["last_used"].to(self.last_used)


class PriorObjective(ObjectiveBase):
    """Cross entropy of every code given those before it. batch: tokens (B, h, w) int64; cond: {"y": (B,)} of classes.

    Background fills most of a grid with one code that is easily told; accuracy_rest counts the other positions.
    """

    shardable = True

    def __init__(self, model: CodePrior):
        self.model, self.networks = model, {"model": model}

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, Logs]:
        ids = batch["tokens"]
        logits = self.model(ids, **batch.get("cond", {}))
        loss = F.cross_entropy(logits.flatten(0, 2), ids.flatten())
        right = (logits.detach().argmax(-1) == ids).float()
        rest = ids != ids.flatten().mode().values
        return loss, {"accuracy": right.mean(), "accuracy_rest": (right * rest).sum() / rest.sum().clamp_min(1)}
