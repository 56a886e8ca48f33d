"""Sets that are arrays: .npz files (images, labels; ADM's arr_0, arr_1) and procedural sets drawn from a seed."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vgm_cli import limits
from vgm_cli.data.decode import eight_bits, pixel_range
from vgm_cli.data.source import Source, class_indices, usage
from vgm_cli.data.zips import data_offset
from vgm_cli.errors import FAILED, USAGE, VgmError

IMAGE_KEYS = ("images", "arr_0", "x", "image", "data")
LABEL_KEYS = ("labels", "arr_1", "y", "label")
TEXT_KEYS = ("captions", "texts", "text", "prompts", "caption")
NAME_KEYS = ("class_names", "classes")
SPLITS = ("train", "test", "val")  # what 0, 1 and 2 in an array `split` stand for


def npz_keys(path: str | Path) -> list[str]:
    """Names of the arrays. Raises VgmError when the file is not an .npz."""
    try:
        with zipfile.ZipFile(path) as z:
            return [n.removesuffix(".npy") for n in z.namelist()]
    except (zipfile.BadZipFile, OSError) as e:
        raise VgmError(f"{path} is not a readable .npz file: {e}", "was the copy complete?", FAILED) from e


def npz_array(path: str | Path, key: str) -> np.ndarray:
    """One array; memory-mapped where it is stored uncompressed, so that 10 GB of samples cost no memory."""
    with zipfile.ZipFile(path) as z, open(path, "rb") as f:
        member = z.getinfo(key + ".npy")
        if member.compress_type == zipfile.ZIP_STORED:
            f.seek(data_offset(f, member))
            shape, fortran, dtype, _ = limits.array_header(f)
            if math.prod(shape) and not dtype.hasobject:
                return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")
    return limits.read_npz(path, [key])[key]


def as_pixels(a: np.ndarray, where: str, remarks: list[str]) -> np.ndarray:
    """(N, H, W), (N, H, W, C), (N, C, H, W) or one (H, W, C) of any usual range -> uint8 (N, H, W, C), C in {1, 3}.

    C is where a 1, 3 or 4 stands, looked for at the end first. The range is that of all values together
    (`decode.pixel_range`); what is not plain is added to `remarks`. Raises VgmError for NaN, infinity and values of no
    usual range.
    """
    if a.ndim == 3:
        a = a[None] if a.shape[2] in (3, 4) else a[..., None]
    if a.ndim != 4 or (a.shape[3] not in (1, 3, 4) and a.shape[1] not in (1, 3, 4)):
        shape = tuple(a.shape)
        raise VgmError(
            f"{where} has shape {shape}, which are not images", "(N, H, W, 3), (N, 3, H, W) or (N, H, W)", FAILED
        )
    if a.shape[3] not in (1, 3, 4):
        a = a.transpose(0, 2, 3, 1)
    if a.dtype.kind not in "buif":
        raise VgmError(f"{where} holds {a.dtype}, not pixels", "uint8 is best", FAILED)
    span = (0.0, 255.0) if not a.size else (0.0, 1.0) if a.dtype == bool else span_of(a, where, remarks)
    if a.dtype == np.uint8 and a.shape[3] != 4:
        return a
    out = np.empty((*a.shape[:3], min(a.shape[3], 3)), np.uint8)
    step = max(1, 2**24 // max(1, a[:1].size))
    for first in range(0, len(a), step):  # floats of a large set take eight times its memory
        part = eight_bits(a[first : first + step], span)
        if part.shape[3] == 4:  # composited on white
            alpha = part[..., 3:].astype(np.float32) / 255
            part = (part[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)
        out[first : first + step] = part
    return out


def span_of(a: np.ndarray, where: str, remarks: list[str]) -> tuple[float, float]:
    """(black, white) of an array of numbers; says so where that is a guess."""
    if a.dtype == np.uint8:
        if a[:1000].max() <= 1 and a.max() <= 1:
            remarks.append(f"{where}: no value is above 1 of 255, so that all is black; white is 255, or True")
        return 0, 255
    low, high = float(a.min()), float(a.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = sum(int((~np.isfinite(part)).sum()) for part in a)
        raise VgmError(f"{where} holds {bad:,} values that are NaN or infinite", "leave those images out", FAILED)
    try:
        black, white = pixel_range(low, high, a.dtype.kind == "f")
    except ValueError as e:
        raise VgmError(f"{where}: {e}", "scale them to 0..255, [0, 1] or [-1, 1]", FAILED) from e
    values = f"{where}: {a.dtype} values from {low:.7g} to {high:.7g}"
    if low < black or high > white:
        remarks.append(f"{values} were clipped to {black:g}..{white:g}")
    elif a.dtype.kind != "f":
        remarks.append(f"{values} were taken as of {black:g}..{white:g}")
    return black, white


class Arrays(Source):
    """images: uint8 (N, H, W, C), C in {1, 3}; labels: (N,) or None; captions: one per image; beside: pictures of
    further columns, like images; names: of the classes."""

    kind = "npz"

    def __init__(
        self,
        root: str,
        images: np.ndarray,
        labels: Any = None,
        captions: list[str] | None = None,
        beside: dict[str, np.ndarray] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(root)
        self.images, self.further = images, beside or {}
        self.columns = list(self.further)
        self.names = [f"{i:08d}" for i in range(len(images))]
        self.sizes = [int(images[0].nbytes) if len(images) else 0] * len(images)
        self.texts = captions or []
        self.captioned = bool(captions)
        self.no_labels = f"an array named {' or '.join(LABEL_KEYS[:2])} gives labels"
        if labels is not None:
            if len(labels) != len(images):
                raise VgmError(f"{root} has {len(images)} images but {len(labels)} labels", code=FAILED)
            self.labels, own = class_indices(labels, root, self.remarks, names)
            self.class_names = list(names) or own

    def header(self, i: int) -> tuple[int, int, bool]:
        h, w, c = self.images.shape[1:]
        return w, h, c == 1

    def image(self, i: int, least: int = 0) -> Image.Image:
        return picture(self.images[i])

    def has(self, column: str, i: int) -> bool:
        return column in self.further

    def beside(self, column: str, i: int) -> Image.Image:
        return picture(self.further[column][i])

    def digest_beside(self, column: str, i: int) -> bytes:
        return b"" if self.stamp else self.further[column][i].tobytes()

    def caption(self, i: int) -> str | None:
        return self.texts[i] if self.texts else None

    def read(self, i: int) -> bytes:
        return self.images[i].tobytes()

    checksums = True

    def digest(self, i: int) -> bytes:
        return b"" if self.stamp else super().digest(i)

    def pixels(self) -> np.ndarray | None:
        return self.images

    def keep(self, rows: np.ndarray) -> None:
        """Only these images; they keep their names. rows: bool (N,)."""
        self.images, self.sizes = self.images[rows], [s for s, kept in zip(self.sizes, rows) if kept]
        self.names = [n for n, kept in zip(self.names, rows) if kept]
        self.texts = [t for t, kept in zip(self.texts, rows) if kept]
        self.further = {k: a[rows] for k, a in self.further.items()}
        self.labels = None if self.labels is None else self.labels[rows]


def picture(a: np.ndarray) -> Image.Image:
    """uint8 (H, W, C), C in {1, 3} -> "L" or "RGB"."""
    return Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a)


def open_npz(path: Path, label_key: str | None = None, split: str | None = None, columns: Sequence[str] = ()) -> Arrays:
    """The images, labels, captions and class names of an .npz, of one split where it has an array `split`; further
    arrays of as many pictures are columns, of which only those that are asked for are read.

    Raises VgmError when no array of images is there.
    """
    keys = npz_keys(path)
    key = next((k for k in IMAGE_KEYS if k in keys), None)
    if key is None:
        extra = "; it holds statistics, not images" if "mu" in keys else ""
        raise VgmError(
            f"{path} has no images{extra}", f"arrays: {', '.join(keys[:8]) or 'none'}; 'images' is wanted", USAGE
        )
    if label_key is not None and label_key not in keys:
        raise VgmError(f"{path} has no array '{label_key}'", f"arrays: {', '.join(keys[:8])}", USAGE)
    wanted = (label_key,) if label_key else LABEL_KEYS
    label = next((k for k in wanted if k in keys), None)
    try:
        found, labels = npz_array(path, key), None if label is None else npz_array(path, label)
        heads = headers(path, [k for k in keys if k not in (key, label)])
        of_words = {k: shape for k, (shape, kind) in heads.items() if len(shape) == 1 and kind in "US"}
        text = next((k for k in TEXT_KEYS if of_words.get(k) == (len(found),)), None)
        names = next((k for k in NAME_KEYS if k in of_words), None)
        texts = None if text is None else words(npz_array(path, text))
        classes = [] if names is None or labels is None else words(npz_array(path, names))
        splits = npz_array(path, "split") if split is not None and "split" in heads else None
        known = [k for k, (shape, kind) in heads.items() if are_pictures(shape, kind, len(found))]
        beside = {k: npz_array(path, k) for k in columns if k in known}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as e:
        raise VgmError(
            f"{path} is damaged or holds Python objects: {e}", "write plain arrays (numpy.savez)", FAILED
        ) from e
    remarks: list[str] = []
    pixels, *others = (as_pixels(a, f"'{k}' of {path}", remarks) for k, a in ((key, found), *beside.items()))
    arrays = Arrays(str(path.absolute()), pixels, labels, texts, dict(zip(beside, others)), classes)
    arrays.remarks[:0] = remarks
    arrays.files, arrays.columns = [str(path)], known
    with zipfile.ZipFile(path) as z:
        arrays.stamp = " ".join(f"{z.getinfo(k + '.npy').CRC:08x}" for k in (key, *beside))
    if split is not None:
        if splits is None:
            raise no_split(str(path), split)
        arrays.keep(rows_of(splits, split, str(path), len(pixels)))
    return arrays


def words(a: np.ndarray) -> list[str]:
    """An array of texts as a list."""
    return [t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in a.tolist()]


def headers(path: Path, keys: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """{key: (shape, numpy's letter for the kind of number)} of arrays of an .npz, read off their headers alone."""
    found = {}
    with zipfile.ZipFile(path) as z:
        for key in keys:
            with z.open(key + ".npy") as f:
                shape, _, dtype, _ = limits.array_header(f)  # type: ignore[arg-type]
            found[key] = shape, dtype.kind
    return found


def are_pictures(shape: tuple[int, ...], kind: str, count: int) -> bool:
    """Whether an array of this shape and kind of number holds a picture for each of `count` images."""
    square = len(shape) == 3 or (len(shape) == 4 and bool({shape[1], shape[3]} & {1, 3, 4}))
    return square and shape[0] == count and kind in "buif"


def rows_of(splits: np.ndarray, split: str, where: str, count: int) -> np.ndarray:
    """bool (N,): the images of a split, of an array of its names or of numbers of SPLITS."""
    if splits.shape != (count,) or splits.dtype.kind not in "USiu":
        raise VgmError(f"'split' of {where} is not one name or number for each image", code=FAILED)
    numbers = splits.dtype.kind in "iu"
    names = [SPLITS[k] if k in range(3) else str(k) for k in splits.tolist()] if numbers else words(splits)
    rows = np.array([n == split for n in names])
    if not rows.any():
        raise usage(f"{where} has no split '{split}'", f"it has: {', '.join(sorted(set(names)))}")
    return rows


def no_split(where: str, split: str) -> VgmError:
    return usage(f"{where} has no splits", f"an array `split` of texts such as '{split}' gives an .npz some")


# -- procedural ------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 50, 47), "green": (60, 160, 70), "blue": (40, 100, 210), "yellow": (225, 185, 40)}


def shapes(count: int = 3000, size: int = 32, seed: int = 0) -> Arrays:
    """Coloured shapes on white: label = shape, caption "a red circle". Centre, radius and colour are drawn from `seed`.

    Edges are smoothed over one pixel; triangles point up.
    """
    rng = np.random.default_rng(seed)
    kinds = np.arange(count) % len(SHAPES)
    colours = rng.integers(len(COLOURS), size=count)
    radius = rng.uniform(0.15, 0.3, (count, 1, 1))  # of the side
    cx, cy = rng.uniform(radius + 0.02, 0.98 - radius, (2, count, 1, 1))
    at = (np.arange(size) + 0.5) / size
    x, y = at[None, None, :] - cx, at[None, :, None] - cy  # (N, 1, W), (N, H, 1)
    circle = np.hypot(x, y) - radius
    square = np.maximum(abs(x), abs(y)) - 0.85 * radius
    triangle = np.maximum(0.866 * abs(x) - 0.5 * y - 0.5 * radius, y - 0.5 * radius)
    distance = np.choose(kinds[:, None, None], [circle, square, triangle])  # (N, H, W), negative inside
    inside = (0.5 - distance * size).clip(0, 1)[..., None]
    paint = np.array(list(COLOURS.values()), np.float64)[colours][:, None, None]  # (N, 1, 1, 3)
    images = (255 * (1 - inside) + paint * inside + 0.5).astype(np.uint8)
    names = list(COLOURS)
    out = Arrays("shapes", images, kinds, [f"a {names[c]} {SHAPES[k]}" for c, k in zip(colours, kinds)])
    out.kind, out.class_names, out.stamp = "procedural", list(SHAPES), f"{count} {size} {seed}"
    return out
