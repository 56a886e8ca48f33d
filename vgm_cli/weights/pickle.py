"""Foreign weights opened without running them: .pt, .pth, .ckpt, .bin (torch), .pkl (pickle), .npz.

A pickle is a program. Here every name it asks for is looked up in a table: tensors, arrays and containers are real;
classes that checkpoints carry beside their weights (argparse.Namespace, Lightning's callbacks, OmegaConf's nodes,
NVIDIA's persistent modules with their source, pickled torch modules) become inert `Shell`s, which only remember what
the file says about them; anything else is refused by name. torch files go through torch.load(weights_only=True) with
the shells added. A program can also build more than any memory holds, or a tree that takes for ever to walk: a budget
of operations, elements and bytes, counted before anything is made, ends both. Torch-free at import.

    networks = states(load("ffhq.pkl"))     # {"G": {...}, "D": {...}, "G_ema": {"mapping.fc0.weight": ...}}
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_cli import limits
from vgm_cli.errors import FAILED, USAGE, VgmError

if TYPE_CHECKING:
    from torch import Tensor

TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
PICKLES = (".pkl", ".pickle")
ARRAYS = (".npz",)

# -- what a pickle may name --------------------------------------------------------------------------------------------

INERT = (  # a name, or a package with its dot: an instance becomes a Shell
    "argparse.Namespace",
    "types.SimpleNamespace",
    "typing.Any",
    "pathlib.",
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "yacs.config.",
    "ml_collections.",
    "easydict.",
    "dnnlib.",
    "torch_utils.",
    "training.",
    "torch.nn.modules.",
    "torch.optim.",
)
COLLECTIONS: dict[str, Callable[..., Any]] = {  # made of other collections, never of what counts or generates
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "collections.deque": deque,
    **{f"builtins.{c.__name__}": c for c in (set, frozenset, list, tuple, dict)},
}
SCALARS: dict[str, Callable[..., Any]] = {
    f"builtins.{c.__name__}": c for c in (int, float, complex, bool, str, slice, object)
}
BYTES: dict[str, Callable[..., Any]] = {f"builtins.{c.__name__}": c for c in (bytes, bytearray)}
TENSOR = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)
DICTS = ("dnnlib.util.EasyDict", "easydict.EasyDict", "collections.defaultdict", "yacs.config.CfgNode")


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


ARRAYS_OF: dict[str, Callable[..., Any]] = {  # numpy before and since 2.0, "numpy." and "core" or "_core" left out
    "ndarray": Array,
    "dtype": Dtype,
    "multiarray._reconstruct": array_stub,
    "multiarray.scalar": scalar_from,
    "numeric._frombuffer": array_from,
}


HEAP_TYPE = 1 << 9  # of type.__flags__: classes written in Python, whose attributes can be set


class Refused(pickle.UnpicklingError):
    """A pickle asked for something that is not in the table."""


def dictionary(budget: Budget) -> type:
    """For dictionaries with manners of their own (EasyDict, defaultdict): their entries alone. A type, as objects are
    made from types, whose instances are OrderedDicts; a new one, so that a file cannot change it for others."""

    def new(cls: type, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:
        given = next((a for a in args if isinstance(a, Mapping)), {})
        budget.spend(len(given) + len(kwargs))
        return OrderedDict(given, **kwargs)

    return type("dictionary", (OrderedDict,), {"__new__": new})


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


REPLACED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": encode,
    "torch_utils.persistence._reconstruct_persistent_obj": persistent,
    "copyreg._reconstructor": reconstructor,
}


def inert(name: str) -> bool:
    return any(name == known or (known.endswith(".") and name.startswith(known)) for known in INERT)


def stand_in(name: str, machine: Unpickler) -> Any:
    """The object a pickle gets for "module.attribute". Refused: it is in no table."""
    if name in DICTS:
        return dictionary(machine.budget)
    if name == "torch.storage._load_from_bytes":
        return machine.storage
    if name in REPLACED:
        return machine.paid(REPLACED[name])
    if inert(name):
        return shell_of(name)
    if name.startswith("numpy.") and (short := re.sub(r"^numpy\.(_?core\.)?", "", name)) in ARRAYS_OF:
        found = ARRAYS_OF[short]
        return found if isinstance(found, type) else machine.paid(found)
    if name in COLLECTIONS:
        return machine.collector(COLLECTIONS[name])
    if name in BYTES:
        return machine.paid(BYTES[name], bytes, bytearray)
    if name in SCALARS:
        return scalar(SCALARS[name])
    if name == "builtins.range":
        return machine.range
    if name == "torch.Size":
        return machine.collector(size_of)
    if name.startswith("torch.") and allowed_of_torch(name):
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)
    raise Refused(limits.short(name, 200))


def size_of(*args: Any) -> Any:
    import torch

    return torch.Size(*args)


def scalar(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers and texts of numbers and texts: int("9" * 10**6) would take minutes, str() of a tree for ever."""

    def make(*args: Any) -> Any:
        if kind is not slice and not all(isinstance(a, str | int | float) and len(limits.short(a)) < 80 for a in args):
            raise Refused(f"a number or text of {', '.join(limits.short(a) for a in args)}")
        return kind(*args)

    return make


