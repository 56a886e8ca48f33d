"""EDM's preconditioners and losses: what turns a raw network F into a denoiser D(x, sigma).

Karras et al. 2022 (2206.00364), table 1; behaviour of NVlabs/edm@008a4e5 training/{networks,loss}.py. x = x0 + sigma n.
The inner network is called network(c_in x, c_noise, **cond). Draws (sigma, noise) are arguments of the losses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.diffusion.denoiser import edm_scales
from vgm_cli.diffusion.path import expand
from vgm_cli.diffusion.solvers.edm import iddpm_levels
from vgm_cli.diffusion.timesteps import vp_levels

Scales = tuple[Tensor | float, Tensor, Tensor | float, Tensor]


class Precond(nn.Module, ABC):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): forward(x, sigma, **cond), x (B, C, ...), sigma (B,).

    sigma_min, sigma_max: levels that the network knows.
    """

    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __init__(self, network: nn.Module | Callable[..., Tensor]):
        super().__init__()
        self.network = network
        if hasattr(network, "null_condition"):
            self.null_condition = network.null_condition

    @abstractmethod
    def scales(self, sigma: Tensor) -> Scales:
        """c_skip, c_out, c_in, c_noise at sigma."""

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        x, sigma = x.float(), sigma.float().flatten().expand(len(x))
        c_skip, c_out, c_in, c_noise = self.scales(sigma)
        F = self.network(_times(c_in, x), c_noise, **cond).float()
        return _times(c_skip, x) + _times(c_out, F[:, : x.shape[1]])

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest level that the network knows."""
        return torch.as_tensor(sigma)


def _times(scale: Tensor | float, x: Tensor) -> Tensor:
    return expand(scale, x) * x if isinstance(scale, Tensor) else scale * x


class EDMPrecond(Precond):
    """EDM's own: unit variance in, unit variance out."""

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ):
        super().__init__(network)
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max

    def scales(self, sigma: Tensor) -> Scales:
        return *edm_scales(sigma, self.sigma_data), sigma.log() / 4


class VPPrecond(Precond):
    """DDPM++ of score-SDE: F predicts -n of a VP process, told its time in [0, M - 1]."""

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
    ):
        super().__init__(network)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        self.sigma_min, self.sigma_max = vp_levels(torch.tensor([epsilon_t, 1.0]), beta_d, beta_min).tolist()

    def scales(self, sigma: Tensor) -> Scales:
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * (root - self.beta_min) / self.beta_d


class VEPrecond(Precond):
    """NCSN++ of score-SDE: F predicts -n of a VE process."""

    def __init__(self, network: nn.Module | Callable[..., Tensor], sigma_min: float = 0.02, sigma_max: float = 100.0):
        super().__init__(network)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def scales(self, sigma: Tensor) -> Scales:
        return 1.0, sigma, 1.0, (0.5 * sigma).log()


class IDDPMPrecond(Precond):
    """iDDPM's network, variance channels ignored: told the index of the nearest of M levels."""

    u: Tensor

    def __init__(
        self, network: nn.Module | Callable[..., Tensor], C_1: float = 0.001, C_2: float = 0.008, M: int = 1000
    ):
        super().__init__(network)
        self.M = M
        self.register_buffer("u", iddpm_levels(M, C_1, C_2, torch.float32))
        self.sigma_min, self.sigma_max = float(self.u[M - 1]), float(self.u[0])

    def scales(self, sigma: Tensor) -> Scales:
        return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1 - self.index(sigma)).float()

    def index(self, sigma: Tensor) -> Tensor:
        """Index into u of the nearest level, shaped like sigma."""
        return (sigma.to(self.u.device).float()[..., None] - self.u).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.u[self.index(torch.as_tensor(sigma))].to(sigma)


PRECONDITIONERS: dict[str, type[Precond]] = {
    "edm": EDMPrecond,
    "vp": VPPrecond,
    "ve": VEPrecond,
    "iddpm": IDDPMPrecond,
}

# -- training levels and losses --------------------------------------------------------------------------------------


def edm_levels(normal: Tensor, P_mean: float = -1.2, P_std: float = 1.2) -> Tensor:
    """EDM's log-normal levels from a standard normal draw."""
    return (normal * P_std + P_mean).exp()


def vp_training_levels(uniform: Tensor, beta_d: float = 19.9, beta_min: float = 0.1, epsilon_t: float = 1e-5) -> Tensor:
    """VP's levels at uniform times in [epsilon_t, 1] from a uniform draw (0 is the noisiest)."""
    return vp_levels(1 + uniform * (epsilon_t - 1), beta_d, beta_min)


def ve_levels(uniform: Tensor, sigma_min: float = 0.02, sigma_max: float = 100.0) -> Tensor:
    """VE's log-uniform levels from a uniform draw."""
    return sigma_min * (sigma_max / sigma_min) ** uniform


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's weight: 1 / c_out^2, so that F's loss is weighted evenly."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoising_loss(
    denoise: Callable[..., Tensor], x0: Tensor, sigma: Tensor, noise: Tensor, weight: Tensor, **cond: Any
) -> Tensor:
    """weight (D(x0 + sigma n, sigma) - x0)^2, unreduced: x0, noise (B, C, H, W), sigma, weight (B,).

    EDM trains on its sum over everything but the batch; the other two losses have the weight 1 / sigma^2.
    """
    estimate = denoise(x0 + noise * expand(sigma, x0), sigma, **cond)
    return expand(weight, x0) * (estimate - x0) ** 2
