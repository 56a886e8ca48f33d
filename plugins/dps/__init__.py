"""DPS: Diffusion Posterior Sampling for General Noisy Inverse Problems. Chung et al., ICLR 2023 (arXiv 2209.14687).

Official code: DPS2022/diffusion-posterior-sampling@effbde7. The degradations are the host's (vgm_cli/operators); beside
DPS there are MCG and projection as in that code, and DDRM, PiGDM and DiffPIR on the same operators.
Deviations: norms and noise streams per image (the code takes one image at a time); projections are A^+'s unless
projection=official; a respaced walk on networks of other paths (flow, EDM) by equal noise level.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vgm_cli.hookspecs import Component, Paper, hookimpl

METHODS: dict[str, tuple[str, str | dict[str, Any], str]] = {
    "dps": ("sampler:DPS", "vgm_plugins.dps.presets:PRESETS", "gradient of the measurement's distance, any operator"),
    "mcg": ("sampler:MCG", {}, "DPS and a projection onto the measurement"),
    "projection": ("sampler:Projection", {}, "projection onto the measurement alone"),
    "ddrm": ("linear:DDRM", {}, "linear operators through their SVD, 20 steps"),
    "pigdm": ("linear:PiGDM", {}, "pseudo-inverse guidance, linear operators and jpeg"),
    "diffpir": ("linear:DiffPIR", {}, "plug-and-play closed form, linear operators"),
}


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="dps",
            title="Diffusion Posterior Sampling for General Noisy Inverse Problems",
            year=2022,
            arxiv="2209.14687",
            repository="https://github.com/DPS2022/diffusion-posterior-sampling",
            family="diffusion",
            summary="Restores images by differentiating the measurement's distance through a diffusion prior.",
        ),
        *(
            Component(
                kind="sampler",
                name=name,
                target=f"vgm_plugins.dps.{target}",
                presets=presets,
                verbs=("restore",),
                summary=f"restoration: {summary}",
            )
            for name, (target, presets, summary) in METHODS.items()
        ),
    ]
