"""MeanFlow: Mean Flows for One-step Generative Modeling. Geng, Deng, Bai, Kolter & He 2025 (arXiv 2505.13447).

Official code: Gsunshine/meanflow@d70cb55 (JAX, ImageNet) and Gsunshine/py-meanflow@1f6d72d (PyTorch, CIFAR-10); a third
party's zhuyu-cs/MeanFlow@04d183c (PyTorch, ImageNet) is covered, too. They differ: docs/papers/meanflow.md.
Deviations: rows with r = t cost no derivative; which rows those are counts over the whole batch, not each process's.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

CONVERTERS = (
    ("meanflow", "TORCH", "zhuyu-cs/MeanFlow checkpoints (model, ema)"),
    ("meanflow-flax", "FLAX", "Gsunshine/meanflow checkpoints (flax msgpack), 256 pixels"),
    ("meanflow-unet", "UNET", "Gsunshine/py-meanflow checkpoints (net, net_ema, net_ema1, net_ema2)"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="meanflow",
            title="Mean Flows for One-step Generative Modeling",
            year=2025,
            arxiv="2505.13447",
            repository="https://github.com/Gsunshine/meanflow",
            family="flow",
            summary="A network of average velocities: an image in one evaluation, from scratch and without a teacher.",
            expects={
                "ImageNet 256 FID-50K (XL/2, 1 step)": 3.43,
                "ImageNet 256 FID-50K (XL/2, 2 steps)": 2.93,
                "ImageNet 256 FID-50K (B/4, 1 step, 240 epochs)": 11.35,
                "CIFAR-10 FID-50K (unconditional, 1 step)": 2.92,
            },
        ),
        Component(
            kind="model",
            name="meanflow",
            target="vgm_plugins.meanflow.model:MeanFlowDiT",
            presets="vgm_plugins.meanflow.presets:TRANSFORMERS",
            from_data={"input_size": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="DiT with a second time embedder, for the average velocity",
            denoiser=True,
            two_times=True,
        ),
        Component(
            kind="model",
            name="meanflow-unet",
            target="vgm_plugins.meanflow.model:MeanFlowUNet",
            presets="vgm_plugins.meanflow.presets:UNETS",
            from_data={"img_resolution": "size", "in_channels": "channels"},
            summary="DDPM++ as in EDM, told two times and how its image was augmented",
            denoiser=True,
            two_times=True,
        ),
        Component(
            kind="objective",
            name="meanflow",
            target="vgm_plugins.meanflow.objective:MeanFlow",
            presets="vgm_plugins.meanflow.presets:OBJECTIVES",
            verbs=("train", "distill"),
            summary="average velocities by the MeanFlow identity, from scratch or from a flow network",
            denoiser=True,
            two_times=True,
        ),
        Component(
            kind="sampler",
            name="meanflow",
            target="vgm_plugins.meanflow.sampler:MeanFlowSampler",
            summary="one or a few jumps by average velocities, without noise in between",
        ),
        *(
            Component(kind="converter", name=name, target=f"vgm_plugins.meanflow.checkpoints:{attr}", summary=summary)
            for name, attr, summary in CONVERTERS
        ),
    ]
