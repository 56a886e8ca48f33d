"""Pictures in and out: float to uint8 by the named rules of the field, grids, PNG with metadata, ADM's .npz layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from vgm_cli import atomic


def uint8_round(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to the nearest (torchvision's save_image rule)."""
    return ((x + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def uint8_adm(x: Tensor) -> Tensor:
    """clamp((x + 1) 127.5) truncated (guided-diffusion scripts/image_sample.py)."""
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def uint8_edm(x: Tensor) -> Tensor:
    """clamp(127.5 x + 128) truncated (EDM generate.py, DiT sample_ddp.py)."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


UINT8_RULES = {"round": uint8_round, "adm": uint8_adm, "edm": uint8_edm}


def to_uint8(x: Tensor, rule: str = "edm") -> Tensor:
    """x: (B, C, H, W) about [-1, 1] -> uint8 by a named rule."""
    return UINT8_RULES[rule](x)


def make_grid(x: Tensor, nrow: int | None = None, padding: int = 2) -> np.ndarray:
    """x: (B, C, H, W) about [-1, 1], C in {1, 3} -> uint8 (H', W', C); nrow: images per row, default ceil(sqrt B)."""
    images = to_uint8(x.detach().cpu().float()).permute(0, 2, 3, 1).numpy()
    n, h, w, c = images.shape
    columns = min(n, nrow or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    grid = np.zeros((padding + rows * (h + padding), padding + columns * (w + padding), c), np.uint8)
    for i, image in enumerate(images):
        top, left = padding + (i // columns) * (h + padding), padding + (i % columns) * (w + padding)
        grid[top : top + h, left : left + w] = image
    return grid


def save_png(image: np.ndarray, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """image: uint8 (H, W, C), C in {1, 3}; metadata goes into PNG text chunks. Atomic."""
    info = PngImagePlugin.PngInfo()
    for k, v in (metadata or {}).items():
        info.add_text(k, v)
    with atomic.replacing(path) as temp:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temp, format="PNG", pnginfo=info)


def save_grid(x: Tensor, path: str | Path, nrow: int | None = None, metadata: Mapping[str, str] | None = None) -> None:
    """x: (B, C, H, W) about [-1, 1] -> one PNG."""
    save_png(make_grid(x, nrow), path, metadata)


def read_png_metadata(path: str | Path) -> dict[str, str]:
    with Image.open(path) as image:
        return {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)}


def write_npz(path: str | Path, images: np.ndarray, labels: Sequence[int] | None = None) -> None:
    """The ADM layout: arr_0 uint8 (N, H, W, C), arr_1 int64 labels. Atomic."""
    arrays: dict[str, Any] = {"arr_0": images}
    if labels is not None:
        arrays["arr_1"] = np.asarray(labels, np.int64)
    with atomic.replacing(path) as temp, open(temp, "wb") as f:
        np.savez(f, **arrays)
