"""Curricula: how many noise levels N(k), how slow a target mu(k), and which neighbours to compare.

Song et al. 2023 (2303.01469), app. C; openai/consistency_models@e32b69e cm/script_util.py create_ema_and_scales_fn.
Improved consistency training: Song & Dhariwal 2023 (2310.14189), eq. 6-11.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError

ScaleMode = Literal["fixed", "progressive", "doubling", "progdist"]
TargetMode = Literal["fixed", "adaptive", "none"]


def scales(mode: ScaleMode, step: int, total: int, start: int, end: int, per_stage: int = 50_000) -> int:
    """N(k), the number of levels at optimisation step k of `total`.

    fixed: start. progressive (consistency training): about sqrt(k) from start + 1 to end + 1. doubling (iCT): from
    start + 1 to end + 1, twice as many at equal intervals. progdist (progressive distillation): halved every per_stage
    steps, the last two halvings after twice as many.
    """
    if mode == "fixed":
        return start
    if mode == "progressive":
        return before_one(step, total, start, end) + 1
    if mode == "doubling":
        interval = math.floor(total / (math.log2(end // start) + 1))
        return min(start * 2 ** min(step // max(interval, 1), 60), end) + 1
    stage = max(start // 2 ** min(step // per_stage, 60), 2)
    if stage > 2:
        return stage
    late = max(step - per_stage * (math.log2(start) - 1), 0) // (2 * per_stage)
    return max(2 // 2 ** min(int(late), 60), 1)


def before_one(step: int, total: int, start: int, end: int) -> int:
    """The progressive count without the 1 that is added last."""
    return max(math.ceil(math.sqrt(step / total * ((end + 1) ** 2 - start**2) + start**2) - 1), 1)


def target_ema(
    mode: TargetMode, scale_mode: ScaleMode, step: int, total: int, mu: float, start: int, end: int
) -> float:
    """mu(k), the decay of the target network. adaptive: exp(start ln(mu) / N), N progressive, before its 1 is added.

    none: 0, the target is the student. VgmError: adaptive with another curriculum of N.
    """
    if mode == "none":
        return 0.0
    if scale_mode == "progdist":
        return 1.0
    if mode == "fixed":
        return mu
    if scale_mode != "progressive":
        raise VgmError("target_ema=adaptive goes with scale_mode=progressive", "target_ema=fixed or none", USAGE)
    return math.exp(math.log(mu) * start / before_one(step, total, start, end))


def lognormal_probabilities(sigmas: Tensor, P_mean: float = -1.1, P_std: float = 2.0) -> Tensor:
    """iCT's discretised log-normal over neighbours of ascending levels sigmas (N,): (N - 1,), sums to 1."""
    cdf = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))
    mass = cdf.diff()
    return mass / mass.sum()


def draw_pairs(
    uniform: Tensor, count: int, sigmas: Tensor | None = None, P_mean: float = -1.1, P_std: float = 2.0
) -> Tensor:
    """Descending indices 0..count - 2 of the noisier of two neighbours from a uniform draw (B,): (B,) int64.

    sigmas: ascending levels (count,) for iCT's log-normal; None is uniform.
    """
    if sigmas is None:
        return (uniform.double() * (count - 1)).floor().long().clamp(max=count - 2)
    cdf = lognormal_probabilities(sigmas, P_mean, P_std).cumsum(0).to(uniform.device)
    pair = torch.searchsorted(cdf, uniform.double() * cdf[-1], right=True).clamp(max=count - 2)
    return count - 2 - pair
