"""Inception score: exp of the mean divergence between each image's class distribution and that of its split.

Paper: Salimans et al., Improved Techniques for Training GANs (arXiv:1606.03498). openai/guided-diffusion takes splits
of 5,000 in the order given; toshas/torch-fidelity ten splits of a seeded shuffle. Neither adds the last bias.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.ranges import Steps, Width


def inception_score(
    logits: Tensor, splits: int = 10, split_size: int | None = None, shuffle: bool = True, seed: int = 2020
) -> tuple[float, float]:
    """(mean, standard deviation) over splits. logits: (N, K).

    split_size: ADM's rule (consecutive splits of that size, the last may be short) instead of `splits` equal ones.
    """
    n = len(logits)
    if n < splits and split_size is None:
        raise VgmError(f"{splits} splits need at least as many images, there are {n}", code=USAGE)
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(n))]
    log_p = logits.double().log_softmax(1)
    edges = [*range(0, n, split_size), n] if split_size else [i * n // splits for i in range(splits + 1)]
    scores = []
    for first, last in itertools.pairwise(edges):
        part = log_p[first:last]  # (S, K)
        marginal = part.exp().mean(0, keepdim=True).log()  # (1, K)
        scores.append(float((part.exp() * (part - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


class InceptionScore(MetricBase):
    """Inception score over `splits` equal parts of the samples, or with `split_size` over consecutive parts of that
    size, as ADM makes them. shuffle: reorder the samples by the seed first."""

    needs_samples = frozenset({"logits"})

    def __init__(self, splits: Steps = 10, split_size: Width | None = None, shuffle: bool = True):
        self.splits = splits
        self.split_size = split_size
        self.shuffle = self.uses_seed = shuffle

    def check(self, n: int | None, n_reference: int | None, shape: tuple[int, int, int]) -> None:
        if n is not None and n < self.splits and self.split_size is None:
            text = f"{self.splits} splits need at least as many images, there are {n}"
            raise VgmError(text, f"inception-score:splits={max(n // 10, 1)}", USAGE)

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.logits is not None
        mean, spread = inception_score(samples.logits, self.splits, self.split_size, self.shuffle, seed)
        how = {"split_size": self.split_size} if self.split_size else {"splits": self.splits}
        single = (self.split_size or 0) >= len(samples.logits) or (self.split_size is None and self.splits == 1)
        remarks = ("inception-score: one split has no uncertainty",) if single else ()
        options = {**how, "shuffle": self.shuffle}
        return [Value("inception-score", mean, None if single else spread, options, remarks=remarks)]
