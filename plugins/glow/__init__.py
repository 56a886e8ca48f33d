"""Glow: Generative Flow with Invertible 1x1 Convolutions. Kingma & Dhariwal, NeurIPS 2018 (arXiv 1807.03039).

Official code: openai/glow@91b2c57 (TensorFlow); rosinality/glow-pytorch@97081ff is the second parametrisation.
Deviations: actnorm is folded into the linear map beside it; one float64 determinant per level instead of one per step;
an unlabelled likelihood of a conditional model is averaged over its classes.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

EXPECTS = {
    "CIFAR-10 bits/dim": 3.35, "ImageNet 32 bits/dim": 4.09, "ImageNet 64 bits/dim": 3.81,
    "LSUN bedroom 64 bits/dim": 2.38, "LSUN tower 64 bits/dim": 2.46, "LSUN church outdoor 64 bits/dim": 2.67,
    "CelebA-HQ 256 5-bit bits/dim": 1.03,
}  # fmt: skip


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="glow",
            title="Glow: Generative Flow with Invertible 1x1 Convolutions",
            year=2018,
            arxiv="1807.03039",
            repository="https://github.com/openai/glow",
            family="flow",
            summary="A normalising flow with exact likelihood: actnorm, learned channel mixing, couplings, scales.",
            expects=EXPECTS,
        ),
        Component(
            kind="model",
            name="glow",
            target="vgm_plugins.glow.model:Glow",
            presets="vgm_plugins.glow.presets:PRESETS",
            from_data={"size": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="multi-scale flow, affine or additive couplings, class-conditional top prior",
        ),
        Component(
            kind="objective",
            name="glow",
            target="vgm_plugins.glow.objective:GlowObjective",
            verbs=("train",),
            summary="exact negative log-likelihood in bits per dimension, with a class term",
        ),
        Component(
            kind="sampler",
            name="glow",
            target="vgm_plugins.glow.sampler:GlowSampler",
            summary="prior draws at a temperature",
        ),
        Component(
            kind="sampler",
            name="glow-interpolate",
            target="vgm_plugins.glow.sampler:InterpolationSampler",
            summary="lines in latent space, between draws or given images",
        ),
        Component(
            kind="sampler",
            name="glow-attribute",
            target="vgm_plugins.glow.sampler:AttributeSampler",
            summary="given images with more and less of an attribute",
        ),
        Component(
            kind="optimizer",
            name="glow-adamax",
            target="vgm_plugins.glow.optim:GlowAdamax",
            summary="official Adamax variant",
        ),
        Component(
            kind="converter",
            name="glow",
            target="vgm_plugins.glow.checkpoints:CONVERTER",
            summary="openai/glow variables",
        ),
        Component(
            kind="converter",
            name="glow-average",
            target="vgm_plugins.glow.checkpoints:CONVERTER_AVERAGE",
            summary="openai/glow Polyak averages",
        ),
        Component(
            kind="converter",
            name="glow-rosinality",
            target="vgm_plugins.glow.checkpoints:PORT",
            summary="rosinality's port",
        ),
    ]
