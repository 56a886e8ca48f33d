"""Published U-Nets of latent diffusion, as constructor keywords. Torch-free.

Official files: CompVis/latent-diffusion@a506df5 configs and models/ldm/*/config.yaml, CompVis/stable-diffusion@21f890f
configs/stable-diffusion, Stability-AI/generative-models@fbdc58c configs/inference.
"""

from __future__ import annotations

from typing import Any

COMMON = {"num_res_blocks": 2, "legacy": True}
PLAIN = {**COMMON, "use_spatial_transformer": False, "context_dim": None}
STABLE = {
    "in_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "channel_mult": (1, 2, 4, 4),
    "attention_resolutions": (4, 2, 1),
    "legacy": False,
}


def pixels4(width: int, mult: tuple[int, ...], attention: tuple[int, ...] = (8, 4, 2), **more: Any) -> dict[str, Any]:
    """On the latents 3x64x64 of a first stage that makes sides four times smaller."""
    base = COMMON if "context_dim" in more else PLAIN
    sizes = {"image_size": 64, "in_channels": 3, "model_channels": width, "channel_mult": mult}
    return {**base, **sizes, "attention_resolutions": attention, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "cin256-v2": pixels4(192, (1, 2, 3, 5), num_heads=1, context_dim=512),
    "cin256": {
        **COMMON,
        "image_size": 32,
        "in_channels": 4,
        "model_channels": 256,
        "channel_mult": (1, 2, 4),
        "attention_resolutions": (4, 2, 1),
        "num_head_channels": 32,
        "context_dim": 512,
    },
    "faces256": pixels4(224, (1, 2, 3, 4), num_head_channels=32),  # CelebA-HQ, FFHQ, LSUN bedrooms
    "lsun_churches256": {
        **PLAIN,
        "image_size": 32,
        "in_channels": 4,
        "model_channels": 192,
        "channel_mult": (1, 2, 2, 4, 4),
        "attention_resolutions": (1, 2, 4, 8),
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "text2img256": pixels4(192, (1, 2, 3, 5), num_head_channels=32, context_dim=640),
    "txt2img-1p4B": {**STABLE, "image_size": 32, "num_heads": 8, "context_dim": 1280},
    "sd1": {**STABLE, "image_size": 64, "num_heads": 8, "context_dim": 768},
    "sd2": {
        **STABLE,
        "image_size": 64,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "context_dim": 1024,
    },
    "sdxl": {
        **STABLE,
        "image_size": 128,
        "channel_mult": (1, 2, 4),
        "attention_resolutions": (4, 2),
        "transformer_depth": (1, 2, 10),
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "vector_dim": 2816,
    },
    "bsr_sr": pixels4(160, (1, 2, 2, 4), (16, 8), num_head_channels=32, concat_channels=3),
    "inpainting_big": pixels4(256, (1, 2, 3, 4), num_heads=8, resblock_updown=True, concat_channels=4),
    "semantic_synthesis256": pixels4(128, (1, 4, 8), (32, 16, 8), num_heads=8, concat_channels=3),
    "layout2img256": pixels4(128, (1, 2, 3, 4), num_head_channels=32, context_dim=512, transformer_depth=3),
}

BETAS = (0.0015, 0.0195)  # of the first and the last step
STABLE_BETAS = (0.00085, 0.012)
ENDS = {
    **dict.fromkeys(("txt2img-1p4B", "sd1", "sd2", "sdxl"), STABLE_BETAS),
    **dict.fromkeys(("lsun_churches256", "bsr_sr"), (0.0015, 0.0155)),
    **dict.fromkeys(("inpainting_big", "semantic_synthesis256", "layout2img256"), (0.0015, 0.0205)),
}
