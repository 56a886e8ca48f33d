"""Objects that stand where a pickle wants one of a class that is not loaded: they remember and do nothing."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

from vgm_cli import limits


class Refused(pickle.UnpicklingError):
    """A pickle asked for something that is not in the table."""


class Shell(dict):  # type: ignore[type-arg]  # holds whatever the file puts in
    """An object of a class that is not loaded. path: "module.Class"; args: what it was made with; state: what it was
    filled with (an attribute dictionary, mostly). Items of dict-like objects are its items, of lists its parts."""

    path = ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.args, self.state, self.parts = args, dict(kwargs), []  # type: ignore[var-annotated]

    def __new__(cls, *args: Any, **kwargs: Any) -> Shell:
        shell = super().__new__(cls)
        Shell.__init__(shell, *args, **kwargs)
        return shell

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        self.parts.append(value)

    def extend(self, values: Any) -> None:
        self.parts.extend(values)

    def __repr__(self) -> str:
        return f"<shell of {self.path}>"

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def shell_of(path: str) -> type[Shell]:
    return type(path.rpartition(".")[2], (Shell,), {"path": path})


class Dtype(Shell):
    """numpy.dtype of numbers: its code, and the byte order that its state holds."""

    def resolve(self) -> Any:
        import numpy as np

        code, order = self.args[0], (self.state[1] if isinstance(self.state, tuple) else "=")
        if not isinstance(code, str) or not re.fullmatch(r"[fiub]\d{1,2}|bool|b1", code) or order not in tuple("<>=|"):
            raise Refused(f"an array of '{limits.short(code)}'")
        return np.dtype(code).newbyteorder(order)  # type: ignore[arg-type]


class Array(Shell):
    """numpy.ndarray, made from its bytes alone: numpy's own unpickling trusts what it is told about memory."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        dtype.resolve()  # refuses what is no number
        data = data if isinstance(data, bytes | bytearray) else encode(data)
        self.value = array_from(data, dtype, shape, "F" if fortran else "C")


def array_from(data: Any, dtype: Dtype, shape: Any, order: str) -> Any:
    import numpy as np

    return np.frombuffer(data, dtype.resolve()).reshape(tuple(shape), order=order)  # type: ignore[call-overload]


def array_stub(*args: Any) -> Array:
    return Array()


def scalar_from(dtype: Dtype, data: Any) -> Any:
    return array_from(data if isinstance(data, bytes) else encode(data), dtype, (), "C").item()


class Call:
    """A function or class that a file may call, and do nothing else with: BUILD would set its attributes, for all."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("a change of a function")


def encode(text: str, encoding: str = "latin1") -> bytes:
    """How old protocols write bytes; other codecs could do other things."""
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"the codec {limits.short(encoding)}")
    return text.encode("latin1")


def persistent(meta: Mapping[str, Any]) -> Shell:
    """torch_utils.persistence: an object with the source of its class, which stays unread."""
    shell = shell_of(f"torch_utils.persistence.{limits.short(meta['class_name'])}")()
    shell.state = meta["state"]
    return shell


def reconstructor(cls: Any, base: Any, state: Any) -> Shell:
    """copyreg._reconstructor: how old protocols make objects."""
    if not (isinstance(cls, type) and issubclass(cls, Shell)):
        raise Refused(f"{limits.short(cls)} made by hand")
    return cls() if state is None else cls(state)


class Named(Shell):
    """A dtype or a kind of storage, which a file may name and not make."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __new__(cls, name: str) -> Named:
        return dict.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"a change of {self.name}")
