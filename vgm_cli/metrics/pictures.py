"""Sets of pictures to be measured, read batch by batch: arrays, data sets, or anything else with `batch` and a
length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.data import Dataset
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ui import some

SIDE = 32  # of the small copies that pixel distances are taken on


@dataclass(frozen=True)
class Items:
    """Which pictures were measured, for pairs of them. places: the position of each in a set of `total`; names: their
    file names where they are files of their own; lost: positions in this list whose pictures could not be read."""

    places: Sequence[int]
    total: int
    names: Sequence[str] | None = None
    lost: frozenset[int] = frozenset()


@runtime_checkable
class HasItems(Protocol):
    """Pictures that know which they are; of others the k-th is the k-th."""

    def items(self) -> Items: ...


def items_of(pictures: Any) -> Items:
    return pictures.items() if isinstance(pictures, HasItems) else Items(range(len(pictures)), len(pictures))


@runtime_checkable
class HasTexts(Protocol):
    """Pictures of which each may have a text: its caption, or what it was asked for by."""

    def texts(self) -> list[str] | None: ...


def texts_of(pictures: Any) -> list[str] | None:
    return pictures.texts() if isinstance(pictures, HasTexts) else None


@runtime_checkable
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
        if dataset.facts.skipped:
            self.facts["reference_unreadable"] = len(dataset.facts.skipped)

    def __len__(self) -> int:
        return len(self.rows)

    def shape(self) -> tuple[int, int, int]:
        return self.dataset.facts.size, self.dataset.facts.size, self.dataset.facts.channels

    def batch(self, first: int, last: int) -> np.ndarray:
        return self.dataset.images(self.rows[first:last].tolist()).permute(0, 2, 3, 1).numpy()

    def texts(self) -> list[str] | None:
        """The captions; None where one is missing."""
        if not isinstance(self.dataset, Dataset) or not self.dataset.facts.captions:
            return None
        found = [self.dataset.caption(row) for row in self.rows.tolist()]
        return [text for text in found if text] if all(found) else None

    def items(self) -> Items:
        """Which pictures were measured, to be asked after they were read: those replaced by another, being
        unreadable, count as lost."""
        data = self.dataset
        if not isinstance(data, Dataset):
            return Items(self.rows.tolist(), len(data))
        places = np.asarray(data.rows)[self.rows].tolist()
        names = [data.source.names[i] for i in places]
        lost = frozenset(i for i, name in enumerate(names) if name in set(data.facts.skipped))
        return Items(places, len(data.source), names if data.facts.kind in NAMED else None, lost)


class InColour:
    """Grey pictures with three equal channels."""

    def __init__(self, pictures: Pictures):
        self.pictures, self.labels, self.facts = pictures, pictures.labels, pictures.facts

    def __len__(self) -> int:
        return len(self.pictures)

    def shape(self) -> tuple[int, int, int]:
        h, w, _ = self.pictures.shape()
        return h, w, 3

    def batch(self, first: int, last: int) -> np.ndarray:
        return np.repeat(self.pictures.batch(first, last), 3, axis=-1)

    def items(self) -> Items:
        return items_of(self.pictures)

    def texts(self) -> list[str] | None:
        return texts_of(self.pictures)


# -- pairs -----------------------------------------------------------------------------------------------------------

NAMED = ("folder", "zip", "tar")  # kinds of sets whose pictures are files
SHOWN = 10  # names listed of those without a partner


@dataclass(frozen=True)
class Pairs:
    """Partners for paired metrics: (samples[i], reference[i]) are positions of one pair. alone: names of pictures
    without a partner, of either side."""

    samples: list[int]
    reference: list[int]
    by: str
    alone: tuple[list[str], list[str]]

    def facts(self) -> dict[str, Any]:
        sides = zip(("samples_unpaired", "reference_unpaired"), self.alone)
        return {"paired_by": self.by, **{k: {"n": len(v), "first": v[:SHOWN]} for k, v in sides if v}}

    def remarks(self) -> tuple[str, ...]:
        remarks = []
        for side, other, names in zip(("samples", "reference"), ("reference", "samples"), self.alone):
            if names:
                of = f"{len(names)} of the {side} without a partner among the {other}"
                remarks.append(f"{of}, left out of pairs: {some(names)}")
        return tuple(remarks)


KEYS: tuple[Callable[[str], str], ...] = (
    lambda name: str(PurePosixPath(name).with_suffix("")),
    lambda name: PurePosixPath(name).stem,
    lambda name: name,
)


def pairs(a: Items, b: Items) -> Pairs:
    """Find the partner of every picture: by file name (ignoring suffixes, and folders where they are not needed) if
    both sides are files, otherwise by position.

    VgmError: no partners at all, or sets of different size that go by position.
    """
    if a.names is not None and b.names is not None:
        found = [p for key in KEYS if (p := by_key([key(n) for n in a.names], [key(n) for n in b.names], a, b))]
        best = max(found, key=lambda p: len(p.samples), default=None)
        if best is None or not best.samples:
            shown = f"{a.names[0]} and {b.names[0]}"
            hint = "partners have one file name, whatever the suffix; arrays (.npz) pair by position"
            raise VgmError(f"no picture of the samples has a partner in the reference: {shown}", hint, USAGE)
        return best
    if a.total != b.total:
        raise VgmError(
            f"the metric compares pairs, by position: there are {a.total} samples and {b.total} references",
            "folders on both sides pair by file name",
            USAGE,
        )
    best = by_key(list(a.places), list(b.places), a, b, "position")
    if best is None or not best.samples:
        raise VgmError("no sample has a partner in the reference: none of either is readable at one position")
    return best


def by_key(x: Sequence[Any], y: Sequence[Any], a: Items, b: Items, by: str = "file name") -> Pairs | None:
    """Pairs of pictures with equal keys; None where a key stands for two pictures of one side, but for positions:
    a caption may have been drawn twice."""
    if (len(set(x)) < len(x) and by != "position") or len(set(y)) < len(y):
        return None
    there = {key: j for j, key in enumerate(y) if j not in b.lost}
    chosen = [i for i, key in enumerate(x) if key in there and i not in a.lost]
    partners = [there[x[i]] for i in chosen]
    alone = [sorted({*range(len(k))} - {*own}) for k, own in ((x, chosen), (y, partners))]
    named = [[str(n[i]) for i in left] for n, left in zip((a.names or x, b.names or y), alone)]
    return Pairs(chosen, partners, by, (named[0], named[1]))


def small(images: np.ndarray, side: int = SIDE) -> Tensor:
    """uint8 (B, H, W, C) -> (B, P) in [0, 1]: as it is up to `side` pixels, otherwise area-averaged to that."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    if max(x.shape[-2:]) > side:
        x = F.adaptive_avg_pool2d(x, side)
    return x.flatten(1)
