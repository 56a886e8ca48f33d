"""Writes that are whole or not there: temporary file in the same folder, flush, fsync, rename, fsync of the folder.

Torch is imported only by save_safetensors."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
import tempfile
import zlib
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
    temp = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean(target.parent)
        temp.touch()
        mode = temp.stat().st_mode  # what the umask gives: some writers (safetensors) leave files that only we may read
        yield temp
        os.chmod(temp, mode)
        with open(temp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temp, target)
        sync_folder(target.parent)
    except OSError as e:
        raise failure(target, e) from e
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to fill; afterwards it takes `path`'s place as a whole, and what was there is removed.
    On any error what was there is intact."""
    target = Path(path)
    temp = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean(target.parent)
        temp.mkdir()
        yield temp
        sync_folder(temp)
        if os.path.lexists(target):
            exchange(temp, target)
        else:
            os.rename(temp, target)
        sync_folder(target.parent)
    except OSError as e:
        raise failure(target, e) from e
    finally:
        if temp.is_dir() and not temp.is_symlink():
            shutil.rmtree(temp, ignore_errors=True)
        else:  # what was there was a file
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)


def beside(target: Path, kind: str = "tmp") -> Path:
    """A name for this process alone, hidden and in the same folder."""
    return target.with_name(f".{target.name}.{_machine()}.{os.getpid()}.{kind}")


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode('utf-8', 'replace')):08x}"


_cleaned: set[tuple[int, str]] = set()


def clean(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes of this machine left half-written in `folder`; looked for once by each process."""
    key = (os.getpid(), os.path.realpath(folder))
    if key in _cleaned or os.name != "posix":
        return
    _cleaned.add(key)
    ours = re.compile(rf"\..+\.{_machine()}\.(\d+)\.(tmp|old)")
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if (found := ours.fullmatch(entry.name)) and not _alive(int(found[1])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def exchange(a: Path, b: Path) -> None:
    """Swap two names, in one step where the system can (Linux), otherwise in three."""
    import ctypes

    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
        if swap(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0:  # AT_FDCWD, RENAME_EXCHANGE
            return
    except (AttributeError, OSError):
        pass
    aside = a.with_name(a.name + ".old")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(aside, b)
        raise
    os.rename(aside, a)


def refuse_existing(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """VgmError (exit code 2) when `path` is there and may not be replaced, or lies below a file; (exit code 1) when its
    folder may not be written. An empty folder may always be filled."""
    target = Path(path)
    above = next(p for p in target.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise VgmError(f"cannot write {target}: {above} is no folder", "name another place", USAGE)
    if not os.access(above, os.W_OK | os.X_OK):
        raise VgmError(f"cannot write {target}: no permission to write in {above}", "name another place", FAILED)
    if overwrite or not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    holds = " and is not empty" if target.is_dir() else ""
    raise VgmError(f"{target} exists{holds}", "--overwrite replaces it; another name leaves it", USAGE)


def failure(path: Path, e: OSError) -> VgmError:
    """A write that the system refused, as one sentence."""
    full = e.errno in FULL or (e.errno is None and str(e).endswith(" written"))  # numpy: "9 requested and 4 written"
    reason = "no space left on device" if full else e.strerror or str(e)
    hint = f"{'free some space; ' if full else ''}what was there before is unchanged"
    return VgmError(f"cannot write {path}: {reason}", hint, FAILED)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a rename in `folder` durable (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def plain(path: str | os.PathLike[str]) -> bool:
    """Whether a path's name is UTF-8; safetensors opens no other."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """safetensors' safe_open for a file of any name."""
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        if not plain(path):
            link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "file.safetensors"
            link.symlink_to(Path(path).absolute())
            path = link
        yield stack.enter_context(safe_open(path, framework="pt"))


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
    from safetensors.torch import save, save_file

    with replacing(path) as temp:
        try:
            if plain(temp):
                save_file(dict(tensors), temp, dict(metadata))
            else:
                temp.write_bytes(save(dict(tensors), dict(metadata)))
        except SafetensorError as e:
            number = re.search(r"os error (\d+)", str(e))  # safetensors keeps the system's error in its text only
            raise OSError(int(number[1]) if number else errno.EIO, str(e)) from e
