"""AEVB: the negative lower bound per image, in nats (Kingma & Welling 2013, algorithm 1), and its importance-weighted
relative (Burda et al. 2015). Sums over pixels and latents, mean over the batch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.losses.pixels import LEVELS
from vgm_cli.ranges import NonNegative, Whole, Width

from . import bounds
from .model import VAE

ESTIMATORS = ("b", "a", "iwae")


def log_prior_of_parameters(model: torch.nn.Module) -> Tensor:
    """log N(theta; 0, I) up to a constant: ()."""
    return -0.5 * torch.stack([p.square().sum() for p in model.parameters()]).sum()


class VAEObjective(ObjectiveBase):
    """Maximises a bound of log p(x).

    estimator: b (eq. 7, KL in closed form) | a (eq. 6, all by sampling) | iwae (importance-weighted). samples: L draws
    of z per image. kl_weight: beta of estimator b; anything but 1 is no bound. map_over: N images of the training set:
    adds the prior N(0, I) of all parameters, 1/N of it per image (the paper's MAP); 0 for none. dequantise: adds
    uniform noise to the pixels of a Gaussian model. VgmError: unknown estimator, a weight where there is no closed KL.
    """

    def __init__(
        self,
        model: VAE,
        estimator: Literal["a", "b", "iwae"] = "b",
        samples: Width = 1,
        kl_weight: NonNegative = 1.0,
        map_over: Whole = 0,
        dequantise: bool = False,
    ):
        if estimator not in ESTIMATORS:
            raise unknown("estimator", estimator, ESTIMATORS)
        if kl_weight != 1 and estimator != "b":
            raise VgmError("kl_weight needs the closed-form KL", "objective.estimator=b", USAGE)
        self.model, self.networks = model, {"model": model}
        self.estimator, self.samples, self.kl_weight = estimator, samples, kl_weight
        self.map_over, self.dequantise = map_over, dequantise

    def pixels(self, batch: Batch, step: Step) -> Tensor:
        """x in [-1, 1] -> what the model is trained on, in [0, 1]."""
        x = (batch["x"] + 1) / 2
        if self.model.binarise == "threshold":
            return (x > 0.5).to(x.dtype)
        if self.model.binarise == "none" and not self.dequantise:
            return (x * LEVELS).round() / LEVELS  # exact levels again: the map to [-1, 1] and back rounds
        u = step.rand(x.numel(), "pixels").view_as(x)
        return (u < x).to(x.dtype) if self.model.binarise == "dynamic" else x + (u - 0.5) / LEVELS

    def bound(self, terms: bounds.Terms) -> Tensor:
        """(B,) of the chosen estimator."""
        if self.estimator == "a":
            return bounds.estimator_a(terms)
        if self.estimator == "iwae":
            return bounds.importance_weighted(terms)
        return self.kl_weight * terms.neg_kl + terms.log_px.mean(0)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W) in [-1, 1]. Logs the reconstruction term, the KL divergence and the bound in bits."""
        x = self.pixels(batch, step)
        eps = step.randn((len(x), self.samples, self.model.latent_dim), "eps").transpose(0, 1)
        terms = self.model.terms(x, eps)
        bound = self.bound(terms).mean()
        loss = -bound
        if self.map_over:
            loss = loss - log_prior_of_parameters(self.model) / self.map_over
        logs = {"nll": -terms.log_px.mean(), "kl": -terms.neg_kl.mean(), "bound": bound}
        if self.model.likelihood.continuous:  # of the 8-bit image
            bound = bound - x[0].numel() * math.log(LEVELS)
        logs["bits_per_dim"] = -bound / (x[0].numel() * math.log(2))
        return loss, {k: v.detach() for k, v in logs.items()}
