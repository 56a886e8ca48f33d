"""MaskGIT's samplers: all codes of an image in 8 to 32 passes, guided or not; they complete and enlarge images, too.

Decoding itself, with its sources, is decoding.py; editing: google-research/maskgit@1db2359 maskgit/inference.py.
Deviations: the mask itself is never drawn (the Halton release draws it now and then and calls it the last code);
uniform numbers of an item's own generator are all that is random; what is known from the start stays, unless
rewrite_known says otherwise; codes of the edited box are all that it touches, where the demo rounds its sides down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.ar.masking import gumbel, kept_codes, power_of
from vgm_cli.ar.orders import permutation_on, rolled
from vgm_cli.ar.sampling import draw, filter_logits, in_one_dtype
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.first_stage import tile_starts
from vgm_cli.ranges import Count, NonNegative, Positive, Steps, Whole

from .decoding import LogitsOf, Noise, Pick, Watch, by_confidence, by_cumulative_confidence, by_order
from .model import MaskedTransformer
from .objective import NAMED

Ramp = Literal["constant", "linear"]
Decode = Callable[[LogitsOf, Tensor, Watch], Tensor]  # logits, ids (B, N), watch -> ids (B, N)
AT_ONCE = 2**24  # probabilities that are summed up at a time


def scale_at(scale: float, ramp: Ramp, k: int, steps: int) -> float:
    """The guidance scale of step k: the same at all, or from 1, which is none, at the first to `scale` at the last."""
    return scale if ramp == "constant" else 1 + (scale - 1) * k / max(steps - 1, 1)


def drawn_by(u: Tensor, top_k: int = 0) -> Pick:
    """Inverse-CDF draws of every position. u: (steps, B, N) uniform; top_k: among so many likeliest codes, 0 all."""

    def pick(logits: Tensor, k: int) -> Tensor:
        rows, own = logits.flatten(0, 1), u[k].flatten()
        size = max(1, AT_ONCE // rows.shape[1])
        parts = [draw(filter_logits(a, top_k).softmax(-1), b) for a, b in zip(rows.split(size), own.split(size))]
        return torch.cat(parts).view(u[k].shape)

    return pick


def windows(grid: tuple[int, int], window: tuple[int, int]) -> list[tuple[int, int]]:
    """(top, left) of the windows that cover a grid, half of each in the next, the middle of the grid first."""
    rows, columns = (tile_starts(n, w, max(1, w // 2)) for n, w in zip(grid, window))
    middle = [(n - w) / 2 for n, w in zip(grid, window)]
    found = [(top, left) for top in rows for left in columns]
    return sorted(found, key=lambda at: abs(at[0] - middle[0]) + abs(at[1] - middle[1]))


class ParallelSampler(ABC):
    """What the three samplers share: guidance, what is given, larger grids.

    As restoration methods they complete images: codes of which a pixel is made anew are made anew, and those `grow` or
    fewer places from them; all others stay, bit for bit. With `grid`, larger than the model's, a picture is written
    window by window, the middle first, each half given by those before; `vgm sample --input` puts the codes of an image
    there.
    """

    completes = True
    steps: int
    grow = 0
    grid: tuple[int, int] | None = None
    ramp: Ramp = "constant"
    guidance_scale: float = 1.0

    def accepts(self, model: Any, codec: Any) -> str | None:
        """Masked transformers over codes; None, or why not."""
        known = isinstance(model, MaskedTransformer) and codec is not None
        return None if known else "it is no masked transformer over codes (maskgit, halton-maskgit)"

    @abstractmethod
    def decoder(self, model: MaskedTransformer, request: Request, steps: int) -> Decode:
        """The decoding of one window, its random numbers drawn."""

    def passes(self, steps: int) -> int:
        return steps

    def __call__(self, model: MaskedTransformer, request: Request) -> Tensor:
        """Codes (N, h, w) int64. VgmError: a grid smaller than the model's, or than the images given."""
        grid, steps = self.grid or model.grid, request.steps or self.steps
        if any(n < own for n, own in zip(grid, model.grid)):
            raise VgmError(f"grid={list(grid)} is smaller than the model's {list(model.grid)}", code=USAGE)
        ids, passes = self.given(model, request, grid), self.passes(steps)
        places = windows(grid, model.grid)
        request.info["nfe"] = passes * len(places)
        with in_one_dtype(model, request.device) as network:
            for i, (top, left) in enumerate(places):
                part = (slice(None), slice(top, top + model.grid[0]), slice(left, left + model.grid[1]))
                watch = self.watcher(request, ids, part, i * passes, len(places) * passes)
                decode = self.decoder(model, request, steps)
                done = decode(self.logits_of(network, request, passes), ids[part].flatten(1), watch)
                ids[part] = done.unflatten(1, model.grid)
        return ids

    def given(self, model: MaskedTransformer, request: Request, grid: tuple[int, int]) -> Tensor:
        """Ids (N, h, w) to begin with: the mask, but for codes of the request's images that are kept."""
        ids = torch.full((len(request), *grid), model.mask_id, device=request.device)
        images = request.images
        if images is None:
            return ids
        if request.mask is None and self.grid is None:
            hint = "--mask lower makes a part of it anew, grid=[H,W] what lies around it"
            raise VgmError("the picture given fills the grid: nothing is left to make", hint, USAGE)
        height, width = images.shape[1:]
        if height > grid[0] or width > grid[1]:
            raise VgmError(f"the images given have {height}x{width} codes, grid={list(grid)} has no place", code=USAGE)
        if request.mask is None:
            images = images[[i % len(images) for i in request.index]]
            top, left = (grid[0] - height) // 2, (grid[1] - width) // 2
            ids[:, top : top + height, left : left + width] = images
            return ids
        if (height, width) != grid:
            raise VgmError("a mask is for the model's own grid", "vgm sample --input enlarges images", USAGE)
        kept = kept_codes(request.mask, grid, self.grow)
        request.info["made"] = ~kept
        return torch.where(kept, images, ids)

    def logits_of(self, model: MaskedTransformer, request: Request, steps: int) -> LogitsOf:
        """Guided logits of the codes. Without a scale, or one that is 1, the condition alone is evaluated."""
        scale = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        y = request.cond.get("y")
        if y is None or scale == 1 or not model.num_classes:
            return lambda ids, k: model.of_codes(model(ids, y))
        null = unconditional(model, request.cond, request.null)["y"]
        both = torch.cat([y, null])

        def logits(ids: Tensor, k: int) -> Tensor:
            now = scale_at(scale, self.ramp, k, steps)
            if now == 1:
                return model.of_codes(model(ids, y))
            wanted, worse = model.of_codes(model(ids.repeat(2, 1), both)).chunk(2)
            return Guidance(now).combine(wanted, worse)

        return logits

    def watcher(self, request: Request, ids: Tensor, part: Any, before: int, total: int) -> Watch:
        """Tells the request's callback of every step: the grid as it is known, and as it was drawn."""

        def watch(k: int, now: Tensor, drawn: Tensor) -> None:
            if request.callback is None:
                return
            both = []
            for own in (now, drawn):
                whole = ids.clone()
                whole[part] = own.unflatten(1, whole[part].shape[1:])
                both.append(whole)
            request.callback(before + k, total, both[0], both[1])

        return watch


