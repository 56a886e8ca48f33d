"""Inputs for `example(config)` (vgm_cli.api.HasExample): small, and the same at every call."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(*shape: int) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def label(classes: int) -> dict[str, Tensor]:
    """{"y": (1,)}, the second class where there are several; {} without classes."""
    return {"y": torch.tensor([min(1, classes - 1)])} if classes else {}


def images(channels: int, side: int, classes: int = 0, t: float = 0.625) -> dict[str, Tensor]:
    """Of a network of noisy images: x (1, C, H, W), t (1,) and, where there are classes, y (1,)."""
    return {"x": noise(1, channels, side, side), "t": torch.tensor([t]), **label(classes)}


def tokens(count: int, vocabulary: int) -> Tensor:
    """Ids in [0, vocabulary): (1, count)."""
    return (torch.arange(count) * 7 % vocabulary)[None]
