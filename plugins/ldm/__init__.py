"""LDM: High-Resolution Image Synthesis with Latent Diffusion Models. Rombach et al., CVPR 2022 (arXiv 2112.10752).

Official code: CompVis/latent-diffusion@a506df5, with CompVis/taming-transformers@3ba01b2 for quantiser, discriminator
and LPIPS. Here: the first stages (KL, VQ), their training and their checkpoints. The networks are shared
(vgm_cli/nets/{autoencoder,autoencoder_kl,first_stage}.py), as is the objective (vgm_cli/losses/first_stage.py).
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
        *(
            Component(kind="converter", name=n, target=f"vgm_plugins.ldm.checkpoints:{a}", summary=s)
            for n, a, s in CONVERTERS
        ),
    ]
