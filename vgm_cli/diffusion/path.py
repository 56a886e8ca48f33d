"""Gaussian paths x_t = alpha(t) x0 + sigma(t) eps: the schedule half of every diffusion and flow model.

t runs from data to noise: [0, 1] unless a path says otherwise (EDM: t is sigma). Sources: Song et al. 2021 (VP, sub-VP,
VE; 2011.13456), Karras et al. 2022 (EDM; 2206.00364), Lipman et al. 2023 (linear; 2210.02747), Nichol & Dhariwal 2021
and Salimans & Ho 2022 (cosine), Ho et al. 2020 (discrete steps), Esser et al. 2024 (time shift; 2403.03206).
Every function takes t as a tensor of any shape or a number, and gives a tensor of that shape: t's dtype, float64 for
a number.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.diffusion.discrete import named_betas
from vgm_cli.errors import USAGE, VgmError, unknown

Time = Tensor | float


def as_time(t: Time) -> Tensor:
    """A floating tensor: numbers become float64, integers too."""
    t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
    return t if t.is_floating_point() else t.double()


def expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) against x (B, ...): (B, 1, ...); a 0-dim tensor stays as it is."""
    return t if t.ndim in (0, x.ndim) else t.reshape(-1, *[1] * (x.ndim - 1))


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


class LinearPath(Path):
    """alpha = 1 - t, sigma = noise_scale * t: flow matching, rectified flow. t_max: where networks start, at most 1."""

    name = "linear"

    def __init__(self, noise_scale: float = 1.0, t_max: float = 1.0):
        if not (noise_scale > 0 and 0 < t_max <= 1):
            raise VgmError("a linear path needs noise_scale above 0 and t_max in (0, 1]", code=USAGE)
        self.noise_scale, self.t_max = noise_scale, t_max

    def options(self) -> dict[str, Any]:
        given = {"noise_scale": self.noise_scale, "t_max": self.t_max}
        return {k: v for k, v in given.items() if v != 1.0}

    def alpha(self, t: Time) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return self.noise_scale * as_time(t)

    def alpha_prime(self, t: Time) -> Tensor:
        return -torch.ones_like(as_time(t))

    def sigma_prime(self, t: Time) -> Tensor:
        return torch.full_like(as_time(t), self.noise_scale)

    def logsnr(self, t: Time) -> Tensor:
        t = as_time(t)
        return 2 * (torch.log1p(-t) - t.log() - math.log(self.noise_scale))

    def t_of_logsnr(self, l: Time) -> Tensor:
        return torch.sigmoid(-as_time(l) / 2 - math.log(self.noise_scale))

    def t_of_ve_sigma(self, s: Time) -> Tensor:
        return 1 / (1 + self.noise_scale / as_time(s))  # 1 at s = inf


class CosinePath(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): GVP, TrigFlow, the continuous cosine schedule."""

    name = "cosine"

    def alpha(self, t: Time) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - as_time(t)))  # exactly 0 at t = 1

    def sigma(self, t: Time) -> Tensor:
        return torch.sin(math.pi / 2 * as_time(t))

    def alpha_prime(self, t: Time) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def sigma_prime(self, t: Time) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def t_of_logsnr(self, l: Time) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-as_time(l) / 2))


class TrigPath(Path):
    """TrigFlow (Lu & Song 2025, 2410.11081): x_t = cos(t) x0 + sin(t) z, z ~ N(0, sigma_data^2), t in [0, pi / 2].

    A network F of it, x0 = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t), gives velocity / sigma_data: it is a
    Denoiser of prediction "trig".
    """

    name = "trig"

    def __init__(self, sigma_data: float = 0.5):
        self.sigma_data, self.t_max = sigma_data, math.pi / 2

    def options(self) -> dict[str, Any]:
        return {"sigma_data": self.sigma_data}

    def alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        return torch.where(t == self.t_max, torch.zeros_like(t), torch.cos(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_data * torch.sin(as_time(t))

    def alpha_prime(self, t: Time) -> Tensor:
        return -torch.sin(as_time(t))

    def sigma_prime(self, t: Time) -> Tensor:
        return self.sigma_data * torch.cos(as_time(t))

    def t_of_logsnr(self, l: Time) -> Tensor:
        return torch.atan(torch.exp(-as_time(l) / 2) / self.sigma_data)


class VPPath(Path):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min): alpha = e^c, c = -int_0^t beta / 2."""

    name = "vp"

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3):
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def options(self) -> dict[str, Any]:
        return {"beta_min": self.beta_min, "beta_max": self.beta_max, "t_min": self.t_min}

    def beta(self, t: Time) -> Tensor:
        return self.beta_min + as_time(t) * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Time) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def alpha_prime(self, t: Time) -> Tensor:
        return -self.beta(t) / 2 * self.alpha(t)

    def sigma_prime(self, t: Time) -> Tensor:
        return self.beta(t) * self.alpha(t) ** 2 / (2 * self.sigma(t))

    def logsnr(self, t: Time) -> Tensor:
        c = self.log_alpha(t)
        return 2 * c - (-torch.expm1(2 * c)).log()

    def t_of_logsnr(self, l: Time) -> Tensor:
        return self.t_of_log_alpha(-softplus(-as_time(l)) / 2)

    def t_of_log_alpha(self, c: Tensor) -> Tensor:
        # the positive root of t^2 (beta_max - beta_min) / 2 + t beta_min + 2 c = 0, free of cancellation
        q = -2 * c
        return 2 * q / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * q).sqrt())


