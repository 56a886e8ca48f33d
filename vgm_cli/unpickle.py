"""Foreign weights opened without running them: .pt, .pth, .ckpt, .bin (torch), .pkl (pickle), .npz.

A pickle is a program. Here every name it asks for is looked up in a table: tensors, arrays and containers are real;
classes that checkpoints carry beside their weights (argparse.Namespace, Lightning's callbacks, OmegaConf's nodes,
NVIDIA's persistent modules with their source, pickled torch modules) become inert `Shell`s, which only remember what
the file says about them; anything else is refused by name. torch files go through torch.load(weights_only=True) with
the shells added. Torch-free at import.

    networks = states(load("ffhq.pkl"))     # {"G": {...}, "D": {...}, "G_ema": {"mapping.fc0.weight": ...}}
"""

from __future__ import annotations

import importlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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
REAL = {  # plain data types
    "collections.OrderedDict": "collections:OrderedDict",
    "collections.Counter": "collections:Counter",
    "collections.deque": "collections:deque",
    **{f"builtins.{n}": f"builtins:{n}" for n in "set frozenset bytearray complex slice range".split()},
    **{f"builtins.{n}": f"builtins:{n}" for n in "int float str bool bytes list tuple dict object".split()},
}
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

        code, order = str(self.args[0]), (self.state[1] if isinstance(self.state, tuple) else "=")
        if not re.fullmatch(r"[fiub]\d{1,2}|bool|b1", code) or order not in ("<", ">", "=", "|"):
            raise Refused(f"an array of '{code}'")
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


ARRAYS_OF = {  # numpy before and since 2.0, "numpy." and "core" or "_core" left out
    "ndarray": Array,
    "dtype": Dtype,
    "multiarray._reconstruct": array_stub,
    "multiarray.scalar": scalar_from,
    "numeric._frombuffer": array_from,
}


HEAP_TYPE = 1 << 9  # of type.__flags__: classes written in Python, whose attributes can be set


class Refused(pickle.UnpicklingError):
    """A pickle asked for something that is not in the table."""


def dictionary() -> type:
    """For dictionaries with manners of their own (EasyDict, defaultdict): their entries alone. A type, as objects are
    made from types, whose instances are OrderedDicts; a new one, so that a file cannot change it for others."""

    def new(cls: type, *args: Any, **kwargs: Any) -> OrderedDict[Any, Any]:
        return OrderedDict(next((a for a in args if isinstance(a, Mapping)), {}), **kwargs)

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
        raise Refused(f"the codec {encoding}")
    return text.encode("latin1")


def persistent(meta: Mapping[str, Any]) -> Shell:
    """torch_utils.persistence: an object with the source of its class, which stays unread."""
    shell = shell_of(f"torch_utils.persistence.{meta['class_name']}")()
    shell.state = meta["state"]
    return shell


def reconstructor(cls: Any, base: Any, state: Any) -> Shell:
    """copyreg._reconstructor: how old protocols make objects."""
    if not (isinstance(cls, type) and issubclass(cls, Shell)):
        raise Refused(f"{cls} made by hand")
    return cls() if state is None else cls(state)


def storage_from(data: bytes) -> Any:
    """torch.storage._load_from_bytes: a torch file inside a pickle, opened as carefully."""
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


REPLACED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": encode,
    "torch.storage._load_from_bytes": storage_from,
    "torch_utils.persistence._reconstruct_persistent_obj": persistent,
    "copyreg._reconstructor": reconstructor,
}


def inert(name: str) -> bool:
    return any(name == known or (known.endswith(".") and name.startswith(known)) for known in INERT)


def stand_in(name: str) -> Any:
    """The object a pickle gets for "module.attribute". Refused: it is in no table."""
    if name in DICTS:
        return dictionary()
    if name in REPLACED:
        return REPLACED[name]
    if inert(name):
        return shell_of(name)
    if name.startswith("numpy.") and (short := re.sub(r"^numpy\.(_?core\.)?", "", name)) in ARRAYS_OF:
        return ARRAYS_OF[short]
    target = REAL.get(name)
    if target is None and name.startswith("torch.") and allowed_of_torch(name):
        target = ":".join(name.rsplit(".", 1))
    if target is None:
        raise Refused(name)
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def allowed_of_torch(name: str) -> bool:
    """Constructors of tensors and names of types."""
    import torch

    module, _, attribute = name.rpartition(".")
    if module == "torch._utils":
        return attribute in TENSOR
    if name in ("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.Size", "torch.device"):
        return True
    value = getattr(torch, attribute, None) if module == "torch" else None
    return isinstance(value, torch.dtype) or (attribute.endswith("Storage") and isinstance(value, type))


class Unpickler(pickle.Unpickler):
    """pickle's machine with the table above in place of imports."""

    def find_class(self, module: str, name: str) -> Any:
        found = stand_in(modern(f"{module} {name}"))
        own = isinstance(found, type) and (issubclass(found, Shell | OrderedDict) or not found.__flags__ & HEAP_TYPE)
        return found if own or not callable(found) else Call(found)

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(f"a persistent object {pid!r:.40}")


# -- opening files -----------------------------------------------------------------------------------------------------


