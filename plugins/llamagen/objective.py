"""LlamaGen's training: cross entropy of the next code, the condition dropped now and then for guidance.

Sun et al. 2024 (arXiv 2406.06525), sec. 2.2. Official code: FoundationVision/LlamaGen@ce98ec4
autoregressive/models/gpt.py (forward), autoregressive/train/train_{c2i,t2i}.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.nets.llama import LlamaGen, padded_causal
from vgm_cli.ranges import Fraction


def next_token_loss(logits: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over codes: logits (B, N, V), ids (B, N). valid: (B,) weights of items, 0 for broken ones."""
    if valid is None:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    weights = valid.to(each)[:, None].expand_as(each)
    return (each * weights).sum() / weights.sum().clamp_min(1)


class LlamaGenObjective(ObjectiveBase):
    """batch: tokens (B, h, w) int64; y (B,) labels or, for a text model, text (list of captions).

    label_dropout: share of items that see the null condition. text: role, captions -> features and mask (`flan-t5`).
    """

    shardable = True

    def __init__(self, model: LlamaGen, text: nn.Module | None = None, label_dropout: Fraction = 0.1):
        self.model, self.text, self.label_dropout = model, text, label_dropout
        self.networks: dict[str, nn.Module] = {"model": model}

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["tokens"].flatten(1)
        dropped = step.rand(len(ids), "condition dropout") < self.label_dropout
        cond, mask = self.condition(batch, ids, dropped)
        logits = self.model(ids[:, :-1], cond, mask)
        loss = next_token_loss(logits, ids, batch.get("valid"))
        right = (logits.detach().argmax(-1) == ids).float().mean()
        return loss, {"accuracy": right}

    def condition(self, batch: Batch, ids: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network is given, and its attention mask (text only)."""
        model = self.model
        if model.model_type == "c2i":
            y = model.labels(batch.get("y"), len(ids), ids.device)
            return torch.where(dropped, model.num_classes, y), None
        null = model.null_caption
        captions: Any = batch.get("text")
        if captions is None or self.text is None:  # without captions, all are the null one
            return null.expand(len(ids), -1, -1), None
        features, pad = self.text(captions, ids.device)
        features = torch.where(dropped[:, None, None], null, features.to(null))
        return features, padded_causal(pad, ids.shape[1] - 1)
