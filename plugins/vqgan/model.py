"""VQGAN's second stage: a GPT over the codes of an image. Esser et al., CVPR 2021 (arXiv 2012.09841), sec. 3.2.

Same function and parameter names as CompVis/taming-transformers@3ba01b2 taming/modules/transformer/mingpt.py; what goes
before the codes is that of taming/models/cond_transformer.py (Net2NetTransformer). The first stage is the host's
VQModel. Deviations: attention is fused; causal masks are not stored; the cache is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.ar.orders import Order, permutation_on
from vgm_cli.ar.sampling import token_log_probs
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.first_stage import VQModel
from vgm_cli.nn.attention import causal_attention
from vgm_cli.nn.example import tokens
from vgm_cli.nn.kv_cache import KVCache
from vgm_cli.ranges import Blocks, Depth, Fraction, Vocabulary, Whole, Width

__all__ = ["GPT", "Decoder", "VQModel", "coordinate_map", "coordinate_tokens"]  # VQModel: the first stage

Condition = Literal["class", "none", "coord", "codes"]


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, attn_pdrop: float, resid_pdrop: float):
        super().__init__()
        self.n_head, self.attn_pdrop = n_head, attn_pdrop
        self.key = nn.Linear(n_embd, n_embd)
        self.query = nn.Linear(n_embd, n_embd)
        self.value = nn.Linear(n_embd, n_embd)
        self.resid_drop = nn.Dropout(resid_pdrop)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = causal_attention(q, k, v, mask, self.attn_pdrop if self.training else 0.0, cache, layer)
        return self.resid_drop(self.proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, attn_pdrop: float, resid_pdrop: float):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, attn_pdrop, resid_pdrop)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(resid_pdrop)
        )

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attn(self.ln1(x), mask, cache, layer)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Next-code model of sequences [condition, codes]; condition ids share the codes' embedding table.

    condition: "class" (the label is the token), "none" (a start token), "coord" (a coordinate per code of the window),
    "codes" (ids from elsewhere: depth, segmentation); None: class where there are classes, else none.
    """

    latent_likelihood = True  # of codes, see vgm_cli/metrics/likelihood.py

    def __init__(
        self,
        vocab_size: Vocabulary = 1024,  # codes
        grid: tuple[int, int] = (16, 16),  # rows and columns of codes
        window: Width | None = None,  # side of the attended square where the grid is larger; None: the whole grid
        num_classes: Whole = 0,  # 0 is unconditional
        condition: Condition | None = None,  # see above
        block_size: Width | None = None,  # longest sequence; None: condition and window
        n_layer: Depth = 12,  # number of blocks
        n_head: Depth = 8,  # attention heads
        n_embd: Width = 256,  # width
        embd_pdrop: Fraction = 0.0,  # share of embeddings dropped in training
        resid_pdrop: Fraction = 0.0,  # share of residual branches' activations dropped in training
        attn_pdrop: Fraction = 0.0,  # share of attention weights dropped in training
        n_unmasked: Blocks = 0,  # the first positions see each other
        sos_token: int = 0,  # the start token of "none"
        n_coord: Width | None = None,  # a coordinate c in [0, 1] is the id round(n_coord c); None: vocab_size - 1
        coord_factor: Width = 1,  # side of a code in pixels, where coordinates are of pixels (published: 16)
        order: Order = "raster",  # in which order codes are written, see orders.py
        checkpointing: bool = False,  # recompute blocks in backward
    ):
        super().__init__()
        if n_embd % n_head:
            raise VgmError(f"n_embd={n_embd} does not divide into n_head={n_head}", code=USAGE)
        self.grid: tuple[int, int] = (grid[0], grid[1])
        self.codes, self.num_classes = vocab_size, num_classes
        self.window = (min(window, grid[0]), min(window, grid[1])) if window else self.grid
        self.condition: Condition = condition or ("class" if num_classes else "none")
        self.sos_token, self.n_unmasked, self.order = sos_token, n_unmasked, order
        self.n_coord, self.coord_factor = vocab_size - 1 if n_coord is None else n_coord, coord_factor
        self.n_head, self.checkpointing = n_head, checkpointing
        last = int(coordinate_tokens(self.coordinates(*self.grid, torch.device("cpu"))[None], self.n_coord).max())
        needed = {"class": num_classes, "none": sos_token + 1, "coord": last + 1, "codes": 0}[self.condition]
        rows = max(vocab_size, needed)
        n = self.window[0] * self.window[1]
        self.block_size = block_size or n + (n if self.condition in ("coord", "codes") else 1)
        self.tok_emb = nn.Embedding(rows, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, self.block_size, n_embd))
        self.drop = nn.Dropout(embd_pdrop)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head, attn_pdrop, resid_pdrop) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, rows, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    # -- sequences

    def prefix(self, cond: dict[str, Tensor], n: int, device: torch.device) -> Tensor:
        """Condition ids before the codes: (n, length). cond: "y" (n,), "coord" (n, h, w) in [0, 1], or "codes" (n,
        length)."""
        if self.condition == "class":
            return cond["y"][:, None]
        if self.condition == "none":
            return torch.full((n, 1), self.sos_token, device=device)
        if self.condition == "coord":
            ids = coordinate_tokens(cond["coord"], self.n_coord).flatten(1)
            return ids.clamp(max=self.tok_emb.num_embeddings - 1)  # the last ones of a grid far larger than trained on
        return cond["codes"].flatten(1)

    def coordinates(self, height: int, width: int, device: torch.device) -> Tensor:
        """Of every code of a grid: (height, width) in [0, 1)."""
        return coordinate_map(height, width, device, self.coord_factor)

    def permutation(self, device: torch.device) -> Tensor:
        return permutation_on(self.order, *self.window, device)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        grid, window = config["grid"], config["window"]
        longest = min(window or grid[0], grid[0]) * min(window or grid[1], grid[1])
        return {"ids": tokens(min(8, longest), config["vocab_size"])}

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, T) -> logits (B, T, rows), position i predicts id i + 1."""
        return self.run(ids, self.unmasked(ids.shape[1], ids.device))

    def run(self, ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """With a cache, the ids follow those in it, and only the last position's logits (B, 1, rows) come back."""
        start = cache.filled if cache is not None else 0
        if start + ids.shape[1] > self.block_size:
            raise VgmError(f"{start + ids.shape[1]} positions exceed block_size={self.block_size}", code=USAGE)
        x = self.drop(self.tok_emb(ids) + self.pos_emb[:, start : start + ids.shape[1]])
        for i, block in enumerate(self.blocks):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, i, use_reentrant=False)
            else:
                x = block(x, mask, cache, i)
        if cache is not None:
            cache.advance(ids.shape[1])
            x = x[:, -1:]
        return self.head(self.ln_f(x)).float()

    def unmasked(self, length: int, device: torch.device) -> Tensor | None:
        """The attention mask in which the first `n_unmasked` positions see each other; None where attention is
        plainly causal."""
        if self.n_unmasked < 2:
            return None
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask[: self.n_unmasked, : self.n_unmasked] = True
        return mask

    def of_codes(self, logits: Tensor) -> Tensor:
        """Logits of the codes alone, without the ids that only conditions have: (..., rows) -> (..., vocab_size)."""
        return logits[..., : self.codes]

    # -- likelihood

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, generators: list[torch.Generator], y: Tensor | None = None
    ) -> tuple[Tensor, str]:
        """x: (B, h, w) int64 codes -> nats (B,), exact; the contract of vgm_cli/metrics/likelihood.py."""
        if self.window != self.grid:
            raise VgmError("a sliding window gives no likelihood of a whole image", code=USAGE)
        cond: dict[str, Tensor] = {"coord": self.coordinates(*self.grid, x.device).expand(len(x), -1, -1)}
        if self.condition == "class":
            if y is None:
                raise VgmError("this prior needs the labels of the data", code=USAGE)
            cond["y"] = y
        codes = x.flatten(1)[:, self.permutation(x.device)]
        c = self.prefix(cond, len(x), x.device)
        logits = self(torch.cat([c, codes], dim=1)[:, :-1])[:, c.shape[1] - 1 :]
        return token_log_probs(logits, codes).sum(1), f"exact, of the codes, condition: {self.condition}"


