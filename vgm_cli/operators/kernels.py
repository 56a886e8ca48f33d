"""Blur kernels of synthetic degradations, convolution by them, sharpening, and resizing as OpenCV does it.

The kernels are those of BSRGAN (Zhang et al. 2021, arXiv 2103.14006; CompVis/latent-diffusion@a506df5
ldm/modules/image_degradation/bsrgan_light.py) and of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833;
XPixelGroup/BasicSR@8d56e3a basicsr/data/degradations.py, basicsr/utils/img_process_util.py): (size, size) float64,
summing to 1.
"""

from __future__ import annotations

import math
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


def squared_distances(size: int, angle: float, long: float, short: float) -> Tensor:
    """(size, size) float64: the squared distance of every tap from the middle, in units of the variances `long` along
    the direction `angle` (radians) and `short` across."""
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, sin], [sin, -cos]])
    inverse = torch.from_numpy(axes @ np.diag([1 / long, 1 / short]) @ axes)
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)  # (size, size, 2) of x and y
    return torch.einsum("hwi,ij,hwj->hw", grid, inverse, grid)


def anisotropic_kernel(size: int, angle: float, long: float, short: float) -> Tensor:
    """A Gaussian with the variance `long` along the direction `angle` (radians) and `short` across."""
    kernel = torch.exp(-0.5 * squared_distances(size, angle, long, short))
    return kernel / kernel.sum()


def generalised_kernel(size: int, angle: float, long: float, short: float, beta: float) -> Tensor:
    """The same of the squared distance to the power beta: below 1 with heavy tails, above 1 flat on top."""
    kernel = torch.exp(-0.5 * squared_distances(size, angle, long, short) ** beta)
    return kernel / kernel.sum()


def plateau_kernel(size: int, angle: float, long: float, short: float, beta: float) -> Tensor:
    """1 / (1 + d^beta) of the squared distance d."""
    kernel = 1 / (1 + squared_distances(size, angle, long, short) ** beta)
    return kernel / kernel.sum()


def lowpass_kernel(size: int, cutoff: float) -> Tensor:
    """The circular low-pass filter of a cutoff in radians (pi keeps all), which rings as sharpened pictures do. size:
    odd."""
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    r = torch.hypot(at[:, None], at)
    r[size // 2, size // 2] = 1.0
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def with_zeros(kernel: Tensor, size: int) -> Tensor:
    """The kernel with zeros around it, (size, size)."""
    return F.pad(kernel, [(size - len(kernel)) // 2] * 4)


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


def filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """x (B, C, H, W), each image cross-correlated with its own kernel of (B or 1, k, k), k odd; borders are reflected,
    the border pixel not repeated."""
    (b, c, h, w), k = x.shape, kernels.shape[-1]
    rows, columns = (mirrored(torch.arange(-(k // 2), n + k // 2, device=x.device), n) for n in (h, w))
    wide = x[:, :, rows][:, :, :, columns].reshape(1, b * c, h + k - 1, w + k - 1)
    own = kernels.to(x).expand(b, k, k).repeat_interleave(c, 0)[:, None]
    return F.conv2d(wide, own, groups=b * c).view(b, c, h, w)


def sharpened(x: Tensor, weight: float = 0.5, size: int = 51, threshold: float = 10.0) -> Tensor:
    """Unsharp masking of images (B, C, H, W) in [0, 1] where they differ from their blurred version by more than
    threshold / 255; the transition is blurred, too. The width of the blur follows from its size, as in OpenCV."""
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    blur = anisotropic_kernel(size, 0.0, sigma**2, sigma**2)[None].float()
    residual = x - filtered(x, blur)
    mask = filtered(((residual.abs() * 255) > threshold).to(x), blur)
    return mask * (x + weight * residual).clamp(0, 1) + (1 - mask) * x


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
