"""Sampling VAR: one pass for every scale, with a cache; guidance grows from scale to scale.

Official code: FoundationVision/VAR@78b9539 models/var.py (autoregressive_infer_cfg), models/helpers.py,
demo_zero_shot_edit.ipynb. Deviations: codes are drawn by inverse CDF from one uniform number of their item's generator,
the Gumbel noise of `more_smooth` from further ones; without guidance the null half is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import PyramidTokenizer, Request
from vgm_cli.ar import pyramid
from vgm_cli.ar.masking import gumbel, kept_codes
from vgm_cli.ar.sampling import draw, filter_logits, in_one_dtype
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Fraction, NonNegative, Whole

from .model import VAR

Choice = tuple[Tensor, Tensor | None]  # ids (B, n) and, where they are not those of the ids, code vectors (B, n, C)


@torch.no_grad()
def next_scales(
    model: VAR,
    tokenizer: PyramidTokenizer,
    y: Tensor,
    choose: Callable[[Tensor, int], Choice],
    guidance_scale: float = 1.0,
    null: Tensor | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and the features (B, C, h, w) that their codes add up to. y: (B,) classes.

    choose(logits (B, n, V), k): the codes of scale k. guidance_scale: away from the classes `null` (B,) on the last
    scale; it grows linearly from 1, no guidance, on the first. watch(k, features) sees every scale.
    """
    guided = guidance_scale != 1.0 and null is not None
    both = torch.cat([y, null]) if guided and null is not None else y
    cache, scales = model.cache(len(both)), model.scales
    features, found = pyramid.no_features(tokenizer, len(y), scales), []
    seen: Tensor | None = None
    for k, (height, width) in enumerate(scales):
        logits = model(seen, both, cache)
        if guided:
            scale = 1 + (guidance_scale - 1) * ratio_of(k, len(scales))
            wanted, worse = logits.chunk(2)
            logits = Guidance(scale).combine(wanted, worse)
        ids, codes = choose(logits, k)
        if codes is None:
            grid = pyramid.code_grid(tokenizer, ids.unflatten(1, (height, width)))
        else:
            grid = codes.transpose(1, 2).unflatten(2, (height, width))
        features = tokenizer.added(features, grid, k)
        found.append(ids)
        if watch is not None:
            watch(k, features)
        if k + 1 < len(scales):  # both halves see the same codes
            means = pyramid.seen_by(features, scales[k + 1]).to(model.word_embed.weight)
            seen = torch.cat([means, means]) if guided else means
    return torch.cat(found, dim=1), features


def ratio_of(scale: int, scales: int) -> float:
    """The place of a scale between the first, 0, and the last, 1."""
    return scale / max(scales - 1, 1)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """logits (..., V) float32 with what is out at -inf, as released: all below the top_k-th largest (0: none); then, in
    rising order, every code up to which the probability is at most 1 - top_p, but never the largest. Sums are in
    float32 and equal logits in no certain order, unlike in LlamaGen's filter, vgm_cli.ar.sampling.filter_logits."""
    logits = filter_logits(logits, top_k)
    if not 0 < top_p < 1:
        return logits
    ordered, places = logits.sort(dim=-1)
    out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    out[..., -1] = False
    return logits.masked_fill(out.scatter(-1, places, out), -torch.inf)


def smooth_codes(logits: Tensor, noise: Tensor, vectors: Tensor, ratio: float) -> Tensor:
    """Mixtures (B, n, C) of the code vectors (V, C), sharper from scale to scale: weighted by
    softmax((logits (1 + ratio) + noise) / tau). logits: (B, n, V), filtered. noise: Gumbel's, like logits."""
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    return ((logits * (1 + ratio) + noise) / tau).softmax(-1) @ vectors


