"""RandAR's samplers: images, images that are completed, and images of twice the size. Pang et al. 2024 (arXiv
2412.01827), sec. 3.3 and 3.4.

Official code: ziqipang/RandAR@d374a72 sample_c2i.py, tools/resolution_extrapolation.py. Deviations: a code is drawn by
inverse CDF from one uniform number of its item's generator, instead of torch.multinomial; completion has no official
code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.ar.masking import first_of, kept_codes
from vgm_cli.ar.orders import hierarchical_orders, random_orders
from vgm_cli.ar.sampling import Decoding, in_one_dtype
from vgm_cli.conditioning import unconditional
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Fraction, NonNegative, Steps, Whole

from .decoding import Watch, decode, passes
from .extrapolation import enlarge
from .model import Order, RandAR, orders_of


def labels_of(model: RandAR, request: Request, scale: float) -> tuple[Tensor, Tensor | None]:
    """The labels (N,) of a request, and those of guidance's other half, None where nothing is guided."""
    y = model.labels(request.cond.get("y"), len(request), request.device)
    return y, unconditional(model, {"y": y}, request.null)["y"] if scale > 1.0 else None


def watched(request: Request, known: Tensor, grid: tuple[int, int], total: int) -> Callable[[Tensor], Watch]:
    """rows (n,) -> what `decode` tells of these items' passes. After each of `total` passes the request's callback sees
    the codes of all items (N, h, w).

    known: (N, codes) those that stand at the beginning, the vocabulary's size where none is decided yet.
    """
    canvas, count = known.clone(), 0

    def of(rows: Tensor) -> Watch:
        def watch(positions: Tensor, ids: Tensor, logits: Tensor) -> None:
            nonlocal count
            canvas[rows[:, None], positions] = ids
            if request.callback is not None:
                request.callback(count, total, canvas.unflatten(1, grid).clone(), None)
            count += 1

        return watch

    return of


class RandARSampler:
    """Codes in the model's order, or another one, several in one pass. Defaults are those of the published FIDs: 88
    passes for 256 codes, the whole vocabulary at temperature 1, guidance that rises linearly from 1.

    As a restoration method it completes images: codes whose pixels are all kept come first in the order and stay, so
    that every code that is made anew has seen all of them. `steps` passes are for the codes that are missing.
    """

    completes = True

    def __init__(
        self,
        steps: Steps | None = 88,  # passes; None: one code in each
        order: Order | tuple[int, ...] | None = None,  # by name, or all raster positions; None: the model's
        temperature: NonNegative = 1.0,  # of the draws: below 1 likelier, above 1 more varied
        top_k: Whole = 0,  # 0: all
        top_p: Fraction = 1.0,  # draw among the likeliest codes of this total probability
        greedy: bool = False,  # the most probable code instead of a draw
        guidance_scale: NonNegative = 1.0,  # at the last code, where the request names none; up to 1: no guidance
        guidance_start: NonNegative | None = 1.0,  # at the first code; None: guidance_scale throughout
    ):
        self.steps, self.order = steps, order
        self.decoding = Decoding(temperature, top_k, top_p, greedy)
        self.guidance_scale, self.guidance_start = guidance_scale, guidance_start

    def accepts(self, model: Any, codec: Any) -> str | None:
        """RandAR networks; None, or why not."""
        return None if isinstance(model, RandAR) and codec is not None else "it is no RandAR network over codes"

    def orders(self, model: RandAR, request: Request) -> Tensor:
        """The order (N, codes) of every item. VgmError: the positions given are not all of the grid's."""
        u = request.rand((model.block_size,))
        if not isinstance(self.order, tuple):
            return orders_of(self.order or model.order, u, model.grid)
        if sorted(self.order) != list(range(model.block_size)):
            text = f"an order has every position from 0 to {model.block_size - 1} once"
            raise VgmError(text, "order=[0, 1, …], or a name: raster, random, hierarchical", USAGE)
        return torch.tensor(self.order, device=request.device).expand(len(request), -1)

    def __call__(self, model: RandAR, request: Request) -> Tensor:
        """Codes (N, h, w) int64. info: nfe, passes; codes_per_pass, of the items that took most."""
        end = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        y, null = labels_of(model, request, end)
        order = self.orders(model, request)
        u = None if self.decoding.greedy else request.rand((model.block_size,))
        kept, ids = torch.zeros_like(order, dtype=torch.bool), torch.zeros_like(order)
        if request.mask is not None and request.images is not None:
            kept = kept_codes(request.mask, model.grid).flatten(1).expand_as(order)
            ids = request.images.flatten(1).clone()
            order = order.gather(1, (~kept.gather(1, order)).byte().argsort(dim=1, stable=True))  # kept codes first
        steps = self.steps if request.steps is None else request.steps
        known = kept.sum(1)
        groups = {k: (known == k).nonzero().flatten() for k in known.unique().tolist()}  # as many codes known each
        counts = {k: self.counts(model.block_size - k, steps) for k in groups}
        start = ids.masked_fill(~kept, model.vocab_size)
        watch = watched(request, start, model.grid, sum(map(len, counts.values())))
        with in_one_dtype(model, request.device) as network:
            for k, rows in groups.items():
                ids[rows] = decode(
                    network,
                    y[rows],
                    order[rows],
                    counts[k],
                    self.decoding.picker(None if u is None else u[rows]),
                    (end if self.guidance_start is None else self.guidance_start, end),
                    None if null is None else null[rows],
                    ids[rows].gather(1, order[rows, :k]),
                    watch(rows),
                )
        most = max(counts.values(), key=len)
        request.info |= {"nfe": len(most), "codes_per_pass": most}
        return ids.unflatten(1, model.grid)

    def counts(self, missing: int, steps: int | None) -> list[int]:
        """How many of the missing codes each pass decides."""
        return passes(missing, steps if steps is None else min(steps, missing)) if missing else []


