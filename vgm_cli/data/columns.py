"""Pictures that lie beside the images of a folder or a zip, such as line art and masks: which belongs to which image.

Three ways: a column of a metadata table that names pictures (`lineart`, or `lineart_file_name`), NAME.lineart.png
beside NAME.png, and a folder lineart/ of the same names, inside the images' folder or in its place. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from vgm_cli.data.decode import SUFFIXES
from vgm_cli.data.texts import FILE, LABEL, TEXT, Row

Pairs = dict[str, str]  # image -> its picture


def named_in(
    rows: Sequence[Row], images: Sequence[str | None], match: Callable[[Sequence[str]], list[str | None]]
) -> dict[str, Pairs]:
    """{column: pictures} of the columns of a table in which every row that says something names a picture of the set.
    images: the image of every row, or None. match: names as written -> names in the set."""
    out: dict[str, Pairs] = {}
    for key in sorted({k for row in rows for k in row.fields} - {*FILE, *TEXT, *LABEL}):
        said = [(image, row.get(key)) for row, image in zip(rows, images) if image is not None and row.get(key)]
        if not said or not all(isinstance(v, str) and PurePosixPath(v).suffix.lower() in SUFFIXES for _, v in said):
            continue
        found = match([v for _, v in said])
        pairs = {image: picture for (image, _), picture in zip(said, found) if picture not in (None, image)}
        if len(pairs) == len(said):
            out[key.removesuffix("_file_name")] = pairs  # type: ignore[assignment]
    return out


def beside(
    pictures: Sequence[str], wanted: Sequence[str], named: dict[str, Pairs]
) -> tuple[dict[str, Pairs], set[str]]:
    """({column: pictures}, all pictures that are no images of their own). named: what tables say; columns that they do
    not have are looked for by name and by folder, where they are wanted."""
    found = dict(named)
    taken = {picture for pairs in named.values() for picture in pairs.values()}
    for column in wanted:
        if column in found:
            continue
        by_name = {n for n in pictures if PurePosixPath(n).stem.endswith(f".{column}")}
        by_folder = {n for n in pictures if column in n.split("/")[:-1]} - by_name
        images = [n for n in pictures if n not in by_name | by_folder | taken]
        stems = {stem(n).removesuffix(f".{column}"): n for n in by_name}
        candidates = (
            ({n: stems[stem(n)] for n in images if stem(n) in stems}, by_name),
            *((pairs, by_folder) for pairs in in_folder(by_folder, images, column)),
        )
        pairs, own = max(candidates, key=lambda c: len(c[0]))
        if pairs:
            found[column] = pairs
            taken |= own
    return found, taken


def in_folder(under: set[str], images: Sequence[str], column: str) -> list[Pairs]:
    """Pictures by the names that they have below a folder of the column: one that is put into the path of the images
    (cat/1.png, lineart/cat/1.png), or that takes the place of another (images/1.png, lineart/1.png)."""
    put_in: dict[tuple[str, ...], str] = {}
    in_place: dict[tuple[int, tuple[str, ...]], str] = {}
    for n in under:
        parts = tuple(p for p in stem(n).split("/") if p != "..")
        at = parts.index(column)
        rest = (*parts[:at], *parts[at + 1 :])
        put_in[rest] = in_place[at, rest] = n
    first: Pairs = {}
    second: Pairs = {}
    for image in images:
        parts = tuple(stem(image).split("/"))
        if parts in put_in:
            first[image] = put_in[parts]
        for at in range(len(parts) - 1):
            if (at, rest := (*parts[:at], *parts[at + 1 :])) in in_place:
                second[image] = in_place[at, rest]
    return [first, second]


def stem(name: str) -> str:
    """A path without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))
