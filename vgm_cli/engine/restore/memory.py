"""How much memory a restoration takes, estimated before it starts: networks, and the largest work space of one
evaluation, measured on tensors without values."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vgm_cli.api import FollowsPictures, HasTiles
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.ui import ui


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that live at the same time. most: the largest count."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()  # by storage
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.users[key] += 1
        if self.users[key] == 1:
            self.live += size
            self.most = max(self.most, self.live)
        weakref.finalize(tensor, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            self.live -= size


class Fused(TorchFunctionMode):
    """Attention without its matrix, which fused kernels never hold as a whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


class Bound(nn.Module):
    """A method of a module as the module's call."""

    def __init__(self, inner: nn.Module, name: str):
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, self.name)(*args, **kwargs)


def work_space(module: nn.Module, name: str, **given: Tensor) -> int:
    """Bytes of the largest work space of module.name(**given), whose tensors are on the meta device."""
    bound = Bound(module, name)
    tensors = (*bound.named_parameters(), *bound.named_buffers())  # as fp32, whatever their precision is
    state = {k: v.to("meta", torch.float32 if v.is_floating_point() else v.dtype) for k, v in tensors}
    with torch.no_grad(), Fused(), Peak() as peak:
        out = torch.func.functional_call(bound, state, kwargs=given)
        del out
    return peak.most


def size_of(module: Any) -> int:
    """Bytes of a network's parameters and buffers."""
    if not isinstance(module, nn.Module):
        return 0
    return sum(
        t.numel() * t.element_size() for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    )


def estimate(loaded: Loaded, method: FollowsPictures, size: tuple[int, int], precision: str) -> dict[str, int]:
    """{what: bytes} for one picture of `size` (H, W): networks and the two largest work spaces, which are not needed
    at the same time."""
    parts = {"network": size_of(loaded.model), "codec": size_of(loaded.codec)}
    parts["texts"] = sum(size_of(p.condition) for p in loaded.conditions.parts.values())
    channels = loaded.header.data["sample_shape"][0]
    codec = loaded.codec
    if codec is None or not isinstance(codec, HasTiles) or not isinstance(codec, nn.Module):
        return parts
    meta, factor = torch.device("meta"), codec.factor
    half = 2 if precision == "bf16" else 1  # of activations, not of weights

    def latents(tile: int | None, margin: int = 0) -> tuple[int, int]:
        full = tuple(n // factor for n in size)
        return full if tile is None else tuple(min(n, tile // factor + margin) for n in full)  # type: ignore[return-value]

    cond = loaded.conditions.example(2, meta)["cond"]
    seen = latents(method.tile)
    cond = {k: torch.empty(2, v.shape[1], *seen, device=meta) if v.ndim == 4 else v for k, v in cond.items()}
    x, t = torch.empty(2, channels, *seen, device=meta), torch.zeros(2, device=meta)
    parts["sampling"] = work_space(loaded.model, "forward", x=x, t=t, **cond) // half
    z = torch.empty(1, channels, *latents(codec.tile, 22), device=meta)
    parts["decoding"] = work_space(codec, "reconstruct", z=z) // half
    return parts


def tell(loaded: Loaded, method: FollowsPictures, size: tuple[int, int], precision: str) -> None:
    """Print the estimate, or that it cannot be made: a network may look at values, which the meta device has not."""
    try:
        parts = estimate(loaded, method, size, precision)
    except RuntimeError:
        ui.info("the memory that a picture needs cannot be estimated for this network")
        return
    held = sum(parts.get(k, 0) for k in ("network", "codec", "texts"))
    total = held + max(parts.get("sampling", 0), parts.get("decoding", 0))
    said = ", ".join(f"{k} {gib(v)}" for k, v in parts.items() if v)
    ui.info(f"a picture of {size[1]}×{size[0]} needs about {gib(total)} of memory ({said}); --tile takes less")


def gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**29 else f"{n / 2**20:.0f} MiB"
