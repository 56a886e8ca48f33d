"""Distribution matching distillation: a generator that follows the difference of two scores.

DMD (2311.18828): gradient weighting and a regression on the teacher's own ODE pairs. DMD2 (2405.14867): several
fake-score steps per generator step instead of the regression, a GAN loss on the fake score's features, few-step
generators trained on their own simulated inputs. Step order of tianweiy/DMD2@8d8fa55 main/edm/train_edm.py.
Deviations: generated images take the conditions of the data batch; times, predictions and weights follow the teacher,
whatever it was trained as (EDM's and Stable Diffusion's are the official ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Phase, Step
from vgm_cli.conditioning import Conditions
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap, level_times
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance, guided_teacher
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.losses.pseudo_huber import pseudo_huber
from vgm_cli.ranges import Fraction, NonNegative, Positive, Steps, Width, ordered

from .discriminator import Features, head_for
from .generator import denoising_times
from .losses import discriminator_loss, dm_gradient, dm_loss, fake_loss, generator_gan_loss


class DMD(ObjectiveBase):
    """Roles: model (the student) and fake_score start as copies of the teacher; the discriminator is made here.

    VgmError: the teacher cannot be guided, or parts that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,  # the student
        teacher: Denoiser,  # frozen
        fake_score: nn.Module,  # follows the student's distribution
        pairs: Mapping[str, Tensor] | None = None,  # the teacher's ODE pairs (`pairs:` node), for regression
        lpips: nn.Module | None = None,  # role of the perceptual regression
        conditions: Conditions | None = None,  # what the networks are told
        weighting: Literal["dmd2", "dmd"] = "dmd2",  # dmd2: per-image |x - D_real|; dmd: that times alpha(t)
        update_ratio: Width = 5,  # fake-score steps per generator step (DMD 1, DMD2 5 or 10)
        guidance_scale: NonNegative | None = None,  # of the teacher, which the fake score never has; None is 1
        gan_weight: NonNegative = 3e-3,  # of the GAN loss in the generator's phase; 0: no GAN
        discriminator_weight: NonNegative = 1e-2,  # of the GAN loss in the fake score's phase
        diffusion_gan: bool = True,  # the discriminator sees noisy images, else clean ones
        gan_max_level: Width = 1000,  # noisiest level that the discriminator sees, of 1000
        feature_layer: str | None = None,  # where the discriminator looks; None: the network's middle
        regression_weight: NonNegative = 0.0,  # DMD's lambda
        regression: Literal["lpips", "l2", "l1", "pseudo-huber"] = "l2",  # distance of the regression
        denoising_steps: Steps = 1,  # of the student
        backward_simulation: bool = True,  # it learns on its own intermediate images, else on noisy data
        first_time: float | None = None,  # of its first step; None: generator.denoising_times
        denoising_timestep: Width | None = None,  # its steps: spread over so many of the cleanest levels; None: all
        min_level: Fraction = 0.02,  # share of the noise levels at which distribution matching starts
        max_level: Positive = 0.98,  # share of the noise levels at which it ends
        grad_floor: NonNegative = 0.0,  # added to the weight's denominator (FastGen: 1e-6)
    ):
        ordered(min_level, max_level, "min_level, max_level")
        with torch.device("cpu"):  # numbers, also when the networks are built without memory
            times = denoising_times(teacher, denoising_steps, first_time, denoising_timestep)
            self.student = FlowMap(model, teacher, times=times)
            self.levels = level_times(teacher)
        self.fake = Denoiser.from_config(fake_score, teacher.config())
        self.real = guided_teacher(teacher, guidance_scale, conditions)
        self.networks: dict[str, nn.Module] = {"model": model, "fake_score": fake_score}
        if isinstance(teacher.network, nn.Module):
            self.networks["teacher"] = teacher.network
        self.gan = gan_weight > 0
        if self.gan:
            self.features = Features(fake_score, feature_layer)
            self.head = head_for(fake_score, self.features, self.fake, conditions or Conditions())
            self.networks["discriminator"] = self.head
        if update_ratio < 1 or not 0 <= min_level < max_level <= 1:
            raise VgmError("update_ratio >= 1 and 0 <= min_level < max_level <= 1 are needed", code=USAGE)
        if regression_weight > 0 and regression == "lpips" and lpips is None:
            raise VgmError(
                "a perceptual regression needs the role lpips",
                "roles.lpips={name: lpips, vgg: FILE, heads: FILE}, or objective.regression=l2",
                USAGE,
            )
        self.pairs, self.lpips, self.regression, self.regression_weight = pairs, lpips, regression, regression_weight
        self.weighting, self.update_ratio, self.grad_floor = weighting, update_ratio, grad_floor
        self.gan_weight, self.discriminator_weight = gan_weight, discriminator_weight
        self.diffusion_gan, self.gan_max_level = diffusion_gan, min(gan_max_level, len(self.levels))
        self.backward_simulation = backward_simulation
        n = len(self.levels)
        self.dm_range = int(min_level * n), min(int(max_level * n) + 1, n)
        self._made: dict[tuple[int, ...], Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move what is not among the networks."""
        if self.lpips is not None:
            self.lpips.to(device)

    def phases(self) -> list[Phase]:
        """The generator every update_ratio-th step, the fake score and the discriminator at every step."""
        guides = ("fake_score", "discriminator") if self.gan else ("fake_score",)
        return [
            Phase("generator", ("model",), "main", every=self.update_ratio),
            Phase("guidance", guides, "fake"),
        ]

    def at(self, level: Tensor) -> Tensor:
        """Host times (B,) float64 of noise levels given by number (B,)."""
        self.levels = self.levels.to(level.device)  # copied once
        return self.levels[level]

    # -- the generator's images ---------------------------------------------------------------------------------------

    def generate(self, batch: Batch, step: Step) -> Tensor:
        """Images (B, C, H, W) of this step; differentiable where the caller's context is."""
        x, cond = batch["x"], batch.get("cond", {})
        z = step.randn(x.shape, "z") * self.student.noise_scale()
        times = self.student.times_of()
        if len(times) == 1:
            return self.student.jump(z, times[0], **cond)
        # one step number for all items and processes
        k = int(torch.randint(len(times), (1,), generator=step.generator("denoising step")))
        if k == 0:
            return self.student.jump(z, times[0], **cond)
        if self.backward_simulation:
            draws = iter(range(k))
            with torch.no_grad():
                first, noise = times[:k], lambda: step.randn(x.shape, f"simulation {next(draws)}")
                x = self.student.along(z, first, noise, **cond)
            torch.clear_autocast_cache()  # it holds half-precision weights that no gradient flows through
        x_t = self.student.renoise(x, times[k], step.randn(x.shape, "renoise"))
        return self.student.jump(x_t, times[k], **cond)

    # -- phases --------------------------------------------------------------------------------------------------------

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the networks. The guidance phase sees the images of the generator
        phase."""
        key = (step.index, step.rank, step.world, step.micro, step.micros)
        if phase == "generator":
            x = self.generate(batch, step)
            self._made[key] = x.detach()
            return self.generator_loss(x, batch, step)
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = self.generate(batch, step)
        return self.guidance_loss(self._made.pop(key), batch, step)

    def generator_loss(self, x: Tensor, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Distribution matching, GAN and regression losses of generated images x (B, C, H, W)."""
        cond = batch.get("cond", {})
        if isinstance(self.real, ClassifierFreeGuidance):
            self.real.null = batch.get("null")
        low, high = self.dm_range
        t = self.at(low + step.randint(high - low, len(x), "dm level"))
        with torch.no_grad(), self.fake.precision(x.device):
            x_t = self.student.path.add_noise(x, step.randn(x.shape, "dm noise"), t)
            real, fake = (view.predict(x_t, t, "x0", **cond).float() for view in (self.real, self.fake))
            scale = self.student.path.alpha(t) if self.weighting == "dmd" else None
            gradient = dm_gradient(x.float(), real, fake, self.grad_floor, scale)
        loss = dm_loss(x.float(), gradient)
        logs = {"dm": loss.detach(), "dm_gradient": gradient.square().mean().sqrt()}
        if self.gan:
            gan = generator_gan_loss(self.logits(x, cond, step, "generator"))
            loss, logs["gan"] = loss + self.gan_weight * gan, gan.detach()
        if self.regression_weight > 0:
            regression = self.regression_loss(len(x), step)
            loss, logs["regression"] = loss + self.regression_weight * regression, regression.detach()
        return loss, logs

    def guidance_loss(self, x: Tensor, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising loss of the fake score on x (B, C, H, W), and the discriminator's between batch["x"] and x."""
        cond = batch.get("cond", {})
        t = self.at(step.randint(len(self.levels), len(x), "fake level"))
        loss = fake_loss(self.fake, x, t, step.randn(x.shape, "fake noise"), **cond)
        logs = {"fake": loss.detach()}
        if self.gan:
            real = self.logits(batch["x"], cond, step, "real")
            fake = self.logits(x, cond, step, "fake")
            gan = discriminator_loss(real, fake)
            loss = loss + self.discriminator_weight * gan
            logs |= {"discriminator": gan.detach(), "margin": (real - fake).detach().mean()}
        return loss, logs

    def logits(self, x: Tensor, cond: dict[str, Tensor], step: Step, name: str) -> Tensor:
        """The discriminator's logits of images x (B, C, H, W), noised first: (B, 1). name: of the random draws."""
        if self.diffusion_gan:
            t = self.at(step.randint(self.gan_max_level, len(x), f"gan level {name}"))
            x = self.student.path.add_noise(x, step.randn(x.shape, f"gan noise {name}"), t)
        else:
            t = self.at(torch.zeros(len(x), dtype=torch.long, device=x.device))
        return self.head(self.features(self.fake, x, t, **cond).float())

    def regression_loss(self, n: int, step: Step) -> Tensor:
        """Distance of the student's images from the teacher's at the same noise, over n stored pairs drawn for this
        step: a scalar.

        self.pairs holds the noise z (P, C, H, W), the teacher's images x (P, C, H, W), and the conditions of each.
        """
        if self.pairs is None:
            raise VgmError("the regression has no ODE pairs", "`vgm distill dmd --teacher RUN` makes them", USAGE)
        rows = step.randint(len(self.pairs["z"]), n, "pairs").to(self.pairs["z"].device)
        cond = {k: v[rows].to(step.device) for k, v in self.pairs.items()}
        z, want = cond.pop("z"), cond.pop("x")
        got = self.student.jump(z * self.student.noise_scale(), self.student.start(), **cond).float()
        return distance(self.regression, got, want, self.lpips)

    def view(self) -> dict[str, Any]:
        return self.student.view()


def distance(kind: str, a: Tensor, b: Tensor, lpips: nn.Module | None = None) -> Tensor:
    """Mean distance of image batches (B, C, H, W) in [-1, 1]."""
    if kind == "l1":
        return F.l1_loss(a, b)
    if kind == "l2":
        return F.mse_loss(a, b)
    if kind == "pseudo-huber":
        return pseudo_huber(a, b).mean() / a[0].numel() ** 0.5
    assert lpips is not None
    if a.shape[-1] < 64:  # five halvings leave nothing of smaller ones
        a, b = (F.interpolate(v, size=224, mode="bilinear") for v in (a, b))
    return lpips(a, b).mean()
