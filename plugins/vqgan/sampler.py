"""Sampling VQGAN's prior: cached where the window is the image, sliding where the image is larger.

Official code: CompVis/taming-transformers@3ba01b2 taming/modules/transformer/mingpt.py (sample_with_past),
scripts/make_samples.py (run_conditional). Deviations: a code is drawn by inverse CDF from one uniform number of its
item's generator; the window runs only as far as the code it predicts, which causal attention makes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.ar.orders import inverse
from vgm_cli.ar.sampling import Decoding, Pick, generate, in_one_dtype, keeping
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Fraction, NonNegative, Whole

from .model import GPT, Decoder


@torch.no_grad()
def sample_codes(model: GPT, prefix: Tensor, n: int, pick: Pick) -> Tensor:
    """n codes (B, n) after a prefix of ids (B, T)."""
    decoder = Decoder(model, prefix, n)
    return generate(decoder.first(), decoder.step, n, lambda logits, i: pick(model.of_codes(logits), i))


@torch.no_grad()
def sliding_window(
    logits_of: Callable[[Tensor], Tensor],
    prefix_of: Callable[[int, int], Tensor],
    codes: Tensor,
    window: tuple[int, int],
    pick: Pick,
) -> Tensor:
    """Fill codes (B, H, W) in raster order, each from the window around it.

    logits_of: ids (B, T) -> (B, T, V). prefix_of(top, left): condition ids of the window there (B, length). A code sits
    at the middle of its window (row window // 2), nearer to a border where the image ends.
    """
    height, width = codes.shape[1:]
    for i in range(height):
        for j in range(width):
            row, column = local(i, height, window[0]), local(j, width, window[1])
            top, left = i - row, j - column
            crop = codes[:, top : top + window[0], left : left + window[1]].flatten(1)
            before = crop[:, : row * window[1] + column]
            logits = logits_of(torch.cat([prefix_of(top, left), before], dim=1))[:, -1]
            codes[:, i, j] = pick(logits, i * width + j)
    return codes


def local(i: int, size: int, window: int) -> int:
    """The position inside its window of position i of `size`."""
    half = window // 2
    if i <= half:
        return i
    return window - (size - i) if size - i < window - half else half


class PriorSampler:
    """top_k and top_p as in the official script: top_p counts only beside a top_k (README, ImageNet: 600 and 0.92).

    As a restoration method it completes images: codes whose pixels are all kept stay, the others are made anew, each
    from those before it in the model's order.
    """

    completes = True

    def __init__(
        self,
        temperature: NonNegative = 1.0,
        top_k: Whole | None = None,
        top_p: Fraction = 1.0,
        greedy: bool = False,
        grid: tuple[int, int] | None = None,  # codes per column and row; None: as trained. Larger ones slide
    ):
        self.decoding = Decoding(temperature, top_k or 0, top_p if top_k else 1.0, greedy)
        self.grid = grid

    def accepts(self, model: Any, codec: Any) -> str | None:
        """Priors over a VQGAN's codes; None, or why not."""
        return None if isinstance(model, GPT) and codec is not None else "it is no vqgan-prior over codes"

    def __call__(self, model: GPT, request: Request) -> Tensor:
        """Codes (N, h, w) int64."""
        height, width = self.grid or model.grid
        window = model.window
        if height < window[0] or width < window[1]:
            raise VgmError(f"a grid of {height}x{width} is smaller than the window {window[0]}x{window[1]}", code=USAGE)
        if request.mask is not None and request.images is not None and request.images.shape[1:] != (height, width):
            known = "x".join(map(str, request.images.shape[1:]))
            raise VgmError(f"the images to complete have {known} codes, grid asks for {height}x{width}", code=USAGE)
        u = None if self.decoding.greedy else request.rand((height * width,))
        n, device = len(request), request.device
        order = model.permutation(device) if (height, width) == window else None
        pick = keeping(self.decoding.picker(u), request, order)
        request.info["nfe"] = height * width
        cond = dict(request.cond)
        with in_one_dtype(model, device) as network:
            if order is not None:
                cond.setdefault("coord", network.coordinates(*window, device).expand(n, -1, -1))
                ids = sample_codes(network, network.prefix(cond, n, device), height * width, pick)
                return ids[:, inverse(order)].unflatten(1, window)
            if model.order != "raster":
                raise VgmError("only the raster order slides", code=USAGE)
            coord = network.coordinates(height, width, device).expand(n, -1, -1)

            def prefix_of(top: int, left: int) -> Tensor:
                crop = coord[:, top : top + window[0], left : left + window[1]]
                return network.prefix({**cond, "coord": crop}, n, device)

            empty = torch.zeros(n, height, width, dtype=torch.int64, device=device)
            return sliding_window(lambda ids: network.of_codes(network(ids)), prefix_of, empty, window, pick)
