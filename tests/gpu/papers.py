"""A training step of every paper that has no check of its own in speed.py: the published recipe on the card, beside the
objective's losses without the trainer.

Texts are read as vectors of words, 77 a text, which train with the network: the published encoders are frozen, and the
trainer keeps their features. Hints and degraded pictures are read, not made: they lie beside the latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs import Job
from speed import WORDS, feed_of, images, large, training


@dataclass(frozen=True)
class Paper:
    """One row. small: what makes it one for a CPU, in a dry run; NODE.preset=null goes before, for every node of
    presets."""

    what: str  # as the table calls it
    recipe: str  # the published one
    batch: int  # images, on one card of 80 GiB
    small: tuple[str, ...]
    more: tuple[str, ...] = ()  # overrides in any case
    classes: int = 1000  # of the pictures of recipes without a codec; 0: they have none
    presets: tuple[str, ...] = ("model",)


def words(width: int, vector: bool = False) -> str:
    """The override that puts word vectors in the place of a published text encoder."""
    settings = {"words": list(WORDS), "width": width, "length": 77, "vector": vector, "train": True}
    return "conditions.text=" + json.dumps({"name": "words", **settings})


def unet(role: str, context: int = 32, **more: Any) -> tuple[str, ...]:
    """Overrides that make a latent diffusion U-Net small."""
    sizes = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "attention_resolutions": [2],
             "num_heads": 2, "context_dim": context, **more}  # fmt: skip
    return tuple(f"{role}.{key}={json.dumps(value)}" for key, value in sizes.items())


SMALL_CODEC = ("codec.ch=8", "codec.norm_groups=8", "codec.ch_mult=[1,1,1,1]", "codec.num_res_blocks=1", "data.size=64")
SMALL_TEXT = ("conditions.text.width=32",)
TRANSFORMER = ("model.hidden_size=32", "model.depth=1", "model.num_heads=2")
EDM2 = ("roles.teacher.model_channels=32", "roles.teacher.channel_mult=[1,1]", "roles.teacher.num_blocks=1",
        "roles.teacher.attn_resolutions=[8]", "roles.teacher.channels_per_head=16", "data.size=16",
        "roles.teacher.img_resolution=16")  # fmt: skip
FEATURES = {"width": 32, "depth": 4, "size": 28, "grid": 2}
PAPERS = {
    "lightningdit": Paper("LightningDiT-XL/1 256", "lightningdit/imagenet256-64ep", 64, TRANSFORMER),
    "meanflow": Paper("MeanFlow-XL/2 256", "meanflow/imagenet256-xl2", 32, TRANSFORMER),
    "var": Paper("VAR-d16 256", "var/imagenet256", 48, ("model.depth=1", "model.embed_dim=32", "model.num_heads=2")),
    "mar": Paper("MAR-L 256", "mar/imagenet256", 64,
                 tuple(f"model.{k}={v}" for k, v in {"encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2,
                                                     "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
                                                     "head_width": 32, "head_depth": 1}.items())),
    "maskgit": Paper("MaskGIT (Halton, base) 256", "maskgit/imagenet256-halton", 64,
                     ("model.hidden_dim=32", "model.depth=1", "model.heads=2")),
    "randar": Paper("RandAR-L 256", "randar/imagenet256-l", 64,
                    ("model.dim=64", "model.n_layer=1", "model.n_head=2"), ("train.checkpointing=false",)),
    "starflow": Paper("STARFlow XLv2/1 256", "starflow/imagenet256", 16,
                      ("model.channels=32", "model.head_dim=32", "model.layers_per_block=[1,1]"),
                      ("train.checkpointing=true",)),
    "ldm": Paper("LDM cin256-v2", "ldm/cin256-v2", 32,
                 ("model.model_channels=32", "model.num_res_blocks=1", "model.attention_resolutions=[2]",
                  "model.channel_mult=[1,1]", "model.num_heads=2", "model.context_dim=512")),
    "scm": Paper("sCT 64 (EDM2-S)", "scm/imagenet64", 32, EDM2, classes=10, presets=("roles.teacher",)),
    "score-sde": Paper("Score-SDE DDPM++ deep 32", "score-sde/cifar10-vp-deep", 128,
                       ("model.nf=32", "model.ch_mult=[1,1]", "model.num_res_blocks=1"), classes=0),
    "vdmpp": Paper("VDM++ 64 (ADM U-Net)", "vdmpp/imagenet64", 32,
                   ("model.model_channels=32", "model.num_res_blocks=1", "model.channel_mult=[1,1]",
                    "model.attention_resolutions=[2]", "model.num_head_channels=32", "data.size=16"), classes=10),
    "vqvae": Paper("VQ-VAE 128", "vqvae/imagenet128", 128,
                   ("model.channels=16", "model.residual_channels=8", "model.n_embed=16"), classes=0),
    "add": Paper("ADD 512 (SD 2.1)", "add/sd-turbo", 8,
                 (*unet("roles.teacher"), *SMALL_CODEC, *SMALL_TEXT,
                  *(f"roles.features.{key}={value}" for key, value in FEATURES.items())),
                 (words(1024),), presets=("roles.teacher", "codec")),
    "controlnet": Paper("ControlNet 512 (SD 1.5)", "controlnet/sd15", 16,
                        (*unet("roles.base"), *SMALL_CODEC, *SMALL_TEXT, "model.hint_size=64",
                         "model.hint_widths=[8,8,8,16]"),
                        (words(768), "conditions.hint={name: annotated, column: source, annotator: null}",
                         "train.accumulate=1"), presets=("model", "roles.base", "codec")),
    "supir": Paper("SUPIR 512 (SDXL)", "supir/v0", 4,
                   (*unet("roles.base"), *SMALL_CODEC, *SMALL_TEXT, "roles.base.vector_dim=32"),
                   (words(2048, vector=True), "roles.base.vector_dim=2048", "conditions.control.operator=null"),
                   presets=("model", "roles.base", "codec")),
    "ldm-openmoji": Paper("LDM of captions 32", "ldm/openmoji", 256, ("data.split=test",), presets=()),
    "sit-openmoji": Paper("SiT of captions 32", "sit/openmoji", 256, ("data.split=test",), presets=()),
}  # fmt: skip


def feed(recipe: Any) -> Callable[..., Any] | None:
    """Synthetic latents behind the recipe's own codec, untrained; None of a recipe on pixels, and of one on shipped
    pictures behind a shipped codec."""
    node = recipe.config.get("codec")
    if not node or node.get("weights"):
        return None
    keywords = {k: v for k, v in node.items() if k not in ("weights", "fallback", "output")}
    return feed_of(keywords, node.get("output"))


def train(name: str, job: Job) -> None:
    paper = PAPERS[name]
    small = (*(f"{node}.preset=null" for node in paper.presets), *paper.small)
    sized = large(job, paper.recipe, "train.compile=off", *paper.more, batch=paper.batch, small=small)
    data: tuple[str, ...] = ()
    if not sized.config.get("codec"):
        data = (f"data.path={images(sized.node('data').size, 2 * paper.batch, paper.classes)}", "data.workers=0")
    recipe = large(job, paper.recipe, "train.compile=off", *paper.more, *data, batch=paper.batch, small=small)
    training(job, paper.what, recipe, feed(recipe), steps=4, warm=2)


CHECKS: dict[str, Callable[[Job], None]] = {name: partial(train, name) for name in PAPERS}
