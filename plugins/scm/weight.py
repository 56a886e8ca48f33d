"""The adaptive weight e^w(t), learned beside the network. Lu & Song 2025 (2410.11081), sec. 4.2; Karras et al. 2024
(2312.02696), sec. 2.2: e^w L - w is smallest where e^-w is the mean of L at that t, so that all t weigh alike."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class KnowsError(Protocol):
    """A network with an output of its own for the logarithm of its mean squared error at a time: -w."""

    def log_variance(self, t: Tensor) -> Tensor:
        """t: (N,), as forward is told it -> (N,)."""
        ...

    def reset_log_variance(self) -> None:
        """Begin anew, as the loss of consistency training is another one."""
        ...


class Head(nn.Module):
    """w of a network that has none: a linear layer on waves of t in [0, pi / 2]. (N,) -> (N,); 0 at first."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.waves = width // 2

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(self.waves, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(k * (math.log(10) / (self.waves - 1)))  # frequencies 1 to 10
        return self.linear(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear.weight.dtype))[:, 0]
