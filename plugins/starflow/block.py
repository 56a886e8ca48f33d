"""One autoregressive flow block: an affine map of every token, whose scale and shift a causal transformer reads off the
tokens before it.

z_t = (x_t - mean_t) / scale_t, with mean and scale functions of x_<t and of a condition. The forward direction
(data to noise) is one parallel pass; the inverse goes token by token (decoding.py).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.kv_cache import KVCache

from .layers import Shape, Transformer

UNIT = 0.541324854612918  # softplus of this is 1
ScaleKind = Literal["softplus", "exp", "none"]


class Gaussian(NamedTuple):
    """What a block says of tokens: mean and deviation, (B, T, D) float32."""

    mean: Tensor
    scale: Tensor


class Start(NamedTuple):
    """What a pass through a block begins with, besides the tokens."""

    condition: Tensor | None = None  # (B, L, txt_dim): tokens of a condition before the first token
    table: Tensor | None = None  # (L + T, head_dim / 2, 2): rotations of all positions, the condition's first
    y: Tensor | None = None  # (B,): classes, of a block that adds them to its tokens

    @property
    def length(self) -> int:
        """L, the condition's tokens."""
        return 0 if self.condition is None else self.condition.shape[1]


class FlowBlock(Transformer):
    """Tokens (B, T, D) to tokens of the same shape, and back.

    Without a start token the first token passes as it is: its mean is 0 and its scale 1.
    """

    def __init__(
        self,
        in_channels: int,  # D, numbers of a token
        shape: Shape,  # of the transformer
        flip: bool,  # tokens are read from the last to the first
        scale: ScaleKind = "exp",  # how a scale is made; none: it is 1 everywhere (volume preserving)
        soft_clip: float = 0.0,  # bound that the network's outputs approach; 0: none
        sos: bool = False,  # a learned start token, so that the first token is transformed, too
        txt_dim: int = 0,  # numbers of a condition's token; 0: no condition comes before the tokens
    ):
        super().__init__(shape)
        self.flip, self.scale, self.soft_clip = flip, scale, soft_clip
        self.proj_in = nn.Linear(in_channels, shape.channels)
        self.proj_out = nn.Linear(shape.channels, in_channels if scale == "none" else 2 * in_channels)
        nn.init.zeros_(self.proj_out.weight)
        self.sos_embed = nn.Parameter(torch.randn(1, 1, in_channels)) if sos else None
        self.proj_txt = nn.Linear(txt_dim, shape.channels) if txt_dim else None

    def order(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) in raster order to the block's own, or back."""
        return x.flip(1) if self.flip else x

    def first(self, n: int) -> Tensor | None:
        """The start token of n rows, (n, 1, D)."""
        return None if self.sos_embed is None else self.sos_embed.float().expand(n, -1, -1)

    def embed(self, inputs: Tensor, start: Start, at: int) -> Tensor:
        """Inputs (B, n, D), of which the first is number `at`, to the transformer's width."""
        return self.proj_in(inputs)

    def prefix(self, start: Start) -> Tensor | None:
        """The condition's tokens in the transformer's width, (B, L, channels)."""
        return None if self.proj_txt is None or start.condition is None else self.proj_txt(start.condition)

    def predict(
        self, inputs: Tensor, start: Start, cache: KVCache | None = None, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """The network's raw output (B, T, 2D) at the inputs (B, T, D). With a cache, which holds the condition
        (`begin`), they follow the tokens in it; without one they are the first, behind the condition."""
        n = inputs.shape[1]
        at = 0 if cache is None else cache.filled - start.length
        h = self.embed(inputs, start, at)
        if cache is None and (prefix := self.prefix(start)) is not None:
            h = torch.cat([prefix.type_as(h), h], dim=1)
        end = start.length + at + n
        table = None if start.table is None else start.table[end - h.shape[1] : end]
        out = self.proj_out(self.run(h, table, cache, temperature)[:, -n:])
        return self.soft_clip * torch.tanh(out / self.soft_clip) if self.soft_clip else out

    def begin(self, start: Start, batch: int, tokens: int, temperature: float | Tensor = 1.0) -> KVCache:
        """A cache for so many tokens that has seen the condition."""
        cache = self.new_cache(batch, start.length + tokens)
        if (prefix := self.prefix(start)) is not None:
            table = None if start.table is None else start.table[: start.length]
            self.run(prefix, table, cache, temperature)
        return cache

    def gaussian(self, out: Tensor) -> Gaussian:
        """Raw output (B, T, 2D), log-scales first, in float32 whatever the network computed in."""
        if self.scale == "none":
            return Gaussian(out.float(), torch.ones_like(out, dtype=torch.float32))
        log_scale, mean = out.float().chunk(2, dim=-1)
        return Gaussian(mean, log_scale.exp() if self.scale == "exp" else F.softplus(log_scale + UNIT))

    def forward(self, x: Tensor, start: Start) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> z of the same shape, and log |dz/dx| of every number, in the block's own order: (B, T, D)."""
        x = self.order(x.float())
        sos = self.first(len(x))
        out = self.predict(x if sos is None else torch.cat([sos, x[:, :-1]], dim=1), start)
        if sos is None:
            out = F.pad(out[:, :-1], (0, 0, 1, 0))
        own = self.gaussian(out)
        return self.order((x - own.mean) / own.scale), -own.scale.log()


class Identity(nn.Module):
    """A block of no layers (officially IdentityBlock), which has no weights: tokens pass as they are."""

    proj_txt = None
    checkpointing = False

    def forward(self, x: Tensor, start: Start) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> x, and zeros of its shape."""
        return x, torch.zeros_like(x)
