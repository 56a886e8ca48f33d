"""Pictures in and out: float to uint8 by the named rules of the field, grids, PNG with metadata, ADM's .npz layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, PngImagePlugin
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.errors import FAILED, VgmError

TILE = 100  # pixels to which small tiles of a grid are enlarged, at most
LARGEST = 4096  # side of a grid with enlarged tiles
GAP, SHADE = 2, 160  # between tiles: pixels, and a grey that neither black nor white pictures hide
FONT = 14  # pixels
SHOWN = 256  # tiles of a grid of samples


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


@dataclass(frozen=True)
class Layout:
    """Of a grid: tiles per row, whole-number enlargement, pixels between tiles, their grey. The defaults are those of
    the grids that name no layout of their own."""

    columns: int
    scale: int = 1
    gap: int = 2
    shade: int = 0

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The inverse of json.dumps(asdict(layout)). VgmError: numbers that no grid has."""
        try:
            found = cls(**json.loads(text))
            limits = ((found.columns, 1, 1 << 16), (found.scale, 1, TILE), (found.gap, 0, TILE), (found.shade, 0, 255))
            fits = all(type(v) is int and low <= v <= high for v, low, high in limits)
        except (ValueError, TypeError):
            fits = False
        if not fits:
            raise VgmError("the picture's layout is not one that grids have", code=FAILED)
        return found


def near_square(n: int, period: int = 0) -> int:
    """Columns for n tiles. period: tiles repeat (classes in turn) and stay under one another, in a multiple of it or,
    where that would be a ribbon, in a divisor."""
    side = math.sqrt(n)
    fitting = [c for c in range(period, n + 1, period) if c <= 2.5 * side] if 1 < period <= n else []
    if not fitting and 1 < period <= n:
        fitting = [c for c in range(2, period) if period % c == 0 and c >= side / 2.5]
    if not fitting:
        return max(1, math.ceil(side))
    return min(fitting, key=lambda c: (round(abs(math.log(c / side)), 9), -c))


