"""LlamaGen's decoding without a cache: what the cache is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from vgm_cli.ar.sampling import Pick
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.nets.llama import LlamaGen


@torch.no_grad()
def decode_naively(model: LlamaGen, cond: Tensor, pick: Pick, guidance_scale: float = 1.0) -> Tensor:
    """Every token runs the whole sequence again. cond: labels (B,) -> codes (B, tokens)."""
    ids = torch.empty(len(cond), 0, dtype=torch.int64, device=cond.device)
    both = torch.cat([cond, model.null_condition({"y": cond})["y"]]) if guidance_scale > 1.0 else cond
    for i in range(model.block_size):
        logits = model(ids if guidance_scale <= 1.0 else ids.repeat(2, 1), both)[:, -1]
        if guidance_scale > 1.0:
            logits = Guidance(guidance_scale).combine(*logits.chunk(2))
        ids = torch.cat([ids, pick(logits, i)[:, None]], dim=1)
    return ids
