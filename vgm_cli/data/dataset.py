"""A data set as the rest of the toolkit sees it: square uint8 images of one size, labels, captions, facts. Torch-light.

Sets of up to VERIFY images that fit into MEMORY bytes are decoded once, at opening: unreadable files are named, counted
and left out, and batches are slices of one tensor. Larger sets are decoded when read; an unreadable image is then
replaced by the next readable one, counted too.

Size: the images' side if all are squares of one size; otherwise their most common short side (the smaller of equals),
rounded down to a multiple of 8. Channels: 1 if every image is grey, else 3. Both are read off the headers, of all
images up to VERIFY, of SAMPLE evenly spaced ones beyond.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vgm_cli.data import fingerprint
from vgm_cli.data.decode import Unreadable, in_mode
from vgm_cli.data.source import Source, usage
from vgm_cli.data.threads import parallel
from vgm_cli.data.transforms import check_crop, crop_to, least_side, stacked
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.ui import counted, some, ui

if TYPE_CHECKING:
    from torch import Tensor

VERIFY = 20_000  # images
MEMORY = 2**30  # bytes of decoded pixels
SAMPLE = 1024  # headers read of larger sets
GIVE_UP = 1000  # unreadable images in a row

Item = tuple[np.ndarray, int | None, str | None]
T = TypeVar("T")


@dataclass
class Contents:
    """What the images are. size: pixels per side. skipped: names of unreadable files. labels: (count,) int64 or None.

    kind: folder, zip, tar, npz, procedural, latent-cache, latents-folder; of latents, size and channels are theirs.
    root: what `open_dataset` opens it by again. others: files that are no pictures, by suffix. remarks: sentences on
    what was assumed or left out. columns: channels of further pictures that are read with each image, by name.
    """

    size: int
    channels: int
    num_classes: int
    class_names: list[str]
    count: int
    kind: str
    root: str
    captions: bool = False
    skipped: list[str] = field(default_factory=list)
    labels: np.ndarray | None = None
    others: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)


class Dataset:
    """Images of a source, cropped to one size. Map-style: `item(i)`, `gather(indices)`, `pixels(indices)`.

    fast: large JPEGs are decoded at a fraction of their size (`load_image`), crops resampled by torch (transforms.py).
    """

    def __init__(
        self,
        source: Source,
        size: int | None = None,
        channels: int | None = None,
        crop: str = "adm",
        columns: Sequence[str] = (),
        fast: bool = False,
    ) -> None:
        self.source, self.crop, self.fast = source, check_crop(crop), fast
        self.memory: Tensor | None = None  # (N, C, H, W) uint8
        self.beside: dict[str, Tensor] = {}  # pictures of the columns, like memory
        self.reasons: dict[str, str] = {}  # why pictures were left out
        self.late = 0  # unreadable pictures met after opening
        if channels not in (None, 1, 3):
            raise usage(f"channels={channels}: images have 1 or 3", "leave it open to take what the images have")
        if size is not None and size < 1:
            raise usage(f"size={size}: at least one pixel is needed")
        if not len(source):
            hint = "png, jpg, webp, bmp, gif, tiff, ppm are images"
            if source.others or source.skipped:
                left = [f"{suffix} ({n})" for suffix, n in source.others.most_common()] + source.skipped
                hint = f"it holds {some(left, 5)}; {hint}"
            raise VgmError(f"no images in {source.root}: the set is empty", hint, FAILED)
        self.rows = np.arange(len(source))
        skipped = list(source.skipped)
        found_size, found_channels = self._look(skipped)
        self.size, self.channels = size or found_size, channels or found_channels
        remarks = list(source.remarks)
        if self.channels != found_channels:
            turned = (
                "colour pictures are turned grey" if found_channels == 3 else "grey pictures get three equal channels"
            )
            remarks.append(f"{source.root}: {turned}")
        self.columns = {name: self._look_beside(name, skipped, remarks) for name in columns}
        small = len(self.rows) <= VERIFY and len(self.rows) * self.channels * self.size**2 <= MEMORY
        if small and source.pixels() is None:
            self._decode_all(skipped)
        elif small and crop != "random":
            self._take_array()
        if self.memory is not None:
            self._decode_beside()
        labels = None if source.labels is None else source.labels[self.rows]
        names = list(source.class_names)
        total = 0 if source.labels is None else max(len(names), int(source.labels.max(initial=-1)) + 1)
        self.facts = Contents(
            self.size, self.channels, total, names + [str(i) for i in range(len(names), total)], len(self.rows),
            source.kind, source.root, source.captioned, skipped, labels, dict(source.others.most_common()), remarks,
            self.columns,
        )  # fmt: skip

    # -- opening ----------------------------------------------------------------------------------------------------

    def _look(self, skipped: list[str]) -> tuple[int, int]:
        """(size, channels) from headers; of small sets, files without a readable one are left out."""
        n = len(self.rows)
        every = n <= VERIFY and self.source.pixels() is None
        wanted = np.arange(n) if every else np.unique(np.linspace(0, n - 1, SAMPLE).astype(int))
        if self.source.pixels() is not None:
            wanted = wanted[:1]
        heads = parallel(lambda i: self._try(self.source.header, int(i)), wanted)
        good = [h for h in heads if not isinstance(h, Unreadable)]
        if every:
            self._leave_out([isinstance(h, Unreadable) for h in heads], skipped, heads)
        if not good:
            raise self._nothing(heads)
        sides = {(w, h) for w, h, _ in good}
        if self.crop == "none" and (len(sides) > 1 or len({s for side in sides for s in side}) > 1):
            shown = ", ".join(f"{w}×{h}" for w, h in sorted(sides)[:3])
            raise usage(
                f"the images of {self.source.root} are not squares of one size: {shown}", "crop=adm makes them so"
            )
        short = Counter(min(w, h) for w, h, _ in good)
        size = min(short, key=lambda s: (-short[s], s))
        if len(sides) > 1 or next(iter(sides)) != (size, size):
            size = max(size // 8 * 8, min(size, 8))
        return size, 1 if all(grey for *_, grey in good) else 3

    def _look_beside(self, column: str, skipped: list[str], remarks: list[str]) -> int:
        """Channels of a column's pictures; images without one are left out, of small sets also those whose picture has
        no readable header."""
        if column not in self.source.columns:
            known = f"it has {', '.join(self.source.columns)}; " if self.source.columns else ""
            where = f"NAME.{column}.png beside NAME.png, a folder {column}/ of the same names, or an array of an .npz"
            raise usage(f"{self.source.root} has no '{column}' beside its images", f"{known}{where}")
        with_one = np.array([self.source.has(column, int(r)) for r in self.rows])
        if not with_one.all():
            gone = [self.source.names[r] for r in self.rows[~with_one]]
            remarks.append(
                f"{self.source.root}: {counted(len(gone), 'image')} without '{column}' left out: {some(gone)}"
            )
            self.rows = self.rows[with_one]
        n = len(self.rows)
        every = n <= VERIFY and self.source.pixels() is None
        wanted = np.arange(n) if every else np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(int))
        rows = self.rows[wanted if self.source.pixels() is None else wanted[:1]]
        found = parallel(lambda r: self._try(lambda i: self.source.beside(column, i).mode, int(r)), rows)
        if every:
            self._leave_out([isinstance(m, Unreadable) for m in found], skipped, found)
        if not len(self.rows):
            raise VgmError(f"no image of {self.source.root} has a readable '{column}'", code=FAILED)
        return 1 if all(m == "L" for m in found if isinstance(m, str)) else 3

    def _decode_beside(self) -> None:
        """Every column's pictures, beside the images in memory."""
        import torch

        for column in self.columns:
            pictures = parallel(partial(self._picture, column), self.rows)
            self.beside[column] = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def _decode_all(self, skipped: list[str]) -> None:
        """Every image through its crop; kept unless the crop differs each time."""
        import torch

        memory = np.empty((len(self.rows), self.size, self.size, self.channels), np.uint8)

        def one(i: int) -> Unreadable | None:
            image = self._try(self._decode, int(self.rows[i]))
            if isinstance(image, Unreadable):
                return image
            memory[i] = image
            return None

        errors = parallel(one, range(len(self.rows)))
        bad = [e is not None for e in errors]
        self._leave_out(bad, skipped, errors)
        if self.crop != "random":
            self.memory = (
                torch.from_numpy(memory[~np.array(bad)] if any(bad) else memory).permute(0, 3, 1, 2).contiguous()
            )

    def _take_array(self) -> None:
        """An array source: no decoding, and no Python per image where size and channels are as found."""
        import torch

        pixels = self.source.pixels()
        assert pixels is not None
        if pixels.shape[1:] != (self.size, self.size, self.channels):
            pixels = np.stack([self._decode(i) for i in range(len(self.rows))])
        self.memory = torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))

    def _leave_out(self, bad: Sequence[bool], skipped: list[str], errors: Sequence[Any]) -> None:
        if any(bad):
            names = [self.source.names[i] for i in self.rows[np.array(bad)]]
            skipped += names
            self.reasons |= dict(zip(names, (str(e) for e in errors if isinstance(e, Unreadable))))
            if all(bad):
                raise self._nothing(errors)
            self.rows = self.rows[~np.array(bad)]

    def _nothing(self, errors: Sequence[Any]) -> VgmError:
        n, first = len(self.source), self.source.names[int(self.rows[0])]
        reason = next((str(e) for e in errors if isinstance(e, Unreadable)), "")
        return VgmError(f"none of the {n} images in {self.source.root} can be read, e.g. {first}", reason, FAILED)

    @staticmethod
    def _try(read: Callable[[int], T], i: int) -> T | Unreadable:
        try:
            return read(i)
        except Unreadable as e:
            return e
        except (OSError, ArithmeticError, ValueError) as e:
            return Unreadable(str(e))
        except Exception as e:
            if type(e).__module__ in ("zlib", "struct", "zipfile"):  # a damaged archive member
                return Unreadable(str(e))
            raise

    # -- reading ----------------------------------------------------------------------------------------------------

    def _decode(self, row: int, rng: random.Random | None = None) -> np.ndarray:
        """Source image -> uint8 (H, W, C)."""
        least = least_side(self.size, self.crop) if self.fast and not self.columns else 0  # columns have whole sizes
        image = in_mode(self.source.image(row, least), "L" if self.channels == 1 else "RGB")
        a = np.asarray(crop_to(image, self.size, self.crop, rng, self.fast))
        if a.shape[:2] != (self.size, self.size):
            name, shape = self.source.names[row], f"{a.shape[1]}×{a.shape[0]}"
            raise usage(f"{name} is {shape}, not {self.size}×{self.size}", "crop=adm makes all images one size")
        return a[..., None] if a.ndim == 2 else a

    def _picture(self, column: str, row: int, rng: random.Random | None = None) -> np.ndarray:
        """What lies beside a source image -> uint8 (H, W, C), cut as the image is."""
        image = in_mode(self.source.beside(column, row), "L" if self.columns[column] == 1 else "RGB")
        a = np.asarray(crop_to(image, self.size, "resize" if self.crop == "none" else self.crop, rng, self.fast))
        return a[..., None] if a.ndim == 2 else a

    def _pictures(self, row: int, seed: int | None = None) -> list[np.ndarray]:
        """Those of every column. seed: of the windows of crop=random."""
        return [self._picture(c, row, None if seed is None else random.Random(seed)) for c in self.columns]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.source.names[int(self.rows[i])]

    def readable(self, i: int, rng: random.Random | None = None) -> Item | Unreadable:
        """Item i itself, or why it cannot be read."""
        row = int(self.rows[i])
        if self.memory is not None:
            image: Any = self.memory[i].permute(1, 2, 0).numpy()
        else:
            image = self._try(lambda r: self._decode(r, rng), row)
            if isinstance(image, Unreadable):
                return image
        labels = self.source.labels
        return image, None if labels is None else int(labels[row]), self.caption(i)

    def caption(self, i: int) -> str | None:
        """None where the image has none, or one that cannot be read."""
        try:
            text = self._try(self.source.caption, int(self.rows[i]))
        except VgmError:
            return None
        return None if isinstance(text, Unreadable) else text

    def item(self, i: int, rng: random.Random | None = None) -> Item:
        """(uint8 (H, W, C), label or None, caption or None). rng: draws the window of crop=random.

        An image that cannot be read is replaced by the next one that can, and named in `facts.skipped`.
        """
        return self._whole(i, rng)[0]

    def _whole(
        self, i: int, rng: random.Random | None = None, seed: int | None = None
    ) -> tuple[Item, list[np.ndarray]]:
        """An item and the pictures of every column, in their order. seed: of rng, to cut the pictures as the image."""
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"item {i} of {n}")
        for k in range(min(n, GIVE_UP)):
            at = (i + k) % n
            found = self.readable(at, rng)
            if not isinstance(found, Unreadable):
                beside = self._try(lambda row: self._pictures(row, seed), int(self.rows[at]))
                if not isinstance(beside, Unreadable):
                    return found, beside
                rng = rng if seed is None else random.Random(seed)
            self.skip(self.name(at))
        raise VgmError(
            f"{self.source.root}: {min(n, GIVE_UP)} images in a row cannot be read", f"from {self.name(i)} on"
        )

    def skip(self, name: str) -> None:
        """Note a picture that turned out to be unreadable; the first, the tenth, the hundredth … is told."""
        import torch

        if name in self.facts.skipped:
            return
        self.facts.skipped.append(name)
        self.late += 1
        if torch.utils.data.get_worker_info() is None and self.late in (1, 10, 100, 1000, 10_000):
            found = f"{counted(self.late, 'picture')} that cannot be read so far, now {name}"
            ui.warn(f"{self.source.root}: {found}; the next takes its place")

    def gather(
        self, index: Iterable[int], flip: Any = None, seeds: Sequence[int] | None = None, labels: bool = True
    ) -> dict[str, Any]:
        """Items as one batch: "x" uint8 (B, C, H, W), "label" int64 (B,) if labelled, "text" if captioned, and every
        column's pictures under its name, like x.

        flip: bool (B,), which to mirror. seeds: one per item, for crop=random.
        """
        import torch

        at = torch.as_tensor(list(index) if not isinstance(index, torch.Tensor) else index)
        batch: dict[str, Any] = {}
        if self.memory is not None:
            batch["x"] = self.memory[at]
            batch |= {column: pictures[at] for column, pictures in self.beside.items()}
            y = None if self.facts.labels is None else self.facts.labels[at.numpy()]
            texts = [self.caption(i) for i in at.tolist()] if self.facts.captions else None
        else:
            each = [(i, seeds[k] if seeds else None) for k, i in enumerate(at.tolist())]
            whole = [self._whole(i, None if s is None else random.Random(s), s) for i, s in each]
            items = [item for item, _ in whole]
            batch["x"] = stacked([x for x, _, _ in items], self.size, self.channels, flip)
            for k, (column, channels) in enumerate(self.columns.items()):
                batch[column] = stacked([pictures[k] for _, pictures in whole], self.size, channels, flip)
            y = None if self.facts.labels is None else np.array([label for _, label, _ in items], np.int64)
            texts = [text for *_, text in items] if self.facts.captions else None
        if flip is not None and self.memory is not None:
            mask = torch.as_tensor(flip)
            for key in ("x", *self.columns):
                batch[key][mask] = batch[key][mask].flip(-1)
        if labels and y is not None:
            batch["label"] = torch.from_numpy(y)
        if texts is not None:
            batch["text"] = [t or "" for t in texts]
        return batch

    def images(self, index: Iterable[int]) -> Tensor:
        """uint8 (B, C, H, W)."""
        return self.gather(index)["x"]

    def pixels(self, index: Iterable[int]) -> Tensor:
        """float32 (B, C, H, W) in [-1, 1]."""
        return to_float(self.images(index))

    def labels(self) -> np.ndarray | None:
        """(N,) int64, or None."""
        return self.facts.labels

    # -- identity ---------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Changes with any name, pixel, label or caption of the set, and with size, channels and crop; neither with
        where it lies nor with the order in which a file system lists it. See `fingerprint.py`."""
        return fingerprint.of_images(self)

    def describe(self) -> dict[str, Any]:
        """For the run's data.json. The model's size, channels and number of classes are not here: they may differ
        (codec, labels off) and the run writes its own."""
        f = self.facts
        return {"root": f.root, "kind": f.kind, "count": f.count, "image_size": f.size, "image_channels": f.channels,
                "crop": self.crop, "captions": f.captions, "class_names": f.class_names,
                "skipped": len(f.skipped), **({"decode": "fast"} if self.fast else {})}  # fmt: skip


def to_float(x: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return x.float().div_(127.5).sub_(1)
