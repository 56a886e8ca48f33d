"""Codes in any order, several in one pass. Pang et al. 2024 (arXiv 2412.01827), sec. 3.3.

Official code: ziqipang/RandAR@d374a72 RandAR/model/randar_gpt.py (generate), RandAR/model/utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vgm_cli.ar.sampling import Pick
from vgm_cli.diffusion.guidance import extrapolate
from vgm_cli.nn.kv_cache import KVCache

from .model import RandAR, interleave

Guide = Callable[[Tensor, float], Tensor]  # logits (R, n, V) of all rows, share of the codes decided -> (B, n, V)
Watch = Callable[[Tensor, Tensor, Tensor], None]  # raster positions, ids (both (B, n)) and logits (B, n, V) of a pass


def passes(total: int, steps: int | None = None, known: int = 0) -> list[int]:
    """How many codes each pass decides: few at first, then more, as 1 - cos rises. They sum up to total - known.

    total: codes of the grid; steps: passes wanted, None for one code in each; known: codes decided beforehand. The
    first pass decides one code and no pass decides none, so that there are exactly `steps` passes for steps from 2 to
    total and known = 0; steps=1 takes two.
    """
    steps, counts, done = steps or total, list[int](), known
    while done < total:
        target = min(int((1.0 - math.cos(math.pi / 2.0 * (len(counts) + 1) / steps)) * total + 1), total)
        counts.append(min(max(target - done, 1), total - done) if counts else 1)
        done += counts[-1]
    return counts


class Decoder:
    """Rows of codes in progress, with a cache.

    The cache holds the sequence that the network was trained on, [class, P_0, x_0, P_1, x_1, ...]. A pass that asks for
    n codes ends in n instruction tokens. All but the first of them were computed without the codes between them, so
    that they are taken out again and computed anew by the next pass, behind the codes that were chosen.
    """

    def __init__(self, model: RandAR, prefix: Tensor, table: Tensor):
        """prefix: (R, p, D) the embedded condition; table: (R, N, head_dim / 2, 2) rotations of all positions, in the
        order in which they are decided."""
        self.model, self.table = model, table
        self.instructions = model.instructions(table)
        weight = model.output.weight
        self.cache = KVCache(
            len(model.layers),
            len(prefix),
            model.n_kv_head,
            prefix.shape[1] + 2 * table.shape[1],
            model.head_dim,
            weight.device,
            weight.dtype,
        )
        self.done = 0  # codes that are decided
        self.waiting = prefix  # embedded tokens that the next pass has to take in, and their rotations
        self.rotations = table.new_zeros(*prefix.shape[:2], *table.shape[2:])
        self.instructed = False  # whether the cache holds the instruction token of the next code

    def query(self, n: int) -> Tensor:
        """Logits (R, n, V) of the next n codes, of which each sees the instruction tokens of those before it."""
        rows = slice(self.done, self.done + n)
        h = torch.cat([self.waiting, self.instructions[:, rows]], dim=1)
        table = torch.cat([self.rotations, self.table[:, rows]], dim=1)
        logits = self.model.run(h, table, None, self.cache, last=n)
        self.cache.truncate(self.cache.filled - n + 1)
        self.waiting, self.rotations, self.instructed = h[:, :0], table[:, :0], True
        return logits

    def accept(self, x: Tensor) -> None:
        """The next codes are these, embedded: x (R, n, D)."""
        rows = slice(self.done, self.done + x.shape[1])
        h = interleave(self.instructions[:, rows], x)[:, self.instructed :]
        table = self.table[:, rows].repeat_interleave(2, dim=1)[:, self.instructed :]
        self.waiting = torch.cat([self.waiting, h], dim=1)
        self.rotations = torch.cat([self.rotations, table], dim=1)
        self.done += x.shape[1]
        self.instructed = False


def guided(scales: Sequence[tuple[float, float]]) -> Guide:
    """Guidance on logits whose rows are a block for each condition, the wanted one first, the worst last: blocks (c, u)
    give u + s_1 (c - u), blocks (c_2, c_1, u) give u + s_1 (c_1 - u) + s_2 (c_2 - c_1).

    scales: s_1, s_2, ..., each (at the first code, at the end); it changes linearly with the share of codes decided.
    """

    def guide(logits: Tensor, share: float) -> Tensor:
        now = [start + (end - start) * share for start, end in scales]
        return extrapolate(logits.chunk(len(scales) + 1)[::-1], now)

    return guide


def fill(decoder: Decoder, counts: Sequence[int], order: Tensor, guide: Guide, pick: Pick, watch: Watch) -> Tensor:
    """Decide codes in passes of `counts` -> ids (B, sum of counts), in order.

    order: (B, N) raster positions. pick(logits, i) chooses the i-th code of the order.
    """
    found = []
    for n in counts:
        first, total = decoder.done, order.shape[1]
        logits = guide(decoder.query(n), first / total)
        ids = torch.stack([pick(logits[:, j], first + j) for j in range(n)], dim=1)
        copies = len(decoder.table) // len(order)
        decoder.accept(decoder.model.tok_embeddings(ids).repeat(copies, 1, 1))
        watch(order[:, first : first + n], ids, logits)
        found.append(ids)
    return torch.cat(found, dim=1) if found else order[:, :0]


def unseen(positions: Tensor, ids: Tensor, logits: Tensor) -> None:
    """Nobody watches."""


@torch.no_grad()
def decode(
    model: RandAR,
    y: Tensor,
    order: Tensor,
    counts: Sequence[int],
    pick: Pick,
    scale: tuple[float, float] = (1.0, 1.0),
    null: Tensor | None = None,
    known: Tensor | None = None,
    watch: Watch = unseen,
) -> Tensor:
    """Codes (B, N) in raster order.

    y: (B,) labels. order: (B, N) raster positions. counts: codes of every pass, see `passes`. pick(logits, i) chooses
    the i-th code of the order. scale: of guidance, (at the first code, at the end); there is none where the last is not
    above 1. null: (B,) what guidance leads away from, None for the network's null class. known: (B, k) the codes at the
    first k positions of the order, which stay.
    """
    label, copies = y, 1
    if scale[1] > 1.0:
        label, copies = torch.cat([y, model.null_condition({"y": y})["y"] if null is None else null]), 2
    decoder = Decoder(model, model.cls_embedding(label), model.positions(order).repeat(copies, 1, 1, 1))
    if known is not None:
        decoder.accept(model.tok_embeddings(known).repeat(copies, 1, 1))
    ids = fill(decoder, counts, order, guided([scale][: copies - 1]), pick, watch)
    return in_raster(ids if known is None else torch.cat([known, ids], dim=1), order)


def in_raster(ids: Tensor, order: Tensor) -> Tensor:
    """Codes (B, N) in an order -> in raster order."""
    return torch.empty_like(ids).scatter(1, order, ids)
