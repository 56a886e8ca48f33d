"""A training step of every paper that has no check of its own in speed.py: the published recipe on the card, beside the
objective's losses without the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs import Job
from speed import feed_of, images, large, training


@dataclass(frozen=True)
class Paper:
    """One row. small: what makes it one for a CPU, in a dry run; model.preset=null goes before."""

    what: str  # as the table calls it
    recipe: str  # the published one
    batch: int  # images, on one card of 80 GiB
    small: tuple[str, ...]
    more: tuple[str, ...] = ()  # overrides in any case
    classes: int = 1000  # of the pictures of recipes without a codec; 0: they have none


TRANSFORMER = ("model.hidden_size=32", "model.depth=1", "model.num_heads=2")
EDM2 = ("roles.teacher.model_channels=32", "roles.teacher.channel_mult=[1,1]", "roles.teacher.num_blocks=1",
        "roles.teacher.attn_resolutions=[8]", "roles.teacher.channels_per_head=16", "data.size=16",
        "roles.teacher.img_resolution=16")  # fmt: skip
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
    "scm": Paper("sCT 64 (EDM2-S)", "scm/imagenet64", 32, EDM2, classes=10),
    "score-sde": Paper("Score-SDE DDPM++ deep 32", "score-sde/cifar10-vp-deep", 128,
                       ("model.nf=32", "model.ch_mult=[1,1]", "model.num_res_blocks=1"), classes=0),
    "vdmpp": Paper("VDM++ 64 (ADM U-Net)", "vdmpp/imagenet64", 32,
                   ("model.model_channels=32", "model.num_res_blocks=1", "model.channel_mult=[1,1]",
                    "model.attention_resolutions=[2]", "model.num_head_channels=32", "data.size=16"), classes=10),
    "vqvae": Paper("VQ-VAE 128", "vqvae/imagenet128", 128,
                   ("model.channels=16", "model.residual_channels=8", "model.n_embed=16"), classes=0),
}  # fmt: skip


def feed(recipe: Any) -> Callable[..., Any] | None:
    """Synthetic latents behind the recipe's own codec, untrained; None of a recipe on pixels."""
    node = recipe.config.get("codec")
    if not node:
        return None
    keywords = {k: v for k, v in node.items() if k not in ("weights", "fallback", "output")}
    return feed_of(keywords, node.get("output"))


def train(name: str, job: Job) -> None:
    paper = PAPERS[name]
    preset = "roles.teacher.preset=null" if name == "scm" else "model.preset=null"
    small = (preset, *paper.small)
    sized = large(job, paper.recipe, "train.compile=off", *paper.more, batch=paper.batch, small=small)
    data: tuple[str, ...] = ()
    if not sized.config.get("codec"):
        data = (f"data.path={images(sized.node('data').size, 2 * paper.batch, paper.classes)}", "data.workers=0")
    recipe = large(job, paper.recipe, "train.compile=off", *paper.more, *data, batch=paper.batch, small=small)
    training(job, paper.what, recipe, feed(recipe), steps=4, warm=2)


CHECKS: dict[str, Callable[[Job], None]] = {name: partial(train, name) for name in PAPERS}
