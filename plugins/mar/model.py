"""MAR: a masked autoencoder over continuous tokens whose decoder says, for every place, what the diffusion head needs.

Li et al. 2024 (arXiv 2406.11838), sec. 3.3 and 4. Official code: LTH14/mar@fe470ac models/mar.py, under whose parameter
names it stands here; the blocks are timm's vision transformer's. Deviations: attention is fused; labels are dropped by
the host, never by a draw inside forward; items of a batch may know different numbers of tokens (completion), the
shorter ones being padded and masked; which tokens are masked, and the loss, are the objective's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.attention import attend
from vgm_cli.nn.example import label, noise
from vgm_cli.ranges import Depth, NonNegative, Positive, Rate, Side, Steps, Whole, Width

from .head import DiffusionHead, Mean


class Attention(nn.Module):
    """Self-attention with one fused projection, rows ordered (q, k, v), heads within."""

    def __init__(self, width: int, heads: int, attn_dropout: float, dropout: float):
        super().__init__()
        self.heads, self.attn_dropout = heads, attn_dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, T, d)
        q, k, v = qkv.unbind(0)
        y = attend(q, k, v, mask, self.attn_dropout if self.training else 0.0)
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm attention and MLP. x: (B, T, width); mask: (B, 1, 1, T) bool, true where a position is seen, or None."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, attn_dropout: float, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, attn_dropout, dropout)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


class MAR(nn.Module):
    """forward(tokens (B, N, C p^2), known (B, N) bool, y (B,)) -> what the head is told of every place, known or not:
    (B, N, decoder_width). Tokens that are not known may hold anything.

    Tokens are patches of x (B, C, H, H) in raster order, channels first: `patchify`. The encoder sees the known ones
    behind buffer_size copies of the class's vector; the decoder sees all places. Label num_classes, or none, is no
    class. VgmError: heads do not divide a width, the patch does not divide the side.
    """

    repeated = ("encoder_blocks", "decoder_blocks")

    def __init__(
        self,
        input_size: Side = 16,  # side of x
        patch_size: Width = 1,  # side of a token's patch
        in_channels: Width = 16,  # channels of x
        num_classes: Whole = 1000,  # 0 is unconditional
        encoder_width: Width = 1024,  # width of the encoder
        encoder_depth: Depth = 16,  # blocks of the encoder
        encoder_heads: Depth = 16,  # attention heads of the encoder
        decoder_width: Width = 1024,  # width of the decoder, and of what it tells the head
        decoder_depth: Depth = 16,  # blocks of the decoder
        decoder_heads: Depth = 16,  # attention heads of the decoder
        mlp_ratio: Positive = 4.0,  # hidden width of the MLPs over the width
        buffer_size: Width = 64,  # places in front of the tokens that hold the class
        head_depth: Depth = 3,  # blocks of the diffusion head
        head_width: Width = 1024,  # its width; tokens of more than 32 numbers want a wider one
        attn_dropout: Rate = 0.1,  # share of attention weights dropped in training
        proj_dropout: Rate = 0.1,  # share of attention's and the MLPs' outputs dropped in training
        schedule: str = "cosine",  # of the head's betas, see discrete.named_betas
        diffusion_steps: Steps = 1000,  # of the head's process
        prediction: Mean = "eps",  # what the head says of a noisy token: its noise, as published, or x0, the token
        head_gain: NonNegative = 0.0,  # of the head's modulations and output before training; 0 as published
        table_std: Positive = 0.02,  # deviation of positions, classes and mask before training
    ):
        super().__init__()
        halves = {"encoder": (encoder_width, encoder_heads), "decoder": (decoder_width, decoder_heads)}
        for half, (width, heads) in halves.items():
            if width % heads:
                raise VgmError(f"{half}_width={width} does not divide into {half}_heads={heads}", code=USAGE)
        if input_size % patch_size:
            raise VgmError(f"patch_size={patch_size} does not divide the side {input_size}", code=USAGE)
        side = input_size // patch_size
        self.grid, self.positions = (side, side), side * side
        self.patch_size, self.num_classes, self.buffer_size = patch_size, num_classes, buffer_size
        self.sample_shape = (in_channels, input_size, input_size)
        self.channels = in_channels * patch_size**2  # of a token
        self.stored_checkpointing = False
        length = buffer_size + self.positions
        options = (mlp_ratio, attn_dropout, proj_dropout)

        self.class_emb = nn.Embedding(num_classes, encoder_width) if num_classes else None
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_width))
        self.z_proj = nn.Linear(self.channels, encoder_width)
        self.z_proj_ln = norm(encoder_width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_width))
        self.encoder_blocks = nn.ModuleList(Block(encoder_width, encoder_heads, *options) for _ in range(encoder_depth))
        self.encoder_norm = norm(encoder_width)

        self.decoder_embed = nn.Linear(encoder_width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads, *options) for _ in range(decoder_depth))
        self.decoder_norm = norm(decoder_width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.positions, decoder_width))
        self.initialise(table_std)
        process = (schedule, diffusion_steps, prediction, head_gain)
        self.diffloss = DiffusionHead(self.channels, decoder_width, head_width, head_depth, *process)

    @torch.no_grad()
    def initialise(self, table_std: float) -> None:
        """Xavier linears; normal embeddings, positions and mask."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [self.fake_latent, self.mask_token, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned]
        classes = [self.class_emb.weight] if self.class_emb is not None else []
        for table in (*tables, self.diffusion_pos_embed_learned, *classes):
            nn.init.normal_(table, std=table_std)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks, the head's too, are recomputed in the backward pass."""
        return self.stored_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.stored_checkpointing = self.diffloss.net.checkpointing = on

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        patch = config["patch_size"]
        known = (torch.arange((config["input_size"] // patch) ** 2) % 3 == 0)[None]
        tokens = noise(*known.shape, config["in_channels"] * patch**2)
        return {"tokens": tokens, "known": known, **label(config["num_classes"])}

    # tokens and classes

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, H, H) -> tokens (B, N, C p^2), the channel being the slowest number of a token. VgmError: x has
        another size than the positions."""
        if x.shape[1:] != self.sample_shape:
            raise VgmError(f"the network is built for {self.sample_shape}, got {tuple(x.shape[1:])}", code=USAGE)
        return F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C p^2) -> (B, C, H, H)."""
        p, (rows, columns) = self.patch_size, self.grid
        x = tokens.view(len(tokens), rows, columns, -1, p, p)  # (B, h, w, C, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), *self.sample_shape)

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """No class in place of every class."""
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if cond.get("y") is not None else dict(cond)

    def class_vectors(self, y: Tensor | None, n: int) -> Tensor:
        """(n, encoder_width): what the buffer holds."""
        if y is None or self.class_emb is None:
            return self.fake_latent.expand(n, -1)
        return F.embedding(y, torch.cat([self.class_emb.weight, self.fake_latent]))

    # the two halves

    def run(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        """block(x, mask), recomputed in backward when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, mask, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x, mask)  # type: ignore[no-any-return]

    def encode(self, tokens: Tensor, places: Tensor, mask: Tensor | None, y: Tensor | None) -> Tensor:
        """The encoder's output (B, buffer_size + K, encoder_width) of the buffer and of the tokens at `places`, (B, K)
        int64, K known ones of each item. mask: as a block's, where some of the K are padding."""
        b, positions = self.buffer_size, self.encoder_pos_embed_learned
        x = tokens.gather(1, places[..., None].expand(-1, -1, self.channels)).to(self.z_proj.weight.dtype)
        x = self.z_proj(x) + positions[0, b:][places]
        buffer = self.class_vectors(y, len(x))[:, None] + positions[:, :b]
        x = self.z_proj_ln(torch.cat([buffer, x], dim=1))
        for block in self.encoder_blocks:
            x = self.run(block, x, mask)
        return self.encoder_norm(x)  # type: ignore[no-any-return]

    def decode(self, x: Tensor, places: Tensor, known: Tensor) -> Tensor:
        """What the head is told of every place, (B, N, decoder_width), from the encoder's output."""
        x = self.decoder_embed(x)
        b, width = self.buffer_size, x.shape[-1]
        seen = x.new_zeros(len(x), self.positions, width)
        seen = seen.scatter(1, places[..., None].expand(-1, -1, width), x[:, b:])
        seen = torch.where(known[..., None], seen, self.mask_token.to(seen))
        x = torch.cat([x[:, :b], seen], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = self.run(block, x, None)
        return self.decoder_norm(x)[:, b:] + self.diffusion_pos_embed_learned  # type: ignore[no-any-return]

    def places(self, known: Tensor, count: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Where the known tokens are, (B, K) int64 in raster order, and a block's mask where some items know fewer than
        K. count: K, where every item is known to know as many; None looks."""
        order = (~known).to(torch.uint8).argsort(dim=1, stable=True)
        if count is not None:
            return order[:, :count], None
        counts = known.sum(1)
        most = int(counts.max())
        if int(counts.min()) == most:
            return order[:, :most], None
        seen = torch.arange(most, device=known.device) < counts[:, None]
        return order[:, :most], F.pad(seen, (self.buffer_size, 0), value=True)[:, None, None]

    def forward(self, tokens: Tensor, known: Tensor, y: Tensor | None = None, count: int | None = None) -> Tensor:
        """See the class. count: how many tokens every item knows, where that is one number; None looks."""
        places, mask = self.places(known, count)
        return self.decode(self.encode(tokens, places, mask, y), places, known)
