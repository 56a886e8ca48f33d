"""VQGAN: Taming Transformers for High-Resolution Image Synthesis. Esser, Rombach, Ommer, CVPR 2021 (arXiv 2012.09841).

Official code: CompVis/taming-transformers@3ba01b2 (MIT). The first stage and its objective are the host's, shared with
LDM and LlamaGen: vgm_cli/nets/first_stage.py, vgm_cli/nn/quantize.py, vgm_cli/losses/first_stage.py.
Deviations: see model.py, sampler.py, objective.py; tokens of the Gumbel model are its most likely codes, without noise;
depth, segmentation and box conditions come as ids, not as images.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.vqgan"
CODEC_FACTS = {"in_channels": "image_channels", "out_ch": "image_channels", "resolution": "image_size"}
PRIOR_FACTS = {"vocab_size": "vocab_size", "grid": "grid", "num_classes": "num_classes"}
CODEC = (f"{HERE}.model:VQModel", f"{HERE}.presets:FIRST_STAGE")


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="vqgan",
            title="Taming Transformers for High-Resolution Image Synthesis",
            year=2021,
            arxiv="2012.09841",
            repository="https://github.com/CompVis/taming-transformers",
            family="autoregressive",
            summary="Images become a few hundred codes by a perceptual, adversarial autoencoder; a GPT writes them.",
            expects={
                "ImageNet rFID (f16, 1024 codes)": 7.94,
                "ImageNet rFID (f16, 16384 codes)": 4.98,
                "ImageNet 256 FID-50K (cIN, k 250)": 15.98,
                "FFHQ 256 FID": 9.6,
            },
        ),
        *(
            Component(
                kind=kind,
                name="vqgan",
                target=CODEC[0],
                presets=CODEC[1],
                from_data=CODEC_FACTS,
                summary="VQGAN first stage",
            )
            for kind in ("model", "codec")
        ),
        Component(
            kind="model",
            name="vqgan-prior",
            target=f"{HERE}.model:GPT",
            presets=f"{HERE}.presets:PRIOR",
            from_data=PRIOR_FACTS,
            summary="GPT over image codes",
        ),
        Component(
            kind="objective",
            name="vqgan-prior",
            target=f"{HERE}.objective:PriorObjective",
            verbs=("train",),
            summary="next code",
        ),
        Component(
            kind="sampler",
            name="vqgan-prior",
            target=f"{HERE}.sampler:PriorSampler",
            verbs=("restore",),
            summary="cached, or a sliding window; completes images",
        ),
        Component(
            kind="converter", name="vqgan", target=f"{HERE}.checkpoints:CONVERTER", summary="CompVis first stages"
        ),
        Component(
            kind="converter", name="vqgan-prior", target=f"{HERE}.checkpoints:PRIOR_CONVERTER", summary="CompVis priors"
        ),
    ]
