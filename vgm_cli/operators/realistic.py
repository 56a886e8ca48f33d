"""Degradations as pictures meet them on their way: blurred, resized, noisy and compressed, twice over.

Wang et al. 2021 (Real-ESRGAN, arXiv 2107.10833), sec. 3. Official code: xinntao/Real-ESRGAN@a4abfb2
realesrgan/models/realesrgan_model.py feed_data and options/train_realesrgan_x4plus.yml, on the parts of
XPixelGroup/BasicSR@8d56e3a. Deviations: every image draws all of its choices for itself, where officially a batch
shares the sizes and the kinds of noise; nothing is cropped, and pairs are not kept in a queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators import kernels as blur
from vgm_cli.operators.base import Operator
from vgm_cli.operators.jpeg import JPEG, soft_jpeg
from vgm_cli.operators.noise import numpy_rng
from vgm_cli.operators.resize import resized
from vgm_cli.operators.separable import GaussianDeblurring, SuperResolution
from vgm_cli.ranges import Count, Fraction, NonNegative, Percent

Mode = Literal["area", "bilinear", "bicubic"]
Shares = tuple[float, float, float, float, float, float]
MODES: tuple[Mode, ...] = ("area", "bilinear", "bicubic")
GREY = (0.2989, 0.587, 0.114)
Normal = Callable[[tuple[int, ...]], Tensor]
Counts = Callable[[Tensor], Tensor]  # expected counts -> counts


# -- noise -----------------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, sigma: Tensor, grey: Tensor, normal: Normal) -> Tensor:
    """x (B, 3, H, W) in [0, 1] with noise of sigma (B,), in units of 1 / 255, the same in all channels where grey (B,)
    says so; clipped. normal: the next draw of a shape."""
    scale, alike = sigma.to(x).view(-1, 1, 1, 1) / 255, grey.to(x.device).view(-1, 1, 1, 1)
    shared = normal(tuple(x.shape[2:])).to(x) if bool(grey.any()) else x.new_zeros(())
    own = normal(tuple(x.shape)).to(x)
    return (x + scale * torch.where(alike, shared, own)).clamp(0, 1)


def poisson_noise(x: Tensor, scale: Tensor, grey: Tensor, counts: Counts) -> Tensor:
    """x (B, 3, H, W) in [0, 1] with `scale` (B,) times its shot noise, clipped. White is as many counts as the image
    has values, up to the next power of 2. counts: draws them for the expected ones."""

    def noise(seen: Tensor) -> Tensor:
        seen = (seen * 255).round().clamp(0, 255) / 255
        white = [2.0 ** np.ceil(np.log2(len(torch.unique(row)))) for row in seen]
        per = seen.new_tensor(white).view(-1, 1, 1, 1)
        return counts(seen * per).to(x) / per - seen

    alike = grey.to(x.device).view(-1, 1, 1, 1)
    shared = x.new_zeros(())
    if bool(grey.any()):
        shared = noise(torch.einsum("c,bchw->bhw", torch.tensor(GREY).to(x), x)[:, None])
    return (x + scale.to(x).view(-1, 1, 1, 1) * torch.where(alike, shared, noise(x))).clamp(0, 1)


def straight(x: Tensor) -> Tensor:
    """Nearest integers, halves to even; gradient 1."""
    return x + (x.round() - x).detach()


# -- the two rounds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round: blur, resize, noise, JPEG."""

    kernel: Tensor | None  # (B, k, k); None: no blur
    scale: float  # of the resize
    mode: Mode  # of the resize
    poisson: bool  # shot noise instead of Gaussian
    strength: Tensor  # (B,) of the noise: sigma in units of 1 / 255, or the factor on shot noise
    grey: Tensor  # (B,) bool: noise that is the same in all channels
    quality: Tensor  # (B,) of JPEG

    def noisy(self, x: Tensor, normal: Normal, counts: Counts) -> Tensor:
        if self.poisson:
            return poisson_noise(x, self.strength, self.grey, counts)
        return gaussian_noise(x, self.strength, self.grey, normal)


