"""Training of VAR and of its tokenizer. Tian et al. 2024 (arXiv 2404.02905), sec. 3 and 4.

Official code: FoundationVision/VAR@78b9539 trainer.py, train.py (progressive training); the tokenizer's trainer was not
released, only its loss of codes (models/quant.py): the rest is VQGAN's, vgm_cli/losses/first_stage.py.
Deviations: the first stage of progressive training may be the first scale; `truncation`, `feature_weight`,
`place_after` and `restart_every` are ours.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, PyramidTokenizer, Step
from vgm_cli.ar.pyramid import teacher_inputs
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.losses.adversarial import DiscLoss, GenLoss
from vgm_cli.losses.first_stage import AutoencoderObjective, Logs
from vgm_cli.ranges import Fraction, NonNegative, Whole

from .model import VAR
from .tokenizer import VARTokenizer

# -- the transformer ---------------------------------------------------------------------------------------------------


def next_scale_loss(
    logits: Tensor, ids: Tensor, sizes: Sequence[int], label_smoothing: float = 0.0, last_weight: float = 1.0
) -> Tensor:
    """Cross entropy of the ids (B, T), each position weighing 1 / L, L being that of all scales, mean over the batch.

    logits: (B, T, V) of the first few scales. sizes: positions of every scale. last_weight: factor on the weight of the
    last scale that is there.
    """
    each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none", label_smoothing=label_smoothing)
    weights = torch.full_like(each[: ids.shape[1]], 1 / sum(sizes))
    begin = max(b for b in starts(sizes) if b < ids.shape[1])
    weights[begin:] *= last_weight
    return (each.view_as(ids) * weights).sum(1).mean()


def starts(sizes: Sequence[int]) -> list[int]:
    """The first position of every scale."""
    return [sum(sizes[:k]) for k in range(len(sizes))]


def stage_of(index: int, scales: int, first: int, begin: int, end: int) -> int:
    """The finest scale that is trained at a step: `first` up to step `begin`, the finest of all from step `end` on,
    linear between."""
    if index <= begin:
        return min(first, scales - 1)
    if index >= end:
        return scales - 1
    return first + round((index - begin) / (end - begin) * max(scales - 1 - first, 0))


class VARObjective(ObjectiveBase):
    """Cross entropy of all scales at once. batch: tokens (B, L) int64; cond: {"y": (B,)}.

    progressive: the share of the run over which scales are added one after the other, 0 for none: from
    progressive_first on, after progressive_begin steps. A new scale's weight rises from a hundredth to 1 over
    progressive_warmup steps. Logs loss and accuracy of every scale.
    """

    shardable = True

    def __init__(
        self,
        model: VAR,  # what is trained
        codec: Any,  # the tokenizer, through which inputs are computed
        label_smoothing: Fraction = 0.0,  # share of the target that is spread over all codes
        progressive: Fraction = 0.0,  # see above
        progressive_first: Whole = 4,  # number of the finest scale at the beginning, counted from 0
        progressive_begin: Whole = 0,  # steps before the first scale is added: those of the warm-up
        progressive_warmup: Whole = 0,  # steps over which a new scale's weight rises
    ):
        if not isinstance(getattr(codec, "codec", codec), PyramidTokenizer):
            raise VgmError("VAR needs a tokenizer of several scales", "--codec RUN of `vgm train var`", USAGE)
        self.model, self.codec, self.networks = model, codec, {"model": model}
        self.label_smoothing, self.progressive = label_smoothing, progressive
        self.progressive_first = progressive_first
        self.progressive_begin, self.progressive_warmup = progressive_begin, progressive_warmup
        self.sizes = model.sizes

    def stage(self, step: Step) -> tuple[int, float]:
        """The finest scale that this step trains, and the factor on its weight."""
        last = len(self.sizes) - 1
        if not self.progressive:
            return last, 1.0

        def at(index: int) -> int:
            end = self.progressive * step.total
            return stage_of(index, last + 1, self.progressive_first, self.progressive_begin, int(end))

        stage = at(step.index)
        begun = bisect.bisect_left(range(step.index + 1), stage, key=at)
        if begun == 0 or stage == last:
            return stage, 1.0
        return stage, max(min((step.index - begun + 1) / max(self.progressive_warmup, 1), 1.0), 0.01)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.model.labels(batch.get("cond", {}).get("y"), len(batch["tokens"]), batch["tokens"].device)
        loss, logits, ids = self.of(batch["tokens"], y, *self.stage(step))
        return loss, self.logs(logits.detach(), ids)

    def of(self, ids: Tensor, y: Tensor, stage: int, last_weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (), logits (B, T, V) and ids (B, T) of the scales up to number `stage`; ids: (B, L), y: (B,)."""
        end = sum(self.sizes[: stage + 1])
        seen = None
        if stage:
            with torch.no_grad():
                seen = teacher_inputs(self.codec, ids, self.model.scales)[:, : end - self.sizes[0]]
        logits, ids = self.model(seen, y), ids[:, :end]
        return next_scale_loss(logits, ids, self.sizes, self.label_smoothing, last_weight), logits, ids

    def logs(self, logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """The accuracy of all positions, loss and accuracy of every scale that is trained."""
        each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        right = (logits.argmax(-1) == ids).float()
        found = {"accuracy": right.mean()}
        for (height, width), begin, size in zip(self.model.scales, starts(self.sizes), self.sizes):
            if begin < ids.shape[1]:
                own = slice(begin, begin + size)
                found[f"loss_{height}x{width}"] = each[:, own].mean()
                found[f"accuracy_{height}x{width}"] = right[:, own].mean()
        return found


# -- the tokenizer -----------------------------------------------------------------------------------------------------


class TokenizerObjective(AutoencoderObjective):
    """Trains VARTokenizer as VQGAN's first stage is trained: pixels, perceptual distance, codes, patch discriminator.

    Logs of every scale the perplexity of its codes and the share of codes that it uses, lately. A coarse scale of low
    perplexity says nothing, and the fine ones, whose codes are drawn independently of each other, have to say it all.
    feature_size: the root of the features' mean square; where it grows and grows, quant_loss does, too.
    """

    model: VARTokenizer

    def __init__(
        self,
        model: VARTokenizer,  # what is trained
        discriminator: nn.Module | None = None,  # image -> logits of patches; None: no adversarial terms
        perceptual: nn.Module | None = None,  # distance of two images (B, 1, 1, 1); None: pixels alone
        codebook_weight: NonNegative = 1.0,  # of the loss of codes
        pixel_loss: Literal["l1", "l2"] = "l2",  # distance of pixels
        perceptual_weight: NonNegative = 1.0,  # of the perceptual distance
        disc_weight: NonNegative = 0.5,  # of the adversarial term
        disc_start: Whole = 50001,  # step from which adversarial terms count
        disc_loss: DiscLoss = "hinge",  # loss of the discriminator
        gen_loss: GenLoss = "hinge",  # adversarial loss of the tokenizer
        adaptive: bool = True,  # balance the gradients of the two losses at the last layer
        place_codes: bool = False,  # start the codes on features of the first batch
        feature_weight: NonNegative = 0.0,  # of the features' mean square, which nothing else bounds
        truncation: Fraction = 0.0,  # share of steps that decode the first few scales only, so that they say something
        place_after: tuple[Whole, ...] = (),  # steps after which all codes move there again: features change fast
        restart_every: Whole = 0,  # codes unused for about so many steps move onto what is left of features; 0: never
    ):
        super().__init__(
            model,
            discriminator,
            perceptual,
            codebook_weight=codebook_weight,
            pixel_loss=pixel_loss,
            perceptual_weight=perceptual_weight,
            disc_weight=disc_weight,
            disc_start=disc_start,
            disc_loss=disc_loss,
            gen_loss=gen_loss,
            adaptive=adaptive,
            place_codes=place_codes,
        )
        self.feature_weight, self.truncation = feature_weight, truncation
        self.place_after, self.restart_every = set(place_after), restart_every
        self.recent = None  # usage is counted by scale, in the model
        self.latest: Tensor | None = None
        self.feature_size = torch.zeros(())

    def kept(self, step: Step) -> int | None:
        """How many scales this step decodes; None: all."""
        share, which = torch.rand(2, generator=step.generator("truncation")).tolist()
        scales = len(self.model.patch_nums)
        return 1 + int(which * (scales - 1)) if share < self.truncation and scales > 1 else None

    def reconstruct(self, x: Tensor, step: Step, draw: str) -> tuple[Tensor, Tensor, Tensor | None]:
        features = self.model.moments(x)
        codes, loss, ids = self.model.quantize(features, keep=self.kept(step))
        self.latest = features.detach()
        size = features.float().square().mean()
        self.feature_size = size.detach().sqrt()
        return self.model.reconstruct(codes).float(), loss.float() + self.feature_weight * size, ids

    def usage(self, indices: Tensor | None) -> Logs:
        if indices is None or indices.is_meta:
            return {}
        perplexity, share = self.model.quantize.usage()
        logs: Logs = {"feature_size": self.feature_size}
        for side, p, u in zip(self.model.patch_nums, perplexity, share):
            logs |= {f"perplexity_{side}x{side}": p, f"usage_{side}x{side}": u}
        return logs

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        every, quantize, done = self.restart_every, self.model.quantize, step.index + 1
        if self.latest is None:
            return
        if done in self.place_after:
            quantize.place(self.latest)
        elif every and done % every == 0:
            unused = (1 - quantize.DECAY) * quantize.DECAY**every  # what one choice has faded to
            draws = torch.rand(quantize.codebook_size, generator=step.generator("restart")).to(self.latest.device)
            quantize.restart(quantize.ema_vocab_hit_SV.sum(0) < unused, self.latest, draws)
