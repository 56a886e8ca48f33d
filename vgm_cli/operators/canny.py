"""Canny's edges as OpenCV draws them: Sobel derivatives, thinning along the gradient, two thresholds.

Canny, A Computational Approach to Edge Detection (PAMI 1986). Behaviour of cv2.Canny with aperture 3 and L1 gradients
(opencv/opencv modules/imgproc/src/canny.cpp), which annotators and edge measures of the field use.
"""

from __future__ import annotations

import numpy as np

TAN_22 = 13573  # tan(22.5 degrees) in units of 2^-15


def sobel(x: np.ndarray, mode: str = "edge") -> tuple[np.ndarray, np.ndarray]:
    """3x3 derivatives along width and height: (..., H, W) -> two of that shape, borders as numpy.pad's mode says."""
    p = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)], mode=mode)  # type: ignore[call-overload]
    across = p[..., 2:] - p[..., :-2]
    down = p[..., 2:, :] - p[..., :-2, :]
    dx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    dy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return dx, dy


def canny(images: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Edges of uint8 pictures (N, H, W, C): (N, H, W) bool.

    A gradient |dx| + |dy| above `high` is an edge, one above `low` where it touches an edge. Of several channels each
    pixel takes the steepest.
    """
    low, high = np.floor(min(low, high)), np.floor(max(low, high))
    dx, dy = sobel(np.moveaxis(images, -1, 1).astype(np.int64))  # (N, C, H, W)
    steepest = np.argmax(abs(dx) + abs(dy), axis=1)[:, None]
    dx, dy = (np.take_along_axis(d, steepest, 1)[:, 0] for d in (dx, dy))
    m = abs(dx) + abs(dy)
    around = np.pad(m, [(0, 0), (1, 1), (1, 1)])

    def near(down: int, right: int) -> np.ndarray:
        h, w = m.shape[1:]
        return around[:, 1 + down : 1 + down + h, 1 + right : 1 + right + w]

    x, y = abs(dx) * TAN_22, abs(dy) * 2**15
    flat, steep, falls = y < x, y > x + abs(dx) * 2**16, (dx ^ dy) < 0
    left_right = (m > near(0, -1)) & (m >= near(0, 1))
    up_down = (m > near(-1, 0)) & (m >= near(1, 0))
    rising = (m > near(-1, -1)) & (m > near(1, 1))
    falling = (m > near(-1, 1)) & (m > near(1, -1))
    thin = np.where(flat, left_right, np.where(steep, up_down, np.where(falls, falling, rising)))
    candidates = thin & (m > low)
    return connected(candidates & (m > high), candidates)


def connected(edges: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """What of the candidates is joined to an edge through candidates, diagonals included: all (N, H, W) bool."""
    while True:
        more = dilate(edges) & candidates
        if (more == edges).all():
            return edges
        edges = more


def dilate(mask: np.ndarray, radius: int = 1) -> np.ndarray:
    """A mask (N, H, W) bool grown by so many pixels to every side, corners included."""
    for axis in (1, 2):
        p = np.pad(mask, [(radius, radius) if a == axis else (0, 0) for a in range(3)])
        n = mask.shape[axis]
        mask = np.logical_or.reduce([np.take(p, range(i, i + n), axis) for i in range(2 * radius + 1)])
    return mask
