"""Pictures to be measured, batch by batch: arrays, data sets, or whatever else has `batch` and a length."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError

SIDE = 32  # of the small copies that pixel distances are taken on


class Pictures(Protocol):
    """facts: "reference", "reference_fingerprint" and the like, for the protocol."""

    labels: np.ndarray | None
    facts: dict[str, Any]

    def __len__(self) -> int: ...

    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        ...

    def batch(self, first: int, last: int) -> np.ndarray:
        """uint8 (last - first, H, W, C)."""
        ...


class ArrayPictures:
    """images: uint8 (N, H, W, C), labels: (N,) or None."""

    def __init__(self, images: np.ndarray, labels: Any = None, facts: dict[str, Any] | None = None):
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
            shape = tuple(images.shape)
            raise VgmError(f"images are {images.dtype} {shape}, uint8 (N, H, W, 1 or 3) is wanted", code=USAGE)
        self.images = images
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.facts = facts or {}

    def __len__(self) -> int:
        return len(self.images)

    def shape(self) -> tuple[int, int, int]:
        h, w, c = self.images.shape[1:]
        return h, w, c

    def batch(self, first: int, last: int) -> np.ndarray:
        return self.images[first:last]


class DataPictures:
    """A data set, or n of it: evenly spaced items, since many sets are sorted by class."""

    def __init__(self, dataset: Any, n: int | None = None, first: bool = False):
        self.dataset = dataset
        count = len(dataset)
        n = count if n is None else min(n, count)
        self.rows = np.arange(n) if first or n == count else (np.arange(n) * count) // n
        own = dataset.labels()
        self.labels = None if own is None else np.asarray(own, np.int64)[self.rows]
        self.facts = {"reference": str(dataset.facts.root), "reference_fingerprint": dataset.fingerprint()}
        if n < count:
            self.facts["reference_subset"] = f"{'first' if first else 'every k-th,'} {n} of {count}"

    def __len__(self) -> int:
        return len(self.rows)

    def shape(self) -> tuple[int, int, int]:
        return self.dataset.facts.size, self.dataset.facts.size, self.dataset.facts.channels

    def batch(self, first: int, last: int) -> np.ndarray:
        return self.dataset.images(self.rows[first:last].tolist()).permute(0, 2, 3, 1).numpy()


def small(images: np.ndarray, side: int = SIDE) -> Tensor:
    """uint8 (B, H, W, C) -> (B, P) in [0, 1]: as it is up to `side` pixels, otherwise area-averaged to that."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    if max(x.shape[-2:]) > side:
        x = F.adaptive_avg_pool2d(x, side)
    return x.flatten(1)
