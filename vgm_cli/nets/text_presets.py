"""Published text encoders, as constructor keywords. Torch-free."""

from __future__ import annotations

from typing import Any

CLIP_L = {"width": 768, "depth": 12, "heads": 12, "activation": "quick-gelu"}
OPEN = {"activation": "gelu", "skip": 1, "pad": 0}

CLIP: dict[str, dict[str, Any]] = {
    "sd1": {**CLIP_L, "skip": 0, "norm": True},  # OpenAI's ViT-L/14
    "sd2": {**OPEN, "width": 1024, "depth": 24, "heads": 16, "head": 1024, "norm": True},  # OpenCLIP ViT-H/14
    "sdxl-l": {**CLIP_L, "skip": 1, "norm": False},
    "sdxl-g": {**OPEN, "width": 1280, "depth": 32, "heads": 20, "head": 1280, "norm": False},  # OpenCLIP ViT-bigG/14
}
SDXL: dict[str, dict[str, Any]] = {"sdxl": {"clip": CLIP["sdxl-l"], "open_clip": CLIP["sdxl-g"], "size": 1024}}
BERT: dict[str, dict[str, Any]] = {
    "text2img256": {"width": 640, "depth": 32},
    "txt2img-1p4B": {"width": 1280, "depth": 32},
}
