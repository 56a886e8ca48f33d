"""Blur kernels of synthetic degradations, convolution by them, and resizing as OpenCV does it.

The kernels are those of BSRGAN (Zhang et al. 2021, arXiv 2103.14006) and Real-ESRGAN (Wang et al. 2021, arXiv
2107.10833); CompVis/latent-diffusion@a506df5 ldm/modules/image_degradation/bsrgan_light.py has the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.operators.base import mirrored

Interpolation = Literal["nearest", "linear", "cubic", "area"]


def gaussian_kernel(size: int, std: float) -> Tensor:
    """(size, size) float64, summing to 1: a round Gaussian, as MATLAB's fspecial makes it."""
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    squares = at[:, None] ** 2 + at**2
    kernel = torch.exp(-squares / (2 * std * std)) if std > 0 else (squares == squares.min()).double()
    kernel = kernel * (kernel >= torch.finfo(torch.float64).eps * kernel.max())
    return kernel / kernel.sum()


def anisotropic_kernel(size: int, angle: float, long: float, short: float) -> Tensor:
    """(size, size) float64, summing to 1: a Gaussian with the variance `long` along the direction `angle` (radians)
    and `short` across."""
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, sin], [sin, -cos]])
    inverse = torch.from_numpy(axes @ np.diag([1 / long, 1 / short]) @ axes)
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)  # (size, size, 2) of x and y
    kernel = torch.exp(-0.5 * torch.einsum("hwi,ij,hwj->hw", grid, inverse, grid))
    return kernel / kernel.sum()


def shifted_kernel(kernel: Tensor, shift: float) -> Tensor:
    """The kernel (H, W) moved up and to the left by a share of a pixel, or several, its last row and column repeated:
    it then makes up for the shift of taking every n-th pixel, which is (n - 1) / 2."""

    def matrix(n: int) -> Tensor:
        at = (torch.arange(n, dtype=torch.float64) + shift).clamp(0, n - 1)
        low = at.floor().long().clamp(max=max(n - 2, 0))
        rows, out = torch.arange(n), torch.zeros(n, n, dtype=torch.float64)
        out[rows, low] += 1 - (at - low)
        out[rows, (low + 1).clamp(max=n - 1)] += at - low
        return out

    return matrix(len(kernel)) @ kernel @ matrix(kernel.shape[1]).T


def convolved(x: Tensor, kernel: Tensor, border: Literal["mirror", "wrap"] = "mirror") -> Tensor:
    """x (B, C, H, W) convolved with one kernel (h, w), the same size. border: pixels beyond the image are reflected,
    the border pixel not repeated, or wrapped around. Kernels of an even size are centred as SciPy's convolve does."""
    c = x.shape[1]
    for axis, size in ((2, kernel.shape[0]), (3, kernel.shape[1])):
        n = x.shape[axis]
        at = torch.arange(-((size - 1) // 2), n + size // 2)
        at = mirrored(at, n) if border == "mirror" else at.remainder(n)
        x = x.index_select(axis, at.to(x.device))
    weight = kernel.flip(0, 1).to(x)[None, None].expand(c, 1, -1, -1)
    return F.conv2d(x, weight, groups=c)


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -3/4."""
    a, x = -0.75, x.abs()
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0))


def opencv_matrix(n_in: int, n_out: int, kind: Interpolation, means: bool = True) -> Tensor:
    """(n_out, n_in) float64: resizing along one axis as OpenCV does it, without antialiasing. area: the mean of what a
    pixel covers, or without `means`, as OpenCV does where a side grows, nearest pixels that are blended where they
    meet."""
    scale, out = n_in / n_out, torch.arange(n_out, dtype=torch.float64)
    if kind == "area" and means:
        edges, cells = out[:, None] * scale, torch.arange(n_in, dtype=torch.float64)
        weight = (torch.minimum(edges + scale, cells + 1) - torch.maximum(edges, cells)).clamp(min=0)
        return weight / weight.sum(1, keepdim=True)
    if kind == "nearest":
        first, share = (out * scale).floor(), torch.zeros(n_out, dtype=torch.float64)
    elif kind == "area":
        first = (out * scale).floor()
        share = (out + 1 - (first + 1) / scale).clamp(min=0)
        share = share - share.floor()
    else:
        at = (out + 0.5) * scale - 0.5
        first, share = at.floor(), at - at.floor()
    if kind == "cubic":
        taps = torch.arange(-1, 3)
        weight = cubic(taps - share[:, None])
    else:
        taps = torch.arange(2)
        weight = torch.stack([1 - share, share], 1)
    index = (first[:, None].long() + taps).clamp(0, n_in - 1)
    return torch.zeros(n_out, n_in, dtype=torch.float64).scatter_add_(1, index, weight)


def opencv_resize(x: Tensor, height: int, width: int, kind: Interpolation) -> Tensor:
    """x (B, C, H, W) -> (B, C, height, width), see opencv_matrix."""
    smaller = height <= x.shape[2] and width <= x.shape[3]
    rows, columns = (opencv_matrix(a, b, kind, smaller).to(x) for a, b in zip(x.shape[2:], (height, width)))
    return rows @ x @ columns.T
