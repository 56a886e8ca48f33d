"""DiffAugment: augmentations of what a discriminator sees, real and generated, through which gradients flow.

Zhao et al., NeurIPS 2020 (arXiv 2006.10738), as autonomousvision/stylegan-t@36ab80c training/diffaug.py has it. Every
draw is an argument, uniform in [0, 1). The kinds that StyleGAN-T uses: color, translation, cutout; its code has resize,
too. Deviation: every image is resized by its own draw, where officially a batch has one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import unknown

TRANSLATION, CUTOUT = 0.125, 0.2  # largest shift, and side of the hole, as shares of the image's side
SMALLEST, LARGEST = 0.8, 1.2  # sides of a resized image over the image's
DRAWS = {"color": 3, "translation": 2, "resize": 1, "cutout": 2}  # numbers that each kind takes for an image


def kinds_of(policy: str) -> list[str]:
    """ "color,cutout" -> its kinds; "" -> none. VgmError: unknown kind."""
    kinds = [k.strip() for k in policy.split(",") if k.strip()]
    for kind in kinds:
        if kind not in DRAWS:
            raise unknown("augmentation", kind, DRAWS)
    return kinds


def integers(u: Tensor, low: int, high: int) -> Tensor:
    """Uniform u (B,) in [0, 1) -> integers (B,) from low to high, both included."""
    return low + (u * (high - low + 1)).long().clamp(max=high - low)


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """x + u - 1/2. x: (B, C, H, W), u: (B,)."""
    return x + (u - 0.5).view(-1, 1, 1, 1)


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """Colours about the mean of each pixel, times 2 u."""
    mean = x.mean(1, keepdim=True)
    return (x - mean) * (2 * u).view(-1, 1, 1, 1) + mean


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """Values about the mean of each image, times u + 1/2."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (u + 0.5).view(-1, 1, 1, 1) + mean


def translate(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Row i of an image (B, C, H, W) becomes what was at i + down, column j what was at j + right; zeros from outside.
    down, right: (B,) integers."""
    h, w = x.shape[2:]
    rows = torch.arange(h, device=x.device) + down[:, None]  # (B, H)
    columns = torch.arange(w, device=x.device) + right[:, None]  # (B, W)
    inside = ((rows >= 0) & (rows < h))[:, None, :, None] & ((columns >= 0) & (columns < w))[:, None, None, :]
    picked = x.gather(2, rows.clamp(0, h - 1)[:, None, :, None].expand_as(x))
    return picked.gather(3, columns.clamp(0, w - 1)[:, None, None, :].expand_as(x)) * inside


def cut_out(x: Tensor, row: Tensor, column: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros in a rectangle of `size` whose middle is at (row, column), (B,) integers each, as far as it is inside."""
    rows, columns = hidden(row, size[0], x.shape[2]), hidden(column, size[1], x.shape[3])
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def hidden(middle: Tensor, side: int, extent: int) -> Tensor:
    """Which of `extent` places a stretch of `side` about the middle (B,) covers; its ends move onto the border where
    they would lie outside: (B, extent) bool."""
    first = (middle - side // 2)[:, None]
    at = torch.arange(extent, device=middle.device)
    return (at >= first.clamp(0, extent - 1)) & (at <= (first + side - 1).clamp(0, extent - 1))


class DiffAugment:
    """The augmentations of a policy, "color,translation,cutout", in its order. draws: uniform numbers for an image."""

    def __init__(self, policy: str):
        self.kinds = kinds_of(policy)
        self.draws = sum(DRAWS[k] for k in self.kinds)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """x: (B, C, H, W), u: (B, draws) uniform in [0, 1) -> like x."""
        taken = 0
        for kind in self.kinds:
            own = u[:, taken : taken + DRAWS[kind]]
            taken += DRAWS[kind]
            x = APPLY[kind](x, own)
        return x


def color(x: Tensor, u: Tensor) -> Tensor:
    return contrast(saturation(brightness(x, u[:, 0]), u[:, 1]), u[:, 2])


def portion(x: Tensor, ratio: float) -> tuple[int, int]:
    """A share of an image's height and width, rounded."""
    return int(x.shape[2] * ratio + 0.5), int(x.shape[3] * ratio + 0.5)


def translation(x: Tensor, u: Tensor) -> Tensor:
    down, right = portion(x, TRANSLATION)
    return translate(x, integers(u[:, 0], -down, down), integers(u[:, 1], -right, right))


def resize(x: Tensor, u: Tensor) -> Tensor:
    """Square images (B, C, S, S), each smaller in the middle of zeros, or larger and cut to its middle."""
    side, rows = x.shape[3], []
    for image, share in zip(x, u[:, 0].tolist()):
        size = int((share * (LARGEST - SMALLEST) + SMALLEST) * side)
        other = F.interpolate(image[None], size=(size, size), mode="bilinear")
        first = abs(side - size) // 2
        if size < side:
            other = F.pad(other, (first, side - first - size) * 2)
        else:
            other = other[:, :, first : first + side, first : first + side]
        rows.append(other)
    return torch.cat(rows)


def cutout(x: Tensor, u: Tensor) -> Tensor:
    size = portion(x, CUTOUT)
    row, column = (integers(u[:, i], 0, x.shape[2 + i] - size[i] % 2) for i in (0, 1))
    return cut_out(x, row, column, size)


APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": color,
    "translation": translation,
    "resize": resize,
    "cutout": cutout,
}
