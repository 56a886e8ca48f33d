"""Measurement noise on the [-1, 1] scale.

Chung et al. 2022 (DPS, 2209.14687); DPS2022/diffusion-posterior-sampling@effbde7 guided_diffusion/measurements.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError, unknown


def numpy_rng(generator: torch.Generator) -> np.random.RandomState:
    """numpy's legacy stream, the one the DPS code draws masks and kernels from, seeded by one draw of `generator`."""
    return np.random.RandomState(int(torch.randint(2**31 - 1, (1,), generator=generator)))


class Noise:
    """name: as `--noise` takes it. sigma: standard deviation, for methods that assume Gaussian noise."""

    name: ClassVar[str] = ""
    sigma: float = 0.0

    def __call__(self, y: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """y: (B, ...) -> the same with noise, each item from its own generator."""
        raise AssertionError(f"{type(self).__name__} does not say what it adds")


class Clean(Noise):
    """No noise."""

    name = "none"

    def __call__(self, y: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return y


class Gaussian(Noise):
    """y + sigma n. The paper's sigma is 0.05."""

    name = "gaussian"

    def __init__(self, sigma: float = 0.05):
        if sigma < 0:
            raise VgmError(f"sigma={sigma}: a standard deviation is not negative", code=USAGE)
        self.sigma = sigma

    def __call__(self, y: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return y + self.sigma * torch.stack([torch.randn(y.shape[1:], generator=g) for g in generators]).to(y)


class Poisson(Noise):
    """Shot noise: 255 * rate photons at white, counted and scaled back; clamped to [-1, 1]. sigma: that of mid-grey."""

    name = "poisson"

    def __init__(self, rate: float = 1.0):
        if rate <= 0:
            raise VgmError(f"rate={rate}: at least some light is needed", code=USAGE)
        self.rate, self.sigma = rate, (2 / (255 * rate)) ** 0.5

    def counts(self, y: Tensor) -> Tensor:
        """Expected photons of y: (B, ...)."""
        return ((y + 1) / 2).clamp(0, 1) * 255.0 * self.rate

    def draw(self, y: Tensor, rng: np.random.RandomState) -> Tensor:
        """y with the noise of one numpy stream: float64, like y."""
        counts = rng.poisson(self.counts(y).detach().cpu().numpy())
        return (torch.from_numpy(counts / 255.0 / self.rate) * 2 - 1).clamp(-1, 1)

    def __call__(self, y: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.stack([self.draw(row, numpy_rng(g)) for row, g in zip(y, generators)]).to(y)


NOISES: dict[str, type[Noise]] = {c.name: c for c in (Clean, Gaussian, Poisson)}


def noise_class(name: str) -> type[Noise]:
    """VgmError: unknown name."""
    if name not in NOISES:
        raise unknown("noise", name, NOISES)
    return NOISES[name]
