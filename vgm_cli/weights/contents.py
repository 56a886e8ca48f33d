"""Plain dictionaries of tensors from whatever a foreign file holds: arrays become tensors, pickled networks their
states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vgm_cli import limits
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.weights.budget import Budget, TooMuch
from vgm_cli.weights.pickle.shells import Array, Shell

if TYPE_CHECKING:
    from torch import Tensor


def contents(found: Any) -> dict[str, Any]:
    """What reading.read gave as plain dictionaries: arrays as tensors, pickled networks as their states, tuples by
    name. The top level of a bare state is tensors; of a checkpoint, entries some of which are dictionaries of tensors.

    VgmError: there is nothing of the kind.
    """
    state = understood(found)
    if not isinstance(state, Mapping):
        raise VgmError(f"it holds a {type(found).__name__}, not a dictionary of tensors", code=FAILED)
    return dict(state)


def understood(found: Any) -> Any:
    """Walk().plain(found). VgmError: it is not built as networks are, or it repeats itself without end."""
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
    """One pass over what reading.read returned. Every visit counts against a budget, since parts that stand in many
    places unfold; an array that stands in many places becomes one tensor."""

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
