"""Colours of a restored picture taken from the first stage's, which has those of the input.

Official code: Fanghua-Yu/SUPIR@bda91af SUPIR/utils/colorfix.py (after pkuliyi2015/sd-webui-stablesr).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5
TAPS = ((1, 2, 1), (2, 4, 2), (1, 2, 1))


def wavelets(x: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """(details, rest) of pictures (B, C, H, W), which add up to them: the rest is x blurred by a binomial of 3x3 taps,
    1, 2, 4, … pixels apart; borders are repeated."""
    kernel = (torch.tensor(TAPS) / 16).to(x).expand(x.shape[1], 1, 3, 3)
    details = torch.zeros_like(x)
    for i in range(levels):
        reach = 2**i
        blurred = F.conv2d(F.pad(x, [reach] * 4, mode="replicate"), kernel, groups=x.shape[1], dilation=reach)
        details, x = details + (x - blurred), blurred
    return details, x


def wavelet_fix(x: Tensor, like: Tensor, levels: int = LEVELS) -> Tensor:
    """x with the coarse colours of `like`, both (B, C, H, W)."""
    return wavelets(x, levels)[0] + wavelets(like, levels)[1]


def adain_fix(x: Tensor, like: Tensor) -> Tensor:
    """x with the mean and deviation of every channel of `like`, both (B, C, H, W)."""

    def moments(v: Tensor) -> tuple[Tensor, Tensor]:
        return v.mean((2, 3), keepdim=True), (v.flatten(2).var(2) + 1e-5).sqrt()[..., None, None]

    (mean, std), (own_mean, own_std) = moments(like), moments(x)
    return (x - own_mean) / own_std * std + mean
