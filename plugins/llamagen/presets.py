"""Published LlamaGen sizes, as constructor keywords. Torch-free.

Official files: FoundationVision/LlamaGen@ce98ec4 autoregressive/models/gpt.py, tokenizer/tokenizer_image/vq_model.py.
"""

from __future__ import annotations

from typing import Any

from vgm_cli.nets.llama_presets import SIZES

GPT: dict[str, dict[str, Any]] = {
    name: {"n_layer": layers, "n_head": heads, "dim": dim} for name, (layers, heads, dim) in SIZES.items()
}
GPT["GPT-XL-t2i"] = {**GPT["GPT-XL"], "model_type": "t2i", "cls_token_num": 120, "caption_dim": 2048, "num_classes": 0}


def tokenizer(ch_mult: tuple[int, ...], lowest: int) -> dict[str, Any]:
    return {
        "n_embed": 16384,
        "embed_dim": 8,
        "z_channels": 256,
        "ch": 128,
        "ch_mult": ch_mult,
        "num_res_blocks": 2,
        "attn_resolutions": (lowest,),  # the last level's, whatever the images' size
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "legacy": False,
        "l2_norm": True,
    }


TOKENIZER = {"VQ-16": tokenizer((1, 1, 2, 2, 4), 16), "VQ-8": tokenizer((1, 2, 2, 4), 32)}
