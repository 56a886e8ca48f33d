"""What every reader gives: names, byte sizes, labels, captions, and images by position, with the pictures that lie
beside them. Torch-free."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vgm_cli.data.decode import File, load_image, read_header
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.ui import some

CLASSES = 1000  # more than these, and more than images, are no class numbers


class Source(ABC):
    """A set of images in a fixed order. Subclasses fill the attributes and say how to `read` (or override `image`).

    names: one per image, relative, "/"-separated. sizes: bytes of each. labels: (N,) int64 or None. captioned: whether
    `caption` has something to say. skipped: names left out at opening. others: files that are no pictures, by suffix.
    remarks: sentences on what was assumed or left out. no_labels: why labels is None, for the error. stamp: a checksum
    of the contents, where one is to be had for nothing. files: the archives that the set is read from. columns: names
    of further pictures that images have beside them, such as line art or a mask.
    """

    kind = ""

    def __init__(self, root: str) -> None:
        self.root = root
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.labels: np.ndarray | None = None
        self.class_names: list[str] = []
        self.captioned = False
        self.skipped: list[str] = []
        self.others: Counter[str] = Counter()
        self.remarks: list[str] = []
        self.files: list[str] = []
        self.columns: list[str] = []
        self.no_labels = "class sub-folders give labels"
        self.stamp = ""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The file's bytes."""
        ...

    def stream(self, i: int) -> File:
        """What a decoder opens: a path if there is one, so that reading a header does not read the whole file."""
        return io.BytesIO(self.read(i))

    def header(self, i: int) -> tuple[int, int, bool]:
        """(width, height, grey?) of image i. Raises Unreadable."""
        return read_header(self.stream(i))

    def image(self, i: int, least: int = 0) -> Image.Image:
        """Image i, "L" or "RGB". least: see `load_image`. Raises Unreadable."""
        return load_image(self.stream(i), least)

    def caption(self, i: int) -> str | None:
        return None

    @abstractmethod
    def has(self, column: str, i: int) -> bool:
        """Whether image i has a picture of this column beside it."""
        ...

    @abstractmethod
    def beside(self, column: str, i: int) -> Image.Image:
        """That picture, "L" or "RGB". Raises Unreadable."""
        ...

    @abstractmethod
    def digest_beside(self, column: str, i: int) -> bytes:
        """A checksum of its content; nothing where `stamp` has it."""
        ...

    checksums = False  # whether `digest` costs no reading

    def digest(self, i: int) -> bytes:
        """A checksum of image i's content."""
        return hashlib.blake2b(self.read(i), digest_size=16).digest()

    def pixels(self) -> np.ndarray | None:
        """All images as uint8 (N, H, W, C) where the set is one array already."""
        return None


def class_indices(
    values: Sequence[Any], where: str, remarks: list[str] | None = None, known: Sequence[str] = ()
) -> tuple[np.ndarray, list[str]]:
    """Labels as found -> (int64 (N,), class names). Integers stay; strings become classes in sorted order.

    known: names of the classes that numbers stand for. remarks: told of numbers that no image has. Raises VgmError for
    vectors, negative or fractional numbers, and numbers that cannot be classes: more than CLASSES and than images.
    """
    if len(values) and all(isinstance(v, str) for v in values):
        try:
            return class_indices([int(v) for v in values], where, remarks, known)
        except ValueError:
            names = sorted(set(values))
            index = {name: i for i, name in enumerate(names)}
            return np.array([index[v] for v in values], np.int64), names
    try:
        array = np.asarray(values)
    except ValueError:  # ragged: numbers and vectors
        array = np.empty((len(values), 0))
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        hint = "store the position of the largest number (argmax) if the vectors are one-hot"
        raise VgmError(f"{where}: labels are vectors; one class index per image is needed", hint, FAILED)
    if array.dtype.kind not in "biuf" or (array < 0).any() or (array != np.floor(array)).any():
        raise VgmError(
            f"{where}: labels must be class indices 0, 1, 2 …, or names", "drop the labels or renumber", FAILED
        )
    top = array.max(initial=0)
    if top >= max(CLASSES, len(array), len(known)):
        raise VgmError(
            f"{where}: a label is {top:.0f}, which would make {top + 1.0:.0f} classes of {len(array)} images",
            "number the classes 0, 1, 2 …",
            FAILED,
        )
    indices = array.astype(np.int64)
    if remarks is not None and len(indices) and not known:
        found = np.unique(indices)
        if len(found) <= top:
            shown = some([str(c) for c in found], 5)
            made = f"labels up to {int(top)} make {int(top) + 1} classes"
            remarks.append(f"{where}: {made}, of which {len(found)} have images: {shown}")
    return indices, []


def no_label(where: str, name: str) -> VgmError:
    return VgmError(f"{where} has no label for {name}", "label every image or none", FAILED)


def usage(message: str, hint: str = "") -> VgmError:
    return VgmError(message, hint, USAGE)
