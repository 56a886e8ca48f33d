"""Hints that are made of pictures without a network: the condition `annotated`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vgm_cli.nets.hints import Hint
from vgm_cli.ranges import Fraction, NonNegative, Positive, Side, Width

from .annotators import canny, depth_picture, fake_scribble, nms, normals, scribble

Annotator = Literal["canny", "scribble", "nms", "fake-scribble", "depth", "normal"]


class AnnotatedHint(Hint):
    """The condition `annotated`: what an annotator makes of pictures -> {keyword: (B, hint_channels, H, W) in [0, 1]}.

    canny: edges. scribble: dark lines become white ones. nms, fake-scribble: of a column of soft edges, thinned, or as
    thick as a pen's. depth, normal: of a column of depth maps, scaled to the whole range, or the directions of the
    surface as colours. A picture of the command line goes through it, too; with `annotator: null` it is a hint already.
    """

    def __init__(
        self,
        size: Side,  # of the images
        channels: Width,  # of the column's pictures
        annotator: Annotator | None = "canny",  # null: pictures are hints already
        column: str | None = None,  # of the data; None: the images themselves
        keyword: str = "hint",  # of the network
        hint_channels: Width = 3,  # of the hint; one-channel maps are repeated
        thresholds: tuple[NonNegative, NonNegative] = (100, 200),  # of canny
        ridge: NonNegative = 127,  # brightness of soft edges that nms keeps
        sigma: Positive = 3.0,  # blur before nms, in pixels
        background: Fraction = 0.4,  # share of the depth's range below which a surface looks at the viewer
    ):
        super().__init__(size, channels, column or "image", keyword=keyword)
        self.annotator, self.hint_channels, self.thresholds = annotator, hint_channels, thresholds
        self.ridge, self.sigma, self.background = ridge, sigma, background

    def items_of(self, columns: Mapping[str, Tensor], drawn: Sequence[torch.Generator]) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> hints (B, hint_channels, H, W) in [-1, 1]."""
        x = columns[self.column]
        if self.annotator is not None:
            pixels = x.detach().cpu().float().add(1).mul(127.5).round().clamp(0, 255).byte()
            maps = self.annotate(pixels.permute(0, 2, 3, 1).numpy())
            x = torch.from_numpy(maps).permute(0, 3, 1, 2).to(x.device).float().div(127.5).sub(1)
        return x if x.shape[1] == self.hint_channels else x.mean(1, keepdim=True).expand(-1, self.hint_channels, -1, -1)

    def annotate(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, C) -> uint8 (N, H, W, 1 or 3)."""
        if self.annotator == "canny":
            return np.where(canny(images, *self.thresholds), 255, 0).astype(np.uint8)[..., None]
        one: dict[Any, Any] = {
            "scribble": lambda image: scribble(image)[:, :, :1],
            "nms": lambda image: nms(grey(image), self.ridge, self.sigma)[:, :, None],
            "fake-scribble": lambda image: fake_scribble(grey(image), self.ridge, self.sigma)[:, :, None],
            "depth": lambda image: depth_picture(grey(image).astype(np.float32))[:, :, None],
            "normal": lambda image: normals(grey(image).astype(np.float32), self.background),
        }
        return np.stack([one[self.annotator](image) for image in images])


def grey(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 -> (H, W) uint8, the mean of the channels."""
    return np.rint(image.mean(axis=2)).astype(np.uint8)
