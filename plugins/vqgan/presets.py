"""Published VQGAN first stages and priors, as constructor keywords. Torch-free.

Official files: CompVis/taming-transformers@3ba01b2 configs/*.yaml; the Gumbel model's and the class-conditional prior's
configurations are published beside their weights.
"""

from __future__ import annotations

from typing import Any

F16 = (1, 1, 2, 2, 4)


def first_stage(n_embed: int, ch_mult: tuple[int, ...] = F16, attn: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "n_embed": n_embed,
        "ch": 128,
        "ch_mult": ch_mult,
        "num_res_blocks": 2,
        "attn_resolutions": (attn,),
        "resolution": 256,
        "z_channels": 256,
        "embed_dim": 256,
        "in_channels": 3,
        "out_ch": 3,
        **more,
    }


FIRST_STAGE = {
    "f16-1024": first_stage(1024),
    "f16-8192": first_stage(8192),
    "f16-16384": first_stage(16384),
    "gumbel-f8": first_stage(8192, (1, 1, 2, 4), 32, quantizer="gumbel", kl_weight=1e-8),
    "depth-f16-1024": first_stage(1024, in_channels=1, out_ch=1),
}


def prior(vocab: int, block: int, layers: int, heads: int, width: int, condition: str, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "window": 16,
        "block_size": block,
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "condition": condition,
        **more,
    }


DROPOUT = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
PRIOR = {
    "faceshq": prior(1024, 512, 24, 16, 1024, "coord", n_coord=1024, coord_factor=16),
    "drin": prior(1024, 512, 24, 16, 1024, "codes"),
    "coco-scene": prior(8192, 348, 40, 16, 1408, "codes", **DROPOUT),
    "open-images-scene": prior(8192, 348, 36, 16, 1536, "codes", **DROPOUT),
    "cin": prior(16384, 257, 48, 24, 1536, "class", num_classes=1000),
}
