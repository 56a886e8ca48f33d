"""Foreign pickles without their code: tensors and plain containers come out, classes become inert shells.

Research code publishes whole Python objects (NVlabs' networks carry their own source, which an ordinary unpickler runs).
Here nothing that a file names is ever called, but for the few constructors of tensors, arrays and containers in `ALLOWED`.
Classes of the packages in `SHELLS` become `Shell`s, which only remember what the file says about them; every other name
is refused with a VgmError.

    networks = states(load("ffhq.pkl"))     # {"G": {...}, "D": {...}, "G_ema": {"mapping.fc0.weight": ...}}
"""

from __future__ import annotations

import importlib
import io
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError

SHELLS = ("dnnlib", "torch_utils", "training", "torch.nn.modules")  # NVlabs' StyleGANs and EDMs; torch's own layers

# module: names that may be called (or be a base) as they are
ALLOWED: dict[str, tuple[str, ...]] = {
    "builtins": ("set", "frozenset", "bytearray", "complex", "object"),
    "collections": ("OrderedDict",),
    "torch": ("Size", "device"),
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"),
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
}


class Shell(dict):  # type: ignore[type-arg]  # holds whatever the file puts in
    """An object of a class that is not loaded. Items of dict-like objects are its items; `state` is what the file gives
    for its attributes; `module` and `name` are those of its class."""

    module, name = "", ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.args, self.kwargs, self.parts = args, kwargs, []
        self.state: Any = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Shell:
        shell = super().__new__(cls)
        Shell.__init__(shell, *args, **kwargs)
        return shell

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        self.parts.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self.parts.extend(values)

    def __repr__(self) -> str:
        return f"<shell of {self.module}.{self.name}>"


class _Call:
    """A function that a file may call, and do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a file may not change a function")


def _shell_type(module: str, name: str) -> type[Shell]:
    return type(name.rpartition(".")[2], (Shell,), {"module": module, "name": name})


def _persistent(meta: Mapping[str, Any]) -> Shell:
    """torch_utils.persistence: an object with the source of its class, which stays unread."""
    shell = _shell_type("torch_utils.persistence", str(meta["class_name"]))()
    shell.state = meta["state"]
    return shell


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How old protocols write bytes; other codecs could do other things."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


def _reconstructor(cls: Any, base: Any, state: Any) -> Any:
    """How old protocols make objects."""
    if not (isinstance(cls, type) and issubclass(cls, Shell)):
        raise pickle.UnpicklingError(f"{cls} is made by hand")
    return cls() if state is None else cls(state)


REPLACED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
}


class Unpickler(pickle.Unpickler):
    """Finds only what the module's docstring lists. shells: packages whose classes become shells."""

    shells: tuple[str, ...] = SHELLS

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) in REPLACED:
            return _Call(REPLACED[module, name])
        if name in ALLOWED.get(module, ()):
            found = getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)
            return found if isinstance(found, type) else _Call(found)
        if any(module == s or module.startswith(s + ".") for s in self.shells):
            return _shell_type(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load(path: str | Path, shells: Iterable[str] = SHELLS) -> Any:
    """What a pickle, or a file of torch.save with more in it than tensors, holds. VgmError: anything not allowed."""
    kind = type("Unpickler", (Unpickler,), {"shells": tuple(shells)})
    try:
        if zipfile.is_zipfile(path):
            return torch.load(path, "cpu", weights_only=False, pickle_module=SimpleNamespace(Unpickler=kind))
        with open(path, "rb") as file:
            return kind(file).load()
    except OSError as e:
        raise VgmError(f"{path} cannot be read: {e.strerror or e}", code=USAGE) from e
    except Exception as e:  # a damaged or hostile file can raise anything
        raise VgmError(f"{path} is not loaded: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
                       "only tensors, arrays and known networks are read from pickles", USAGE) from e  # fmt: skip


def states(loaded: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of every network in what `load` gave: {entry: {name: tensor}}.

    An entry is a key of a mapping, or the network's own name (TensorFlow's tuples), or its number; a lone network is
    "model". Mappings of tensors are networks too; what holds no tensor is left out.
    """
    if isinstance(loaded, Shell):
        items: list[tuple[str, Any]] = [("model", loaded)]
    elif isinstance(loaded, Mapping):
        if any(isinstance(v, Tensor) for v in loaded.values()):
            return {"model": {k: v for k, v in loaded.items() if isinstance(v, Tensor)}}
        items = [(str(k), v) for k, v in loaded.items()]
    else:
        items = [(_name(v) or str(i), v) for i, v in enumerate(loaded)] if isinstance(loaded, (list, tuple)) else []
    found = {name: _tensors(value) for name, value in items}
    return {name: state for name, state in found.items() if state}


def _name(value: Any) -> str:
    state = value.state if isinstance(value, Shell) else None
    return str(state.get("name", "")) if isinstance(state, Mapping) else ""


def _tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Names as the network's own library gives them: "a.b.weight" (torch), "a/b/weight" (dnnlib.tflib)."""
    if isinstance(value, Mapping) and not isinstance(value, Shell):
        return {prefix + str(k): v.detach() for k, v in value.items() if isinstance(v, Tensor)}
    state = value.state if isinstance(value, Shell) else None
    if not isinstance(state, Mapping):
        return {}
    if "variables" in state:
        out = {prefix + name: torch.as_tensor(array).clone() for name, array in state["variables"]}
        for name, part in dict(state.get("components") or {}).items():
            out |= _tensors(part, f"{prefix}{name}/")
        return out
    temporary = state.get("_non_persistent_buffers_set") or ()
    own = {**(state.get("_parameters") or {}), **(state.get("_buffers") or {})}
    out = {prefix + k: v.detach() for k, v in own.items() if isinstance(v, Tensor) and k not in temporary}
    for name, part in dict(state.get("_modules") or {}).items():
        out |= _tensors(part, f"{prefix}{name}.")
    return out
