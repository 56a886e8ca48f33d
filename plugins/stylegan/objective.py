"""Adversarial training of StyleGAN, StyleGAN2 and StyleGAN2-ADA: two optimizers, their regularisers as further phases.

Karras et al. 2019 (arXiv 1812.04948), app. C; 2020 (arXiv 1912.04958), sec. 3; 2020 (arXiv 2006.06676), sec. 3.
Official code: NVlabs/stylegan@1e0d5c7 training/{training_loop,loss}.py, NVlabs/stylegan2-ada-pytorch@d72cc7d likewise.
Deviations: the generator steps first, in both generations; labels of generated images are those of the batch; one batch
size at all levels of growing; the mean of w moves once per step and phase, over all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Phase, Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.collectives import average
from vgm_cli.ranges import Few, Fraction, NonNegative

from .augment import AugmentPipe, next_probability
from .layers import StyleGenerator
from .losses import (
    discriminator_loss,
    fade_reals,
    generator_loss,
    gradient_penalty,
    level_of_detail,
    path_lengths,
    path_penalty,
    r1_penalty,
)
from .model import Generator

Logs = dict[str, Tensor]


@dataclass
class Growth:
    """Progressive growing: training starts with small images, and levels of twice the side fade in one after the other.

    start: the first side, or the next larger one there is. rates: {side: factor on both learning rates}, of that side
    and all larger ones that name none.
    """

    start: int = 8
    train_kimg: float = 600
    fade_kimg: float = 600
    rates: dict[int, float] | None = None
    restart: bool = True  # Adam forgets its moments when a level enters or is in full


class StyleGANObjective(ObjectiveBase):
    """Non-saturating GAN loss with R1 (StyleGAN, StyleGAN2), or WGAN-GP, with the regularisers of all three
    generations.

    R1 weighs r1_gamma / 2. Where r1_every is 1 it is part of the discriminator's loss, otherwise a phase of its own at
    every r1_every steps, with that gain.
    """

    model: StyleGenerator
    discriminator: nn.Module
    uncompiled = ("model", "discriminator")  # path lengths and R1 are gradients that are differentiated
    sparse_grads = True  # a level that is not in yet, and biases under gradient penalties, receive none

    def __init__(
        self,
        model: nn.Module,  # the generator
        discriminator: nn.Module,  # images (B, C, H, W) and labels -> scores (B,)
        loss: Literal["non-saturating", "wgan-gp"] = "non-saturating",  # which adversarial loss
        r1_gamma: NonNegative = 10.0,  # R1 weighs half of this
        r1_every: Few = 1,  # steps between two R1 phases; 1: in the discriminator's loss
        path_weight: NonNegative = 0.0,  # of the path length regularisation; 0: none
        path_every: Few = 4,  # steps between two such phases
        path_shrink: Few = 2,  # they use this fraction 1 / k of the batch
        path_decay: Fraction = 0.01,  # of the running mean of path lengths
        mixing: Fraction = 0.9,  # probability of a second style from a random layer on
        w_decay: Fraction = 0.995,  # of the running mean of w, for truncation
        grow: dict[str, Any] | None = None,  # keywords of Growth; None: full size from the start
        augment: dict[str, Any] | None = None,  # {p, target, kimg, every} and keywords of AugmentPipe; None: none
        drift: NonNegative = 0.001,  # weight of D(real)^2, of wgan-gp
        wgan_lambda: NonNegative = 10.0,  # weight of the gradient penalty, of wgan-gp
    ):
        if not isinstance(model, StyleGenerator):
            raise VgmError("the objective trains StyleGAN's generators", "model.name=stylegan or stylegan2", USAGE)
        self.model, self.discriminator = model, discriminator
        self.networks = {"model": model, "discriminator": discriminator}
        self.kind, self.r1_gamma, self.r1_every = loss, r1_gamma, r1_every
        self.path_weight, self.path_every, self.path_shrink = path_weight, path_every, path_shrink
        self.path_decay, self.mixing, self.w_decay = path_decay, mixing, w_decay
        self.drift, self.wgan_lambda = drift, wgan_lambda
        self.grow = Growth(**grow) if grow is not None else None
        if self.grow is not None and not isinstance(model, Generator):
            raise VgmError("only StyleGAN's first generation grows", "objective.grow=null", USAGE)
        options = dict(augment or {})
        self.target, self.kimg = float(options.pop("target", 0.6)), float(options.pop("kimg", 500))
        self.ada_every, fixed = int(options.pop("every", 4)), options.pop("p", None)
        self.pipe = AugmentPipe(**options) if augment is not None else None
        self.adaptive = self.pipe is not None and fixed is None
        self.p = float(fixed or 0.0)
        self.batch_size = 0  # images per step over all processes, known from the first batch on
        self.path_mean = torch.zeros((), device="cpu")
        self.signs = torch.zeros(2, device="cpu")  # sum of sign(D(real)) and its count since p moved
        self.new_path_mean: list[Tensor] = []
        self.seen: dict[str, list[Tensor]] = {}  # means of w of this step, by phase
        self.real_signs: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        self.path_mean = self.path_mean.to(device)
        if self.pipe is not None:
            self.pipe.to(device)

    def phases(self) -> list[Phase]:
        d = {"trains": ("discriminator",), "optimizer": "discriminator"}
        phases = [Phase("generator")]
        if self.path_weight:
            phases.append(Phase("path", every=self.path_every, gain=self.path_every))
        phases.append(Phase("discriminator", **d))  # type: ignore[arg-type]
        if self.r1_gamma and self.r1_every > 1 and self.kind == "non-saturating":
            phases.append(Phase("r1", every=self.r1_every, gain=self.r1_every, **d))  # type: ignore[arg-type]
        return phases

    def prepare(self, first_batch: Batch, step: Step) -> None:
        self.batch_size = len(first_batch["x"]) * step.world * step.micros

    # -- schedules ----------------------------------------------------------------------------------------------------

    def lod(self, index: int) -> float:
        """Level of detail of a step: 0 is full size. It moves at every fourth step."""
        if self.grow is None:
            return 0.0
        sides: list[int] = self.model.sides  # type: ignore[assignment]
        top = sum(s >= self.grow.start for s in sides) - 1
        if top < 0:
            raise VgmError(f"grow.start={self.grow.start} is beyond the images' side", f"sides are {sides}", USAGE)
        return level_of_detail(index // 4 * 4 * self.batch_size, top, self.grow.train_kimg, self.grow.fade_kimg)

    def schedule(self, step: Step) -> Mapping[str, Mapping[str, float]]:
        """Factors on the learning rates: those of the side in training."""
        if self.grow is None or not self.grow.rates:
            return {}
        side = self.model.size // 2 ** int(self.lod(step.index))  # type: ignore[operator]
        known = [s for s in self.grow.rates if s <= side]
        factor = self.grow.rates[max(known)] if known else 1.0
        return {"main": {"lr": factor}, "discriminator": {"lr": factor}}

    def restarts(self, step: Step) -> bool:
        """Whether the optimizers forget their moments before this step: where a level enters, and where it is shown
        in full."""
        if self.grow is None or not self.grow.restart or step.index == 0:
            return False
        now, before = self.lod(step.index), self.lod(step.index - 1)
        return int(now) != int(before) or math.ceil(now) != math.ceil(before)

    # -- draws --------------------------------------------------------------------------------------------------------

    def generate(self, phase: str, n: int, y: Tensor | None, step: Step, lod: float) -> tuple[Tensor, Tensor]:
        """n images and their styles, with mixing."""
        model = self.model
        w = model.map(step.randn((n, model.latent_size), f"{phase} z"), y)
        self.seen.setdefault(phase, []).append(w.detach().mean(0))
        ws = model.styles(w)
        cutoff = self.crossover(phase, step, lod)
        if cutoff < model.num_layers:
            other = model.styles(model.map(step.randn((n, model.latent_size), f"{phase} second z"), y))
            ws = torch.cat([ws[:, :cutoff], other[:, cutoff:]], dim=1)
        seeds = step.on_cpu().randint(2**62, n, f"{phase} noise")
        noise = model.random_noise(seeds.tolist(), step.device) if model.noise_shapes else None
        return model.synthesis(ws, noise, lod), ws

    def crossover(self, phase: str, step: Step, lod: float) -> int:
        """First layer of the second style; num_layers for none. One draw for the batch."""
        active = int(self.model.active_layers(lod))  # type: ignore[operator]
        mix, where = torch.rand(2, generator=step.generator(f"{phase} mixing"), device="cpu").tolist()
        if self.mixing <= 0 or mix >= self.mixing or active < 2:
            return self.model.num_layers
        return 1 + int(where * (active - 1))

    def scores(self, draw: str, y: Tensor | None, step: Step, lod: float) -> Callable[[Tensor], Tensor]:
        """Scores of what `draw` returns, by the discriminator, behind the augmentations."""
        pipe = self.pipe

        def score(x: Tensor) -> Tensor:
            if pipe is not None and self.p > 0:
                u = step.rand((len(x), pipe.draws), f"{draw} augment")
                grain = step.randn(tuple(x.shape), f"{draw} grain") if "noise" in pipe.kinds else None
                x = pipe(x, self.p, u, grain)
            return self.discriminator(x, y, lod).float()  # type: ignore[no-any-return]

        return score

    # -- losses -------------------------------------------------------------------------------------------------------

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, Logs]:
        """batch x: (B, C, H, W) in [-1, 1], cond: {"y": (B,)} for conditional networks."""
        x, y = batch["x"], batch.get("cond", {}).get("y")
        if not self.batch_size:
            self.prepare(batch, step)
        lod = self.lod(step.index)
        if phase == "generator":
            return self.generator(x, y, step, lod)
        if phase == "path":
            return self.path(x, y, step, lod)
        real = fade_reals(x, lod) if lod else x
        if phase == "discriminator":
            return self.discriminate(real, y, step, lod)
        _, penalty = r1_penalty(self.scores("r1", y, step, lod), real)
        return penalty.mean() * (self.r1_gamma / 2), {"r1_penalty": penalty.detach().mean()}

    def generator(self, x: Tensor, y: Tensor | None, step: Step, lod: float) -> tuple[Tensor, Logs]:
        images, _ = self.generate("generator", len(x), y, step, lod)
        fake = self.scores("generator", y, step, lod)(images)
        loss = generator_loss(fake) if self.kind == "non-saturating" else -fake
        return loss.mean(), {"scores_fake": fake.detach().mean()}

    def path(self, x: Tensor, y: Tensor | None, step: Step, lod: float) -> tuple[Tensor, Logs]:
        n = max(1, len(x) // self.path_shrink)
        images, ws = self.generate("path", n, None if y is None else y[:n], step, lod)
        lengths = path_lengths(images, ws, step.randn(tuple(images.shape), "path y"))
        penalty, mean = path_penalty(lengths, self.path_mean.to(lengths.device), self.path_decay)
        self.new_path_mean.append(mean.detach())
        return penalty.mean() * self.path_weight, {"path_length": lengths.detach().mean()}

    def discriminate(self, real: Tensor, y: Tensor | None, step: Step, lod: float) -> tuple[Tensor, Logs]:
        with torch.no_grad():
            images, _ = self.generate("discriminator", len(real), y, step, lod)
        fake = self.scores("fake", y, step, lod)(images)
        score = self.scores("real", y, step, lod)
        if self.kind == "wgan-gp":
            out = score(real)
            mix = step.rand((len(real), 1, 1, 1), "gradient penalty")
            penalty = gradient_penalty(score, real, images, mix)
            loss = fake - out + self.drift * out.square() + self.wgan_lambda * penalty[:, None]
        elif self.r1_every == 1 and self.r1_gamma:
            out, penalty = r1_penalty(score, real)
            loss = discriminator_loss(out, fake) + (self.r1_gamma / 2) * penalty[:, None]
        else:
            out, penalty = score(real), None
            loss = discriminator_loss(out, fake)
        self.real_signs.append(out.detach().sign().mean())
        logs = {"scores_real": out.detach().mean(), "real_sign": self.real_signs[-1]}
        if self.pipe is not None:
            logs["augment_p"] = torch.tensor(self.p)
        if self.grow is not None:
            logs["lod"] = torch.tensor(lod)
        return loss.mean(), logs if penalty is None else {**logs, "penalty": penalty.detach().mean()}

    # -- between steps ------------------------------------------------------------------------------------------------

    def after_step(self, step: Step) -> None:
        """Mean of w, of path lengths and of the discriminator's signs, over micro-batches and processes."""
        for means in self.seen.values():
            mean = average(torch.stack(means).mean(0))
            self.model.w_avg.copy_(torch.lerp(mean.to(self.model.w_avg), self.model.w_avg, self.w_decay))
        if self.new_path_mean:
            self.path_mean = average(torch.stack(self.new_path_mean).mean(0))
        if self.adaptive and self.real_signs:
            mean = average(torch.stack(self.real_signs).mean(0))
            self.signs = self.signs.to(mean.device) + torch.stack([mean.float(), torch.ones_like(mean).float()])
            if (step.index + 1) % self.ada_every == 0:
                sign, count = self.signs.tolist()
                self.p = next_probability(self.p, sign / count, self.target, self.batch_size * count, self.kimg)
                self.signs.zero_()
        self.seen, self.new_path_mean, self.real_signs = {}, [], []
        if self.grow is not None:
            for network in self.networks.values():
                network.lod.fill_(self.lod(step.index))  # type: ignore[operator, union-attr]

    def state_dict(self) -> dict[str, Tensor]:
        return {"path_mean": self.path_mean, "p": torch.tensor(self.p, dtype=torch.float64), "signs": self.signs}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.path_mean = state["path_mean"].to(self.path_mean.device)
        self.p, self.signs = float(state["p"]), state["signs"].clone()
