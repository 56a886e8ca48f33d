"""Rejection: of several candidates for an image, the one of which a judge thinks most is kept.

Razavi et al. 2019 (VQ-VAE-2, arXiv 1906.00446), sec. 3.4; Chang et al. 2022 (MaskGIT, arXiv 2202.04200), table 1. There
the candidates of a class are ranked together and the best share of them is kept; here every image has candidates of
its own, so that image i depends on (seed, i) alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Count, fit
from vgm_cli.rewards.combine import Weighted


def candidates_for(share: float) -> int:
    """How many candidates an image has where this share of them is accepted. VgmError: it is no share."""
    if not 0 < share <= 1:
        raise VgmError(f"--accept {share:g} is no share of candidates", "0.05 accepts one in twenty", USAGE)
    return round(1 / share)


class Judge:
    """Chooses among `candidates` of every image by a reward, `NAME` or `module:function` of (images, batch), and counts
    what it saw. VgmError: there is no such reward."""

    def __init__(self, candidates: int, reward: str):
        self.candidates, self.name = fit(candidates, Count, "candidates"), reward
        self.reward = Weighted({reward: 1.0})
        self.seen, self.kept, self.every = 0, 0.0, 0.0  # images, and sums of what the reward said of them

    def described(self) -> dict[str, Any]:
        """For the records, from which the same images are made again."""
        return {"candidates": self.candidates, "judge": self.name}

    @torch.no_grad()
    def better(self, best: tuple[Tensor, Tensor] | None, x: Tensor, asked: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and what the judge says of them (B,): x, or the best so far where that is no worse.
        asked: see api.Request."""
        batch = dict(asked)
        if "label" in batch:
            batch["label"] = torch.as_tensor(batch["label"], device=x.device)
        self.reward.to(x.device)
        said = self.reward(x.float().clamp(-1, 1), batch).to(x.device)
        self.every += float(said.sum())
        if best is None:
            return x, said
        wins = said > best[1]
        return torch.where(wins.view(-1, 1, 1, 1), x, best[0]), torch.where(wins, said, best[1])

    def report(self, said: Tensor) -> dict[str, float]:
        """What to say after a batch whose kept images the judge gave `said` (B,): counts, and means of its word."""
        self.seen, self.kept = self.seen + len(said), self.kept + float(said.sum())
        of = self.seen * self.candidates
        return {"images": self.seen, "of": of, "kept": self.kept / self.seen, "all": self.every / of}
