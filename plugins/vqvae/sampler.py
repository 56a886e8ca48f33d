"""Samples of VQ-VAE's prior, completions of given images, and pictures between two of them.

van den Oord et al. 2017 (arXiv 1711.00937), sec. 4.2: codes are drawn position by position, then decoded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.ar.sampling import Decoding, Pick, generate, in_one_dtype
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Few, Fraction, NonNegative, Whole

from .prior import CodePrior


def begun_by(known: Tensor, pick: Pick) -> Pick:
    """Codes (B, n) that are given, then those that pick chooses."""
    return lambda logits, i: known[:, i] if i < known.shape[1] else pick(logits, i)


class PriorSampler:
    """Code by code, from what is kept of those before. keep: share of the rows that are taken from the images given
    (`vgm sample RUN --input DATA keep=0.5` completes lower halves). VgmError: rows are to be kept of no image."""

    def __init__(
        self,
        temperature: NonNegative = 1.0,
        top_k: Whole = 0,  # 0: all
        top_p: Fraction = 1.0,
        greedy: bool = False,
        keep: Fraction = 0.0,
    ):
        self.decoding, self.keep = Decoding(temperature, top_k, top_p, greedy), keep

    def __call__(self, model: CodePrior, request: Request) -> Tensor:
        """Codes (N, h, w) int64."""
        height, width = model.grid
        rows = round(self.keep * height)
        u = None if self.decoding.greedy else request.rand((height * width,))
        pick = self.decoding.picker(u)
        if rows:
            if request.images is None:
                raise VgmError(f"keep={self.keep:g} keeps rows of given images", "--input DATA", USAGE)
            images = request.images[[i % len(request.images) for i in request.index]]
            pick = begun_by(images[:, :rows].flatten(1), pick)
        request.info["nfe"] = (height - rows) * width
        with in_one_dtype(model, request.device) as network:
            decoder = network.decoder(len(request), request.cond.get("y"))
            return generate(decoder.first(), decoder.step, height * width, pick).unflatten(1, (height, width))


def between(a: Tensor, b: Tensor, t: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """The codes nearest to (1 - t) a + t b: a, b (B, c, h, w), t (B,) -> ids."""
    t = t[:, None, None, None]
    return quantize((1 - t) * a + t * b)


class InterpolationSampler:
    """Rows of pictures from one given image to another: codes are mixed and take the nearest code's place again. Row r
    goes from image 2 r to image 2 r + 1. VgmError: fewer than two images, a codec that has no such codebook."""

    def __init__(self, columns: Few = 8):
        self.columns = self.grid_columns = max(columns, 2)
        self.grid_labels = "rows"

    def __call__(self, model: Any, request: Request) -> Tensor:
        """Codes (N, h, w) int64."""
        if request.images is None or len(request.images) < 2:
            raise VgmError("there are no two images to go between", "--input DATA", USAGE)
        quantize = getattr(request.codec, "quantize", None)
        if quantize is None or not callable(getattr(quantize, "lookup", None)):
            raise VgmError("this codec has no codebook to go between codes of", code=USAGE)
        rows = torch.tensor([i // self.columns for i in request.index])
        t = torch.tensor([i % self.columns / (self.columns - 1) for i in request.index], device=request.device)
        images = request.images
        a, b = (quantize.lookup(images[(2 * rows + k) % len(images)]) for k in (0, 1))
        request.info["nfe"] = 0
        return between(a, b, t, quantize.tokens)
