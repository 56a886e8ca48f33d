"""Where half precision is not wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast on a device; some, such as meta, on which costs are counted, have none to switch off."""
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)  # asking breaks a graph
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
