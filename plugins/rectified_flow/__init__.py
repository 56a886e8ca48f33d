"""Rectified flow: Flow Straight and Fast. Liu, Gong & Liu, ICLR 2023 (arXiv 2209.03003).

Official code: gnobitab/RectifiedFlow@5a1fd4d ImageGeneration/, a fork of score_sde; its network is NCSN++/DDPM++, which
the host shares with score-based models: vgm_cli/nets/ncsnpp.py.
Deviations: see objective.py (guided pairs, the student's first weights) and sampler.py (streams of an image's own).
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    here = "vgm_plugins.rectified_flow."
    return [
        Paper(
            name="rectified-flow",
            title="Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
            year=2022,
            arxiv="2209.03003",
            repository="https://github.com/gnobitab/RectifiedFlow",
            family="flow",
            summary="Regression on straight lines from noise to data; reflow straightens the flow until one step does.",
            expects={
                "CIFAR-10 FID-50K (1-rectified flow, RK45)": 2.58,
                "CIFAR-10 FID-50K (1-rectified flow, distilled, 1 step)": 6.18,
                "CIFAR-10 FID-50K (2-rectified flow, RK45)": 3.36,
                "CIFAR-10 FID-50K (2-rectified flow, distilled, 1 step)": 4.85,
                "CIFAR-10 FID-50K (3-rectified flow, RK45)": 3.96,
                "CIFAR-10 FID-50K (3-rectified flow, distilled, 1 step)": 5.21,
            },
        ),
        Component(
            kind="objective",
            name="rectified-flow",
            target=here + "objective:RectifiedFlow",
            verbs=("train",),
            summary="straight-line flow from noise to data (1-rectified flow)",
            denoiser=True,
        ),
        Component(
            kind="objective",
            name="reflow",
            target=here + "objective:Reflow",
            verbs=("train", "distill"),
            summary="the same on a teacher's pairs: reflow, distillation to one or k Euler steps",
        ),
        Component(
            kind="sampler",
            name="rectified-flow",
            target=here + "sampler:RectifiedFlowSampler",
            summary="RK45, Euler or SDE",
        ),
        Component(
            kind="converter",
            name="rectified-flow",
            target=here + "checkpoints:CONVERTER",
            summary="gnobitab/RectifiedFlow .pth",
        ),
    ]
