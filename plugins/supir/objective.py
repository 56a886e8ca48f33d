"""SUPIR's two trainings: the encoder of degraded pictures, then the control and its connectors.

Yu et al. 2024 (arXiv 2401.13627), sec. 3.1 and 3.2; no training code is published. Negative-quality samples: officially
pictures that SDXL makes of negative words are among the data, with these words; here a share of a batch may be made of
the batch itself, degraded, and is told the negative words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, Codec, ObjectiveBase, Phase, Step, generators, seed_of
from vgm_cli.diffusion.objectives import GaussianObjective
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.realistic import RealESRGAN
from vgm_cli.ranges import Fraction, NonNegative, Steps

from .codec import RobustAutoencoderKL
from .model import SUPIRUNet
from .presets import NEGATIVE


class EncoderObjective(ObjectiveBase):
    """Trains the second encoder of a codec: |D(E_degraded(y)) - D(E(x))|^2, everything else fixed.

    batch x: clean images (B, C, H, W) in [-1, 1], cond: {"degraded": (B, C, H, W) in [-1, 1]}. The encoder starts as
    the first. VgmError: another codec.
    """

    def __init__(
        self,
        model: nn.Module,  # the codec with two encoders
        latent_weight: NonNegative = 0.0,  # of |E_degraded(y) - E(x)|^2, in units of the model's latents; paper: none
    ):
        if not isinstance(model, RobustAutoencoderKL):
            message = "SUPIR's first stage trains a codec with a second encoder"
            raise VgmError(message, "model.name=supir-autoencoder", USAGE)
        self.model, self.latent_weight = model, latent_weight
        self.networks = {"model": model}

    def phases(self) -> list[Phase]:
        return [Phase("main", ("model.denoise_encoder",))]

    def prepare(self, first_batch: Batch, step: Step) -> None:
        self.model.start()

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        x, degraded = batch["x"], batch.get("cond", {}).get("degraded")
        if degraded is None:
            hint = "conditions: {degraded: {name: hint, operator: {name: real-esrgan}, keyword: degraded, low: -1}}"
            raise VgmError("the batch has no degraded pictures", hint, USAGE)
        model = self.model
        with torch.no_grad():
            wanted = model.latents(model.encode(x))
            clean = model.decode(wanted)
        found = model.degraded_latents(degraded)
        error = (model.decode(found).float() - clean.float()).square().mean()
        latent = (found.float() - wanted.float()).square().mean()
        return error + self.latent_weight * latent, {"mse": error.detach(), "latents": latent.detach()}

    def view(self) -> dict[str, Any]:
        return {"name": "codec"}


class SUPIRObjective(GaussianObjective):
    """Trains the control and the connectors on the noise of latents, the network that they steer being frozen.

    batch x: latents of clean images, cond: keywords of the network, among them `control`. With negative_share, some
    rows of a batch are replaced by degraded versions of themselves, and their text by negative_prompt.
    VgmError: another network, negative samples without a codec or without a text to be told.
    """

    def __init__(
        self,
        model: nn.Module,  # the network with its control
        codec: Codec | None = None,  # the recipe's, which makes negative samples
        conditions: Any = None,  # what the network is told, by which negative words are encoded
        schedule: str = "scaled_linear",  # of beta, see vgm_cli/diffusion/discrete/betas.py
        beta_start: float = 0.00085,  # of the first timestep
        beta_end: float = 0.012,  # of the last
        steps: Steps = 1000,  # timesteps
        prediction: Literal["eps", "v"] = "eps",  # what the steered network gives
        negative_share: Fraction = 0.0,  # of rows that become negative samples
        negative_degradation: dict[str, Any] | None = None,  # keywords of real-esrgan, which makes them bad
        negative_prompt: str = NEGATIVE,  # what they are told
    ):
        if not isinstance(model, SUPIRUNet):
            raise VgmError("SUPIR's objective trains a SUPIR network", "model.name=supir", USAGE)
        ends = {"beta_start": beta_start, "beta_end": beta_end}
        super().__init__(model, {"name": "vp-discrete", "schedule": schedule, "steps": steps, **ends}, prediction)
        self.share, self.prompt, self.codec, self.conditions = negative_share, negative_prompt, codec, conditions
        self.operator = RealESRGAN(**{"scale": 1, **(negative_degradation or {})})
        self.text: str | None = None
        if negative_share:
            texts = [] if conditions is None else conditions.on("text")
            if not texts or codec is None:
                hint = "objective.negative_share=0, or conditions.text and a codec"
                raise VgmError("negative samples are told a text, and are made of decoded latents", hint, USAGE)
            self.text = texts[0].name

    def phases(self) -> list[Phase]:
        return [Phase("main", ("model.control", "model.project_modules"))]

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        if self.share and self.text is not None:
            batch = self.with_negatives(batch, step)
        return super().loss(phase, batch, step)

    @torch.no_grad()
    def with_negatives(self, batch: Batch, step: Step) -> Batch:
        """The batch with some rows made bad, and told so."""
        x, n = batch["x"], len(batch["x"])
        if x.is_meta:
            return batch
        chosen = (step.rand(n, "negative") < self.share).nonzero().flatten().tolist()
        if not chosen:
            return batch
        assert self.codec is not None
        first = step.rows(n)[0].start
        drawn = generators(seed_of(step.seed, step.index, "negative operator", first + i) for i in chosen)
        pictures = self.codec.decode(x[chosen]).clamp(-1, 1)
        bound = self.operator.bind(tuple(pictures.shape[1:]), drawn)
        bad = self.codec.latents(self.codec.encode(bound.enlarged(bound(pictures)).to(pictures))).to(x)
        told: Mapping[str, Tensor] = self.conditions.encode({self.text: [self.prompt]}, x.device)
        x = x.index_copy(0, torch.tensor(chosen, device=x.device), bad)
        cond = dict(batch["cond"])
        for key, row in told.items():
            cond[key] = cond[key].clone()
            cond[key][chosen] = row.to(cond[key])
        return {**batch, "x": x, "cond": cond}
