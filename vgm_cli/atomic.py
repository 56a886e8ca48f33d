"""Writes that are whole or not there: temporary file in the same folder, flush, fsync, rename, fsync of the folder.

Torch is imported only by save_safetensors."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_cli.errors import FAILED, USAGE, VgmError

if TYPE_CHECKING:
    from torch import Tensor


FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write; afterwards it takes `path`'s place. On any error the old file is intact.

    Raises VgmError (exit code 1) when the disk is full or the folder cannot be written.
    """
    target = Path(path)
    temp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temp.touch()
        mode = temp.stat().st_mode  # what the umask gives: some writers (safetensors) leave files that only we may read
        yield temp
        os.chmod(temp, mode)
        with open(temp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temp, target)
        sync_folder(target.parent)
    except OSError as e:
        raise _failure(target, e) from e
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def refuse_existing(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """VgmError (exit code 2) when `path` is there and may not be replaced; an empty folder may always be filled."""
    target = Path(path)
    if overwrite or not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    holds = " and is not empty" if target.is_dir() else ""
    raise VgmError(f"{target} exists{holds}", "--overwrite replaces it, --out names another place", USAGE)


def _failure(path: Path, e: OSError) -> VgmError:
    reason = "no space left on device" if e.errno in FULL else e.strerror or str(e)
    return VgmError(f"cannot write {path}: {reason}", "what was there before is unchanged", FAILED)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a rename in `folder` durable (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    with replacing(path) as temp:
        temp.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """As UTF-8; what has no place in it (parts of file names that are not UTF-8) is written as an escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def dump_json(value: Any, indent: int | None = None) -> str:
    """JSON as RFC 8259 has it, for every file and line that is written: numbers that are not finite become null, what
    JSON does not know its text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, dump_json(value, indent=2) + "\n")


def save_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """tensors: contiguous, on any device; metadata: flat strings."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temp:
        try:
            save_file(dict(tensors), temp, dict(metadata))
        except SafetensorError as e:
            number = re.search(r"os error (\d+)", str(e))  # safetensors keeps the system's error in its text only
            raise OSError(int(number[1]) if number else errno.EIO, str(e)) from e
