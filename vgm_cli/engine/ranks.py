"""Work shared by the processes of one command: whole items go round, results come back in their order, so that what is
made of them does not depend on how many processes there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vgm_cli.engine.distributed import launched
from vgm_cli.errors import VgmError

T = TypeVar("T")
R = TypeVar("R")


def join() -> None:
    """Meet the other processes, if this one was launched as one of several. Objects travel over gloo."""
    if launched() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("gloo")


def joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if joined() else (0, 1)


def mine(items: Iterable[T]) -> list[tuple[int, T]]:
    """(position, item) of this process's share."""
    rank, world = rank_world()
    return [(i, item) for i, item in enumerate(items) if i % world == rank]


def in_order(parts: dict[int, R]) -> list[R]:
    """What every process made, by position; on the first process only, others get []."""
    if not joined():
        return [parts[i] for i in sorted(parts)]
    rank, world = rank_world()
    received: list[dict[int, R] | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(parts, received)
    together = {i: part for each in received or [] for i, part in (each or {}).items()}
    return [together[i] for i in sorted(together)]


def shares(items: Iterable[T], work: Callable[[T], R]) -> list[R]:
    """[work(item) for item in items] with the items spread over processes; the whole list on every process."""
    made = in_order({i: work(item) for i, item in mine(items)})
    return from_main(made)


def from_main(value: T) -> T:
    """The first process's value, on every process."""
    if not joined():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_main(work: Callable[[], None]) -> None:
    """Done by the first process alone; what it refuses (VgmError) every process refuses."""
    refused: tuple[str, str, int] | None = None
    if rank_world()[0] == 0:
        try:
            work()
        except VgmError as e:
            refused = (e.message, e.hint, e.code)
    refused = from_main(refused)
    if refused is not None:
        raise VgmError(*refused)
