"""webdataset tar shards: the files of a sample share the name before the first dot of the basename.

Where names hold dots themselves (img.0001.png, img.0002.png; v1.5-a.jpg, v1.5-a.cls), so that this would make one
sample of several pictures and none has the short name, they share the name before the last dot.

Fields: jpg/jpeg/png/webp… the image, cls the class (number or name), txt the caption, json {"label", "text" or
"caption"}; x.mask.png beside x.png is the column `mask`.
Local shards are indexed once by offset, so every sample is at hand in any order without unpacking.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vgm_cli.data.decode import SUFFIXES, Unreadable, load_image, read_header
from vgm_cli.data.files import LOOKED_AT, NO_PICTURES, hidden, is_image
from vgm_cli.data.source import Source, class_indices, no_label
from vgm_cli.data.texts import Row, decode, key, parse_json
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.limits import short
from vgm_cli.ui import counted, some

Span = tuple[int, int, int]  # shard, offset, bytes
Sample = dict[str, Span]  # by field


SHARDS = 100_000  # files that one pattern may name
BESIDE = "beside "  # a field of a sample: a picture of the column whose name follows


def expand_braces(pattern: str) -> list[str]:
    """ "a-{000..002}.tar" -> three names; {x,y} lists the alternatives; several braces multiply. VgmError: too many."""
    names = [pattern]
    while m := re.search(r"\{([^{}]*)\}", names[0]):
        span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", m[1])
        count = abs(int(span[2]) - int(span[1])) + 1 if span else m[1].count(",") + 1
        if count * len(names) > SHARDS:
            raise VgmError(f"{short(pattern)} names more than {SHARDS:,} files", "name fewer shards", USAGE)
        names = [n for name in names for n in expand_first(name)]
    return names


def expand_first(pattern: str) -> list[str]:
    m = re.search(r"\{([^{}]*)\}", pattern)
    assert m is not None
    span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", m[1])
    choices = m[1].split(",")
    if span:
        first, last = int(span[1]), int(span[2])
        step = 1 if last >= first else -1
        choices = [str(k).zfill(len(span[1])) for k in range(first, last + step, step)]
    return [pattern[: m.start()] + c + pattern[m.end() :] for c in choices]


def samples_of(name: str, fields: dict[str, Span], pictures: list[str]) -> tuple[list[tuple[str, Sample]], list[str]]:
    """The files that share `name` up to its first dot -> ([(name, {field: span}) of each sample], pictures not used).

    The picture is field "image": x.png of x, with x.mask.png beside it as the field "beside mask"; where there is no
    x.png, every picture x.….png is a sample of its own, with the fields of its name, and those of x.
    """
    parts = {f: f.rpartition(".") for f in fields}  # (more of the name, dot, suffix)
    shared = {f: span for f, span in fields.items() if not parts[f][0] and f not in pictures}
    plain = next((f for f in pictures if not parts[f][0]), None)
    if plain is not None:
        beside = {f"{BESIDE}{parts[f][0]}": fields[f] for f in pictures if parts[f][0]}
        return [(name, {**shared, **beside, "image": fields[plain]})], [f"{name}.{f}" for f in pictures if f != plain]
    found: dict[str, Sample] = {}
    further = []
    for f in pictures:
        if parts[f][0] in found:
            further.append(f"{name}.{f}")
        else:
            found[parts[f][0]] = {**shared, "image": fields[f]}
    for f, (more, _, suffix) in parts.items():
        if more in found and f not in pictures:
            found[more][suffix] = fields[f]
    return [(f"{name}.{more}", sample) for more, sample in found.items()], further


LARGEST = 2**28  # bytes of a field that may be a picture


class Tar(Source):
    """One or several uncompressed tar files."""

    kind = "tar"

    def __init__(
        self, shards: list[Path], root: str, label_key: str | None = None, columns: Sequence[str] = ()
    ) -> None:
        super().__init__(root)
        self.shards = shards
        missing = [p for p in shards if not p.is_file()]
        if missing:
            raise VgmError(f"no such tar file: {missing[0]}", f"{len(missing)} of {len(shards)} shards missing", USAGE)
        self.files = [str(p) for p in shards]
        self.samples: list[dict[str, Span]] = []
        self.further: list[str] = []
        self.guessed: list[str] = []
        for number, shard in enumerate(shards):
            self.index(number, shard)
        found = {f.removeprefix(BESIDE) for s in self.samples for f in s if f.startswith(BESIDE)}
        self.columns = sorted(found)
        self.further = [n for n in self.further if n.rpartition(".")[0].rpartition(".")[2] not in columns]
        if self.further:
            shown = some(self.further)
            self.remarks.append(f"{root}: {counted(len(self.further), 'further picture')} of samples not used: {shown}")
        if not self.samples and self.skipped:
            hint = "was the copy complete? compressed tar files have to be unpacked once (gunzip)"
            raise VgmError(f"{self.skipped[0]} is not a readable tar file", hint, FAILED)
        self.sizes = [s["image"][2] for s in self.samples]
        self.read_labels(label_key)
        self.captioned = any("txt" in s for s in self.samples) or bool(self.samples and self.caption(0) is not None)
        if self.captioned:
            self.check_captions()

    def index(self, number: int, shard: Path) -> None:
        """Offsets of every sample with an image; what precedes a damage is kept, the shard is named in `skipped`."""
        groups: dict[str, dict[str, Span]] = {}  # by the name before the first dot
        twice, links = 0, 0
        end = shard.stat().st_size
        try:
            with tarfile.open(shard, "r:") as tar:
                for m in tar:
                    tar.members = []  # type: ignore[attr-defined]  # keeps memory flat
                    name = "/".join(p for p in m.name.replace("\\", "/").split("/") if p not in ("", "."))
                    folder, slash, base = name.rpartition("/")
                    start, _, field = base.partition(".")
                    more, dot, suffix = field.rpartition(".")
                    field = more + dot + suffix.lower()
                    links += (m.issym() or m.islnk()) and is_image(name)
                    if not m.isfile() or hidden(name):
                        continue
                    if m.offset_data + m.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    fields = groups.setdefault(folder + slash + start, {})
                    twice += field in fields
                    fields[field] = (number, m.offset_data, m.size)
        except (tarfile.TarError, OSError, ValueError, RecursionError):
            self.skipped.append(shard.name)
        for name, fields in groups.items():
            pictures = [f for f in fields if "." + f.rpartition(".")[2] in SUFFIXES]
            found, further = samples_of(name, fields, pictures or [f for f in fields if self.is_picture(f, fields[f])])
            self.names += [f"{shard.name}/{k}" for k, _ in found]
            self.samples += [s for _, s in found]
            self.further += further
            for field in fields if not found else ():
                self.others["." + field.rpartition(".")[2] if field else "no suffix"] += 1
        if twice:
            self.remarks.append(f"{shard}: {counted(twice, 'name')} stand in it twice; the last file of a name counts")
        if links:
            self.remarks.append(f"{shard}: {counted(links, 'image')} left out: links to other members of the tar")

    def is_picture(self, field: str, span: Span) -> bool:
        """Whether the content of a field is a picture, for fields whose suffix does not say."""
        suffix = "." + field.rpartition(".")[2]
        if suffix in NO_PICTURES or suffix in (".cls", ".id") or span[2] > LARGEST:
            return False
        try:
            read_header(io.BytesIO(self.get(span)))
            return True
        except Unreadable:
            return False

    def read_labels(self, label_key: str | None) -> None:
        """From `cls`, or from the `json` field's label_key ("label" by default)."""
        self.no_labels = "cls files, or a label in the json files, give labels"
        if not self.samples:
            return
        where = f"tar set {self.root}"
        values: list[Any]
        if label_key is None and any("cls" in s for s in self.samples):
            values = [self.text(s["cls"], n).strip() if "cls" in s else None for s, n in zip(self.samples, self.names)]
        elif label_key is not None or self.json_of(0).get("label") is not None:
            values = [self.json_of(i).get(key(label_key or "label")) for i in range(len(self.samples))]
        else:
            return
        for name, value in zip(self.names, values):
            if value is None:
                raise no_label(where, name)
        self.labels, self.class_names = class_indices(values, where, self.remarks)

    def check_captions(self) -> None:
        """Says which samples have no text file, and which texts are not UTF-8 (of some, where there are many)."""
        without = [n for n, s in zip(self.names, self.samples) if "txt" not in s and "json" not in s]
        if without:
            count = f"{len(without)} of {counted(len(self.names), 'image')}"
            self.remarks.append(f"{self.root}: {count} have no caption, such as {some(without)}")
        for i in range(0, len(self.samples), max(1, len(self.samples) // LOOKED_AT)):
            self.caption(i)
        if self.guessed:
            self.remarks.append(f"not in UTF-8, read as cp1252: {some(self.guessed)}")

    def json_of(self, i: int) -> dict[str, Any]:
        """The json field of a sample, keys as `texts.key` has them."""
        sample, where = self.samples[i], f"the json of {self.names[i]}"
        content = parse_json(self.text(sample["json"], where), where) if "json" in sample else {}
        return {key(k): v for k, v in content.items()} if isinstance(content, dict) else {}

    def caption(self, i: int) -> str | None:
        if "txt" in self.samples[i]:
            return self.text(self.samples[i]["txt"], f"the text of {self.names[i]}").strip()
        return Row("", self.json_of(i)).text

    def has(self, column: str, i: int) -> bool:
        return BESIDE + column in self.samples[i]

    def beside(self, column: str, i: int) -> Image.Image:
        return load_image(io.BytesIO(self.get(self.samples[i][BESIDE + column])))

    def digest_beside(self, column: str, i: int) -> bytes:
        return hashlib.blake2b(self.get(self.samples[i][BESIDE + column]), digest_size=16).digest()

    def text(self, span: Span, where: str) -> str:
        return decode(self.get(span), where, self.guessed)

    def read(self, i: int) -> bytes:
        return self.get(self.samples[i]["image"])

    def get(self, span: Span) -> bytes:
        shard, offset, size = span
        with open(self.shards[shard], "rb") as f:
            f.seek(offset)
            return f.read(size)