def allowed_of_torch(name: str) -> bool:
    """Constructors of tensors and names of types."""
    import torch

    module, _, attribute = name.rpartition(".")
    if module == "torch._utils":
        return attribute in TENSOR
    if name in ("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.device"):
        return True
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


class TooMuch(Exception):
    """A file would build more than there is room or time for; the text says what."""


class Budget:
    """What one file may still build. size: its bytes. TooMuch: it is used up."""

    OPERATIONS = 4_000_000  # of the pickle's program, and elements of collections; a second or two
    LIGHT = 64  # parts of a tuple that may be a key: hashing walks through it

    def __init__(self, size: int):
        self.operations, self.bytes, self.size = self.OPERATIONS, 4 * size + limits.SPARE, size

    def spend(self, operations: int = 0, bytes: int = 0) -> None:
        self.operations -= operations
        self.bytes -= bytes
        if self.operations < 0:
            raise TooMuch(f"more than {self.OPERATIONS:,} objects")
        if self.bytes < 0:
            raise TooMuch(f"more than {4 * self.size + limits.SPARE:,} bytes out of {self.size:,}")


class Counted(dict):  # type: ignore[type-arg]
    """The machine's table of instructions; looking one up is paid for."""

    def __init__(self, table: Mapping[int, Any], budget: Budget):
        super().__init__(table)
        self.budget = budget

    def __getitem__(self, key: int) -> Any:
        self.budget.spend(1)
        return super().__getitem__(key)


class Stream:
    """A file whose reads are never longer than what is left of it: memory is set aside for what is asked."""

    def __init__(self, f: Any, size: int):
        self.f, self.size, self.readline = f, size, f.readline

    def read(self, n: int) -> bytes:
        if n > 1 << 16 and n > self.size - self.f.tell():
            raise EOFError("it is cut off")
        return self.f.read(n)  # type: ignore[no-any-return]


MACHINE: Any = pickle._Unpickler  # the one written in Python, whose instructions can be counted


