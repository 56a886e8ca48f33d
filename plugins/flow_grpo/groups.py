"""Groups: which prompts a roll-out asks for, how an image compares with its group, which images are worth training on.

yifan123/flow_grpo@ac4c86e flow_grpo/stat_tracking.py and scripts/train_sd3.py. Pure functions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError

Advantage = Literal["grpo", "rwr", "sft", "dpo"]


def k_repeat(prompts: int, batch_size: int, k: int, world: int, rank: int, seed: int) -> Tensor:
    """(batch_size,) prompt numbers of this process: world * batch_size / k prompts, k times each, shuffled alike on
    every process. Prompts are distinct while there are enough of them. VgmError: k does not divide the global batch."""
    total = world * batch_size
    if total % k:
        raise VgmError(
            f"groups of {k} do not divide the batch of {total} images",
            f"train.batch_size={max(round(total / k), 1) * k}",
            USAGE,
        )
    g = torch.Generator().manual_seed(seed)
    chosen = torch.cat([torch.randperm(prompts, generator=g) for _ in range(-(-total // (k * prompts)))])[: total // k]
    repeated = chosen.repeat_interleave(k)
    return repeated[torch.randperm(total, generator=g)][rank * batch_size : (rank + 1) * batch_size]


def advantages(rewards: Tensor, groups: Tensor, kind: Advantage = "grpo", global_std: bool = True) -> Tensor:
    """How much better than its group each image is: rewards (N,) or (N, T) float64, groups (N,) -> like rewards.

    grpo: (r - mean of the group) / (std + 1e-4), population std of all rewards (global_std) or of the group's. rwr: the
    rewards. sft: 1 for the best of the group, else 0. dpo: 1 for the best, -1 for the worst, 0 for the others; of a
    group of equals the second and the first.
    """
    rewards = rewards.double()
    out = torch.zeros_like(rewards)
    for group in groups.unique():
        own = groups == group
        r = rewards[own]
        if kind == "grpo":
            std = (rewards if global_std else r).std(0, correction=0)
            out[own] = (r - r.mean(0)) / (std + 1e-4)
        elif kind == "rwr":
            out[own] = r
        elif kind == "sft":
            out[own] = (r == r.max()).double()
        else:
            flat = r if r.ndim == 1 else r.mean(1)
            best, worst = int(flat.argmax()), int(flat.argmin())
            if best == worst:
                best, worst = min(1, len(flat) - 1), 0
            mark = torch.zeros_like(r)
            mark[best], mark[worst] = 1.0, -1.0
            out[own] = mark
    return out


def overall_advantages(rewards: Tensor) -> Tensor:
    """Without groups: (r - mean) / (std + 1e-4) of all rewards (N,), float64."""
    rewards = rewards.double()
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)


def worth_training(advantage: Tensor, parts: int, order: Tensor | None = None) -> Tensor:
    """(N,) bool: images with an advantage at some step, and as many of the others as make the count divide by `parts`.

    advantage: (N,) or (N, T). order: a permutation of those without, the first of which are put back; None: in order.
    """
    keep = advantage.reshape(len(advantage), -1).abs().sum(1) != 0
    idle = torch.where(~keep)[0]
    missing = -int(keep.sum()) % parts
    if missing and len(idle) >= missing:
        chosen = torch.arange(len(idle)) if order is None else order
        keep[idle[chosen[:missing].to(idle.device)]] = True
    return keep
