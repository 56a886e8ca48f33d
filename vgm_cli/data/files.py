"""Image folders, and zips of them: labels from class sub-folders or dataset.json, captions, splits.

Class sub-folders in sorted order are the classes; images beside them make the set unlabelled, as in a flat folder.
train/ val/ test/ folders are splits; classes are counted over all of them, so that their numbers agree. The EDM and
StyleGAN layout (NVlabs/edm dataset_tool.py) is {"labels": [[name, class], …] | null} in dataset.json, which then
decides alone; "class_names" and "captions" beside it are an extension of ours. Captions come from metadata.jsonl or
metadata.csv (file_name, text) beside the images, or from a .txt file with the image's name.
"""

from __future__ import annotations

import csv
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from vgm_cli.data.decode import SUFFIXES, File
from vgm_cli.data.source import Source, class_indices, no_label, parse_json, usage
from vgm_cli.errors import FAILED, VgmError

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
          "testing": "test"}  # fmt: skip


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def tops(names: Iterable[str]) -> set[str]:
    """The first component of every name, "" for names at the root."""
    return {n.partition("/")[0] if "/" in n else "" for n in names}


class Files(Source):
    """Named files below one root. entries: {relative name: bytes}, hidden files left out."""

    def arrange(self, entries: dict[str, int], split: str | None, label_key: str | None, base: str = "") -> None:
        """Choose the split, list its images, find labels and captions. base: a prefix of every name to leave off."""
        everything = [n for n in entries if n.startswith(base) and is_image(n)]
        chosen, others = choose_split([n[len(base) :] for n in everything], split, self.root)
        prefix = base + chosen
        self.full = sorted(n for n in everything if n.startswith(prefix))
        self.names = [n[len(prefix) :] for n in self.full]
        self.sizes = [entries[n] for n in self.full]
        rows = dict(self.metadata(n for n in entries if n.startswith(prefix)))
        self.texts = {n: str(t) for n in rows if (t := rows[n].get("text", rows[n].get("caption"))) is not None}
        self.sidecars = {n: t for n in self.full if (t := str(PurePosixPath(n).with_suffix(".txt"))) in entries}
        listing = prefix + "dataset.json"
        if label_key is not None:
            where = f"column '{label_key}' of the metadata of {self.root}"
            missing = [n for n in self.full if rows.get(n, {}).get(label_key) is None]
            if missing:
                raise no_label(where, missing[0])
            self.labels, self.class_names = class_indices([rows[n][label_key] for n in self.full], where)
        elif listing not in entries or not self.from_listing(listing, prefix):
            self.from_folders([base + s for s in others] or [prefix], everything)
        self.captioned = bool(self.texts or self.sidecars)

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
        self.labels, _ = class_indices([index[n.partition("/")[0]] for n in self.names], self.root)

    def from_listing(self, listing: str, prefix: str) -> bool:
        """dataset.json; False when it is some other file of that name."""
        where = f"{listing} in {self.root}"
        content = parse_json(self.get(listing), where)
        if not isinstance(content, dict) or "labels" not in content:
            return False
        self.no_labels = "dataset.json holds no labels"
        self.texts |= {prefix + n: str(t) for n, t in content.get("captions") or []}
        if not content["labels"]:
            return True
        try:
            labels = {str(name).replace("\\", "/"): label for name, label in dict(content["labels"]).items()}
        except (TypeError, ValueError) as e:
            raise VgmError(f"{where}: 'labels' is not a list of [name, class]", code=FAILED) from e
        for name in self.names:
            if name not in labels:
                raise no_label(where, name)
        self.labels, names = class_indices([labels[n] for n in self.names], where)
        self.class_names = list(content.get("class_names") or names)
        return True

    def metadata(self, names: Iterable[str]) -> Iterator[tuple[str, dict]]:
        """(image name, row) of every metadata.jsonl and metadata.csv; file_name is relative to the file's folder."""
        for name in names:
            folder, _, base = name.rpartition("/")
            if base not in ("metadata.jsonl", "metadata.csv"):
                continue
            text = self.get(name).decode("utf-8-sig")
            if base.endswith(".csv"):
                rows = list(csv.DictReader(io.StringIO(text)))
            else:
                rows = [parse_json(t, f"{name} line {i}") for i, t in enumerate(text.splitlines(), 1) if t.strip()]
            for row in rows:
                if not isinstance(row, dict) or "file_name" not in row:
                    raise VgmError(f"{name} in {self.root}: a row has no file_name", code=FAILED)
                yield (f"{folder}/" if folder else "") + str(row["file_name"]).removeprefix("./"), row

    def caption(self, i: int) -> str | None:
        name = self.full[i]
        if name in self.sidecars:
            return self.get(self.sidecars[name]).decode("utf-8", "replace").strip()
        return self.texts.get(name)

    def read(self, i: int) -> bytes:
        return self.get(self.full[i])

    def get(self, name: str) -> bytes:
        """The content of one file."""
        raise NotImplementedError


