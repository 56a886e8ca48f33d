"""Generation of tokens in a random order, several at a time: which are next is known beforehand, what they are the
diffusion head says.

Li et al. 2024 (arXiv 2406.11838), sec. 3.3 and 3.4, LTH14/mar@fe470ac models/mar.py (sample_tokens). As there, the end
of an order is generated first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.ar.masking import first_of, still_masked

Ramp = Literal["constant", "linear"]
Draw = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # tokens, known, chosen, k -> tokens (R, C) of the chosen places
Watch = Callable[[int, Tensor, Tensor], None]


def unwatched(k: int, tokens: Tensor, known: Tensor) -> None:
    """Nobody looks."""


def unknown_first(orders: Tensor, unknown: Tensor) -> Tensor:
    """The same orders (B, N), places that are unknown before all others."""
    late = (~unknown).gather(1, orders).to(torch.uint8)
    return orders.gather(1, late.argsort(dim=1, stable=True))


def by_order(
    draw: Draw,  # see above; chosen: (B, N) bool, its rows image after image, in raster order
    tokens: Tensor,  # (B, N, C); what is unknown may hold anything
    unknown: Tensor,  # (B, N) bool: what is to be made
    orders: Tensor,  # (B, N) int64, every row a permutation of the places
    steps: int,  # at each of which the transformer is asked once
    watch: Watch = unwatched,  # sees tokens and what is known after every step
) -> Tensor:
    """Tokens (B, N, C), those that were not unknown bit for bit as they were.

    After step k of T, floor(U cos(pi/2 (k + 1)/T)) of an image's U unknown tokens are left, at least one and at least
    one fewer than before; the last step makes all that are left. A step in which nothing is due is not taken.
    """
    total, masked, orders = unknown.sum(1), unknown, unknown_first(orders, unknown)
    tokens = torch.where(unknown[..., None], 0, tokens)
    for k in range(steps):
        after = torch.zeros_like(masked)
        if k < steps - 1:
            # written as officially: where U times it is a whole number, the last bit decides
            rate = torch.tensor(math.cos(math.pi / 2 * (k + 1) / steps), dtype=torch.float64, device=tokens.device)
            after = first_of(orders, still_masked(total, masked.sum(1), rate)) & masked
        chosen = masked & ~after
        if chosen.any():
            rows = draw(tokens, ~masked, chosen, k)
            tokens = tokens.masked_scatter(chosen[..., None], rows.to(tokens))
        masked = after
        watch(k, tokens, ~masked)
    return tokens


def guidance_scales(scale: float, ramp: Ramp, known: Tensor, chosen: Tensor) -> Tensor:
    """The guidance scale of every image in a step, (B,) float64: the same in all, or 1 + (scale - 1) n / N where n of N
    tokens are known when the step is done; the last token of all counts as unknown, as officially."""
    n = (known | chosen).sum(1).clamp(max=known.shape[1] - 1)
    share = n.double() / known.shape[1] if ramp == "linear" else torch.ones_like(n, dtype=torch.float64)
    return 1 + (scale - 1) * share