def kept_grids(kept: Tensor, scales: pyramid.Scales, coarsest: bool = True) -> list[Tensor]:
    """Which codes of every grid are kept where those of the last are, (B, h_k w_k) bool each.

    kept: (B, h, w) bool. A code is kept where more than half of what bilinear interpolation finds there is. coarsest:
    grids of at most three codes are kept whole, whatever the mask.
    """
    grids = []
    for height, width in scales:
        share = F.interpolate(kept[:, None].float(), size=(height, width), mode="bilinear")[:, 0]
        grids.append((share > 0.5).flatten(1) | (coarsest and height * width <= 3))
    return grids


class VARSampler:
    """A grid at a time. Defaults are those of the published FIDs but for the guidance, which recipes have.

    guidance_scale is the last scale's, 1 being no guidance: one more than the official `cfg`. As a restoration method
    it edits images: codes that are kept are the image's own on every scale, the others are made anew.
    """

    completes = True

    def __init__(
        self,
        temperature: NonNegative = 1.0,  # of the draws; 1 in all that is published
        top_k: Whole = 900,  # draw among so many of the likeliest codes; 0: all
        top_p: Fraction = 0.96,  # then among the likeliest of this total probability; 1: all
        more_smooth: bool = False,  # mixtures of codes instead of codes, for pictures, never for figures
        guidance_scale: NonNegative = 1.0,  # where the request names none
        keep_coarsest: bool = True,  # editing: grids of at most three codes stay whatever the mask, as published
    ):
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.more_smooth, self.guidance_scale, self.keep_coarsest = more_smooth, guidance_scale, keep_coarsest

    def accepts(self, model: Any, codec: Any) -> str | None:
        """VAR networks; None, or why not."""
        return None if isinstance(model, VAR) and codec is not None else "it is no VAR network over codes"

    def __call__(self, model: VAR, request: Request) -> Tensor:
        """Codes (N, L) int64, or with more_smooth features (N, C, h, w)."""
        tokenizer, scales = request.codec, model.scales
        if tokenizer is None:
            raise VgmError("VAR's codes mean nothing without its tokenizer", "a checkpoint that names its codec", USAGE)
        scale = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        cond = {"y": model.labels(request.cond.get("y"), len(request), request.device)}
        null = unconditional(model, cond, request.null)["y"] if request.cond else None
        choose = self.chooser(model, request, tokenizer)

        def watch(k: int, features: Tensor) -> None:
            if request.callback is not None:
                request.callback(k, len(scales), features, None)

        with in_one_dtype(model, request.device) as network:
            ids, features = next_scales(network, tokenizer, cond["y"], choose, scale, null, watch)
        request.info["nfe"] = len(scales)
        return features if self.more_smooth else ids

    def chooser(self, model: VAR, request: Request, tokenizer: PyramidTokenizer) -> Callable[[Tensor, int], Choice]:
        """How the codes of a scale are chosen from its logits: drawn, but for those that the request keeps."""
        u = request.rand((sum(model.sizes),)).split(model.sizes, dim=1)
        vectors = tokenizer.code_vectors()
        own, kept = self.given(model, request)

        def choose(logits: Tensor, k: int) -> Choice:
            logits = filtered(logits.float() / max(self.temperature, 1e-5), self.top_k, self.top_p)
            ids = draw(logits.softmax(-1).flatten(0, 1), u[k].flatten()).view_as(u[k])
            codes = None
            if self.more_smooth:
                noise = gumbel(request.rand(tuple(logits.shape[1:])))
                codes = smooth_codes(logits, noise, vectors, ratio_of(k, len(model.scales)))
            if own:
                ids = torch.where(kept[k], own[k], ids)
                codes = None if codes is None else torch.where(kept[k][..., None], vectors[own[k]], codes)
            return ids, codes

        return choose

    def given(self, model: VAR, request: Request) -> tuple[list[Tensor], list[Tensor]]:
        """The codes of the images to edit and which of them are kept, (N, n) for every scale; [] without images."""
        if request.images is None:
            return [], []
        if request.mask is None:
            raise VgmError("a mask says what is kept of the picture given", "--mask lower, or a file", USAGE)
        kept = kept_codes(request.mask, model.scales[-1])
        return list(request.images.split(model.sizes, dim=1)), kept_grids(kept, model.scales, self.keep_coarsest)
