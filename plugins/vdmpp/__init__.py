"""VDM++: Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation. Kingma & Gao, NeurIPS 2023
(arXiv 2303.00848), with VDM: Variational Diffusion Models. Kingma et al., NeurIPS 2021 (arXiv 2107.00630).

Official code: google-research/vdm@dc27b98a for VDM; none of VDM++. The former is a network with its schedule, a bound
and a sampler; the latter an objective for any denoiser.
Deviations: see gamma.py (a learned schedule keeps its ends), densities.py (what of the adaptive schedule is not known).
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    here = "vgm_plugins.vdmpp."
    return [
        Paper(
            name="vdmpp",
            title="Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation",
            year=2023,
            arxiv="2303.00848",
            repository="https://github.com/google-research/vdm",
            family="diffusion",
            summary="Every diffusion loss as a weighted ELBO, an adaptive noise schedule; VDM and its likelihoods.",
            expects={
                "CIFAR-10 bits/dim (VDM, released file)": 2.637,
                "CIFAR-10 bits/dim (VDM with augmentation, released file)": 2.522,
                "ImageNet 64 FID-50K (VDM++)": 1.43,
            },
        ),
        Component(
            kind="model",
            name="vdm",
            target=here + "model:VDM",
            presets=here + "presets:PRESETS",
            from_data={"in_channels": "channels"},
            summary="VDM's score network and its noise schedule",
            denoiser=True,
        ),
        *(
            Component(kind=kind, name=name, target=here + at, verbs=verbs, summary=about, denoiser=kind != "sampler",
                      trains=("vdm",) if at.endswith("VariationalBound") else ())
            for kind, name, at, verbs, about in (
                ("objective", "elbo-weighted", "objective:WeightedELBO", ("train",),
                 "any weighting of the ELBO, any prediction, adaptive noise schedule"),
                ("objective", "vdm", "objective:VariationalBound", ("train",),
                 "VDM's bound in bits per dimension, the schedule learned with the network"),
                ("view", "vdm", "process:VDMDenoiser", (), "a VDM on its own schedule"),
                ("sampler", "vdm", "process:VDMSampler", (), "VDM's ancestral sampler and its decoder to pixels"),
            )
        ),
        Component(kind="converter", name="vdm", target=here + "checkpoints:CONVERTER", summary="google-research/vdm"),
    ]  # fmt: skip
