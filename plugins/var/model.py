"""VAR: a transformer that predicts a grid of codes at once from all coarser ones. Tian et al. 2024 (arXiv 2404.02905).

Same function and parameter names as FoundationVision/VAR@78b9539 models/var.py, models/basic_var.py. Deviations: labels
are dropped by the host, never inside forward; masks and the tokenizer are no part of the network; grids need not be
squares; a cache is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.ar.pyramid import sizes, teacher_inputs
from vgm_cli.ar.sampling import token_log_probs
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.llama import DropPath
from vgm_cli.nn.attention import block_causal, causal_attention
from vgm_cli.nn.example import noise
from vgm_cli.nn.kv_cache import KVCache
from vgm_cli.nn.sdpa import sdpa
from vgm_cli.ranges import Depth, NonNegative, Positive, Rate, Vocabulary, Whole, Width

from .presets import LADDERS, squares


class SelfAttention(nn.Module):
    """Keys have no bias. With queries and keys of unit length each head learns how sharp its softmax is."""

    SHARPEST = math.log(100)

    def __init__(self, width: int, heads: int, l2_norm: bool):
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """x: (B, T, D). mask: (T, T) bool; None: all T positions and all cached ones are seen."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.l2_norm:  # the kernels divide by sqrt(d), which is undone
            sharpness = self.scale_mul_1H11.clamp_max(self.SHARPEST).exp() * math.sqrt(q.shape[-1])
            q, k = (F.normalize(q, dim=-1) * sharpness).to(v), F.normalize(k, dim=-1).to(v)
        else:
            q = q * 0.25
        if cache is not None:
            k, v = cache.write(layer, k, v)
        y = sdpa(q, k, v) if mask is None else causal_attention(q, k, v, mask)
        return self.proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Sequential):
    """A condition (B, D) -> n vectors for every item, (B, 1, n, D)."""

    def __init__(self, width: int, n: int):
        super().__init__(nn.SiLU(), nn.Linear(width, n * width))
        self.n = n

    @property
    def weight(self) -> Tensor:
        """(n D, D): of the linear layer."""
        return self[1].weight  # type: ignore[return-value]

    def forward(self, c: Tensor) -> Tensor:
        return super().forward(c).unflatten(-1, (self.n, -1))[:, None]


class Block(nn.Module):
    """x + gamma_1 attention(norm(x) (1 + scale_1) + shift_1), the same with a feed-forward network.

    The six vectors are gamma_1, gamma_2, scale_1, scale_2, shift_1, shift_2, from the class; with a shared modulation
    they are the network's, to which each block adds its own.
    """

    def __init__(
        self,
        width: int,  # D
        heads: int,  # of the attention
        hidden: int,  # width of the feed-forward network
        l2_norm: bool,  # queries and keys of unit length
        shared: bool,  # the modulation is the network's
        drop_path: float,  # share of items whose residual branches are left out in training
        eps: float,  # of the normalisations
    ):
        super().__init__()
        self.eps = eps
        self.attn, self.ffn = SelfAttention(width, heads, l2_norm), FeedForward(width, hidden)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ada_lin = None if shared else Modulation(width, 6)
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """c: (B, D) of the class, or the shared vectors (B, 1, 6, D)."""
        vectors = self.ada_gss + c if self.ada_lin is None else self.ada_lin(c)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(2)
        y = norm(x, self.eps) * (1 + scale1) + shift1
        x = x + self.drop_path(self.attn(y, mask, cache, layer) * gamma1)
        return x + self.drop_path(self.ffn(norm(x, self.eps) * (1 + scale2) + shift2) * gamma2)


