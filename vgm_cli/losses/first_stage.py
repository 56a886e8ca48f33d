"""Training of first stages: pixels + perceptual distance + regularisation + patch adversarial loss.

VQGAN: Esser et al. 2021 (arXiv 2012.09841), eq. 4 to 7; official code CompVis/taming-transformers@3ba01b2
taming/modules/losses/vqperceptual.py. LDM: Rombach et al. 2022 (arXiv 2112.10752), sec. 3.1 and app. G, eq. 25;
CompVis/latent-diffusion@a506df5 ldm/modules/losses/{contperceptual,vqperceptual}.py. LlamaGen's tokenizer: Sun et al.
2024 (arXiv 2406.06525); FoundationVision/LlamaGen@ce98ec4 tokenizer/tokenizer_image/vq_loss.py.
Deviations: before disc_start the discriminator is not evaluated (officially its terms are multiplied by zero); the
log-variance of the reconstruction, which no official optimizer trains, is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Phase, Step, Tokenizer
from vgm_cli.losses.adversarial import DiscLoss, GenLoss, adaptive_weight, discriminator_loss, generator_loss
from vgm_cli.nets.first_stage import DiagonalGaussian
from vgm_cli.nn import augment as change
from vgm_cli.nn.gumbel import warmup_cosine
from vgm_cli.nn.quantize import code_usage, recent_usage
from vgm_cli.ranges import Fraction, NonNegative, Whole

Reduction = Literal["sum", "mean"]
Perceptual = Callable[[Tensor, Tensor], Tensor]
Logs = dict[str, Tensor]


def reconstruction_loss(
    x: Tensor,
    recon: Tensor,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    pixel_loss: Literal["l1", "l2"] = "l1",
    logvar: float = 0.0,
    reduction: Reduction = "sum",
) -> tuple[Tensor, Logs]:
    """Negative log-likelihood of x (B, C, H, W) under a Laplacian (or Gaussian) around recon, up to a constant.

    perceptual(x, recon): (B, 1, 1, 1), added to every pixel. reduction: "sum" over an image, "mean" over its values;
    both average over the batch.
    """
    rec = (x - recon).abs() if pixel_loss == "l1" else (x - recon).square()
    logs: Logs = {}
    if perceptual is not None and perceptual_weight > 0:
        distance = perceptual(x, recon)
        rec = rec + perceptual_weight * distance
        logs["p_loss"] = distance.detach().mean()
    nll = rec / math.exp(logvar) + logvar
    nll = nll.sum() / len(nll) if reduction == "sum" else nll.mean()
    return nll, {**logs, "rec_loss": rec.detach().mean(), "nll_loss": nll.detach()}


def with_condition(x: Tensor, cond: Tensor | None) -> Tensor:
    """The input of a conditional discriminator: the image's channels, followed by those of cond (B, c, H, W)."""
    return x if cond is None else torch.cat([x, cond], dim=1)


def generator_term(
    discriminator: Callable[[Tensor], Tensor],
    recon: Tensor,
    nll: Tensor,
    last_layer: Tensor,
    disc_weight: float,
    cond: Tensor | None = None,
    adaptive: bool = True,
    gen_loss: GenLoss = "hinge",
) -> tuple[Tensor, Logs]:
    """The adversarial part of the autoencoder's loss, a scalar, and what to log. adaptive: weighted by the ratio of
    the gradients of nll and of this loss at last_layer (see adaptive_weight)."""
    g_loss = generator_loss(discriminator(with_condition(recon, cond)), gen_loss)
    if not adaptive:
        return disc_weight * g_loss, {"g_loss": g_loss.detach()}
    d_weight = adaptive_weight(nll, g_loss, last_layer, disc_weight)
    return d_weight * g_loss, {"g_loss": g_loss.detach(), "d_weight": d_weight}


def discriminator_term(
    discriminator: Callable[[Tensor], Tensor],
    x: Tensor,
    recon: Tensor,
    disc_loss: DiscLoss = "hinge",
    cond: Tensor | None = None,
) -> tuple[Tensor, Logs]:
    """Loss of the discriminator; real and generated images are separate batches, as their batch norms must be."""
    real = discriminator(with_condition(x.detach(), cond))
    fake = discriminator(with_condition(recon.detach(), cond))
    loss = discriminator_loss(disc_loss, real, fake)
    return loss, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}


