"""Rewards by the shipped digit classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.mnist_features import CLASSES, to_digits


@cache
def digit_network(device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """images (B, C, H, W) in [-1, 1] -> embedding (B, 64), logits (B, 10)."""
    from vgm_cli.metrics.features import mnist_features

    network = mnist_features().net.to(device)
    return lambda images: network(to_digits(images.float()))


class Confidence:
    """Probability that the classifier gives the wanted class, or its most likely one where no class was asked for.

    log: the logarithm instead, which keeps rising where the probability is flat.
    """

    def __init__(self, log: bool = False):
        self.log = log

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        scores = digit_network(images.device)(images)[1].log_softmax(1)
        y = batch.get("label")
        if y is None:
            chosen = scores.amax(1)
        elif len(y) and int(y.max()) >= CLASSES:
            raise VgmError(f"confidence knows digits 0 to 9, the labels reach {int(y.max())}", code=USAGE)
        else:
            chosen = scores.gather(1, y.to(scores.device)[:, None])[:, 0]
        return chosen if self.log else chosen.exp()
