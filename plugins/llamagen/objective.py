"""LlamaGen's training: cross entropy of the next code, the condition dropped now and then (by the host) for guidance.

Sun et al. 2024 (arXiv 2406.06525), sec. 2.2. Official code: FoundationVision/LlamaGen@ce98ec4
autoregressive/models/gpt.py (forward), autoregressive/train/train_{c2i,t2i}.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.nets.llama import LlamaGen, padded_causal


def next_token_loss(logits: Tensor, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over codes: logits (B, N, V), ids (B, N). valid: (B,) weights of items, 0 for broken ones."""
    if valid is None:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    weights = valid.to(each)[:, None].expand_as(each)
    return (each * weights).sum() / weights.sum().clamp_min(1)


class LlamaGenObjective(ObjectiveBase):
    """batch: tokens (B, h, w) int64; cond: {"y": (B,)}, or for a text model {"text": (B, T, C), "pad": (B, T)}."""

    shardable = True

    def __init__(self, model: LlamaGen):
        self.model = model
        self.networks: dict[str, nn.Module] = {"model": model}

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["tokens"].flatten(1)
        cond, mask = self.prefix(batch.get("cond", {}), ids)
        logits = self.model(ids[:, :-1], cond, mask)
        loss = next_token_loss(logits, ids, batch.get("valid"))
        right = (logits.detach().argmax(-1) == ids).float().mean()
        return loss, {"accuracy": right}

    def prefix(self, cond: Mapping[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network is given before the codes, and its attention mask (text only)."""
        model = self.model
        if model.model_type == "c2i":
            return model.labels(cond.get("y"), len(ids), ids.device), None
        return cond["text"].to(model.null_caption), padded_causal(cond["pad"], ids.shape[1] - 1)
