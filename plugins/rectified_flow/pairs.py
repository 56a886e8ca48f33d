"""Stored pairs (z0, z1) of noise and the data a flow took it to. gnobitab/RectifiedFlow@5a1fd4d run_lib_reflow.py.

A folder holds one sub-folder per seed with z0.npy and z1.npy, float32 (N, ...), and here also y.npy, int64 labels (N,),
for conditional flows. They are read as memory maps: a million pairs of 32 pixels are 24 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import FAILED, USAGE, VgmError

Array = Tensor | np.ndarray


class Part(NamedTuple):
    """z0, z1: (N, ...); cond: keywords of the network that they were made with, N rows each."""

    z0: Array
    z1: Array
    cond: Mapping[str, Array]


class Pairs:
    """All parts as one list of pairs."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.ends = np.cumsum([len(p.z0) for p in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """rows (B,) -> z0, z1 (B, ...) and the keywords that all parts have, on the CPU."""
        numbers = rows.cpu().numpy()
        parts = np.searchsorted(self.ends, numbers, side="right")
        inside = numbers - np.concatenate([[0], self.ends])[parts]

        def gather(arrays: Sequence[Array]) -> Tensor:
            return torch.stack([torch.as_tensor(arrays[p][int(i)]) for p, i in zip(parts, inside)])

        keys = set.intersection(*(set(p.cond) for p in self.parts))
        cond = {k: gather([p.cond[k] for p in self.parts]) for k in sorted(keys)}
        return gather([p.z0 for p in self.parts]).float(), gather([p.z1 for p in self.parts]).float(), cond


def read_pairs(folder: Path) -> Pairs:
    """The pairs below a folder. VgmError: none there, or arrays that do not belong together."""
    found = sorted(f.parent for f in folder.glob("*/z1.npy"))
    if not found:
        raise VgmError(f"{folder} holds no pairs", "one sub-folder per seed with z0.npy and z1.npy", USAGE)
    parts = [read_part(f) for f in found]
    if len({p.z0.shape[1:] for p in parts}) > 1:
        raise VgmError(f"the pairs below {folder} have different shapes", code=FAILED)
    return Pairs(parts)


def read_part(folder: Path) -> Part:
    try:
        z0, z1 = (np.load(folder / f"{k}.npy", mmap_mode="c", allow_pickle=False) for k in ("z0", "z1"))
        y = np.load(folder / "y.npy", allow_pickle=False) if (folder / "y.npy").exists() else None
    except (OSError, ValueError) as e:
        raise VgmError(f"the pairs in {folder} cannot be read: {str(e).splitlines()[0]}", code=FAILED) from e
    if z0.shape != z1.shape or (y is not None and y.shape != z0.shape[:1]):
        raise VgmError(f"z0, z1 and y of {folder} do not belong together", code=FAILED)
    return Part(z0, z1, {} if y is None else {"y": y.astype(np.int64)})