class Decoder:
    """One generation with a cache. prefix: (B, T) ids before the codes."""

    def __init__(self, model: GPT, prefix: Tensor, length: int):
        weight = model.pos_emb
        self.model, self.prefix = model, prefix
        head_dim = weight.shape[-1] // model.n_head
        positions = prefix.shape[1] + length - 1
        self.cache = KVCache(
            len(model.blocks), len(prefix), model.n_head, positions, head_dim, weight.device, weight.dtype
        )

    def first(self) -> Tensor:
        """Logits (B, rows) of code 0."""
        mask = self.model.unmasked(self.prefix.shape[1], self.prefix.device)
        return self.model.run(self.prefix, mask, self.cache)[:, -1]

    def step(self, ids: Tensor) -> Tensor:
        """ids: (B,) the latest codes -> logits (B, rows) of the next."""
        return self.model.run(ids[:, None], None, self.cache)[:, -1]


# -- coordinates -------------------------------------------------------------------------------------------------------


def coordinate_map(height: int, width: int, device: torch.device | str = "cpu", factor: int = 1) -> Tensor:
    """(height, width) raster positions of codes in [0, 1): the mean of those of a code's factor x factor pixels."""
    rows, columns = (torch.arange(n, device=device) * factor + (factor - 1) / 2 for n in (height, width))
    return (rows[:, None] * (width * factor) + columns) / (height * width * factor**2)


def coordinate_tokens(coord: Tensor, n_coord: int, down: int = 1) -> Tensor:
    """coord: (B, H, W) in [0, 1] -> ids (B, H / down, W / down) in [0, n_coord]: the mean of each patch, rounded."""
    mean = F.avg_pool2d(coord[:, None], down)[:, 0] if down > 1 else coord
    return (n_coord * mean.clamp(0.0, 1.0)).round().long()