def uniform(request: Request, steps: int, positions: int) -> Tensor:
    """(steps, N, positions), every item's from its own generator."""
    return request.rand((steps, positions)).transpose(0, 1)


class MaskGITSampler(ParallelSampler):
    """Guess all, keep the surest, guess the others again. VgmError: a schedule of no such name, a start behind the
    last step."""

    def __init__(
        self,
        steps: Steps = 12,  # passes; the paper's are 8 for 16x16 codes and 12 for 32x32
        start: Whole = 0,  # first step taken; the demo edits with 2 of 12, as if some were done
        schedule: str = "cosine",  # of the share that stays masked: see vgm_cli/ar/masking.py
        choice_temperature: NonNegative = 4.5,  # of the noise on the choice; 0 keeps the surest
        temperature: Positive = 1.0,  # of the draws: below 1 likelier codes
        top_k: Whole = 0,  # draw among so many likeliest codes; 0: all
        guidance_scale: NonNegative = 1.0,  # where the request names none; 1 is no guidance
        ramp: Ramp = "linear",  # guidance grows from none at the first step, or is the same at all
        grow: Whole = 0,  # codes around a hole that are made anew, too; the demo's is 1
        grid: tuple[Count, Count] | None = None,  # rows and columns of codes, larger than the model's
    ):
        check_schedule(schedule)
        if start >= steps:
            raise VgmError(f"start={start} is behind the last of steps={steps}", code=USAGE)
        self.steps, self.start, self.schedule, self.choice_temperature = steps, start, schedule, choice_temperature
        self.temperature, self.top_k, self.guidance_scale, self.ramp = temperature, top_k, guidance_scale, ramp
        self.grow, self.grid = grow, grid

    def passes(self, steps: int) -> int:
        if self.start >= steps:
            raise VgmError(f"start={self.start} is behind the last of {steps} steps", code=USAGE)
        return steps - self.start

    def decoder(self, model: MaskedTransformer, request: Request, steps: int) -> Decode:
        passes = self.passes(steps)
        pick = drawn_by(uniform(request, passes, model.positions), self.top_k)
        noise = gumbel(uniform(request, passes, model.positions))
        options = (model.mask_id, noise, steps, self.start, self.schedule, self.choice_temperature)

        def decode(logits_of: LogitsOf, ids: Tensor, watch: Watch) -> Tensor:
            return by_confidence(lambda i, k: logits_of(i, k) / self.temperature, pick, ids, *options, watch)

        return decode