class SubVPPath(VPPath):
    """Sub-variance preserving: VP's alpha, sigma = 1 - alpha^2."""

    name = "subvp"

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def sigma_prime(self, t: Time) -> Tensor:
        return self.beta(t) * self.alpha(t) ** 2

    def logsnr(self, t: Time) -> Tensor:
        return 2 * (self.log_alpha(t) - self.sigma(t).log())

    def t_of_logsnr(self, l: Time) -> Tensor:
        # alpha / (1 - alpha^2) = r = e^{l/2}: ln alpha = -asinh(1 / (2 r))
        return self.t_of_log_alpha(-torch.asinh(torch.exp(-as_time(l) / 2) / 2))


class VEPath(Path):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t."""

    name = "ve"

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def options(self) -> dict[str, Any]:
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * torch.exp(as_time(t) * math.log(self.sigma_max / self.sigma_min))

    def alpha_prime(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma_prime(self, t: Time) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def t_of_logsnr(self, l: Time) -> Tensor:
        return (-as_time(l) / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


class EDMPath(Path):
    """EDM: t is the noise level itself, alpha = 1, sigma = t in [sigma_min, sigma_max]."""

    name = "edm"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5):
        self.t_min, self.t_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def options(self) -> dict[str, Any]:
        return {"sigma_min": self.t_min, "sigma_max": self.t_max, "sigma_data": self.sigma_data}

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def alpha_prime(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma_prime(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def t_of_logsnr(self, l: Time) -> Tensor:
        return torch.exp(-as_time(l) / 2)

    def t_of_ve_sigma(self, s: Time) -> Tensor:
        return as_time(s).clone()


class DiscreteVPPath(Path):
    """DDPM's discrete steps made continuous: index i (0 least noisy) sits at t = (i + 1) / steps, data at t = 0.

    ln alpha-bar is linear between steps, so alpha and sigma are the official ones at every integer index. schedule,
    beta_start, beta_end: see discrete.named_betas; betas: given ones instead. zero_terminal_snr: rescaled so that the
    last step is noise (Lin et al. 2023), its alpha-bar kept at 2^-24 as in diffusers. VgmError: unknown schedule.
    """

    name = "vp-discrete"

    def __init__(
        self,
        schedule: str = "linear",
        steps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
        betas: Sequence[float] | None = None,
    ):
        self.schedule, self.beta_start, self.beta_end = schedule, beta_start, beta_end
        self.zero_terminal_snr, self.given = zero_terminal_snr, betas is not None
        values = named_betas(schedule, steps, beta_start, beta_end) if betas is None else np.asarray(betas, np.float64)
        self.steps = len(values)
        self.t_min = 1 / self.steps
        log_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-values))])
        if zero_terminal_snr:
            root = np.exp(log_bar[1:] / 2)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            log_bar[1:] = np.log(np.maximum(root**2, 2.0**-24))
        self.log_alpha_bar = torch.from_numpy(log_bar)  # (steps + 1,), entry 0 is data
        self.betas = -torch.expm1(self.log_alpha_bar.diff())  # (steps,) float64

    def options(self) -> dict[str, Any]:
        if self.given:
            return {"betas": self.betas.tolist()}
        named = {"schedule": self.schedule, "steps": self.steps}
        optional = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        optional["zero_terminal_snr"] = self.zero_terminal_snr or None
        return named | {k: v for k, v in optional.items() if v is not None}

    @property
    def alphas_cumprod(self) -> Tensor:
        """(steps,) float64."""
        return self.log_alpha_bar[1:].exp()

    def position(self, t: Time) -> Tensor:
        """t * steps in float64, snapped to the integer it stands for."""
        at = as_time(t).double() * self.steps
        near = at.round()
        return torch.where((at - near).abs() < 1e-4, near, at)  # float32 times are off by up to 6e-5 steps

    def timestep(self, t: Time) -> Tensor:
        """The network's index in [0, steps - 1], fractional between steps: float64."""
        return (self.position(t) - 1).clamp(0, self.steps - 1)

    def t_of_timestep(self, index: Time) -> Tensor:
        """The time of an index."""
        return (as_time(index).double() + 1) / self.steps

    def _log_bar(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """ln alpha-bar, its slope in t (of the interval below), and t as a tensor."""
        t = as_time(t)
        at = self.position(t).clamp(0, self.steps)
        table = self.log_alpha_bar.to(at.device)
        upper = at.ceil().clamp(min=1).long()
        low, high = table[upper - 1], table[upper]
        w = at - (upper - 1)
        return torch.where(w == 1, high, low + w * (high - low)), (high - low) * self.steps, t

    def alpha(self, t: Time) -> Tensor:
        bar, _, t = self._log_bar(t)
        return torch.exp(bar / 2).to(t.dtype)

    def sigma(self, t: Time) -> Tensor:
        bar, _, t = self._log_bar(t)
        return (-torch.expm1(bar)).sqrt().to(t.dtype)

    def alpha_prime(self, t: Time) -> Tensor:
        bar, slope, t = self._log_bar(t)
        return (torch.exp(bar / 2) * slope / 2).to(t.dtype)

    def sigma_prime(self, t: Time) -> Tensor:
        bar, slope, t = self._log_bar(t)
        return (-bar.exp() * slope / (2 * (-torch.expm1(bar)).sqrt())).to(t.dtype)

    def logsnr(self, t: Time) -> Tensor:
        bar, _, t = self._log_bar(t)
        return (bar - (-torch.expm1(bar)).log()).to(t.dtype)

    def t_of_logsnr(self, l: Time) -> Tensor:
        l = as_time(l)
        bar = -softplus(-l.double())
        table = self.log_alpha_bar.to(l.device)
        upper = torch.searchsorted(-table, -bar.contiguous()).clamp(1, self.steps)
        low, high = table[upper - 1], table[upper]
        return ((upper - 1 + ((bar - low) / (high - low)).clamp(0, 1)) / self.steps).to(l.dtype)


class ShiftedPath(Path):
    """Another path read at t' = shift t / (1 + (shift - 1) t): SD3's time shift, noisier at equal t for shift > 1."""

    name = "shifted"

    def __init__(self, base: str | Mapping[str, Any] | Path = "linear", shift: float = 3.0):
        self.base, self.shift = make_path(base), shift
        if (self.base.t_max, shift > 0) != (1.0, True):
            raise VgmError("a time shift needs a path on [0, 1] and shift above 0", code=USAGE)
        self.t_min = float(unshift_time(self.base.t_min, shift))
        self.sigma_data = self.base.sigma_data

    def options(self) -> dict[str, Any]:
        return {"base": self.base.config(), "shift": self.shift}

    def _slope(self, t: Time) -> Tensor:
        return self.shift / (1 + (self.shift - 1) * as_time(t)) ** 2

    def alpha(self, t: Time) -> Tensor:
        return self.base.alpha(shift_time(t, self.shift))

    def sigma(self, t: Time) -> Tensor:
        return self.base.sigma(shift_time(t, self.shift))

    def alpha_prime(self, t: Time) -> Tensor:
        return self.base.alpha_prime(shift_time(t, self.shift)) * self._slope(t)

    def sigma_prime(self, t: Time) -> Tensor:
        return self.base.sigma_prime(shift_time(t, self.shift)) * self._slope(t)

    def logsnr(self, t: Time) -> Tensor:
        return self.base.logsnr(shift_time(t, self.shift))

    def t_of_logsnr(self, l: Time) -> Tensor:
        return unshift_time(self.base.t_of_logsnr(l), self.shift)


def shift_time(t: Time, shift: float) -> Tensor:
    """t' = shift t / (1 + (shift - 1) t): sigma / alpha of the linear path times shift (SD3 eq. 23)."""
    t = as_time(t)
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Time, shift: float) -> Tensor:
    """The inverse of shift_time."""
    return shift_time(t, 1 / shift)


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x) exactly: torch's turns linear above its threshold."""
    return -F.logsigmoid(-x)


PATHS: dict[str, type[Path]] = {
    c.name: c
    for c in (LinearPath, CosinePath, TrigPath, VPPath, SubVPPath, VEPath, EDMPath, DiscreteVPPath, ShiftedPath)
}


def make_path(config: str | Mapping[str, Any] | Path) -> Path:
    """A path from its name, its config ({"name": "vp-discrete", "schedule": "cosine"}) or itself.

    VgmError: unknown name or option.
    """
    if isinstance(config, Path):
        return config
    options = {"name": config} if isinstance(config, str) else dict(config)
    name = options.pop("name", "")
    if name not in PATHS:
        raise unknown("path", name, PATHS)
    known = _options_of(name)
    for key in options:
        if key not in known:
            raise unknown("option", key, known, f"path '{name}'")
    return PATHS[name](**options)


@lru_cache
def _options_of(name: str) -> tuple[str, ...]:
    if PATHS[name].__init__ is object.__init__:
        return ()
    return tuple(p for p in inspect.signature(PATHS[name].__init__).parameters if p != "self")
