"""Pickles and torch's files, opened with the table of what they may name."""

from __future__ import annotations

import importlib
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vgm_cli import limits
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.weights.budget import Budget, TooMuch
from vgm_cli.weights.pickle.machine import Machine
from vgm_cli.weights.pickle.shells import Named, Refused, Shell, shell_of
from vgm_cli.weights.pickle.table import (
    ARRAYS_OF,
    BYTES,
    COLLECTIONS,
    DICTS,
    REPLACED,
    SCALARS,
    allowed_of_torch,
    inert,
    known_to_torch,
    size_of,
)


def dictionary(budget: Budget) -> type:
    """For dictionaries with manners of their own (EasyDict, defaultdict): their entries alone. A type, as objects are
    made from types, whose instances are OrderedDicts; a new one, so that a file cannot change it for others."""

    def new(cls: type, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:
        given = next((a for a in args if isinstance(a, Mapping)), {})
        budget.spend(len(given) + len(kwargs))
        return OrderedDict(given, **kwargs)

    return type("dictionary", (OrderedDict,), {"__new__": new})


def scalar(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers and texts of numbers and texts: int("9" * 10**6) would take minutes, str() of a tree for ever."""

    def make(*args: Any) -> Any:
        if kind is not slice and not all(isinstance(a, str | int | float) and len(limits.short(a)) < 80 for a in args):
            raise Refused(f"a number or text of {', '.join(limits.short(a) for a in args)}")
        return kind(*args)

    return make


class Unpickler(Machine):
    """The machine with the table."""

    def find(self, name: str) -> Any:
        if name in DICTS:
            return dictionary(self.budget)
        if name == "torch.storage._load_from_bytes":
            return self.storage
        if name in REPLACED:
            return self.paid(REPLACED[name])
        if inert(name):
            return shell_of(name)
        if name.startswith("numpy.") and (short := re.sub(r"^numpy\.(_?core\.)?", "", name)) in ARRAYS_OF:
            found = ARRAYS_OF[short]
            return found if isinstance(found, type) else self.paid(found)
        if name in COLLECTIONS:
            return self.collector(COLLECTIONS[name])
        if name in BYTES:
            return self.paid(BYTES[name], bytes, bytearray)
        if name in SCALARS:
            return scalar(SCALARS[name])
        if name == "builtins.range":
            return self.range
        if name == "torch.Size":
            return self.collector(size_of)
        if name.startswith("torch.") and allowed_of_torch(name):
            module, _, attribute = name.rpartition(".")
            return getattr(importlib.import_module(module), attribute)
        raise Refused(limits.short(name, 200))

    def storage(self, data: bytes) -> Any:
        """torch.storage._load_from_bytes: a torch file inside a pickle, opened as carefully."""
        self.budget.spend(bytes=len(data))
        return load_legacy(data, self.budget)


class Rehearsal(Unpickler):
    """A torch file's program, run on stand-ins for tensors before torch runs it: what it makes is counted, what it
    names is in `names`."""

    def find(self, name: str) -> Any:
        if name == "torch._tensor._rebuild_from_type_v2":
            return lambda function, kind, args, state: function(*args)
        if name.startswith("torch.") and name != "torch.Size" and (name in known_to_torch() or allowed_of_torch(name)):
            attribute = name.rpartition(".")[2]
            if attribute.startswith("_rebuild") or attribute in ("Parameter", "Buffer", "device", "_get_layout"):
                return lambda *args: shell_of(name)(*args)
            return Named(name)
        return super().find(name)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or type(pid[4]) is not int or not 0 <= pid[4] <= self.budget.size:
            raise TooMuch("a storage that is larger than the file")
        return Shell()


# -- torch's files -----------------------------------------------------------------------------------------------------


def open_torch(path: Path, trust: bool) -> Any:
    """torch.save's file: weights_only, with a shell for each harmless class it names."""
    import torch

    if trust:
        return torch.load(path, map_location="cpu", weights_only=False)
    with open(path, "rb") as f:
        start = f.read(64)
    if start[:1] == b"\x80" and not is_torch_legacy(start):
        return open_pickle(path, trust)  # a plain pickle under a torch suffix
    if not start:
        raise VgmError(f"{path} is empty", code=FAILED)
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        return load_torch(path, program_of(path), Budget(size), mmap=True)
    if start[:4] == b"PK\x03\x04":
        raise VgmError(f"{path} is cut off: the end of the archive is missing", "copy or download it again", FAILED)
    with open(path, "rb") as f:
        return load_torch(path, f, Budget(size), programs=5)


def load_legacy(data: bytes, budget: Budget) -> Any:
    """torch.save's format of before 1.6, or its present one, from memory."""
    f = io.BytesIO(data)
    if zipfile.is_zipfile(f):
        raise Refused("an archive inside a pickle")
    inner = Budget(len(data))
    inner.operations = budget.operations
    f.seek(0)
    found = load_torch(io.BytesIO(data), f, inner, programs=5)
    budget.operations = inner.operations
    return found


def load_torch(source: Any, program: Any, budget: Budget, programs: int = 1, mmap: bool = False) -> Any:
    """torch.load after a rehearsal. program: where its pickles stand: one, or the legacy format's magic number,
    protocol, system, object and names of storages."""
    import torch

    names: set[str] = set()
    for _ in range(programs):
        rehearsal = Rehearsal(program, budget)
        rehearsal.load()
        names |= rehearsal.names
    table = Unpickler(io.BytesIO(), Budget(budget.size))
    shells: list[Any] = [(table.find(name), name) for name in sorted(names - known_to_torch())]
    with torch.serialization.safe_globals(shells), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(source, map_location="cpu", weights_only=True, **({"mmap": True} if mmap else {}))
        except pickle.UnpicklingError as e:
            raise VgmError(
                f"{source if isinstance(source, Path) else 'a part of it'} holds more than tensors and plain data: "
                f"{reason_of(e)}",
                "`vgm convert --trust-pickle` opens a file whose origin you trust; it can run any program",
                FAILED,
            ) from e


def program_of(path: Path) -> io.BytesIO:
    """The pickle in an archive of torch.save's, exactly as torch reads it. VgmError: no such archive, or a packed one
    (torch never packs: a member that claims gigabytes would be unpacked)."""
    import torch

    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [m.filename for m in members]
    if not any(n.endswith("/data.pkl") or n == "data.pkl" for n in names) or any(
        n.endswith("constants.pkl") for n in names
    ):
        raise VgmError(f"{path} is not a file of torch.save's", "TorchScript programs hold code", FAILED)
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
        raise VgmError(
            f"{path} is a compressed archive, which torch.save does not write", "unpack it and zip -0", FAILED
        )
    return io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))


def reason_of(e: Exception) -> str:
    """The sentence in torch's long refusal that says what it met."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("WeightsUnpickler error:", "Unsupported"))), lines[-1])[
        :200
    ]


def open_pickle(path: Path, trust: bool) -> Any:
    """A plain pickle (EDM, StyleGAN, ...)."""
    with open(path, "rb") as f:
        if trust:
            return pickle.load(f, encoding="latin1")
        return Unpickler(f, Budget(path.stat().st_size)).load()


def is_torch_legacy(start: bytes) -> bool:
    """Whether a file begins as torch.save's did before 1.6: with the pickle of a magic number."""
    magic = 0x1950A86A20F9469CFC6C
    return magic.to_bytes(10, "little") in start or str(magic).encode() in start
