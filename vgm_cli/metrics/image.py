"""Metrics of paired images: PSNR, SSIM, MS-SSIM, LPIPS, each per image and then averaged.

Papers: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity (TIP 2004); Wang,
Simoncelli and Bovik, Multi-Scale Structural Similarity (Asilomar 2003). Gaussian window 11x11, sigma 1.5, k1 0.01, k2
0.03. padding="valid" is the paper's (windows inside the image only); "reflect" is torchmetrics'.
"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError, unknown
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.metrics.pictures import Items, pairs

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """10 log10(range^2 / mse) of every image. x, y: (B, C, H, W) -> (B,); equal images give infinity."""
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mse)


def _blur(x: Tensor, padding: str) -> Tensor:
    """Separable Gaussian window. x: (B, C, H, W) -> the same size (reflect) or 10 pixels less (valid)."""
    place = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    g = torch.exp(-((place / SIGMA) ** 2) / 2)
    g = g / g.sum()
    c, side = x.shape[1], WINDOW // 2
    if padding == "reflect":
        x = F.pad(x, (side, side, side, side), mode="reflect")
    x = F.conv2d(x, g.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, g.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


def _ssim_parts(x: Tensor, y: Tensor, data_range: float, padding: str) -> tuple[Tensor, Tensor]:
    """(B,) means of SSIM and of its contrast-structure factor; the latter always over windows inside the image."""
    if padding not in ("valid", "reflect"):
        raise VgmError(f"unknown padding '{padding}'", "known: valid, reflect", USAGE)
    if min(x.shape[-2:]) < WINDOW:
        raise VgmError(
            f"SSIM needs images of at least {WINDOW} pixels, these are {x.shape[-2]}x{x.shape[-1]}", code=USAGE
        )
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    mx, my, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y]), padding).chunk(5)
    var_x, var_y = (xx - mx * mx).clamp(min=0), (yy - my * my).clamp(min=0)
    contrast = (2 * (xy - mx * my) + c2) / (var_x + var_y + c2)
    ssim_map = (2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast
    if padding == "reflect":
        side = WINDOW // 2
        contrast = contrast[..., side:-side, side:-side]
    return ssim_map.flatten(1).mean(1), contrast.flatten(1).mean(1)


def ssim(x: Tensor, y: Tensor, data_range: float = 1.0, padding: str = "valid") -> Tensor:
    """Structural similarity of every image. x, y: (B, C, H, W), at least 11x11 -> (B,); computed in float64."""
    return _ssim_parts(x.double(), y.double(), data_range, padding)[0]


def ms_ssim(x: Tensor, y: Tensor, data_range: float = 1.0, padding: str = "valid") -> Tensor:
    """Five scales, each the 2x2 mean of the last, combined by BETAS; negative factors count as 0.

    x, y: (B, C, H, W), at least 176x176 -> (B,).
    """
    smallest = WINDOW * 2 ** (len(BETAS) - 1)
    if min(x.shape[-2:]) < smallest:
        raise VgmError(
            f"MS-SSIM's five scales need images of at least {smallest} pixels, these are {x.shape[-2]}x{x.shape[-1]}",
            "use ssim",
            USAGE,
        )
    x, y = x.double(), y.double()
    out = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for i, beta in enumerate(BETAS):
        if i:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        full, contrast = _ssim_parts(x, y, data_range, padding)
        out = out * (full if i == len(BETAS) - 1 else contrast).clamp(min=0) ** beta
    return out


class PairMetric(MetricBase):
    """The mean over pairs of a sample and the reference of its name (or position), uint8 pixels over 255."""

    needs_samples = needs_reference = frozenset({"images"})
    pairs = True
    unbounded = False  # identical pictures give infinity
    name = ""

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: float64 (B, C, H, W) in [0, 1] -> (B,)."""
        raise AssertionError(f"{type(self).__name__} does not say how to measure a pair")

    def options(self) -> dict[str, str]:
        return {}

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        a, b = samples.images, reference.images
        assert a is not None and b is not None
        if a.shape[1:] != b.shape[1:]:
            raise VgmError(
                f"{self.name} compares pairs: the samples are {tuple(a.shape)}, the reference is {tuple(b.shape)}",
                "give reference images of the same size",
                USAGE,
            )
        found = pairs(*(s.items or Items(range(len(x)), len(x)) for s, x in ((samples, a), (reference, b))))

        def batch(images: np.ndarray, rows: list[int]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(images[rows])).permute(0, 3, 1, 2).double() / 255

        n = len(found.samples)
        spans = [slice(i, i + 32) for i in range(0, n, 32)]
        values = torch.cat([self.measure(batch(a, found.samples[s]), batch(b, found.reference[s])) for s in spans])
        same = int(values.isposinf().sum()) if self.unbounded else 0
        remarks, facts = found.remarks(), found.facts()
        if same:
            facts["identical_pairs"] = same
            if same < n:
                remarks += (f"{same} of {n} pairs are identical, which makes the mean infinite",)
        spread = float(values.std()) / n**0.5 if n > 1 and bool(values.isfinite().all()) else None
        value = float(values.mean())
        return [Value(self.name, value, spread, self.options(), facts, n, remarks, unbounded=bool(same))]


