"""Cropping and resizing to a square, on PIL images.

`adm` is the crop of ADM and DiT, exactly (guided_diffusion/image_datasets.py of openai/guided-diffusion@22e0df8,
train.py of facebookresearch/DiT@ed81ce2); `random` its training-time variant; `center` the center-crop of EDM's
dataset_tool.py (NVlabs/edm@008a4e5). On an image that already has the size, all but `random` change nothing.

`fast` resampling, where asked for, is torch's antialiased bicubic kernel at once instead of halvings and Pillow's: a
quarter of the time, values at most two levels away where nothing is halved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from vgm_cli.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

CROPS = ("adm", "center", "random", "resize", "none")
SMALLEST = 0.8  # share of the short side that a random crop covers, at least
Picture = Image.Image | np.ndarray  # of Pillow, or (H, W, C)


def _shrink(image: Image.Image, short: int, fast: bool = False) -> Picture:
    """Box-halve while the short side is at least twice `short`, then bicubic so that it is `short`."""
    while not fast and min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = short / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return bicubic(image, size) if fast else image.resize(size, Resampling.BICUBIC)


def bicubic(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An "L" or "RGB" image resampled to (width, height) by torch, with antialiasing; uint8 (height, width, C)."""
    import torch

    pixels = torch.from_numpy(np.array(image))
    planes = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(planes, size[::-1], mode="bicubic", antialias=True)[0]
    return out.permute(1, 2, 0).numpy()


def _cut(image: Picture, left: int, top: int, size: int) -> Picture:
    if isinstance(image, np.ndarray):
        return image[top : top + size, left : left + size]
    return image.crop((left, top, left + size, top + size))


def _sides(image: Picture) -> tuple[int, int]:
    """(width, height)."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def center_crop_arr(pil_image: Image.Image, size: int, fast: bool = False) -> Picture:
    """ADM's centre crop: short side to `size`, then the middle (size, size)."""
    image = _shrink(pil_image, size, fast)
    width, height = _sides(image)
    return _cut(image, (width - size) // 2, (height - size) // 2, size)


def random_crop_arr(
    pil_image: Image.Image,
    size: int,
    rng: random.Random,
    min_crop_frac: float = SMALLEST,
    max_crop_frac: float = 1.0,
    fast: bool = False,
) -> Picture:
    """ADM's random crop: a (size, size) window covering 0.8 to 1.0 of the short side, anywhere.

    Draws, in this order: the resized short side, the top, the left (`rng.randrange`, as the official code).
    """
    low, high = math.ceil(size / max_crop_frac), math.ceil(size / min_crop_frac)
    image = _shrink(pil_image, rng.randrange(low, high + 1), fast)
    width, height = _sides(image)
    top = rng.randrange(height - size + 1)
    left = rng.randrange(width - size + 1)
    return _cut(image, left, top, size)


def center_square(pil_image: Image.Image, size: int) -> Image.Image:
    """The largest central square, Lanczos-resized to (size, size)."""
    side = min(pil_image.size)
    left, top = (pil_image.width - side) // 2, (pil_image.height - side) // 2
    return resize_square(pil_image.crop((left, top, left + side, top + side)), size)


def resize_square(pil_image: Image.Image, size: int) -> Image.Image:
    """The whole image squeezed to (size, size), Lanczos; the aspect ratio is given up."""
    return pil_image if pil_image.size == (size, size) else pil_image.resize((size, size), Resampling.LANCZOS)


def crop_to(image: Image.Image, size: int, crop: str, rng: random.Random | None = None, fast: bool = False) -> Picture:
    """Apply one of CROPS; `random` without `rng` is `adm`. `none` returns the image as it is. fast: in less time, of
    `adm` and `random`."""
    if crop == "none":
        return image
    if crop == "random" and rng is not None:
        return random_crop_arr(image, size, rng, fast=fast)
    if crop in ("center", "resize"):
        return (center_square if crop == "center" else resize_square)(image, size)
    return center_crop_arr(image, size, fast)


def least_side(size: int, crop: str) -> int:
    """The short side below which an image would have to be enlarged by a crop; 0 where the image stays as it is."""
    return 0 if crop == "none" else math.ceil(size / SMALLEST) if crop == "random" else size


def check_crop(crop: str) -> str:
    """Raises VgmError (exit code 2) for a name that is not in CROPS."""
    if crop not in CROPS:
        raise unknown("crop", crop, CROPS)
    return crop


def stacked(pictures: Sequence[np.ndarray], size: int, channels: int, flip: Sequence[bool] | None = None) -> Tensor:
    """uint8 (H, W, C) each, perhaps none -> (B, C, H, W), every picture copied once. flip: which to mirror."""
    import torch

    pixels = np.empty((len(pictures), channels, size, size), np.uint8)
    for k, picture in enumerate(pictures):
        pixels[k] = (picture[:, ::-1] if flip is not None and flip[k] else picture).transpose(2, 0, 1)
    return torch.from_numpy(pixels)
