"""Which timesteps to train on: uniform, or by the second moment of their losses (IDDPM section 3.3, 2102.09672).

Behaviour follows openai/guided-diffusion@22e0df8 resample.py. Deviation: timesteps are a pure function of a uniform
draw (inverse of the distribution function) instead of numpy's global generator.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_cli.errors import unknown


def draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) int64 and importance weights 1 / (T p_t) (B,) fp32 from weights (T,) and u: (B,) in [0, 1)."""
    p = (weights / weights.sum()).to(u.device)
    edges = p.cumsum(0)
    t = torch.searchsorted(edges / edges[-1], u.double(), right=True).clamp(max=len(p) - 1)
    return t, (1.0 / (len(p) * p[t])).float()


class UniformResampler:
    """Draws every timestep alike: the base of the samplers of timesteps, which says what each of them has."""

    def __init__(self, steps: int):
        self.steps = steps

    def weights(self) -> Tensor:
        """How likely each timestep is, (T,) float64 on the CPU, positive, not necessarily of sum 1."""
        return torch.ones(self.steps, dtype=torch.float64)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Learn from per-sample losses (B,) at timesteps (B,), in order; here there is nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


class LossSecondMomentResampler:
    """p_t proportional to sqrt(E[L_t^2]) over the last `history_per_term` losses; uniform until every t has that many.

    uniform_prob: share of a uniform distribution mixed in.
    """

    def __init__(self, steps: int, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.uniform_prob = uniform_prob
        self.history = torch.zeros(steps, history_per_term, dtype=torch.float64)
        self.counts = torch.zeros(steps, dtype=torch.int64)

    @property
    def warmed_up(self) -> bool:
        return bool((self.counts == self.history.shape[1]).all())

    def weights(self) -> Tensor:
        if not self.warmed_up:
            return torch.ones(len(self.history), dtype=torch.float64)
        w = self.history.square().mean(dim=1).sqrt()
        return w / w.sum() * (1 - self.uniform_prob) + self.uniform_prob / len(w)

    def update(self, t: Tensor, loss: Tensor) -> None:
        for i, value in zip(t.tolist(), loss.double().tolist()):
            n = int(self.counts[i])
            if n == self.history.shape[1]:  # full: the oldest leaves
                self.history[i] = self.history[i].roll(-1)
                self.history[i, -1] = value
            else:
                self.history[i, n] = value
                self.counts[i] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.history.copy_(state["history"])
        self.counts.copy_(state["counts"])


RESAMPLERS: dict[str, type[UniformResampler] | type[LossSecondMomentResampler]] = {
    "uniform": UniformResampler,
    "loss-second-moment": LossSecondMomentResampler,
}


def build_resampler(name: str, steps: int) -> UniformResampler | LossSecondMomentResampler:
    """The resampler called `name` over `steps` timesteps. VgmError: unknown name."""
    if name not in RESAMPLERS:
        raise unknown("resampler", name, RESAMPLERS)
    return RESAMPLERS[name](steps)
