"""What the host itself brings, through the same hook as any plugin. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.diffusion import iddpm_manifest
from vgm_cli.diffusion import manifest as gaussian
from vgm_cli.hookspecs import Component, Paper, hookimpl
from vgm_cli.metrics import manifest as metrics

NETWORKS = (
    Component(
        kind="model",
        name="patchgan",
        target="vgm_cli.nets.discriminators:NLayerDiscriminator",
        from_data={"in_channels": "image_channels"},
        summary="patch discriminator (pix2pix), for first stages",
    ),
    Component("model", "lpips", "vgm_cli.losses.lpips:LPIPS", summary="perceptual distance; VGG and heads by path"),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [*gaussian.host_components(), *iddpm_manifest.components(), *metrics.components(), *NETWORKS]
