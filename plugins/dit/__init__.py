"""DiT: Scalable Diffusion Models with Transformers. Peebles & Xie, ICCV 2023 (arXiv 2212.09748).

Official code: facebookresearch/DiT@ed81ce2 (CC-BY-NC; nothing of it is copied here).
The network is vgm_cli/nets/dit.py, shared with SiT; the process and the objective are IDDPM's, shared with ADM:
vgm_cli/diffusion/{discrete,iddpm}.py.
Deviations: label dropout is drawn by the objective, not inside the network's forward; attention is fused.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="dit",
            title="Scalable Diffusion Models with Transformers",
            year=2022,
            arxiv="2212.09748",
            repository="https://github.com/facebookresearch/DiT",
            family="diffusion",
            summary="A plain transformer on latent patches with adaLN-Zero conditioning replaces the U-Net.",
            expects={
                "ImageNet 256 FID-50K (XL/2, guidance 1.5)": 2.27,
                "ImageNet 256 IS (XL/2, guidance 1.5)": 278.24,
                "ImageNet 512 FID-50K (XL/2, guidance 1.5)": 3.04,
                "ImageNet 512 IS (XL/2, guidance 1.5)": 240.82,
            },
        ),
        Component(
            kind="model",
            name="dit",
            target="vgm_cli.nets.dit:DiT",
            presets="vgm_plugins.dit.presets:PRESETS",
            from_data={"input_size": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="diffusion transformer with adaLN-Zero",
            denoiser=True,
            two_times=True,
        ),
        *(
            Component(kind="converter", name=name, target=f"vgm_plugins.dit.checkpoints:{attr}", summary=summary)
            for name, attr, summary in (
                ("dit", "CONVERTER", "facebookresearch/DiT checkpoints"),
                ("dit-diffusers", "DIFFUSERS", "diffusers DiTTransformer2DModel, 256 pixels"),
                ("dit-diffusers-512", "DIFFUSERS_512", "diffusers DiTTransformer2DModel, 512 pixels"),
            )
        ),
    ]
