"""VAR: Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction. Tian et al. 2024.

arXiv 2404.02905. Official code: FoundationVision/VAR@78b9539 (MIT). The tokenizer's encoder and decoder are the host's
(vgm_cli/nets/autoencoder.py); the way from codes to a model's inputs is vgm_cli/ar/pyramid.py.
Deviations: see tokenizer.py, model.py, objective.py, sampler.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.var"
CODEC_FACTS = {"in_channels": "image_channels", "resolution": "image_size"}
FACTS = {"scales": "scales", "vocab_size": "vocab_size", "channels": "channels", "num_classes": "num_classes"}


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="var",
            title="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction",
            year=2024,
            arxiv="2404.02905",
            repository="https://github.com/FoundationVision/VAR",
            family="autoregressive",
            summary="Grids of codes from coarse to fine, each predicted at once from all coarser ones.",
            expects={
                f"ImageNet {size} FID-50K (VAR-{name})": fid
                for size, name, fid in ((256, "d16", 3.55), (256, "d20", 2.95), (256, "d24", 2.33), (256, "d30", 1.97),
                                        (512, "d36-s", 2.63))
            },
        ),
        *(
            Component(kind=kind, name="var-tokenizer", target=f"{HERE}.tokenizer:VARTokenizer",
                      presets=f"{HERE}.presets:TOKENIZER", from_data=CODEC_FACTS,
                      summary="multi-scale residual tokenizer: a pyramid of codes")
            for kind in ("model", "codec")
        ),
        Component(kind="model", name="var", target=f"{HERE}.model:VAR", presets=f"{HERE}.presets:VAR",
                  from_data=FACTS, summary="next-scale transformer over a pyramid of codes"),
        Component(kind="objective", name="var", target=f"{HERE}.objective:VARObjective", verbs=("train",),
                  summary="codes of all scales, each from the coarser ones"),
        Component(kind="objective", name="var-tokenizer", target=f"{HERE}.objective:TokenizerObjective",
                  verbs=("train",), summary="multi-scale codes, pixels, LPIPS, patch discriminator"),
        Component(kind="sampler", name="var", target=f"{HERE}.sampler:VARSampler", verbs=("restore",),
                  summary="a pass for every scale, cached, guided more and more; edits images"),
        Component(kind="converter", name="var", target=f"{HERE}.checkpoints:CONVERTER",
                  summary="official transformers"),
        Component(kind="converter", name="var-tokenizer", target=f"{HERE}.checkpoints:TOKENIZER_CONVERTER",
                  summary="official tokenizer"),
    ]  # fmt: skip
