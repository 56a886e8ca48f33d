"""Condition pictures that need no network: canny edges, scribbles, thinned soft edges, normals of a depth map.

Official code: lllyasviel/ControlNet@ed85cd1 annotator/, gradio_scribble2image.py, gradio_fake_scribble2image.py. They
are OpenCV's operations there; here they are written out (resizing and blurs as OpenCV's, up to rounding).
"""

from __future__ import annotations

import math

import numpy as np

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.canny import canny, sobel

__all__ = ["canny", "depth_picture", "fake_scribble", "hwc3", "nms", "normals", "resize_image", "scribble"]


def hwc3(x: np.ndarray) -> np.ndarray:
    """A uint8 picture (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) -> (H, W, 3); transparent parts become white.
    VgmError: another number of channels."""
    x = x[:, :, None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4):
        raise VgmError(f"a picture of {x.shape} has no 1, 3 or 4 channels", code=USAGE)
    if x.shape[2] == 4:
        alpha = x[:, :, 3:].astype(np.float32) / 255
        return (x[:, :, :3].astype(np.float32) * alpha + 255 * (1 - alpha)).clip(0, 255).astype(np.uint8)
    return np.repeat(x, 3, axis=2) if x.shape[2] == 1 else x


# -- resizing ----------------------------------------------------------------------------------------------------------


def resize_image(x: np.ndarray, resolution: int) -> np.ndarray:
    """A uint8 picture (H, W, C) whose shorter side is about `resolution`, both sides being multiples of 64."""
    k = resolution / min(x.shape[:2])
    h, w = (max(int(np.round(n * k / 64)), 1) * 64 for n in x.shape[:2])
    return enlarged(x, h, w) if k > 1 else reduced(x, h, w)


def enlarged(x: np.ndarray, h: int, w: int) -> np.ndarray:
    """By Lanczos kernels of four lobes, in OpenCV's integers of 11 bits: (H, W, C) uint8 -> (h, w, C)."""
    down, across = (lanczos(n, m) for n, m in ((x.shape[0], h), (x.shape[1], w)))
    rows = np.einsum("vw,hwc->hvc", across, x.astype(np.int64))
    return ((np.einsum("vh,hwc->vwc", down, rows) + (1 << 21)) >> 22).clip(0, 255).astype(np.uint8)


def lanczos(n: int, m: int) -> np.ndarray:
    """Weights of n pixels in each of m, times 2^11: (m, n) int64."""
    out = np.zeros((m, n), np.int64)
    for i in range(m):
        at = np.float32((i + 0.5) * (n / m) - 0.5)
        first = math.floor(at)
        away = float(at - first) + 3 - np.arange(8)  # from each of the eight pixels around
        if abs(away).min() < 1e-6:
            taps = (abs(away) < 1e-6).astype(float)
        else:
            taps = (-1.0) ** np.arange(8) * np.sin(np.pi * away / 4) / away**2
        for k, tap in enumerate(np.rint(taps / taps.sum() * 2048).astype(np.int64)):
            out[i, min(max(first - 3 + k, 0), n - 1)] += tap
    return out


def reduced(x: np.ndarray, h: int, w: int) -> np.ndarray:
    """By the mean over each pixel's area; where a side grows all the same, by OpenCV's interpolation for that case:
    (H, W, C) uint8 -> (h, w, C)."""
    shrinks = x.shape[0] >= h and x.shape[1] >= w
    weights = area if shrinks else area_growing
    rows = np.einsum("vw,hwc->hvc", weights(x.shape[1], w), x.astype(np.float64))
    y = np.einsum("vh,hwc->vwc", weights(x.shape[0], h), rows)
    halves = x.shape[0] == 2 * h and x.shape[1] == 2 * w  # OpenCV rounds these up, others to even
    return (np.floor(y + 0.5) if halves else np.rint(y)).clip(0, 255).astype(np.uint8)


def area(n: int, m: int) -> np.ndarray:
    """Shares of n pixels in each of m <= n: (m, n)."""
    scale = n / m
    low, high = np.arange(m)[:, None] * scale, (np.arange(m)[:, None] + 1) * scale
    covered = np.minimum(np.arange(n) + 1, high) - np.maximum(np.arange(n), low)
    covered = np.where(covered < 1e-3, 0, covered)
    return covered / covered.sum(1, keepdims=True)


