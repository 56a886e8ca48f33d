"""Keys and values of positions already seen, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers of a decoder, so that a forward computes those of the new positions only.

    Both are tensors (layers, B, heads, length, head_dim), of which the first `filled` positions count. A forward writes
    every layer at the same positions and then calls `advance`. The next forward goes on behind them; after
    `truncate(n)` it goes on behind the first n, and inside `overwriting(positions)` it takes the place of some of them.
    """

    def __init__(
        self,
        layers: int,  # of the decoder
        batch: int,  # rows
        heads: int,  # of keys and values
        length: int,  # most positions
        head_dim: int,  # width of a head
        device: torch.device | str = "cpu",  # of the tensors
        dtype: torch.dtype = torch.float32,  # of the tensors
    ):
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.filled = 0
        self.positions: Tensor | None = None  # (T,) int64 that the next forward overwrites; None: it goes on behind

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: (B, heads, T, head_dim) of the next T positions -> those of all filled + T, as views.

        While overwriting, of the T positions that are overwritten -> those of all filled.
        """
        k, v = self.keys[layer], self.values[layer]
        if self.positions is not None:
            k[:, :, self.positions] = keys
            v[:, :, self.positions] = values
            return k[:, :, : self.filled], v[:, :, : self.filled]
        end = self.filled + keys.shape[2]
        k[:, :, self.filled : end] = keys
        v[:, :, self.filled : end] = values
        return k[:, :, :end], v[:, :, :end]

    def advance(self, positions: int) -> None:
        """The positions that a forward has written in every layer count from now on."""
        if self.positions is None:
            self.filled += positions

    def truncate(self, n: int) -> None:
        """Only the first n positions count: the next forward goes on from there, as if the others had not been seen."""
        if not 0 <= n <= self.filled:
            raise ValueError(f"{n} of {self.filled} cached positions")
        self.filled = n

    @contextmanager
    def overwriting(self, positions: Tensor) -> Iterator[None]:
        """Within, a forward of T positions takes the place of the cached ones at `positions`, (T,) int64 and ascending.

        Each attends to the cached positions up to its own. Later ones keep what they computed from the old.
        """
        if not len(positions) or int(positions.min()) < 0 or int(positions.max()) >= self.filled:
            raise ValueError(f"positions {positions.tolist()} of {self.filled} cached ones")
        self.positions = positions
        try:
            yield
        finally:
            self.positions = None
