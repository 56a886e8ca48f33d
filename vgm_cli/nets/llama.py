"""A Llama decoder over the codes of an image, and LlamaGen, which writes them in raster order. Sun et al. 2024 (arXiv
2406.06525).

Same function and parameter names as FoundationVision/LlamaGen@ce98ec4 autoregressive/models/gpt.py. Deviations: the
condition is dropped by the objective, never by a draw inside forward; logits are those of image positions in training
and in evaluation alike; any grid, not only squares; the cache is an argument, not state of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.ar.sampling import token_log_probs
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.attention import causal_attention
from vgm_cli.nn.embed import apply_rope, rope_angles_2d, rope_table
from vgm_cli.nn.example import noise, tokens
from vgm_cli.nn.kv_cache import KVCache
from vgm_cli.nn.norm import RMSNorm
from vgm_cli.ranges import Depth, Fraction, Positive, Vocabulary, Whole, Width


class LabelEmbedder(nn.Module):
    """(B,) labels -> (B, 1, D). Row num_classes of the table, where there is one, is the null class."""

    def __init__(self, num_classes: int, dim: int, has_null: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + has_null, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)[:, None]


class CaptionEmbedder(nn.Module):
    """Text features (B, T, C) -> (B, T, D). The null caption is a buffer of random features: it is never trained."""

    uncond_embedding: Tensor

    def __init__(self, caption_dim: int, dim: int, tokens: int):
        super().__init__()
        layers = {"fc1": nn.Linear(caption_dim, dim, bias=False), "fc2": nn.Linear(dim, dim, bias=False)}
        self.cap_proj = nn.ModuleDict(layers)
        self.register_buffer("uncond_embedding", torch.randn(tokens, caption_dim) / caption_dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](features), approximate="tanh"))


class FeedForward(nn.Module):
    """SwiGLU. hidden: 8/3 dim (times the multiplier), rounded up to multiple_of."""

    def __init__(self, dim: int, multiple_of: int, multiplier: float | None, dropout: float):
        super().__init__()
        hidden = int(2 * 4 * dim / 3)
        if multiplier is not None:
            hidden = int(multiplier * hidden)
        hidden = -(-hidden // multiple_of) * multiple_of
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Attention(nn.Module):
    """One fused projection, rows ordered (q, k, v); q and k are turned by their places on the grid."""

    def __init__(self, dim: int, n_head: int, n_kv_head: int, attn_dropout: float, resid_dropout: float):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, dim // n_head
        self.attn_dropout = attn_dropout
        self.wqkv = nn.Linear(dim, (n_head + 2 * n_kv_head) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(resid_dropout)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads + 2 kv_heads, d)
        turning = self.n_head + self.n_kv_head
        q, k = apply_rope(qkv[:, :, :turning], table).transpose(1, 2).split([self.n_head, self.n_kv_head], dim=1)
        v = qkv[:, :, turning:].transpose(1, 2)
        y = causal_attention(q, k, v, mask, self.attn_dropout if self.training else 0.0, cache, layer)
        return self.resid_dropout(self.wo(y.transpose(1, 2).flatten(2)))  # (B, T, D)


class DropPath(nn.Module):
    """Leaves a residual branch out for a whole item, with probability p while training; the others are scaled up."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class TransformerBlock(nn.Module):
    def __init__(self, attention: Attention, feed_forward: FeedForward, dim: int, eps: float, drop_path: float):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x), table, mask, cache, layer))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class Llama(nn.Module):
    """Embeddings, blocks and output of a decoder over codes behind a condition: one class token, or the projected
    features of a caption. In which sequence codes are fed, subclasses say.

    Positions: image tokens turn with row and column (RoPE). The rotation table's rows of the condition are ZERO, as in
    the official code: a condition's queries and keys vanish, and every token sees its value at attention logit 0.
    """

    repeated = ("layers",)
    latent_likelihood = True  # of codes, see vgm_cli/metrics/likelihood.py

    def __init__(
        self,
        dim: Width = 768,  # width
        n_layer: Depth = 12,  # number of blocks
        n_head: Depth = 12,  # attention heads
        n_kv_head: Depth | None = None,  # None: as n_head
        vocab_size: Vocabulary = 16384,  # number of codes
        grid: tuple[int, int] = (16, 16),  # rows and columns of codes
        num_classes: Whole = 1000,  # 0 is unconditional
        null_class: bool = True,  # one more row, for guidance; unlabelled data always has it
        model_type: Literal["c2i", "t2i"] = "c2i",  # class or text to image
        cls_token_num: Width = 1,  # condition tokens; 120 for text
        caption_dim: Width = 2048,  # of the text features
        multiple_of: Width = 256,  # the feed-forward width is rounded up to a multiple of this
        ffn_dim_multiplier: Positive | None = None,  # factor on the feed-forward width; None: 1
        rope_base: Positive = 10000.0,  # base of the rotary positions' frequencies
        norm_eps: Positive = 1e-5,  # added to the mean square in RMS norms
        token_dropout: Fraction = 0.1,  # share of embeddings dropped in training
        attn_dropout: Fraction = 0.0,  # share of attention weights dropped in training
        resid_dropout: Fraction = 0.1,  # share of attention outputs dropped in training
        ffn_dropout: Fraction = 0.1,  # share of feed-forward outputs dropped in training
        drop_path: Fraction = 0.0,  # of the last layer, rising linearly from 0
        initializer_range: Positive = 0.02,  # standard deviation of the initial weights
        checkpointing: bool = False,  # recompute layers in backward
    ):
        super().__init__()
        if dim % n_head or dim // n_head % 4:
            raise VgmError(f"dim={dim} over n_head={n_head} does not give heads of a multiple of 4", code=USAGE)
        if model_type == "c2i" and cls_token_num != 1:
            raise VgmError(f"a class is 1 token, not {cls_token_num}", "captions: model.model_type=t2i", USAGE)
        self.grid: tuple[int, int] = (grid[0], grid[1])
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.model_type, self.cls_token_num = model_type, cls_token_num
        self.head_dim, self.n_kv_head, self.rope_base = dim // n_head, n_kv_head or n_head, rope_base
        self.checkpointing = checkpointing
        self.has_null = null_class or not num_classes
        if model_type == "c2i":
            self.cls_embedding: LabelEmbedder | CaptionEmbedder = LabelEmbedder(num_classes, dim, self.has_null)
        else:
            self.cls_embedding = CaptionEmbedder(caption_dim, dim, cls_token_num)
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.tok_dropout = nn.Dropout(token_dropout)
        rates = [drop_path * i / max(1, n_layer - 1) for i in range(n_layer)]
        self.layers = nn.ModuleList(
            TransformerBlock(
                Attention(dim, n_head, self.n_kv_head, attn_dropout, resid_dropout),
                FeedForward(dim, multiple_of, ffn_dim_multiplier, ffn_dropout),
                dim,
                norm_eps,
                rate,
            )
            for rate in rates
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, initializer_range)
        nn.init.zeros_(self.output.weight)
        self._tables: dict[torch.device, Tensor] = {}

    # -- parts

    @property
    def block_size(self) -> int:
        return self.grid[0] * self.grid[1]

    def table(self, device: torch.device) -> Tensor:
        """(cls_token_num + tokens, head_dim / 2, 2): the rotation of every position."""
        if device not in self._tables:
            height, width = self.grid
            angles = rope_angles_2d(height, width, self.head_dim, self.rope_base)
            self._tables[device] = rope_table(angles, self.cls_token_num).to(device)
        return self._tables[device]

    @property
    def null_caption(self) -> Tensor:
        """(cls_token_num, caption_dim): the text features of no caption."""
        return self.cls_embedding.uncond_embedding  # type: ignore[return-value]

    def null_condition(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The condition of guidance's other half: the null class, or the null caption behind the same mask."""
        null = dict(cond)
        if "y" in cond:
            if not self.has_null:
                raise VgmError("this network was built without a null class", "model.null_class=true", USAGE)
            null["y"] = torch.full_like(cond["y"], self.num_classes)
        if "text" in cond:
            null["text"] = torch.zeros_like(cond["text"]) + self.null_caption.to(cond["text"])
        return null

    def labels(self, y: Tensor | None, n: int, device: torch.device) -> Tensor:
        """(n,) labels; without any, the null class."""
        return torch.full((n,), self.num_classes, device=device) if y is None else y

    def hidden(
        self,
        h: Tensor,
        table: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Embedded positions (B, T, D) -> what the blocks make of them, (B, T, D), of the first `depth` blocks or of
        all. table: the rotations of these positions, (T, head_dim / 2, 2), or (B, T, head_dim / 2, 2) where every item
        has positions of its own.
        """
        for i, layer in enumerate(self.layers):
            if i == depth:
                break
            if self.checkpointing and self.training and torch.is_grad_enabled():
                h = checkpoint(layer, h, table, mask, cache, i, use_reentrant=False)
            else:
                h = layer(h, table, mask, cache, i)
        if cache is not None:
            cache.advance(h.shape[1])
        return h

    def logits(self, h: Tensor) -> Tensor:
        """What `hidden` gives (B, T, D) -> (B, T, V) float32."""
        return self.output(self.norm(h)).float()

    def run(
        self,
        h: Tensor,
        table: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Embedded positions (B, T, D) -> logits (B, T, V) float32; table: see `hidden`.

        last: logits of so many positions at the end are wanted, (B, last, V); None: of all.
        """
        h = self.hidden(h, table, mask, cache)
        return self.logits(h if last is None else h[:, -last:])


class LlamaGen(Llama):
    """Codes in raster order behind the condition."""

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        rows, columns = config["grid"]
        ids = tokens(min(8, rows * columns - 1), config["vocab_size"])
        if config["model_type"] == "t2i":
            return {"ids": ids, "cond": noise(1, config["cls_token_num"], config["caption_dim"])}
        return {"ids": ids, "cond": torch.tensor([max(0, min(1, config["num_classes"] - 1))])}

    def forward(self, ids: Tensor, cond: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids: (B, T) the first T codes; cond: (B,) labels or (B, cls_token_num, C) text features; mask: bool
        (B, 1, S, S) with S = cls_token_num + T, in place of the causal one. -> logits (B, T + 1, V) of codes 0 to T.
        """
        prefix = self.cls_embedding(cond)[:, : self.cls_token_num]
        h = self.tok_dropout(torch.cat([prefix, self.tok_embeddings(ids)], dim=1))
        return self.run(h, self.table(h.device)[: h.shape[1]], mask)[:, self.cls_token_num - 1 :]

    # -- likelihood

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        generators: list[torch.Generator],
        y: Tensor | None = None,
        text: Tensor | None = None,
        pad: Tensor | None = None,
    ) -> tuple[Tensor, str]:
        """x: (B, h, w) int64 codes -> nats (B,) of the codes, exact; the contract of vgm_cli/metrics/likelihood.py.

        A text model without a text is asked with the null caption.
        """
        ids, mask = x.flatten(1), None
        if text is not None:
            cond, given = text.to(self.null_caption), "given the caption"
            mask = None if pad is None else padded_causal(pad, ids.shape[1] - 1)
        elif self.model_type == "t2i":
            cond, given = self.null_caption.expand(len(ids), -1, -1), "given the null caption"
        else:
            cond = self.labels(y, len(ids), ids.device)
            given = "given the class" if y is not None else "given the null class"
        logits = self(ids[:, :-1], cond, mask)
        return token_log_probs(logits, ids).sum(1), f"exact, of the codes {given}"


class Decoder:
    """One generation with a cache. cond: labels (B,) or text features (B, T, C); pad: (B, T) of text, 1 where a
    position counts and 0 where it is padding."""

    def __init__(self, model: LlamaGen, cond: Tensor, pad: Tensor | None = None):
        self.model, self.cond = model, cond
        self.prefix = model.cls_token_num
        weight = model.output.weight
        self.cache = KVCache(
            len(model.layers),
            len(cond),
            model.n_kv_head,
            self.prefix + model.block_size - 1,  # the last code is never fed
            model.head_dim,
            weight.device,
            weight.dtype,
        )
        self.rotations = model.table(weight.device).split(1)
        self.seen: Tensor | None = None
        if pad is not None:  # (B, 1, 1, all positions): which keys count
            self.seen = F.pad(pad.bool(), (0, model.block_size - 1), value=True)[:, None, None]

    def first(self) -> Tensor:
        """Logits (B, V) of code 0."""
        h = self.model.cls_embedding(self.cond)[:, : self.prefix]
        mask = None if self.seen is None else padded_causal(self.seen[:, 0, 0, : self.prefix])
        return self.model.run(h, self.model.table(h.device)[: self.prefix], mask, self.cache, last=1)[:, 0]

    def step(self, ids: Tensor) -> Tensor:
        """ids: (B,) the latest codes -> logits (B, V) of the next."""
        at = self.cache.filled
        mask = None if self.seen is None else self.seen[..., : at + 1]
        h = self.model.tok_embeddings(ids[:, None])
        return self.model.run(h, self.rotations[at], mask, self.cache, last=1)[:, 0]


def padded_causal(keys: Tensor, more: int = 0) -> Tensor:
    """bool (B, 1, S, S), S = T + more: causal, without the keys (B, T) that are padding; a position always sees itself.

    more: positions after the T, none of them padding.
    """
    keys = F.pad(keys.bool(), (0, more), value=True)
    size = keys.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=keys.device).tril()
    eye = torch.eye(size, dtype=torch.bool, device=keys.device)
    return (causal & keys[:, None] | eye)[:, None]
