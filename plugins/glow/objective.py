"""Exact maximum likelihood in bits per dimension (Kingma & Dhariwal 2018, eq. 1 to 3), with the class term of the code.

Official code: openai/glow@91b2c57 model.py. The first batch initialises every actnorm, before any update.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import NonNegative, Width

from .model import Glow, dequantise


def bits_per_dim(log_prob: Tensor, dims: int, n_bits: int) -> Tensor:
    """Density of images in [-0.5, 0.5) in nats -> bits per dimension of the n_bits image: log_prob (B,)."""
    return n_bits - log_prob / (dims * math.log(2))


def flow_loss(
    model: Glow, z: Tensor, y: Tensor | None = None, class_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every image (B,) and its parts: z (B, C, H, W) padded and dequantised, y (B,).

    bits_x, per pixel value inside the border, and bits_y with error where the model has a classifier: cross-entropy in
    bits of the class given the top z.
    """
    encoding = model(z, y)
    bits_x = bits_per_dim(encoding.log_prob, z[0].numel(), model.n_bits) * (z[0].numel() / model.cropped(z)[0].numel())
    parts = {"bits_x": bits_x}
    if model.classifier is None or y is None or class_weight == 0:
        return bits_x, parts
    logits = model.classifier(encoding.z[-1])
    bits_y = F.cross_entropy(logits, y, reduction="none") / math.log(2)
    parts |= {"bits_y": bits_y, "error": (logits.argmax(1) != y).float()}
    return bits_x + class_weight * bits_y, parts


class GlowObjective(ObjectiveBase):
    """Bits per dimension of dequantised images.

    class_weight: of the classifier's bits per image; without classes it weighs nothing. prepare_size: images of
    the data-dependent initialisation. VgmError: a conditional model without labels.
    """

    def __init__(self, model: Glow, class_weight: NonNegative = 0.0, prepare_size: Width = 256):
        if class_weight and model.num_classes and model.classifier is None:
            raise VgmError("class_weight needs the classifier", "model.classifier=true", USAGE)
        self.model, self.networks = model, {"model": model}
        self.class_weight, self.prepare_size = class_weight, prepare_size

    def pixels(self, batch: Batch) -> Tensor:
        """x (B, C, H, W) in [-1, 1] -> 0..255, padded."""
        return self.model.padded(((batch["x"] + 1) * 127.5).round().clamp(0, 255))

    def prepare(self, first_batch: Batch, step: Step) -> None:
        if self.model.initialised:
            return
        pixels = self.pixels(first_batch)
        u = torch.rand(pixels.shape, generator=step.generator("first dequantisation")).to(pixels.device)
        self.model.initialise(dequantise(pixels, u, self.model.n_bits))

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W) in [-1, 1], cond: {"y": (B,)} for a conditional model. Logs bits_x, bits_y and
        error."""
        pixels = self.pixels(batch)
        u = step.rand(pixels.numel(), "dequantisation").view_as(pixels)
        y = batch.get("cond", {}).get("y")
        losses, parts = flow_loss(self.model, dequantise(pixels, u, self.model.n_bits), y, self.class_weight)
        return losses.mean(), {k: v.detach().mean() for k, v in parts.items()}
