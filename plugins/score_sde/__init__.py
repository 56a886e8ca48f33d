"""Score-Based Generative Modeling through Stochastic Differential Equations. Song et al., ICLR 2021 (arXiv 2011.13456).

Official code: yang-song/score_sde_pytorch@cb1f359, and in JAX yang-song/score_sde@0acb9e0 (class-conditional sampling).
Its networks are the host's (vgm_cli/nets/ncsnpp.py), its SDEs the host's paths. Here are the official discretisations,
losses, samplers and the classifier. Deviations: see predictors.py and docs/papers/score-sde.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

CONVERTERS = (
    ("score-sde", "checkpoints:PLAIN", "yang-song/score_sde_pytorch .pth: VE, or VP in continuous time"),
    ("score-sde-subvp", "checkpoints:SUBVP", "the same, sub-VP"),
    ("score-sde-vp-discrete", "checkpoints:DISCRETE", "the same, VP on DDPM's steps"),
    ("score-sde-classifier", "checkpoints:CLASSIFIER", "yang-song/score_sde (flax): the classifier of noisy images"),
    ("score-sde-diffusers", "diffusers_checkpoints:DIFFUSERS", "diffusers UNet2DModel of NCSN++, VE: google/ncsnpp-*"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    here = "vgm_plugins.score_sde."
    return [
        Paper(
            name="score-sde",
            title="Score-Based Generative Modeling through Stochastic Differential Equations",
            year=2020,
            arxiv="2011.13456",
            repository="https://github.com/yang-song/score_sde_pytorch",
            family="diffusion",
            summary="Diffusion as a stochastic differential equation: reversed by its score, or followed as an ODE.",
            expects={
                "CIFAR-10 FID-50K (NCSN++ cont. deep, VE)": 2.20,
                "CIFAR-10 FID-50K (DDPM++ cont. deep, VP)": 2.41,
                "CIFAR-10 FID-50K (DDPM++ cont. deep, sub-VP)": 2.41,
                "CIFAR-10 bits/dim (DDPM++ cont. deep, sub-VP)": 2.99,
            },
        ),
        Component(
            kind="model",
            name="score-sde-classifier",
            target=here + "classifier:NoisyWideResNet",
            presets=here + "presets:CLASSIFIERS",
            from_data={"image_size": "size", "in_channels": "channels", "num_classes": "num_classes"},
            summary="of noisy images, a wide residual network",
        ),
        Component(
            kind="objective",
            name="score-matching",
            target=here + "objective:ScoreMatching",
            presets=here + "presets:OBJECTIVES",
            verbs=("train",),
            summary="denoising score matching on VE, VP or sub-VP, in continuous time or SMLD's and DDPM's",
            denoiser=True,
        ),
        Component(
            kind="objective",
            name="score-sde-classifier",
            target=here + "objective:NoiseClassifier",
            verbs=("train",),
            summary="cross entropy on noisy images of VE, VP or sub-VP, for classifier guidance",
        ),
        Component(
            kind="sampler",
            name="score-sde",
            target=here + "sampler:ScoreSDESampler",
            summary="predictor and corrector, in the official steps",
        ),
        Component(
            kind="sampler",
            name="score-sde-ode",
            target=here + "sampler:ScoreSDEFlowSampler",
            summary="the probability flow by RK45; latent codes of images",
        ),
        Component(
            kind="sampler",
            name="score-sde-restore",
            target=here + "sampler:ScoreSDERestorer",
            verbs=("restore",),
            summary="restoration: inpainting, colorization and other linear tasks by predictor and corrector",
        ),
        *(
            Component(kind="converter", name=name, target=f"{here}{target}", summary=summary)
            for name, target, summary in CONVERTERS
        ),
    ]
