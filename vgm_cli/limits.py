"""How much a file may make this program read, build or show: every ceiling, and the readers that keep to it.
Torch-free.

A file comes from anybody. What it claims (lengths, shapes, counts, nesting) is compared with what it holds before
anything is allocated, and what is read is a regular file: a pipe or a device would never end.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from vgm_cli.errors import FAILED, USAGE, VgmError

SPARE = 64 << 20  # bytes that any file may take in memory beyond its own size
RATIO = 20  # how many times its size on the disk a compressed member may be, above SPARE
TEXT = 64 << 20  # bytes of a JSON file
TABLE = 1 << 30  # bytes of a table of captions or labels, which grows with its set
HEADER = 16 << 20  # bytes of a .safetensors header: more than 100,000 tensors
DIMENSIONS = 32  # of one array

Path_ = str | os.PathLike[str]


def short(value: Any, most: int = 80) -> str:
    """A value as an error shows it: the start of a text or number, the type of anything else, whose repr could be of
    any length."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | bytes | int | float | None):
        text = value if isinstance(value, str) else repr(value[:most] if isinstance(value, bytes) else value)
        return text if len(text) <= most else f"{text[:most]}…"
    return f"a {type(value).__name__}"


# -- files and texts ---------------------------------------------------------------------------------------------------


def check_regular(path: Path_, code: int = FAILED) -> int:
    """The size of a regular file, links followed. VgmError: not there, a folder, a pipe, a device."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        raise VgmError(f"cannot open {short(os.fspath(path), 200)}: {reason(e)}", code=code) from e
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise VgmError(f"{path} is {kind}, not a file", code=code)
    return found.st_size


def reason(e: Exception) -> str:
    return (e.strerror if isinstance(e, OSError) else None) or str(e)


def read_bytes(path: Path_, most: int = TEXT, code: int = FAILED) -> bytes:
    """The whole of a regular file. OSError as usual; VgmError: more than `most` bytes, no regular file."""
    size = check_regular(path, code)
    if size > most:
        raise VgmError(f"{path} has {size:,} bytes, more than the {most:,} such a file may have", code=code)
    with open(path, "rb") as f:
        return f.read(most)


def read_text(path: Path_, most: int = TEXT, code: int = FAILED) -> str:
    return read_bytes(path, most, code).decode("utf-8")


def parse_json(text: str | bytes, where: str, code: int = FAILED, **kwargs: Any) -> Any:
    """VgmError: it is not JSON, or nested too deeply."""
    try:
        return json.loads(text, **kwargs)
    except RecursionError as e:
        raise VgmError(f"{where} is nested too deeply", code=code) from e
    except ValueError as e:
        raise VgmError(f"{where} is not valid JSON: {short(str(e), 200)}", code=code) from e


LEVELS = 100_000  # of a discrete diffusion process; papers have 1000 or 4000


def check_levels(steps: int) -> None:
    """VgmError: a process of so many steps, whose tables are made one by one."""
    if not isinstance(steps, int) or not 0 < steps <= LEVELS:
        raise VgmError(f"a diffusion process of {short(steps)} steps, not 1 to {LEVELS:,}", code=USAGE)


NUMBER = 1 << 24  # of a component's keywords: widths, steps, counts


def check_numbers(keywords: Any, where: str, name: str = "") -> None:
    """VgmError: a keyword is a whole number that nothing can be built of. Seeds may be any."""
    if isinstance(keywords, Mapping):
        for k, v in keywords.items():
            check_numbers(v, where, str(k))
    elif isinstance(keywords, list | tuple):
        for v in keywords:
            check_numbers(v, where, name)
    elif isinstance(keywords, int) and abs(keywords) > NUMBER and "seed" not in name:
        raise VgmError(f"{where}: {short(name)}={short(keywords)} is more than {NUMBER:,}", code=USAGE)


# -- zip archives and numpy's arrays -----------------------------------------------------------------------------------


def check_member(member: zipfile.ZipInfo, where: str) -> None:
    """VgmError: unpacked, a member of an archive would be out of all proportion."""
    size, packed = member.file_size, member.compress_size
    if size > SPARE and size > RATIO * packed:
        raise VgmError(
            f"{where}: {short(member.filename)} claims {size:,} bytes packed into {packed:,}, which is refused",
            "store it with less or no compression (numpy.savez, zip -0)",
            FAILED,
        )


def read_npz(path: Path_, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """Arrays of an .npz by name (keys: only these), none of objects. VgmError: damaged, or out of proportion."""
    size = check_regular(path)
    try:
        with zipfile.ZipFile(path) as z:
            members = {m.filename.removesuffix(".npy"): m for m in z.infolist()}
            wanted = [k for k in (members if keys is None else keys) if k in members]
            total = sum(members[k].file_size for k in wanted)
            if total > SPARE and total > RATIO * size:
                raise VgmError(f"{path} claims {total:,} bytes packed into {size:,}, which is refused", code=FAILED)
            found = {}
            for k in wanted:
                check_member(members[k], str(path))
                with z.open(members[k]) as f:
                    found[k] = read_array(f, members[k].file_size)  # type: ignore[arg-type]
            return found
    except VgmError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, struct.error) as e:
        raise VgmError(
            f"{path} is damaged or holds Python objects: {short(str(e), 200)}", "write plain arrays (numpy.savez)"
        ) from e
    except Exception as e:  # zlib.error and what numpy makes of a broken header
        raise VgmError(f"{path} is damaged: {short(str(e) or type(e).__name__, 200)}", code=FAILED) from e


def read_npy(path: Path_) -> Any:
    """The array of an .npy, none of objects. VgmError: damaged, or its shape is not that of its bytes."""
    size = check_regular(path)
    try:
        with open(path, "rb") as f:
            return read_array(f, size)
    except VgmError:
        raise
    except Exception as e:
        raise VgmError(f"{path} is damaged or holds Python objects: {short(str(e), 200)}", code=FAILED) from e


def read_array(f: BinaryIO, size: int) -> Any:
    """numpy.load of one .npy of `size` bytes, whose header has to agree with them. ValueError: it does not."""
    import numpy as np

    shape, fortran, dtype, start = array_header(f)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    count = math.prod(shape)
    if count * dtype.itemsize != size - start and not (count == 0 or dtype.itemsize == 0):
        raise ValueError(f"its header promises {count * dtype.itemsize:,} bytes, it has {size - start:,}")
    if count == 0 or dtype.itemsize == 0:
        return np.empty(shape if math.prod(s or 1 for s in shape) < 1 << 60 else (0,), dtype)
    data = f.read(size - start)
    if len(data) != size - start:
        raise ValueError("it is cut off")
    array = np.frombuffer(bytearray(data), dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def array_header(f: BinaryIO) -> tuple[tuple[int, ...], bool, Any, int]:
    """(shape, fortran order?, dtype, where the data starts) of an .npy. ValueError: it has no sound header."""
    import numpy as np

    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"an array of version {version}")
    length = struct.unpack("<H", f.read(2))[0] if version == (1, 0) else struct.unpack("<I", f.read(4))[0]
    if length > 10_000:
        raise ValueError(f"a header of {length} bytes")
    import ast

    text = f.read(length).decode("latin1" if version < (3, 0) else "utf-8")
    try:
        said = ast.literal_eval(text.strip())
        shape, fortran, dtype = tuple(said["shape"]), bool(said["fortran_order"]), np.dtype(said["descr"])
    except (SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as e:
        raise ValueError("an array whose header is not numpy's") from e
    if len(shape) > DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {short(str(shape))}")
    return shape, fortran, dtype, (10 if version == (1, 0) else 12) + length


# -- .safetensors ------------------------------------------------------------------------------------------------------

BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64}
BITS |= {f"{k}{n}": n for k in "IU" for n in (8, 16, 32, 64)}
BITS |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)


def safetensors_header(path: Path_) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({tensor: {"dtype", "shape"}}, metadata) of a .safetensors file, whose header has to describe its bytes exactly:
    known dtypes, shapes of the right size, one tensor behind the other up to the end. VgmError: it does not."""
    size = check_regular(path)
    try:
        with open(path, "rb") as f:
            start = f.read(8)
            if len(start) < 8:
                raise ValueError("it has no header")
            (length,) = struct.unpack("<Q", start)
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            if length > HEADER:
                raise ValueError(f"its header has {length:,} bytes, more than {HEADER:,}")
            text = f.read(length)
        header = parse_json(text, "its header", object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is no dictionary")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not texts")
        _check_spans(header, size - 8 - length)
    except (OSError, ValueError) as e:
        raise _unreadable(path, short(str(e), 200)) from e
    except VgmError as e:
        raise _unreadable(path, e.message) from e
    return {k: {"dtype": t["dtype"].lower(), "shape": t["shape"]} for k, t in header.items()}, metadata


