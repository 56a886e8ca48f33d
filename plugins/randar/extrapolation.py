"""Images of twice the trained size. Pang et al. 2024 (arXiv 2412.01827), sec. 3.4.

Official code: ziqipang/RandAR@d374a72 RandAR/applications/resolution_extrapolation.py. Deviation: its loop ends before
the last pass, whose codes stay 0; `compat` of the sampler asks for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgm_cli.ar.sampling import Pick
from vgm_cli.nn.embed import angles_on_grid, rope_frequencies, rope_table

from .decoding import Decoder, Watch, decode, fill, guided, in_raster, unseen
from .model import RandAR


def large_positions(model: RandAR, boundary: int) -> Tensor:
    """Rotations (4N, head_dim / 2, 2) of a grid of twice the sides.

    The first `boundary` frequencies, the highest ones, turn by whole positions 0, 1, ..., which goes on beyond those of
    training; the others divide the trained range, so that they never leave it.
    """
    frequencies = rope_frequencies(model.head_dim, model.rope_base)
    beyond = torch.arange(len(frequencies)) < boundary

    def angles(n: int) -> Tensor:
        whole, between = (torch.outer(torch.linspace(0, last, 2 * n), frequencies) for last in (2 * n - 1, n - 1))
        return torch.where(beyond, whole, between)

    return rope_table(angles_on_grid(angles(model.grid[0]), angles(model.grid[1])))


def small_order(order: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (B, n) of even rows and columns of the large grid -> the same in the small one, of sides `grid`."""
    width = 2 * grid[1]
    return order // width // 2 * grid[1] + order % width // 2


@torch.no_grad()
def enlarge(
    model: RandAR,
    y: Tensor,
    order: Tensor,
    counts: tuple[Sequence[int], Sequence[int]],
    picks: tuple[Pick, Pick],
    scale: tuple[float, float],
    spatial: tuple[float, float],
    blanked: Tensor,
    null: Tensor | None = None,
    boundary: int = 2,
    watch: Watch = unseen,
) -> Tensor:
    """Codes (B, 4N) of a grid of twice the sides, in raster order.

    y, null: (B,) labels. order: (B, 4N), the even rows and columns first. counts: codes of every pass of the small
    image and, after it, of the large one; codes that no pass decides are 0. picks: how the codes of either are chosen,
    pick(logits, i) of the i-th in the order. scale, spatial: of guidance towards the class and towards the small image,
    (at the first code, at the end); the second needs the first, and neither is there where its last is not above 1.
    blanked: (B, N) bool, the codes of the small image, in order, that the network does not see where spatial guidance
    leads away from. boundary: see `large_positions`. watch: told of positions in the large grid.
    """
    n = model.block_size
    places = order[:, :n]
    low = small_order(places, model.grid)

    def watch_small(positions: Tensor, ids: Tensor, logits: Tensor) -> None:
        rows, columns = positions // model.grid[1], positions % model.grid[1]
        watch(4 * rows * model.grid[1] + 2 * columns, ids, logits)

    small = decode(model, y, low, counts[0], picks[0], scale, null, watch=watch_small).gather(1, low)
    scales = [s for s in (spatial, scale) if s[1] > 1.0] if scale[1] > 1.0 else []
    other = model.null_condition({"y": y})["y"] if scales and null is None else null
    x = model.tok_embeddings(small)
    rows = [x, x, x * ~blanked[..., None]][: len(scales) + 1]
    label = torch.cat([y, *[other] * len(scales)]) if other is not None else y
    table = large_positions(model, boundary).to(order.device)[order]
    decoder = Decoder(model, model.cls_embedding(label), table.repeat(len(rows), 1, 1, 1))
    decoder.accept(torch.cat(rows))
    ids = fill(decoder, counts[1], order, guided(scales), picks[1], watch)
    left = ids.new_zeros(len(ids), 3 * n - ids.shape[1])
    return in_raster(torch.cat([small, ids, left], dim=1), order)