@dataclass(frozen=True)
class Course:
    """What happens to images: two rounds, and on the way back to their size a low-pass filter before or behind the
    second JPEG."""

    first: Round
    second: Round
    sinc: Tensor  # (B, k, k)
    back: Mode  # how the final size is reached
    jpeg_last: bool
    seed: int = 0  # of the noise

    def __call__(self, x: Tensor, scale: int, normal: Normal, counts: Counts) -> Tensor:
        """x: (B, 3, H, W) in [0, 1] -> (B, 3, H // scale, W // scale), in multiples of 1 / 255."""
        height, width = x.shape[2:]
        one, two = self.first, self.second
        out = x if one.kernel is None else blur.filtered(x, one.kernel)
        out = F.interpolate(out, scale_factor=one.scale, mode=one.mode)
        out = soft_jpeg(one.noisy(out, normal, counts), one.quality, straight)
        out = out if two.kernel is None else blur.filtered(out, two.kernel)
        size = max(1, int(height / scale * two.scale)), max(1, int(width / scale * two.scale))
        out = two.noisy(F.interpolate(out, size=size, mode=two.mode), normal, counts)

        def back(seen: Tensor) -> Tensor:
            return blur.filtered(F.interpolate(seen, size=(height // scale, width // scale), mode=self.back), self.sinc)

        if self.jpeg_last:
            out = soft_jpeg(back(out).clamp(0, 1), two.quality, straight)
        else:
            out = back(soft_jpeg(out.clamp(0, 1), two.quality, straight))
        return straight(out * 255).clamp(0, 255) / 255


Range = tuple[float, float]
FORMS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


def drawn_size(rng: np.random.RandomState, sizes: tuple[int, int]) -> int:
    """An odd size from the smallest to the largest."""
    return int(rng.choice(np.arange(sizes[0], sizes[1] + 1, 2)))


@dataclass(frozen=True)
class Ranges:
    """What one round is drawn from."""

    blur: float
    sigma: Range
    forms: tuple[float, ...]
    beta: tuple[Range, Range]
    lowpass: float
    resize: tuple[float, float, float]
    sizes: Range
    gaussian: float
    noise: Range
    poisson: Range
    grey: float
    quality: Range

    def kernel(self, rng: np.random.RandomState, sizes: tuple[int, int]) -> Tensor:
        """A blur of one image, (k, k)."""
        size = drawn_size(rng, sizes)
        if rng.uniform() < self.lowpass:
            return blur.lowpass_kernel(size, rng.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi))
        form = FORMS[rng.choice(len(FORMS), p=np.asarray(self.forms) / sum(self.forms))]
        long = rng.uniform(*self.sigma) ** 2
        turned = form.endswith("aniso")
        short, angle = (rng.uniform(*self.sigma) ** 2, rng.uniform(-math.pi, math.pi)) if turned else (long, 0.0)
        if "_" not in form:
            return blur.anisotropic_kernel(size, angle, long, short)
        plateau = form.startswith("plateau")
        low, high = self.beta[plateau]
        beta = rng.uniform(low, 1) if rng.uniform() < 0.5 else rng.uniform(1, high)  # one half of the time below 1
        return (blur.plateau_kernel if plateau else blur.generalised_kernel)(size, angle, long, short, beta)

    def draw(self, rng: np.random.RandomState, sizes: tuple[int, int]) -> Round:
        """One round of one image."""
        weights = self.kernel(rng, sizes)
        blurred = rng.uniform() < self.blur
        kind = rng.choice(3, p=np.asarray(self.resize) / sum(self.resize))
        scale = (rng.uniform(1, self.sizes[1]), rng.uniform(self.sizes[0], 1), 1.0)[kind]
        poisson = rng.uniform() >= self.gaussian
        return Round(
            kernel=blur.with_zeros(weights, sizes[1]).float()[None] if blurred else None,
            scale=scale,
            mode=MODES[rng.randint(3)],
            poisson=poisson,
            strength=torch.tensor([rng.uniform(*(self.poisson if poisson else self.noise))], dtype=torch.float32),
            grey=torch.tensor([rng.uniform() < self.grey]),
            quality=torch.tensor([rng.uniform(*self.quality)], dtype=torch.float32),
        )


class RealESRGAN(Operator):
    """Blur, resize, noise and JPEG, twice, as Real-ESRGAN trains on: every image is degraded in its own way.

    Images become `scale` times smaller. Each keyword and its twin ending in 2 are of the first and the second round.
    Grey images are degraded as colour ones with equal channels. VgmError: kernel sizes that are even or out of order,
    images too small to be made smaller.
    """

    name = "real-esrgan"
    linear = False
    is_drawn = True

    def __init__(
        self,
        scale: Count = 4,  # sides become so many times smaller; 1: they stay
        sharpen: bool = True,  # images are sharpened first
        kernel_sizes: tuple[int, int] = (7, 21),  # smallest and largest side of blur kernels
        kernel_prob: Shares = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03),  # of FORMS
        kernel_prob2: Shares = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03),  # of the second round
        blur_prob: Fraction = 1.0,  # share of images that are blurred
        blur_prob2: Fraction = 0.8,  # of the second round
        sinc_prob: Fraction = 0.1,  # share of blurs by a low-pass filter
        sinc_prob2: Fraction = 0.1,  # of the second round
        blur_sigma: tuple[float, float] = (0.2, 3.0),  # widths of blurs in pixels
        blur_sigma2: tuple[float, float] = (0.2, 1.5),  # of the second round
        betag_range: tuple[float, float] = (0.5, 4.0),  # exponents of generalised Gaussians, of both rounds
        betap_range: tuple[float, float] = (1.0, 2.0),  # exponents of plateaus
        resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1),  # larger, smaller, as it is
        resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3),  # of the second round
        resize_range: tuple[float, float] = (0.15, 1.5),  # smallest and largest factor
        resize_range2: tuple[float, float] = (0.3, 1.2),  # of the second round
        gaussian_noise_prob: Fraction = 0.5,  # share of Gaussian noise; else shot noise
        gaussian_noise_prob2: Fraction = 0.5,  # of the second round
        noise_range: tuple[float, float] = (1.0, 30.0),  # deviations in units of 1 / 255
        noise_range2: tuple[float, float] = (1.0, 25.0),  # of the second round
        poisson_scale_range: tuple[float, float] = (0.05, 3.0),  # factors on shot noise
        poisson_scale_range2: tuple[float, float] = (0.05, 2.5),  # of the second round
        gray_noise_prob: Fraction = 0.4,  # share of noise that is the same in all channels
        gray_noise_prob2: Fraction = 0.4,  # of the second round
        jpeg_range: tuple[float, float] = (30.0, 95.0),  # qualities
        jpeg_range2: tuple[float, float] = (30.0, 95.0),  # of the second round
        final_sinc_prob: Fraction = 0.8,  # share of images with a low-pass filter at the end
    ):
        if not 1 <= kernel_sizes[0] <= kernel_sizes[1] or kernel_sizes[0] % 2 == 0 or kernel_sizes[1] % 2 == 0:
            raise VgmError(f"kernel_sizes={list(kernel_sizes)}: two odd sizes", "kernel_sizes=[7,21]", USAGE)
        ranges = {"blur_sigma": blur_sigma, "blur_sigma2": blur_sigma2, "betag_range": betag_range}
        ranges |= {"betap_range": betap_range, "resize_range": resize_range, "resize_range2": resize_range2}
        ranges |= {"noise_range": noise_range, "noise_range2": noise_range2, "jpeg_range": jpeg_range}
        ranges |= {"poisson_scale_range": poisson_scale_range, "poisson_scale_range2": poisson_scale_range2}
        ranges |= {"jpeg_range2": jpeg_range2}
        for key, (low, high) in ranges.items():
            if not 0 <= low <= high:
                raise VgmError(f"{key}={[low, high]}: from the smaller to the larger number", code=USAGE)
        for key in ("blur_sigma", "blur_sigma2", "resize_range", "resize_range2", "jpeg_range", "jpeg_range2"):
            if ranges[key][0] == 0:
                raise VgmError(f"{key} starts above 0", code=USAGE)
        for key, shares in {"kernel_prob": kernel_prob, "kernel_prob2": kernel_prob2, "resize_prob": resize_prob,
                            "resize_prob2": resize_prob2}.items():  # fmt: skip
            if min(shares) < 0 or sum(shares) <= 0:
                raise VgmError(f"{key}={list(shares)}: shares, not all 0", code=USAGE)
        self.scale, self.sharpen, self.kernel_sizes, self.final_sinc = scale, sharpen, kernel_sizes, final_sinc_prob
        beta = betag_range, betap_range
        self.rounds = (
            Ranges(blur_prob, blur_sigma, kernel_prob, beta, sinc_prob, resize_prob, resize_range,
                   gaussian_noise_prob, noise_range, poisson_scale_range, gray_noise_prob, jpeg_range),
            Ranges(blur_prob2, blur_sigma2, kernel_prob2, beta, sinc_prob2, resize_prob2, resize_range2,
                   gaussian_noise_prob2, noise_range2, poisson_scale_range2, gray_noise_prob2, jpeg_range2),
        )  # fmt: skip

    def prepare(self, generators: Sequence[torch.Generator]) -> None:
        if self.shape[0] not in (1, 3):
            raise VgmError(f"{self.name} degrades pictures of 1 or 3 channels, not {self.shape[0]}", code=USAGE)
        if min(self.shape[1:]) < self.scale:
            raise VgmError(f"scale={self.scale} leaves nothing of {self.shape[1]}x{self.shape[2]} pixels", code=USAGE)
        self.courses = [self.draw(numpy_rng(g)) for g in generators]

    def draw(self, rng: np.random.RandomState) -> Course:
        """What happens to one image."""
        first, second = (r.draw(rng, self.kernel_sizes) for r in self.rounds)
        sinc = torch.ones(1, 1)  # changes nothing
        if rng.uniform() < self.final_sinc:
            sinc = blur.lowpass_kernel(drawn_size(rng, self.kernel_sizes), rng.uniform(math.pi / 3, math.pi))
        back, jpeg_last = MODES[rng.randint(3)], bool(rng.uniform() < 0.5)
        kernels = blur.with_zeros(sinc, self.kernel_sizes[1]).float()[None]
        return Course(first, second, kernels, back, jpeg_last, int(rng.randint(2**31 - 1)))

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        channels, height, width = self.shape
        return channels, height // self.scale, width // self.scale

    def __call__(self, x: Tensor) -> Tensor:
        colour = (x.clamp(-1, 1).expand(-1, 3, -1, -1) + 1) / 2
        colour = blur.sharpened(colour) if self.sharpen else colour
        y = torch.cat([self.degrade(row[None], course) for row, course in zip(colour, self.courses)]) * 2 - 1
        return y if x.shape[1] == 3 else y.mean(1, keepdim=True)

    def degrade(self, row: Tensor, course: Course) -> Tensor:
        """One image (1, 3, H, W) in [0, 1] -> in [0, 1]."""
        drawn = torch.Generator().manual_seed(course.seed)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=drawn)

        def counts(rates: Tensor) -> Tensor:
            return torch.poisson(rates.detach().cpu(), generator=drawn)

        return course(row, self.scale, normal, counts)

    def state(self) -> dict[str, Tensor]:
        """The kernels of every image (one that changes nothing where there is no blur) and its JPEG qualities."""
        none = blur.with_zeros(torch.ones(1, 1), self.kernel_sizes[1])[None]
        kernels = {
            name: torch.cat([none if k is None else k for k in (getattr(c, name).kernel for c in self.courses)])
            for name in ("first", "second")
        }
        quality = torch.stack([torch.cat([c.first.quality, c.second.quality]) for c in self.courses])
        return {**kernels, "sinc": torch.cat([c.sinc for c in self.courses]), "quality": quality}

    def baseline(self, y: Tensor) -> Tensor:
        """Bicubic enlargement."""
        return resized(y, self.shape[1:])

    def picture(self, y: Tensor) -> Tensor:
        return F.interpolate(y, self.shape[1:], mode="nearest")


