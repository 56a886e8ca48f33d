"""Host components of the discrete process. Torch-free."""

from __future__ import annotations

from vgm_cli.hookspecs import Component


def components() -> list[Component]:
    return [
        Component(
            kind="objective",
            name="iddpm",
            target="vgm_cli.diffusion.iddpm:IDDPM",
            verbs=("train",),
            summary="discrete diffusion, learned variance, mse + variational bound (IDDPM, ADM, DiT)",
            denoiser=True,
        ),
        Component(
            kind="sampler",
            name="ddpm",
            target="vgm_cli.diffusion.iddpm:DDPMSampler",
            summary="ancestral sampling over respaced discrete steps",
        ),
        Component(
            kind="sampler",
            name="iddpm-ddim",
            target="vgm_cli.diffusion.iddpm:DDIMSampler",
            summary="DDIM over respaced discrete steps, as in ADM and DiT",
        ),
    ]
