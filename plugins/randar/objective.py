"""RandAR's training: cross entropy of every code at its position instruction token, in an order of its own for every
item. Pang et al. 2024 (arXiv 2412.01827), sec. 3.2.

Official code: ziqipang/RandAR@d374a72 train_c2i.py, RandAR/model/randar_gpt.py (forward_train).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.llama import LlamaGen

from .model import RandAR, orders_of


class RandARObjective(ObjectiveBase):
    """batch: tokens (B, h, w) int64; cond: {"y": (B,)} of classes, some of them dropped by the host.

    start: a LlamaGen of the same shape, whose weights training starts from (`roles.start.run=RUN|FILE`); only the
    instruction vector starts from noise.
    """

    shardable = True

    def __init__(self, model: RandAR, start: LlamaGen | None = None):
        self.model, self.start = model, start
        self.networks: dict[str, nn.Module] = {"model": model}

    def prepare(self, first_batch: Batch, step: Step) -> None:
        """Take over the weights of `start`. VgmError: they are of another shape."""
        if self.start is None:
            return
        own, given = self.model.state_dict(), self.start.state_dict()
        for name, tensor in own.items():
            if name != "pos_instruct_embeddings" and (name not in given or given[name].shape != tensor.shape):
                text = f"roles.start has other weights than this network: {name} is {tuple(tensor.shape)} here"
                raise VgmError(text, "model.dim, model.n_layer and the codec are those of the run to start from", USAGE)
        self.model.load_state_dict({**own, **{k: v for k, v in given.items() if k in own}})
        self.start = None

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["tokens"].flatten(1)
        order = orders_of(self.model.order, step.rand(tuple(ids.shape), "order"), self.model.grid)
        y = self.model.labels(batch.get("cond", {}).get("y"), len(ids), ids.device)
        logits, targets = self.model(ids, y, order), ids.gather(1, order)
        right = (logits.detach().argmax(-1) == targets).float().mean()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), {"accuracy": right}
