"""webdataset tar shards: the files of a sample share the name before the first dot of the basename.

Fields: jpg/jpeg/png/webp… the image, cls the class (number or name), txt the caption, json {"label", "text" or
"caption"}.
Local shards are indexed once by offset, so every sample is at hand in any order without unpacking.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

from vgm_cli.data.decode import SUFFIXES
from vgm_cli.data.files import hidden
from vgm_cli.data.source import Source, class_indices, no_label
from vgm_cli.errors import FAILED, USAGE, VgmError

Span = tuple[int, int, int]  # shard, offset, bytes


def expand_braces(pattern: str) -> list[str]:
    """ "a-{000..002}.tar" -> three names; {x,y} lists the alternatives; several braces multiply."""
    m = re.search(r"\{([^{}]*)\}", pattern)
    if m is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", m[1])
    if span:
        first, last = int(span[1]), int(span[2])
        step = 1 if last >= first else -1
        choices = [str(k).zfill(len(span[1])) for k in range(first, last + step, step)]
    else:
        choices = m[1].split(",")
    return [n for c in choices for n in expand_braces(pattern[: m.start()] + c + pattern[m.end() :])]


class Tar(Source):
    """One or several uncompressed tar files."""

    kind = "tar"

    def __init__(self, shards: list[Path], root: str, label_key: str | None = None) -> None:
        super().__init__(root)
        self.shards = shards
        missing = [p for p in shards if not p.is_file()]
        if missing:
            raise VgmError(f"no such tar file: {missing[0]}", f"{len(missing)} of {len(shards)} shards missing", USAGE)
        self.samples: list[dict[str, Span]] = []
        for number, shard in enumerate(shards):
            self.index(number, shard)
        if not self.samples and self.skipped:
            hint = "was the copy complete? compressed tar files have to be unpacked once (gunzip)"
            raise VgmError(f"{self.skipped[0]} is not a readable tar file", hint, FAILED)
        self.sizes = [s["image"][2] for s in self.samples]
        self.read_labels(label_key)
        first = self.samples[0] if self.samples else {}
        self.captioned = any("txt" in s for s in self.samples) or self.text_of(first) is not None

    def index(self, number: int, shard: Path) -> None:
        """Offsets of every sample with an image; what precedes a damage is kept, the shard is named in `skipped`."""
        samples: dict[str, dict[str, Span]] = {}
        end = shard.stat().st_size
        try:
            with tarfile.open(shard, "r:") as tar:
                for m in tar:
                    tar.members = []  # type: ignore[attr-defined]  # keeps memory flat
                    folder, _, base = m.name.removeprefix("./").rpartition("/")
                    key, _, field = base.partition(".")
                    if not m.isfile() or hidden(m.name.removeprefix("./")) or not field:
                        continue
                    if m.offset_data + m.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    field = field.lower()
                    kind = field.rpartition(".")[2]
                    if "." + kind in SUFFIXES:
                        field = "image" if kind == field else "further image"
                    samples.setdefault(f"{folder}/{key}" if folder else key, {}).setdefault(
                        field, (number, m.offset_data, m.size)
                    )
        except (tarfile.TarError, OSError):
            self.skipped.append(shard.name)
        for s in samples.values():
            if "further image" in s:  # x.v2.jpg is the image of x, unless there is an x.jpg
                s.setdefault("image", s["further image"])
        found = [(k, s) for k, s in samples.items() if "image" in s]
        self.names += [f"{shard.name}/{k}" for k, _ in found]
        self.samples += [s for _, s in found]

    def read_labels(self, label_key: str | None) -> None:
        """From `cls`, or from the `json` field's label_key ("label" by default)."""
        self.no_labels = "cls files, or a label in the json files, give labels"
        if not self.samples:
            return
        where, first = f"tar set {self.root}", self.samples[0]
        values: list[Any]
        if label_key is None and any("cls" in s for s in self.samples):
            values = [self.get(s["cls"]).decode().strip() if "cls" in s else None for s in self.samples]
        elif label_key is not None or self.json_of(first).get("label") is not None:
            values = [self.json_of(s).get(label_key or "label") for s in self.samples]
        else:
            return
        for name, value in zip(self.names, values):
            if value is None:
                raise no_label(where, name)
        self.labels, self.class_names = class_indices(values, where)

    def json_of(self, sample: dict[str, Span]) -> dict[str, Any]:
        try:
            content = json.loads(self.get(sample["json"])) if "json" in sample else {}
        except ValueError:
            content = {}
        return content if isinstance(content, dict) else {}

    def text_of(self, sample: dict[str, Span]) -> str | None:
        if "txt" in sample:
            return self.get(sample["txt"]).decode("utf-8", "replace").strip()
        fields = self.json_of(sample)
        text = fields.get("text", fields.get("caption"))
        return None if text is None else str(text)

    def caption(self, i: int) -> str | None:
        return self.text_of(self.samples[i])

    def read(self, i: int) -> bytes:
        return self.get(self.samples[i]["image"])

    def get(self, span: Span) -> bytes:
        shard, offset, size = span
        with open(self.shards[shard], "rb") as f:
            f.seek(offset)
            return f.read(size)
