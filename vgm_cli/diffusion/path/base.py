"""What every Gaussian path has: alpha, sigma, their derivatives, and what follows from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.nn.shapes import expand

Time = Tensor | float


def as_time(t: Time) -> Tensor:
    """A floating tensor: numbers become float64, integers too."""
    t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
    return t if t.is_floating_point() else t.double()


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x) exactly: torch's turns linear above its threshold."""
    return -F.logsigmoid(-x)


class Path(ABC):
    """alpha, sigma, their derivatives, and what follows from them.

    t_min, t_max: the interval in which networks are evaluated; sigma(t_min) may be above 0 (the last step to data is
    then the denoised estimate). sigma_data: standard deviation of the data that the "F" prediction assumes.
    """

    name: ClassVar[str] = ""
    t_min: float = 0.0
    t_max: float = 1.0
    sigma_data: float = 0.5

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Scale of the data."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Scale of the noise."""

    @abstractmethod
    def alpha_prime(self, t: Time) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_prime(self, t: Time) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def t_of_logsnr(self, l: Time) -> Tensor:
        """The time at which logsnr(t) = l."""

    def options(self) -> dict[str, Any]:
        """Constructor keywords that rebuild this path."""
        return {}

    def logsnr(self, t: Time) -> Tensor:
        """lambda = ln(alpha^2 / sigma^2), decreasing in t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def ve_sigma(self, t: Time) -> Tensor:
        """sigma / alpha: the noise level of x_t / alpha, in which every path is variance exploding."""
        return self.sigma(t) / self.alpha(t)

    def t_of_ve_sigma(self, s: Time) -> Tensor:
        """The time at which sigma / alpha = s."""
        return self.t_of_logsnr(-2 * as_time(s).log())

    def f(self, t: Time) -> Tensor:
        """Drift of the forward SDE dx = f(t) x dt + g(t) dW."""
        return self.alpha_prime(t) / self.alpha(t)

    def g2(self, t: Time) -> Tensor:
        """Squared diffusion g(t)^2 = 2 sigma sigma' - 2 f sigma^2 of the forward SDE."""
        sigma = self.sigma(t)
        return 2 * sigma * (self.sigma_prime(t) - self.f(t) * sigma)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t: (B, ...) from x0 and noise (B, ...), t (B,)."""
        return (expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise).to(x0.dtype)

    def config(self) -> dict[str, Any]:
        """JSON-able; make_path(path.config()) is the same path."""
        return {"name": self.name, **self.options()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(repr(self.config()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"
