"""Up- and downsampling through a finite impulse response filter, as StyleGAN2 does it and NCSN++ after it.

Karras et al. 2020 (arXiv 1912.04958), app. B; NVlabs/stylegan2 and yang-song/score_sde_pytorch@cb1f359
models/up_or_down_sampling.py. A filter is given by its one-dimensional taps; its two-dimensional kernel is their outer
product with sum 1. Outside the image there are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def fir_kernel(taps: Sequence[float], like: Tensor, gain: float = 1.0) -> Tensor:
    """(n,) taps -> (n, n), sum `gain`; dtype and device of `like`."""
    row = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(row, row)
    return (kernel * (gain / kernel.sum())).to(like)


def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: Sequence[int] = (0, 0)) -> Tensor:
    """Insert up - 1 zeros after every pixel, pad, convolve with the kernel, keep every `down`-th pixel.

    x: (B, C, H, W); kernel: (n, m), or (n,) for the taps of a separable one, applied to rows and then to columns; pad:
    (before, after) of rows and columns alike, or (left, right, top, bottom). Negative padding crops.
    """
    left, right, top, bottom = pad if len(pad) == 4 else (*pad, *pad)
    if kernel.ndim == 1:
        x = _upfirdn(x, kernel[None], (1, up), (1, down), (left, right, 0, 0))
        return _upfirdn(x, kernel[:, None], (up, 1), (down, 1), (0, 0, top, bottom))
    return _upfirdn(x, kernel, (up, up), (down, down), (left, right, top, bottom))


def _upfirdn(x: Tensor, kernel: Tensor, up: Pair, down: Pair, pad: tuple[int, int, int, int]) -> Tensor:
    """upfirdn2d with factors (vertical, horizontal); pad: (left, right, top, bottom)."""
    channels, (n, m) = x.shape[1], kernel.shape
    left, right, top, bottom = pad
    if up != (1, 1):  # the transposed convolution pads by n - 1 before and n - up after; crop to what is wanted
        left, right, top, bottom = left - (m - 1), right - (m - up[1]), top - (n - 1), bottom - (n - up[0])
        own = (max(0, -max(top, bottom)), max(0, -max(left, right)))  # what both sides lose it does not compute
        x = F.conv_transpose2d(x, kernel.expand(channels, 1, n, m), stride=up, padding=own, groups=channels)
        rest = (left + own[1], right + own[1], top + own[0], bottom + own[0])
        x = F.pad(x, rest) if any(rest) else x
        return x[:, :, :: down[0], :: down[1]] if down != (1, 1) else x
    weights = kernel.flip(0, 1).expand(channels, 1, n, m)  # a convolution turns its kernel round
    own = (max(0, min(top, bottom)), max(0, min(left, right)))  # what both sides gain costs no copy
    rest = (left - own[1], right - own[1], top - own[0], bottom - own[0])
    x = F.pad(x, rest) if any(rest) else x
    return F.conv2d(x, weights, stride=down, padding=own, groups=channels)


def upsample_fir(x: Tensor, taps: Sequence[float], factor: int = 2, gain: float = 1.0) -> Tensor:
    """(B, C, H, W) -> (B, C, factor H, factor W); a constant image keeps its value times gain."""
    p = len(taps) - factor
    kernel = fir_kernel(taps, x, gain * factor**2)
    return upfirdn2d(x, kernel, up=factor, pad=((p + 1) // 2 + factor - 1, p // 2))


def downsample_fir(x: Tensor, taps: Sequence[float], factor: int = 2, gain: float = 1.0) -> Tensor:
    """(B, C, H, W) -> (B, C, H / factor, W / factor)."""
    p = len(taps) - factor
    return upfirdn2d(x, fir_kernel(taps, x, gain), down=factor, pad=((p + 1) // 2, p // 2))


def conv_downsample_fir(x: Tensor, weight: Tensor, taps: Sequence[float], factor: int = 2) -> Tensor:
    """Filter, then a convolution with stride `factor`: (B, C, H, W) -> (B, out, H / factor, W / factor)."""
    p = len(taps) - factor + weight.shape[-1] - 1
    x = upfirdn2d(x, fir_kernel(taps, x), pad=((p + 1) // 2, p // 2))
    return F.conv2d(x, weight, stride=factor)


def upsample_conv_fir(x: Tensor, weight: Tensor, taps: Sequence[float], factor: int = 2) -> Tensor:
    """A transposed convolution with stride `factor`, then the filter: the mirror image of conv_downsample_fir.

    weight: (out, in, k, k), as an ordinary convolution after upsampling would have it.
    """
    k = weight.shape[-1]
    p = len(taps) - factor - (k - 1)
    x = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=factor)
    return upfirdn2d(x, fir_kernel(taps, x, factor**2), pad=((p + 1) // 2 + factor - 1, p // 2 + 1))
