"""Training of VQGAN's prior: cross entropy of the next code behind a condition. Esser et al. 2021, eq. 9 and 10.

Official code: CompVis/taming-transformers@3ba01b2 taming/models/cond_transformer.py. The first stage's objective is
vgm_cli/losses/first_stage.py. Deviation: windows are cut from the codes of whole images, not from the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.ranges import Fraction

from .model import GPT


def corrupt(codes: Tensor, keep: Tensor, random: Tensor) -> Tensor:
    """codes (B, N) where keep is 1, else the random ids."""
    return torch.where(keep.bool(), codes, random)


def prior_logits(model: GPT, prefix: Tensor, codes: Tensor) -> Tensor:
    """Logits (B, N, rows) of codes (B, N) behind prefix (B, T); the last code is not fed."""
    return model(torch.cat([prefix, codes], dim=1)[:, :-1])[:, prefix.shape[1] - 1 :]


class PriorObjective(ObjectiveBase):
    """batch: tokens (B, h, w) int64; cond: {"y": (B,)} for a class-conditional prior, {"codes": (B, length)}.

    pkeep: share of input codes left as they are while the others become random ones, so that the prior learns to go on
    from its own mistakes; targets are unchanged.
    """

    def __init__(self, model: GPT, pkeep: Fraction = 1.0):
        self.model, self.pkeep = model, pkeep
        self.networks = {"model": model}

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        tokens, coord = self.windows(batch["tokens"], step)
        codes = tokens.flatten(1)[:, model.permutation(tokens.device)]
        cond: dict[str, Tensor] = dict(batch.get("cond", {}))
        given = codes
        if self.pkeep < 1.0:
            # uniform numbers in [0, 1) as one draw per code: the first for keeping, the second for the id
            draws = step.rand((len(codes), 2, codes.shape[1]), "corruption")
            given = corrupt(codes, draws[:, 0] < self.pkeep, (draws[:, 1] * len(model.tok_emb.weight)).long())
        logits = prior_logits(model, model.prefix({**cond, "coord": coord}, len(codes), codes.device), given)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        return loss, {"accuracy": (logits.detach().argmax(-1) == codes).float().mean()}

    def windows(self, tokens: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """A random window of every grid, (B, *window), and the coordinates of its codes in the whole."""
        (height, width), (h, w) = tokens.shape[1:], self.model.window
        coord = self.model.coordinates(height, width, tokens.device).expand(len(tokens), -1, -1)
        if (height, width) == (h, w):
            return tokens, coord
        top = step.randint(height - h + 1, len(tokens), "window rows").to(tokens.device)
        left = step.randint(width - w + 1, len(tokens), "window columns").to(tokens.device)
        rows = top[:, None, None] + torch.arange(h, device=tokens.device)[:, None]
        columns = left[:, None, None] + torch.arange(w, device=tokens.device)
        item = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        return tokens[item, rows, columns], coord[item, rows, columns]
