"""SiT weights (willisma/SiT@947f95b): the tensors of DiT under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vgm_cli.nets.dit_checkpoints import converter, latents


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released networks: linear path, velocity, told 1 - t; recipes/sit/imagenet256.yaml."""
    view = {"name": "denoiser", "path": {"name": "linear"}, "prediction": "velocity", "time": "reversed"}
    sampler = {"name": "sit-sde", "method": "Euler", "form": "sigma", "norm": 1.0, "last_step": "Mean"}
    sampler |= {"last_step_size": 0.04, "steps": 250, "cfg_channels": 3}
    return {
        "view": view,
        "recipe": {"paper": "sit", "sampler": sampler, "guidance_scale": 1.5},
        "data": latents(config),
    }


CONVERTER = converter("sit", header, "willisma/SiT: the same tensors as DiT's")
