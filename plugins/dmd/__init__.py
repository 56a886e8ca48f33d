"""DMD and DMD2: one- and few-step generators by distribution matching. Yin et al., CVPR 2024 (arXiv 2311.18828) and
NeurIPS 2024 (2405.14867).

Official code: tianweiy/DMD2@8d8fa55 (CC-BY-NC-SA; nothing of it is copied here); DMD's own was never released and is
after the paper. The ImageNet network is EDM's, the host's edm-unet.
Deviations: see objective.py (any teacher, not only EDM and Stable Diffusion) and discriminator.py (any side).
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="dmd",
            title="One-step Diffusion with Distribution Matching Distillation",
            year=2024,
            arxiv="2311.18828",
            repository="https://github.com/tianweiy/DMD2",
            family="distillation",
            summary="A generator follows the difference of the data's score and its own; DMD2 adds a GAN, few steps.",
            expects={
                "ImageNet 64 FID-50K (DMD, 1 step)": 2.62,
                "ImageNet 64 FID-50K (DMD2, 1 step)": 1.51,
                "ImageNet 64 FID-50K (DMD2, 1 step, longer training)": 1.28,
            },
        ),
        Component(
            kind="model",
            name="dmd-discriminator",
            target="vgm_plugins.dmd.discriminator:Head",
            summary="DMD2's logit head",
        ),
        Component(
            kind="objective",
            name="dmd",
            target="vgm_plugins.dmd.objective:DMD",
            verbs=("distill",),
            summary="distribution matching distillation, with regression (DMD) or GAN (DMD2)",
        ),
        Component(
            kind="sampler",
            name="dmd",
            target="vgm_plugins.dmd.generator:GeneratorSampler",
            summary="the student's one or few steps",
        ),
        *(
            Component(kind="converter", name=name, target=f"vgm_plugins.dmd.checkpoints:{attr}", summary=summary)
            for name, attr, summary in (
                ("edm", "EDM", "NVlabs/edm DhariwalUNet, DMD2 generators"),
                ("dmd2-fake-score", "FAKE", "DMD2 guidance model: fake score"),
                ("dmd2-discriminator", "HEAD", "DMD2 guidance model: discriminator"),
            )
        ),
    ]
