"""VQ-VAE: Neural Discrete Representation Learning. van den Oord, Vinyals, Kavukcuoglu, NeurIPS 2017 (arXiv 1711.00937).

The authors' library: google-deepmind/sonnet@26b0518 (quantizer, an example autoencoder); the experiments have no public
code. The quantizers are the host's, vgm_cli/nn/quantize.py, shared with VQGAN, LDM and LlamaGen.
Deviations: docs/papers/vqvae.md; audio, video and the two-level model are not brought.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

HERE = "vgm_plugins.vqvae"
CODEC = {
    "target": f"{HERE}.model:VQVAE",
    "presets": f"{HERE}.presets:AUTOENCODER",
    "from_data": {"image_channels": "image_channels", "image_size": "image_size"},
    "summary": "encoder, codebook, decoder",
}
FACTS = {"vocab_size": "vocab_size", "grid": "grid", "num_classes": "num_classes"}
REST = (
    ("objective", "vqvae", "objective:VQVAEObjective", "reconstruction over the variance, or a likelihood"),
    ("objective", "vqvae-prior", "objective:PriorObjective", "next code"),
    ("sampler", "vqvae-prior", "sampler:PriorSampler", "code by code, cached; completes given images"),
    ("sampler", "vqvae-interpolate", "sampler:InterpolationSampler", "between given images, in codes"),
    ("converter", "vqvae-sonnet", "checkpoints:SONNET", "variables of sonnet's example"),
    ("converter", "vqvae-zalando", "checkpoints:ZALANDO", "zalando's notebook"),
    ("converter", "vqvae-pythae", "checkpoints:PYTHAE", "pythae's VQVAE with its default perceptrons"),
    ("converter", "vqvae-pixelcnn-pythae", "checkpoints:PIXELCNN", "pythae's PixelCNN"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="vqvae",
            title="Neural Discrete Representation Learning",
            year=2017,
            arxiv="1711.00937",
            repository="https://github.com/google-deepmind/sonnet",
            family="autoregressive",
            summary="Images become codes of a learned codebook; a PixelCNN learns which codes go together.",
            expects={"CIFAR-10 bits/dim (bound, uniform prior)": 4.67},
        ),
        *(Component(kind=kind, name="vqvae", **CODEC) for kind in ("model", "codec")),  # type: ignore[arg-type]
        Component(kind="model", name="vqvae-prior", target=f"{HERE}.prior:GatedPixelCNN", from_data=FACTS,
                  presets=f"{HERE}.presets:PRIOR", summary="gated PixelCNN over codes, by class or without"),
        Component(kind="model", name="vqvae-pixelcnn", target=f"{HERE}.prior:MaskedPixelCNN", from_data=FACTS,
                  summary="plain masked PixelCNN over codes (pythae's)"),
        *(Component(kind=kind, name=name, target=f"{HERE}.{target}", summary=summary,
                    verbs=("train",) if kind == "objective" else ()) for kind, name, target, summary in REST),
    ]  # fmt: skip
