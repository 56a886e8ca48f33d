"""Sums, means and rows over all processes of torch.distributed, for networks, objectives and metrics.

Without torch.distributed, or with one process, every function gives back what this process holds. How processes are
launched is in engine/processes.py.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def processes() -> int:
    """How many processes share this computation; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes, shaped like values; values itself is not changed."""
    if processes() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def average(values: Tensor) -> Tensor:
    """The mean over all processes, shaped like values."""
    return total(values) / processes()


def gather(values: Tensor) -> Tensor:
    """The rows of all processes in their order: (B, ...) of each -> (processes * B, ...)."""
    if processes() == 1:
        return values
    parts = [values.new_empty(values.shape) for _ in range(processes())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def gather_objects(value: T) -> list[T]:
    """Every process's value, in their order, on every process."""
    parts: list[T] = [value] * processes()
    if len(parts) > 1:
        dist.all_gather_object(parts, value)
    return parts
