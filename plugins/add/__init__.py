"""ADD: Adversarial Diffusion Distillation, SDXL-Turbo and SD-Turbo. Sauer et al. 2023 (arXiv 2311.17042).

No training code was published: losses are after the paper, the discriminator is StyleGAN-T's
(autonomousvision/stylegan-t@36ab80c), the sampler that of Stability-AI/generative-models@0ad7de9. The networks are
shared (vgm_cli/nets/{ldm_unet,dit,foundation}.py).
Deviations: any teacher; what the paper leaves open: docs/papers/add.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.add."


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="add",
            title="Adversarial Diffusion Distillation",
            year=2023,
            arxiv="2311.17042",
            repository="https://github.com/Stability-AI/generative-models",
            family="distillation",
            summary="A student of one to four steps between a discriminator on vision features and its teacher.",
            expects={"COCO FID-5K (ADD-M, 1 step)": 19.7, "COCO CLIP score (ADD-M, 1 step)": 0.326},
        ),
        Component(
            kind="model",
            name="add-discriminator",
            target=HERE + "discriminator:Heads",
            summary="StyleGAN-T's heads on features of several depths",
        ),
        Component(
            kind="objective",
            name="add",
            target=HERE + "objective:ADD",
            verbs=("distill",),
            summary="adversarial diffusion distillation: a projected discriminator and score distillation",
        ),
        Component(
            kind="sampler",
            name="turbo",
            target=HERE + "sampler:TurboSampler",
            summary="one to four steps of SD-Turbo, SDXL-Turbo and students of ADD; img2img",
        ),
        *(
            Component(kind="converter", name=name, target=f"{HERE}checkpoints:{attr}", summary=summary)
            for name, attr, summary in (
                ("stylegan-t-discriminator", "HEADS", "heads of autonomousvision/stylegan-t's discriminator"),
                ("ldm-unet-turbo", "TURBO", "SD-Turbo's and SDXL-Turbo's U-Nets"),
                ("ldm-unet-turbo-diffusers", "TURBO_DIFFUSERS", "the same in diffusers' layout"),
            )
        ),
    ]
