"""Where half precision is not wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast on a device; the meta device, on which costs are counted, has none to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
