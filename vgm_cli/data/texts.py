"""Texts and tables beside images, as people have them: any usual encoding, CSV of any separator, JSON lines, and file
names as another system or another folder wrote them. Torch-free."""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from vgm_cli.errors import FAILED, VgmError
from vgm_cli.limits import parse_json

FILE = ("file_name", "filename", "file", "image_file", "image_path", "file_path", "filepath", "path", "image", "img",
        "target", "name")  # fmt: skip
TEXT = ("text", "caption", "prompt", "captions", "description")
LABEL = ("label", "labels", "class", "class_name", "category")
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SEPARATORS = ",;\t|"


def decode(content: bytes, where: str, guessed: list[str] | None = None) -> str:
    """By its byte order mark, else UTF-8, or UTF-16 where every other byte is zero, or cp1252.

    guessed: takes `where` when it was cp1252, which nothing in a file says. Raises VgmError for anything else.
    """
    encoding = next((e for mark, e in MARKS if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:
        encoding = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
    for e in (encoding,) if encoding else ("utf-8", "cp1252"):
        try:
            text = content.decode(e)
        except UnicodeDecodeError:
            continue
        if e == "cp1252" and guessed is not None:
            guessed.append(where)
        return text
    raise VgmError(f"{where} is text in an unknown encoding", "store it as UTF-8", FAILED)


def split(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def vocabulary(texts: Iterable[str], most: int) -> list[str]:
    """The words of texts, the commonest first, of equals in the order of the alphabet; at most so many."""
    counts = Counter(word for text in texts for word in split(text))
    return sorted(counts, key=lambda w: (-counts[w], w))[:most]


# -- tables ----------------------------------------------------------------------------------------------------------


def is_table(name: str) -> bool:
    tables = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "prompt.json")
    return name.rpartition("/")[2].lower() in tables


def key(column: Any) -> str:
    """A column's name in lower case with underscores, so that "File Name" is file_name."""
    return re.sub(r"[\s-]+", "_", str(column).strip().lower())


@dataclass
class Row:
    """One row of a table about images. file: as written; fields: by `key`."""

    file: str
    fields: dict[str, Any]

    def get(self, *columns: str) -> Any:
        """The first of these columns that is not empty."""
        found = (self.fields.get(c) for c in columns)
        return next((v for v in found if v is not None and v != "" and v != []), None)

    @property
    def text(self) -> str | None:
        """The caption; the first of several."""
        value = self.get(*TEXT)
        value = value[0] if isinstance(value, list) else value
        return None if value is None else str(value)


def read_table(name: str, text: str, where: str) -> list[Row]:
    """The rows of a metadata file; `name` says of which kind. Raises VgmError that names the line."""
    kind = PurePosixPath(name).suffix.lower()
    lines = kind in (".jsonl", ".json")
    rows = read_jsonl(text, where) if lines else read_csv(text, where, "\t" if kind == ".tsv" else None)
    out = []
    for line, row in rows:
        fields = {key(k): v for k, v in row.items()}
        named = [c for c in FILE if c in fields] + [c for c in fields if c.endswith("_file_name")]
        column = next(iter(named), None)
        if column is None or not isinstance(fields[column], (str, int)) or fields[column] == "":
            hint = f"columns: {', '.join(map(str, row)) or 'none'}; file_name says which image a row is about"
            raise VgmError(f"{where} line {line}: a row has no file_name", hint, FAILED)
        out.append(Row(str(fields[column]), fields))
    return out


def read_jsonl(text: str, where: str) -> list[tuple[int, dict]]:
    """(line number, object) of every line that is not blank; one list of objects is taken too."""
    if text.lstrip().startswith("["):
        rows = [(i, row) for i, row in enumerate(parse_json(text, where), 1)]
    else:  # not splitlines: some of its line ends are allowed in a JSON string
        lines = enumerate(text.split("\n"), 1)
        rows = [(i, parse_json(line, f"{where} line {i}")) for i, line in lines if line.strip()]
    for i, row in rows:
        if not isinstance(row, dict):
            raise VgmError(f"{where} line {i} is not a JSON object", '{"file_name": "0.png", "text": "a cat"}', FAILED)
    return rows


def read_csv(text: str, where: str, separator: str | None = None) -> list[tuple[int, dict]]:
    """(line number, {column: value}); the separator is the commonest of SEPARATORS in the header if not given."""
    skipped = 0
    if text[:4].lower() == "sep=":  # Excel's way to name it
        line, _, text = text.partition("\n")
        separator, skipped = line[4:5] or None, 1
    header = text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator or max(SEPARATORS, key=header.count), strict=True
    )
    rows: list[tuple[int, dict]] = []
    columns: list[str] = []
    try:
        for values in reader:
            line_number = reader.line_num + skipped
            while len(values) > len(columns) > 0 and not values[-1].strip():
                values.pop()
            if not any(v.strip() for v in values):
                continue
            if not columns:
                columns = values
            elif len(values) > len(columns):
                hint = 'a text with a separator in it is quoted: "a cat, sitting"'
                raise VgmError(f"{where} line {line_number} has more values than columns", hint, FAILED)
            else:
                rows.append((line_number, dict(zip(columns, values))))
    except csv.Error as e:
        raise VgmError(f"{where} line {reader.line_num + skipped} is not CSV: {e}", code=FAILED) from e
    return rows


# -- names -----------------------------------------------------------------------------------------------------------


def tidy(name: str) -> str:
    """A path as any system writes it -> "/"-separated, relative, in Unicode's composed form."""
    parts = unicodedata.normalize("NFC", name.strip().replace("\\", "/")).split("/")
    if re.fullmatch(r"[A-Za-z]:", parts[0]):
        parts = parts[1:]
    return "/".join(p for p in parts if p not in ("", "."))


class Names:
    """Finds images by what a table calls them; where no other name differs by case alone, case does not matter."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = names
        self.ends: dict[str, list[str]] | None = None

    @cached_property
    def exact(self) -> dict[str, str]:
        """By their tidy form; made where a table asks, which most sets of a million images do not have."""
        return {tidy(n): n for n in self.names}

    @cached_property
    def folded(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for path in self.exact:
            found[path.casefold()].append(path)
        return found

    def match(self, wanted: Sequence[str], folder: str = "") -> list[str | None]:
        """The image of every name: relative to the table's folder, else to the root. Where that finds none of them,
        one of the two paths may have more leading folders than the other.

        One rule holds for a whole table, and no folder is passed over that differs, so that the name of a missing
        image does not find another one.
        """
        names, folder = [tidy(n) for n in wanted], tidy(folder)
        for start in (folder, ""):
            found = [self.at(posixpath.normpath(posixpath.join(start, n))) for n in names]
            if any(found):
                return found
        best: list[str | None] = [self.ending(n, folder) for n in names]
        parts = [[p for p in n.split("/") if p != ".."] for n in names]
        for leading in range(1, max(map(len, parts), default=0)):
            ends = ["/".join(p[leading:]) for p in parts]
            found = [(self.at(posixpath.join(folder, e)) or self.at(e)) if e else None for e in ends]
            if len(names) - found.count(None) > len(names) - best.count(None):
                best = found
        return best

    def at(self, path: str) -> str | None:
        if path in self.exact:
            return self.exact[path]
        alike = self.folded.get(path.casefold(), [])
        return self.exact[alike[0]] if len(alike) == 1 else None

    def ending(self, end: str, folder: str) -> str | None:
        """The only image whose path ends so; of several, the only one in the folder."""
        if self.ends is None:
            self.ends = defaultdict(list)
            for path in self.exact:
                parts = path.casefold().split("/")
                for k in range(len(parts)):
                    self.ends["/".join(parts[k:])].append(path)
        hits = self.ends.get(end.casefold(), []) if end else []
        hits = [h for h in hits if folder and h.startswith(f"{folder}/")] or hits
        return self.exact[hits[0]] if len(hits) == 1 else None
