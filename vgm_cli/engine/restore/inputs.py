"""What a restoration is given: whole images to degrade, or images that are degraded already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vgm_cli import limits
from vgm_cli.data import SHIPPED, open_dataset
from vgm_cli.data.decode import SUFFIXES, Unreadable, image_files, load_image
from vgm_cli.data.transforms import crop_to
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.ui import counted, some, ui

T = TypeVar("T")

SHIPPED_N = 16  # images taken of a shipped set unless told otherwise


@dataclass
class Inputs:
    """The images of a restoration. names has one entry per image. truth (N, C, H, W) in [-1, 1] is None where only
    degraded images are given; measured (N, ...) is None where the tool degrades the truth itself."""

    names: list[str]
    truth: Tensor | None = None
    measured: Tensor | None = None
    labels: list[int] | None = None
    texts: list[str] | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def whole(self, start: int, stop: int) -> Tensor:
        """Images start to stop as they were given."""
        given = self.truth if self.measured is None else self.measured
        assert given is not None
        return given[start:stop]


def picked(count: int, n: int | None, all_of_it: bool) -> list[int]:
    """n positions spread evenly over count; None: all, or a few of a shipped set."""
    n = (count if all_of_it else min(SHIPPED_N, count)) if n is None else n
    if n > count:
        raise VgmError(f"-n {n}: the input has {count} image{'s' * (count != 1)}", code=USAGE)
    return [i * count // n for i in range(n)]


def usable(items: Iterable[T], check: Callable[[T], Any], name: Callable[[T], str], source: str) -> list[T]:
    """The items that a check accepts; the others are left out, counted and named, as unreadable pictures of a data set
    are. VgmError: it accepts none."""
    kept: list[T] = []
    refused: dict[str, VgmError] = {}
    for item in items:
        try:
            check(item)
            kept.append(item)
        except VgmError as e:
            refused[name(item)] = e
    first = next(iter(refused.values()), None)
    if first is not None and not kept:
        raise first
    if first is not None:
        ui.warn(f"{source}: {counted(len(refused), 'picture')} left out: {some(list(refused))} ({first.message})")
    return kept


def open_truth(
    source: str, shape: tuple[int, int, int], n: int | None, split: str | None, paired: bool = False
) -> Inputs:
    """Images to degrade, cropped to the model's shape; those of a folder that are smaller are left out, unless they are
    one half of pairs. VgmError: nothing there, no image as large as the model's."""
    channels, height, width = shape
    path = Path(source)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        image = decoded(path)
        check_large_enough(image.size, shape, path.name)
        pixels = np.array(crop_to(image.convert("L" if channels == 1 else "RGB"), height, "adm"))
        truth = torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)[None]
        return Inputs([path.stem], truth.float() / 127.5 - 1, source=str(path))
    dataset = open_dataset(source, size=height, channels=channels, split=split)
    rows = picked(len(dataset), n, source not in SHIPPED)

    def check(i: int) -> None:
        check_large_enough(dataset.source.header(int(dataset.rows[i]))[:2], shape, dataset.name(i))

    if paired:
        list(map(check, rows))
    rows = usable(rows, check, dataset.name, source)
    labels = dataset.labels()
    texts = dataset.gather(rows)["text"] if dataset.facts.captions else None
    return Inputs(
        [Path(dataset.name(i)).with_suffix("").as_posix() for i in rows],
        dataset.pixels(rows),
        labels=None if labels is None else [int(labels[i]) for i in rows],
        texts=texts,
        source=dataset.facts.root,
    )


def check_large_enough(size: tuple[int, int], shape: tuple[int, int, int], name: str) -> None:
    if size[0] < shape[2] or size[1] < shape[1]:
        message = f"{name} is {size[0]}x{size[1]}, smaller than the {shape[2]}x{shape[1]} that the model makes"
        raise VgmError(f"{message}: there is no truth to degrade", "--degraded if it is degraded already", USAGE)


def decoded(path: Path) -> Any:
    try:
        return load_image(path)
    except Unreadable as e:
        raise VgmError(f"{path} cannot be read: {e}", code=FAILED) from e


def open_measured(source: str, operator: Operator, n: int | None, paired: bool = False) -> Inputs:
    """Already degraded images: files as [-1, 1], or array "y" of an .npz as it is. Files of a folder that cannot be
    read, or are of another size than what the degradation makes of the model's images, are left out, unless they are
    one half of pairs. VgmError: nothing there, no such image.
    """
    shape = operator.measurement_shape
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        arrays = limits.read_npz(path, ["y"])
        if "y" not in arrays:
            raise VgmError(f"{source} has no array 'y'", "measurements.npz of an earlier restoration has", USAGE)
        y = torch.from_numpy(arrays["y"]).float()
        check_measured(tuple(y.shape[1:]), shape, source, operator)
        rows = picked(len(y), n, True)
        return Inputs([f"{i:06d}" for i in rows], measured=y[rows], source=source)
    files = image_files(source)
    files = [files[i] for i in picked(len(files), n, True)]
    read: dict[Path, Tensor] = {}

    def check(file: Path) -> None:
        image = decoded(file).convert("L" if shape[0] == 1 else "RGB")
        a = torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)
        check_measured(tuple(a.shape), shape, file.name, operator)
        read[file] = a.float() / 127.5 - 1

    if paired:
        list(map(check, files))
    files = usable(files, check, lambda file: file.name, source)
    return Inputs([f.stem for f in files], measured=torch.stack([read[f] for f in files]), source=source)


def check_measured(found: tuple[int, ...], wanted: tuple[int, ...], name: str, operator: Operator) -> None:
    if found != wanted:
        show = lambda s: "x".join(map(str, s))
        raise VgmError(
            f"{name} is {show(found)}; {operator.name} makes {show(wanted)} of the model's {show(operator.shape)}",
            "another model, other settings of the task, or --degrade if these are whole images; of an earlier "
            "restoration give measurements.npz, not its pictures",
            USAGE,
        )
