"""RandAR's training: cross entropy of every code at its position instruction token, in an order of its own for every
item. Pang et al. 2024 (arXiv 2412.01827), sec. 3.2.

Official code: ziqipang/RandAR@d374a72 train_c2i.py, RandAR/model/randar_gpt.py (forward_train).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step

from .model import RandAR, orders_of


class RandARObjective(ObjectiveBase):
    """batch: tokens (B, h, w) int64; cond: {"y": (B,)} of classes, some of them dropped by the host."""

    shardable = True

    def __init__(self, model: RandAR):
        self.model = model
        self.networks: dict[str, nn.Module] = {"model": model}

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["tokens"].flatten(1)
        order = orders_of(self.model.order, step.rand(tuple(ids.shape), "order"), self.model.grid)
        y = self.model.labels(batch.get("cond", {}).get("y"), len(ids), ids.device)
        logits, targets = self.model(ids, y, order), ids.gather(1, order)
        right = (logits.detach().argmax(-1) == targets).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), {"accuracy": right}
