"""StyleGAN. Karras, Laine, Aila, CVPR 2019 (arXiv 1812.04948), with StyleGAN2 (1912.04958) and -ADA (2006.06676).

Official code: NVlabs/stylegan@1e0d5c7 (TensorFlow), NVlabs/stylegan2-ada-pytorch@d72cc7d; rosinality's port @07fa60b.
Deviations: see model.py, stylegan2.py, augment.py and objective.py; separability and the StyleGAN-1 baselines without
styles are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.stylegan"
FACTS = {"size": "size", "in_channels": "channels", "num_classes": "num_classes"}
EXPECTS = {"FFHQ 1024 FID-50K": 4.42, "FFHQ 1024 PPL w-end": 197.2, "CIFAR-10 FID-50K (ADA)": 2.42}
CONVERTERS = (
    ("stylegan", "GENERATOR", "NVlabs/stylegan"),
    ("stylegan-discriminator", "DISCRIMINATOR", "its discriminator"),
    ("stylegan2", "GENERATOR2", "NVlabs/stylegan2-ada-pytorch"),
    ("stylegan2-discriminator", "DISCRIMINATOR2", "its discriminator"),
    ("stylegan2-tf", "GENERATOR2_TF", "NVlabs/stylegan2 and stylegan2-ada"),
    ("stylegan-rosinality", "PORT", "rosinality/style-based-gan-pytorch"),
    ("stylegan-rosinality-discriminator", "PORT_DISCRIMINATOR", "its discriminator"),
    ("stylegan-rosinality-discriminator-plain", "PORT_DISCRIMINATOR_PLAIN", "its discriminator, plain entry"),
)
MODELS: tuple[tuple[str, str, str | dict[str, Any], dict[str, str], str], ...] = (
    ("stylegan", "model:Generator", "presets:GENERATOR", FACTS, "style-based generator, grown progressively"),
    ("stylegan-discriminator", "model:Discriminator", "presets:DISCRIMINATOR", FACTS, "its discriminator"),
    ("stylegan2", "stylegan2:Generator", "presets:GENERATOR2", FACTS, "modulated convolutions"),
    ("stylegan2-discriminator", "stylegan2:Discriminator", "presets:DISCRIMINATOR2", FACTS, "residual, or plain"),
    ("stylegan-rosinality", "port:Generator", {}, {"size": "size"}, "a port with other conventions"),
    ("stylegan-rosinality-discriminator", "port:Discriminator", {}, {"size": "size"}, "its discriminator"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    presets = {n: f"{HERE}.{p}" if isinstance(p, str) else p for n, _, p, _, _ in MODELS}
    return [
        Paper(
            "stylegan",
            "A Style-Based Generator Architecture for Generative Adversarial Networks",
            2019,
            "1812.04948",
            "https://github.com/NVlabs/stylegan",
            "gan",
            "Styles at every layer steer a GAN from a constant.",
            EXPECTS,
        ),
        *(
            Component(kind="model", name=n, target=f"{HERE}.{t}", presets=presets[n], from_data=facts, summary=s)
            for n, t, _, facts, s in MODELS
        ),
        Component(
            kind="objective",
            name="stylegan",
            target=f"{HERE}.objective:StyleGANObjective",
            verbs=("train",),
            summary="GAN loss, R1, path lengths, growing, adaptive augmentation",
        ),
        Component(kind="sampler", name="stylegan", target=f"{HERE}.sampler:StyleGANSampler", summary="truncation"),
        Component(
            kind="sampler",
            name="stylegan-mix",
            target=f"{HERE}.sampler:StyleMixingSampler",
            summary="tables of mixed styles",
        ),
        *(Component(kind="converter", name=n, target=f"{HERE}.checkpoints:{a}", summary=s) for n, a, s in CONVERTERS),
    ]
