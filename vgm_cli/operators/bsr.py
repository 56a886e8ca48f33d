"""The light degradation of blind super-resolution: blur, reduction, noise and JPEG in an order that is drawn, too.

Zhang et al. 2021 (BSRGAN, arXiv 2103.14006), as latent diffusion's published super-resolution model was trained:
CompVis/latent-diffusion@a506df5 ldm/modules/image_degradation/bsrgan_light.py degradation_bsrgan_variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vgm_cli.operators.base import Operator
from vgm_cli.operators.jpeg import libjpeg
from vgm_cli.operators.kernels import (
    Interpolation,
    anisotropic_kernel,
    convolved,
    gaussian_kernel,
    opencv_resize,
    shifted_kernel,
)
from vgm_cli.operators.resize import matrix, output_size
from vgm_cli.operators.separable import apply

KINDS: tuple[Interpolation, ...] = ("linear", "cubic", "area")
BLUR, REDUCE, FIT, NOISE, COMPRESS = 0, 2, 3, 4, 5  # of seven stages, of which the light form leaves two out
LOUDEST = 2  # levels of 255


class Draws:
    """The random values of one picture's degradation, in the order in which they are asked for."""

    def __init__(self, rng: np.random.RandomState):
        self.rng = rng

    def share(self) -> float:
        """In [0, 1)."""
        return float(self.rng.random_sample())

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def whole(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(self.rng.randint(low, high + 1))

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self.rng.randint(len(options))]

    def order(self, n: int) -> list[int]:
        return list(map(int, self.rng.permutation(n)))

    def shares(self, *shape: int) -> np.ndarray:
        return self.rng.random_sample(shape)

    def normal(self, std: float, *shape: int) -> np.ndarray:
        return self.rng.normal(0, std, shape)

    def correlated(self, covariance: np.ndarray, *shape: int) -> np.ndarray:
        """(*shape, n) of n numbers with this covariance."""
        return self.rng.multivariate_normal(np.zeros(len(covariance)), covariance, shape)


def blurred(x: Tensor, scale: int, draws: Draws) -> Tensor:
    """By a kernel that is long in one direction, or by a round one."""
    if draws.share() < 0.5:
        widest = (4.0 + scale) / 4
        long, short = widest * draws.share(), widest * draws.share()
        size = draws.whole(2, 11) + 3
        kernel = anisotropic_kernel(size, draws.share() * math.pi, long, short)
    else:
        size = draws.whole(2, 4) + 3
        kernel = gaussian_kernel(size, (2.0 + 0.2 * scale) / 4 * draws.share())
    return convolved(x, kernel)


def resized(x: Tensor, factor: float, sides: tuple[int, int], draws: Draws) -> Tensor:
    """By the factor, of these sides, by a drawn interpolation."""
    height, width = (max(int(factor * n), 1) for n in sides)
    return opencv_resize(x, height, width, draws.one_of(KINDS)).clamp(0, 1)


def reduced(x: Tensor, scale: int, draws: Draws) -> Tensor:
    """By a factor that is drawn, or every n-th pixel of a blurred picture."""
    if draws.share() < 0.8:
        return resized(x, 1 / draws.between(1, 2 * scale), (x.shape[2], x.shape[3]), draws)
    kernel = shifted_kernel(gaussian_kernel(25, draws.between(0.1, 0.6 * scale)), (scale - 1) / 2)
    return convolved(x, kernel / kernel.sum())[..., ::scale, ::scale].clamp(0, 1)


def noisy(x: Tensor, draws: Draws) -> Tensor:
    """Of each colour by itself, of all alike, or of some that go together."""
    std, kind = draws.whole(1, LOUDEST) / 255, draws.share()
    sides, channels = tuple(x.shape[2:]), x.shape[1]
    if kind > 0.6:
        noise = draws.normal(std, *sides, channels)
    elif kind < 0.4:
        noise = draws.normal(std, *sides, 1)
    else:
        shares, axes = np.diag(draws.shares(channels)), np.linalg.svd(draws.shares(channels, channels))[0]
        noise = draws.correlated(np.abs((LOUDEST / 255) ** 2 * axes.T @ shares @ axes), *sides)
    return (x + torch.from_numpy(noise).permute(2, 0, 1).to(x)).clamp(0, 1)


def compressed(x: Tensor, draws: Draws) -> Tensor:
    return (libjpeg(2 * x - 1, draws.whole(80, 95)) + 1) / 2


def degraded(x: Tensor, scale: int, draws: Draws) -> Tensor:
    """One picture (C, H, W) in [0, 1] -> (C, H // scale, W // scale). As officially, a picture of two sides loses what
    its height is longer than its width, or the other way round, beyond a multiple of the scale."""
    height, width = x.shape[1:]
    x = x[None, :, : width - width % scale, : height - height % scale]
    if scale == 4 and draws.share() < 0.25:
        if float(draws.shares()) < 0.5:
            x = resized(x, 0.5, (x.shape[2], x.shape[3]), draws)
        else:
            axes = [torch.from_numpy(matrix(n, output_size(n, 0.5), 0.5, centred=False)) for n in x.shape[2:]]
            x = apply(x, (None, axes[0], axes[1])).clamp(0, 1)
        scale = 2
    order = draws.order(7)
    first, last = order.index(REDUCE), order.index(FIT)
    if first > last:
        order[first], order[last] = FIT, REDUCE
    sides = (x.shape[2], x.shape[3])
    for stage in order:
        if stage == BLUR:
            x = blurred(x, scale, draws)
        elif stage == REDUCE:
            sides = (x.shape[2], x.shape[3])
            x = reduced(x, scale, draws)
        elif stage == FIT:
            x = resized(x, 1 / scale, sides, draws)
        elif stage == NOISE:
            x = noisy(x, draws)
        elif stage == COMPRESS and draws.share() < 0.9:
            x = compressed(x, draws)
    return compressed(x, draws)[0]


class BSR(Operator):
    """A picture as a bad camera and the web leave it, `scale` times smaller: blurred, noisy and compressed."""

    name = "bsr"
    linear = False
    is_drawn = True

    def __init__(self, scale: Literal[2, 4] = 4):
        self.scale = scale

    def prepare(self, generators: Sequence[torch.Generator]) -> None:
        self.seeds = torch.cat([torch.randint(2**31 - 1, (1,), generator=g) for g in generators])

    def state(self) -> dict[str, Tensor]:
        return {"seed": self.seeds}

    def __call__(self, x: Tensor) -> Tensor:
        streams = [np.random.RandomState(seed) for seed in self.seeds.tolist()]
        rows = [degraded((row + 1) / 2, self.scale, Draws(rng)) for row, rng in zip(x, streams, strict=True)]
        return 2 * torch.stack(rows) - 1

    def baseline(self, y: Tensor) -> Tensor:
        """Bicubic enlargement."""
        axes = [torch.from_numpy(matrix(a, b, b / a)) for a, b in zip(y.shape[2:], self.shape[1:])]
        return apply(y, (None, axes[0], axes[1]))

    def picture(self, y: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(y, self.shape[1:], mode="nearest")
