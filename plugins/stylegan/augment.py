"""Augmentations that do not leak into the generator, and the controller of their strength (StyleGAN2-ADA).

Karras et al., NeurIPS 2020 (arXiv 2006.06676), sec. 2 to 3.1 and app. B. Official code:
NVlabs/stylegan2-ada-pytorch@d72cc7d training/augment.py and training_loop.py. Every draw is an argument, uniform in
[0, 1). Deviation: at p = 0 images pass untouched (officially through the resampling filters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.fir import upfirdn2d
from vgm_cli.nn.precision import full_precision

# low-pass filters of Daubechies' least asymmetric wavelets with 6 and 2 vanishing moments
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)

BLIT = ("xflip", "rotate90", "xint")
GEOM = ("scale", "rotate", "aniso", "xfrac")
COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
PIPES = {
    "blit": BLIT, "geom": GEOM, "color": COLOR, "filter": ("imgfilter",), "noise": ("noise",), "cutout": ("cutout",),
    "bg": BLIT + GEOM, "bgc": BLIT + GEOM + COLOR, "bgcf": (*BLIT, *GEOM, *COLOR, "imgfilter"),
    "bgcfn": (*BLIT, *GEOM, *COLOR, "imgfilter", "noise"),
    "bgcfnc": (*BLIT, *GEOM, *COLOR, "imgfilter", "noise", "cutout"),
}  # fmt: skip
# uniform draws of each kind: gates first, then values
DRAWS = {
    "xflip": 2, "rotate90": 2, "xint": 3, "scale": 2, "rotate": 4, "aniso": 2, "xfrac": 3, "brightness": 2,
    "contrast": 2, "lumaflip": 2, "hue": 2, "saturation": 2, "imgfilter": 8, "noise": 2, "cutout": 3,
}  # fmt: skip


def normal(u: Tensor) -> Tensor:
    """Uniform -> standard normal, by the quantile function."""
    return torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6)) * math.sqrt(2)


def filter_bank() -> Tensor:
    """Four octave-wide band-pass filters that sum to the identity: (4, taps)."""
    lo = torch.tensor(SYM2, dtype=torch.float64)
    hi = lo * torch.tensor([1.0, -1.0, 1.0, -1.0])

    def convolve(a: Tensor, b: Tensor) -> Tensor:
        return F.conv1d(a[:, None], b.flip(0)[None, None], padding=len(b) - 1)[:, 0]

    lo2, hi2 = (convolve(h[None], h.flip(0))[0] / 2 for h in (lo, hi))
    bank = torch.eye(4, 1, dtype=torch.float64)
    for i in range(1, 4):
        spaced = torch.stack([bank, torch.zeros_like(bank)], dim=2).flatten(1)[:, :-1]
        bank = convolve(spaced, lo2)
        start = (bank.shape[1] - len(hi2)) // 2
        bank[i, start : start + len(hi2)] += hi2
    return bank.float()


def matrix(rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Rows of (B,) tensors and numbers -> (B, rows, columns)."""
    flat = [e if isinstance(e, Tensor) else torch.full_like(like, float(e)) for row in rows for e in row]
    return torch.stack(flat, dim=-1).view(len(like), len(rows), -1)


def shift2d(x: Tensor, y: Tensor) -> Tensor:
    return matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], x)


def scale2d(x: Tensor, y: Tensor) -> Tensor:
    return matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], x)


def rotate2d(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]], angle)