class PSNR(PairMetric):
    """Mean over images of each image's PSNR (not the PSNR of the mean error); identical pairs make it infinite."""

    name = "psnr"
    unbounded = True

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        return psnr(x, y)


class SSIM(PairMetric):
    """padding: "valid" (Wang et al.) or "reflect" (torchmetrics)."""

    name = "ssim"

    smallest = WINDOW

    def __init__(self, padding: str = "valid"):
        if padding not in ("valid", "reflect"):
            raise unknown("padding", padding, ("valid", "reflect"))
        self.padding = padding

    def check(self, n: int | None, n_reference: int | None, shape: tuple[int, int, int]) -> None:
        h, w, _ = shape
        if min(h, w) < self.smallest:
            text = f"{self.name} needs images of at least {self.smallest} pixels, these are {w}×{h}"
            raise VgmError(text, "psnr takes any", USAGE)

    def options(self) -> dict[str, str]:
        return {"padding": self.padding}

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        return ssim(x, y, padding=self.padding)


class MSSSIM(SSIM):
    """padding: "valid" (Wang et al.) or "reflect" (torchmetrics)."""

    name = "ms-ssim"
    smallest = WINDOW * 2 ** (len(BETAS) - 1)

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        return ms_ssim(x, y, padding=self.padding)


class LPIPSDistance(PairMetric):
    """Mean LPIPS (VGG16, version 0.1), lower is better. vgg, heads: weight files; VGM_LPIPS_VGG and VGM_LPIPS_HEADS
    name them otherwise."""

    name = "lpips"

    def __init__(self, vgg: str | None = None, heads: str | None = None):
        self.net, self.files = load_lpips(vgg, heads)

    def options(self) -> dict[str, str]:
        return self.files

    @torch.no_grad()
    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x.float() * 2 - 1, y.float() * 2 - 1).flatten().double()


def load_lpips(vgg: str | None, heads: str | None) -> tuple[torch.nn.Module, dict[str, str]]:
    """(network, sha256 of its files). VgmError (exit code 4): no weights."""
    from pathlib import Path

    from vgm_cli.losses.lpips import LPIPS, WHERE
    from vgm_cli.metrics.features import file_sha256

    vgg, heads = vgg or os.environ.get("VGM_LPIPS_VGG"), heads or os.environ.get("VGM_LPIPS_HEADS")
    if not vgg or not heads:
        hint = f"lpips:vgg=FILE:heads=FILE, or VGM_LPIPS_VGG and VGM_LPIPS_HEADS; {WHERE}"
        raise VgmError("lpips needs weights", hint, MISSING_ASSET)
    net = LPIPS(vgg, heads)
    return net, {"vgg_sha256": file_sha256(Path(vgg)), "heads_sha256": file_sha256(Path(heads))}
