"""Parallel decoding of masked codes: all are guessed at once, some are kept, the others are guessed again.

Chang et al. 2022 (arXiv 2202.04200), sec. 3.3, google-research/maskgit@1db2359 maskgit/libml/parallel_decode.py;
Besnier et al. 2025 (arXiv 2503.17076), valeoai/Halton-MaskGIT@f61b0a1 Sampler/{confidence,halton}_sampler.py.

ids: (B, N) int64, `mask_id` where nothing is known; what is known from the start is kept. logits_of(ids, k): logits
(B, N, V) at step k. pick(logits, k): ids (B, N) drawn from them. watch(k, ids, drawn) sees what is known after a step,
and what was drawn in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.ar.masking import confidence, known_after, least_confident, mask_rate, still_masked
from vgm_cli.ar.sampling import token_log_probs

LogitsOf = Callable[[Tensor, int], Tensor]
Pick = Callable[[Tensor, int], Tensor]
Watch = Callable[[int, Tensor, Tensor], None]
Noise = Literal["linear", "warm_up", "random", "none"]


def unwatched(k: int, ids: Tensor, drawn: Tensor) -> None:
    """Nobody looks."""


def by_confidence(
    logits_of: LogitsOf,  # see above
    pick: Pick,  # see above
    ids: Tensor,  # (B, N), see above
    mask_id: int,  # of what is not known
    noise: Tensor,  # (steps - start, B, N), standard Gumbel
    steps: int,  # of the schedule
    start: int = 0,  # first step that is taken: an edit begins with what fewer steps leave to do
    schedule: str = "cosine",  # of the share of the unknown codes that stays masked
    choice_temperature: float = 4.5,  # of the noise at the first step, falling to 0 at the last
    watch: Watch = unwatched,  # see above
) -> Tensor:
    """MaskGIT: a step keeps the codes that were drawn with the highest probability, noise added. Returns ids (B, N):
    what the last step drew, before it would mask one of them again."""
    total = (ids == mask_id).sum(1)
    drawn = ids
    for k, step in enumerate(range(start, steps)):
        unknown = ids == mask_id
        logits = logits_of(ids, k)
        picked = pick(logits, k)
        drawn = torch.where(unknown, picked, ids)
        ratio = torch.tensor((step + 1) / steps, device=ids.device)
        left = still_masked(total, unknown.sum(1), mask_rate(ratio, schedule, total))
        log_p = token_log_probs(logits, picked)
        sure = confidence(log_p, ~unknown, noise[k], choice_temperature * (1 - ratio))
        ids = torch.where(least_confident(sure, left), mask_id, drawn)
        watch(k, ids, drawn)
    return drawn


def by_cumulative_confidence(
    logits_of: LogitsOf,  # see above
    pick: Pick,  # see above
    ids: Tensor,  # (B, N), see above
    mask_id: int,  # of what is not known
    noise: Tensor,  # (steps, B, N): standard Gumbel where it is added, uniform where it takes the confidence's place
    schedule: str = "arccos",  # of the share of the codes that stays masked
    mode: Noise = "linear",  # added and falling; in place of the confidence, in two steps or in all; none
    choice_temperature: float = 4.5,  # of added noise at the first step, falling to 0 at the last
    rewrite_known: bool = False,  # as in the release: what is known is drawn anew in every step, given codes, too
    watch: Watch = unwatched,  # see above
) -> Tensor:
    """The Halton release's confidence sampler: after a step as many codes are known as the schedule says, those that
    were known before and those of the highest confidence. Returns ids (B, N)."""
    steps, n = len(noise), ids.shape[1]
    total = torch.full_like(ids[:, 0], n) if rewrite_known else (ids == mask_id).sum(1)
    ratios = torch.linspace(0, 1, steps).to(ids.device) if steps > 1 else torch.ones(1, device=ids.device)
    known = known_after(ratios, schedule, total)  # (steps, B)
    for k in range(steps):
        before = ids != mask_id
        logits = logits_of(ids, k)
        picked = pick(logits, k)
        drawn = picked if rewrite_known else torch.where(before, ids, picked)
        sure, added = token_log_probs(logits, picked).double(), 0.0
        if mode == "random" or (mode == "warm_up" and k < 2):
            sure = noise[k].double()
        elif mode == "linear":
            added = choice_temperature * (1 - k / max(steps - 1, 1))
        sure = confidence(sure, before, noise[k].double(), added)
        again = least_confident(sure, (total - known[k]).clamp(min=0))
        ids = torch.where(again, ids, drawn)
        watch(k, ids, drawn)
    return ids


def by_order(
    logits_of: LogitsOf,  # see above
    pick: Pick,  # see above
    ids: Tensor,  # (B, N), see above
    mask_id: int,  # of what is not known
    orders: Tensor,  # (B, N), every row a permutation of the positions
    steps: int,  # of the schedule
    schedule: str = "arccos",  # of the share of the unknown codes that stays masked
    watch: Watch = unwatched,  # see above
) -> Tensor:
    """Halton: which codes a step keeps is known beforehand, the next ones of an order among those that were unknown at
    the start. Returns ids (B, N)."""
    unknown = (ids == mask_id).gather(1, orders)
    ranks = torch.zeros_like(orders).scatter(1, orders, (unknown.cumsum(1) - 1).masked_fill(~unknown, -1))
    ratios = torch.arange(1, steps + 1, device=ids.device) / steps
    known = known_after(ratios, schedule, unknown.sum(1))  # (steps, B)
    done = torch.zeros_like(known[0])
    for k in range(steps):
        drawn = pick(logits_of(ids, k), k)
        ids = torch.where((ranks >= done[:, None]) & (ranks < known[k][:, None]), drawn, ids)
        done = known[k]
        watch(k, ids, drawn)
    return ids
