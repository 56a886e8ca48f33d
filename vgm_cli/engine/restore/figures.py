"""How good restorations are: PSNR, SSIM and LPIPS against the truth, and the distance from the measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgm_cli.engine.restore.inputs import Inputs
from vgm_cli.engine.restore.records import Restored
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import to_uint8
from vgm_cli.metrics.image import WINDOW, load_lpips, psnr, ssim

Perceptual = Callable[[Tensor, Tensor], Tensor]


def in_unit(x: Tensor) -> Tensor:
    """Images as their saved PNG would give them back: float64 (N, C, H, W) in [0, 1], rounded to 8 bits."""
    return to_uint8(x).double() / 255


def compare(x: Tensor, truth: Tensor, perceptual: Perceptual | None) -> dict[str, list[float]]:
    """psnr, ssim, lpips of every image against the truth, both as 8-bit pixels."""
    a, b = in_unit(x), in_unit(truth)
    out = {"psnr": psnr(a, b).tolist()}
    if min(a.shape[-2:]) >= WINDOW:
        out["ssim"] = ssim(a, b).tolist()
    if perceptual is not None:
        with torch.no_grad():
            pairs = zip((a.float() * 2 - 1).split(16), (b.float() * 2 - 1).split(16))
            out["lpips"] = [float(v) for p, q in pairs for v in perceptual(p, q).flatten()]
    return out


def mean(values: Sequence[float]) -> float | None:
    value = sum(values) / max(len(values), 1)
    return value if math.isfinite(value) else None


def figures(done: Restored, inputs: Inputs, perceptual: Perceptual | None) -> dict[str, Any]:
    """{"restored": means, "baseline": means, "gain": dB} and "images": one row each."""
    rows: list[dict[str, Any]] = [{"name": n, "residual": r} for n, r in zip(inputs.names, done.residual.tolist())]
    out: dict[str, Any] = {"restored": {"residual": mean(done.residual.tolist())}}
    if inputs.truth is not None:
        sides = {"restored": done.images}
        sides |= {k: v for k, v in (("baseline", done.baseline), ("stage1", done.stage1)) if v is not None}
        for side, x in sides.items():
            measured = compare(x, inputs.truth, perceptual)
            out[side] = {**out.get(side, {}), **{k: mean(v) for k, v in measured.items()}}
            for k, values in measured.items():
                for row, value in zip(rows, values):
                    row[k if side == "restored" else f"{side}_{k}"] = value if math.isfinite(value) else None
        if "baseline" in out and None not in (out["restored"]["psnr"], out["baseline"]["psnr"]):
            out["gain"] = out["restored"]["psnr"] - out["baseline"]["psnr"]
    return {**out, "images": rows}


def perceptual_from(files: str | None) -> Perceptual | None:
    """LPIPS from "VGG,HEADS", two weight files, or from those that VGM_LPIPS_VGG and VGM_LPIPS_HEADS name, if any."""
    if files is None and not (os.environ.get("VGM_LPIPS_VGG") and os.environ.get("VGM_LPIPS_HEADS")):
        return None
    vgg, comma, heads = (files or "").partition(",")
    if files is not None and not comma:
        raise VgmError(f"--lpips {files} is not VGG,HEADS", "vgg16-397923af.pth,vgg.pth (of PyPI's lpips)", USAGE)
    return load_lpips(vgg or None, heads or None)[0]


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the printed table: what, PSNR, SSIM, LPIPS, residual."""
    show = lambda v, digits: "-" if v is None else f"{v:.{digits}f}"
    rows = []
    for side in ("baseline", "stage1", "restored"):
        if side in results:
            m = results[side]
            digits = (("psnr", 2), ("ssim", 4), ("lpips", 4), ("residual", 3))
            rows.append([side, *(show(m.get(k), d) for k, d in digits)])
    return rows
