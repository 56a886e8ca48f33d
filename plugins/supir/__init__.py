"""SUPIR: Scaling Up to Excellence, Practicing Model Scaling for Photo-Realistic Image Restoration In the Wild. Yu et
al., CVPR 2024 (arXiv 2401.13627).

Official code: Fanghua-Yu/SUPIR@bda91af, inference alone; the trainings follow the paper. The U-Net that is steered and
the text towers are SDXL's (vgm_cli/nets), degradations are Real-ESRGAN's (vgm_cli/operators/realistic.py).
Deviations: any latent diffusion U-Net can be steered; every image draws its own degradation; captions are given, no
language model writes them.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

CODEC = {"in_channels": "image_channels", "out_ch": "image_channels", "resolution": "image_size"}
OBJECTIVES = (
    ("supir", "SUPIRObjective", "the noise of latents, by what steers a frozen U-Net; negative samples"),
    ("supir-encoder", "EncoderObjective", "a second encoder whose latents of degraded pictures decode as clean ones"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="supir",
            title="Scaling Up to Excellence: Practicing Model Scaling for Photo-Realistic Image Restoration",
            year=2024,
            arxiv="2401.13627",
            repository="https://github.com/Fanghua-Yu/SUPIR",
            family="diffusion",
            summary="Restores pictures by a text-to-image model that follows them, guided by words for bad quality.",
            expects={
                "MUSIQ (SR x4)": 73.83,
                "LPIPS (SR x4)": 0.2662,
                "MUSIQ (blur 2 + SR x4 + noise 20 + JPEG 50)": 73.58,
                "LPIPS (blur 2 + SR x4 + noise 20 + JPEG 50)": 0.3806,
            },
        ),
        Component(
            kind="model",
            name="supir",
            target="vgm_plugins.supir.model:SUPIRUNet",
            presets="vgm_plugins.supir.presets:CONTROLS",
            summary="a frozen latent diffusion U-Net (role `base`) and what makes it follow a degraded picture",
        ),
        *(  # as a model it is trained, as a codec it is used
            Component(
                kind=kind,
                name="supir-autoencoder",
                target="vgm_plugins.supir.codec:RobustAutoencoderKL",
                presets="vgm_plugins.supir.presets:CODECS",
                from_data=CODEC,
                summary="a KL autoencoder with a second encoder for degraded pictures",
            )
            for kind in ("model", "codec")
        ),
        *(
            Component(
                kind="objective",
                name=name,
                target=f"vgm_plugins.supir.objective:{attr}",
                verbs=("train",),
                summary=about,
            )
            for name, attr, about in OBJECTIVES
        ),
        Component(
            kind="sampler",
            name="supir",
            target="vgm_plugins.supir.sampler:SUPIRSampler",
            presets="vgm_plugins.supir.presets:SAMPLERS",
            verbs=("restore",),
            summary="restoration: a SUPIR network, pulled towards its first stage; any size, tiles, colour fixes",
        ),
        Component(
            kind="condition",
            name="degraded",
            target="vgm_plugins.supir.condition:DegradedPicture",
            from_data={"size": "image_size"},
            summary="a degraded picture as latents, by a codec's second encoder",
        ),
        *(
            Component(kind="converter", name=n, target=f"vgm_plugins.supir.checkpoints:{a}", summary=about)
            for n, a, about in (
                ("supir", "CONTROL_LAYOUT", "SUPIR-v0Q and -v0F: the control and its connectors"),
                ("supir-autoencoder", "CODEC_LAYOUT", "SDXL's first stage with SUPIR's second encoder"),
            )
        ),
    ]
