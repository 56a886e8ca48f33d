"""Keys and values of positions already seen, in memory that is allocated once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Of all layers of a decoder: two tensors (layers, B, heads, length, head_dim), of which `filled` positions count.

    A forward writes every layer at the same positions and then calls `advance`.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (layers, batch, heads, length, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.filled = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: (B, heads, T, head_dim) of the next T positions -> those of all filled + T, as views."""
        end = self.filled + keys.shape[2]
        k, v = self.keys[layer], self.values[layer]
        k[:, :, self.filled : end] = keys
        v[:, :, self.filled : end] = values
        return k[:, :, :end], v[:, :, :end]

    def advance(self, positions: int) -> None:
        self.filled += positions
