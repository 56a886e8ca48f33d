"""LlamaGen's sampler: one token at a time with a cache, both halves of guidance in one batch.

Official code: FoundationVision/LlamaGen@ce98ec4 autoregressive/models/generate.py. Deviation: a token is drawn by
inverse CDF from one uniform number of its item's generator, instead of torch.multinomial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.ar.sampling import Decoding, Pick, generate, in_one_dtype, keeping
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.llama import Decoder, LlamaGen
from vgm_cli.ranges import Fraction, NonNegative, Whole


@torch.no_grad()
def decode(
    model: LlamaGen,
    cond: dict[str, Tensor],
    pick: Pick,
    guidance_scale: float = 1.0,
    cfg_interval: int = -1,
    watch: Callable[[Tensor, int], None] | None = None,
    null: dict[str, Tensor] | None = None,
) -> Tensor:
    """Codes (B, tokens) int64. cond: {"y": (B,)} or {"text": (B, T, C), "pad": (B, T)}.

    guidance_scale <= 1: the condition alone, without the null half. cfg_interval k >= 0: guidance on the first code and
    the k + 1 after it, plain conditional logits from then on. watch(logits, i) sees what is drawn from. null: see
    conditioning.unconditional.
    """
    scaled, guidance = guidance_scale > 1.0, Guidance(guidance_scale)
    if scaled:
        other = unconditional(model, cond, null)
        cond = {k: torch.cat([v, other[k]]) for k, v in cond.items()}
    decoder = Decoder(model, cond["y"] if "y" in cond else cond["text"], cond.get("pad"))

    def choose(logits: Tensor, i: int) -> Tensor:
        if scaled:
            wanted, worse = logits.chunk(2)
            logits = guidance.combine(wanted, worse) if cfg_interval < 0 or i <= cfg_interval + 1 else wanted
        if watch is not None:
            watch(logits, i)
        return pick(logits, i)

    repeat = (lambda ids: decoder.step(ids.repeat(2))) if scaled else decoder.step
    return generate(decoder.first(), repeat, model.block_size, choose)


class LlamaGenSampler:
    """One code after the other, with a cache. Defaults are those of the published FIDs: the whole vocabulary at
    temperature 1.

    As a restoration method it completes images: codes whose pixels are all kept stay, the others are made anew, each
    from those before it.
    """

    completes = True

    def __init__(
        self,
        temperature: NonNegative = 1.0,  # of the draws: below 1 likelier, above 1 more varied
        top_k: Whole = 0,  # 0: all
        top_p: Fraction = 1.0,  # draw among the likeliest codes of this total probability
        greedy: bool = False,  # the most probable code instead of a draw
        cfg_interval: int = -1,  # guide the first k + 2 codes only; -1: all
        guidance_scale: NonNegative = 1.0,  # where the request names none
    ):
        self.decoding = Decoding(temperature, top_k, top_p, greedy)
        self.cfg_interval, self.guidance_scale = cfg_interval, guidance_scale

    def accepts(self, model: Any, codec: Any) -> str | None:
        """LlamaGen networks; None, or why not."""
        return None if isinstance(model, LlamaGen) and codec is not None else "it is no LlamaGen network over codes"

    def __call__(self, model: LlamaGen, request: Request) -> Tensor:
        """Codes (N, h, w) int64. VgmError: another decoder's network."""
        if not isinstance(model, LlamaGen):
            raise VgmError("only a LlamaGen network writes codes in raster order without being told where", code=USAGE)
        cond = {"y": model.labels(None, len(request), request.device)} if not request.cond else request.cond
        scale = self.guidance_scale if request.guidance_scale is None else request.guidance_scale
        u = None if self.decoding.greedy else request.rand((model.block_size,))
        pick = keeping(self.decoding.picker(u), request)
        with in_one_dtype(model, request.device) as network:
            ids = decode(network, cond, pick, scale, self.cfg_interval, null=request.null)
        request.info["nfe"] = model.block_size
        return ids.unflatten(1, model.grid)
