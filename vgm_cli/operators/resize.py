"""MATLAB-style image resizing as matrices: each output pixel is a weighted sum of input pixels along one axis.

Behaviour of assafshocher/resizer (the copy in DPS2022/diffusion-posterior-sampling@effbde7 util/resizer.py): kernels
stretched for antialiasing when the image shrinks, centres aligned, borders mirrored with the edge pixel repeated,
weights normalised. Cubic: Keys with a = -1/2. Deviation: a kernel of which a single tap survives works ("box").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import unknown

EPS = float(np.finfo(np.float32).eps)


def cubic(x: np.ndarray) -> np.ndarray:
    a = np.abs(x)
    near, far = 1.5 * a**3 - 2.5 * a**2 + 1, -0.5 * a**3 + 2.5 * a**2 - 4 * a + 2
    return near * (a <= 1) + far * ((a > 1) & (a <= 2))


def lanczos(x: np.ndarray, lobes: int) -> np.ndarray:
    top = np.sin(np.pi * x) * np.sin(np.pi * x / lobes) + EPS
    return top / (np.pi**2 * x**2 / lobes + EPS) * (np.abs(x) < lobes)


def box(x: np.ndarray) -> np.ndarray:
    return ((x >= -0.5) & (x < 0.5)) * 1.0


def linear(x: np.ndarray) -> np.ndarray:
    return (1 - np.abs(x)).clip(min=0)


# name -> (kernel, its width at scale 1)
KERNELS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "cubic": (cubic, 4.0),
    "lanczos2": (lambda x: lanczos(x, 2), 4.0),
    "lanczos3": (lambda x: lanczos(x, 3), 6.0),
    "box": (box, 1.0),
    "linear": (linear, 2.0),
}


def output_size(n: int, scale: float) -> int:
    return math.ceil(n * scale)


def taps(
    n_in: int, n_out: int, scale: float, kernel: str = "cubic", antialias: bool = True, centred: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (n_out, k) float64 and the input positions (n_out, k) they multiply; columns without weight left out.

    centred: where output size and scale disagree slightly, the centres of both images coincide; else their first
    corners do, as in MATLAB. VgmError: unknown kernel.
    """
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    function, width = KERNELS[kernel]
    shrink = scale if antialias and scale < 1 else 1.0
    width = width / shrink
    over = (n_out - n_in * scale) / 2 if centred else 0.0
    # centres of the output pixels in input coordinates that count from 1
    centre = (np.arange(1, n_out + 1) - over) / scale + 0.5 * (1 - 1 / scale)
    first = np.floor(centre - width / 2)
    position = first[:, None] + np.arange(math.ceil(width) + 2) - 1  # counts from 0
    weight = shrink * function(shrink * (centre[:, None] - position - 1))
    total = weight.sum(1, keepdims=True)
    weight = weight / np.where(total == 0, 1.0, total)
    index = position.astype(np.int64) % (2 * n_in)
    index = np.where(index < n_in, index, 2 * n_in - 1 - index)
    used = weight.any(0)
    return weight[:, used], index[:, used]


def matrix(
    n_in: int, n_out: int, scale: float, kernel: str = "cubic", antialias: bool = True, centred: bool = True
) -> np.ndarray:
    """The same as a matrix (n_out, n_in)."""
    weight, index = taps(n_in, n_out, scale, kernel, antialias, centred)
    out = np.zeros((n_out, n_in))
    np.add.at(out, (np.arange(n_out)[:, None], index), weight)
    return out


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures x (B, C, h, w) at another size (H, W), bicubically."""
    rows, columns = (torch.from_numpy(matrix(n, m, m / n)).to(x) for n, m in zip(x.shape[2:], size))
    return rows @ x @ columns.T
