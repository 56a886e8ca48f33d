"""Data sets: whatever images a user has, opened by path.

`open_dataset` knows image folders, .zip (EDM layout or a zipped folder), webdataset .tar shards, .npz arrays, folders
of latents, and the shipped sets. `loader.Batches` draws training batches from them, `latent_cache` keeps what a codec
makes of them, `pack` writes a set into one file.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_cli import limits
from vgm_cli.data.dataset import Contents, Dataset
from vgm_cli.data.source import Source, usage
from vgm_cli.errors import FAILED, VgmError, nearest
from vgm_cli.ui import counted, some, ui

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from vgm_cli.data.decode import File
    from vgm_cli.data.latents import Latents

__all__ = ["FORMATS", "SHIPPED", "Contents", "Dataset", "open_dataset", "tell", "tell_skipped"]

SHIPPED = {
    "mnist5k": "5,000 MNIST digits, 28 × 28 grey, 10 classes (LeCun, Cortes, Burges; CC BY-SA 3.0)",
    "openmoji": "1,909 colour emojis, 32 × 32, 8 classes, captions, line art, train and test (OpenMoji; CC BY-SA 4.0)",
    "shapes": "3,000 coloured shapes, 32 × 32 (or data.size), 3 classes, captions; drawn from a seed",
}
# Splits of shipped sets: train and test are all images, fit and val those of train. Recipes are chosen by training on
# fit and looking at val, and reported by training on train and measuring on test, which then chose nothing.
PARTS = ("train", "test", "fit", "val")
FORMATS = "an image folder, .zip, .tar (or a{000..009}.tar, or a folder of them), .npz, a folder of latents"


def open_dataset(
    path: str | Path | None = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    crop: str = "adm",
    labels: bool | None = None,
    label_key: str | None = None,
    split: str | None = None,
    columns: Sequence[str] = (),
    decode: str = "exact",
    quiet: bool = False,
    without: Callable[[str, Callable[[], File]], bool] | None = None,
) -> Dataset | Any:
    """Open a set of images (`Dataset`), or of latents (`vgm_cli.data.latents.Latents`).

    path: see FORMATS; None is the shipped mnist5k, other names of SHIPPED work too (write ./NAME for a folder of that
    name). size, channels: as found if None (rules: dataset.py). crop: adm, center, random, resize, none.
    labels: True refuses a set without. label_key: the column of metadata.jsonl, array of the .npz or key of the .json
    that holds the labels. split: train, val or test, where the set has them; of shipped sets see PARTS. columns: names
    of further pictures that are read with each image, such as line art or masks; images that have none are left out.
    decode: fast reads large JPEGs at a fraction of their size and resamples by torch, see `Dataset`. What was assumed
    or left out is told (`tell`), unless quiet. without: of a folder, (name, file to open) of pictures that do not
    belong to it.

    Raises VgmError: nothing there or unknown kind (exit code 2), labels or a column wanted but missing (2), empty or
    unreadable (1).
    """
    if path is not None and not isinstance(path, str):
        path = str(path)
    from vgm_cli.data.files import Folder

    source = shipped(path, size, split, columns) or find(path or "", label_key, split, columns)
    if without is not None and isinstance(source, Folder):
        source.leave_out(without)
    how = (size, channels, crop, columns, decode == "fast")
    dataset: Any = Dataset(source, *how) if isinstance(source, Source) else source
    if labels and not dataset.facts.num_classes:
        hint = source.no_labels if isinstance(source, Source) else "these latents were stored without"
        raise usage(f"{dataset.facts.root} has no labels", hint)
    if not quiet:
        tell(dataset)
    return dataset


def tell(dataset: Any) -> None:
    """Warn of what was assumed about a set, and of what was left out of it."""
    from vgm_cli.data.files import TEXTS

    f = dataset.facts
    for remark in f.remarks:
        ui.warn(remark)
    others = {suffix: n for suffix, n in f.others.items() if suffix not in TEXTS}
    if others:
        shown = some([f"{suffix} ({n:,})" for suffix, n in others.items()])
        ui.warn(f"{f.root}: {counted(sum(others.values()), 'file')} not used, being no pictures: {shown}")
    tell_skipped(dataset)


def tell_skipped(dataset: Any, after: int = 0) -> None:
    """Warn of unreadable files, of large sets of those met since `after` were known."""
    skipped = [str(name) for name in dataset.facts.skipped[after:]]
    if skipped:
        reason = getattr(dataset, "reasons", {}).get(skipped[0], "")
        why = "" if not reason else f" ({'no picture' if reason.startswith('cannot identify') else reason})"
        ui.warn(f"{dataset.facts.root}: {counted(len(skipped), 'unreadable picture')} left out: {some(skipped)}{why}")


def shipped(name: str | None, size: int | None, split: str | None = None, columns: Sequence[str] = ()) -> Source | None:
    """A set that comes with the package. VgmError: a split that it has not."""
    from vgm_cli.data.arrays import open_npz, shapes

    if name in (None, *SHIPPED) and split not in (None, *PARTS):
        raise usage(f"{name or 'mnist5k'} has no split '{split}'", f"it has {', '.join(PARTS)}")
    assets = Path(str(resources.files("vgm_cli") / "data" / "assets"))
    if name == "openmoji":
        source = open_npz(assets / "openmoji32.npz", None, split and ("test" if split == "test" else "train"), columns)
        source.root = name
        if split in ("fit", "val"):
            source.keep(every_tenth(len(source)) == (split == "val"))
        return source
    if name in (None, "mnist5k"):
        source = open_npz(assets / "mnist5k.npz")
        source.root = "mnist5k"
    elif name == "shapes":
        source = shapes(size=size or 32)
    else:
        return None
    if split is not None:
        test = every_tenth(len(source))
        val = every_tenth(len(source), 8)
        source.keep({"train": ~test, "test": test, "fit": ~test & ~val, "val": val}[split])
    return source


def every_tenth(n: int, first: int = 9) -> np.ndarray:
    """bool (n,): images first, first + 10, …; the shipped digits are sorted by class, so that all have as many."""
    import numpy as np

    return np.arange(n) % 10 == first


def find(path: str, label_key: str | None, split: str | None, columns: Sequence[str] = ()) -> Source | Latents:
    """The reader that fits what lies at `path`."""
    from vgm_cli.data.arrays import open_npz
    from vgm_cli.data.files import Folder, is_image
    from vgm_cli.data.tars import Tar, expand_braces
    from vgm_cli.data.zips import Zip

    if not path:
        raise usage("the path of the data is empty", f"known: {FORMATS}; shipped: {', '.join(SHIPPED)}")
    if len(path) > 4096 or "\0" in path:
        raise usage(f"the path of the data is no path: {limits.short(path)}")
    try:
        file = Path(path).expanduser()
    except RuntimeError as e:
        raise usage(f"{path}: {e}") from e
    suffix = file.suffix.lower()
    try:
        if split is not None and suffix == ".tar" and not file.is_dir():
            raise usage(f"{path} has no splits", "only folders, zips of folders and the shipped sets have them")
        if "{" in path and not file.exists():
            names = expand_braces(str(file.absolute()))
            return Tar([Path(p) for p in names], str(file.absolute()), label_key, columns)
        if file.is_dir():
            from vgm_cli.data.latents import is_latents, open_latents

            shards = sorted(p for p in file.glob("*.tar") if not p.name.startswith("."))
            if split is not None and (shards or is_latents(file)):
                raise usage(f"{path} has no splits", "only folders, zips of folders and the shipped sets have them")
            if shards:
                tar = Tar(shards, str(file.absolute()), label_key, columns)
                if any(is_image(p.name) for p in file.iterdir()):
                    tar.remarks.append(f"{file}: only its .tar files are read, the pictures beside them are not")
                return tar
            return open_latents(file) if is_latents(file) else Folder(file, split, label_key, columns)
        if not file.exists():
            close = nearest(path, SHIPPED)
            hint = (
                f"did you mean the shipped {close[0]}?" if close else f"known: {FORMATS}; shipped: {', '.join(SHIPPED)}"
            )
            raise usage(f"no such data: {path}", hint)
        limits.check_regular(file)
        if suffix == ".tar":
            return Tar([file], str(file.absolute()), label_key, columns)
        if suffix == ".zip":
            return Zip(file, split, label_key, columns)
        if suffix == ".npz":
            return open_npz(file, label_key, split, columns)
    except OSError as e:
        raise VgmError(f"{path} cannot be read: {e.strerror or e}", code=FAILED) from e
    if is_image(path):
        raise usage(f"{path} is one picture, not a data set", f"its folder is one: {file.parent}")
    raise usage(f"{path} is no kind of data set", f"known: {FORMATS}; shipped: {', '.join(SHIPPED)}")
