"""A pretended accelerator: tensors that say they live on the device "pretend" and compute on the CPU.

It has a real accelerator's rules and none of its needs: tensors of two devices do not mix, a CPU generator does not fill
a device's tensor, and whatever makes the CPU wait for the device is noted with the line that did it. So mistakes that
only a GPU would show are found on a machine without one. `with Pretend() as device:` gives the device's name.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
ROOT = Path(__file__).resolve().parents[2]
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}
MIXES = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "index_put", "set_", "_copy_from"}


class _Module:
    """What torch asks of a backend."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def available() -> bool:
    import torch.utils.backend_registration as backends

    return hasattr(backends, "_setup_privateuseone_for_python_backend")


def _register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())


class PretendTensor(Tensor):
    """A CPU tensor in disguise."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        out = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        out.inner = inner.detach()
        return out

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({self.inner!r})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        out = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            out = torch.nn.Parameter(out, self.requires_grad)
        memo[id(self)] = out
        return out

    def tolist(self) -> Any:
        for mode in Pretend.entered:
            mode.waits[f"tolist {where()}"] += 1
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy ({where()})")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, None)


class _Generator(torch.Generator):
    """A generator of the CPU that fills tensors of the device it was made for."""

    made: dict[int, torch.Generator] = {}  # those of the device, by their address: operators see another wrapper

    def __new__(cls, device: Any = "cpu") -> _Generator:
        out = super().__new__(cls, "cpu" if _pretended(device) else device)
        if _pretended(device):
            cls.made[out._cdata] = out
        return out

    def __init__(self, device: Any = "cpu"):
        pass


def _pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def compute(func: Any, args: Any, kwargs: dict[str, Any], seen: Counter[str] | None) -> Any:
    """One operator: the device's rules, then the CPU's arithmetic."""
    flat, _ = tree_flatten((args, kwargs))
    mine = [a for a in flat if isinstance(a, PretendTensor)]
    others = [a for a in flat if isinstance(a, Tensor) and not isinstance(a, PretendTensor)]
    name = func._schema.name.rpartition("::")[2]
    device, generator = kwargs.get("device"), kwargs.get("generator")
    here = _pretended(device) or (bool(mine) and device is None)
    if not mine and not here and generator is None:
        return func(*args, **kwargs)
    wrong = [o for o in others if o.ndim > 0]
    if mine and wrong and name not in MIXES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, {name} got {NAME} and cpu {tuple(wrong[0].shape)} ({where()})"
        )
    if generator is not None and here != (generator._cdata in _Generator.made):
        kinds = (NAME, "cpu") if here else ("cpu", NAME)
        raise RuntimeError(f"Expected a '{kinds[0]}' device type for generator but found '{kinds[1]}' ({where()})")
    if seen is not None and (here or mine):
        note(func, name, args, kwargs, seen)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "_to_copy":
            kwargs.pop("pin_memory", None)
    plain_args, plain_kwargs = tree_map(lambda a: a.inner if isinstance(a, PretendTensor) else a, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and name == "copy_" and not isinstance(args[0], PretendTensor):
        return args[0]
    if here:
        out = tree_map(lambda t: PretendTensor(t) if isinstance(t, Tensor) else t, out)
    elif device is not None:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out) if mine else out


def note(func: Any, name: str, args: Any, kwargs: dict[str, Any], seen: Counter[str]) -> None:
    """Keep what makes the CPU wait: a value read, a shape that depends on values, a copy back, a copy of a mask."""
    waits = name in WAITS
    if name in ("_to_copy", "copy_"):
        target = kwargs.get("device") if name == "_to_copy" else args[0].device
        source = args[0] if name == "_to_copy" else args[1]
        there = isinstance(source, PretendTensor)
        waits = target is not None and torch.device(target).type != NAME and there
        if target is not None and torch.device(target).type == NAME and not there and source.ndim:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            name = "copy in"
    if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
        waits = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        waits = waits and not name.startswith(("index_put", "_index_put"))
    if name == "repeat_interleave":
        waits = kwargs.get("output_size") is None
    if waits:
        seen[f"{name} {where()}"] += 1


def where() -> str:
    """The innermost line of this repository outside this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.name != Path(__file__).name and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "?"


class _Made(TorchFunctionMode):
    """torch.tensor fills a device's memory below the dispatcher: make it on the CPU and bring it over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and not isinstance(args[0], Tensor):  # a list of the device's numbers: read one by one
            args = (tree_map(lambda v: v.item() if isinstance(v, PretendTensor) else v, args[0]), *args[1:])
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _pretended(kwargs.get("device")):
            made = func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
            return made if made.device.type == NAME else made.to(kwargs["device"])
        return func(*args, **kwargs)


class Pretend(TorchDispatchMode):
    """Inside, the device exists. waits: {what waited, and at which line: how often}."""

    entered: list[Pretend] = []

    def __init__(self) -> None:
        _register()
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.device = torch.device(NAME, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, self.waits)

    def __enter__(self) -> Pretend:
        self.before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.entered.append(self)
        self.generator, torch.Generator = torch.Generator, _Generator  # type: ignore[misc]
        self.made = _Made()
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.made.__exit__(*exc)
        torch.Generator = self.generator  # type: ignore[misc]
        _Generator.made.clear()
        self.entered.remove(self)
        super().__exit__(*exc)
        torch.__future__.set_swap_module_params_on_conversion(self.before)
