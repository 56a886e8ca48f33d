"""JPEG compression on tensors, differentiable: rounding is the identity for gradients (straight-through).

ITU-T T.81 with its example tables (annex K) scaled by libjpeg's quality rule, JFIF colours. Kawar et al. 2022
(2209.11888) restore it with linear methods by taking the picture itself as its pseudo-inverse.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.ranges import Percent

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))


def table(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """(8, 8) divisors at a quality of 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255).double()


@cache
def dct_matrix() -> Tensor:
    """(8, 8) orthonormal DCT-II."""
    n = torch.arange(8.0, dtype=torch.float64, device="cpu")
    k = n[:, None]
    m = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    m[0] /= math.sqrt(2)
    return m


def rounded(x: Tensor) -> Tensor:
    """Nearest integers, halves away from 0 as in libjpeg; gradient 1."""
    nearest = x.sign() * (x.abs() + 0.5 + 1e-9).floor()
    return x + (nearest - x).detach()


def through_blocks(x: Tensor, divisors: Tensor) -> Tensor:
    """Quantise the 8x8 DCT of x: (B, C, H, W) about 0, H and W multiples of 8."""
    b, c, h, w = x.shape
    d, q = dct_matrix().to(x.device), divisors.to(x.device)  # float64: flat blocks lie exactly between two integers
    blocks = x.double().view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)  # (B, C, H/8, W/8, 8, 8)
    coefficients = rounded(d @ blocks @ d.T / q) * q
    return (d.T @ coefficients @ d).transpose(3, 4).reshape(b, c, h, w).to(x.dtype)


class JPEG(Operator):
    """Compressed and decompressed. subsampling: of the colours, 4:2:0 (usual) | 4:4:4. quality: 1 to 100."""

    name = "jpeg"
    linear = False

    def __init__(self, quality: Percent = 10, subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"):
        if not 1 <= quality <= 100:
            raise VgmError(f"quality={quality}: 1 to 100", "quality=10", USAGE)
        self.quality, self.subsampling = quality, subsampling

    @property
    def has_pinv(self) -> bool:
        return True

    def pinv(self, y: Tensor) -> Tensor:
        """The picture itself: compressing it again changes (almost) nothing."""
        return y

    def __call__(self, x: Tensor) -> Tensor:
        pixels = rounded((x.clamp(-1, 1) + 1) * 127.5)
        if x.shape[1] == 1:
            return self.plane(pixels - 128, LUMINANCE) / 127.5 + 128 / 127.5 - 1
        ycc = rounded(torch.einsum("dc,bchw->bdhw", torch.tensor(TO_YCC).to(x), pixels))
        y, colours = ycc[:, :1] - 128, ycc[:, 1:]
        if self.subsampling == "4:2:0":
            small = self.plane(rounded(F.avg_pool2d(padded(colours, 2), 2)), CHROMINANCE)
            colours = F.interpolate(small, scale_factor=2, mode="nearest")[..., : x.shape[2], : x.shape[3]]
        else:
            colours = self.plane(colours, CHROMINANCE)
        ycc = torch.cat([self.plane(y, LUMINANCE) + 128, colours], dim=1)
        out = torch.einsum("dc,bchw->bdhw", torch.linalg.inv(torch.tensor(TO_YCC)).to(x), ycc)
        return rounded(out).clamp(0, 255) / 127.5 - 1

    def plane(self, x: Tensor, base: tuple[tuple[int, ...], ...]) -> Tensor:
        """One component about 0, (B, C, H, W) of any size, as 8-bit samples."""
        out = through_blocks(padded(x, 8), table(base, self.quality))[..., : x.shape[2], : x.shape[3]]
        return rounded(out).clamp(-128, 127)


def libjpeg(x: Tensor, quality: int) -> Tensor:
    """x (B, C, H, W) in [-1, 1], of 1 or 3 channels, as libjpeg writes it and reads it again; the gradient is 1."""
    pixels = ((x.detach().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    read = []
    for row in pixels:
        file = io.BytesIO()
        Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(file, "JPEG", quality=quality)
        read.append(torch.from_numpy(np.array(Image.open(file))).view(row.shape))
    made = torch.stack(read).permute(0, 3, 1, 2).to(x) / 127.5 - 1
    return x + (made - x).detach()


def padded(x: Tensor, multiple: int) -> Tensor:
    """The last row and column repeated up to a multiple."""
    h, w = x.shape[-2:]
    return F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate")


# -- Real-ESRGAN's ---------------------------------------------------------------------------------------------------

SOFT_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
SOFT_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def soft_jpeg(x: Tensor, quality: Tensor, rounding: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """JPEG as Real-ESRGAN has it (XPixelGroup/BasicSR@8d56e3a basicsr/utils/diffjpeg.py): colour images x (B, 3, H, W)
    in [0, 1], quality (B,) that need not be whole, 4:2:0.

    Unlike the operator's: coefficients alone are rounded, divisors are neither rounded nor limited and those of the
    brightness are transposed, sides are filled up with zeros to multiples of 16.
    """
    h, w = x.shape[2:]
    factor = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).to(x).view(-1, 1, 1, 1, 1, 1) / 100
    x = F.pad(x, (0, -w % 16, 0, -h % 16))
    ycc = torch.einsum("dc,bchw->bdhw", torch.tensor(SOFT_YCC).to(x), x * 255)
    y, colours = ycc[:, :1] - 128, F.avg_pool2d(ycc[:, 1:], 2)

    def plane(part: Tensor, base: Tensor) -> Tensor:
        b, c, height, width = part.shape
        d, q = dct_matrix().to(part), base.to(part) * factor
        blocks = part.view(b, c, height // 8, 8, width // 8, 8).transpose(3, 4)
        coefficients = rounding(d @ blocks @ d.T / q) * q
        return (d.T @ coefficients @ d).transpose(3, 4).reshape(part.shape)

    y = plane(y, torch.tensor(LUMINANCE).T) + 128
    colours = F.interpolate(plane(colours, torch.tensor(CHROMINANCE)), scale_factor=2, mode="nearest")
    out = torch.einsum("dc,bchw->bdhw", torch.tensor(SOFT_RGB).to(x), torch.cat([y, colours], 1))
    return out.clamp(0, 255)[..., :h, :w] / 255
