"""Ids of several grids from coarse to fine, and the features that they add up to: what next-scale models train on and
sample with. Tian et al. 2024 (VAR, arXiv 2404.02905), algorithms 1 and 2; FoundationVision/VAR@78b9539 models/quant.py.

scales: (h, w) of every grid, coarse to fine, as PyramidTokenizer.scales gives them. L: the positions of all grids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import PyramidTokenizer

Scales = Sequence[tuple[int, int]]


def sizes(scales: Scales) -> list[int]:
    """Positions of every grid."""
    return [h * w for h, w in scales]


def grids(ids: Tensor, scales: Scales) -> list[Tensor]:
    """ids (B, L) -> those of every grid, (B, h, w)."""
    return [part.unflatten(1, (h, w)) for part, (h, w) in zip(ids.split(sizes(scales), dim=1), scales)]


def code_grid(tokenizer: PyramidTokenizer, ids: Tensor) -> Tensor:
    """The code vectors (B, C, h, w) of one grid's ids (B, h, w)."""
    return F.embedding(ids, tokenizer.code_vectors()).permute(0, 3, 1, 2)


def no_features(tokenizer: PyramidTokenizer, n: int, scales: Scales) -> Tensor:
    """The features (n, C, h, w) before the first grid: zeros."""
    codes = tokenizer.code_vectors()
    return codes.new_zeros(n, codes.shape[1], *scales[-1])


def features_after(tokenizer: PyramidTokenizer, ids: Tensor, scales: Scales) -> Iterator[Tensor]:
    """The features (B, C, h, w) after the first grid, after the second, and so on; the last are those of the image."""
    features = no_features(tokenizer, len(ids), scales)
    for k, grid in enumerate(grids(ids, scales)):
        features = tokenizer.added(features, code_grid(tokenizer, grid), k)
        yield features


def seen_by(features: Tensor, scale: tuple[int, int]) -> Tensor:
    """What a model sees of the features (B, C, H, W) where it predicts a grid of `scale`: means of areas, one vector
    for each position, (B, h w, C)."""
    return F.interpolate(features, size=scale, mode="area").flatten(2).transpose(1, 2)


def teacher_inputs(tokenizer: PyramidTokenizer, ids: Tensor, scales: Scales) -> Tensor:
    """What a model sees at every position of the true ids (B, L), but for the first grid, before which there is
    nothing: (B, L - h_0 w_0, C)."""
    before = zip(features_after(tokenizer, ids, scales), scales[1:])
    return torch.cat([seen_by(features, scale) for features, scale in before], dim=1)
