"""ControlNet: Adding Conditional Control to Text-to-Image Diffusion Models. Zhang et al., ICCV 2023 (arXiv 2302.05543).

Official code: lllyasviel/ControlNet@ed85cd1. Here: the copy of a frozen U-Net's encoder, what hints are made with, how
strongly they steer, and the layouts of published files. The U-Net itself is latent diffusion's
(vgm_cli/nets/ldm_unet.py).
Deviations: any size of latents and any diffusion solver; an unlocked decoder is a copy, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from vgm_cli.hookspecs import Component, Paper, hookimpl

OF_BASE = (
    "model_channels num_res_blocks attention_resolutions channel_mult concat_channels conv_resample num_heads "
    "num_head_channels num_heads_upsample use_scale_shift_norm resblock_updown use_spatial_transformer "
    "transformer_depth context_dim use_linear_in_transformer disable_self_attentions disable_middle_self_attn "
    "num_attention_blocks legacy use_new_attention_order num_classes null_class vector_dim norm_groups out_channels"
).split()
ANNOTATED = {"size": "image_size"}


@hookimpl
def vgm_components() -> Iterable[Component | Paper]:
    return [
        Paper(
            name="controlnet",
            title="Adding Conditional Control to Text-to-Image Diffusion Models",
            year=2023,
            arxiv="2302.05543",
            repository="https://github.com/lllyasviel/ControlNet",
            family="diffusion",
            summary="A frozen diffusion model follows edges, depth or line art, by a trainable copy of its encoder.",
            expects={"ADE20K FID (segmentation to image)": 15.27, "ADE20K CLIP score": 0.26, "ADE20K label IoU": 0.35},
        ),
        Component(
            kind="model",
            name="controlnet",
            target="vgm_plugins.controlnet.model:ControlNet",
            presets="vgm_plugins.controlnet.presets:PRESETS",
            from_data={
                "image_size": "size",
                "in_channels": "channels",
                "hint_size": "image_size",
                **{key: f"base.{key}" for key in OF_BASE},
            },
            summary="a frozen latent diffusion U-Net (role `base`) and the copy of its encoder that follows a hint",
        ),
        Component(
            kind="objective",
            name="controlnet",
            target="vgm_plugins.controlnet.objective:ControlObjective",
            verbs=("train",),
            summary="the base's own denoising loss, half of the prompts left out",
        ),
        Component(
            kind="sampler",
            name="controlnet",
            target="vgm_plugins.controlnet.sampler:ControlSampler",
            summary="any solver, steered: strength, guess mode, an interval, several ControlNets at once",
        ),
        Component(
            kind="condition",
            name="annotated",
            target="vgm_plugins.controlnet.hints:AnnotatedHint",
            from_data=ANNOTATED,
            summary="a hint made of a picture: canny, scribble, nms, fake-scribble, depth, normal",
        ),
        Component(
            kind="condition",
            name="hed",
            target="vgm_plugins.controlnet.hed:HEDHint",
            from_data=ANNOTATED,
            summary="the soft edges of a picture as a hint, by local weights",
        ),
        *(
            Component(kind="converter", name=n, target=f"vgm_plugins.controlnet.{target}", summary=about)
            for n, target, about in (
                ("controlnet", "checkpoints:CONTROLNET", "ControlNet's files of control_model.* alone"),
                ("controlnet-whole", "checkpoints:WHOLE", "the same with base, first stage and text encoder"),
                ("controlnet-diffusers", "checkpoints:CONTROLNET_DIFFUSERS", "diffusers ControlNetModel"),
                ("hed", "hed:CONVERTER", "ControlNet's soft-edge network (ControlNetHED.pth)"),
            )
        ),
    ]
