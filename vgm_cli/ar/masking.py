"""Which positions of a sequence are masked: schedules of how many, and the choice of which.

MaskGIT (Chang et al. 2022, arXiv 2202.04200), its Halton variant (Besnier et al. 2025, arXiv 2503.17076) and MAR (Li et
al. 2024, arXiv 2406.11838). Official code: google-research/maskgit@1db2359 maskgit/libml/{mask_schedule,
parallel_decode}.py, valeoai/Halton-MaskGIT@f61b0a1 Utils/masking_scheduler.py, LTH14/mar@fe470ac models/mar.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError

POWERS = {"root": 0.5, "linear": 1.0, "square": 2.0, "cubic": 3.0}
KNOWN = "cosine, arccos, log, exp, root, linear, square, cubic, or pow with a number (pow2.5)"


# -- how many ------------------------------------------------------------------------------------------------------


def mask_rate(ratio: Tensor, schedule: str, total: Tensor | int) -> Tensor:
    """The fraction of `total` positions that is masked, in [0, 1]: 1 where ratio is 0, falling to 0 at 1. ratio and
    total broadcast against each other; only log and exp ask how many positions there are.

    VgmError: no schedule of that name.
    """
    if schedule == "cosine":
        rate = torch.cos(ratio * (math.pi / 2))
    elif schedule == "arccos":
        rate = torch.arccos(ratio) / (math.pi / 2)
    elif schedule in ("log", "exp"):
        bits = torch.as_tensor(total, device=ratio.device).to(ratio.dtype).log2()
        rate = -torch.log2(ratio) / bits if schedule == "log" else 1 - torch.exp2(-bits * (1 - ratio))
    else:
        rate = 1 - ratio ** power_of(schedule)
    return rate.clamp(0, 1).masked_fill(ratio >= 1, 0)


def power_of(schedule: str) -> float:
    """E of 1 - ratio^E."""
    try:
        power = POWERS.get(schedule) or float(schedule.removeprefix("pow"))
    except ValueError:
        power = math.nan
    if not (schedule in POWERS or schedule.startswith("pow")) or not 0 < power < math.inf:
        raise VgmError(f"no mask schedule '{schedule}'", f"known: {KNOWN}", USAGE)
    return power


def still_masked(total: Tensor, masked: Tensor, rate: Tensor | float) -> Tensor:
    """How many positions stay masked after a step of decoding: total * rate rounded down, but at least one fewer than
    now, and never none: the last step's codes are the result, whatever would be masked after it.

    total, masked: int64 of any one shape, the positions masked at the start and now.
    """
    return torch.floor(total * rate).long().minimum(masked - 1).clamp(min=1)


def known_after(ratios: Tensor, schedule: str, total: Tensor | int) -> Tensor:
    """How many of `total` positions are known after each step: the part that is not masked at ratios (T,), rounded
    down, but at least one after the first step, two after the second, and so on. (T,) int64; (T, B) for totals (B,).

    Where the part is a whole number, rounding decides: the published counts are those of float32 ratios, of which a
    power is the part that is known itself, not what is left of 1.
    """
    least = torch.arange(1, len(ratios) + 1, device=ratios.device)
    if isinstance(total, Tensor):
        ratios, least = ratios[:, None], least[:, None]
    if schedule in ("cosine", "arccos", "log", "exp"):
        part = 1 - mask_rate(ratios, schedule, total)
    else:
        part = ratios.clamp(0, 1) ** power_of(schedule)
    return (part * total).long().maximum(least)


def truncated_normal_rate(u: Tensor, minimum: float, deviation: float = 0.25) -> Tensor:
    """MAR's mask rate in training, a normal about 1 cut to [minimum, 1]: its quantile at u, uniform in [0, 1)."""
    least = (minimum - 1) / deviation
    lowest = torch.special.ndtr(torch.tensor(least, dtype=u.dtype, device=u.device))
    rate = (1 + deviation * torch.special.ndtri(lowest + u * (0.5 - lowest))).clamp(minimum, 1)
    return rate.masked_fill(u <= 0, least * deviation + 1)  # scipy's, whose last bit may count one token more


# -- which ---------------------------------------------------------------------------------------------------------


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform draws in [0, 1); that of 0 is the least that a float gives, not -infinity."""
    return -torch.log(-torch.log(u.clamp(min=torch.finfo(u.dtype).tiny)))


def confidence(log_p: Tensor, known: Tensor, noise: Tensor, temperature: Tensor | float) -> Tensor:
    """How sure a sampled code is, (B, N): its log-probability plus temperature times (Gumbel) noise, without end where
    the code was known before. log_p, noise: (B, N); known: (B, N) bool."""
    return (log_p + temperature * noise).masked_fill(known, torch.inf)


def least_confident(confidence: Tensor, n: Tensor | int) -> Tensor:
    """(B, N) bool: true for the n positions of each row that are to be masked again. n: (B,) int64, or one for all.

    Of positions as confident as the first that stays, none is masked: there may be fewer than n.
    """
    n = torch.as_tensor(n, device=confidence.device).expand(len(confidence))
    ordered = F.pad(confidence.sort(dim=-1).values, (0, 1), value=torch.inf)
    return confidence < ordered.gather(-1, n[:, None])


def kept_codes(mask: Tensor, grid: tuple[int, int], margin: int = 0) -> Tensor:
    """Which codes of a grid are kept where an image is edited, (B, h, w) bool: those under which every pixel is kept.

    mask: (B, 1, H, W) bool, true where a pixel is kept. margin: codes so many places or fewer from a lost one are lost,
    too.
    """
    lost = F.adaptive_max_pool2d((~mask).float(), grid)
    if margin:
        lost = F.max_pool2d(lost, 2 * margin + 1, stride=1, padding=margin)
    return lost[:, 0] == 0


def first_of(orders: Tensor, n: Tensor | int) -> Tensor:
    """(B, N) bool: true at the first n positions of each row's order. orders: (B, N) int64; n: one for all, or (B,)."""
    n = n[:, None] if isinstance(n, Tensor) else n
    places = torch.arange(orders.shape[-1], device=orders.device) < n
    return torch.zeros_like(orders, dtype=torch.bool).scatter(-1, orders, places.expand_as(orders))