def read(path: Path, trust: bool = False) -> Any:
    """Whatever a .pt, .pth, .ckpt, .bin, .pkl or .npz holds, tensors on the CPU. Nothing in it is executed unless
    `trust`, which lets the file run any program. VgmError: refused, cut off, of an unknown kind."""
    if not path.is_file():
        raise VgmError(f"no such file: {path}", code=USAGE)
    suffix = path.suffix.lower()
    openers: dict[str, Callable[[Path, bool], Any]] = {
        **dict.fromkeys(TORCH_FILES, open_torch),
        **dict.fromkeys(PICKLES, open_pickle),
        **dict.fromkeys(ARRAYS, open_arrays),
    }
    if suffix not in openers:
        raise VgmError(f"{path} is not a kind of file that holds weights", f"known: {', '.join(openers)}", USAGE)
    try:
        return openers[suffix](path, trust)
    except VgmError:
        raise
    except Refused as e:
        raise refusal(path, str(e)) from e
    except (ModuleNotFoundError, AttributeError) as e:
        if not trust:
            raise VgmError(f"{path} is not readable: {e}", code=FAILED) from e
        raise VgmError(f"{path} needs code that is not installed: {e}", "install what wrote it", FAILED) from e
    except MemoryError as e:
        raise VgmError(f"{path} does not fit into memory", code=FAILED) from e
    except Exception as e:
        raise VgmError(
            f"{path} is not readable: {first_line(e)}", "it may be cut off or of another kind", FAILED
        ) from e


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
        start = f.read(4)
    if start[:1] == b"\x80" and not is_torch_legacy(path):
        return open_pickle(path, trust)  # a plain pickle under a torch suffix
    if not start:
        raise VgmError(f"{path} is empty", code=FAILED)
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise VgmError(f"{path} is cut off: the end of the archive is missing", "copy or download it again", FAILED)
    names = sorted(set(names_asked(path)) - known_to_torch())
    shells: list[Any] = []
    for name in names:
        try:
            shells.append((stand_in(name), name))
        except Refused as e:
            raise refusal(path, name) from e
    with torch.serialization.safe_globals(shells), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as e:
            raise VgmError(
                f"{path} holds more than tensors and plain data: {reason_of(e)}",
                "`vgm convert --trust-pickle` opens a file whose origin you trust; it can run any program",
                FAILED,
            ) from e


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
        return Unpickler(f, encoding="latin1").load()


def open_arrays(path: Path, trust: bool) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as f:  # object arrays are a ValueError
        return {name: f[name] for name in f.files}


# -- looking at a pickle without running it ----------------------------------------------------------------------------


def is_torch_legacy(path: Path) -> bool:
    """torch.save's format of before 1.6: a pickled magic number, then the object."""
    try:
        with open(path, "rb") as f:
            return any(arg == 0x1950A86A20F9469CFC6C for _, arg, _ in pickletools.genops(f))
    except Exception:
        return False


def names_asked(path: Path) -> Iterator[str]:
    """Every "module.attribute" that the pickles of a torch file name, read off its bytes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
            if not inside or any(n.endswith("constants.pkl") for n in archive.namelist()):
                raise VgmError(f"{path} is not a file of torch.save's", "TorchScript programs hold code", FAILED)
            for name in inside:
                yield from names_in(io.BytesIO(archive.read(name)))
    else:
        with open(path, "rb") as f:
            for _ in range(4):  # magic number, protocol, system, object
                yield from names_in(f)


def names_in(stream: BinaryIO) -> Iterator[str]:
    """Names asked for by one pickle: GLOBAL's argument, or the two strings before STACK_GLOBAL."""
    strings: list[str] = []
    for opcode, arg, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            yield modern(str(arg))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(arg, str):
            strings.append(arg)


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

    entries = plain(found)
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
    state = plain(found)
    if not isinstance(state, Mapping):
        raise VgmError(f"it holds a {type(found).__name__}, not a dictionary of tensors", code=FAILED)
    return dict(state)


def name_of(network: Any) -> str:
    state = network.state if isinstance(network, Shell) else None
    return str(state.get("name", "")) if isinstance(state, Mapping) else ""


def plain(value: Any, depth: int = 0) -> Any:
    import torch

    module = module_of(value)
    if module is not None:
        return module_state(module)
    if hasattr(value, "state_dict") and isinstance(value, torch.nn.Module):  # opened with trust
        return dict(value.state_dict())
    if isinstance(value, torch.nn.Parameter):
        return value.data
    if isinstance(value, Array):
        value = value.value
    if is_array(value):
        return tensor_of(value)
    if isinstance(value, Shell) and tf_variables(value) is not None:
        return tf_variables(value)
    if isinstance(value, Mapping) and depth < 3:
        return {str(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, tuple | list) and depth == 0:
        return {name_of(v) or str(i): plain(v, 1) for i, v in enumerate(value)}
    return value


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


def module_state(attributes: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """state_dict() of a pickled torch module, from its attributes."""
    found: dict[str, Tensor] = {}
    transient = attributes.get("_non_persistent_buffers_set") or ()
    for name, tensor in {**attributes["_parameters"], **(attributes.get("_buffers") or {})}.items():
        if tensor is not None and name not in transient:
            found[prefix + name] = tensor.detach()
    for name, child in attributes["_modules"].items():
        own = module_of(child)
        if own is not None:
            found |= module_state(own, f"{prefix}{name}.")
    return found


def tf_variables(network: Any, prefix: str = "") -> dict[str, Tensor] | None:
    """Variables of a pickled dnnlib.tflib Network (StyleGAN in TensorFlow), sub-networks below their names."""
    state = network.state if isinstance(network, Shell) else None
    if not isinstance(state, Mapping) or "variables" not in state:
        return None
    import torch

    found = {  # scalars, such as a noise strength, come as numbers
        f"{prefix}{name}": torch.tensor(value) if isinstance(value, int | float) else plain(value)
        for name, value in state["variables"]
    }
    for name, part in (state.get("components") or {}).items():
        found |= tf_variables(part, f"{prefix}{name}/") or {}
    return found
