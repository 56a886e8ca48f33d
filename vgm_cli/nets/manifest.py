"""Networks, encoders of conditions and layouts of files that belong to no single paper. Torch-free."""

from __future__ import annotations

from typing import Any

from vgm_cli.hookspecs import Component

CLASSES = {"num_classes": "num_classes", "class_names": "class_names"}
TEXTS: tuple[tuple[str, str, str, dict[str, str], str], ...] = (  # name, target, presets, facts of the data, summary
    (
        "clip-text",
        "clip_text:CLIPText",
        "CLIP",
        {},
        "a text by CLIP's tower (Stable Diffusion 1: preset sd1, 2: preset sd2), by local weights",
    ),
    ("sdxl-text", "clip_text:SDXLText", "SDXL", {}, "a text by both of SDXL's towers, and its sizes"),
    ("bert-text", "bert_text:BERTText", "BERT", {}, "a text by a transformer that is trained with the network"),
    ("class-token", "bert_text:ClassToken", "", CLASSES, "the class of an image as a context of one vector"),
)
CONVERTERS = (
    ("ldm-unet", "ldm_unet_checkpoints:LDM_UNET", "CompVis and Stability U-Nets, averaged where an average is there"),
    ("ldm-unet-diffusers", "ldm_unet_checkpoints:LDM_UNET_DIFFUSERS", "diffusers UNet2DConditionModel"),
    ("clip-text", "clip_text_checkpoints:CLIP_TEXT", "CLIP's text tower in transformers' names"),
    ("open-clip-text", "clip_text_checkpoints:OPEN_CLIP_TEXT", "OpenCLIP's text tower"),
    ("sdxl-text", "clip_text_checkpoints:SDXL_TEXT", "both text towers of SDXL's files"),
    ("bert-text", "bert_text_checkpoints:BERT_TEXT", "latent diffusion's trained text encoder"),
    ("class-token", "bert_text_checkpoints:CLASS_TOKEN", "latent diffusion's class table"),
)


def components() -> list[Component]:
    def presets(name: str) -> Any:
        return f"vgm_cli.nets.text_presets:{name}" if name else {}

    return [
        Component(
            kind="model",
            name="ldm-unet",
            target="vgm_cli.nets.ldm_unet:LDMUNet",
            presets="vgm_cli.nets.ldm_unet_presets:PRESETS",
            from_data={"image_size": "size", "in_channels": "channels"},
            summary="latent diffusion's U-Net, Stable Diffusion 1, 2 and XL",
            denoiser=True,
        ),
        *(
            Component(
                kind="condition",
                name=name,
                target=f"vgm_cli.nets.{target}",
                presets=presets(table),
                from_data=facts,
                summary=summary,
            )
            for name, target, table, facts, summary in TEXTS
        ),
        *(
            Component(kind="converter", name=name, target=f"vgm_cli.nets.{target}", summary=summary)
            for name, target, summary in CONVERTERS
        ),
    ]
