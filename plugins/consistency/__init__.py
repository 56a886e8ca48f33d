"""Consistency Models. Song et al., ICML 2023 (arXiv 2303.01469); improved training: ICLR 2024 (2310.14189, no code).

Official code: openai/consistency_models@e32b69e (MIT). Its U-Net is ADM's with the new order of attention: adm-unet.
Deviations: any teacher (function.py); editing by projections (editing.py); CT starts from scratch as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

SAMPLERS = (
    ("consistency", "sampling:ConsistencySampler", (), "one or several steps of a consistency model"),
    ("dpm-2-karras", "sampling:DPM2KarrasSampler", (), "second order, middle in sigma^(1/3), for teachers"),
    (
        "consistency-edit",
        "editing:ConsistencyEditing",
        ("restore",),
        "restoration: zero-shot editing, any A with an A^+",
    ),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="consistency",
            title="Consistency Models",
            year=2023,
            arxiv="2303.01469",
            repository="https://github.com/openai/consistency_models",
            family="distillation",
            summary="A network maps any point of a diffusion trajectory to its start: one or few steps.",
            expects={
                "ImageNet 64 FID-50K (CD, 1 step)": 6.20,
                "ImageNet 64 FID-50K (CD, 2 steps)": 4.70,
                "ImageNet 64 FID-50K (CT, 1 step)": 13.0,
            },
        ),
        Component(
            kind="objective",
            name="consistency",
            target="vgm_plugins.consistency.objective:Consistency",
            presets="vgm_plugins.consistency.presets:PRESETS",
            verbs=("train", "distill"),
            denoiser=True,
            summary="consistency distillation and training, iCT, progressive distillation",
        ),
        *(
            Component(
                kind="sampler", name=name, target=f"vgm_plugins.consistency.{target}", verbs=verbs, summary=summary
            )
            for name, target, verbs, summary in SAMPLERS
        ),
    ]