class ExtrapolationSampler:
    """Images of twice the sides that the model was trained on, without training: first the codes of even rows and
    columns, as an image of the trained size; then all others, at positions between those. `vgm sample RUN --sampler
    randar-extrapolate`.

    Guidance is of two kinds, each rising linearly: towards the class, and towards the codes of the small image (away
    from what the network says where half of them are blanked). The defaults are the documented ones.
    """

    def __init__(
        self,
        steps: Steps | None = None,  # passes of each of the two images; None: one code in each
        temperature: NonNegative = 1.0,  # of the draws: below 1 likelier, above 1 more varied
        top_k: Whole = 0,  # 0: all
        top_p: Fraction = 1.0,  # draw among the likeliest codes of this total probability
        greedy: bool = False,  # the most probable code instead of a draw
        guidance_scale: NonNegative = 3.0,  # towards the class, where the request names none; up to 1: no guidance
        guidance_start: NonNegative | None = None,  # at the first code; None: guidance_scale throughout
        spatial_scale: NonNegative = 2.5,  # towards the small image, beside a guidance_scale above 1; up to 1: none
        spatial_start: NonNegative | None = None,  # at the first code; None: spatial_scale throughout
        spatial_masking: Fraction = 0.5,  # share of the small image's codes that are blanked
        ntk_boundary: Whole = 2,  # so many of the highest frequencies keep whole positions, the others halve them
        compat: bool = False,  # leave the codes of the last pass at 0, as the official loop does
    ):
        self.steps, self.decoding = steps, Decoding(temperature, top_k, top_p, greedy)
        self.guidance_scale, self.guidance_start = guidance_scale, guidance_start
        self.spatial = (spatial_scale if spatial_start is None else spatial_start, spatial_scale)
        self.spatial_masking, self.ntk_boundary, self.compat = spatial_masking, ntk_boundary, compat

    def __call__(self, model: RandAR, request: Request) -> Tensor:
        """Codes (N, 2h, 2w) int64."""
        if not isinstance(model, RandAR):
            raise VgmError("only a RandAR network is told where the next code comes", "vgm train randar", USAGE)
        end = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        y, null = labels_of(model, request, end)
        small, large = model.block_size, 4 * model.block_size
        grid = (2 * model.grid[0], 2 * model.grid[1])
        order = hierarchical_orders(request.rand((large,)), *grid)
        blanked = first_of(random_orders(request.rand((small,))), int(small * self.spatial_masking))
        u = [None, None] if self.decoding.greedy else [request.rand((small,)), request.rand((large,))]
        steps = self.steps if request.steps is None else request.steps
        counts = passes(small, steps), passes(large, steps, small)[: -1 if self.compat else None]
        blank = torch.full_like(order, model.vocab_size)
        watch = watched(request, blank, grid, sum(map(len, counts)))(torch.arange(len(request), device=request.device))
        with in_one_dtype(model, request.device) as network:
            ids = enlarge(
                network,
                y,
                order,
                counts,
                (self.decoding.picker(u[0]), self.decoding.picker(u[1])),
                (end if self.guidance_start is None else self.guidance_start, end),
                self.spatial,
                blanked,
                null,
                self.ntk_boundary,
                watch,
            )
        request.info["nfe"] = sum(map(len, counts))
        return ids.unflatten(1, grid)