class AugmentPipe(nn.Module):
    """The discriminator's augmentations, applied to real and generated images alike so that they do not leak (ADA).

    Every kind fires with probability p, independently for each image. Ranges are named and valued as in the official
    code.
    """

    bank: Tensor
    lowpass: Tensor

    def __init__(
        self,
        kinds: str | Sequence[str] = "bgc",  # names of augmentations, or one of PIPES ("bgc" is the paper's choice)
        strengths: dict[str, float] | None = None,  # {kind: factor on p}, for kinds that are to fire less often
        xint_max: float = 0.125,  # largest shift by whole pixels, as a share of the side
        scale_std: float = 0.2,  # standard deviation of log2 of the scale
        rotate_max: float = 1.0,  # largest rotation, 1 is a full turn either way
        aniso_std: float = 0.2,  # standard deviation of log2 of the stretching
        xfrac_std: float = 0.125,  # standard deviation of shifts by parts of a pixel, as a share of the side
        brightness_std: float = 0.2,  # standard deviation of the added brightness
        contrast_std: float = 0.5,  # standard deviation of log2 of the contrast
        hue_max: float = 1.0,  # largest turn of the hue, 1 is a full turn either way
        saturation_std: float = 1.0,  # standard deviation of log2 of the saturation
        imgfilter_bands: Sequence[float] = (1, 1, 1, 1),  # strength of every frequency band, from low to high
        imgfilter_std: float = 1.0,  # standard deviation of log2 of a band's factor
        noise_std: float = 0.1,  # standard deviation of the added noise's own deviation
        cutout_size: float = 0.5,  # side of the square that is cut out, as a share of the image's
    ):
        super().__init__()
        if isinstance(kinds, str):
            if kinds not in PIPES:
                raise unknown("augmentation pipe", kinds, PIPES)
            kinds = PIPES[kinds]
        for kind in (*kinds, *(strengths or {})):
            if kind not in DRAWS:
                raise unknown("augmentation", kind, DRAWS)
        self.strengths = dict.fromkeys(kinds, 1.0) | dict(strengths or {})
        self.kinds = [k for k in DRAWS if self.strengths.get(k, 0) > 0]
        self.draws = sum(DRAWS[k] for k in self.kinds)  # columns of the uniform draws of one image
        self.xint_max, self.scale_std, self.rotate_max = xint_max, scale_std, rotate_max
        self.aniso_std, self.xfrac_std, self.brightness_std = aniso_std, xfrac_std, brightness_std
        self.contrast_std, self.hue_max, self.saturation_std = contrast_std, hue_max, saturation_std
        self.imgfilter_bands, self.imgfilter_std = imgfilter_bands, imgfilter_std
        self.noise_std, self.cutout_size = noise_std, cutout_size
        taps = torch.tensor(SYM6, dtype=torch.float32)
        self.register_buffer("lowpass", taps / taps.sum(), persistent=False)
        self.register_buffer("bank", filter_bank(), persistent=False)

    def forward(self, images: Tensor, p: float, u: Tensor, grain: Tensor | None = None) -> Tensor:
        """images: (B, C, H, W) with 1 or 3 channels, p: probability, u: (B, self.draws) uniform, grain: like images,
        standard normal, for "noise". Differentiable, twice where the resampling is."""
        if p <= 0 or not self.kinds:
            return images
        parts = dict(zip(self.kinds, u.split([DRAWS[k] for k in self.kinds], dim=1)))
        with full_precision(images.device):
            images = self.move(images.float(), p, parts)
            images = self.colour(images, p, parts)
            if "imgfilter" in parts:
                images = self.filter(images, p, parts["imgfilter"])
            if "noise" in parts:
                gate, value = parts["noise"].unbind(1)
                sigma = torch.where(gate < p * self.strengths["noise"], normal(value).abs() * self.noise_std, 0.0)
                if grain is None:
                    raise VgmError("additive noise needs its draws", code=USAGE)
                images = images + grain * sigma[:, None, None, None]
            return self.cut(images, p, parts["cutout"]) if "cutout" in parts else images

    def move(self, images: Tensor, p: float, parts: dict[str, Tensor]) -> Tensor:
        """Flips, rotations, scalings and shifts as one resampling."""
        h, w = images.shape[2:]
        steps: list[Tensor] = []  # output pixel -> input pixel, each about the image's centre

        def draw(kind: str, value: Callable[[Tensor], Tensor], neutral: float, at: int = 1, n: int = 1) -> Tensor:
            u = parts[kind]
            fires = u[:, :1] < p * self.strengths[kind]
            return torch.where(fires, value(u[:, at : at + n]), neutral).squeeze(1)

        if "xflip" in parts:
            i = draw("xflip", lambda v: (v * 2).floor(), 0)
            steps.append(scale2d(1 / (1 - 2 * i), torch.ones_like(i)))
        if "rotate90" in parts:
            steps.append(rotate2d(math.pi / 2 * draw("rotate90", lambda v: (v * 4).floor(), 0)))
        if "xint" in parts:
            t = draw("xint", lambda v: (v * 2 - 1) * self.xint_max, 0, n=2)
            steps.append(shift2d(-(t[:, 0] * w).round(), -(t[:, 1] * h).round()))
        if "scale" in parts:
            s = draw("scale", lambda v: torch.exp2(normal(v) * self.scale_std), 1)
            steps.append(scale2d(1 / s, 1 / s))
        angles = []
        if "rotate" in parts:  # before or after the squeeze, with probability p in all
            once = 1 - math.sqrt(min(max(1 - p * self.strengths["rotate"], 0.0), 1.0))
            gates, values = parts["rotate"][:, :2], parts["rotate"][:, 2:]
            angles = list(torch.where(gates < once, (values * 2 - 1) * math.pi * self.rotate_max, 0.0).unbind(1))
            steps.append(rotate2d(angles[0]))
        if "aniso" in parts:
            s = draw("aniso", lambda v: torch.exp2(normal(v) * self.aniso_std), 1)
            steps.append(scale2d(1 / s, s))
        if angles:
            steps.append(rotate2d(angles[1]))
        if "xfrac" in parts:
            t = draw("xfrac", lambda v: normal(v) * self.xfrac_std, 0, n=2)
            steps.append(shift2d(-t[:, 0] * w, -t[:, 1] * h))
        if not steps:
            return images
        inverse = steps[0]
        for step in steps[1:]:
            inverse = inverse @ step
        return self.resample(images, inverse)

    def resample(self, images: Tensor, inverse: Tensor) -> Tensor:
        """inverse: (B, 3, 3) from output to input pixels, about the centre. Through twice the resolution, with a filter
        that passes shifts by whole pixels without loss."""
        n, c, h, w = images.shape
        cx, cy = (w - 1) / 2, (h - 1) / 2
        pad = len(self.lowpass) // 4
        corners = torch.tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]], device=images.device)
        reach = (inverse @ corners.T)[:, :2].transpose(0, 1).flatten(1)  # (2, B * 4): x, y
        margin = torch.cat([-reach, reach]).amax(1)  # left, top, right, bottom
        limits = margin.new_tensor([w - 1, h - 1] * 2)
        margin = (margin + margin.new_tensor([pad * 2 - cx, pad * 2 - cy] * 2)).clamp(min=0).minimum(limits)
        if images.is_meta:
            left = top = right = bottom = 0
        else:
            left, top, right, bottom = (int(m) for m in margin.ceil().tolist())
        images = F.pad(images, (left, right, top, bottom), mode="reflect")
        one = torch.ones(n, device=images.device)
        inverse = shift2d(one * ((left - right) / 2), one * ((top - bottom) / 2)) @ inverse
        taps = len(self.lowpass)
        images = upfirdn2d(images, self.lowpass * 2, up=2, pad=((taps + 1) // 2, (taps - 2) // 2))
        inverse = scale2d(2 * one, 2 * one) @ inverse @ scale2d(one / 2, one / 2)
        inverse = shift2d(-one / 2, -one / 2) @ inverse @ shift2d(one / 2, one / 2)
        height, width = (h + pad * 2) * 2, (w + pad * 2) * 2
        inverse = scale2d(one * (2 / images.shape[3]), one * (2 / images.shape[2])) @ inverse
        inverse = inverse @ scale2d(one * (width / 2), one * (height / 2))
        grid = F.affine_grid(inverse[:, :2], [n, c, height, width], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        crop = ((taps - 1) // 2 - pad * 2, (taps - 2) // 2 - pad * 2)
        return upfirdn2d(images, self.lowpass.flip(0), down=2, pad=crop)

    def colour(self, images: Tensor, p: float, parts: dict[str, Tensor]) -> Tensor:
        """Brightness, contrast, luma flip, hue and saturation as one affine map of colours."""
        n, channels = images.shape[:2]
        used = [k for k in COLOR if k in parts]
        if not used:
            return images
        if channels not in (1, 3):
            raise VgmError(f"colours of {channels} channels", "augmentation of colours takes 1 or 3", USAGE)
        one = torch.ones(n, device=images.device)
        eye = torch.eye(4, device=images.device)
        axis = torch.tensor([1.0, 1.0, 1.0, 0.0], device=images.device) / math.sqrt(3)
        luma = torch.outer(axis, axis)
        c = eye.expand(n, 4, 4)

        def draw(kind: str, value: Callable[[Tensor], Tensor], neutral: float) -> Tensor:
            gate, v = parts[kind].unbind(1)
            return torch.where(gate < p * self.strengths[kind], value(v), neutral)

        if "brightness" in parts:
            b = draw("brightness", lambda v: normal(v) * self.brightness_std, 0)
            c = matrix([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]], one) @ c
        if "contrast" in parts:
            k = draw("contrast", lambda v: torch.exp2(normal(v) * self.contrast_std), 1)
            c = matrix([[k, 0, 0, 0], [0, k, 0, 0], [0, 0, k, 0], [0, 0, 0, 1]], one) @ c
        if "lumaflip" in parts:
            i = draw("lumaflip", lambda v: (v * 2).floor(), 0)
            c = (eye - 2 * luma * i[:, None, None]) @ c
        if "hue" in parts and channels > 1:
            angle = draw("hue", lambda v: (v * 2 - 1) * math.pi * self.hue_max, 0)
            cos, sin, a = angle.cos(), angle.sin(), 1 / math.sqrt(3)
            same, plus, minus = (1 - cos) / 3 + cos, (1 - cos) / 3 + a * sin, (1 - cos) / 3 - a * sin
            turn: list[list[Tensor | float]] = [
                [same, minus, plus, 0],
                [plus, same, minus, 0],
                [minus, plus, same, 0],
                [0, 0, 0, 1],
            ]
            c = matrix(turn, one) @ c
        if "saturation" in parts and channels > 1:
            s = draw("saturation", lambda v: torch.exp2(normal(v) * self.saturation_std), 1)
            c = (luma + (eye - luma) * s[:, None, None]) @ c
        flat = images.flatten(2)
        if channels == 3:
            flat = c[:, :3, :3] @ flat + c[:, :3, 3:]
        else:
            grey = c[:, :3].mean(1, keepdim=True)
            flat = flat * grey[:, :, :3].sum(2, keepdim=True) + grey[:, :, 3:]
        return flat.view_as(images)

    def filter(self, images: Tensor, p: float, u: Tensor) -> Tensor:
        """Amplify octaves of frequency, at constant power of a 1/f spectrum."""
        n, channels, h, w = images.shape
        half = self.bank.shape[1] // 2
        if min(h, w) <= half:
            raise VgmError(f"imgfilter needs images above {half} pixels", "augment.kinds=bgc", USAGE)
        power = torch.tensor([10.0, 1, 1, 1], device=images.device) / 13
        gain = torch.ones(n, 4, device=images.device)
        for i, strength in enumerate(self.imgfilter_bands):
            fires = u[:, i] < p * self.strengths["imgfilter"] * strength
            amplify = torch.where(fires, torch.exp2(normal(u[:, 4 + i]) * self.imgfilter_std), 1.0)
            own = torch.where(torch.arange(4, device=images.device) == i, amplify[:, None], 1.0)
            gain = gain * own / (power * own.square()).sum(1, keepdim=True).sqrt()
        taps = (gain @ self.bank).repeat_interleave(channels, dim=0)[:, None]  # (B * C, 1, taps)
        x = F.pad(images.view(1, n * channels, h, w), (half, half, half, half), mode="reflect")
        x = F.conv2d(x, taps[:, :, None], groups=n * channels)
        return F.conv2d(x, taps[:, :, :, None], groups=n * channels).view_as(images)

    def cut(self, images: Tensor, p: float, u: Tensor) -> Tensor:
        """Set a square of half the side to grey."""
        h, w = images.shape[2:]
        size = torch.where(u[:, 0] < p * self.strengths["cutout"], self.cutout_size, 0.0)[:, None] / 2
        x = (torch.arange(w, device=images.device) + 0.5) / w
        y = (torch.arange(h, device=images.device) + 0.5) / h
        keep_x, keep_y = (x - u[:, 1:2]).abs() >= size, (y - u[:, 2:3]).abs() >= size
        return images * (keep_x[:, None, None, :] | keep_y[:, None, :, None])


def next_probability(p: float, sign: float, target: float, images: float, kimg: float) -> float:
    """ADA's controller (sec. 3): raise p where the discriminator is surer of real images than `target`, so fast that it
    could go from 0 to 1 within kimg thousand images. sign: mean of sign(D(real)) over the last `images` images."""
    direction = (sign > target) - (sign < target)
    return max(p + direction * images / (kimg * 1000), 0.0)
