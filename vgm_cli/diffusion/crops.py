"""A network on pictures larger than it was trained on: it sees overlapping crops, whose outputs are blended.

CompVis/latent-diffusion@a506df5 ldm/models/diffusion/ddpm.py apply_model and get_fold_unfold (split_input_params): the
weight of a pixel is its distance to the border of its crop. Crops that do not fit are moved back into the picture,
where officially they are left out; a single row or column of crops weighs the same everywhere, where officially nothing
is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Network = Callable[..., Tensor]


def border_distance(height: int, width: int) -> Tensor:
    """(height, width): how far a pixel is from the nearest border, as a share of the sides; 0 at it."""
    shares = torch.meshgrid(*(torch.arange(n) / max(n - 1, 1) for n in (height, width)), indexing="ij")
    return torch.stack([*shares, *(1 - s for s in shares)]).amin(0)


def starts(side: int, size: int, stride: int) -> list[int]:
    """Where crops begin along a side: every `stride` pixels, the last as late as it can be."""
    last = max(side - size, 0)
    return [*range(0, last, stride), last]


def in_crops(
    network: Network,  # (x, t, **cond) -> like x
    size: int,  # side of a crop
    stride: int,  # pixels from one crop to the next
    clip: tuple[float, float] = (0.01, 0.5),  # least and largest weight of a pixel in its crop
    tie_clip: tuple[float, float] | None = None,  # the same of a crop in the picture; None: all crops weigh the same
) -> Network:
    """The network on x (B, C, H, W) in crops of size x size, or less where x is smaller. Keywords that are pictures of
    x's size (what is stacked on it) are cut with it; all others are the same for every crop."""

    def run(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        sides = tuple(x.shape[2:])
        height, width = (min(size, n) for n in sides)
        rows, columns = (starts(n, own, stride) for n, own in zip(sides, (height, width)))
        weight = border_distance(height, width).clamp(*clip)
        tie = border_distance(len(rows), len(columns)).clamp(*tie_clip) if tie_clip else None
        total, weights = torch.zeros_like(x), torch.zeros(sides)
        for i, top in enumerate(rows):
            for j, left in enumerate(columns):
                at = (..., slice(top, top + height), slice(left, left + width))
                own = {
                    k: v[at] if isinstance(v, Tensor) and v.ndim == 4 and tuple(v.shape[2:]) == sides else v
                    for k, v in cond.items()
                }
                share = weight if tie is None else weight * tie[i, j]
                out = network(x[at], t, **own)
                if total.shape[1] != out.shape[1]:
                    total = x.new_zeros(len(x), out.shape[1], *sides)
                total[at] += out * share.to(out)
                weights[at] += share
        return total / weights.to(total)

    return run