def _unreadable(path: Path_, why: str) -> VgmError:
    hint = "it may be cut off; an official .pt or .ckpt goes through `vgm convert`"
    return VgmError(f"{path} is not a readable safetensors file: {why}", hint, FAILED)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


def _check_spans(header: Mapping[str, Any], size: int) -> None:
    spans: list[tuple[int, int, str]] = []
    for name, t in header.items():
        if not isinstance(t, dict) or set(t) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{short(name)} is not described by dtype, shape and data_offsets")
        dtype, shape, span = t["dtype"], t["shape"], t["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise ValueError(f"{short(name)} is of the unknown dtype {short(dtype)}")
        if not isinstance(shape, list) or len(shape) > DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{short(name)} has no shape of at most {DIMENSIONS} sides")
        if not isinstance(span, list) or len(span) != 2 or not all(type(n) is int for n in span):
            raise ValueError(f"{short(name)} has no two offsets")
        begin, end = span
        if not 0 <= begin <= end:
            raise ValueError(f"{short(name)} ends before it begins")
        if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
            raise ValueError(f"{short(name)} has {end - begin:,} bytes, not those of its shape")
        spans.append((begin, end, name))
    last = max((end for _, end, _ in spans), default=0)
    if last > size:
        raise ValueError(f"it is cut off, with {size:,} bytes of the {last:,} that its header promises")
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{short(name)} {'overlaps another tensor' if begin < position else 'follows a gap'}")
        position = end
    if position != size:
        raise ValueError(f"it has {size - position:,} bytes more than its header describes")
