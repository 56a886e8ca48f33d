"""Image folders, and zips of them (zips.py): labels from class sub-folders or dataset.json, captions, splits.

Class sub-folders in sorted order are the classes; images beside them make the set unlabelled, as in a flat folder.
train/ val/ test/ folders are splits; classes are counted over all of them, so that their numbers agree. The EDM and
StyleGAN layout (NVlabs/edm dataset_tool.py) is {"labels": [[name, class], …] | null} in dataset.json, which then
decides alone; "class_names" and "captions" beside it are an extension of ours. Captions come from metadata.jsonl,
metadata.csv or metadata.tsv (file_name, text) anywhere in the set, or from a .txt file with the image's name; a flat
folder takes its classes from their column "label", where every image has one.

An image is what its suffix says, and a file of an unknown suffix whose content says so.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vgm_cli.data import columns
from vgm_cli.data.decode import SUFFIXES, File, Unreadable, load_image, read_header, suffix
from vgm_cli.data.source import Source, class_indices, no_label, usage
from vgm_cli.data.texts import LABEL, Names, Row, decode, is_table, key, parse_json, read_table
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.ui import counted, some

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}  # fmt: skip
SIDECARS = (".caption", ".txt")  # the last counts
NO_PICTURES = frozenset(  # known not to be pictures: never opened to see
    ".txt .caption .json .jsonl .csv .tsv .md .rst .html .htm .xml .yaml .yml .toml .ini .cfg .log .pdf .doc .docx .py "
    ".ipynb .sh .bat .js .css .npy .npz .pt .pth .ckpt .pkl .safetensors .h5 .hdf5 .mat .parquet .arrow .db .sqlite "
    ".zip .tar .gz .tgz .bz2 .xz .7z .rar .mp4 .mkv .avi .mov .webm .mp3 .wav .flac .ps .eps .svg .lnk .tmp".split()
)
TEXTS = frozenset(
    ".txt .caption .json .jsonl .csv .tsv .md .html .xml .yaml .yml .ini .db".split()
)  # lie about anywhere
LOOKED_AT = 1024  # caption files of a large set that are read at opening
LOOPS = 1000  # times that one folder may be met through links


def is_image(name: str) -> bool:
    """By its suffix alone."""
    return suffix(name) in SUFFIXES


def hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def tops(names: Iterable[str]) -> set[str]:
    """The first component of every name, "" for names at the root."""
    return {n.partition("/")[0] if "/" in n else "" for n in names}


class Files(Source):
    """Named files below one root. entries: {relative name: bytes}, hidden files left out."""

    def arrange(
        self,
        entries: dict[str, int],
        split: str | None,
        label_key: str | None,
        base: str = "",
        wanted: Sequence[str] = (),
    ) -> None:
        """Choose the split, list its images, find labels, captions and the wanted columns. base: a prefix of every
        image to leave off."""
        pictures = [n for n in sorted(entries) if n.startswith((base, "../")) and self.is_picture(n)]
        self.by_name = Names(pictures)
        self.named: dict[str, columns.Pairs] = {}
        rows = self.metadata(sorted(filter(is_table, entries), key=lambda n: (n.count("/"), n)))
        self.further, beside = columns.beside(pictures, wanted, self.named)
        self.columns = sorted(self.further)
        everything = [n for n in pictures if n not in beside]
        left = tops(n[len(base) :] for n in everything)
        if beside and len(left) == 1 and not left & {"", *SPLITS} and f"{base}dataset.json" not in entries:
            base += f"{left.pop()}/"  # images/ beside lineart/ is no class
        chosen, others = choose_split([n[len(base) :] for n in everything], split, self.root)
        prefix = base + chosen
        self.full = [n for n in everything if n.startswith(prefix)]
        self.skipped = sorted(n for n in self.skipped if n.startswith(prefix))
        self.names = [n[len(prefix) :] for n in self.full]
        self.sizes = [entries[n] for n in self.full]
        self.texts = {n: t for n, row in rows.items() if (t := row.text) is not None}
        texts = {n for n in entries if n.endswith(SIDECARS)}
        stems = {n: n[: len(n) - len(suffix(n))] for n in self.full} if texts else {}
        self.sidecars = {n: t for n, stem in stems.items() for end in SIDECARS if (t := stem + end) in texts}
        listing = next((f for p in (prefix, base, "") if (f := p + "dataset.json") in entries), None)
        if label_key is not None:
            self.from_column((key(label_key),), rows, f"column '{label_key}' of the metadata of {self.root}")
        elif listing is None or not self.from_listing(listing, prefix):
            self.from_folders([base + s for s in others] or [prefix], everything)
            if self.labels is None and rows and all(n in rows and rows[n].get(*LABEL) is not None for n in self.full):
                self.from_column(LABEL, rows, f"the metadata of {self.root}")
        if not others:
            self.look_for_splits(self.names)
        self.captioned = bool(self.sidecars) or any(n in self.texts for n in self.full)
        if self.captioned:
            self.check_captions()
        known, images = {*pictures, *filter(is_table, entries), listing}, {n.rpartition(".")[0] for n in everything}
        for n in entries:
            if n not in known and not ((end := suffix(n)) in SIDECARS and n.rpartition(".")[0] in images):
                self.others[end or "no suffix"] += 1

    def is_picture(self, name: str) -> bool:
        end = suffix(name)
        if end in SUFFIXES or end in NO_PICTURES:
            return end in SUFFIXES
        try:
            read_header(self.open(name))
            return True
        except (Unreadable, OSError):
            return False

    def look_for_splits(self, names: list[str]) -> None:
        """Says so where folders named like splits are taken for classes, since something lies beside them."""
        found = sorted(t for t in tops(names) if t.lower() in SPLITS)
        if len(found) > 1 or (found and any(n.startswith(f"{found[0]}/") and n.count("/") > 1 for n in names)):
            beside = some(
                sorted({n if "/" not in n else n.partition("/")[0] + "/" for n in names} - {f"{t}/" for t in found})
            )
            best = next((t for t in found if SPLITS[t.lower()] == "train"), found[0])
            verb = "look like splits" if len(found) > 1 else "looks like a split"
            self.no_labels = f"{' and '.join(found)} {verb}: data.split={best}"
            self.remarks.append(
                f"{self.root}: {' and '.join(f'{t}/' for t in found)} {verb}, but {beside} lies beside, so that all of "
                f"it is one set; data.split={best} (--split {best}) takes {best}/ alone"
            )

    def from_column(self, columns: tuple[str, ...], rows: dict[str, Row], where: str) -> None:
        """Labels of the metadata's rows."""
        missing = [n for n in self.full if n not in rows or rows[n].get(*columns) is None]
        if missing:
            raise no_label(where, missing[0])
        self.labels, self.class_names = class_indices([rows[n].get(*columns) for n in self.full], where, self.remarks)

    def from_folders(self, prefixes: list[str], everything: list[str]) -> None:
        """Class sub-folders, where every image lies in one."""
        loose = [n for n in self.names if "/" not in n]
        if loose or not self.names:
            if len(loose) < len(self.names):
                self.no_labels = f"{loose[0]} lies beside the class folders: move it into one"
            return
        self.class_names = sorted(
            {c for p in prefixes for c in tops(n[len(p) :] for n in everything if n.startswith(p)) if c}
        )
        index = {c: i for i, c in enumerate(self.class_names)}
        values = [index[n.partition("/")[0]] for n in self.names]
        self.labels, _ = class_indices(values, self.root, None, self.class_names)
        inner = {n.split("/")[1] for n in self.names if n.count("/") > 1}
        if len(self.class_names) == 1 and len(inner) > 1:
            one = self.class_names[0]
            self.remarks.append(f"{self.root}: all images lie in {one}/, one class; {one}/ alone has {len(inner)}")

    def from_listing(self, listing: str, prefix: str) -> bool:
        """dataset.json; False when it is some other file of that name."""
        where = f"{listing} in {self.root}"
        content = parse_json(self.text(listing), where)
        if not isinstance(content, dict) or "labels" not in content:
            return False
        self.no_labels = "dataset.json holds no labels"
        found = {what: self.listed(content.get(what), what, listing, where) for what in ("labels", "captions")}
        self.texts |= {n: str(t) for n, t in found["captions"].items()}
        if not content["labels"]:
            return True
        names = content.get("class_names") or []
        if not isinstance(names, list) or len(set(map(str, names))) < len(names):
            raise VgmError(f"{where}: 'class_names' is not a list of different names", code=FAILED)
        for full, name in zip(self.full, self.names):
            if full not in found["labels"]:
                raise no_label(where, name)
        labels = [found["labels"][n] for n in self.full]
        self.labels, own = class_indices(labels, where, self.remarks, names)
        self.class_names = list(map(str, names)) or own
        return True

    def listed(self, pairs: Any, what: str, listing: str, where: str) -> dict[str, Any]:
        """{image: value} of a list of [name, value]."""
        try:
            values = {str(name): value for name, value in (pairs.items() if isinstance(pairs, dict) else pairs or [])}
        except (TypeError, ValueError) as e:
            raise VgmError(f"{where}: '{what}' is not a list of [name, {what[:-1]}]", code=FAILED) from e
        found = self.by_name.match(list(values), listing.rpartition("/")[0])
        self.say_lost([n for n, f in zip(values, found) if f is None], len(values), f"{what} of {where}")
        return {f: v for f, v in zip(found, values.values()) if f is not None}

    def say_lost(self, lost: list[str], of: int, where: str) -> None:
        if lost:
            self.remarks.append(f"{where}: {len(lost)} of {of} rows meet no image, such as {some(lost)}")

    def metadata(self, tables: list[str]) -> dict[str, Row]:
        """{image: its row} of every metadata file, of whichever split; a deeper one counts more."""
        rows: dict[str, Row] = {}
        for table in tables:
            where = f"{table} in {self.root}"
            found = read_table(table, self.text(table), where)
            folder = table.rpartition("/")[0]
            images = self.by_name.match([r.file for r in found], folder)
            match = partial(self.by_name.match, folder=folder)
            for column, pairs in columns.named_in(found, images, match).items():
                self.named.setdefault(column, {}).update(pairs)
            self.say_lost([r.file for r, image in zip(found, images) if image is None], len(found), where)
            met: dict[str, Row] = {}
            for row, image in zip(found, images):
                if image is not None:
                    met[image] = row
            twice = sum(image is not None for image in images) - len(met)
            if twice:
                self.remarks.append(f"{where}: {counted(twice, 'row')} repeat an image; its last row counts")
            for image, row in met.items():
                rows[image] = Row(row.file, {**(rows[image].fields if image in rows else {}), **row.fields})
        return rows

    def check_captions(self) -> None:
        """Says which images have none, and reads caption files (some of many) to say which are not UTF-8."""
        without = [n for f, n in zip(self.full, self.names) if f not in self.texts and f not in self.sidecars]
        if without:
            count = f"{len(without)} of {counted(len(self.names), 'image')}"
            self.remarks.append(f"{self.root}: {count} have no caption, such as {some(without)}")
        files = list(self.sidecars.values())
        guessed: list[str] = []
        for name in files[:: max(1, len(files) // LOOKED_AT)]:
            decode(self.get(name), f"{name} in {self.root}", guessed)
        if guessed:
            self.remarks.append(f"{counted(len(guessed), 'text')} not in UTF-8, read as cp1252: {some(guessed)}")

    def caption(self, i: int) -> str | None:
        name = self.full[i]
        if name in self.sidecars:
            return decode(self.get(self.sidecars[name]), f"{self.sidecars[name]} in {self.root}").strip()
        return self.texts.get(name)

    def text(self, name: str) -> str:
        """The content of a text file; says so where its encoding is a guess."""
        guessed: list[str] = []
        text = decode(self.get(name), f"{name} in {self.root}", guessed)
        self.remarks += [f"{g} is not UTF-8: read as cp1252" for g in guessed]
        return text

    def read(self, i: int) -> bytes:
        return self.get(self.full[i])

    def has(self, column: str, i: int) -> bool:
        return self.full[i] in self.further.get(column, {})

    def beside(self, column: str, i: int) -> Image.Image:
        return load_image(self.open(self.further[column][self.full[i]]))

    def digest_beside(self, column: str, i: int) -> bytes:
        return hashlib.blake2b(self.get(self.further[column][self.full[i]]), digest_size=16).digest()

    @abstractmethod
    def get(self, name: str) -> bytes:
        """The content of one file."""
        ...

    def open(self, name: str) -> File:
        """What a decoder opens."""
        return io.BytesIO(self.get(name))

    def stream(self, i: int) -> File:
        return self.open(self.full[i])


def choose_split(names: list[str], split: str | None, root: str) -> tuple[str, list[str]]:
    """(prefix of the chosen split, prefixes of all splits); ("", []) where there are none.

    Without a wish, folders are splits only when every top folder is named like one; train comes first.
    """
    found = {SPLITS[t.lower()]: t for t in sorted(tops(names), reverse=True) if t.lower() in SPLITS}
    prefixes = [f"{t}/" for t in found.values()]
    if split is not None:
        wanted = SPLITS.get(split.lower(), split)
        if wanted not in found:
            raise usage(f"{root} has no split '{split}'", f"it has: {', '.join(sorted(found)) or 'none'}")
        return f"{found[wanted]}/", prefixes
    if found and len(found) == len(tops(names)):
        return f"{found[next(s for s in ('train', 'val', 'test') if s in found)]}/", prefixes
    return "", []


class Folder(Files):
    """Images below a folder."""

    kind = "folder"

    def __init__(
        self, path: Path, split: str | None = None, label_key: str | None = None, wanted: Sequence[str] = ()
    ) -> None:
        super().__init__(str(path.absolute()))
        self.path = path
        entries = dict(self.walk(path))
        for column in wanted:  # images/ is named, lineart/ lies beside it
            inside = any(f"/{column}/" in f"/{n}" or f".{column}." in n for n in entries)
            if not inside and (path.absolute().parent / column).is_dir():
                entries |= {f"../{column}/{n}": size for n, size in self.walk(path.absolute().parent / column)}
        self.arrange(entries, split, label_key, "", wanted)

    def walk(self, root: Path) -> Iterator[tuple[str, int]]:
        """(relative name, bytes) of every file below a folder. Linked folders are followed; only a link back up is cut,
        so that what is found doesn't depend on the order in which the file system lists it."""
        pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
        met: Counter[str] = Counter()
        while pending:
            prefix, above = pending.pop()
            met[above[-1]] += 1
            if met[above[-1]] > LOOPS:
                raise VgmError(f"{self.root}: links lead to {above[-1]} again and again", "remove them", FAILED)
            with os.scandir(root / prefix) as entries:
                for e in entries:
                    if hidden(e.name):
                        continue
                    link = e.is_symlink()  # of a link to itself, DirEntry's own is_dir raises
                    if os.path.isdir(e.path) if link else e.is_dir():
                        real = os.path.realpath(e.path) if link else os.path.join(above[-1], e.name)
                        if real not in above:
                            pending.append((f"{prefix}{e.name}/", (*above, real)))
                    elif os.path.isfile(e.path) if link else e.is_file():
                        yield prefix + e.name, e.stat().st_size
                    elif is_image(e.name):  # a link to nothing, a pipe
                        self.skipped.append(prefix + e.name)

    def leave_out(self, unwanted: Callable[[str, Callable[[], File]], bool]) -> None:
        """Drop the pictures that do not belong to the set, and say so."""
        keep = [not unwanted(name, partial(self.open, full)) for name, full in zip(self.names, self.full)]
        if all(keep):
            return
        gone = [name for name, kept in zip(self.names, keep) if not kept]
        self.full = [n for n, kept in zip(self.full, keep) if kept]
        self.names = [n for n, kept in zip(self.names, keep) if kept]
        self.sizes = [n for n, kept in zip(self.sizes, keep) if kept]
        self.labels = None if self.labels is None else self.labels[keep]
        self.remarks.append(f"{self.root}: {counted(len(gone), 'picture')} made of others left out: {some(gone)}")

    def get(self, name: str) -> bytes:
        return (self.path.absolute() / name).read_bytes()

    def open(self, name: str) -> File:
        return self.path.absolute() / name
