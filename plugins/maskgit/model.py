"""MaskGIT's two networks over the codes of an image, some of which are masked: every position sees every other.

Chang et al. 2022 (arXiv 2202.04200), sec. 3.2: BERT behind a class token, google-research/maskgit@1db2359
maskgit/nets/maskgit_transformer.py. Besnier et al. 2025 (arXiv 2503.17076): a transformer whose norms the class
modulates, valeoai/Halton-MaskGIT@f61b0a1 Network/transformer.py, under whose parameter names it stands here.
Deviations: attention is fused; grids need not be square; classes are dropped by the host, never by a draw inside
forward; patches of codes (proj=2), which fail in the official code, are not brought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.dit import modulate
from vgm_cli.nn.attention import attend
from vgm_cli.nn.example import tokens
from vgm_cli.nn.norm import RMSNorm
from vgm_cli.ranges import Blocks, Depth, Rate, Vocabulary, Whole, Width


class MaskedTransformer(nn.Module):
    """What objective and samplers see of both networks: forward(ids (B, N), y (B,)) -> logits (B, N, rows), where ids
    are those of a grid in raster order, `mask_id` where nothing is known.

    vocab_size: number of codes; logits have further rows, of what a position never is. Without a class given, y is the
    null class, where the network has one.
    """

    def __init__(self, vocab_size: int, grid: tuple[int, int], num_classes: int, has_null: bool, mask_id: int):
        super().__init__()
        self.vocab_size, self.num_classes, self.mask_id = vocab_size, num_classes, mask_id
        self.grid: tuple[int, int] = (grid[0], grid[1])
        self.positions, self.has_null, self.checkpointing = grid[0] * grid[1], has_null, False

    def null_condition(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The null class in place of every class. VgmError: the network was built without one."""
        if not self.has_null:
            raise VgmError("this network was built without a null class", "model.null_class=true", USAGE)
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if "y" in cond else dict(cond)

    def labels(self, y: Tensor | None, n: int, device: torch.device) -> Tensor:
        """(n,) labels; without any, the null class. VgmError: the network has none."""
        if y is None and not self.has_null:
            raise VgmError("this network needs a class", "--label N", USAGE)
        return torch.full((n,), self.num_classes, device=device) if y is None else y

    def of_codes(self, logits: Tensor) -> Tensor:
        """Logits of the codes alone: (..., rows) -> (..., vocab_size)."""
        return logits[..., : self.vocab_size]

    def run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """layer(*inputs), recomputed in backward where activations are not kept."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(*inputs)  # type: ignore[no-any-return]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        ids = tokens(config["grid"][0] * config["grid"][1], config["vocab_size"])
        return {"ids": ids, "y": torch.tensor([max(0, min(1, config["num_classes"] - 1))])}


# -- BERT behind a class token -----------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A linear layer into heads: (B, T, D) -> (B, heads, T, D / heads)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim // heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
        return out.unflatten(-1, self.bias.shape).transpose(1, 2)


class PostNormLayer(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + mlp(x)). x: (B, T, dim)."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, attn_dropout: float):
        super().__init__()
        self.query, self.key, self.value = Heads(dim, heads), Heads(dim, heads), Heads(dim, heads)
        self.out = nn.Linear(dim, dim)
        self.attention_ln = layer_norm(dim)
        self.intermediate, self.output = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.output_ln = layer_norm(dim)
        self.dropout, self.attn_dropout = nn.Dropout(dropout), attn_dropout

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.attn_dropout if self.training else 0.0
        y = attend(self.query(x), self.key(x), self.value(x), dropout=dropped)
        x = self.attention_ln(x + self.dropout(self.out(y.transpose(1, 2).flatten(2))))
        y = self.output(F.gelu(self.intermediate(x), approximate="tanh"))
        return self.output_ln(x + self.dropout(y))


def layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-12)


class MaskGIT(MaskedTransformer):
    """MaskGIT's BERT. Codes, classes and the mask share one table: rows 0 to K - 1 are codes, then come the classes,
    the null class where there is one, and last the mask. The same table, transposed, gives the logits.

    VgmError: heads do not divide the width.
    """

    repeated = ("layers",)

    def __init__(
        self,
        vocab_size: Vocabulary = 1024,  # K, number of codes
        grid: tuple[int, int] = (16, 16),  # rows and columns of codes
        num_classes: Whole = 1000,  # 0 is unconditional
        null_class: bool = False,  # one more row, for guidance; unlabelled data always has it
        hidden_size: Width = 768,  # width
        num_hidden_layers: Depth = 24,  # number of layers
        num_attention_heads: Depth = 16,  # attention heads
        intermediate_size: Width = 3072,  # width inside the MLPs
        hidden_dropout: Rate = 0.1,  # share of embeddings and of residual branches dropped in training
        attn_dropout: Rate = 0.1,  # share of attention weights dropped in training
        checkpointing: bool = False,  # recompute layers in backward
    ):
        has_null = null_class or not num_classes
        mask_id = vocab_size + num_classes + has_null
        super().__init__(vocab_size, grid, num_classes, has_null, mask_id)
        if hidden_size % num_attention_heads:
            text = f"hidden_size={hidden_size} does not divide into num_attention_heads={num_attention_heads}"
            raise VgmError(text, code=USAGE)
        self.checkpointing = checkpointing
        self.word_embeddings = nn.Embedding(mask_id + 1, hidden_size)
        self.position_embeddings = nn.Embedding(self.positions + 1, hidden_size)
        self.embeddings_ln = layer_norm(hidden_size)
        self.dropout = nn.Dropout(hidden_dropout)
        self.layers = nn.ModuleList(
            PostNormLayer(hidden_size, num_attention_heads, intermediate_size, hidden_dropout, attn_dropout)
            for _ in range(num_hidden_layers)
        )
        self.mlm_dense = nn.Linear(hidden_size, hidden_size)
        self.mlm_ln = layer_norm(hidden_size)
        self.mlm_bias = nn.Parameter(torch.zeros(mask_id + 1))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Heads):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if not isinstance(module, nn.Embedding):
                    nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, y: Tensor | None = None) -> Tensor:
        """ids: (B, N), y: (B,) -> logits (B, N, rows) float32."""
        first = self.vocab_size + self.labels(y, len(ids), ids.device)
        return self.sequence(torch.cat([first[:, None], ids], dim=1))[:, 1:]

    def sequence(self, ids: Tensor) -> Tensor:
        """Logits (B, 1 + N, rows) of a whole sequence of rows of the table, the class first."""
        x = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        x = self.dropout(self.embeddings_ln(x))
        for layer in self.layers:
            x = self.run(layer, x)
        x = self.mlm_ln(F.gelu(self.mlm_dense(x), approximate="tanh"))
        return F.linear(x, self.word_embeddings.weight, self.mlm_bias).float()


# -- norms modulated by the class --------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention without biases; queries and keys are normalised over all heads together, without weights."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = dim // heads * heads  # officially the width need not divide: 512 into 6 heads of 85
        self.wq, self.wk, self.wv = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.wo = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = self.wv(x)
        q, k = (F.rms_norm(f(x).float(), v.shape[-1:], eps=1e-5).to(v) for f in (self.wq, self.wk))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        return F.dropout(self.wo(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) w3 x). hidden: two thirds of it, rounded up to 256."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        hidden = 256 * -(-int(2 * hidden / 3) // 256)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.dropout(F.silu(self.w1(x)) * self.w3(x)))


class AdaptiveBlock(nn.Module):
    """Attention and SwiGLU, each with its shift, scale and gate from the class; gates start at zero."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.ln1, self.ln2 = RMSNorm(dim), RMSNorm(dim)
        self.attn, self.ff = SelfAttention(dim, heads, dropout), SwiGLU(dim, hidden, dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, T, dim), c: (B, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.mlp(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.ln1(x), shift1, scale1))
        return x + gate2[:, None] * self.ff(modulate(self.ln2(x), shift2, scale2))


