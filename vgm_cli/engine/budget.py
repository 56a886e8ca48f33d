"""A limit on how much the construction of a network may allocate.

A header or recipe from elsewhere may say depth=200000. Without the limit, building that network would take hours and
all memory; with it, building ends at once with an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy

from vgm_cli.errors import FAILED, USAGE, VgmError

REGISTERED = 10_000  # modules, parameters and buffers; the largest published networks have some thousands
SPARE = 1 << 26  # numbers of buffers that no file holds (masks, tables)


@contextlib.contextmanager
def building(what: str, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Context in which a network is constructed. tensors: the stored tensors that it is built for, which it may not
    exceed by far; None: the limit is this machine's memory. VgmError: the network is larger, or its numbers are
    impossible.
    """
    entries, code = (REGISTERED, USAGE) if tensors is None else (1000 + 20 * len(tensors), FAILED)
    numbers = memory() // 4 if tensors is None else SPARE + 4 * sum(t.numel() for t in tensors.values())
    found = {"entries": 0, "numbers": 0}

    def count(module: Any, name: str, value: Any) -> None:
        found["entries"] += 1
        if isinstance(value, Tensor) and not is_lazy(value):
            found["numbers"] += value.numel()
        if found["entries"] > entries or found["numbers"] > numbers:
            limit = f"{entries:,} parts" if found["entries"] > entries else f"{numbers:,} parameters"
            where = "this machine can hold" if tensors is None else "its file can fill"
            raise VgmError(f"{what} would have more than {limit}, which is more than {where}", code=code)

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    except (OverflowError, MemoryError) as e:
        raise VgmError(f"{what} is too large to be built", code=code) from e
    except RuntimeError as e:
        if not any(word in str(e) for word in ("overflow", "not enough memory", "allocate", "Storage size")):
            raise
        raise VgmError(f"{what} is too large to be built", code=code) from e
    finally:
        for handle in handles:
            handle.remove()


def memory() -> int:
    """Bytes of memory of this machine, used or not, without swap."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 40
