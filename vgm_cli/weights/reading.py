"""Opening weights files that others wrote: .pt, .pth, .ckpt, .bin (torch), .pkl (pickle), .npz, .msgpack (flax).

    networks = contents(read("ffhq.pkl"))     # {"G": {...}, "D": {...}, "G_ema": {"mapping.fc0.weight": ...}}

Torch-free at import.
"""

from __future__ import annotations

import zipfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vgm_cli import limits
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.weights import msgpack
from vgm_cli.weights.budget import Budget, TooMuch
from vgm_cli.weights.contents import is_array
from vgm_cli.weights.pickle.shells import Refused, Shell
from vgm_cli.weights.pickle.unpickle import open_pickle, open_torch

TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
PICKLES = (".pkl", ".pickle")
ARRAYS = (".npz",)
FLAX = (".msgpack",)
KNOWN = ", ".join((".safetensors", *TORCH_FILES, *PICKLES, *ARRAYS, *FLAX))


def kind_of(path: Path) -> str:
    """ "safetensors", "torch", "pickle", "arrays" or "flax", by what a file begins with, else by its suffix; "" for
    others.

    VgmError: empty, or something that was downloaded in the place of weights.
    """
    limits.check_regular(path)
    with open(path, "rb") as f:
        start = f.read(64)
    suffix = path.suffix.lower()
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                return "arrays" if any(n.endswith(".npy") for n in archive.namelist()) else "torch"
        except zipfile.BadZipFile:
            return "arrays" if suffix in ARRAYS else "torch"
    if msgpack.starts(start):
        return "flax"
    if start[:1] == b"\x80":
        return "pickle" if suffix in PICKLES else "torch"
    for mark, what in STRANGERS.items():
        if start.lstrip().lower().startswith(mark):
            raise VgmError(f"{path} is {what}, not weights", "download the file itself", FAILED)
    if suffix in TORCH_FILES:
        what = "is empty" if not start else "is not a file of torch.save's: neither an archive nor a pickle"
        raise VgmError(f"{path} {what}", "it may be cut off or of another kind", FAILED)
    known = {**dict.fromkeys(PICKLES, "pickle"), **dict.fromkeys(ARRAYS, "arrays")}
    known |= dict.fromkeys(FLAX, "flax")
    return known.get(suffix, "safetensors" if suffix == ".safetensors" else "")


STRANGERS = {b"<!doctype": "a web page", b"<html": "a web page", b"version https://git-lfs": "a pointer of Git LFS"}


def read(path: Path, trust: bool = False) -> Any:
    """Whatever a torch file, pickle or .npz holds, tensors on the CPU. Nothing in it is executed unless `trust`, which
    lets the file run any program. VgmError: refused, cut off, of an unknown kind."""
    if not path.is_file():
        raise VgmError(f"no such file: {path}", code=USAGE)
    openers: dict[str, Callable[[Path, bool], Any]] = {
        "torch": open_torch,
        "pickle": open_pickle,
        "arrays": open_arrays,
        "flax": open_flax,
    }
    kind = kind_of(path)
    if kind not in openers:
        raise VgmError(f"{path} is not a kind of file that holds weights", f"known: {KNOWN}", USAGE)
    try:
        found = openers[kind](path, trust)
        if not trust:
            check_sizes(found, path.stat().st_size)
        return found
    except VgmError:
        raise
    except Refused as e:
        raise refusal(path, str(e)) from e
    except TooMuch as e:
        raise VgmError(f"{path} would build {e}, which is refused", code=FAILED) from e
    except RecursionError as e:
        raise VgmError(f"{path} is nested too deeply", code=FAILED) from e
    except (ModuleNotFoundError, AttributeError) as e:
        if not trust:
            raise VgmError(f"{path} is not readable: {e}", code=FAILED) from e
        raise VgmError(f"{path} needs code that is not installed: {e}", "install what wrote it", FAILED) from e
    except MemoryError as e:
        raise VgmError(f"{path} does not fit into memory", code=FAILED) from e
    except Exception as e:
        odd = isinstance(e, ValueError | LookupError | TypeError)  # of a machine that was fed with something else
        reason = f"it is not a whole {kind} file" if odd and kind != "arrays" else first_line(e)
        raise VgmError(f"{path} is not readable: {reason}", "it may be cut off or of another kind", FAILED) from e


def first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def refusal(path: Path, name: str) -> VgmError:
    return VgmError(
        f"{path} asks for {name} when it is opened, which is refused: nothing was executed",
        "`vgm convert --trust-pickle` opens a file whose origin you trust; it can run any program",
        FAILED,
    )


def open_arrays(path: Path, trust: bool) -> dict[str, Any]:
    return limits.read_npz(path)


def open_flax(path: Path, trust: bool) -> dict[str, Any]:
    return msgpack.read(path)


def check_sizes(found: Any, size: int) -> None:
    """TooMuch: its tensors and arrays, which may all be views of a few bytes, would take far more than the file."""
    from torch import Tensor

    budget, seen, pending = Budget(size), set[int](), [found]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            budget.spend(bytes=value.numel() * value.element_size())
        elif is_array(value) or type(value).__module__ == "numpy":
            budget.spend(bytes=int(getattr(value, "nbytes", 0)))
        elif isinstance(value, Shell):
            pending += [value.state, value.args, value.parts, getattr(value, "value", None), *value.values()]
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset | deque):
            pending += value
