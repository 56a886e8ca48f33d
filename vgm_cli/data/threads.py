"""Reading many pictures at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def parallel(work: Callable[[Any], T], items: Sequence[Any] | np.ndarray) -> list[T]:
    """[work(i) for i in items] on a few threads; decoders leave Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))
