"""Adversarial losses of autoencoders: hinge, vanilla, and VQGAN's adaptive generator weight.

Esser et al., CVPR 2021 (arXiv 2012.09841), eq. 6 and 7. Official code: CompVis/taming-transformers@3ba01b2
taming/modules/losses/vqperceptual.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DiscLoss = Literal["hinge", "vanilla"]


def discriminator_loss(kind: DiscLoss, real: Tensor, fake: Tensor) -> Tensor:
    """Scalar loss of a discriminator from its logits on real and on generated images, any shape.

    hinge: (E max(0, 1 - real) + E max(0, 1 + fake)) / 2; vanilla: (E softplus(-real) + E softplus(fake)) / 2.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """-E[fake], whatever loss the discriminator has (as in VQGAN and latent diffusion)."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, weight: float = 1.0) -> Tensor:
    """How much adversarial loss balances the reconstruction loss at the decoder's last layer (detached scalar).

    weight * clamp(|d reconstruction / d L| / (|d adversarial / d L| + 1e-4), 0, 1e4); both losses are scalars whose
    graph is kept.
    """
    (ours,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (theirs,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0.0, 1e4).detach() * weight
