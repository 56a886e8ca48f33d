"""LlamaGen: Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation. Sun et al. 2024.

arXiv 2406.06525. Official code: FoundationVision/LlamaGen@ce98ec4 (MIT). The network is vgm_cli/nets/llama.py, the
tokenizer the host's VQModel with unit-length codes.
Deviations: see nets/llama.py, sampler.py, text.py; ten stored crops per image become random crops encoded on the fly.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.llamagen"
CODEC_FACTS = {"in_channels": "image_channels", "out_ch": "image_channels", "resolution": "image_size"}
FACTS = {"vocab_size": "vocab_size", "grid": "grid", "num_classes": "num_classes"}
CONVERTERS = (
    ("llamagen", "CONVERTER", "official GPT, 16x16 codes"),
    ("llamagen-384", "CONVERTER_384", "official GPT, 24x24 codes"),
    ("llamagen-512", "CONVERTER_512", "official GPT, 32x32 codes"),
    ("llamagen-tokenizer", "TOKENIZER_CONVERTER", "official tokenizers"),
)
TOKENIZER = ("vgm_cli.nets.first_stage:VQModel", f"{HERE}.presets:TOKENIZER")


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="llamagen",
            title="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
            year=2024,
            arxiv="2406.06525",
            repository="https://github.com/FoundationVision/LlamaGen",
            family="autoregressive",
            summary="A plain Llama predicts the codes of an image in raster order.",
            expects={
                f"ImageNet 256 FID-50K (LlamaGen-{size})": fid
                for size, fid in (("B 256px", 5.46), ("L 256px", 3.80), ("XL 384px", 2.62), ("3B 384px", 2.18))
            },
        ),
        Component(
            kind="model",
            name="llamagen",
            target="vgm_cli.nets.llama:LlamaGen",
            presets=f"{HERE}.presets:GPT",
            from_data=FACTS,
            summary="Llama over image codes, by class or text",
        ),
        Component(
            kind="condition",
            name="flan-t5",
            target=f"{HERE}.text:FlanT5",
            summary="captions to T5 features, weights by folder",
        ),
        Component(
            kind="objective",
            name="llamagen",
            target=f"{HERE}.objective:LlamaGenObjective",
            verbs=("train",),
            summary="next code",
        ),
        Component(
            kind="sampler",
            name="llamagen",
            target=f"{HERE}.sampler:LlamaGenSampler",
            verbs=("restore",),
            summary="code by code, cached, guided; completes images",
        ),
        *(
            Component(
                kind=kind,
                name="llamagen-tokenizer",
                target=TOKENIZER[0],
                presets=TOKENIZER[1],
                from_data=CODEC_FACTS,
                summary="VQ-16, VQ-8 tokenizers",
            )
            for kind in ("model", "codec")
        ),
        *(Component(kind="converter", name=n, target=f"{HERE}.checkpoints:{a}", summary=s) for n, a, s in CONVERTERS),
    ]
