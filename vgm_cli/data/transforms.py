"""Cropping and resizing to a square, on PIL images.

`adm` is the crop of ADM and DiT, exactly (guided_diffusion/image_datasets.py of openai/guided-diffusion@22e0df8,
train.py of facebookresearch/DiT@ed81ce2); `random` its training-time variant; `center` the center-crop of EDM's
dataset_tool.py (NVlabs/edm@008a4e5). On an image that already has the size, all but `random` change nothing.
"""

from __future__ import annotations

import math
import random

from PIL import Image
from PIL.Image import Resampling

from vgm_cli.errors import unknown

CROPS = ("adm", "center", "random", "resize", "none")


def _shrink(image: Image.Image, short: int) -> Image.Image:
    """Box-halve while the short side is at least twice `short`, then bicubic so that it is `short`."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)


def _cut(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def center_crop_arr(pil_image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: short side to `size`, then the middle (size, size)."""
    image = _shrink(pil_image, size)
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop_arr(
    pil_image: Image.Image,
    size: int,
    rng: random.Random,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
) -> Image.Image:
    """ADM's random crop: a (size, size) window covering 0.8 to 1.0 of the short side, anywhere.

    Draws, in this order: the resized short side, the top, the left (`rng.randrange`, as the official code).
    """
    low, high = math.ceil(size / max_crop_frac), math.ceil(size / min_crop_frac)
    image = _shrink(pil_image, rng.randrange(low, high + 1))
    top = rng.randrange(image.height - size + 1)
    left = rng.randrange(image.width - size + 1)
    return _cut(image, left, top, size)


def center_square(pil_image: Image.Image, size: int) -> Image.Image:
    """The largest central square, Lanczos-resized to (size, size)."""
    side = min(pil_image.size)
    image = _cut(pil_image, (pil_image.width - side) // 2, (pil_image.height - side) // 2, side)
    return resize_square(image, size)


def resize_square(pil_image: Image.Image, size: int) -> Image.Image:
    """The whole image squeezed to (size, size), Lanczos; the aspect ratio is given up."""
    return pil_image if pil_image.size == (size, size) else pil_image.resize((size, size), Resampling.LANCZOS)


def crop_to(image: Image.Image, size: int, crop: str, rng: random.Random | None = None) -> Image.Image:
    """Apply one of CROPS; `random` without `rng` is `adm`. `none` returns the image as it is."""
    if crop == "none":
        return image
    if crop == "random" and rng is not None:
        return random_crop_arr(image, size, rng)
    return {"center": center_square, "resize": resize_square}.get(crop, center_crop_arr)(image, size)


def check_crop(crop: str) -> str:
    """Raises VgmError (exit code 2) for a name that is not in CROPS."""
    if crop not in CROPS:
        raise unknown("crop", crop, CROPS)
    return crop