class HaltonConfidenceSampler(ParallelSampler):
    """The Halton release's confidence sampler. VgmError: a schedule of no such name."""

    def __init__(
        self,
        steps: Steps = 12,  # passes
        schedule: str = "arccos",  # of the share that stays masked
        noise: Noise = "linear",  # on the choice: falling; for the choice in two steps, or in all; none
        choice_temperature: NonNegative = 4.5,  # of falling noise
        inverse_temperature: Positive = 1.0,  # logits are multiplied by it: above 1 likelier codes
        rewrite_known: bool = False,  # as in the release: what is known, given or not, is drawn anew at every step
        guidance_scale: NonNegative = 4.0,  # where the request names none; 1 is no guidance
        ramp: Ramp = "linear",  # guidance grows from none at the first step, or is the same at all
        grow: Whole = 0,  # codes around a hole that are made anew, too; the demo's is 1
        grid: tuple[Count, Count] | None = None,  # rows and columns of codes, larger than the model's
    ):
        check_schedule(schedule)
        self.steps, self.schedule, self.noise, self.choice_temperature = steps, schedule, noise, choice_temperature
        self.inverse_temperature, self.rewrite_known = inverse_temperature, rewrite_known
        self.guidance_scale, self.ramp, self.grow, self.grid = guidance_scale, ramp, grow, grid

    def decoder(self, model: MaskedTransformer, request: Request, steps: int) -> Decode:
        pick = drawn_by(uniform(request, steps, model.positions))
        noise = uniform(request, steps, model.positions)
        noise = gumbel(noise) if self.noise == "linear" else noise
        options = (model.mask_id, noise, self.schedule, self.noise, self.choice_temperature, self.rewrite_known)

        def decode(logits_of: LogitsOf, ids: Tensor, watch: Watch) -> Tensor:
            own = lambda i, k: logits_of(i, k) * self.inverse_temperature
            return by_cumulative_confidence(own, pick, ids, *options, watch)

        return decode


class HaltonSampler(ParallelSampler):
    """Codes in the order of a Halton sequence, spread evenly over the picture, each drawn once."""

    def __init__(
        self,
        steps: Steps = 32,  # passes
        temperature_first: Positive = 1.0,  # logits are multiplied by it, so that above 1 codes are likelier: at first,
        temperature_last: Positive = 1.0,  # and at the last step, linear between
        temperature_power: Positive = 1.0,  # of that factor
        warmup: Whole = 0,  # first steps whose factor is halved
        top_k: Whole = 0,  # draw among so many likeliest codes; 0: all
        roll: bool = False,  # every image begins elsewhere in the order
        guidance_scale: NonNegative = 3.0,  # where the request names none; 1 is no guidance
        ramp: Ramp = "constant",  # guidance is the same at all steps, or grows from none
        grow: Whole = 0,  # codes around a hole that are made anew, too; the demo's is 1
        grid: tuple[Count, Count] | None = None,  # rows and columns of codes, larger than the model's
    ):
        self.steps, self.warmup, self.top_k, self.roll = steps, warmup, top_k, roll
        self.temperatures = (temperature_first, temperature_last, temperature_power)
        self.guidance_scale, self.ramp, self.grow, self.grid = guidance_scale, ramp, grow, grid

    def factors(self, steps: int) -> Tensor:
        """(steps,): what logits are multiplied by."""
        first, last, power = self.temperatures
        factors = torch.linspace(first, last, steps) ** power
        factors[: self.warmup] *= 0.5
        return factors

    def decoder(self, model: MaskedTransformer, request: Request, steps: int) -> Decode:
        pick = drawn_by(uniform(request, steps, model.positions), self.top_k)
        order = permutation_on("halton", *model.grid, request.device)
        orders = order.expand(len(request), -1)
        if self.roll:
            orders = rolled(order, (request.rand() * model.positions).long())
        factors = self.factors(steps).tolist()

        def decode(logits_of: LogitsOf, ids: Tensor, watch: Watch) -> Tensor:
            own = lambda i, k: logits_of(i, k) * factors[k]
            return by_order(own, pick, ids, model.mask_id, orders, steps, watch=watch)

        return decode


def check_schedule(schedule: str) -> None:
    """VgmError: there is no such schedule."""
    if schedule not in NAMED:
        power_of(schedule)
