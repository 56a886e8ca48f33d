"""How the official networks are asked, and their noise levels (Song et al. 2023, 2303.01469, app. C).

The consistency function itself is the host's FlowMap with the boundary "skip": eq. 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgm_cli.diffusion.timesteps import karras_levels

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


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
