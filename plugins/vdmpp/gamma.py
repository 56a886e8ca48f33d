"""VDM's noise schedules gamma(t) = -log-SNR, growing from t = 0 (data) to 1. Kingma et al. 2021 (2107.00630), app. H.

Official code: google-research/vdm@dc27b98a model_vdm.py. Deviation: `Monotone` keeps its ends where they are told
(gamma(0) = b, gamma(1) = b + |w|), as the paper has it and the official code does not, and its units begin as steps
spread over t; pinned=False is the official network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Tap = Callable[[Tensor], Tensor]
FEATURES = 1024


class Gamma(nn.Module):
    """gamma and its derivative; gamma_min, gamma_max: the ends that a schedule starts from."""

    def __init__(self, gamma_min: float, gamma_max: float):
        super().__init__()
        self.gamma_min, self.gamma_max = gamma_min, gamma_max

    def shape_of(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The schedule between its ends: from 0 at t = 0 to 1 at t = 1, and its derivative; t itself here."""
        return t, torch.ones_like(t)

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """gamma(0), and gamma(1) - gamma(0)."""
        return like.new_tensor(self.gamma_min), like.new_tensor(self.gamma_max - self.gamma_min)

    def forward(self, t: Tensor, tap: Tap | None = None) -> tuple[Tensor, Tensor]:
        """gamma(t) and its derivative, like t and in t's precision.

        tap: what a gradient that comes back to the shape becomes, one number for each t; the ends keep theirs.
        """
        shape, slope = self.shape_of(t)
        if tap is not None and shape.requires_grad:
            shape.register_hook(tap)
            slope.register_hook(tap)
        start, span = self.ends(t)
        return start + span * shape, span * slope

    @torch.no_grad()
    def inverse(self, gamma: Tensor) -> Tensor:
        """The t in [0, 1] at which gamma is reached, the nearer end beyond them: by bisection."""
        low, high = torch.zeros_like(gamma, dtype=torch.float64), torch.ones_like(gamma, dtype=torch.float64)
        for _ in range(54):
            middle = (low + high) / 2
            below = self(middle)[0] < gamma
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class Linear(Gamma):
    """gamma_min + (gamma_max - gamma_min) t: nothing to learn."""


class Scalar(Gamma):
    """b + |w| t: only the ends are learned."""

    def __init__(self, gamma_min: float, gamma_max: float):
        super().__init__(gamma_min, gamma_max)
        self.w = nn.Parameter(torch.full((1,), gamma_max - gamma_min))
        self.b = nn.Parameter(torch.full((1,), gamma_min))

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.b[0].to(like), self.w[0].abs().to(like)


class Monotone(Gamma):
    """A monotone network of one hidden layer, all of whose weights count by their absolute value.

    learn_ends: b and |w| are learned. pinned: the shape is scaled so that it starts at 0 and ends at 1; the network
    then adds to t, officially to |w| t.
    """

    def __init__(
        self,
        gamma_min: float,
        gamma_max: float,
        learn_ends: bool = True,
        pinned: bool = True,
        features: int = FEATURES,
    ):
        super().__init__(gamma_min, gamma_max)
        self.pinned, self.learn_ends = pinned, learn_ends
        if learn_ends:
            self.l1 = nn.Linear(1, 1)
            nn.init.constant_(self.l1.weight, gamma_max - gamma_min)
            nn.init.constant_(self.l1.bias, gamma_min)
        self.l2, self.l3 = nn.Linear(1, features), nn.Linear(features, 1, bias=False)
        for layer in (self.l2, self.l3):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.l2.bias)
        if pinned:  # steps all along t: units that start alike and near 0 add lines only, which the scaling takes out
            nn.init.constant_(self.l2.weight, 10.0)
            with torch.no_grad():
                self.l2.bias.copy_(torch.linspace(-10, 10, features))

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if not self.learn_ends:
            return super().ends(like)
        return self.l1.bias[0].to(like), self.l1.weight[0, 0].abs().to(like)

    def bend(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the hidden layer adds to the straight line, and its derivative: like t."""
        inner = self.l2.weight[:, 0].abs().to(t)
        outer = self.l3.weight[0].abs().to(t) / len(inner)
        s = torch.sigmoid(2 * (t[..., None] - 0.5) * inner + self.l2.bias.to(t))  # (..., features)
        return 2 * (s - 0.5) @ outer, 4 * (s * (1 - s)) @ (inner * outer)

    def shape_of(self, t: Tensor) -> tuple[Tensor, Tensor]:
        bend, slope = self.bend(t)
        if not self.pinned:
            span = self.ends(t)[1]
            return t + bend / span, 1 + slope / span
        (first, last), _ = self.bend(t.new_tensor([0.0, 1.0]))
        whole = 1 + last - first
        return (t + bend - first) / whole, (1 + slope) / whole
