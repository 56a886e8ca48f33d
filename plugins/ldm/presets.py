"""Published first stages of latent diffusion, as constructor keywords. Torch-free.

Official files: CompVis/latent-diffusion@a506df5 models/first_stage_models/*/config.yaml; kl-f16-mar is kl16.ckpt of
LTH14/mar@fe470ac models/vae.py.
"""

from __future__ import annotations

from typing import Any


def first_stage(ch_mult: tuple[int, ...], z: int, attn: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    return {
        "ch": 128,
        "ch_mult": ch_mult,
        "num_res_blocks": 2,
        "attn_resolutions": attn,
        "resolution": 256,
        "z_channels": z,
        "embed_dim": z,
        "in_channels": 3,
        "out_ch": 3,
        **more,
    }


KL = {
    "kl-f4": first_stage((1, 2, 4), 3),
    "kl-f8": first_stage((1, 2, 4, 4), 4, scale_factor=0.18215),
    "kl-f16": first_stage((1, 1, 2, 2, 4), 16, attn=(16,)),
    "kl-f32": first_stage((1, 1, 2, 2, 4, 4), 64, attn=(16, 8)),
    "kl-f16-mar": first_stage((1, 1, 2, 2, 4), 16, attn=(16,), decoder_attn=False, scale_factor=0.2325),
}

VQ = {
    "vq-f4": first_stage((1, 2, 4), 3, n_embed=8192),
    "vq-f4-noattn": first_stage((1, 2, 4), 3, n_embed=8192, attn_type="none"),
    "vq-f8": first_stage((1, 2, 2, 4), 4, attn=(32,), n_embed=16384),
    "vq-f8-n256": first_stage((1, 2, 2, 4), 4, attn=(32,), n_embed=256),
    "vq-f16": first_stage((1, 1, 2, 2, 4), 8, attn=(16,), n_embed=16384),
}
