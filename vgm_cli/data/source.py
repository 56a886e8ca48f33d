"""What every reader gives: names, byte sizes, labels, captions, and images by position. Torch-free."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vgm_cli.data.decode import File, load_image, read_header
from vgm_cli.errors import FAILED, USAGE, VgmError


class Source:
    """A set of images in a fixed order. Subclasses fill the attributes and say how to `read` (or override `image`).

    names: one per image, relative, "/"-separated. sizes: bytes of each. labels: (N,) int64 or None. captioned: whether
    `caption` has something to say. skipped: names left out at opening. no_labels: why labels is None, for the error.
    stamp: a checksum of the contents, where one is to be had for nothing.
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
        self.no_labels = "class sub-folders give labels"
        self.stamp = ""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The file's bytes."""
        raise NotImplementedError

    def stream(self, i: int) -> File:
        """What a decoder opens; a path where there is one, so that a header costs no whole read."""
        return io.BytesIO(self.read(i))

    def header(self, i: int) -> tuple[int, int, bool]:
        """(width, height, grey?) of image i. Raises Unreadable."""
        return read_header(self.stream(i))

    def image(self, i: int) -> Image.Image:
        """Image i, "L" or "RGB". Raises Unreadable."""
        return load_image(self.stream(i))

    def caption(self, i: int) -> str | None:
        return None

    def pixels(self) -> np.ndarray | None:
        """All images as uint8 (N, H, W, C) where the set is one array already."""
        return None


def class_indices(values: Sequence[Any], where: str) -> tuple[np.ndarray, list[str]]:
    """Labels as found -> (int64 (N,), class names). Integers stay; strings become classes in sorted order.

    Raises VgmError for vectors, negative or fractional numbers.
    """
    if len(values) and all(isinstance(v, str) for v in values):
        try:
            return class_indices([int(v) for v in values], where)
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
    return array.astype(np.int64), []


def parse_json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise VgmError(f"{where} is not valid JSON: {e}", code=FAILED) from e


def no_label(where: str, name: str) -> VgmError:
    return VgmError(f"{where} has no label for {name}", "label every image or none", FAILED)


def usage(message: str, hint: str = "") -> VgmError:
    return VgmError(message, hint, USAGE)
