"""Retrieval: does a sample that was asked for by a caption find the picture of that caption among all pictures?

Features of samples and of the reference's pictures are compared by cosine. Of N pictures, chance is 1 / N for the first
and 5 / N for the first five. It is a measure of memory, for sets that a model was trained on: captions there are nearly
unique.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.metrics.pictures import pairs
from vgm_cli.ranges import Few

AT_ONCE = 2**24  # similarities computed in one block


def nearest(queries: Tensor, pictures: Tensor, k: int) -> Tensor:
    """(N, k) numbers of the rows of pictures (M, D) that have the largest cosine with every row of queries (N, D)."""
    keys = F.normalize(pictures, dim=1).T
    parts = F.normalize(queries, dim=1).split(max(AT_ONCE // len(pictures), 1))
    return torch.cat([(part @ keys).topk(k, dim=1).indices for part in parts])


class Retrieval(MetricBase):
    """The k-th sample is a query for the k-th picture of the reference. "retrieval-top1" is the share of samples whose
    own picture is nearest, "retrieval-top5" (with `k`, top-k) that of samples which have it among the nearest, and
    "retrieval-class", where pictures have labels, that of samples whose nearest picture is of the right class."""

    gives = ("retrieval-top1", "retrieval-top5", "retrieval-class")
    needs_samples = needs_reference = frozenset({"pool"})
    pairs = True

    def __init__(self, k: Few = 5):
        if k < 2:
            raise VgmError(f"k={k} is top-1, which is given anyway", "retrieval:k=5", USAGE)
        self.k = k
        self.gives = ("retrieval-top1", f"retrieval-top{k}", "retrieval-class")

    def check(self, n: int | None, n_reference: int | None, shape: tuple[int, int, int]) -> None:
        if n_reference is not None and n_reference < self.k:
            raise VgmError(f"there are {n_reference} pictures to find, fewer than {self.k}", "retrieval:k=2", USAGE)

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.pool is not None and reference.pool is not None
        if samples.items is None or reference.items is None:
            raise VgmError("retrieval needs the pictures themselves, not statistics", "--reference DATA", USAGE)
        found = pairs(samples.items, reference.items)
        own = torch.tensor(found.reference)
        near = nearest(samples.pool[found.samples], reference.pool, self.k)  # (N, k)
        right = near == own[:, None]
        shares = {"retrieval-top1": right[:, 0], f"retrieval-top{self.k}": right.any(1)}
        if reference.labels is not None:
            labels = torch.as_tensor(reference.labels)
            shares["retrieval-class"] = labels[near[:, 0]] == labels[own]
        chance = {"retrieval-top1": 1 / len(reference.pool), f"retrieval-top{self.k}": self.k / len(reference.pool)}
        out = []
        for name, hits in shares.items():
            share, n = float(hits.double().mean()), len(hits)
            facts = {"paired_by": found.by} | ({"chance": chance[name]} if name in chance else {})
            out.append(Value(name, share, math.sqrt(share * (1 - share) / n), {"among": "cosine"}, facts, n))
        return out