class Unpickler(MACHINE):  # type: ignore[misc]
    """pickle's machine with the table above in place of imports, and a budget. f: at the start of a pickle, of a file
    of `budget.size` bytes."""

    dispatch: dict[int, Any] = dict(MACHINE.dispatch)

    def __init__(self, f: Any, budget: Budget):
        super().__init__(Stream(f, budget.size), encoding="latin1")
        self.budget, self.names = budget, set[str]()
        self.dispatch = Counted(type(self).dispatch, budget)
        self.weights: dict[int, tuple[Any, int]] = {}  # of tuples: itself, so that its id stays its own, and its parts

    def find_class(self, module: str, name: str) -> Any:
        full = modern(f"{module} {name}")
        self.names.add(full)
        found = self.find(full)
        own = isinstance(found, type) and (issubclass(found, Shell | OrderedDict) or not found.__flags__ & HEAP_TYPE)
        return found if own or not callable(found) else Call(found)

    def find(self, name: str) -> Any:
        return stand_in(name, self)

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(f"a persistent object {limits.short(pid)}")

    # -- what is counted

    def weigh(self, made: Any) -> Any:
        """A new tuple or frozenset, which may hold others many times over. TooMuch: it unfolds without end."""
        weight = 1 + sum(self.weights[id(x)][1] if id(x) in self.weights else 1 for x in made)
        self.budget.spend(len(made))
        if weight > self.budget.OPERATIONS:
            raise TooMuch(f"a {type(made).__name__} of more than {self.budget.OPERATIONS:,} parts")
        self.weights[id(made)] = (made, weight)
        return made

    def keys(self, keys: Any) -> None:
        light = (None, 1)
        if any(
            k.bit_length() > 64 if type(k) is int else self.weights.get(id(k), light)[1] > self.budget.LIGHT
            for k in keys
        ):
            raise TooMuch("keys that take too long to look up")

    def collector(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """A collection made of other collections."""

        def make(*args: Any) -> Any:
            for a in args[:1] if kind is deque else args:  # the other one is its length
                if not isinstance(a, list | tuple | set | frozenset | dict | deque):
                    raise Refused(f"a {getattr(kind, '__name__', 'size')} of {limits.short(a)}")
                self.budget.spend(len(a))
                if kind not in (list, tuple, deque, size_of):
                    self.keys(a)
                self.keys(p[0] for p in a if kind in (dict, OrderedDict) and isinstance(p, tuple | list) and p)
            made = kind(*args)
            return self.weigh(made) if isinstance(made, tuple | frozenset) else made

        return make

    def paid(self, function: Callable[..., Any], *kinds: type) -> Callable[..., Any]:
        """A function whose texts and bytes are copied. kinds: what its first argument has to be, or a latin-1 text."""

        def make(*args: Any) -> Any:
            self.budget.spend(bytes=sum(len(a) for a in args if isinstance(a, bytes | bytearray | str)))
            if kinds and args and not isinstance(args[0], kinds):
                if not (len(args) == 2 and isinstance(args[0], str)):
                    raise Refused(f"bytes of {limits.short(args[0])}")
                return function(encode(*args))
            return function(*args)

        return make

    def range(self, *args: Any) -> range:
        if not all(type(a) is int and abs(a) <= self.budget.OPERATIONS for a in args):
            raise Refused("a long range")
        return range(*args)

    def storage(self, data: bytes) -> Any:
        """torch.storage._load_from_bytes: a torch file inside a pickle, opened as carefully."""
        self.budget.spend(bytes=len(data))
        return load_legacy(data, self.budget)

    # -- instructions that make something of what the file says

    def load_tuple(self) -> None:
        items = self.pop_mark()  # which also renews self.append
        self.append(self.weigh(tuple(items)))

    def last(self, n: int) -> None:
        self.stack[-n:] = [self.weigh(tuple(self.stack[-n:]))]

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.keys(items)
        self.append(self.weigh(frozenset(items)))

    def load_setitem(self) -> None:
        self.keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self.keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        self.keys(self.stack)
        super().load_additems()

    def load_long(self) -> None:
        text = self.readline()
        if len(text) > 100:
            raise TooMuch("a number of more than 100 digits")
        self.append(int(text.rstrip(b"L\n"), 0))

    def load_long4(self) -> None:
        raise TooMuch("a number of more than 255 bytes")

    def load_bytearray8(self) -> None:
        (n,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(n)))

    def load_build(self) -> None:
        state, made = self.stack[-1], self.stack[-2]
        self.budget.spend(sum(len(s) for s in (state, *(state if isinstance(state, tuple) else ())) if is_mapping(s)))
        if isinstance(made, Array):
            self.budget.spend(bytes=sum(len(a) for a in state if isinstance(a, bytes | str)))
        elif isinstance(made, tuple | list | set | frozenset | deque | bytearray):
            raise Refused("a change of a collection")
        super().load_build()

    def arguments(self, *given: Any) -> None:
        if not all(isinstance(a, tuple | dict) for a in given):
            raise Refused("a call with something other than arguments")
        self.budget.spend(sum(map(len, given)))

    def load_reduce(self) -> None:
        self.arguments(self.stack[-1])
        super().load_reduce()

    def load_newobj_ex(self) -> None:
        self.arguments(*self.stack[-2:])
        super().load_newobj_ex()

    def load_newobj(self) -> None:
        self.arguments(self.stack[-1])
        if isinstance(self.stack[-2], Call):
            args, function = self.stack.pop(), self.stack.pop()
            self.append(function(*args))
        else:
            super().load_newobj()

    dispatch |= {
        pickle.TUPLE[0]: load_tuple,
        pickle.TUPLE1[0]: lambda self: self.last(1),
        pickle.TUPLE2[0]: lambda self: self.last(2),
        pickle.TUPLE3[0]: lambda self: self.last(3),
        pickle.FROZENSET[0]: load_frozenset,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.LONG[0]: load_long,
        pickle.LONG4[0]: load_long4,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
    }


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


