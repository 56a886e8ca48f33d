"""Drawing tokens one after the other: filters and the loop. Logits are guided by diffusion/guidance.py's Guidance.

top-k and nucleus filters as in transformers' and LlamaGen's top_k_top_p_filtering (Holtzman et al. 2020, arXiv
1904.09751).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from vgm_cli.api import Request
from vgm_cli.ar.masking import kept_codes

M = TypeVar("M", bound=nn.Module)
Pick = Callable[[Tensor, int], Tensor]  # logits (B, V) of position i, i -> ids (B,)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_keep: int = 1) -> Tensor:
    """logits (..., V) with what is out at -inf: first all below the top_k-th largest (ties stay; 0 keeps all), then,
    of what remains in falling order, every token before which the probability already exceeds top_p. Among equal logits
    the first stay, and sums are in float64: every device keeps the same tokens."""
    if top_k > 0:
        k = min(max(top_k, min_keep), logits.shape[-1])
        smallest = logits.topk(k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        out = ordered.double().softmax(-1).cumsum(-1) > top_p
        if min_keep > 1:
            out[..., :min_keep] = False
        out = out.roll(1, dims=-1)  # the first token above the threshold stays
        out[..., 0] = False
        logits = logits.masked_fill(out.scatter(-1, places, out), -torch.inf)
    return logits


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sampling: probs (B, V), u: (B,) uniform in [0, 1) -> ids (B,). One number per token, so that all of
    an item's draws can be made from its own generator beforehand. A token of probability 0 is never drawn."""
    cdf = probs.double().cumsum(-1)
    ids = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)
    return ids.squeeze(-1).clamp_(max=probs.shape[-1] - 1)


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen from its logits: divided by temperature, filtered, drawn (or the largest, with greedy)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def probs(self, logits: Tensor) -> Tensor:
        """(..., V) -> (..., V)."""
        logits = logits.float() / max(self.temperature, 1e-5)
        return filter_logits(logits, self.top_k, self.top_p).softmax(-1)

    def picker(self, u: Tensor | None) -> Pick:
        """u: (B, N) uniform draws, one per item and position; None for greedy decoding."""
        if self.greedy or u is None:
            return lambda logits, i: logits.argmax(-1)
        columns = u.unbind(1)
        return lambda logits, i: draw(self.probs(logits), columns[i])


def keeping(pick: Pick, request: Request, order: Tensor | None = None) -> Pick:
    """pick, but for codes that the request keeps: at those, what request.images has. Without a mask, pick itself.

    order: (N,) which raster position is decoded n-th; None: in raster order. A code that is made anew has seen those
    that come before it, so that what is kept further on does not guide it.
    """
    if request.mask is None or request.images is None:
        return pick
    height, width = request.images.shape[1:]
    ids, kept = request.images.flatten(1), kept_codes(request.mask, (height, width)).flatten(1)
    if order is not None:
        ids, kept = ids[:, order], kept[:, order]
    return lambda logits, i: torch.where(kept[:, i], ids[:, i], pick(logits, i))


def generate(first: Tensor, step: Callable[[Tensor], Tensor], n: int, pick: Pick) -> Tensor:
    """n tokens per item: (B, n) int64.

    first: logits of position 0, (B, V), or (2B, V) where pick combines two halves. step: ids (B,) of the latest
    position -> logits of the next.
    """
    logits, ids = first, []
    for i in range(n):
        ids.append(pick(logits, i))
        if i + 1 < n:
            logits = step(ids[-1])
    return torch.stack(ids, dim=1)


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of each id: logits (B, N, V), ids (B, N) -> (B, N) float32."""
    logits = logits.float()
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


@contextmanager
def in_one_dtype(network: M, device: torch.device) -> Iterator[M]:
    """The network as a long loop wants it: under autocast, a copy in autocast's dtype with autocast off, so that the
    weights are cast once and not at every token."""
    if not torch.is_autocast_enabled(device.type):
        yield network
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, enabled=False):
        yield copy.deepcopy(network).to(dtype)