def area_growing(n: int, m: int) -> np.ndarray:
    """Weights of n pixels in each of m where not both sides shrink: (m, n)."""
    out = np.zeros((m, n))
    for i in range(m):
        first = math.floor(i * n / m)
        part = (i + 1) - (first + 1) * m / n
        part = 0.0 if part <= 0 else part - math.floor(part)
        out[i, min(first, n - 1)] += 1 - part
        out[i, min(first + 1, n - 1)] += part
    return out


# -- maps --------------------------------------------------------------------------------------------------------------


def scribble(x: np.ndarray) -> np.ndarray:
    """White where the darkest channel is dark: uint8 (H, W, C) -> the same shape, 0 or 255."""
    dark = x.min(axis=2, keepdims=True) < 127
    return np.repeat(np.where(dark, 255, 0).astype(np.uint8), x.shape[2], axis=2)


def gaussian(sigma: float, reach: int) -> np.ndarray:
    """Weights of a Gaussian that add up to 1, as wide as OpenCV's: reach is the half width over sigma."""
    half = (round(sigma * reach * 2 + 1) | 1) // 2
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    found: np.ndarray = taps / taps.sum()
    return found


def in_256ths(taps: np.ndarray) -> np.ndarray:
    """Weights rounded as OpenCV does for 8-bit pictures: what rounding takes from one, the next one gets."""
    half, error, out = len(taps) // 2, 0.0, np.zeros(len(taps))
    for i in range(half):
        wanted = taps[i] * 256 + error
        out[i] = out[-1 - i] = np.rint(wanted)
        error = wanted - out[i]
    out[half] = 256 - out.sum()
    return out / 256


def blur(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """(H, W) weighted by taps along both sides, float64, mirrored at the borders."""
    out, half = x.astype(np.float64), len(taps) // 2
    for axis, n in enumerate(x.shape):
        p = np.pad(out, [(half, half) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        out = np.sum([tap * np.take(p, range(i, i + n), axis) for i, tap in enumerate(taps)], axis=0)
    return out


def nms(x: np.ndarray, threshold: float, sigma: float) -> np.ndarray:
    """Soft edges (H, W) uint8, blurred and thinned to ridges that are brighter than the threshold: 0 or 255."""
    soft = blur(x, gaussian(sigma, 4)).astype(np.float32)
    h, w = x.shape
    p = np.pad(soft, 1, constant_values=-np.inf)
    ridge = np.zeros(soft.shape, bool)
    for a, b in ((0, 1), (1, 0), (1, 1), (1, -1)):  # along the width, the height, both diagonals
        sides = [p[1 + s * a : 1 + s * a + h, 1 + s * b : 1 + s * b + w] for s in (-1, 1)]
        ridge |= (soft >= sides[0]) & (soft >= sides[1])
    return np.where(ridge & (soft > threshold), 255, 0).astype(np.uint8)


def fake_scribble(x: np.ndarray, threshold: float = 127, sigma: float = 3.0) -> np.ndarray:
    """Lines as thick as a pen's, of soft edges (H, W) uint8: 0 or 255."""
    lines = blur(nms(x, threshold, sigma), in_256ths(gaussian(3.0, 3)))
    return np.where(np.floor(lines + 0.5) > 4, 255, 0).astype(np.uint8)


def unit_range(depth: np.ndarray) -> np.ndarray:
    """A depth map, its least value at 0, its largest at 1."""
    from_zero = depth - depth.min()
    return from_zero / max(from_zero.max(), np.finfo(np.float32).tiny)


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """A depth map (H, W), float32 -> uint8."""
    return (unit_range(depth) * np.float32(255)).clip(0, 255).astype(np.uint8)


def normals(depth: np.ndarray, background: float = 0.1, flatness: float = 2 * math.pi) -> np.ndarray:
    """Directions of the surface of a depth map (H, W), float32, as colours: uint8 (H, W, 3).

    background: below this share of the range the surface looks at the viewer. flatness: the z component before
    normalisation.
    """
    x, y = sobel(depth.astype(np.float64), "reflect")
    far = unit_range(depth) < background
    x, y = (np.where(far, 0, d) for d in (x, y))
    found = np.stack([x, y, np.full_like(x, flatness)], axis=2)
    found /= np.sqrt((found**2).sum(axis=2, keepdims=True))
    return (found * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
