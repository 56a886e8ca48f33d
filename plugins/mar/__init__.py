"""MAR: Autoregressive Image Generation without Vector Quantization. Li et al., NeurIPS 2024 (arXiv 2406.11838).

Official code: LTH14/mar@fe470ac (MIT). How many tokens are masked is the host's, vgm_cli/ar/masking.py, shared with
MaskGIT; the head's process is IDDPM's, vgm_cli/diffusion/discrete; the KL codec is LDM's.
Deviations: see model.py, objective.py, sampler.py and docs/papers/mar.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.mar"


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="mar",
            title="Autoregressive Image Generation without Vector Quantization",
            year=2024,
            arxiv="2406.11838",
            repository="https://github.com/LTH14/mar",
            family="masked",
            summary="Continuous tokens in random order: a small diffusion network says what each of them is.",
            expects={
                f"ImageNet 256 FID-50K ({size})": fid
                for size, fid in (
                    ("B, guidance 2.9", 2.31),
                    ("L, guidance 3.0", 1.78),
                    ("H, guidance 3.2", 1.55),
                    ("B, no guidance", 3.48),
                    ("L, no guidance", 2.60),
                    ("H, no guidance", 2.35),
                )
            },
        ),
        Component(
            kind="model",
            name="mar",
            target=f"{HERE}.model:MAR",
            presets=f"{HERE}.presets:MAR",
            from_data={"input_size": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="masked autoencoder over latents, with a diffusion head",
        ),
        Component(
            kind="objective",
            name="masked-diffusion",
            target=f"{HERE}.objective:MaskedDiffusion",
            verbs=("train",),
            summary="denoise masked tokens",
        ),
        Component(
            kind="sampler",
            name="mar",
            target=f"{HERE}.sampler:MARSampler",
            presets=f"{HERE}.presets:SAMPLER",
            verbs=("restore",),
            summary="tokens in random order, each by diffusion; completes images",
        ),
        Component(
            kind="converter", name="mar", target=f"{HERE}.checkpoints:CONVERTER", summary="official MAR checkpoints"
        ),
    ]