class AutoencoderObjective(ObjectiveBase):
    """Trains AutoencoderKL or VQModel, and a patch discriminator where there is one (Esser et al. 2021, Rombach et al.
    2022).

    Adversarial terms count from step disc_start on. Then the autoencoder's has the weight disc_weight times, where
    adaptive, the ratio of the two losses' gradients at the last layer. The published reduction is "sum" over an image
    for KL, which makes losses about 2e5 times those per pixel (hence learning rates near 1e-6), and "mean" for VQ. A
    "mean" KL objective is the "sum" one divided by the number of values of an image, so that kl_weight keeps its
    meaning.
    """

    RECENT = 65536  # code numbers over which usage is counted
    model: Any  # a first stage: its methods are more than nn.Module's

    def __init__(
        self,
        model: nn.Module,  # the first stage that is trained
        discriminator: nn.Module | None = None,  # image (B, C, H, W) -> logits of patches; None: no adversarial terms
        perceptual: nn.Module | None = None,  # distance of two images (B, 1, 1, 1); None: pixels alone
        kl_weight: NonNegative = 1e-6,  # of the KL divergence (AutoencoderKL)
        codebook_weight: NonNegative = 1.0,  # of the quantizer's own loss (VQModel)
        pixel_loss: Literal["l1", "l2"] = "l1",  # l1 or l2 distance of pixels
        perceptual_weight: NonNegative = 1.0,  # of the perceptual distance
        disc_weight: NonNegative = 0.5,  # of the autoencoder's adversarial term
        disc_start: Whole = 50001,  # step from which adversarial terms count
        disc_factor: NonNegative = 1.0,  # on both adversarial terms from then on
        disc_loss: DiscLoss = "hinge",  # loss of the discriminator
        gen_loss: GenLoss = "hinge",  # adversarial loss of the autoencoder
        adaptive: bool = True,  # balance the gradients of the two losses at the last layer
        logvar: float = 0.0,  # log-variance of the reconstruction's likelihood
        reduction: Reduction | None = None,  # over an image's values; None: the published one
        temperature: dict[str, float] | None = None,  # of a Gumbel quantizer: keywords of `warmup_cosine`
        place_codes: bool = False,  # start the codebook at latents of the first batch; false: as published
        augment: Fraction = 0.0,  # share of the images that are moved and get other colours, for small sets
    ):
        self.model, self.discriminator, self.perceptual = model, discriminator, perceptual
        roles = {"model": model, "discriminator": discriminator, "perceptual": perceptual}
        self.networks = {role: network for role, network in roles.items() if network is not None}
        self.variational = not isinstance(model, Tokenizer)
        self.kl_weight, self.codebook_weight = kl_weight, codebook_weight
        self.disc_weight, self.disc_start = disc_weight, disc_start
        self.disc_factor, self.disc_loss = disc_factor, disc_loss
        self.gen_loss, self.adaptive = gen_loss, adaptive
        if (
            adaptive and discriminator is not None
        ):  # its weight is a ratio of two gradients, taken before the loss's own
            self.uncompiled = ("model", "discriminator")
        self.temperature, self.place_codes, self.augment = temperature, place_codes, augment
        self.prepare_size = 32 if place_codes else None  # the same images on every process
        self.recent = None if self.variational else torch.zeros(self.RECENT, dtype=torch.int32, device="cpu")
        self.reduction: Reduction = reduction or ("sum" if self.variational else "mean")
        self.options: dict[str, Any] = {
            "perceptual_weight": perceptual_weight,
            "pixel_loss": pixel_loss,
            "logvar": logvar,
            "reduction": self.reduction,
        }

    def phases(self) -> list[Phase]:
        phases = [Phase("autoencoder", trains=("model",))]
        if self.discriminator is not None:
            phases.append(Phase("discriminator", trains=("discriminator",), optimizer="discriminator"))
        return phases

    def prepare(self, first_batch: Batch, step: Step) -> None:
        if self.place_codes and not self.variational:
            with torch.no_grad():
                self.model.quantize.place(self.model.moments(first_batch["x"]))

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, Logs]:
        """batch x: (B, C, H, W) in [-1, 1]."""
        x = self.changed(batch["x"], step) if self.augment else batch["x"]
        if phase == "autoencoder":
            return self.autoencoder(x, step)
        return self.discriminate(x, step)

    def changed(self, x: Tensor, step: Step) -> Tensor:
        """Images of which a share are moved and, where they have three channels, recoloured."""
        n = len(x)
        moved = change.move(x, step.rand((n, change.MOVE), "move"), scale=0.25)
        if x.shape[1] == 3:
            moved = change.recolour(moved, step.rand((n, change.RECOLOUR), "recolour"), amount=0.6)
        return torch.where((step.rand(n, "augment") < self.augment)[:, None, None, None], moved, x)

    def noise(self, x: Tensor, step: Step, draw: str) -> Tensor | None:
        """Draws for one reconstruction: normal for a posterior, exponential for a Gumbel quantizer, None where there
        is no noise."""
        shape = self.model.latent_shape(tuple(x.shape[1:]))
        if self.variational:
            return step.randn((len(x), *shape), draw)
        if not self.model.stochastic:
            return None
        pair = step.randn((len(x), 2, self.model.codebook_size, *shape[1:]), draw)
        return pair.square().sum(1) / 2  # half a chi-squared of two degrees is exponential

    def reconstruct(self, x: Tensor, step: Step, draw: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reconstruction, moments (KL) or quantizer's loss (VQ), and the code numbers of VQ."""
        if self.temperature is not None:
            self.model.quantize.temperature = warmup_cosine(step.index, **self.temperature)  # type: ignore[arg-type]
        recon, rest, *indices = self.model(x, self.noise(x, step, draw))
        return recon.float(), rest.float(), indices[0] if indices else None

    def autoencoder(self, x: Tensor, step: Step) -> tuple[Tensor, Logs]:
        recon, rest, indices = self.reconstruct(x, step, "posterior")
        nll, logs = reconstruction_loss(x, recon, self.perceptual, **self.options)
        if self.variational:
            kl = DiagonalGaussian(rest).kl().mean()
            loss = nll + self.kl_weight * (kl if self.reduction == "sum" else kl / x[0].numel())
            logs["kl_loss"] = kl.detach()
        else:
            loss = nll + self.codebook_weight * rest
            logs |= {"quant_loss": rest.detach(), **self.usage(indices)}
        more, own = self.regularise(x, nll, rest, step)
        loss, logs = loss + more, logs | own
        if self.discriminator is not None and self.disc_factor > 0 and step.index >= self.disc_start:
            term, own = generator_term(
                self.discriminator,
                recon,
                nll,
                self.model.last_layer,
                self.disc_weight,
                adaptive=self.adaptive,
                gen_loss=self.gen_loss,
            )
            loss = loss + self.disc_factor * term
            logs |= own
        return loss, logs

    def regularise(self, x: Tensor, nll: Tensor, rest: Tensor, step: Step) -> tuple[Tensor | float, Logs]:
        """A further term of the autoencoder's loss, and what to log of it; here none. x: (B, C, H, W) images; nll:
        their reconstruction loss; rest: the moments, or the quantizer's loss."""
        return 0.0, {}

    def usage(self, indices: Tensor | None) -> Logs:
        """How a batch uses the codebook, and the share of codes among the last RECENT."""
        if indices is None or indices.is_meta or self.recent is None:
            return {}
        n = self.model.codebook_size
        recent = recent_usage(self.recent, indices.cpu(), n)
        return {**code_usage(indices, n), "codebook_usage": torch.tensor(recent)}

    def discriminate(self, x: Tensor, step: Step) -> tuple[Tensor, Logs]:
        assert self.discriminator is not None
        if step.index < self.disc_start:  # zero gradients for every weight, without evaluating anything
            return 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum(), {}
        with torch.no_grad():
            recon, *_ = self.reconstruct(x, step, "posterior of the discriminator's images")
        loss, logs = discriminator_term(self.discriminator, x, recon, self.disc_loss)
        return self.disc_factor * loss, logs

    def view(self) -> dict[str, Any]:
        return {"name": "codec"}

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.recent is None else {"recent": self.recent}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.recent is not None and "recent" in state:
            self.recent.copy_(state["recent"])
