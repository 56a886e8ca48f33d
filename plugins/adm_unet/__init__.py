"""ADM: Diffusion Models Beat GANs on Image Synthesis. Dhariwal & Nichol, NeurIPS 2021 (arXiv 2105.05233).

Official code: openai/guided-diffusion@22e0df8 (MIT). The process, its losses and samplers are IDDPM's, shared with DiT:
vgm_cli/diffusion/{discrete,iddpm,resample}.py; here are U-Net, classifier and training. Deviations: see model.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

FROM_DATA = {"image_size": "size", "in_channels": "channels", "num_classes": "num_classes"}
CLASSIFIER = "vgm_plugins.adm_unet.model:EncoderUNetModel"  # half of the U-Net
OBJECTIVES = (
    ("adm-classifier", "NoisyClassifier", "cross entropy on noisy images, for classifier guidance"),
    ("adm-upsampler", "Upsampling", "discrete diffusion given a smaller copy of the image"),
)
CONVERTERS = (
    ("adm-unet", "checkpoints:CONVERTER", "openai/guided-diffusion diffusion models and upsamplers"),
    ("adm-classifier", "checkpoints:CLASSIFIER", "openai/guided-diffusion classifiers"),
    ("consistency", "checkpoints:CONSISTENCY", "openai/consistency_models: EDM teachers, CD and CT students"),
    ("adm-unet-diffusers", "diffusers_checkpoints:DIFFUSERS", "diffusers UNet2DModel, 64 channels a head"),
    (
        "adm-unet-diffusers-legacy",
        "diffusers_checkpoints:DIFFUSERS_LEGACY",
        "the same for networks of the legacy attention order",
    ),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    presets = "vgm_plugins.adm_unet.presets:"
    return [
        Paper(
            name="adm-unet",
            title="Diffusion Models Beat GANs on Image Synthesis",
            year=2021,
            arxiv="2105.05233",
            repository="https://github.com/openai/guided-diffusion",
            family="diffusion",
            summary="An ablated U-Net and guidance by a classifier of noisy images.",
            expects={
                f"ImageNet {n} FID-50K (ADM-G)": v for n, v in ((64, 2.07), (128, 2.97), (256, 4.59), (512, 7.72))
            },
        ),
        Component(
            kind="model",
            name="adm-unet",
            target="vgm_plugins.adm_unet.model:UNetModel",
            presets=presets + "PRESETS",
            from_data=FROM_DATA,
            summary="ADM U-Net",
            denoiser=True,
        ),
        Component(
            kind="model",
            name="adm-classifier",
            target=CLASSIFIER,
            presets=presets + "CLASSIFIERS",
            from_data=FROM_DATA,
            summary="of noisy images",
        ),
        *(
            Component(
                kind="objective", name=n, target=f"vgm_plugins.adm_unet.objective:{a}", verbs=("train",), summary=s
            )
            for n, a, s in OBJECTIVES
        ),
        *(Component(kind="converter", name=n, target=f"vgm_plugins.adm_unet.{a}", summary=s) for n, a, s in CONVERTERS),
    ]
