"""Missing pixels. Masks are drawn as in DPS2022/diffusion-posterior-sampling@effbde7 util/img_utils.py (same draws of
numpy's stream in the same order); 1 is an observed pixel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import SVD, Operator
from vgm_cli.operators.files import read_arrays
from vgm_cli.operators.noise import numpy_rng
from vgm_cli.ranges import NonNegative

Range = tuple[float, float]
HALVES = ("upper", "lower", "left", "right")


def box_mask(
    height: int, width: int, side: tuple[int, int], margin: tuple[int, int], rng: np.random.RandomState
) -> Tensor:
    """(H, W), 0 in a box whose height and width are drawn from [side[0], side[1]), `margin` away from the border.

    VgmError: the box does not fit.
    """
    tall, wide = int(rng.randint(*side)), int(rng.randint(*side))
    last_top, last_left = height - margin[0] - tall, width - margin[1] - wide
    if last_top <= margin[0] or last_left <= margin[1]:
        raise VgmError(f"a box of {tall}x{wide} does not fit into {height}x{width} pixels", "box=0.5 is half", USAGE)
    top, left = int(rng.randint(margin[0], last_top)), int(rng.randint(margin[1], last_left))
    mask = torch.ones(height, width)
    mask[top : top + tall, left : left + wide] = 0
    return mask


def random_mask(height: int, width: int, removed: Range, rng: np.random.RandomState) -> Tensor:
    """(H, W), 0 at pixels chosen at random; their share is drawn from `removed`."""
    share = rng.uniform(*removed)
    mask = torch.ones(height * width)
    mask[torch.from_numpy(rng.choice(height * width, int(height * width * share), replace=False))] = 0
    return mask.view(height, width)


def lama_mask(height: int, width: int, rng: np.random.RandomState) -> Tensor:
    """(H, W), 0 on wide strokes of a brush or in a few boxes, as large as LaMa's thick ones are on 256 pixels.

    Suvorov et al. 2022 (arXiv 2109.07161); advimman/lama saicinpainting/training/data/masks.py. Sizes follow the
    image's.
    """
    scale = min(height, width) / 256
    picture = Image.new("L", (width, height), 1)
    draw = ImageDraw.Draw(picture)
    if rng.rand() < 0.5:
        for _ in range(rng.randint(1, 6)):
            x, y = rng.randint(width), rng.randint(height)
            for turn in range(1 + rng.randint(5)):
                angle = (0.01 + rng.randint(4)) * (-1 if turn % 2 else 1)
                length, brush = scale * (10 + rng.randint(200)), max(round(scale * (5 + rng.randint(100))), 1)
                to = np.clip(x + length * np.sin(angle), 0, width), np.clip(y + length * np.cos(angle), 0, height)
                draw.line([(x, y), to], 0, brush)
                draw.ellipse([to[0] - brush / 2, to[1] - brush / 2, to[0] + brush / 2, to[1] + brush / 2], 0)
                x, y = to
    else:
        for _ in range(rng.randint(1, 4)):
            low, high = max(round(30 * scale), 1), max(round(150 * scale), 2)
            w, h = rng.randint(low, high), rng.randint(low, high)
            x, y = rng.randint(0, max(width - w, 1)), rng.randint(0, max(height - h, 1))
            draw.rectangle([x, y, x + w - 1, y + h - 1], 0)
    return torch.from_numpy(np.array(picture)).float()


def half_mask(missing: str, height: int, width: int) -> Tensor:
    """(H, W), 0 in the half that is missing; the middle row or column of an odd size is missing, too."""
    rows, columns = torch.arange(height), torch.arange(width)
    known = {
        "upper": (rows >= (height + 1) // 2)[:, None],
        "lower": (rows < height // 2)[:, None],
        "left": columns >= (width + 1) // 2,
        "right": columns < width // 2,
    }[missing]
    return known.float().expand(height, width)


class Inpainting(Operator):
    """A(x) = mask * x, the same mask for all channels.

    mask: box (a hole) | random | lama (wide strokes, or some boxes) | extreme (all but a box is missing) | upper |
    lower | left | right (that half is missing), or a file or folder of masks, bright where the pixel is known. box:
    side of the box, below 1 as a share of the image's; two numbers [low, high) are a range of pixels. margin: between
    box and border, below 1 as a share.
    removed: range of the share of random pixels that are missing.
    VgmError: values out of range, masks of another size.
    """

    name = "inpainting"

    def __init__(
        self,
        mask: str = "box",
        box: float | tuple[int, int] = 0.5,
        margin: NonNegative = 1 / 16,
        removed: float | tuple[float, float] = (0.3, 0.7),
    ):
        low, high = removed if isinstance(removed, tuple) else (removed, removed)
        if not 0 <= low <= high <= 1:
            raise VgmError(f"removed={removed}: shares between 0 and 1, the smaller first", "removed=0.5", USAGE)
        self.mask, self.box, self.margin, self.removed = mask, box, margin, (low, high)

    def prepare(self, generators: Sequence[torch.Generator]) -> None:
        if self.is_drawn:
            self.masks = self.drawn(generators)  # (B, 1, H, W)
        elif self.mask in HALVES:
            self.masks = half_mask(self.mask, *self.shape[1:]).expand(len(generators), 1, -1, -1)
        else:
            self.masks = self.read(len(generators))

    @property
    def is_drawn(self) -> bool:  # type: ignore[override]
        """Another one for every item, and not read from a file."""
        return self.mask in ("box", "random", "lama", "extreme")

    def drawn(self, generators: Sequence[torch.Generator]) -> Tensor:
        _, height, width = self.shape
        masks = []
        for g in generators:
            rng = numpy_rng(g)
            if self.mask in ("random", "lama"):
                strokes = self.mask == "lama"
                masks.append(
                    lama_mask(height, width, rng) if strokes else random_mask(height, width, self.removed, rng)
                )
                continue
            if isinstance(self.box, tuple):
                low, high = self.box
            else:
                low = round(self.box * min(height, width)) if self.box < 1 else int(self.box)
                high = low + 1
            if not 0 < low < high:
                raise VgmError(f"box={self.box}: a side above 0, or a range [low, high)", "box=0.5", USAGE)
            margin = [round(self.margin * n) if self.margin < 1 else int(self.margin) for n in (height, width)]
            hole = box_mask(height, width, (low, high), (margin[0], margin[1]), rng)
            masks.append(1 - hole if self.mask == "extreme" else hole)
        return torch.stack(masks)[:, None]

    def read(self, items: int) -> Tensor:
        if not Path(self.mask).exists():
            raise VgmError(
                f"no such mask: {self.mask}", f"box, random, lama, extreme, {', '.join(HALVES)}, or a file", USAGE
            )
        masks = read_arrays(self.mask, "mask", items, self.first)
        if masks.shape[-2:] != self.shape[1:]:
            size = "x".join(map(str, masks.shape[-2:]))
            raise VgmError(f"{self.mask} is {size}, the images are {self.shape[1]}x{self.shape[2]}", code=USAGE)
        return (masks > 0.5).float()

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.masks.to(x)

    @property
    def kept(self) -> Tensor:
        return self.masks > 0.5

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    @cached_property
    def svd(self) -> SVD:
        same = lambda x: x
        return SVD(self.masks.double(), same, same, self)

    def ridge(self, y: Tensor, weight: float = 0.0) -> Tensor:
        return self(y) / (1 + weight)

    def state(self) -> dict[str, Tensor]:
        return {"mask": self.masks}
