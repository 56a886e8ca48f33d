"""The consistency function: any denoising network, made the identity at the smallest noise level.

Song et al. 2023 (2303.01469), eq. 5 and app. C; scalings of openai/consistency_models@e32b69e cm/karras_diffusion.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.diffusion.denoiser import Denoiser, Network, convert
from vgm_cli.diffusion.path import Time
from vgm_cli.diffusion.timesteps import karras_levels
from vgm_cli.nn.shapes import expand

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def boundary_scales(
    sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = SIGMA_MIN
) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in at sigma: EDM's, moved so that c_skip = 1 and c_out = 0 at sigma_min.

    The denominator of c_out is not moved: as in the official code.
    """
    c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    c_out = (sigma - sigma_min) * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    return c_skip, c_out, 1 / (sigma**2 + sigma_data**2) ** 0.5


class ConsistencyFunction(Denoiser):
    """f(x, sigma) as a Denoiser on the path of the network behind it, whatever that predicts.

    The network's output is read as EDM's F, and x0 is c_skip x + c_out F with the boundary scalings: the official
    parametrisation where the network predicts F, else the network's own x0 but for a shift of sigma_min.
    denoiser: a Denoiser or its config. sigma_data: of the scalings; None is the denoiser's.
    """

    def __init__(
        self,
        network: Network,
        denoiser: Denoiser | Mapping[str, Any],
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        sigma_data: float | None = None,
    ):
        config = denoiser.config() if isinstance(denoiser, Denoiser) else denoiser
        self.__dict__.update(Denoiser.from_config(network, config).__dict__)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.sigma_scale = self.sigma_data if sigma_data is None else sigma_data

    def view(self) -> dict[str, Any]:
        """What a checkpoint stores; the host builds this class again from it."""
        view: dict[str, Any] = {"name": "consistency", "denoiser": self.config(), "sigma_min": self.sigma_min}
        view["sigma_max"] = self.sigma_max
        return view | ({"sigma_data": self.sigma_scale} if self.sigma_scale != self.sigma_data else {})

    def interpret(self, output: Tensor, x_t: Tensor, t: Time, to: str = "x0") -> Tensor:
        """A raw output as f, or as what f implies: (B, C, ...)."""
        t = self.batch_time(x_t, t)
        if self.prediction == "F" and self.sigma_scale == self.sigma_data:
            F = super().interpret(output, x_t, t, "F")
        else:
            x0 = super().interpret(output, x_t, t, "x0")
            F = convert(x0, x_t, t, self.path, "x0", "F", self.sigma_scale)
        sigma, x = self.path.ve_sigma(t), x_t.double() / expand(self.path.alpha(t), x_t)
        c_skip, c_out, _ = boundary_scales(sigma, self.sigma_scale, self.sigma_min)
        f = (expand(c_skip, x) * x + expand(c_out, x) * F.double()).to(F.dtype)
        return convert(f, x_t, t, self.path, "x0", to, self.sigma_data)


def edm_view(sigma_data: float = 0.5) -> dict[str, Any]:
    """How the official networks are asked: F, told 250 ln(sigma)."""
    path = {"name": "edm", "sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "sigma_data": sigma_data}
    return {"path": path, "prediction": "F", "time": "edm", "time_scale": 1000.0}


def level_of(index: Tensor | float, count: int, sigma_min: float, sigma_max: float, rho: float = RHO) -> Tensor:
    """Noise levels of a descending grid of `count`, index 0 being sigma_max: shaped like index, float64.

    Whole and fractional indices; Karras et al. 2022, eq. 5.
    """
    ramp = torch.as_tensor(index, dtype=torch.float64) / max(count - 1, 1)
    return karras_levels(ramp, sigma_min, sigma_max, rho)
