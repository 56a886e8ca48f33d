"""Is it the same data? One string per set, and its comparison.

"v2:COUNT-HASH". Of images: names, byte sizes, labels, class names, captions and contents, also of the pictures beside
them that are read. Archives hold checksums of
every content; other sets are read whole up to WHOLE bytes and MANY files, and SOME evenly spaced images beyond.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from vgm_cli.data.threads import parallel

FORMAT = "v2"
WHOLE, MANY = 2**31, 100_000  # bytes, files
SOME = 4096  # images
BLOCKS, BLOCK = 64, 2**16  # read of a large file


def same(a: str | None, b: str | None) -> bool | None:
    """Whether two fingerprints are of the same data; None if that cannot be said, one being missing or of another
    format."""
    formats = [(f or "").partition(":")[0] if ":" in (f or "") else "" for f in (a, b)]
    return a == b if formats == [FORMAT, FORMAT] else None


def older(a: Any, b: Any) -> bool:
    """Whether one of two fingerprints has the format that versions before v2 wrote, so that they cannot be compared."""
    old, new = sorted((str(a), str(b)), key=lambda f: f.startswith(f"{FORMAT}:"))
    return new.startswith(f"{FORMAT}:") and re.fullmatch(r"\d+-[0-9a-f]{24}", old) is not None


def of_images(dataset: Any) -> str:
    """The fingerprint of a `Dataset`."""
    source, facts = dataset.source, dataset.facts
    rows = sorted(dataset.rows.tolist(), key=lambda row: source.names[row])
    known = {} if facts.labels is None else dict(zip(dataset.rows.tolist(), facts.labels.tolist()))
    small = len(rows) <= MANY and (source.checksums or sum(source.sizes) <= WHOLE)
    looked = set(rows) if small else {rows[i] for i in np.linspace(0, len(rows) - 1, SOME).astype(int)}

    def content(row: int) -> bytes:
        parts = []
        if row in looked or source.checksums:
            digest = dataset._try(source.digest, row)
            parts.append(digest if isinstance(digest, bytes) else b"unreadable")
        if row in looked and facts.captions:
            parts.append(plain(dataset._try(source.caption, row)))
        for column in dataset.columns if row in looked else ():
            found = dataset._try(lambda r, c=column: source.digest_beside(c, r), row)
            parts.append(found if isinstance(found, bytes) else b"unreadable")
        return b"\0".join(parts)

    how = f"{dataset.size} {dataset.channels} {dataset.crop} {source.stamp}{' fast' * dataset.fast}"
    h = hasher(how, *facts.class_names, *dataset.columns)
    read = parallel if facts.captions or dataset.columns or not source.checksums else map
    needed = rows if source.checksums else sorted(looked)
    contents = dict(zip(needed, read(content, needed)))
    for row in rows:
        described = plain(f"{source.names[row]}\0{source.sizes[row]}\0{known.get(row, '')}\0")
        h.update(described + contents.get(row, b"") + b"\n")
    return written(len(rows), h)


def of_cache(count: int, *made_from: str) -> str:
    """Of a latent cache: of what made it."""
    return written(count, hasher(*made_from))


def of_files(count: int, files: list[Path]) -> str:
    """The fingerprint of latents that were made elsewhere: names, sizes and contents of their files; of large files,
    BLOCKS of the contents."""
    h = hasher()
    whole = sum(p.stat().st_size for p in files) <= WHOLE
    for path in sorted(files, key=lambda p: p.name):
        size = path.stat().st_size
        h.update(plain(f"{path.name} {size}\n"))
        with open(path, "rb") as f:
            if whole:
                while part := f.read(2**24):
                    h.update(part)
            else:
                for at in np.linspace(0, max(0, size - BLOCK), BLOCKS).astype(int):
                    f.seek(int(at))
                    h.update(f.read(BLOCK))
    return written(count, h)


def hasher(*parts: str) -> Any:
    return hashlib.blake2b(plain("\n".join(parts) + "\n"), digest_size=12)


def plain(text: Any) -> bytes:
    """A text as bytes in UTF-8; file names may hold bytes that are no text."""
    return ("" if text is None else str(text)).encode("utf-8", "surrogateescape")


def written(count: int, h: Any) -> str:
    return f"{FORMAT}:{count}-{h.hexdigest()}"
