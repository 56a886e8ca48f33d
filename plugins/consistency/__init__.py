"""Consistency Models. Song, Dhariwal, Chen & Sutskever, ICML 2023 (arXiv 2303.01469); improved training: Song &
Dhariwal, ICLR 2024 (2310.14189, no official code).

Official code: openai/consistency_models@e32b69e (MIT). Its U-Net is ADM's with the new order of attention, plugins/adm_unet.
Deviations: any teacher, on any path and with any prediction, see function.py; editing by projections, see editing.py; CT
starts from scratch, where the official launch lines copy a teacher's weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl


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
            summary="A network maps any point of a diffusion trajectory to its start: one step, or a few.",
            expects={
                "ImageNet 64 FID-50K (CD, 1 step)": 6.20,
                "ImageNet 64 FID-50K (CD, 2 steps)": 4.70,
                "ImageNet 64 FID-50K (CT, 1 step)": 13.0,
                "ImageNet 64 FID-50K (CT, 2 steps)": 11.1,
                "CIFAR-10 FID-50K (iCT, 1 step)": 2.83,
                "CIFAR-10 FID-50K (iCT, 2 steps)": 2.46,
            },
        ),
        Component(
            kind="objective",
            name="consistency",
            target="vgm_plugins.consistency.objective:Consistency",
            presets="vgm_plugins.consistency.presets:PRESETS",
            verbs=("train", "distill"),
            summary="consistency distillation and training, improved training, progressive distillation",
        ),
        Component(
            kind="sampler",
            name="consistency",
            target="vgm_plugins.consistency.sampling:ConsistencySampler",
            summary="one or several steps of a consistency model",
        ),
        Component(
            kind="sampler",
            name="dpm-2-karras",
            target="vgm_plugins.consistency.sampling:DPM2KarrasSampler",
            summary="second-order steps over the middle in sigma^(1/3), for teachers",
        ),
        Component(
            kind="sampler",
            name="consistency-edit",
            target="vgm_plugins.consistency.editing:ConsistencyEditing",
            verbs=("restore",),
            summary="restoration: zero-shot editing by a consistency model, operators with a pseudo-inverse",
        ),
        Component(
            kind="converter",
            name="consistency",
            target="vgm_plugins.adm_unet.checkpoints:CONSISTENCY",
            summary="openai/consistency_models",
        ),
    ]