class Classical(Operator):
    """Blur, bicubic reduction, Gaussian noise and JPEG, each once: the degradations that restoration is measured on.

    SUPIR's table 1 (arXiv 2401.13627) has scale 4 and 8 alone, blur 2 and scale 4, scale 4 and noise 40, and the
    default, all of them.
    """

    name = "classical"
    linear = False

    def __init__(
        self,
        blur: NonNegative = 2.0,  # width of a Gaussian in pixels; 0: none
        scale: Count = 4,  # sides become so many times smaller
        noise: NonNegative = 20.0,  # deviation in units of 1 / 255
        jpeg: Percent | None = 50,  # quality; None: no JPEG
    ):
        self.noise_level, self.scale = noise, scale
        self.blur = GaussianDeblurring(2 * int(4 * blur + 0.5) + 1, blur) if blur else None
        self.reduce = SuperResolution(scale)
        self.jpeg = None if jpeg is None else JPEG(jpeg)

    def prepare(self, generators: Sequence[torch.Generator]) -> None:
        self.steps = [op.bind(self.shape, generators) for op in (self.blur, self.reduce) if op is not None]
        self.seeds = [int(torch.randint(2**31 - 1, (1,), generator=g)) for g in generators]

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        if self.noise_level:
            drawn = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(s)) for s in self.seeds]
            x = x + torch.stack(drawn)[: len(x)].to(x) * (self.noise_level / 127.5)
        return x if self.jpeg is None else self.jpeg(x)

    def baseline(self, y: Tensor) -> Tensor:
        """Bicubic enlargement."""
        return resized(y, self.shape[1:])

    def picture(self, y: Tensor) -> Tensor:
        return F.interpolate(y, self.shape[1:], mode="nearest")