class BiasedRMSNorm(RMSNorm):
    """RMSNorm with a bias."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class LastNorm(nn.Module):
    """A norm whose shift and scale come from the class."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_final = BiasedRMSNorm(dim)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return modulate(self.norm_final(x), *self.mlp(c).chunk(2, dim=1))


class Stack(nn.Module):
    """Blocks one after the other."""

    repeated = ("layers",)

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor, c: Tensor, run: Callable[..., Tensor]) -> Tensor:
        for block in self.layers:
            x = run(block, x, c)
        return x


class HaltonMaskGIT(MaskedTransformer):
    """The Halton paper's network. Its table has the codes and the mask, whose row is also the last of the logits; the
    last row of the classes' table is the null class. VgmError: more heads than channels."""

    def __init__(
        self,
        vocab_size: Vocabulary = 16384,  # number of codes
        grid: tuple[int, int] = (16, 16),  # rows and columns of codes
        num_classes: Whole = 1000,  # 0 is unconditional
        hidden_dim: Width = 768,  # width
        depth: Depth = 12,  # number of blocks
        heads: Depth = 12,  # attention heads
        mlp_dim: Width | None = None,  # two thirds of it, rounded up to 256, are the width inside; None: 4 hidden_dim
        register: Blocks = 1,  # learned positions behind the grid, for what belongs to no place
        dropout: Rate = 0.1,  # share of attention weights, their outputs and SwiGLU's products dropped in training
        checkpointing: bool = False,  # recompute blocks in backward
    ):
        super().__init__(vocab_size, grid, num_classes, True, vocab_size)
        if heads > hidden_dim:
            raise VgmError(f"heads={heads} are more than hidden_dim={hidden_dim}", code=USAGE)
        self.checkpointing = checkpointing
        self.cls_emb = nn.Embedding(num_classes + 1, hidden_dim)
        self.tok_emb = nn.Embedding(vocab_size + 1, hidden_dim)
        self.pos_emb = nn.Embedding(self.positions, hidden_dim)
        self.reg_tokens = nn.Embedding(register, hidden_dim) if register else None
        inner = mlp_dim or 4 * hidden_dim
        self.transformer = Stack(AdaptiveBlock(hidden_dim, heads, inner, dropout) for _ in range(depth))
        self.last_norm = LastNorm(hidden_dim)
        self.head = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(vocab_size + 1))})  # its weight is tok_emb's
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.transformer.layers:
            nn.init.zeros_(block.mlp[1].weight)  # type: ignore[union-attr, index]

    def forward(self, ids: Tensor, y: Tensor | None = None) -> Tensor:
        """ids: (B, N), y: (B,) -> logits (B, N, vocab_size + 1) float32."""
        c = self.cls_emb(self.labels(y, len(ids), ids.device))
        x = self.tok_emb(ids) + self.pos_emb.weight
        if self.reg_tokens is not None:
            x = torch.cat([x, self.reg_tokens.weight.expand(len(x), -1, -1)], dim=1)
        x = self.transformer(x, c, self.run)
        x = self.last_norm(x[:, : self.positions], c)
        return F.linear(x, self.tok_emb.weight, self.head["bias"]).float()
