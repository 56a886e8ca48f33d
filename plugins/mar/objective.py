"""MAR's training: most tokens are masked, the head denoises them given what the transformer knows of their places.

Li et al. 2024 (arXiv 2406.11838), sec. 3.2, 3.4 and 4. Official code: LTH14/mar@fe470ac models/mar.py (forward),
models/diffloss.py, engine_mar.py. Deviations: terms of tokens that are not masked, which have no weight in the loss,
are not computed; the mask rate is one for all processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.ar.masking import first_of, truncated_normal_rate
from vgm_cli.ar.orders import random_orders
from vgm_cli.ranges import Count, Fraction, Positive

from .model import MAR


class MaskedDiffusion(ObjectiveBase):
    """Denoise the masked tokens. batch: x (B, C, H, H), cond: {"y": (B,)}.

    All images of a step have as many masked tokens, each its own. Logged: mse and vb (bits per dimension) of the loss,
    which is their sum, and masked, the share of tokens that is.
    """

    shardable = True

    def __init__(
        self,
        model: MAR,  # what is trained
        mask_ratio_min: Fraction = 0.7,  # the least share of tokens that is masked
        mask_ratio_std: Positive = 0.25,  # deviation of that share, a normal about 1 cut to [mask_ratio_min, 1]
        copies: Count = 4,  # noisy versions of every masked token, each at a time of its own
    ):
        self.model, self.networks = model, {"model": model}
        self.mask_ratio_min, self.mask_ratio_std, self.copies = mask_ratio_min, mask_ratio_std, copies

    def masked(self, u: Tensor) -> int:
        """How many tokens are masked; u: () float64, uniform in [0, 1)."""
        rate = truncated_normal_rate(u, self.mask_ratio_min, self.mask_ratio_std)
        return max(1, math.ceil(self.model.positions * float(rate)))

    def terms(
        self, tokens: Tensor, y: Tensor | None, orders: Tensor, count: int, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Terms of the loss of every masked token, (B, copies, count) in the order of `orders`.

        tokens: (B, N, C); orders: (B, N) int64, the first `count` of each are masked; t: (B, copies, count) int64;
        noise: (B, copies, count, C).
        """
        places = orders[:, :count]
        z = self.model(tokens, ~first_of(orders, count), y, self.model.positions - count)
        taken = lambda v: v.gather(1, places[..., None].expand(-1, -1, v.shape[-1]))
        rows = lambda v: taken(v)[:, None].expand(-1, t.shape[1], -1, -1).flatten(0, 2)
        found = self.model.diffloss.losses(rows(tokens), rows(z), t.flatten(), noise.flatten(0, 2))
        return {k: v.view(t.shape) for k, v in found.items()}

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.model.patchify(batch["x"])
        n, positions, channels = tokens.shape
        orders = random_orders(step.rand((n, positions), "order"))
        count = self.masked(torch.rand((), generator=step.generator("mask rate"), dtype=torch.float64))
        times = self.model.diffloss.process.steps
        t = (step.rand((n, self.copies, count), "t") * times).long()
        noise = step.randn((n, self.copies, count, channels), "noise")
        terms = self.terms(tokens, batch.get("cond", {}).get("y"), orders, count, t, noise)
        logs = {k: terms[k].detach().mean() for k in ("mse", "vb")}
        return terms["loss"].mean(), logs | {"masked": torch.tensor(count / positions)}
