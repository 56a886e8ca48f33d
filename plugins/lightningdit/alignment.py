"""VA-VAE's objective: an autoencoder whose latents are aligned with the features of a frozen foundation model. Yao et
al. 2025, sec. 3; hustvl/LightningDiT@2725fed vavae/ldm/modules/losses/contperceptual.py.

Deviation: latents and features must have the same grid (officially another grid fails in the middle of the loss).
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.losses.adversarial import DiscLoss, GenLoss, adaptive_weight
from vgm_cli.losses.first_stage import AutoencoderObjective, Logs, Reduction
from vgm_cli.nets.first_stage import DiagonalGaussian
from vgm_cli.nets.foundation import VisionFeatures
from vgm_cli.ranges import NonNegative, Whole


@runtime_checkable
class Comparable(Protocol):
    """A KL autoencoder with a projection. feature_dim: width of the features that it is for; 0: it has none."""

    feature_dim: int
    reverse_proj: bool

    def compared(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, c, h, w) and features (B, feature_dim, h, w), with equal channels."""
        ...


def similarities(z: Tensor) -> Tensor:
    """z: (B, C, h, w) -> cosines between the vectors of all pairs of places, (B, h w, h w)."""
    unit = F.normalize(z.flatten(2), dim=1)  # (B, C, h w)
    return unit.transpose(1, 2) @ unit


def distance_matrix_loss(z: Tensor, features: Tensor, margin: float = 0.0) -> Tensor:
    """How much the similarities of places among each other differ beyond the margin, mean over pairs of places and
    images (scalar). z, features: (B, C, h, w), whose C may differ."""
    return F.relu((similarities(z) - similarities(features)).abs() - margin).mean()


def cosine_loss(z: Tensor, features: Tensor, margin: float = 0.0) -> Tensor:
    """How far the cosine between latent and feature stays below 1 - margin at each place, mean over places and images
    (scalar). z, features: (B, D, h, w)."""
    return F.relu(1 - margin - F.cosine_similarity(features, z, dim=1)).mean()