class Head(nn.Module):
    """The modulated normalisation before the logits: norm(x) (1 + scale) + shift."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.ada_lin, self.eps = Modulation(width, 2), eps

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.ada_lin(c).unbind(2)
        return norm(x, self.eps) * (1 + scale) + shift


def norm(x: Tensor, eps: float) -> Tensor:
    """Layer normalisation without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class VAR(nn.Module):
    """Codes of a pyramid, a whole grid at a time: what comes before the first grid is the class, what comes before the
    others are the features that the coarser ones add up to, as means over the places of the grid.

    VgmError: heads that do not divide the width, or no pyramid.
    """

    repeated = ("blocks",)
    latent_likelihood = True  # of codes, see vgm_cli/metrics/likelihood.py
    lvl_1L: Tensor

    def __init__(
        self,
        scales: tuple[tuple[int, int], ...] = squares(LADDERS[16]),  # rows and columns of every grid, coarse to fine
        vocab_size: Vocabulary = 4096,  # number of codes
        channels: Width = 32,  # of the tokenizer's features
        num_classes: Whole = 1000,  # 0 is unconditional; one more row is the null class
        depth: Depth = 16,  # number of blocks
        embed_dim: Width | None = None,  # width; None: 64 for each block
        num_heads: Depth | None = None,  # attention heads; None: one for each block
        mlp_ratio: Positive = 4.0,  # width of the feed-forward networks over width
        drop_path: Rate = 0.0,  # of the last block, rising linearly from 0
        norm_eps: Positive = 1e-6,  # of the normalisations
        shared_aln: bool = False,  # one modulation for all blocks, to which each adds its own numbers
        attn_l2_norm: bool = True,  # queries and keys of unit length, with a learned sharpness
        init_gamma: NonNegative = 1e-5,  # factor on the initial weights that make gammas
        init_adaln: NonNegative = 0.5,  # the same of scales and shifts
        init_head: NonNegative = 0.02,  # the same of the logits
        checkpointing: bool = False,  # recompute blocks in backward
    ):
        super().__init__()
        width, heads = embed_dim or 64 * depth, num_heads or depth
        if width % heads:
            raise VgmError(f"embed_dim={width} does not divide into num_heads={heads}", code=USAGE)
        if not scales:
            raise VgmError("VAR writes a pyramid of grids, these tokens are one grid", "a codec var-tokenizer", USAGE)
        self.scales = tuple((h, w) for h, w in scales)
        self.sizes = sizes(self.scales)  # positions of every grid
        self.vocab_size, self.channels, self.num_classes = vocab_size, channels, num_classes
        self.heads, self.head_dim, self.norm_eps = heads, width // heads, norm_eps
        self.checkpointing = checkpointing
        length = sum(self.sizes)
        self.word_embed = nn.Linear(channels, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.sizes[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, width))
        self.lvl_embed = nn.Embedding(len(self.sizes), width)
        levels = [torch.full((n,), k) for k, n in enumerate(self.sizes)]
        self.register_buffer("lvl_1L", torch.cat(levels)[None])  # (1, L): the scale of every position
        self.shared_ada_lin = Modulation(width, 6) if shared_aln else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                round(width * mlp_ratio),
                attn_l2_norm,
                shared_aln,
                drop_path * i / max(1, depth - 1),
                norm_eps,
            )
            for i in range(depth)
        )
        self.head_nm = Head(width, norm_eps)
        self.head = nn.Linear(width, vocab_size)
        self.initialise(init_gamma, init_adaln, init_head)
        self._masks: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def initialise(self, gamma: float, adaln: float, head: float) -> None:
        """The published start: truncated normal of deviation sqrt(1 / 3D), smaller where a branch or the logits end."""
        width = self.pos_1LC.shape[2]
        deviation = math.sqrt(1 / (3 * width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_start, std=deviation)
        nn.init.trunc_normal_(self.pos_1LC, std=deviation)
        self.head.weight.mul_(head)
        self.head_nm.ada_lin.weight.mul_(adaln)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2 * len(self.blocks)))
            block.ffn.fc2.weight.div_(math.sqrt(2 * len(self.blocks)))
            own = block.ada_gss[0, 0] if block.ada_lin is None else block.ada_lin.weight.unflatten(0, (6, -1))
            own[:2].mul_(gamma)
            own[2:].mul_(adaln)

    # -- parts

    def null_condition(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The null class in the place of classes y (B,)."""
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if "y" in cond else dict(cond)

    def labels(self, y: Tensor | None, n: int, device: torch.device) -> Tensor:
        """(n,) labels; without any, the null class."""
        return torch.full((n,), self.num_classes, device=device) if y is None else y

    def mask(self, device: torch.device) -> Tensor:
        """(L, L) bool: a position sees its own grid and all coarser ones."""
        if device not in self._masks:
            self._masks[device] = block_causal(self.sizes, device)
        return self._masks[device]

    def cache(self, n: int) -> KVCache:
        """An empty cache for n rows."""
        like = self.head.weight
        return KVCache(len(self.blocks), n, self.heads, sum(self.sizes), self.head_dim, like.device, like.dtype)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        second = sizes(config["scales"][1:2])
        return {
            "seen": noise(1, sum(second), config["channels"]),
            "y": torch.tensor([max(0, min(1, config["num_classes"] - 1))]),
        }

    def forward(self, seen: Tensor | None, y: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) float32 of the codes at T positions, those of the first grids one after the other.

        seen: (B, T - size of the first grid, C) what is seen at the positions of all but the first grid, which has
        ar.pyramid.teacher_inputs; None: the first grid alone. y: (B,) classes. With a cache: of the next grid alone,
        seen at all T of its positions, None for the first.
        """
        c = self.class_emb(y)
        past = 0 if cache is None else cache.filled
        parts = [] if past else [c[:, None] + self.pos_start]
        parts += [] if seen is None else [self.word_embed(seen)]
        h = torch.cat(parts, dim=1)
        end = past + h.shape[1]
        h = h + (self.lvl_embed(self.lvl_1L[:, past:end]) + self.pos_1LC[:, past:end])
        mask = None if cache is not None else self.mask(h.device)[:end, :end]
        vectors = c if self.shared_ada_lin is None else self.shared_ada_lin(c)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                h = checkpoint(block, h, vectors, mask, cache, i, use_reentrant=False)
            else:
                h = block(h, vectors, mask, cache, i)
        if cache is not None:
            cache.advance(end - past)
        return self.head(self.head_nm(h, c)).float()

    # -- likelihood

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, generators: list[torch.Generator], y: Tensor | None = None, codec: Any = None
    ) -> tuple[Tensor, str]:
        """x: (B, L) int64 codes -> nats of all of them (B,), exact; the contract of vgm_cli/metrics/likelihood.py."""
        if codec is None:
            raise VgmError("VAR's codes have no likelihood without the tokenizer that it sees with", code=USAGE)
        logits = self(teacher_inputs(codec, x, self.scales), self.labels(y, len(x), x.device))
        given = "given the class" if y is not None else "given the null class"
        return token_log_probs(logits, x).sum(1), f"exact, of the codes {given}"