def layout_of(x: Tensor, columns: int | None = None, period: int = 0) -> Layout:
    """Of images (B, C, H, W): near a square; small tiles are enlarged while the whole stays fit for a screen."""
    n, (height, width) = len(x), x.shape[-2:]
    columns = min(n, columns or near_square(n, period))
    rows = math.ceil(n / columns)
    scale = min(TILE // max(height, width), LARGEST // max(columns * width, rows * height))
    return Layout(columns, max(1, scale), GAP, SHADE)


def make_grid(
    x: Tensor,
    nrow: int | None = None,
    *,
    layout: Layout | None = None,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    block: int = 0,
) -> np.ndarray:
    """x: (B, C, H, W) about [-1, 1], C in {1, 3} -> uint8 (H', W', C).

    nrow: images per row, default near a square. rows, columns: names drawn beside and above the tiles. block: rows that
    belong together, set apart from the next.
    """
    images = to_uint8(x.detach().cpu().float()).permute(0, 2, 3, 1).numpy()
    n, h, w, c = images.shape
    layout = layout or layout_of(x, nrow)
    h, w, gap, per_row = h * layout.scale, w * layout.scale, layout.gap, min(n, layout.columns)
    count = math.ceil(n / per_row)
    font = ImageFont.load_default(FONT)
    left = gap + (max(math.ceil(font.getlength(t)) for t in rows) + 2 * FONT // 2 if rows else 0)
    top = gap + (FONT * 3 // 2 if columns else 0)
    tops = [top + r * (h + gap) + (r // block * 4 * gap if block else 0) for r in range(count)]
    grid = np.full((tops[-1] + h + gap, left + per_row * (w + gap), c), layout.shade, np.uint8)
    for i, image in enumerate(images):
        y, z = tops[i // per_row], left + (i % per_row) * (w + gap)
        grid[y : y + h, z : z + w] = image.repeat(layout.scale, 0).repeat(layout.scale, 1)
    if not rows and not columns:
        return grid
    canvas = Image.fromarray(grid[..., 0] if c == 1 else grid)
    draw, ink = ImageDraw.Draw(canvas), 0 if c == 1 else (0, 0, 0)
    for y, text in zip(tops, rows):
        draw.text((left - FONT // 2, y + h // 2), text, ink, font, anchor="rm")
    for k, text in enumerate(columns):
        draw.text((left + k * (w + gap) + w // 2, top - FONT // 4), text, ink, font, anchor="mb")
    return np.asarray(canvas).reshape(grid.shape)


def compared(parts: Mapping[str, Tensor], limit: int = 32) -> np.ndarray:
    """Pictures of the same items under one another, a named row each: {"degraded": (N, C, H, W), "restored": …}."""
    shown = {k: v[:limit] for k, v in parts.items()}
    n = len(next(iter(shown.values())))
    columns = min(n, near_square(n * len(parts)))
    columns = math.ceil(n / math.ceil(n / columns))  # rows of one length
    blocks = [torch.cat([v[i : i + columns], blanks(v, columns - len(v[i : i + columns]))])
              for i in range(0, n, columns) for v in shown.values()]  # fmt: skip
    return make_grid(torch.cat(blocks), columns, rows=list(parts) * (len(blocks) // len(parts)), block=len(parts))


def blended(new: Tensor, old: Tensor, made: Tensor, radius: float) -> Tensor:
    """Images (B, C, H, W): new ones where they were made anew, old ones elsewhere, mixed between.

    made: (B, h, w) bool, enlarged to H x W bicubically and blurred by a Gaussian of `radius` pixels, both Pillow's, as
    in google-research/maskgit@1db2359 maskgit/inference.py.
    """
    size, blur = (new.shape[3], new.shape[2]), ImageFilter.GaussianBlur(radius)
    masks = [Image.fromarray(m).resize(size, Image.Resampling.BICUBIC) for m in made.cpu().byte().mul(255).numpy()]
    share = torch.from_numpy(np.stack([np.asarray(m.filter(blur), np.float32) for m in masks]) / 255).to(new)
    return new * share[:, None] + (1 - share[:, None]) * old


def enlarged(image: np.ndarray, size: Sequence[int]) -> Tensor:
    """A picture, uint8 (H, W, C), at another size (H', W') by Pillow's bicubic kernel: (C, H', W') in [-1, 1]."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    a = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return torch.from_numpy(a.reshape(*size, -1) / 255 * 2 - 1).float().permute(2, 0, 1)


def returned(x: Tensor, size: Sequence[int]) -> np.ndarray:
    """A picture (C, H, W) about [-1, 1] at another size by torch's bicubic kernel: uint8 (H', W', C), truncated."""
    y = torch.nn.functional.interpolate(x[None], size=tuple(size), mode="bicubic")[0]
    a: np.ndarray = (y.permute(1, 2, 0) * 127.5 + 127.5).cpu().numpy().clip(0, 255).astype(np.uint8)
    return a


def blanks(like: Tensor, n: int) -> Tensor:
    """n tiles of the grey between tiles."""
    return like.new_full((n, *like.shape[1:]), SHADE / 127.5 - 1)


def save_png(image: np.ndarray, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """image: uint8 (H, W, C), C in {1, 3}; metadata goes into PNG text chunks. Atomic."""
    info = PngImagePlugin.PngInfo()
    for k, v in (metadata or {}).items():
        info.add_text(k, v)
    with atomic.replacing(path) as temp:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temp, format="PNG", pnginfo=info)


def save_grid(
    x: Tensor,
    path: str | Path,
    nrow: int | None = None,
    metadata: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> None:
    """x: (B, C, H, W) about [-1, 1] -> one PNG, which remembers its layout."""
    layout = layout or layout_of(x, nrow)
    save_png(make_grid(x, layout=layout), path, {**(metadata or {}), "vgm.grid": json.dumps(asdict(layout))})


def read_png_metadata(path: str | Path) -> dict[str, str]:
    """VgmError: it is no picture that can be read."""
    from vgm_cli.data.decode import open_image, why

    try:
        with open_image(path) as image:
            return {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)}
    except VgmError:
        raise
    except Exception as e:  # decoders raise whatever they meet
        raise VgmError(f"{path} is not a picture that can be read: {why(e)}", code=FAILED) from e


def write_npz(path: str | Path, images: np.ndarray, labels: Sequence[int] | None = None) -> None:
    """The ADM layout: arr_0 uint8 (N, H, W, C), arr_1 int64 labels. Atomic."""
    arrays: dict[str, Any] = {"arr_0": images}
    if labels is not None:
        arrays["arr_1"] = np.asarray(labels, np.int64)
    with atomic.replacing(path) as temp, open(temp, "wb") as f:
        np.savez(f, **arrays)
