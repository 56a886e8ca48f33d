"""The table of names that a pickle may use, and of the harmless stand-ins that it gets for them."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from vgm_cli.weights.pickle.shells import (
    Array,
    Dtype,
    array_from,
    array_stub,
    encode,
    persistent,
    reconstructor,
    scalar_from,
)

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

ARRAYS_OF: dict[str, Callable[..., Any]] = {  # numpy before and since 2.0, "numpy." and "core" or "_core" left out
    "ndarray": Array,
    "dtype": Dtype,
    "multiarray._reconstruct": array_stub,
    "multiarray.scalar": scalar_from,
    "numeric._frombuffer": array_from,
}

REPLACED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": encode,
    "torch_utils.persistence._reconstruct_persistent_obj": persistent,
    "copyreg._reconstructor": reconstructor,
}


def inert(name: str) -> bool:
    return any(name == known or (known.endswith(".") and name.startswith(known)) for known in INERT)


def size_of(*args: Any) -> Any:
    import torch

    return torch.Size(*args)


def allowed_of_torch(name: str) -> bool:
    """Constructors of tensors and names of types."""
    import torch

    module, _, attribute = name.rpartition(".")
    if module == "torch._utils":
        return attribute in TENSOR
    if name in ("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.device"):
        return True
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def known_to_torch() -> set[str]:
    from torch import _weights_only_unpickler as torch_table

    return set(torch_table._get_allowed_globals())


def modern(name: str) -> str:
    """GLOBAL's "module attribute" as Python 3 knows it."""
    import _compat_pickle

    module, _, attribute = name.partition(" ")
    if (module, attribute) in _compat_pickle.NAME_MAPPING:
        module, attribute = _compat_pickle.NAME_MAPPING[module, attribute]
    else:
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    return f"{module}.{attribute}"
