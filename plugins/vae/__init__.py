"""VAE: Auto-Encoding Variational Bayes. Kingma & Welling, ICLR 2014 (arXiv 1312.6114).

The authors published no code; peer: clementchadebec/benchmark_VAE@6419e21 (pythae), whose names the tensors have.
Brought beyond the paper: convolutional networks, the discretised logistic likelihood (arXiv 1606.04934), the
importance-weighted bound (IWAE, arXiv 1509.00519). Deviations: see docs/papers/vae.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

FROM_DATA = {"size": "image_size", "channels": "image_channels"}
SAMPLERS = (
    ("vae", "VAESampler", "draws from the prior, decoded"),
    ("vae-reconstruct", "ReconstructionSampler", "given images (--input) and their reconstructions"),
    ("vae-manifold", "ManifoldSampler", "the plane of a model with two latents"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="vae",
            title="Auto-Encoding Variational Bayes",
            year=2013,
            arxiv="1312.6114",
            family="vae",
            summary="An encoder and a decoder trained together on a reparameterised bound of the likelihood.",
        ),
        *(  # trained as a model; a trained one can also be the codec of another
            Component(
                kind=kind,
                name="vae",
                target="vgm_plugins.vae.model:VAE",
                presets="vgm_plugins.vae.presets:PRESETS",
                from_data=FROM_DATA,
                summary="perceptrons or convolutions; Bernoulli, Gaussian or discretised logistic pixels",
            )
            for kind in ("model", "codec")
        ),
        Component(
            kind="objective",
            name="vae",
            target="vgm_plugins.vae.objective:VAEObjective",
            verbs=("train",),
            summary="evidence lower bound, or the importance-weighted bound",
        ),
        *(Component(kind="sampler", name=n, target=f"vgm_plugins.vae.sampler:{a}", summary=s) for n, a, s in SAMPLERS),
        Component(
            kind="converter", name="vae-pythae", target="vgm_plugins.vae.checkpoints:CONVERTER", summary="pythae's VAE"
        ),
    ]
