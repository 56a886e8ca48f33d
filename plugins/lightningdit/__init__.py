"""LightningDiT and VA-VAE: Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models. Yao,
Yang & Wang, CVPR 2025 (arXiv 2501.01423).

Official code: hustvl/LightningDiT@2725fed. The denoiser is DiT's network with options (vgm_cli/nets/dit.py), the codec
latent diffusion's KL autoencoder (vgm_cli/nets/autoencoder_kl.py), its teacher any of vgm_cli/nets/foundation.py.
Deviations: docs/papers/lightningdit.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.lightningdit"
CODEC = {
    "target": "vgm_cli.nets.autoencoder_kl:AutoencoderKL",
    "presets": f"{HERE}.presets:CODECS",
    "from_data": {"in_channels": "image_channels", "out_ch": "image_channels", "resolution": "image_size"},
    "summary": "VA-VAE: a KL autoencoder whose latents resemble a foundation model's features",
}


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="lightningdit",
            title="Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models",
            year=2025,
            arxiv="2501.01423",
            repository="https://github.com/hustvl/LightningDiT",
            family="flow",
            summary="Latents aligned with a vision foundation model, and DiT with today's tricks: fast convergence.",
            expects={
                "ImageNet 256 FID-50K (XL/1, 64 epochs, guided)": 2.11,
                "ImageNet 256 FID-50K (XL/1, 64 epochs)": 5.14,
                "ImageNet 256 FID-50K (XL/1, 800 epochs, guided)": 1.35,
                "ImageNet 256 FID-50K (XL/1, 800 epochs)": 2.17,
                "ImageNet 256 rFID (VA-VAE f16d32)": 0.28,
            },
        ),
        Component(
            kind="model",
            name="lightningdit",
            target="vgm_cli.nets.dit:SiT",
            presets=f"{HERE}.presets:TRANSFORMERS",
            from_data={"input_size": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="DiT with SwiGLU, RMSNorm and rotary positions",
            denoiser=True,
            two_times=True,
        ),
        *(Component(kind=kind, name="va-vae", **CODEC) for kind in ("model", "codec")),  # type: ignore[arg-type]
        Component(
            kind="objective",
            name="lightningdit",
            target=f"{HERE}.objective:VelocityDirection",
            verbs=("train",),
            summary="velocity and its direction on straight paths, logit-normal times",
            denoiser=True,
        ),
        Component(
            kind="objective",
            name="va-vae",
            target=f"{HERE}.alignment:AlignedAutoencoder",
            verbs=("train",),
            summary="first stages whose latents are aligned with frozen features",
        ),
        Component(
            kind="sampler",
            name="lightningdit",
            target=f"{HERE}.sampler:ShiftedODESampler",
            summary="flow ODE on a shifted grid, guided from a time on, in the first channels or all",
        ),
        *(
            Component(kind="converter", name=name, target=f"{HERE}.checkpoints:{attr}", summary=summary)
            for name, attr, summary in (
                ("lightningdit", "CONVERTER", "hustvl/LightningDiT checkpoints (ema, model, or the bare state)"),
                ("va-vae", "CODEC", "VA-VAE checkpoints (state_dict), with the projection of their training"),
            )
        ),
    ]
