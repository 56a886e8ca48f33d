"""Networks without memory: their names and shapes alone, or the place that stored weights are put into."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class NoDraws(TorchFunctionMode):
    """Initialisation is left out where there is nothing to draw; trying would import torch's compiler, which takes
    seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.normal_ or getattr(func, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if tensor is not None and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Networks built inside have no memory and draw no numbers."""
    with torch.device("meta"), NoDraws():
        yield


def with_zeros(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a meta module with zeros for weights: what it computes takes as long as the real one's."""
    made = copy.deepcopy(module).to_empty(device=device)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.detach().zero_()
    return made
