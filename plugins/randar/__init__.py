"""RandAR: Decoder-only Autoregressive Visual Generation in Random Orders. Pang et al., CVPR 2025 (arXiv 2412.01827).

Official code: ziqipang/RandAR@d374a72 (MIT). The network is vgm_cli/nets/llama.py and one vector; the tokenizers are
LlamaGen's VQ-16 and MaskGIT's.
Deviations: see model.py, sampler.py, extrapolation.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.randar"


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="randar",
            title="RandAR: Decoder-only Autoregressive Visual Generation in Random Orders",
            year=2024,
            arxiv="2412.01827",
            repository="https://github.com/ziqipang/RandAR",
            family="autoregressive",
            summary="A Llama is told where the next code comes, so that any order works, and several codes at once.",
            expects={
                f"ImageNet 256 FID-50K ({size})": fid
                for size, fid in (
                    ("L, released", 2.65),
                    ("L on MaskGIT's codes, released", 2.47),
                    ("XL, released", 2.27),
                    ("XXL, paper", 2.15),
                )
            },
        ),
        Component(
            kind="model",
            name="randar",
            target=f"{HERE}.model:RandAR",
            presets=f"{HERE}.presets:RANDAR",
            from_data={"vocab_size": "vocab_size", "grid": "grid", "num_classes": "num_classes"},
            summary="Llama over image codes in any order, by class",
        ),
        Component(
            kind="objective",
            name="randar",
            target=f"{HERE}.objective:RandARObjective",
            verbs=("train",),
            summary="the code at the place that is asked for, in random orders",
        ),
        Component(
            kind="sampler",
            name="randar",
            target=f"{HERE}.sampler:RandARSampler",
            verbs=("restore",),
            summary="several codes a pass, in any order; completes images",
        ),
        Component(
            kind="sampler",
            name="randar-extrapolate",
            target=f"{HERE}.sampler:ExtrapolationSampler",
            summary="images of twice the trained size",
        ),
        Component(
            kind="converter", name="randar", target=f"{HERE}.checkpoints:CONVERTER", summary="official RandAR weights"
        ),
    ]
