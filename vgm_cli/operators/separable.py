"""Operators that are one small matrix per axis, A = C x H x W: their SVD is made of the SVDs of the matrices.

Sources: Chung et al. 2022 (DPS, 2209.14687) for super-resolution and blur, Kawar et al. 2022 (DDRM, 2201.11793) for the
decompositions and colorization.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import SVD, Operator, mirrored
from vgm_cli.operators.resize import KERNELS, matrix, output_size
from vgm_cli.ranges import NonNegative, Positive, Width

Axes = tuple[Tensor | None, Tensor | None, Tensor | None]  # of channels, rows, columns; None leaves an axis alone


def apply(x: Tensor, axes: Axes) -> Tensor:
    """x: (B, C, H, W) through one matrix per axis."""
    channels, rows, columns = (None if m is None else m.to(x) for m in axes)
    if rows is not None:
        x = rows @ x
    if columns is not None:
        x = x @ columns.T
    return x if channels is None else torch.einsum("dc,bchw->bdhw", channels, x)


class Separable(Operator):
    """Subclasses say their `matrices`: (out, in) float64 each, or None."""

    axes: Axes

    @abstractmethod
    def matrices(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Of channels, rows and columns, for self.shape."""

    def prepare(self, generators: Sequence[torch.Generator]) -> None:
        channels, rows, columns = (None if m is None else torch.from_numpy(m) for m in self.matrices())
        self.axes = (channels, rows, columns)

    def __call__(self, x: Tensor) -> Tensor:
        return apply(x, self.axes)

    def adjoint(self, y: Tensor) -> Tensor:
        channels, rows, columns = (None if m is None else m.T for m in self.axes)
        return apply(y, (channels, rows, columns))

    @cached_property
    def svd(self) -> SVD:
        singular = torch.ones(1, *self.shape, dtype=torch.float64)
        v: list[Tensor | None] = []
        vt: list[Tensor | None] = []
        ut: list[Tensor | None] = []
        for axis, m in enumerate(self.axes):
            if m is None:
                v, vt, ut = [*v, None], [*vt, None], [*ut, None]
                continue
            n_out, n_in = m.shape
            u, s, right = torch.linalg.svd(m, full_matrices=True)
            left = m.new_zeros(n_in, n_out)  # U^T, its rows filled up with zeros to one per coefficient
            left[: len(s)] = u.T[: len(s)]
            padded = m.new_zeros(n_in)
            padded[: len(s)] = s
            singular = singular * padded.view([-1 if i == axis else 1 for i in range(3)])
            v, vt, ut = [*v, right.T], [*vt, right], [*ut, left]
        as_axes = lambda ms: (ms[0], ms[1], ms[2])
        return SVD(
            singular, lambda c: apply(c, as_axes(v)), lambda x: apply(x, as_axes(vt)), lambda y: apply(y, as_axes(ut))
        )


class Denoising(Separable):
    """A = 1: nothing but the noise is to be removed."""

    name = "denoising"

    def matrices(self) -> tuple[None, None, None]:
        return None, None, None


class SuperResolution(Separable):
    """Antialiased reduction by `scale`. kernel: cubic | lanczos2 | lanczos3 | box | linear. VgmError: scale below 1."""

    name = "super-resolution"

    def __init__(
        self, scale: Positive = 4, kernel: Literal["cubic", "lanczos2", "lanczos3", "box", "linear"] = "cubic"
    ):
        if scale < 1:
            raise VgmError(f"scale={scale}: super-resolution enlarges, scale is at least 1", "scale=4", USAGE)
        assert kernel in KERNELS
        self.scale, self.kernel = scale, kernel

    def matrices(self) -> tuple[None, np.ndarray, np.ndarray]:
        rows, columns = (matrix(n, output_size(n, 1 / self.scale), 1 / self.scale, self.kernel) for n in self.shape[1:])
        return None, rows, columns

    def baseline(self, y: Tensor) -> Tensor:
        """Bicubic enlargement."""
        rows, columns = (
            torch.from_numpy(matrix(output_size(n, 1 / self.scale), n, float(self.scale))) for n in self.shape[1:]
        )
        return apply(y, (None, rows, columns))

    def picture(self, y: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(y, self.shape[1:], mode="nearest")


def gaussian_taps(kernel_size: int, std: float) -> np.ndarray:
    """(kernel_size,) float64: a delta through a Gaussian filter cut off at 4 std whose borders mirror, edge repeated.

    The outer product of two is what scipy.ndimage.gaussian_filter makes of a delta in a square of that size.
    """
    radius = int(4 * std + 0.5)
    g = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2) if std > 0 else np.ones(1)
    out = np.zeros(kernel_size)
    at = (np.arange(-radius, radius + 1) + kernel_size // 2) % (2 * kernel_size)
    np.add.at(out, np.where(at < kernel_size, at, 2 * kernel_size - 1 - at), g / g.sum())
    return out


def blur_matrix(n: int, kernel: np.ndarray, padding: str) -> np.ndarray:
    """(n, n): cross-correlation with a kernel of odd size, borders reflected or wrapped around."""
    reach = torch.arange(len(kernel)) - len(kernel) // 2
    at = torch.arange(n)[:, None] + reach
    index = (mirrored(at, n) if padding == "reflect" else at.remainder(n)).numpy()
    out = np.zeros((n, n))
    np.add.at(out, (np.arange(n)[:, None], index), np.broadcast_to(kernel, index.shape))
    return out


def check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise VgmError(f"kernel_size={kernel_size}: a blur kernel has an odd size", "kernel_size=61", USAGE)


class GaussianDeblurring(Separable):
    """Blur by a Gaussian of `std` pixels cut to kernel_size. padding: reflect (the paper's) | circular."""

    name = "gaussian-deblurring"

    def __init__(
        self, kernel_size: Width = 61, std: NonNegative = 3.0, padding: Literal["reflect", "circular"] = "reflect"
    ):
        check_kernel_size(kernel_size)
        if not std >= 0:
            raise VgmError(f"std={std}: a width in pixels is not negative", "std=3", USAGE)
        self.kernel_size, self.std, self.padding = kernel_size, std, padding

    def kernel(self) -> Tensor:
        """(kernel_size, kernel_size) float64."""
        taps = gaussian_taps(self.kernel_size, self.std)
        return torch.from_numpy(np.outer(taps, taps))

    def matrices(self) -> tuple[None, np.ndarray, np.ndarray]:
        taps = gaussian_taps(self.kernel_size, self.std)
        return None, blur_matrix(self.shape[1], taps, self.padding), blur_matrix(self.shape[2], taps, self.padding)

    def baseline(self, y: Tensor) -> Tensor:
        """The blurred image."""
        return y


class Colorization(Separable):
    """Colour images to grey by `weights` of red, green and blue (DDRM: the mean). VgmError: grey images."""

    name = "colorization"

    def __init__(self, weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)):
        if not math.isclose(sum(weights), 1, abs_tol=1e-2):
            raise VgmError(f"weights={weights}: they sum to 1", "weights=[0.299,0.587,0.114]", USAGE)
        self.weights = weights

    def matrices(self) -> tuple[np.ndarray, None, None]:
        if self.shape[0] != 3:
            raise VgmError("colorization needs a model of colour images, this one makes grey ones", code=USAGE)
        return np.array([self.weights]), None, None

    def baseline(self, y: Tensor) -> Tensor:
        """The grey image."""
        return self.pinv(y)

    def picture(self, y: Tensor) -> Tensor:
        return y.expand(-1, 3, -1, -1)
