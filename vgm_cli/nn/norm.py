"""Normalisations. RMSNorm: Zhang & Sennrich 2019 (arXiv 1910.07467), as Llama has it. Pixel norm: Karras et al. 2018
(1710.10196). Adaptive double normalisation: Lu & Song 2025 (2410.11081), sec. 4.1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times weight. x: (..., dim)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def unit(self, x: Tensor) -> Tensor:
        """x / rms(x), without the weight."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * self.weight


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x / sqrt(mean over channels of x^2 + eps): (B, C, ...) -> (B, C, ...)."""
    return x * (x.square().mean(1, keepdim=True) + eps).rsqrt()


def double_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalised maps x (B, C, H, W) times the pixel norm of scale (B, C), plus that of shift (B, C): what a condition
    does to x is bounded whatever its layer gives, so that derivatives by the time are, too."""
    scale, shift = (pixel_norm(v).to(x.dtype)[:, :, None, None] for v in (scale, shift))
    return x * scale + shift