class Named(Shell):
    """A dtype or a kind of storage, which a file may name and not make."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __new__(cls, name: str) -> Named:
        return dict.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"a change of {self.name}")


# -- opening files -----------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """ "safetensors", "torch", "pickle" or "arrays", by what a file begins with and else by its suffix; "" for others.

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
    if start[:1] == b"\x80":
        return "pickle" if suffix in PICKLES else "torch"
    for mark, what in STRANGERS.items():
        if start.lstrip().lower().startswith(mark):
            raise VgmError(f"{path} is {what}, not weights", "download the file itself", FAILED)
    if suffix in TORCH_FILES:
        what = "is empty" if not start else "is not a file of torch.save's: neither an archive nor a pickle"
        raise VgmError(f"{path} {what}", "it may be cut off or of another kind", FAILED)
    known = {**dict.fromkeys(PICKLES, "pickle"), **dict.fromkeys(ARRAYS, "arrays")}
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
    }
    kind = kind_of(path)
    if kind not in openers:
        known = ", ".join((".safetensors", *TORCH_FILES, *PICKLES, *ARRAYS))
        raise VgmError(f"{path} is not a kind of file that holds weights", f"known: {known}", USAGE)
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


load = read


def first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def refusal(path: Path, name: str) -> VgmError:
    return VgmError(
        f"{path} asks for {name} when it is opened, which is refused: nothing was executed",
        "`vgm convert --trust-pickle` opens a file whose origin you trust; it can run any program",
        FAILED,
    )


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
    shells: list[Any] = [(stand_in(name, table), name) for name in sorted(names - known_to_torch())]
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


def reason_of(e: Exception) -> str:
    """The sentence in torch's long refusal that says what it met."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("WeightsUnpickler error:", "Unsupported"))), lines[-1])[
        :200
    ]


def known_to_torch() -> set[str]:
    from torch import _weights_only_unpickler as torch_table

    return set(torch_table._get_allowed_globals())


def open_pickle(path: Path, trust: bool) -> Any:
    """A plain pickle (EDM, StyleGAN, ...)."""
    with open(path, "rb") as f:
        if trust:
            return pickle.load(f, encoding="latin1")
        return Unpickler(f, Budget(path.stat().st_size)).load()


def open_arrays(path: Path, trust: bool) -> dict[str, Any]:
    return limits.read_npz(path)


def is_torch_legacy(start: bytes) -> bool:
    """Whether a file begins as torch.save's did before 1.6: with the pickle of a magic number."""
    magic = 0x1950A86A20F9469CFC6C
    return magic.to_bytes(10, "little") in start or str(magic).encode() in start


def modern(name: str) -> str:
    """GLOBAL's "module attribute" as Python 3 knows it."""
    import _compat_pickle

    module, _, attribute = name.partition(" ")
    if (module, attribute) in _compat_pickle.NAME_MAPPING:
        module, attribute = _compat_pickle.NAME_MAPPING[module, attribute]
    else:
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    return f"{module}.{attribute}"


# -- states ------------------------------------------------------------------------------------------------------------


