"""A set as one file: EDM's zip with dataset.json, ADM's .npz, or a webdataset .tar. Written whole or not at all.

Images are stored as they are trained on: square, one size, 8 bits, cropped once and for all. Torch-light.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vgm_cli import atomic
from vgm_cli.data.dataset import Dataset
from vgm_cli.errors import USAGE, VgmError

BATCH = 256  # images decoded at once


def png(image: np.ndarray) -> bytes:
    """image: uint8 (H, W, C), C in {1, 3}."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


Packed = tuple[np.ndarray, int | None, str | None, dict[str, np.ndarray]]


def items(dataset: Dataset, progress: Callable[[int], None]) -> Iterator[Packed]:
    """(uint8 (H, W, C), label, caption, {column: uint8 (H, W, C)}) of every image that can be read."""
    for i in range(len(dataset)):
        found = dataset.readable(i)
        if isinstance(found, tuple):
            batch = dataset.gather([i]) if dataset.columns else {}
            yield *found, {c: batch[c][0].permute(1, 2, 0).numpy() for c in dataset.columns}
        elif dataset.name(i) not in dataset.facts.skipped:
            dataset.facts.skipped.append(dataset.name(i))
        if (i + 1) % BATCH == 0 or i + 1 == len(dataset):
            progress(i + 1)


def write_zip(dataset: Dataset, path: Path, progress: Callable[[int], None]) -> int:
    """EDM's and StyleGAN's layout, stored uncompressed (the PNGs are compressed), names as dataset_tool.py gives them.

    dataset.json has `labels`, and beside it `class_names` and `captions`, which other readers pass over. Columns are
    NAME.COLUMN.png beside NAME.png, which metadata.jsonl says.
    """
    labels: list[list[Any]] = []
    captions: list[list[str]] = []
    rows: list[str] = []
    n = 0
    with atomic.replacing(path) as temp, zipfile.ZipFile(temp, "w", zipfile.ZIP_STORED) as z:
        for image, label, text, beside in items(dataset, progress):
            name = f"{n // 1000:05d}/img{n:08d}.png"
            z.writestr(zipfile.ZipInfo(name), png(image))
            row = {column: f"{name.removesuffix('.png')}.{column}.png" for column in beside}
            for column, picture in beside.items():
                z.writestr(zipfile.ZipInfo(row[column]), png(picture))
            rows += [json.dumps({"file_name": name, **{f"{c}_file_name": p for c, p in row.items()}})] if row else []
            labels += [[name, label]] if label is not None else []
            captions += [[name, text]] if text is not None else []
            n += 1
        listing: dict[str, Any] = {"labels": labels or None}
        if labels:
            listing["class_names"] = dataset.facts.class_names
        if captions:
            listing["captions"] = captions
        z.writestr(zipfile.ZipInfo("dataset.json"), atomic.dump_json(listing))
        if rows:
            z.writestr(zipfile.ZipInfo("metadata.jsonl"), "\n".join(rows))
    return n


def write_npz(dataset: Dataset, path: Path, progress: Callable[[int], None]) -> int:
    """ADM's layout: arr_0 uint8 (N, H, W, C), arr_1 int64 (N,) where labelled; captions, and every column under its
    name. Streamed: memory holds one image, and one picture of each column of all."""
    shape = (len(dataset), dataset.size, dataset.size, dataset.channels)
    labels: list[int] = []
    captions: list[str] = []
    columns: dict[str, list[np.ndarray]] = {c: [] for c in dataset.columns}
    skipped = len(dataset.facts.skipped)
    with atomic.replacing(path) as temp, zipfile.ZipFile(temp, "w", zipfile.ZIP_STORED) as z:
        with z.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})  # type: ignore[arg-type]
            for image, label, text, beside in items(dataset, progress):
                f.write(image.tobytes())
                labels += [label] if label is not None else []
                captions += [text or ""] if dataset.facts.captions else []
                for column, picture in beside.items():
                    columns[column].append(picture)
        missing = len(dataset.facts.skipped) - skipped
        if missing:  # the header has promised them
            raise VgmError(
                f"{missing} images cannot be read, e.g. {dataset.facts.skipped[-1]}",
                "an .npz wants their number beforehand: pack into a .zip, which leaves them out",
            )
        arrays = {"arr_1": np.array(labels, np.int64)} if labels else {}
        arrays |= {"captions": np.array(captions)} if captions else {}
        for key, array in (arrays | {c: np.stack(p) for c, p in columns.items()}).items():
            with z.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array(f, array, allow_pickle=False)
    return shape[0]


def write_tar(dataset: Dataset, path: Path, progress: Callable[[int], None]) -> int:
    """webdataset's layout: KEY.png, KEY.cls (the class number), KEY.txt (the caption), KEY.COLUMN.png."""
    n = 0
    with atomic.replacing(path) as temp, tarfile.open(temp, "w") as tar:
        for image, label, text, beside in items(dataset, progress):
            fields = {"png": png(image), **{f"{c}.png": png(picture) for c, picture in beside.items()}}
            if label is not None:
                fields["cls"] = str(label).encode()
            if text is not None:
                fields["txt"] = text.encode("utf-8", "replace")
            for field, content in fields.items():
                member = tarfile.TarInfo(f"{n:08d}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            n += 1
    return n


WRITERS = {".zip": write_zip, ".npz": write_npz, ".tar": write_tar}


def pack(dataset: Any, path: Path, progress: Callable[[int], None] = lambda done: None) -> int:
    """Write `dataset` to `path`, whose suffix says how; returns the number of images.

    progress(done) is called now and then. Raises VgmError for another suffix, for latents, and for a set that would
    replace itself.
    """
    check_target(path, overwrite=True)
    if not isinstance(dataset, Dataset):
        raise VgmError(f"{dataset.facts.root} holds latents, not images", "pack the images they were made from", USAGE)
    for file in dataset.source.files:
        refuse_itself(path, file)
    if path.suffix.lower() == ".tar" and os.path.realpath(path.parent) == os.path.realpath(dataset.facts.root):
        hint = "a folder with .tar files is read as those: name a file outside"
        raise VgmError(f"{path} would hide the pictures of {dataset.facts.root}", hint, USAGE)
    return WRITERS[path.suffix.lower()](dataset, path, progress)


def check_target(path: Path, overwrite: bool) -> None:
    """VgmError: a suffix that says no kind of file, a folder, a file that is there (unless `overwrite`)."""
    if path.suffix.lower() not in WRITERS:
        raise VgmError(f"{path}: unknown kind of file", f"known: {', '.join(WRITERS)}", USAGE)
    if path.is_dir():
        raise VgmError(f"{path} is a folder", f"name a file inside, such as {path / 'data.zip'}", USAGE)
    atomic.refuse_existing(path, overwrite)


def refuse_itself(path: Path, source: str) -> None:
    """VgmError when both are one file, by whatever names and links."""
    if os.path.realpath(path) == os.path.realpath(source) or (
        path.is_file() and os.path.isfile(source) and path.samefile(source)
    ):
        raise VgmError(f"{path} is the set itself", "name another file", USAGE)
