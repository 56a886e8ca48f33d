"""FSDP2: weights, gradients, averages and optimizer state of a root, each process holding its share.

The root is one group; blocks that a network names in `repeated` (the attribute's lists of modules) are groups of their
own, gathered one at a time and given back after use. Precision stays that of autocast, so that a sharded run computes
what an unsharded one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.api import Phase, Repeats
from vgm_cli.errors import USAGE, VgmError


def check(objective: Any, phases: list[Phase]) -> None:
    """VgmError: this objective uses its networks elsewhere than in its loss, where their weights are in pieces."""
    if len(phases) > 1 or not objective.shardable:
        raise VgmError(
            f"train.fsdp=true does not go with the objective {type(objective).__name__}",
            "it shards objectives of one phase that use their network in the loss alone; without it, every process "
            "holds the whole network",
            USAGE,
        )


def shard(root: nn.Module, device: torch.device) -> None:
    """In place: parameters become DTensors over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in list(root.modules()):
        for name in module.repeated if isinstance(module, Repeats) else ():
            for block in getattr(module, name):
                fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)


def sync_gradients(root: Any, on: bool) -> None:
    """Whether the next backward pass exchanges gradients; off for all micro-batches of a step but the last."""
    root.set_requires_gradient_sync(on)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # DTensor's


def gather(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU. A collective operation: every process has to call it; keep=False returns
    nothing, for processes that only take part."""
    out = {}
    for k, v in state.items():
        whole = full(v)
        if keep:
            out[k] = whole.detach().cpu()
    return out


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor on its device. A collective operation: every process has to call it."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # DTensor's


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every process, into one that may be sharded."""
    with torch.no_grad():
        local(target).copy_(local(like(target, value)))


def like(target: Tensor | None, value: Tensor) -> Tensor:
    """A whole tensor, laid out as `target` is."""
    if target is None or not _is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements)  # type: ignore[attr-defined]


def _is_sharded(tensor: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
