"""Weights w(lambda) of the squared error of eps, as functions of the log-SNR lambda alone. Kingma & Gao 2023, table 1.

Every diffusion loss is L_w = 1/2 int w(lambda) E||eps_hat - eps||^2 dlambda, whatever the network predicts and wherever
training draws its noise levels: a paper's weight is the density that it draws from times the factor that its own loss
has on the error of eps. Weights are up to a constant.

Where w does not increase with lambda (MONOTONE), L_w is an expectation of negative ELBOs: of data to which Gaussian
noise was added, at a level drawn from the density dw / w(lambda_min). The others have no such reading.
Functions take and give tensors of any shape; where nothing else is said they are the paper's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError, unknown

Weight = Callable[[Tensor], Tensor]

EDM_MEAN, EDM_STD = 2.4, 2.4  # of lambda = -2 ln sigma, where ln sigma is drawn from N(-1.2, 1.2^2)


def sech(x: Tensor) -> Tensor:
    """1 / cosh(x), which does not overflow."""
    return 2 * torch.exp(-x.abs()) / (1 + torch.exp(-2 * x.abs()))


def normal_density(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def elbo(l: Tensor) -> Tensor:
    """1: the likelihood's own bound (VDM)."""
    return torch.ones_like(l)


def sigmoid(l: Tensor, bias: float = 2.0) -> Tensor:
    """sigmoid(bias - lambda), the paper's own; it tried biases of 1, 2 and 3 (recalled)."""
    return torch.sigmoid(bias - l)


def edm(l: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM: the error of F, e^-lambda + sigma_data^2 that of eps up to a constant, at levels from N(2.4, 2.4^2)."""
    return normal_density(l, EDM_MEAN, EDM_STD) * (torch.exp(-l) + sigma_data**2)


@lru_cache
def edm_peak(sigma_data: float = 0.5) -> tuple[float, float]:
    """Where `edm` is largest, on a grid of 1e-4 over [-20, 20], and its value there."""
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64, device="cpu")
    values = edm(grid, sigma_data)
    best = int(values.argmax())
    return float(grid[best]), float(values[best])


def edm_monotonic(l: Tensor, sigma_data: float = 0.5) -> Tensor:
    """`edm` above the log-SNR of its maximum, that maximum below: the smallest monotone weight that is nowhere less."""
    where, most = edm_peak(sigma_data)
    return torch.where(l > where, edm(l, sigma_data), torch.full_like(l, most))


def eps_cosine(l: Tensor) -> Tensor:
    """The unweighted error of eps on the cosine schedule (Nichol & Dhariwal 2021)."""
    return sech(l / 2)


def v_cosine(l: Tensor) -> Tensor:
    """The unweighted error of v on the cosine schedule (Salimans & Ho 2022)."""
    return torch.exp(-l / 2)


def fm_ot(l: Tensor) -> Tensor:
    """Flow matching on straight lines, uniform times, error of the velocity or of v: the same as `v_cosine`."""
    return torch.exp(-l / 2)


def indi(l: Tensor) -> Tensor:
    """InDI (Delbracio & Milanfar 2023): the error of x0 at the noise levels of flow matching."""
    return torch.exp(-l) * sech(l / 4) ** 2


def p2(l: Tensor, gamma: float = 1.0) -> Tensor:
    """P2 (Choi et al. 2022) with k = 1 on the cosine schedule: `eps_cosine` / (1 + SNR)^gamma."""
    return sech(l / 2) / (1 + torch.exp(l)) ** gamma


def min_snr(l: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR (Hang et al. 2023) on the cosine schedule: min(SNR, gamma) on the error of x0."""
    return sech(l / 2) * torch.clamp(gamma * torch.exp(-l), max=1.0)


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "elbo": elbo,
    "sigmoid": sigmoid,
    "edm": edm,
    "edm-monotonic": edm_monotonic,
    "eps-cosine": eps_cosine,
    "v-cosine": v_cosine,
    "fm-ot": fm_ot,
    "indi": indi,
    "p2": p2,
    "min-snr": min_snr,
}
MONOTONE = ("elbo", "sigmoid", "edm-monotonic", "v-cosine", "fm-ot", "indi")


def shift_of(resolution: int | None) -> float:
    """2 ln(64 / resolution): how far images of another side than 64 move their log-SNR; 0 for None."""
    return 0.0 if resolution is None else 2 * math.log(64 / resolution)


def make_weight(config: str | Mapping[str, Any], shift: float = 0.0) -> Weight:
    """w from its name or {"name": ..., options}, moved by `shift` along the log-SNR. VgmError: no such name, option."""
    options = {"name": config} if isinstance(config, str) else dict(config)
    name = options.pop("name", "")
    if name not in WEIGHTINGS:
        raise unknown("weighting", name, WEIGHTINGS)
    known = list(inspect.signature(WEIGHTINGS[name]).parameters)[1:]
    for key, value in options.items():
        if key not in known:
            raise unknown("option", key, known, f"weighting '{name}'")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise VgmError(f"weighting.{key}={value!r} is no number", code=USAGE)
    weight = partial(WEIGHTINGS[name], **options)
    return weight if not shift else lambda l: weight(l - shift)


def elbo_density(weight: Weight, grid: Tensor) -> Tensor:
    """Of a monotone w: how L_w weighs the ELBOs of noisy data between neighbours of `grid` (n,), ascending log-SNRs.

    -> (n,), which sums to 1: entry i < n - 1 belongs to data noised to a log-SNR between grid[i] and grid[i + 1], the
    last one to data at grid[-1], the (nearly) clean data. VgmError: w increases somewhere.
    """
    w = weight(grid.double())
    drop = torch.cat([w[:-1] - w[1:], w[-1:]]) / w[0]
    if (drop < -1e-12).any():
        raise VgmError("this weighting increases with the log-SNR, so its loss is no ELBO", code=USAGE)
    return drop
