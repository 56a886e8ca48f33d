"""Adversarial diffusion distillation: a student of one to four steps, held to the data by a discriminator on a frozen
network's features and to its teacher by score distillation.

Sauer et al. 2023 (2311.17042), sec. 3; SDXL-Turbo and SD-Turbo. There is no official training code: the discriminator
is StyleGAN-T's, the rest is after the equations. What the paper leaves open is listed in docs/papers/add.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Phase, Step
from vgm_cli.conditioning import Conditions, unconditional
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap, level_times
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance, check_null
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.foundation import ShowsLevels
from vgm_cli.nn.precision import full_precision
from vgm_cli.ranges import Fraction, NonNegative, Steps, Whole, Width

from .augment import DiffAugment
from .condition import HeadCondition, Told
from .discriminator import Heads
from .losses import (
    Reduction,
    Weighting,
    distance,
    feature_penalty,
    generator_loss,
    hinge_losses,
    nfsd_gradient,
    preserving,
    student_input,
    student_levels,
    surrogate,
    target_weight,
    teacher_target,
)

LEVELS = 1000  # noise levels in which the student's times are given
NEGATIVE = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"  # NFSD's
)
Logs = dict[str, Tensor]


class Made(NamedTuple):
    """What the student made of a batch, and what the heads are told of it."""

    x: Tensor  # as the model sees it, (B, c, h, w)
    pixels: Tensor  # decoded, (B, C, H, W)
    real: Tensor  # the batch, decoded
    told: Tensor | None  # (B, width)


class ADD(ObjectiveBase):
    """Roles: model (the student, a copy of the teacher), teacher, features (what the discriminator looks through); the
    discriminator's heads are made here. Behind a codec the student's images are decoded with gradients.

    VgmError: features that show no levels, a teacher that cannot be guided, times that do not descend.
    """

    uncompiled = ("discriminator",)  # its penalty is differentiated twice

    def __init__(
        self,
        model: nn.Module,  # the student
        teacher: Denoiser,  # frozen
        features: Any = None,  # a frozen ShowsLevels; needed where adversarial_weight is above 0
        codec: Any = None,  # the recipe's; None: the model sees pixels
        conditions: Conditions | None = None,  # what the networks are told
        levels: tuple[Whole, ...] = (999, 749, 499, 249),  # the student's times, of 1000 noise levels, noise first
        zero_terminal_snr: bool = True,  # the student's first input is pure noise, also where the teacher's is not
        adversarial_weight: NonNegative = 1.0,  # of the discriminator in the student's loss; 0: none is trained
        distillation_weight: NonNegative = 2.5,  # lambda, of the teacher in the student's loss; 0: it is not asked
        weighting: Weighting = "exponential",  # of teacher targets; sds: score distillation, nfsd: noise-free
        distance_in: Literal["pixels", "latents"] = "pixels",  # where student and target are compared
        reduction: Reduction = "mean",  # over the values of an image; the paper's norm is a sum
        teacher_steps: Steps = 1,  # of the teacher for a target
        guidance_scale: NonNegative | None = None,  # of the teacher's targets; None is 1
        nfsd_scale: NonNegative = 7.5,  # of nfsd: weight of the condition's direction
        nfsd_threshold: Fraction = 0.2,  # of nfsd: share of the noise levels below which no negative prompt is used
        negative: str = NEGATIVE,  # of nfsd: the negative prompt, of networks that read texts
        r1_gamma: NonNegative = 1e-5,  # of the penalty on gradients at the heads' inputs
        head_condition: Told = "both",  # what heads are told: text (whatever the student is told), image
        head_width: Width = 64,  # of the space in which heads meet their condition
        augment: str = "color,translation,cutout",  # of what the discriminator sees; "": nothing
        crop_probability: Fraction = 0.5,  # that images larger than the features' are cropped instead of resized
        update_ratio: Width = 1,  # discriminator steps for a step of the student
    ):
        self.pure, self.adversarial_weight = zero_terminal_snr, adversarial_weight
        with torch.device("cpu"):  # numbers, also when the networks are built without memory
            view = for_student(teacher, zero_terminal_snr)
            times = student_times(Denoiser.from_config(model, view), levels)
            self.student = FlowMap(model, view, times=times, guided=True)
            self.times = torch.tensor(times, dtype=torch.float64)
            self.teacher_levels = level_times(teacher)
        self.conditions, self.codec = conditions or Conditions(), codec
        guided = guidance_scale not in (None, 1.0) and weighting != "nfsd"
        self.teacher = teacher
        self.target = ClassifierFreeGuidance(teacher, guidance_scale, null={}) if guided else teacher  # type: ignore[arg-type]
        if (guided or weighting == "nfsd") and not self.conditions.on("text"):
            check_null(teacher.network)
        self.networks: dict[str, nn.Module] = {"model": model}
        if isinstance(teacher.network, nn.Module):
            self.networks["teacher"] = teacher.network
        if adversarial_weight:
            if not isinstance(features, ShowsLevels):
                hint = "roles.features={name: digit-features}, or {name: vision-features, file: FILE}"
                raise VgmError("the discriminator needs a network that shows several levels", hint, USAGE)
            self.features, self.told = features, HeadCondition(head_condition, self.conditions, features)
            self.heads = Heads(tuple(features.channels), self.told.width, head_width)
            self.networks |= {"discriminator": self.heads}
            if isinstance(features, nn.Module):
                self.networks["features"] = features
        self.distillation_weight, self.weighting, self.teacher_steps = distillation_weight, weighting, teacher_steps
        self.distance_in, self.reduction = distance_in, reduction
        self.nfsd_scale, self.nfsd_threshold, self.negative = nfsd_scale, nfsd_threshold, negative
        self.r1_gamma, self.update_ratio = r1_gamma, update_ratio
        self.augment, self.crop_probability = DiffAugment(augment), crop_probability
        self._made: dict[tuple[int, ...], Made] = {}

    def phases(self) -> list[Phase]:
        """The student every update_ratio-th step, the discriminator at every step, on the same images."""
        student = Phase("generator", ("model",), "main", every=self.update_ratio if self.adversarial_weight else 1)
        return [student, *[Phase("discriminator", ("discriminator",), "discriminator")] * bool(self.adversarial_weight)]

    # -- the student's images ------------------------------------------------------------------------------------------

    def decode(self, x: Tensor) -> Tensor:
        """What the model sees -> pixels (B, C, H, W), differentiable where the caller's context is."""
        return x if self.codec is None else self.codec.decode(x)

    def make(self, batch: Batch, step: Step) -> Made:
        """The student's images of this step: one jump from noised data at one of its times."""
        x0, cond = batch["x"], batch.get("cond", {})
        k = step.randint(len(self.times), len(x0), "student time")
        self.times = self.times.to(x0.device)  # copied once
        s = self.times[k]
        x_s = student_input(self.student, x0, step.randn(x0.shape, "student noise"), s, self.pure)
        x = self.student.jump(x_s, s, **cond).float()
        if not self.adversarial_weight:
            return Made(x, self.decode(x) if self.in_pixels else x, x0, None)
        with torch.no_grad():
            real = self.decode(x0)
            told = self.told(cond, real, student_levels(self.student, s, self.pure)[0] > 0)
        return Made(x, self.decode(x), real, told)

    @property
    def in_pixels(self) -> bool:
        """Whether the student and its targets are compared after decoding."""
        return self.distance_in == "pixels" and self.weighting != "nfsd" and self.distillation_weight > 0

    # -- phases --------------------------------------------------------------------------------------------------------

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, Logs]:
        """batch x: (B, C, H, W), cond: keywords of the networks. The discriminator's phase sees the images of the
        student's."""
        key = (step.index, step.rank, step.world, step.micro, step.micros)
        if phase == "generator":
            made = self.make(batch, step)
            if self.adversarial_weight:
                self._made[key] = Made(made.x.detach(), made.pixels.detach(), made.real, made.told)
            return self.student_loss(made, batch, step)
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = self.make(batch, step)
        return self.discriminator_loss(self._made.pop(key), step)

    def student_loss(self, made: Made, batch: Batch, step: Step) -> tuple[Tensor, Logs]:
        """The adversarial term plus lambda times the distillation."""
        logs: Logs = {}
        loss = made.x.new_zeros(())
        if self.adversarial_weight:
            adversarial = generator_loss(self.logits(made.pixels, made.told, step, "student")[0])
            loss, logs["adversarial"] = loss + self.adversarial_weight * adversarial, adversarial.detach()
        if self.distillation_weight:
            distillation = self.distillation_loss(made, batch, step)
            loss, logs["distillation"] = loss + self.distillation_weight * distillation, distillation.detach()
        return loss, logs

    def discriminator_loss(self, made: Made, step: Step) -> tuple[Tensor, Logs]:
        """Hinge losses of all heads, and the penalty on the features of real images."""
        fake, _ = self.logits(made.pixels, made.told, step, "fake")
        real, seen = self.logits(made.real, made.told, step, "real", penalised=self.r1_gamma > 0)
        of_real, of_fake = hinge_losses(real, fake)
        loss, logs = of_real + of_fake, {"hinge_real": of_real.detach(), "hinge_fake": of_fake.detach()}
        if self.r1_gamma:
            penalty = feature_penalty(real, seen)
            loss, logs["r1"] = loss + self.r1_gamma * penalty, penalty.detach()
        means = {
            name: torch.stack([x.detach().mean() for x in of]).mean() for name, of in (("real", real), ("fake", fake))
        }
        return loss, logs | {f"logits_{name}": value for name, value in means.items()}

    def logits(
        self, pixels: Tensor, told: Tensor | None, step: Step, name: str, penalised: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The heads' logits of images (B, C, H, W), augmented first, and what the heads saw. name: of the random draws.
        penalised: what they saw requires gradients, and the images receive none."""
        if self.augment.draws:
            pixels = self.augment(pixels, step.rand((len(pixels), self.augment.draws), f"augment {name}"))
        levels = [level.float() for level in self.features.levels(self.cropped(pixels, step, name))]
        if penalised:
            levels = [level.detach().requires_grad_() for level in levels]
        with full_precision(pixels.device):
            return self.heads.logits(levels, told), levels

    def cropped(self, pixels: Tensor, step: Step, name: str) -> Tensor:
        """With crop_probability, a random part of larger images, of the size that the features have; one draw for the
        whole batch."""
        side, (h, w) = self.features.side, pixels.shape[2:]
        if side is None or min(h, w) <= side or not self.crop_probability:
            return pixels
        drawn, top, left = torch.rand(3, generator=step.generator(f"crop {name}"), device="cpu").tolist()
        if drawn >= self.crop_probability:
            return pixels
        i, j = int(top * (h - side + 1)), int(left * (w - side + 1))
        return pixels[:, :, i : i + side, j : j + side]

    # -- distillation --------------------------------------------------------------------------------------------------

    def distillation_loss(self, made: Made, batch: Batch, step: Step) -> Tensor:
        """How far the student's images are from what the teacher makes of them after noise was added. The gradient
        reaches them as they were before, the teacher receives none."""
        x, path = made.x, self.teacher.path
        level = step.randint(len(self.teacher_levels), len(x), "teacher level")
        self.teacher_levels = self.teacher_levels.to(x.device)  # copied once
        t = self.teacher_levels[level]
        x_t = path.add_noise(x.detach(), step.randn(x.shape, "teacher noise"), t)
        alpha, sigma = preserving(path, t)
        if self.weighting == "nfsd":
            low = level < self.nfsd_threshold * len(self.teacher_levels)
            gradient, *_ = nfsd_gradient(*self.estimates(x_t, t, batch), low, sigma**2, self.nfsd_scale)
            return surrogate(gradient, x, self.reduction).mean()
        target = self.target_of(x_t, t, batch)
        errors = distance(made.pixels if self.in_pixels else x, target, self.reduction)
        return (target_weight(self.weighting, alpha, sigma).to(errors.dtype) * errors).mean()

    @torch.no_grad()
    def target_of(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """The teacher's image of x_t (B, c, h, w) at host times t (B,), decoded where student and target are compared
        in pixels."""
        if isinstance(self.target, ClassifierFreeGuidance):
            self.target.null = batch.get("null")
        with self.teacher.precision(x_t.device):
            x0 = teacher_target(self.target, x_t, t, self.teacher_steps, **batch.get("cond", {})).float()
        return self.decode(x0) if self.in_pixels else x0

    @torch.no_grad()
    def estimates(self, x_t: Tensor, t: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's eps at x_t with the condition, without, and with the negative prompt, which of networks that
        read no texts is without, too."""
        cond, network = batch.get("cond", {}), self.teacher.network
        null = unconditional(network, cond, batch.get("null"))
        texts = {part.name: [self.negative] for part in self.conditions.on("text")}
        counted = x_t.is_meta or not texts  # a plan has no tokenizer
        negative = null if counted else unconditional(network, cond, self.conditions.null(x_t.device, texts))
        with self.teacher.precision(x_t.device):
            with_it, without = (self.teacher.predict(x_t, t, "eps", **told).float() for told in (cond, null))
            away = self.teacher.predict(x_t, t, "eps", **negative).float() if texts else without
        return with_it, without, away

    # -- for the host --------------------------------------------------------------------------------------------------

    def after_step(self, step: Step) -> None:
        if self.adversarial_weight:
            self.heads.iterate()

    def view(self) -> dict[str, Any]:
        return self.student.view()


def for_student(teacher: Denoiser, pure: bool) -> dict[str, Any]:
    """How the student is looked at: as the teacher, but where its first input is pure noise, on the discrete schedule
    that ends in it (Lin et al. 2023). A network of eps says nothing about the image there: it keeps the teacher's."""
    config, path = teacher.config(), teacher.path
    if pure and isinstance(path, DiscreteVPPath) and teacher.prediction not in ("eps", "score"):
        config["path"] = {**path.config(), "zero_terminal_snr": True}
    return config


def student_times(view: Denoiser, levels: Sequence[int]) -> list[float]:
    """Host times of noise levels, given as numbers below LEVELS, noise first. VgmError: they do not descend."""
    if not levels or levels[0] >= LEVELS or any(b >= a for a, b in pairwise(levels)):
        hint = "levels=[999,749,499,249], or the released sampler's [999,899,799,699]"
        raise VgmError(f"levels={list(levels)} do not descend from at most {LEVELS - 1}", hint, USAGE)
    table = level_times(view)
    places = [max(0, round((level + 1) / LEVELS * len(table)) - 1) for level in levels]
    return table[places].tolist()  # type: ignore[no-any-return]
