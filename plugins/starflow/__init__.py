"""STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis. Gu et al., NeurIPS 2025 (arXiv
2506.06276), and TARFlow, Normalizing Flows are Capable Generative Models. Zhai et al. 2024 (arXiv 2412.06329).

Official code: apple/ml-starflow@e565a46 and apple/ml-tarflow@313120e.
Deviations: docs/papers/starflow.md; video and the Gemma top block are not brought.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.starflow"
FACTS = {"in_channels": "channels", "img_size": "size", "num_classes": "num_classes"}
REST = (
    ("objective", "starflow", "objective:FlowObjective", "exact likelihood of noisy images or latents"),
    ("objective", "starflow-decoder", "decoder:DecoderObjective", "a decoder that sees through noise in its latents"),
    ("sampler", "starflow", "sampler:FlowSampler", "inverse flow, token by token or by Jacobi iterations, denoised"),
    ("sampler", "starflow-interpolate", "sampler:InterpolationSampler", "arcs between draws or given images"),
    ("condition", "starflow-t5", "text:T5Text", "T5 features, from a folder of the encoder"),
    ("converter", "tarflow", "checkpoints:TARFLOW", "apple/ml-tarflow"),
    ("converter", "starflow", "checkpoints:STARFLOW", "apple/ml-starflow"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="starflow",
            title="STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis",
            year=2025,
            arxiv="2506.06276",
            repository="https://github.com/apple/ml-starflow",
            family="flow",
            summary="Autoregressive flow blocks of causal transformers, in latents (STARFlow) and in pixels (TARFlow).",
            expects={"ImageNet 256 FID-50K": 2.40, "ImageNet 512 FID-50K": 3.00, "COCO zero-shot FID-30K": 9.1},
        ),
        Component(kind="model", name="starflow", target=f"{HERE}.model:STARFlow", from_data=FACTS,
                  presets=f"{HERE}.presets:STARFLOW", summary="deep and shallow autoregressive flow blocks on latents"),
        Component(kind="model", name="tarflow", target=f"{HERE}.model:TARFlow", from_data=FACTS,
                  presets=f"{HERE}.presets:TARFLOW", summary="equal autoregressive flow blocks on patches of pixels"),
        Component(kind="model", name="blur-discriminator", target=f"{HERE}.decoder:BlurDiscriminator",
                  from_data={"in_channels": "image_channels"}, summary="patches, low-passed before they are halved"),
        Component(kind="sampler", name="starflow-inpaint", target=f"{HERE}.sampler:InpaintingSampler",
                  verbs=("restore",), summary="Metropolis-Hastings in the latents; completes images"),
        *(Component(kind=kind, name=name, target=f"{HERE}.{target}", summary=summary,
                    verbs=("train",) if kind == "objective" else ()) for kind, name, target, summary in REST),
    ]  # fmt: skip
