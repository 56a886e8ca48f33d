"""RandAR: a Llama that writes the codes of an image in any order. Pang et al., CVPR 2025 (arXiv 2412.01827), sec. 3.

Same function and parameter names as ziqipang/RandAR@d374a72 RandAR/model/randar_gpt.py. Deviations: any grid, not only
squares; fewer key and value heads work in sampling, too; captions are not offered (no text model was published).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.ar.orders import hierarchical_orders, inverse, permutation_on, random_orders
from vgm_cli.ar.sampling import token_log_probs
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.llama import Llama
from vgm_cli.nn.embed import apply_rope
from vgm_cli.nn.example import tokens
from vgm_cli.ranges import Depth, Fraction, Positive, Vocabulary, Whole, Width

# random and hierarchical orders are drawn anew for every item, the others are the same for all
Order = Literal["random", "hierarchical", "raster", "alternate", "z-curve", "spiral-out", "spiral-in", "halton"]


def orders_of(kind: Order, u: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which raster position comes n-th: (B, N) int64, from (B, N) uniform draws, one row for each item."""
    if kind == "random":
        return random_orders(u)
    if kind == "hierarchical":
        return hierarchical_orders(u, *grid)
    return permutation_on(kind, *grid, u.device).expand(len(u), -1)


def interleave(a: Tensor, b: Tensor) -> Tensor:
    """Two (B, n, ...) -> (B, 2n, ...): a_0, b_0, a_1, b_1, ..."""
    return torch.stack([a, b], dim=2).flatten(1, 2)


