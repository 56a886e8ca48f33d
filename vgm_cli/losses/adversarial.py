"""Adversarial losses of autoencoders: hinge, vanilla, and VQGAN's adaptive generator weight.

Esser et al., CVPR 2021 (arXiv 2012.09841), eq. 6 and 7. Official code: CompVis/taming-transformers@3ba01b2
taming/modules/losses/vqperceptual.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DiscLoss = Literal["hinge", "vanilla", "non-saturating"]
GenLoss = Literal["hinge", "vanilla", "non-saturating"]


def discriminator_loss(kind: DiscLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Scalar loss of a discriminator from its logits on real and on generated images, any shape.

    hinge: (E max(0, 1 - real) + E max(0, 1 + fake)) / 2; vanilla: (E softplus(-real) + E softplus(fake)) / 2;
    non-saturating: what LlamaGen's code computes under that name, its cross entropy having logits and targets swapped,
    so that no gradient reaches the generated half. Kept for parity; train with hinge.
    """
    if kind == "non-saturating":
        return 0.5 * (swapped_cross_entropy(1.0, real) + swapped_cross_entropy(0.0, fake))
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: GenLoss = "hinge") -> Tensor:
    """hinge: -E[fake], whatever loss the discriminator has (as in VQGAN and latent diffusion); vanilla: E
    softplus(-fake), which elsewhere is called non-saturating; non-saturating: as above."""
    if kind == "vanilla":
        return F.softplus(-fake).mean()
    return -fake.mean() if kind == "hinge" else swapped_cross_entropy(1.0, fake)


def swapped_cross_entropy(logit: float, targets: Tensor) -> Tensor:
    """Binary cross entropy of one constant logit against `targets`, which here are a discriminator's logits."""
    return F.binary_cross_entropy_with_logits(torch.full_like(targets, logit), targets)


def adaptive_weight(
    reconstruction: Tensor, other: Tensor, layer: Tensor, weight: float = 1.0, largest: float = 1e4
) -> Tensor:
    """How much of another loss (an adversarial one) balances the reconstruction loss at a layer's weight (detached
    scalar), VQGAN's being the decoder's last.

    weight * clamp(|d reconstruction / d layer| / (|d other / d layer| + 1e-4), 0, largest); both losses are scalars
    whose graph is kept.
    """
    (ours,) = torch.autograd.grad(reconstruction, layer, retain_graph=True)
    (theirs,) = torch.autograd.grad(other, layer, retain_graph=True)
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0.0, largest).detach() * weight
