"""sCM: Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models. Lu & Song, ICLR 2025.

arXiv 2410.11081; there is no official code. Checked against NVlabs/FastGen@34f30e8f, xandergos/sCM-mnist@2d285393,
NVlabs/edm2 and diffusers' SCMScheduler; where they differ from the paper they are options: docs/papers/scm.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.scm."
OBJECTIVES = (
    ("scm", "objective:SCM", "presets:OBJECTIVES", ("train", "distill"), "continuous-time consistency: sCD and sCT"),
    ("trigflow", "objective:TrigFlow", "presets:DIFFUSION", ("train",), "diffusion on TrigFlow's path, learned weight"),
    ("ect", "ect:ECT", None, ("train", "distill"), "consistency in discrete time, steps shrinking by stages"),
)
CONVERTERS = (
    ("edm2", "EDM2", "NVlabs/edm2 (Precond)"),
    ("edm-ddpmpp", "DDPMPP", "NVlabs/edm SongUNet (CIFAR-10, DDPM++)"),
    ("scm-mnist", "SHUFFLE", "xandergos/sCM-mnist"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="scm",
            title="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
            year=2025,
            arxiv="2410.11081",
            family="distillation",
            summary="Consistency models in continuous time: any teacher in one or two steps, or from data alone.",
            expects={
                "ImageNet 512 FID-50K (sCD-XXL, 2 steps)": 1.88,
                "ImageNet 64 FID-50K (sCT-XL, 2 steps)": 1.48,
                "CIFAR-10 FID-50K (sCT, 1 step)": 2.85,
                "CIFAR-10 FID-50K (sCT, 2 steps)": 2.06,
            },
        ),
        Component(
            kind="model",
            name="edm2",
            target=HERE + "edm2:EDM2UNet",
            presets=HERE + "presets:EDM2",
            from_data={"img_resolution": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="EDM2's U-Net, with sCM's time embedding and double normalisation",
            denoiser=True,
        ),
        Component(
            kind="model",
            name="scm-unet",
            target=HERE + "unet:ShuffleUNet",
            presets=HERE + "presets:UNETS",
            from_data={"in_channels": "channels"},
            summary="the small U-Net of the MNIST reimplementation",
            denoiser=True,
        ),
        *(
            Component(
                kind="objective",
                name=name,
                target=HERE + target,
                presets=HERE + presets if presets else {},
                verbs=verbs,
                summary=about,
                denoiser=True,
            )
            for name, target, presets, verbs, about in OBJECTIVES
        ),
        Component(
            kind="view",
            name="scm-guided",
            target=HERE + "view:GuidedStudent",
            summary="a consistency model that is told its guidance scale",
            denoiser=True,
        ),
        Component(
            kind="sampler",
            name="scm",
            target=HERE + "sampler:SCMSampler",
            summary="one, two or more steps of a consistency model, at TrigFlow's times",
        ),
        *(
            Component(kind="converter", name=name, target=f"{HERE}checkpoints:{attr}", summary=summary)
            for name, attr, summary in CONVERTERS
        ),
    ]
