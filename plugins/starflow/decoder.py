"""A first stage's decoder is trained to see through noise in its latents, so that samples of a flow need no denoising.

Gu et al. 2025 (arXiv 2506.06276), sec. 3.4. Official code: apple/ml-starflow@e565a46 finetune_decoder.py,
misc/ae_losses.py, misc/discriminator.py. Deviations: the perceptual distance is LPIPS alone (officially plus a tenth of
the squared error of ConvNeXt-S logits); only the decoder and the convolution before it are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Phase, Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.losses.adversarial import discriminator_loss, generator_loss
from vgm_cli.nn.collectives import average
from vgm_cli.nn.example import noise
from vgm_cli.ranges import Depth, Fraction, NonNegative, Width

TAPS = {3: (1, 2, 1), 4: (1, 3, 3, 1), 5: (1, 4, 6, 4, 1)}
Logs = dict[str, Tensor]


class Blur(nn.Module):
    """A binomial filter at every second pixel: (B, C, H, W) -> half the sides, rounded up. The border is padded as for
    four taps, whatever their number, as in the official code."""

    kernel: Tensor

    def __init__(self, taps: int):
        super().__init__()
        row = torch.tensor(TAPS[taps], dtype=torch.float32)
        kernel = row[:, None] * row
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        pads = [(-side % 2) + 2 for side in (x.shape[3], x.shape[2])]
        x = F.pad(x, [p for pad in pads for p in (pad // 2, pad - pad // 2)])
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


class BlurDiscriminator(nn.Module):
    """Real or generated, for 16 by 16 places: images (B, in_channels, H, W) in [0, 1] -> logits (B, 1, 16, 16).

    VgmError: a filter that there is not, widths that 32 groups do not divide.
    """

    def __init__(
        self,
        in_channels: Width = 3,
        hidden_channels: Width = 128,
        num_stages: Depth = 3,
        blur_resample: bool = True,
        blur_kernel_size: int = 4,
    ):
        super().__init__()
        if blur_kernel_size not in TAPS:
            raise VgmError(f"blur_kernel_size={blur_kernel_size} is none of {', '.join(map(str, TAPS))}", code=USAGE)
        if hidden_channels % 32:
            raise VgmError(f"hidden_channels={hidden_channels} is no multiple of 32", code=USAGE)
        self.block_in = nn.Sequential(nn.Conv2d(in_channels, hidden_channels, 5, padding=2), nn.LeakyReLU(0.1))
        blocks: list[nn.Module] = []
        width = hidden_channels
        for i in range(num_stages):
            wider = hidden_channels * 2**i
            half = Blur(blur_kernel_size) if blur_resample else nn.AvgPool2d(2)
            blocks.append(nn.Conv2d(width, wider, 3, padding=1))
            blocks.append(nn.Sequential(half, nn.GroupNorm(32, wider), nn.LeakyReLU(0.1)))
            width = wider
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.AdaptiveMaxPool2d(16)
        self.to_logits = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 1, 5, padding=2))

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, config["in_channels"], 32, 32)}

    def forward(self, x: Tensor) -> Tensor:
        h = self.block_in(x)
        for block in self.blocks:
            h = block(h)
        return self.to_logits(self.pool(h))


def lecam(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """Tseng et al. 2021 (arXiv 2104.03310): the mean logits of this batch, held near the running means of the other
    kind. real, fake: logits; mean_real, mean_fake: running means, (1,). -> a number."""
    return (F.relu(real.mean() - mean_fake).square() + F.relu(mean_real - fake.mean()).square()).mean()


class DecoderObjective(ObjectiveBase):
    """batch x: (B, C, H, W) in [-1, 1], encoded, noised, decoded. Losses are of images in [0, 1].

    The running means that LeCam needs move after a step, by what the discriminator said in it, and are kept with the
    run.
    """

    model: Any  # a first stage: its methods are more than nn.Module's

    def __init__(
        self,
        model: nn.Module,  # the first stage whose decoder is trained
        discriminator: nn.Module | None = None,  # images in [0, 1] -> logits; None: no adversarial terms
        perceptual: nn.Module | None = None,  # distance of two images in [-1, 1]; None: pixels alone
        noise_std: NonNegative = 0.3,  # deviation of the noise in the latents
        pixel_loss: Literal["l1", "l2"] = "l2",  # distance of pixels
        perceptual_weight: NonNegative = 1.0,  # of the perceptual distance
        disc_weight: NonNegative = 0.1,  # of the decoder's adversarial term
        lecam_weight: NonNegative = 0.001,  # of the discriminator's regularisation; 0: none
        lecam_decay: Fraction = 0.999,  # of its running means
    ):
        self.model, self.discriminator, self.perceptual = model, discriminator, perceptual
        roles = {"model": model, "discriminator": discriminator, "perceptual": perceptual}
        self.networks = {role: network for role, network in roles.items() if network is not None}
        self.noise_std, self.pixel_loss = noise_std, pixel_loss
        self.perceptual_weight, self.disc_weight = perceptual_weight, disc_weight
        self.lecam_weight, self.lecam_decay = lecam_weight, lecam_decay
        self.means = {"real": torch.zeros(1), "fake": torch.zeros(1)}
        self.seen: list[Tensor] = []  # mean logits (real, fake) of this step's micro-batches

    def phases(self) -> list[Phase]:
        phases = [Phase("decoder", trains=("model.decoder", "model.post_quant_conv"))]
        if self.discriminator is not None:
            phases.append(Phase("discriminator", trains=("discriminator",), optimizer="discriminator"))
        return phases

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, Logs]:
        x = batch["x"]
        with torch.no_grad():
            moments = self.model.encode(x)
            shape = (len(x), *self.model.latent_shape(tuple(x.shape[1:])))
            z = self.model.latents(moments, step.randn(shape, "posterior"))
            z = z + self.noise_std * step.randn(shape, "noise")
        if phase == "decoder":
            recon = self.model.decode(z).float()
            return self.decoder_loss((x + 1) / 2, (recon + 1) / 2, self.distance(x, recon))
        with torch.no_grad():
            recon = self.model.decode(z).float()
        return self.discriminate((x + 1) / 2, (recon + 1) / 2)

    def distance(self, x: Tensor, recon: Tensor) -> Tensor:
        return x.new_zeros(()) if self.perceptual is None else self.perceptual(x, recon).mean()

    def decoder_loss(self, x: Tensor, recon: Tensor, distance: Tensor) -> tuple[Tensor, Logs]:
        """x, recon: images in [0, 1]; distance: their perceptual one, a number."""
        rec = (F.l1_loss if self.pixel_loss == "l1" else F.mse_loss)(recon, x)
        loss = rec + self.perceptual_weight * distance
        logs = {"rec_loss": rec.detach(), "p_loss": distance.detach()}
        if self.discriminator is not None and self.disc_weight:
            g_loss = generator_loss(self.discriminator(recon))
            loss = loss + self.disc_weight * g_loss
            logs["g_loss"] = g_loss.detach()
        return loss, logs

    def discriminate(self, x: Tensor, recon: Tensor) -> tuple[Tensor, Logs]:
        """The discriminator's loss of images in [0, 1]."""
        network: Callable[[Tensor], Tensor] | None = self.discriminator
        assert network is not None
        real, fake = network(x).float(), network(recon.detach()).float()
        loss = discriminator_loss("hinge", real, fake)
        logs = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        if self.lecam_weight:
            term = lecam(real, fake, *(m.to(real.device) for m in self.means.values()))
            loss = loss + self.lecam_weight * term
            logs["lecam"] = term.detach()
            self.seen.append(torch.stack(list(logs.values())[:2]))
        return loss, logs

    def after_step(self, step: Step) -> None:
        """Move the running means towards this step's mean logits, of all processes."""
        if self.seen:
            now = average(torch.stack(self.seen).mean(0)).cpu()
            for mean, value in zip(self.means.values(), now):
                mean.lerp_(value, 1 - self.lecam_decay)
            self.seen = []

    def view(self) -> dict[str, Any]:
        return {"name": "codec"}

    def state_dict(self) -> dict[str, Tensor]:
        return {f"mean_{name}": value for name, value in self.means.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.means.items():
            value.copy_(state[f"mean_{name}"])