class AlignedAutoencoder(AutoencoderObjective):
    """Trains AutoencoderKL as AutoencoderObjective does, with the vision foundation loss on top.

    That loss is distmat_weight times the distance matrix loss plus cos_weight times the cosine loss, between a draw of
    the latents and the features, one of them projected (feature_dim, reverse_proj of the model). adaptive_vf: it is
    weighted by the ratio of the gradients of the reconstruction loss and of itself at the encoder's last layer, times
    vf_weight; else by vf_weight. The official pp_style is reduction=mean, with a kl_weight that is as much larger as
    images have more values than half the latents.
    """

    def __init__(
        self,
        model: nn.Module,  # the autoencoder that is trained, with a projection
        foundation: nn.Module,  # frozen: images (B, C, H, W) in [-1, 1] -> features (B, D, h, w)
        discriminator: nn.Module | None = None,  # image (B, C, H, W) -> logits of patches; None: no adversarial terms
        perceptual: nn.Module | None = None,  # distance of two images (B, 1, 1, 1); None: pixels alone
        vf_weight: NonNegative = 0.1,  # of the vision foundation loss
        adaptive_vf: bool = True,  # balance its gradient with the reconstruction's at the encoder's last layer
        distmat_margin: NonNegative = 0.25,  # differences of similarities that cost nothing
        cos_margin: NonNegative = 0.5,  # cosines that are 1 - cos_margin or more cost nothing
        distmat_weight: NonNegative = 1.0,  # of the distance matrix loss
        cos_weight: NonNegative = 1.0,  # of the cosine loss
        kl_weight: NonNegative = 1e-6,  # the others as of AutoencoderObjective
        pixel_loss: Literal["l1", "l2"] = "l1",  # l1 or l2 distance of pixels
        perceptual_weight: NonNegative = 1.0,  # of the perceptual distance
        disc_weight: NonNegative = 0.5,  # of the autoencoder's adversarial term
        disc_start: Whole = 2501,  # step from which adversarial terms count
        disc_factor: NonNegative = 1.0,  # on both adversarial terms from then on
        disc_loss: DiscLoss = "hinge",  # loss of the discriminator
        gen_loss: GenLoss = "hinge",  # adversarial loss of the autoencoder
        adaptive: bool = True,  # balance the gradients of the two losses at the decoder's last layer
        logvar: float = 0.0,  # log-variance of the reconstruction's likelihood
        reduction: Reduction | None = None,  # over an image's values; None: the sum
    ):
        super().__init__(
            model,
            discriminator,
            perceptual,
            kl_weight=kl_weight,
            pixel_loss=pixel_loss,
            perceptual_weight=perceptual_weight,
            disc_weight=disc_weight,
            disc_start=disc_start,
            disc_factor=disc_factor,
            disc_loss=disc_loss,
            gen_loss=gen_loss,
            adaptive=adaptive,
            logvar=logvar,
            reduction=reduction,
        )
        if not (isinstance(model, Comparable) and model.feature_dim):
            hint = "model.name=va-vae model.feature_dim=1024, the width of DINOv2's"
            raise VgmError("the first stage has no projection between latents and features", hint, USAGE)
        self.networks = {**self.networks, "foundation": foundation}
        self.foundation = foundation
        if adaptive_vf:  # two gradients are taken before the loss's own
            self.uncompiled = ("model", *(n for n in self.uncompiled if n != "model"))
        self.vf_weight, self.adaptive_vf = vf_weight, adaptive_vf
        self.margins, self.weights = (distmat_margin, cos_margin), (distmat_weight, cos_weight)

    def alignment(self, z: Tensor, features: Tensor) -> tuple[Tensor, Logs]:
        """The vision foundation loss of latents (B, c, h, w) and features (B, D, h, w), scalar, and its two parts."""
        if z.shape[2:] != features.shape[2:]:
            (a, b), (c, d) = z.shape[2:], features.shape[2:]
            message = f"latents are {a}x{b}, the foundation model's features {c}x{d}"
            raise VgmError(message, self.same_grid(a, c), USAGE)
        z, features = self.model.compared(z, features)
        if z.shape[1] != features.shape[1]:
            wanted = f"model.feature_dim={features.shape[1] if self.model.reverse_proj else '…'}"
            raise VgmError(f"the projection makes {z.shape[1]} of {features.shape[1]} channels", wanted, USAGE)
        distance = distance_matrix_loss(z, features, self.margins[0])
        cosine = cosine_loss(z, features, self.margins[1])
        loss = self.weights[0] * distance + self.weights[1] * cosine
        return loss, {"vf_distance": distance.detach(), "vf_cosine": cosine.detach(), "vf_loss": loss.detach()}

    def same_grid(self, latents: int, features: int) -> str:
        """The setting with which latents and features, squares of so many places a side, have the same grid."""
        if isinstance(self.foundation, VisionFeatures):  # it resizes what it sees
            return f"roles.foundation.size={latents * self.foundation.vit.side}"
        hint = f"data.size={features * self.model.factor} fits it"
        if latents == 8:
            hint += ", or of colour pictures: roles.foundation.name=colour-features model.feature_dim=96"
        return hint

    def regularise(self, x: Tensor, nll: Tensor, rest: Tensor, step: Step) -> tuple[Tensor | float, Logs]:
        """The weighted vision foundation loss. rest: moments; the draw is the one that was decoded."""
        noise = self.noise(x, step, "posterior")
        assert noise is not None
        with torch.no_grad():
            features = self.foundation(x).float()
        loss, logs = self.alignment(DiagonalGaussian(rest).sample(noise), features)
        weight = loss.new_tensor(self.vf_weight)
        if self.adaptive_vf:
            weight = adaptive_weight(nll, loss, self.model.encoder.conv_out.weight, self.vf_weight, largest=1e8)
        return weight * loss, {**logs, "vf_weight": weight}
