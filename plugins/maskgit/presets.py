"""Published networks and sampling settings as constructor keywords. Torch-free.

MaskGIT: google-research/maskgit@1db2359 maskgit/configs/maskgit_class_cond_config.py (16 heads; the paper says 8) and
the demo's decoding; steps are the paper's headline. Halton: valeoai/Halton-MaskGIT@f61b0a1 Trainer/abstract_trainer.py
(sizes), README.md (sampling; a published weight w is a guidance_scale of 1 + w).
"""

from __future__ import annotations

from typing import Any

BERT: dict[str, dict[str, Any]] = {
    "imagenet256": {"vocab_size": 1024, "grid": (16, 16), "num_classes": 1000},
    "imagenet512": {"vocab_size": 1024, "grid": (32, 32), "num_classes": 1000},
}
SIZES = {  # width, blocks, heads
    "tiny": (384, 6, 6),
    "small": (512, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "xlarge": (1152, 28, 16),
}
HALTON: dict[str, dict[str, Any]] = {
    f"{name}{suffix}": {"hidden_dim": dim, "depth": depth, "heads": heads, "vocab_size": 16384, "grid": grid}
    for suffix, grid in (("", (16, 16)), ("-384", (24, 24)))
    for name, (dim, depth, heads) in SIZES.items()
}
TOKENIZER: dict[str, dict[str, Any]] = {
    "f16-1024": {"n_embed": 1024, "embed_dim": 256, "ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2},
}

CONFIDENCE: dict[str, dict[str, Any]] = {
    "imagenet256": {"steps": 8},
    "imagenet512": {"steps": 12},
    "demo": {"steps": 16},
    "demo-edit": {"steps": 12, "start": 2, "grow": 1},
}
HALTON_CONFIDENCE: dict[str, dict[str, Any]] = {
    "release": {"steps": 12, "guidance_scale": 4.0, "rewrite_known": True},
}
HALTON_ORDER: dict[str, dict[str, Any]] = {
    "release": {"steps": 64, "guidance_scale": 5.0},
    "readme": {"steps": 32, "guidance_scale": 3.0, "temperature_last": 1.2, "roll": True},
    "large-384": {"steps": 32, "guidance_scale": 1.5, "warmup": 1},
}
