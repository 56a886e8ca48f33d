"""MaskGIT's training: some codes are masked, all positions guess, cross entropy says how well. Chang et al. 2022 (arXiv
2202.04200), sec. 3.2; Besnier et al. 2025 (arXiv 2503.17076), sec. 3.

Official code: google-research/maskgit@1db2359 maskgit/libml/losses.py (its training loop is not published),
valeoai/Halton-MaskGIT@f61b0a1 Trainer/cls_trainer.py, Utils/masking_scheduler.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.ar.masking import first_of, mask_rate, power_of
from vgm_cli.ar.orders import permutation_on, random_orders, rolled
from vgm_cli.ranges import Fraction

from .model import MaskedTransformer

NAMED = ("cosine", "arccos", "log", "exp")


def masked_cross_entropy(logits: Tensor, ids: Tensor, counted: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over images of the mean over an image's counted positions. logits: (B, N, V), ids: (B, N), counted: (B, N)
    bool or weights. label_smoothing: the share of the target that is spread over all V."""
    each = F.cross_entropy(
        logits.flatten(0, 1), ids.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(ids)
    weights = counted.to(each)
    return ((each * weights).sum(1) / weights.sum(1).clamp(min=1e-6)).mean()


class MaskedCodes(ObjectiveBase):
    """Guess the codes behind a mask. batch: tokens (B, h, w) int64; cond: {"y": (B,)}.

    The defaults are MaskGIT's; the Halton release has schedule=arccos masks=bernoulli counted=all label_smoothing=0.
    Logged: accuracy, the share of masked codes that the likeliest code is, and masked, the share of codes masked.
    VgmError: a schedule of no such name.
    """

    shardable = True

    def __init__(
        self,
        model: MaskedTransformer,  # what is trained
        schedule: str = "cosine",  # of the share that is masked, at a uniform ratio: see vgm_cli/ar/masking.py
        masks: Literal["count", "bernoulli"] = "count",  # so many codes of an image, or each with that probability
        order: Literal["random", "halton"] = "random",  # which ones of a count: any, or the last in a Halton order
        counted: Literal["masked", "all"] = "masked",  # positions that the loss is of
        label_smoothing: Fraction = 0.1,  # share of a target that is spread over all rows of the table
        least_masked: Fraction = 0.0,  # the share is never below it
    ):
        if schedule not in NAMED:
            power_of(schedule)
        self.model, self.networks = model, {"model": model}
        self.mask_schedule, self.masks, self.order, self.counted = schedule, masks, order, counted
        self.label_smoothing, self.least_masked = label_smoothing, least_masked

    def mask(self, n: int, step: Step, device: torch.device) -> Tensor:
        """(n, N) bool: what is masked in this step, at least one code of every image where it is a count."""
        total = self.model.positions
        rate = mask_rate(step.rand(n, "mask ratio"), self.mask_schedule, total).clamp(min=self.least_masked)
        if self.masks == "bernoulli":
            return (step.rand((n, total), "mask") < rate[:, None]).to(device)
        if self.order == "random":
            orders = random_orders(step.rand((n, total), "mask"))
        else:
            halton = permutation_on("halton", *self.model.grid, rate.device)
            orders = rolled(halton, step.randint(total, n, "mask"))
        count = (total * rate).ceil().long().clamp(1, total)
        return ~first_of(orders, total - count).to(device)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        model, ids = self.model, batch["tokens"].flatten(1)
        mask = self.mask(len(ids), step, ids.device)
        logits = model(torch.where(mask, model.mask_id, ids), batch.get("cond", {}).get("y"))
        counted = torch.ones_like(mask) if self.counted == "all" else mask
        loss = masked_cross_entropy(logits, ids, counted, self.label_smoothing)
        right = (model.of_codes(logits.detach()).argmax(-1) == ids) & mask
        share = mask.float().mean()
        return loss, {"accuracy": right.float().mean() / share.clamp(min=1e-6), "masked": share}
