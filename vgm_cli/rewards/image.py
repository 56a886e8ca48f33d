"""Rewards that look at pixels alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vgm_cli.data.decode import Unreadable, load_image
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.images import uint8_round
from vgm_cli.ranges import Fraction, Percent


def pictures(images: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1], C in {1, 3} -> PIL images, rounded to the nearest. VgmError: other channels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise VgmError(f"images have 1 or 3 channels, these are {tuple(images.shape)}", "is a codec missing?", USAGE)
    arrays = uint8_round(images.detach().float().cpu()).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


class JPEGIncompressibility:
    """Kilobytes (of 1000) of a JPEG (Black et al. 2023, 2305.13301); quality 95 as in yifan123/flow_grpo rewards.py."""

    def __init__(self, quality: Percent = 95):
        if not 1 <= quality <= 95:
            raise VgmError(f"quality={quality}: JPEG takes 1 to 95", code=USAGE)
        self.quality = quality

    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        sizes = []
        for picture in pictures(images):
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=self.quality)
            sizes.append(buffer.tell() / 1000)
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)


class JPEGCompressibility(JPEGIncompressibility):
    """Minus that size over 500, the scale of flow_grpo's 512-pixel images; small images want a large weight."""

    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return -super().__call__(images, batch) / 500


class Brightness:
    """Mean over pixels and channels, black 0, white 1."""

    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return (images.float().clamp(-1, 1).flatten(1).mean(1) + 1) / 2


class Ink:
    """Share of pixels brighter than `threshold` (0 black, 1 white): the area of white strokes on black."""

    def __init__(self, threshold: Fraction = 0.5):
        self.threshold = threshold

    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        grey = (images.float().mean(1) + 1) / 2  # (B, H, W)
        return (grey > self.threshold).float().flatten(1).mean(1)


class Similarity:
    """Closeness to one image: minus the mean squared error of pixels in [-1, 1], or the cosine of digit features.

    target: an image file, brought to the size and channels of the images. VgmError: it is missing or unreadable.
    """

    def __init__(self, target: str, measure: Literal["pixels", "features"] = "pixels"):
        path = Path(target)
        if not path.is_file():
            raise VgmError(f"the target image is missing: {target}", code=MISSING_ASSET)
        try:
            self.image = load_image(path).convert("RGB")
        except Unreadable as e:
            raise VgmError(f"{target} is not a readable image: {e}", code=USAGE) from e
        self.measure = measure

    def like(self, images: Tensor) -> Tensor:
        """(1, C, H, W) in [-1, 1], as the images are."""
        channels, height, width = images.shape[1:]
        picture = self.image.convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        array = torch.from_numpy(np.array(picture)).float() / 127.5 - 1
        return array.reshape(1, height, width, channels).permute(0, 3, 1, 2).to(images.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        target = self.like(images)
        if self.measure == "pixels":
            return -(images.float() - target).square().flatten(1).mean(1)
        from vgm_cli.rewards.classifier import digit_network

        features = digit_network(images.device)
        return F.cosine_similarity(features(images)[0], features(target)[0])