def choose_split(names: list[str], split: str | None, root: str) -> tuple[str, list[str]]:
    """(prefix of the chosen split, prefixes of all splits); ("", []) where there are none.

    Without a wish, folders are splits only when every top folder is named like one; train comes first.
    """
    found = {SPLITS[t.lower()]: t for t in sorted(tops(names)) if t.lower() in SPLITS}
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

    def __init__(self, path: Path, split: str | None = None, label_key: str | None = None) -> None:
        super().__init__(str(path.absolute()))
        self.path = path
        self.arrange(dict(self.walk()), split, label_key)

    def walk(self) -> Iterator[tuple[str, int]]:
        """(relative name, bytes) of every file; linked folders are followed once."""
        pending, seen = [("", self.path)], set()
        while pending:
            prefix, folder = pending.pop()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as entries:
                for e in entries:
                    if hidden(e.name):
                        continue
                    if e.is_dir():
                        pending.append((f"{prefix}{e.name}/", Path(e.path)))
                    elif e.is_file() or is_image(e.name):  # a dangling link to an image is named as unreadable later
                        yield prefix + e.name, e.stat().st_size if e.is_file() else 0

    def get(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def stream(self, i: int) -> File:
        return self.path / self.full[i]


class Zip(Files):
    """A zip of PNGs in EDM's layout, or of an image folder; a single folder around everything is left off."""

    kind = "zip"

    def __init__(self, path: Path, split: str | None = None, label_key: str | None = None) -> None:
        super().__init__(str(path.absolute()))
        self.path = path
        try:
            with zipfile.ZipFile(path) as z:
                self.members = {m.filename: m for m in z.infolist() if not m.is_dir() and not hidden(m.filename)}
        except (zipfile.BadZipFile, OSError) as e:
            raise VgmError(f"{path} is not a readable zip file: {e}", "was the copy complete?", FAILED) from e
        if any(m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in self.members.values()):
            raise VgmError(f"{path} uses a rare compression", "write it stored (zip -0) or deflated", FAILED)
        base, images = "", [n for n in self.members if is_image(n)]
        while base + "dataset.json" not in self.members and len(tops(n[len(base) :] for n in images)) == 1:
            top = next(iter(tops(n[len(base) :] for n in images)))
            if not top or top.lower() in SPLITS:
                break
            base += top + "/"
        self.arrange({n: m.file_size for n, m in self.members.items()}, split, label_key, base)
        self.stamp = " ".join(f"{self.members[n].CRC:08x}" for n in self.full)

    def get(self, name: str) -> bytes:
        """Read straight from the file, sharing no handle, so that threads and forked workers need no lock."""
        member = self.members[name]
        with open(self.path, "rb") as f:
            f.seek(data_offset(f, member))
            raw = f.read(member.compress_size)
        content = raw if member.compress_type == zipfile.ZIP_STORED else zlib.decompress(raw, -15)
        if zlib.crc32(content) != member.CRC:
            raise OSError(f"{name} is damaged (checksum)")
        return content

    def stream(self, i: int) -> File:
        return io.BytesIO(self.read(i))


def data_offset(f: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind the 30 fixed bytes of its local header, its name and its extra field."""
    f.seek(member.header_offset)
    name, extra = struct.unpack("<26xHH", f.read(30))
    return member.header_offset + 30 + name + extra
