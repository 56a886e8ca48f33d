"""MaskGIT: Masked Generative Image Transformer. Chang et al., CVPR 2022 (arXiv 2202.04200); and the Halton scheduler,
Besnier et al., ICLR 2025 (arXiv 2503.17076).

Official code: google-research/maskgit@1db2359 (Apache 2.0), valeoai/Halton-MaskGIT@f61b0a1 (MIT). Mask schedules and
the choice of masked codes are the host's, vgm_cli/ar/masking.py, shared with MAR.
Deviations: see model.py, tokenizer.py, sampler.py and docs/papers/maskgit.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.maskgit"
FACTS = {"vocab_size": "vocab_size", "grid": "grid", "num_classes": "num_classes"}
MODELS = (
    ("maskgit", "MaskGIT", "BERT", "BERT over codes behind a class token"),
    ("halton-maskgit", "HaltonMaskGIT", "HALTON", "over codes, norms modulated by the class"),
)
SAMPLERS = (
    ("maskgit", "MaskGITSampler", "CONFIDENCE", "keeps the surest codes; completes images"),
    ("halton-confidence", "HaltonConfidenceSampler", "HALTON_CONFIDENCE", "the Halton release's; completes images"),
    ("halton", "HaltonSampler", "HALTON_ORDER", "in a Halton order; completes images"),
)
CONVERTERS = (
    ("maskgit", "BERT", "official transformers (flax)"),
    ("maskgit-tokenizer", "TOKENIZER", "official tokenizers (flax)"),
    ("maskgit-tokenizer-torch", "TOKENIZER_PORT", "the tokenizer's PyTorch port"),
    ("halton-maskgit", "HALTON", "official Halton-MaskGIT"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="maskgit",
            title="MaskGIT: Masked Generative Image Transformer",
            year=2022,
            arxiv="2202.04200",
            repository="https://github.com/google-research/maskgit",
            family="masked",
            summary="All codes of an image are guessed at once, the surest are kept, the others guessed again.",
            expects={
                "ImageNet 256 FID-50K (8 steps)": 6.18,
                "ImageNet 512 FID-50K (12 steps)": 7.32,
                "ImageNet 256 FID-50K (classifier accepts 5%)": 4.02,
                "ImageNet 256 FID-50K (Halton B, 32 steps)": 4.17,
                "ImageNet 384 FID-50K (Halton L, 32 steps)": 2.59,
            },
        ),
        *(
            Component(kind="model", name=name, target=f"{HERE}.model:{target}", presets=f"{HERE}.presets:{presets}",
                      from_data=FACTS, summary=summary)
            for name, target, presets, summary in MODELS
        ),
        Component(kind="objective", name="masked-codes", target=f"{HERE}.objective:MaskedCodes", verbs=("train",),
                  summary="guess masked codes"),
        *(
            Component(kind="sampler", name=name, target=f"{HERE}.sampler:{target}",
                      presets=f"{HERE}.presets:{presets}", verbs=("restore",), summary=summary)
            for name, target, presets, summary in SAMPLERS
        ),
        *(
            Component(kind=kind, name="maskgit-tokenizer", target=f"{HERE}.tokenizer:MaskGITTokenizer",
                      presets=f"{HERE}.presets:TOKENIZER", from_data={"in_channels": "image_channels"},
                      summary="VQGAN of convolutions alone")
            for kind in ("model", "codec")
        ),
        *(Component(kind="converter", name=n, target=f"{HERE}.checkpoints:{a}", summary=s) for n, a, s in CONVERTERS),
    ]  # fmt: skip
