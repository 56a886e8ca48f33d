"""LDM: High-Resolution Image Synthesis with Latent Diffusion Models. Rombach et al., CVPR 2022 (arXiv 2112.10752).

Official code: CompVis/latent-diffusion@a506df5, with CompVis/taming-transformers@3ba01b2 for quantiser, discriminator
and LPIPS; Stable Diffusion 1, 2 and XL. Here: what is published. The networks are shared (vgm_cli/nets/{ldm_unet,
clip_text,bert_text,autoencoder,autoencoder_kl,first_stage}.py), as is the first stages' objective
(vgm_cli/losses/first_stage.py).
Deviations: fused attention, tiles, measured latent statistics; see the objective for more.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

FROM_DATA = {"in_channels": "image_channels", "out_ch": "image_channels", "resolution": "image_size"}
CODECS = (  # name, class, presets, summary
    (
        "autoencoder-kl",
        "autoencoder_kl:AutoencoderKL",
        "KL",
        "KL-regularised autoencoder (Stable Diffusion's VAE is kl-f8, scale_factor 0.18215)",
    ),
    ("vq-autoencoder", "first_stage:VQModel", "VQ", "vector-quantised autoencoder"),
)
TEXTS = (  # name, target, presets, facts of the data, summary
    (
        "clip-text",
        "clip_text:CLIPText",
        "CLIP",
        {},
        "a text by CLIP's tower (Stable Diffusion 1: preset sd1, 2: preset sd2), by local weights",
    ),
    ("sdxl-text", "clip_text:SDXLText", "SDXL", {}, "a text by both of SDXL's towers, and its sizes"),
    ("bert-text", "bert_text:BERTText", "BERT", {}, "a text by a transformer that is trained with the network"),
    (
        "class-token",
        "bert_text:ClassToken",
        None,
        {"num_classes": "num_classes", "class_names": "class_names"},
        "the class of an image as a context of one vector",
    ),
)
CONVERTERS = (
    ("autoencoder-kl", "CONVERTER_KL", "CompVis KL first stages and first_stage_model.* of diffusion checkpoints"),
    ("vq-autoencoder", "CONVERTER_VQ", "CompVis VQ first stages"),
    ("autoencoder-kl-diffusers", "DIFFUSERS", "diffusers AutoencoderKL"),
)
SHARED_CONVERTERS = (
    ("ldm-unet", "ldm_unet_checkpoints:LDM_UNET", "CompVis and Stability U-Nets, averaged where an average is there"),
    ("ldm-unet-diffusers", "ldm_unet_checkpoints:LDM_UNET_DIFFUSERS", "diffusers UNet2DConditionModel"),
    ("clip-text", "clip_text_checkpoints:CLIP_TEXT", "CLIP's text tower in transformers' names"),
    ("open-clip-text", "clip_text_checkpoints:OPEN_CLIP_TEXT", "OpenCLIP's text tower"),
    ("sdxl-text", "clip_text_checkpoints:SDXL_TEXT", "both text towers of SDXL's files"),
    ("bert-text", "bert_text_checkpoints:BERT_TEXT", "latent diffusion's trained text encoder"),
    ("class-token", "bert_text_checkpoints:CLASS_TOKEN", "latent diffusion's class table"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="ldm",
            title="High-Resolution Image Synthesis with Latent Diffusion Models",
            year=2022,
            arxiv="2112.10752",
            repository="https://github.com/CompVis/latent-diffusion",
            family="diffusion",
            summary="Diffusion in the latent space of a perceptually trained autoencoder.",
            expects={f"ImageNet rFID ({n})": v for n, v in (("kl-f4", 0.27), ("kl-f8", 0.90), ("vq-f4", 0.58))},
        ),
        *(  # as a model it is trained, as a codec it is used
            Component(
                kind=kind,
                name=name,
                target=f"vgm_cli.nets.{cls}",
                presets=f"vgm_plugins.ldm.presets:{p}",
                from_data=FROM_DATA,
                summary=about,
            )
            for kind in ("model", "codec")
            for name, cls, p, about in CODECS
        ),
        Component(
            kind="objective",
            name="ldm",
            target="vgm_plugins.ldm.objective:LatentDiffusion",
            verbs=("train",),
            summary="the noise of latents at discrete timesteps",
            denoiser=True,
        ),
        Component(
            kind="sampler",
            name="ldm",
            target="vgm_plugins.ldm.sampler:LDMSampler",
            verbs=("restore",),
            summary="DDIM, PLMS and DPM-Solver++ as the official scripts have them; img2img; completion",
        ),
        Component(
            kind="model",
            name="ldm-unet",
            target="vgm_cli.nets.ldm_unet:LDMUNet",
            presets="vgm_cli.nets.ldm_unet_presets:PRESETS",
            from_data={"image_size": "size", "in_channels": "channels"},
            summary="latent diffusion's U-Net, Stable Diffusion 1, 2 and XL",
            denoiser=True,
        ),
        *(
            Component(
                kind="condition",
                name=name,
                target=f"vgm_cli.nets.{cls}",
                presets=f"vgm_cli.nets.text_presets:{presets}" if presets else {},
                from_data=facts,
                summary=about,
            )
            for name, cls, presets, facts, about in TEXTS
        ),
        *(
            Component(kind="converter", name=n, target=f"vgm_plugins.ldm.checkpoints:{a}", summary=s)
            for n, a, s in CONVERTERS
        ),
        *(Component(kind="converter", name=n, target=f"vgm_cli.nets.{a}", summary=s) for n, a, s in SHARED_CONVERTERS),
    ]
