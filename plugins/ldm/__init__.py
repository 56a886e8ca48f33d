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
TASKS: tuple[
    tuple[str, str, dict[str, str], str], ...
] = (  # conditions of tasks other than texts and classes: name, class, facts of the data, summary
    ("semantic", "SemanticMap", {"size": "image_size"}, "a map of labels, made smaller and stacked on the latent"),
    ("layout", "Layout", {}, "boxes of objects, as tokens of a transformer that is trained with the network"),
)
CONVERTERS = (
    ("autoencoder-kl", "CONVERTER_KL", "CompVis KL first stages and first_stage_model.* of diffusion checkpoints"),
    ("vq-autoencoder", "CONVERTER_VQ", "CompVis VQ first stages"),
    ("autoencoder-kl-diffusers", "DIFFUSERS", "diffusers AutoencoderKL"),
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
            expects={
                **{f"ImageNet rFID ({n})": v for n, v in (("kl-f4", 0.27), ("kl-f8", 0.90), ("vq-f4", 0.58))},
                "FFHQ 256 FID-50K, 200 steps": 4.98,
                "ImageNet 256 FID-50K (cin256-v2, guidance 1.5)": 3.60,
                "COCO FID-30K (txt2img-1p4B, guidance 1.5)": 12.63,
            },
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
        *(
            Component(
                kind="condition",
                name=n,
                target=f"vgm_plugins.ldm.conditions:{cls}",
                from_data=facts,
                summary=s,
            )
            for n, cls, facts, s in TASKS
        ),
        *(
            Component(kind="converter", name=n, target=f"vgm_plugins.ldm.checkpoints:{a}", summary=s)
            for n, a, s in CONVERTERS
        ),
    ]
