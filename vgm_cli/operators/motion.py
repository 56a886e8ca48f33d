"""Blur by any kernel, and random camera-shake kernels as LeviBorodenko/motionblur@5781378 draws them.

The same draws of numpy's stream in the same order; the picture of the path depends a little on the version of Pillow.
Deviation: the line is at least one pixel wide, where the original leaves kernels below 54 pixels empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import SVD, Operator, conjugate_gradient, mirrored
from vgm_cli.operators.files import read_arrays
from vgm_cli.operators.noise import numpy_rng
from vgm_cli.operators.separable import check_kernel_size
from vgm_cli.ranges import Fraction, Width

DENSE = 2048  # pixels of one channel up to which a blur without structure is decomposed as a matrix


def camera_path(diagonal: float, intensity: float, rng: np.random.RandomState) -> np.ndarray:
    """Points of a random walk about 0 as complex numbers: (steps,). intensity in [0, 1]: 0 straight, 1 curled."""
    longest = 0.75 * diagonal * (rng.uniform() + rng.uniform(0, intensity**2))
    steps: list[float] = []
    while sum(steps) < longest:
        step = rng.beta(1, 30) * (1 - intensity + 0.1) * diagonal
        if step < longest:
            steps.append(step)
    widest, jitter = rng.uniform(0, intensity * math.pi), rng.beta(2, 20)
    angles = [rng.uniform(-widest, widest)]
    while len(angles) < len(steps):
        angle = rng.triangular(0, intensity * widest, widest + 0.1)
        turn = rng.uniform() < jitter  # the next step turns the other way
        angles.append(angle * np.sign(angles[-1]) * (-1 if turn else 1))
    path = np.cumsum(np.array(steps) * np.exp(1j * np.array(angles)))
    return (path - path.mean()) * np.exp(1j * rng.uniform(0, math.pi))


def motion_kernel(size: int, intensity: float, rng: np.random.RandomState) -> Tensor:
    """(size, size), summing to 1: a path drawn at twice the size, softened, reduced."""
    double = 2 * size
    diagonal = math.sqrt(2) * double
    path = camera_path(diagonal, intensity, rng) + (double + 1j * double) / 2
    picture = Image.new("RGB", (double, double))
    ImageDraw.Draw(picture).line([(p.real, p.imag) for p in path], width=max(int(diagonal / 150), 1))
    picture = picture.filter(ImageFilter.GaussianBlur(int(diagonal * 0.01)))
    kernel = np.array(picture.resize((size, size), Image.Resampling.LANCZOS).convert("L"), np.float32)
    if not kernel.any():  # a path of one point leaves no line
        kernel[size // 2, size // 2] = 1
    return torch.from_numpy(kernel / kernel.sum())


class MotionDeblurring(Operator):
    """Cross-correlation with one kernel per item.

    kernel_size, intensity: of the random kernels. kernel: a file or folder of kernels instead. padding: reflect (the
    paper's) | circular, which the Fourier transform decomposes at any size. VgmError: even sizes, unreadable files.
    """

    name = "motion-deblurring"

    def __init__(
        self,
        kernel_size: Width = 61,
        intensity: Fraction = 0.5,
        kernel: str | None = None,
        padding: Literal["reflect", "circular"] = "reflect",
    ):
        check_kernel_size(kernel_size)
        if not 0 <= intensity <= 1:
            raise VgmError(f"intensity={intensity} lies between 0 and 1", code=USAGE)
        self.kernel_size, self.intensity, self.kernel, self.padding = kernel_size, intensity, kernel, padding

    @property
    def is_drawn(self) -> bool:  # type: ignore[override]
        """Not read from a file."""
        return self.kernel is None

    def prepare(self, generators: Sequence[torch.Generator]) -> None:
        if self.kernel is None:
            drawn = [motion_kernel(self.kernel_size, self.intensity, numpy_rng(g)) for g in generators]
            self.use(torch.stack(drawn)[:, None])
            return
        if not Path(self.kernel).exists():
            raise VgmError(f"no such kernel: {self.kernel}", "an image, .npy or .safetensors file", USAGE)
        kernels = read_arrays(self.kernel, "kernel", len(generators), self.first)
        check_kernel_size(kernels.shape[-1])
        check_kernel_size(kernels.shape[-2])
        self.use(kernels / kernels.sum((-2, -1), keepdim=True))

    def use(self, kernels: Tensor) -> None:
        """kernels: (B or 1, 1, k, k)."""
        self.kernels = kernels

    def borders(self) -> tuple[Tensor, Tensor]:
        """Where each row and column of the padded image comes from."""
        out = []
        for n, k in zip(self.shape[1:], self.kernels.shape[-2:]):
            at = torch.arange(-(k // 2), n + k // 2)
            out.append(mirrored(at, n) if self.padding == "reflect" else at.remainder(n))
        return out[0], out[1]

    def weights(self, x: Tensor) -> Tensor:
        """One kernel per channel of the batch: (B * C, 1, k, k)."""
        k = self.kernels.to(x).expand(len(x), -1, -1, -1)
        return k.repeat_interleave(x.shape[1], 0)

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = (i.to(x.device) for i in self.borders())
        padded = x[:, :, rows][:, :, :, columns].flatten(0, 1)[None]  # (1, B C, H + 2r, W + 2r)
        return F.conv2d(padded, self.weights(x), groups=padded.shape[1]).view(x.shape)

    def adjoint(self, y: Tensor) -> Tensor:
        rows, columns = (i.to(y.device) for i in self.borders())
        wide = F.conv_transpose2d(y.flatten(0, 1)[None], self.weights(y), groups=y.shape[0] * y.shape[1])
        wide = wide.view(*y.shape[:2], len(rows), len(columns))
        tall = wide.new_zeros(*y.shape[:3], len(columns)).index_add(2, rows, wide)
        return y.new_zeros(y.shape).index_add(3, columns, tall)

    @cached_property
    def svd(self) -> SVD:
        return self.fourier() if self.padding == "circular" else self.dense()

    def fourier(self) -> SVD:
        """Wrapped around, a blur is a product in Fourier space."""
        delta = torch.zeros(len(self.kernels), 1, *self.shape[1:], dtype=torch.float64)
        delta[:, :, 0, 0] = 1
        transfer = torch.fft.fft2(self(delta))
        singular = transfer.abs()
        back = torch.where(singular > 0, transfer.conj() / singular.clamp(min=1e-30), 1)

        def forward(x: Tensor) -> Tensor:
            return torch.fft.fft2(x, norm="ortho")

        def measured(y: Tensor) -> Tensor:
            spectrum = forward(y)
            return back.to(spectrum.dtype).to(y.device) * spectrum

        return SVD(singular, lambda c: torch.fft.ifft2(c, norm="ortho").real, forward, measured)

    def dense(self) -> SVD:
        """As a matrix per kernel. VgmError: too many pixels."""
        _, height, width = self.shape
        n = height * width
        if n > DENSE:
            raise VgmError(
                f"a reflecting blur of {height}x{width} pixels is too large to decompose",
                "padding=circular, or a method without decompositions",
                USAGE,
            )
        basis = torch.eye(n, dtype=torch.float64).view(n, 1, height, width)
        u: list[Tensor] = []
        s: list[Tensor] = []
        vt: list[Tensor] = []
        for kernel in self.kernels:
            one = MotionDeblurring(padding=self.padding)
            one.shape = (1, height, width)
            one.use(kernel[None])
            left, singular, right = torch.linalg.svd(one(basis).view(n, n).T)
            u, s, vt = [*u, left], [*s, singular], [*vt, right]
        U, V_t = torch.stack(u)[:, None], torch.stack(vt)[:, None]  # (B or 1, 1, n, n)

        def through(m: Tensor, x: Tensor) -> Tensor:
            return (m.to(x) @ x.flatten(2)[..., None])[..., 0].view(x.shape)

        singular = torch.stack(s).view(-1, 1, height, width)
        return SVD(singular, lambda c: through(V_t.mT, c), lambda x: through(V_t, x), lambda y: through(U.mT, y))

    def ridge(self, y: Tensor, weight: float = 0.0) -> Tensor:
        if self.padding == "circular" or self.shape[1] * self.shape[2] <= DENSE:
            return super().ridge(y, weight)
        floor = max(weight, 1e-4)  # without a decomposition, a little regularisation instead of a cut-off
        return self.adjoint(conjugate_gradient(lambda u: self(self.adjoint(u)) + floor * u, y))

    def baseline(self, y: Tensor) -> Tensor:
        """The blurred image."""
        return y

    def state(self) -> dict[str, Tensor]:
        return {"kernel": self.kernels}