def states(found: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of every network in what `load` gave: {entry: {name: tensor}}.

    An entry is a key of a mapping, the network's own name (TensorFlow's tuples) or its number; a lone network or bare
    state is "model". Mappings of tensors are networks too; what holds no tensor is left out.
    """
    from torch import Tensor

    entries = understood(found)
    if not isinstance(entries, Mapping):
        return {}
    if any(isinstance(v, Tensor) for v in entries.values()):
        entries = {"model": entries}
    named = {k: {n: t for n, t in v.items() if isinstance(t, Tensor)} for k, v in entries.items() if is_mapping(v)}
    return {k: v for k, v in named.items() if v}


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def contents(found: Any) -> dict[str, Any]:
    """What `read` gave as plain dictionaries: arrays as tensors, pickled networks as their states, tuples by name. The
    top level of a bare state is tensors; of a checkpoint, entries some of which are dictionaries of tensors.

    VgmError: there is nothing of the kind.
    """
    state = understood(found)
    if not isinstance(state, Mapping):
        raise VgmError(f"it holds a {type(found).__name__}, not a dictionary of tensors", code=FAILED)
    return dict(state)


def understood(found: Any) -> Any:
    """Walk().plain(found). VgmError: it is not built as networks are, or repeats itself without end."""
    try:
        return Walk().plain(found)
    except TooMuch as e:
        raise VgmError(f"it holds {e}, parts of which repeat", code=FAILED) from e
    except (AttributeError, IndexError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as e:
        raise VgmError(f"it holds a network that is not built as networks are ({type(e).__name__})", code=FAILED) from e


def name_of(network: Any) -> str:
    state = network.state if isinstance(network, Shell) else None
    name = state.get("name") if isinstance(state, Mapping) else None
    return name if isinstance(name, str) else ""


def is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "dtype") and getattr(value.dtype, "kind", "O") in "fiub"


def tensor_of(value: Any) -> Tensor:
    import numpy as np
    import torch

    array = np.array(value)  # its own memory: files are mapped read-only
    if array.dtype.byteorder not in "=|" and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def module_of(value: Any) -> Mapping[str, Any] | None:
    """The attributes of a pickled torch module, also of NVIDIA's persistent kind; None for anything else."""
    state = value.state if isinstance(value, Shell) else None
    return state if isinstance(state, Mapping) and "_parameters" in state and "_modules" in state else None


class Walk:
    """One way through what `read` gave: every visit is paid for, as parts that stand in many places unfold; an array
    that does becomes one tensor."""

    def __init__(self) -> None:
        self.budget = Budget(0)
        self.tensors: dict[int, Tensor] = {}

    def plain(self, value: Any, depth: int = 0) -> Any:
        import torch

        self.budget.spend(1)
        module = module_of(value)
        if module is not None:
            return self.module_state(module)
        if hasattr(value, "state_dict") and isinstance(value, torch.nn.Module):  # opened with trust
            return dict(value.state_dict())
        if isinstance(value, torch.nn.Parameter):
            return value.data
        if isinstance(value, Array):
            value = value.value
        if is_array(value):
            return self.tensors[id(value)] if id(value) in self.tensors else self.new(value)
        if isinstance(value, Shell) and isinstance(value.state, Mapping) and "variables" in value.state:
            return self.tf_variables(value)
        if isinstance(value, Mapping) and depth < 6:
            return {self.text(k): self.plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, tuple | list) and depth == 0:
            return {name_of(v) or str(i): self.plain(v, 1) for i, v in enumerate(value)}
        return value

    def text(self, key: Any) -> str:
        return key if isinstance(key, str) else limits.short(key)

    def new(self, array: Any) -> Tensor:
        self.tensors[id(array)] = tensor = tensor_of(array)
        return tensor

    def module_state(self, attributes: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
        """state_dict() of a pickled torch module, from its attributes."""
        found: dict[str, Tensor] = {}
        transient = attributes.get("_non_persistent_buffers_set") or ()
        for name, tensor in {**attributes["_parameters"], **(attributes.get("_buffers") or {})}.items():
            self.budget.spend(1, len(prefix))
            if tensor is not None and name not in transient:
                found[prefix + name] = tensor.detach()
        for name, child in attributes["_modules"].items():
            self.budget.spend(1, len(prefix))
            own = module_of(child)
            if own is not None:
                found |= self.module_state(own, f"{prefix}{self.text(name)}.")
        return found

    def tf_variables(self, network: Shell, prefix: str = "") -> dict[str, Tensor]:
        """Variables of a pickled dnnlib.tflib Network (StyleGAN in TensorFlow), sub-networks below their names."""
        import torch

        found: dict[str, Tensor] = {}
        for name, value in network.state["variables"]:  # scalars, such as a noise strength, come as numbers
            self.budget.spend(1, len(prefix))
            number = isinstance(value, int | float)
            found[f"{prefix}{self.text(name)}"] = torch.tensor(value) if number else self.plain(value)
        for name, part in (network.state.get("components") or {}).items():
            self.budget.spend(1, len(prefix))
            if isinstance(part, Shell) and isinstance(part.state, Mapping) and "variables" in part.state:
                found |= self.tf_variables(part, f"{prefix}{self.text(name)}/")
        return found