class RandAR(Llama):
    """Codes in any order: the sequence is [class, P(o_0), x(o_0), P(o_1), x(o_1), ...], 1 + 2N long, where o is the
    order, x the embedding of a code and P(p) a position instruction token: it says that the code at p comes next, whose
    logits are read there.

    P is one learned vector, turned by the rotation of p in every head, and turned once more inside attention, as every
    token is; both rotations are the official ones. P(p) and x(p) have the same position.
    """

    def __init__(
        self,
        dim: Width = 1024,  # width
        n_layer: Depth = 24,  # number of blocks
        n_head: Depth = 16,  # attention heads
        n_kv_head: Depth | None = None,  # None: as n_head
        vocab_size: Vocabulary = 16384,  # number of codes
        grid: tuple[int, int] = (16, 16),  # rows and columns of codes
        num_classes: Whole = 1000,  # 0 is unconditional
        null_class: bool = True,  # one more row, for guidance; unlabelled data always has it
        order: Order = "random",  # of training, and of samplers that name none
        multiple_of: Width = 256,  # the feed-forward width is rounded up to a multiple of this
        ffn_dim_multiplier: Positive | None = None,  # factor on the feed-forward width; None: 1
        rope_base: Positive = 10000.0,  # base of the rotary positions' frequencies
        norm_eps: Positive = 1e-5,  # added to the mean square in RMS norms
        token_dropout: Fraction = 0.1,  # share of the codes' embeddings dropped in training
        attn_dropout: Fraction = 0.0,  # share of attention weights dropped in training
        resid_dropout: Fraction = 0.1,  # share of attention outputs dropped in training
        ffn_dropout: Fraction = 0.1,  # share of feed-forward outputs dropped in training
        drop_path: Fraction = 0.0,  # of the last layer, rising linearly from 0
        initializer_range: Positive = 0.02,  # standard deviation of the initial weights
        checkpointing: bool = False,  # recompute layers in backward
    ):
        super().__init__(
            dim=dim,
            n_layer=n_layer,
            n_head=n_head,
            n_kv_head=n_kv_head,
            vocab_size=vocab_size,
            grid=grid,
            num_classes=num_classes,
            null_class=null_class,
            multiple_of=multiple_of,
            ffn_dim_multiplier=ffn_dim_multiplier,
            rope_base=rope_base,
            norm_eps=norm_eps,
            token_dropout=token_dropout,
            attn_dropout=attn_dropout,
            resid_dropout=resid_dropout,
            ffn_dropout=ffn_dropout,
            drop_path=drop_path,
            initializer_range=initializer_range,
            checkpointing=checkpointing,
        )
        self.order: Order = order
        self.pos_instruct_embeddings = nn.Parameter(torch.randn(1, dim) * initializer_range)

    # -- parts

    def positions(self, order: Tensor) -> Tensor:
        """(B, n) raster positions -> their rotations (B, n, head_dim / 2, 2)."""
        return self.table(order.device)[self.cls_token_num :][order]

    def instructions(self, table: Tensor) -> Tensor:
        """Rotations (B, n, head_dim / 2, 2) of positions -> their instruction tokens (B, n, D)."""
        shared = self.pos_instruct_embeddings.view(1, 1, -1, self.head_dim).expand(*table.shape[:2], -1, -1)
        return apply_rope(shared, table).flatten(2)

    def sequence(self, ids: Tensor, cond: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """The embedded sequence (B, 1 + 2n, D) and its rotations; arguments as `forward`'s. Dropout takes embeddings of
        codes alone."""
        table = self.positions(order)
        x = self.tok_dropout(self.tok_embeddings(ids.gather(1, order)))
        prefix = self.cls_embedding(cond)
        turned = table.new_zeros(*prefix.shape[:2], *table.shape[2:])
        h = torch.cat([prefix, interleave(self.instructions(table), x)], dim=1)
        return h, torch.cat([turned, table.repeat_interleave(2, dim=1)], dim=1)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        n = config["grid"][0] * config["grid"][1]
        label = torch.tensor([max(0, min(1, config["num_classes"] - 1))])
        return {"ids": tokens(n, config["vocab_size"]), "cond": label, "order": torch.arange(n).flip(0)[None]}

    def forward(self, ids: Tensor, cond: Tensor, order: Tensor) -> Tensor:
        """ids: (B, N) codes in raster order; cond: (B,) labels; order: (B, n) the raster positions in the order of
        prediction, the first n <= N of them -> logits (B, n, V), in that order."""
        h, table = self.sequence(ids, cond, order)
        return self.logits(self.hidden(h, table)[:, self.cls_token_num :: 2])

    # -- for other purposes than sampling

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, generators: list[torch.Generator], y: Tensor | None = None
    ) -> tuple[Tensor, str]:
        """x: (B, h, w) int64 codes -> nats (B,) of the codes; the contract of vgm_cli/metrics/likelihood.py.

        Each order is an exact likelihood of its own. Over drawn orders the model is their mixture, of whose
        log-likelihood the mean over orders is a lower bound: here of one order for each image.
        """
        ids = x.flatten(1)
        u = torch.stack([torch.rand(self.block_size, generator=g) for g in generators]).to(x.device)
        order = orders_of(self.order, u, self.grid)
        logits = self(ids, self.labels(y, len(ids), x.device), order)
        given = "given the class" if y is not None else "given the null class"
        drawn = self.order in ("random", "hierarchical")
        kind = f"lower bound, one {self.order} order each" if drawn else f"exact, {self.order} order"
        return token_log_probs(logits, ids.gather(1, order)).sum(1), f"{kind}, of the codes {given}"

    def bidirectional_features(
        self,
        ids: Tensor,
        y: Tensor | None = None,
        order: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """Features of every code that know of all others, (B, h, w, D), although attention is causal: the codes go
        through twice, and those of the second time have seen all of the first.

        ids: (B, h, w) codes; y: (B,) labels, None for the null class; order: (B, N) of both passes, None for raster;
        depth: after so many blocks, None for half of them. The paper names the idea and publishes no code: repeating
        the whole sequence behind the class token, positions included, is this project's reading of it.
        """
        flat, n = ids.flatten(1), self.block_size
        if order is None:
            order = torch.arange(n, device=ids.device).expand(len(ids), -1)
        h, table = self.sequence(flat, self.labels(y, len(ids), ids.device), order)
        h, table = (torch.cat([t, t[:, self.cls_token_num :]], dim=1) for t in (h, table))
        if depth is None:
            depth = max(1, len(self.layers) // 2)
        if not 1 <= depth <= len(self.layers):
            raise VgmError(f"depth={depth} of a network of {len(self.layers)} blocks", code=USAGE)
        second = self.hidden(h, table, depth=depth)[:, -2 * n :][:, 1::2]  # at the codes, in order
        back = inverse(order)[..., None].expand(-1, -1, second.shape[-1])
        return second.gather(1, back).unflatten(1, self.grid)
