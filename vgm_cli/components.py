"""What the host itself brings, through the same hook as any plugin. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.diffusion import iddpm_manifest
from vgm_cli.diffusion import manifest as gaussian
from vgm_cli.hookspecs import Component, Paper, hookimpl
from vgm_cli.metrics import manifest as metrics
from vgm_cli.nets import manifest as networks
from vgm_cli.operators import manifest as operators
from vgm_cli.rewards import manifest as rewards

NETWORKS = (
    Component(
        kind="model",
        name="ncsnpp",
        target="vgm_cli.nets.ncsnpp:NCSNpp",
        presets="vgm_cli.nets.ncsnpp_presets:PRESETS",
        from_data={"image_size": "size", "in_channels": "channels", "num_classes": "num_classes"},
        summary="NCSN++ and DDPM++, U-Nets of score-based models and rectified flows",
        denoiser=True,
    ),
    Component(
        kind="model",
        name="patchgan",
        target="vgm_cli.nets.discriminators:NLayerDiscriminator",
        from_data={"in_channels": "image_channels"},
        summary="patch discriminator (pix2pix), for first stages",
    ),
    Component(
        kind="model",
        name="edm-unet",
        target="vgm_cli.nets.edm:DhariwalUNet",
        presets={"imagenet64": {"img_resolution": 64, "num_classes": 1000}},
        from_data={"img_resolution": "size", "in_channels": "channels", "num_classes": "num_classes"},
        summary="EDM's ADM U-Net, predicts F",
        denoiser=True,
    ),
    Component(
        kind="model",
        name="song-unet",
        target="vgm_cli.nets.song_unet:SongUNet",
        presets={"cifar10": {"img_resolution": 32, "in_channels": 3}},
        from_data={"img_resolution": "size", "in_channels": "channels", "num_classes": "num_classes"},
        summary="EDM's DDPM++, the U-Net of CIFAR-10",
        denoiser=True,
        two_times=True,
    ),
    Component(
        kind="model",
        name="lpips",
        target="vgm_cli.losses.lpips:LPIPS",
        summary="perceptual distance; VGG and heads by path",
    ),
    Component(
        kind="model",
        name="vision-features",
        target="vgm_cli.nets.foundation:VisionFeatures",
        summary="frozen patch features of DINOv2 or MAE, weights by path",
    ),
    Component(
        kind="model",
        name="digit-features",
        target="vgm_cli.nets.foundation:DigitFeatures",
        summary="frozen 7x7 features of the shipped digit classifier",
    ),
    Component(
        kind="model",
        name="colour-features",
        target="vgm_cli.nets.foundation:ColourFeatures",
        summary="frozen 8x8 features of the shipped network of colour pictures",
    ),
    Component(
        kind="objective",
        name="autoencoder",
        target="vgm_cli.losses.first_stage:AutoencoderObjective",
        verbs=("train",),
        summary="first stages: pixels, LPIPS, KL or codebook, patch discriminator",
    ),
    Component(
        kind="converter", name="lpips", target="vgm_cli.losses.lpips:CONVERTER", summary="taming-transformers' LPIPS"
    ),
)


CONDITIONS = (
    Component(
        kind="condition",
        name="class",
        target="vgm_cli.conditioning:ClassLabel",
        from_data={"num_classes": "num_classes", "class_names": "class_names"},
        summary="the class of an image",
    ),
    Component(
        kind="condition",
        name="hint",
        target="vgm_cli.nets.hints:Hint",
        from_data={"size": "image_size"},
        summary="a picture to follow: of a column of the data, or what an operator makes of the image",
    ),
    Component(
        kind="condition",
        name="mask",
        target="vgm_cli.nets.hints:Mask",
        from_data={"size": "image_size", "image_channels": "image_channels"},
        summary="what is known of an image, of networks that complete it",
    ),
    Component(
        kind="condition",
        name="words",
        target="vgm_cli.nets.text:WordEncoder",
        from_data={"words": "words"},
        summary="a text as learned vectors of its words, by transformer blocks if asked; trained with the network",
    ),
)


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        *gaussian.host_components(),
        *iddpm_manifest.components(),
        *metrics.components(),
        *operators.components(),
        *rewards.components(),
        *NETWORKS,
        *networks.components(),
        *CONDITIONS,
    ]
