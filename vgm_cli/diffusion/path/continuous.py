"""Paths in continuous time: flow matching's line, cosine, TrigFlow, the processes of score-SDE, EDM."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vgm_cli.diffusion.path.base import Path, Time, as_time, softplus
from vgm_cli.errors import USAGE, VgmError


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

    def ve_sigma(self, t: Time) -> Tensor:
        return torch.expm1(-2 * self.log_alpha(t)).sqrt()

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

    def ve_sigma(self, t: Time) -> Tensor:
        return self.sigma(t) / self.alpha(t)

    def logsnr(self, t: Time) -> Tensor:
        return 2 * (self.log_alpha(t) - self.sigma(t).log())

    def t_of_logsnr(self, l: Time) -> Tensor:
        # alpha / (1 - alpha^2) = r = e^{l/2}: ln alpha = -asinh(1 / (2 r))
        return self.t_of_log_alpha(-torch.asinh(torch.exp(-as_time(l) / 2) / 2))


class VEPath(Path):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t."""

    name = "ve"

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 0.0):
        self.sigma_min, self.sigma_max, self.t_min = sigma_min, sigma_max, t_min

    def options(self) -> dict[str, Any]:
        named = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return {**named, "t_min": self.t_min} if self.t_min else named

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
