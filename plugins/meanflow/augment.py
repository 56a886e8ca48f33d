"""EDM's augmentation, of which the network is told (Karras et al. 2022, 2206.00364, app. F.2; after StyleGAN2-ADA).

Gsunshine/py-meanflow@1f6d72d meanflow/models/augment.py AugmentPipe, its flips and geometric transformations; the rest
(whole rotations, whole shifts, colours) is off in every published training and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.nn.fir import upfirdn2d
from vgm_cli.ranges import NonNegative

SYM6 = (  # low-pass filter of the wavelet
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
SCALE_STD, ANISO_STD, TRANSLATE_STD = 0.2, 0.2, 0.125  # of log2 factors, and of shifts relative to the side

# draw(kind, name, n) gives (N, n): whole numbers 0 and 1, uniform in [0, 1), or standard normal
Draw = Callable[[Literal["bit", "uniform", "normal"], str, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class AugmentPipe:
    """Which transformations there are: each is done to an image with probability p times its factor, at most 1."""

    p: NonNegative = 0.0
    xflip: NonNegative = 0.0  # left and right exchanged, with half that probability
    yflip: NonNegative = 0.0  # up and down, likewise
    scale: NonNegative = 0.0  # larger or smaller, by a factor of log2 deviation 0.2
    rotate_frac: NonNegative = 0.0  # by any angle
    aniso: NonNegative = 0.0  # wider and lower, along a random axis
    translate_frac: NonNegative = 0.0  # shifted by fractions of a pixel, of deviation an eighth of the side

    @property
    def labels(self) -> int:
        """How many numbers tell what was done to an image."""
        single, double = (self.xflip, self.yflip, self.scale), (self.rotate_frac, self.aniso, self.translate_frac)
        return sum(v > 0 for v in single) + 2 * sum(v > 0 for v in double)

    def __call__(self, x: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """x: (N, C, H, W) in [-1, 1] -> the images, and (N, labels) what was done to them, 0 for nothing."""
        height, width = x.shape[2:]
        told: list[Tensor] = []

        def chosen(amount: Tensor, factor: float, name: str) -> Tensor:
            """(N, n), 0 where the draw says no."""
            return torch.where(draw("uniform", f"{name}.done", 1) < factor * self.p, amount, 0.0)

        for name, factor, side in (("xflip", self.xflip, 3), ("yflip", self.yflip, 2)):
            if factor:
                flip = chosen(draw("bit", name, 1).float(), factor, name)
                x = torch.where(flip[:, :, None, None] == 1, x.flip(side), x)
                told.append(flip)
        inverse = torch.eye(3, device=x.device).expand(len(x), 3, 3)
        if self.scale:
            w = chosen(draw("normal", "scale", 1), self.scale, "scale")
            inverse = inverse @ zoom(2 ** -(w[:, 0] * SCALE_STD), 2 ** -(w[:, 0] * SCALE_STD))
            told.append(w)
        if self.rotate_frac:
            w = chosen((draw("uniform", "rotate", 1) * 2 - 1) * math.pi, self.rotate_frac, "rotate")
            inverse = inverse @ turn(w[:, 0])
            told += [w.cos() - 1, w.sin()]
        if self.aniso:
            w, r = draw("normal", "aniso", 1), (draw("uniform", "aniso.axis", 1) * 2 - 1) * math.pi
            w = chosen(w, self.aniso, "aniso")
            r = torch.where(draw("uniform", "aniso.axis.done", 1) < 0.5, r, 0.0)
            s = 2 ** (w[:, 0] * ANISO_STD)
            inverse = inverse @ turn(-r[:, 0]) @ zoom(1 / s, s) @ turn(r[:, 0])
            told += [w * r.cos(), w * r.sin()]
        if self.translate_frac:
            w = chosen(draw("normal", "translate", 2), self.translate_frac, "translate")
            inverse = inverse @ shift(-w[:, 0] * width * TRANSLATE_STD, -w[:, 1] * height * TRANSLATE_STD)
            told.append(w)
        if self.scale or self.rotate_frac or self.aniso or self.translate_frac:
            x = transformed(x, inverse)
        return x, torch.cat([x.new_zeros(len(x), 0), *told], dim=1)


def matrix(*values: Tensor | float) -> Tensor:
    """The first two rows of an affine map, numbers (N,) each -> (N, 3, 3)."""
    like = next(v for v in values if isinstance(v, Tensor))
    rows = [v if isinstance(v, Tensor) else torch.full_like(like, v) for v in (*values, 0.0, 0.0, 1.0)]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def shift(x: Tensor, y: Tensor) -> Tensor:
    return matrix(1.0, 0.0, x, 0.0, 1.0, y)


def zoom(x: Tensor, y: Tensor) -> Tensor:
    return matrix(x, 0.0, 0.0, 0.0, y, 0.0)


def turn(angle: Tensor) -> Tensor:
    return matrix(angle.cos(), -angle.sin(), 0.0, angle.sin(), angle.cos(), 0.0)


def transformed(x: Tensor, inverse: Tensor) -> Tensor:
    """x (N, C, H, W) seen through maps (N, 3, 3) from where a pixel goes to where it comes from, in pixels about the
    centre: twice the size by a wavelet's filter, sampled bilinearly, half the size again; mirrored at the edges."""
    height, width = x.shape[2:]
    cx, cy = (width - 1) / 2, (height - 1) / 2
    taps = torch.tensor(SYM6, dtype=x.dtype, device=x.device)
    pad = len(SYM6) // 4
    corners = torch.tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]], device=x.device)
    reach = (inverse @ corners.T)[:, :2].transpose(0, 1).flatten(1)  # (2, 4 N)
    margin = torch.cat([-reach, reach]).amax(dim=1) + torch.tensor([2 * pad - cx, 2 * pad - cy] * 2, device=x.device)
    limit = torch.tensor([width - 1, height - 1] * 2, device=x.device)
    left, top, right, bottom = margin.clamp(min=0).minimum(limit).ceil().int().tolist()
    x = F.pad(x, (left, right, top, bottom), mode="reflect")

    one = torch.ones(1, device=x.device)
    inverse = shift(one * (left - right) / 2, one * (top - bottom) / 2) @ inverse
    x = upfirdn2d(x, taps, up=2, pad=(6, 5))
    inverse = zoom(2 * one, 2 * one) @ inverse @ zoom(one / 2, one / 2)
    inverse = shift(-one / 2, -one / 2) @ inverse @ shift(one / 2, one / 2)
    size = [len(x), x.shape[1], (height + 2 * pad) * 2, (width + 2 * pad) * 2]
    inverse = zoom(2 * one / x.shape[3], 2 * one / x.shape[2]) @ inverse
    inverse = inverse @ zoom(one * size[3] / 2, one * size[2] / 2)
    grid = F.affine_grid(inverse[:, :2], size, align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return upfirdn2d(x, taps.flip(0), down=2, pad=(5, 5))[:, :, pad:-pad, pad:-pad]
