"""SiT: Scalable Interpolant Transformers. Ma et al., ECCV 2024 (arXiv 2401.08740).

Official code: willisma/SiT@947f95b. The network is DiT's with half of its output thrown away (vgm_cli/nets/dit.py).
This plugin brings the process: path, prediction, ODE and SDE samplers with a diffusion coefficient chosen after
training.
Deviations: see transport.py and sampler.py (diffusion forms that crash officially work; one evaluation per drift).
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="sit",
            title="SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
            year=2024,
            arxiv="2401.08740",
            repository="https://github.com/willisma/SiT",
            family="flow",
            summary="DiT's network on interpolants: path, prediction and diffusion coefficient become free choices.",
            expects={
                "ImageNet 256 FID-50K (XL/2, SDE, guidance 1.5)": 2.06,
                "ImageNet 256 IS (XL/2, SDE, guidance 1.5)": 270.27,
                "ImageNet 256 FID-50K (XL/2, ODE, guidance 1.5)": 2.15,
            },
        ),
        Component(
            kind="model",
            name="sit",
            target="vgm_cli.nets.dit:SiT",
            presets="vgm_plugins.sit.presets:PRESETS",
            from_data={"input_size": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="DiT for t in [0, 1], variance half of the output discarded",
            denoiser=True,
            two_times=True,
        ),
        Component(
            kind="converter",
            name="sit",
            target="vgm_plugins.sit.checkpoints:CONVERTER",
            summary="willisma/SiT checkpoints",
        ),
        Component(
            kind="objective",
            name="flow-matching",
            target="vgm_plugins.sit.objective:FlowMatching",
            verbs=("train",),
            summary="interpolants: linear, gvp or vp path; velocity, score or noise prediction",
            denoiser=True,
        ),
        Component(
            kind="sampler", name="sit-ode", target="vgm_plugins.sit.sampler:ODESampler", summary="probability-flow ODE"
        ),
        Component(
            kind="sampler",
            name="sit-sde",
            target="vgm_plugins.sit.sampler:SDESampler",
            summary="SDE with a free diffusion",
        ),
    ]
