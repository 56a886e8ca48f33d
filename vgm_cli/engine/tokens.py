"""A codec as token models see it: `codec: {..., output: tokens}` in a recipe.

Wrapped in `TokenCodec`, a codec of tokens (vgm_cli.api.Tokenizer) looks to the rest of the host like any codec whose
latents happen to be ids: they are cached, shaped and decoded by the same code. Only the names differ: batches hold
"tokens" instead of "x", and the facts of the data are vocab_size and grid.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vgm_cli.api import PyramidTokenizer, Tokenizer
from vgm_cli.errors import USAGE, VgmError, unknown

OUTPUTS = ("latents", "tokens")


class TokenCodec:
    """encode and latents give ids int64 (B, *grid), decode takes them. Everything else is the wrapped codec's."""

    def __init__(self, codec: Any):
        self.codec = codec
        self.vocab_size = int(codec.codebook_size)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(C, H, W) of an image -> the grid, (h, w) or (L,)."""
        return tuple(self.codec.token_shape(image_shape))

    def encode(self, x: Tensor) -> Tensor:
        ids: Tensor = self.codec.tokens(x)
        return ids

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments.long()

    def decode(self, z: Tensor) -> Tensor:
        """ids (B, *grid), or of a pyramid the features (B, C, h, w) of its first grids or of mixed codes -> images."""
        if z.ndim == 4 and isinstance(self.codec, PyramidTokenizer):
            return self.codec.decode_features(z)
        images: Tensor = self.codec.decode_tokens(z.long())
        return images

    def __getattr__(self, name: str) -> Any:
        if name == "codec":  # not there yet: while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.codec, name)


def as_output(codec: Any, output: str | None) -> Any:
    """The codec as the recipe's `output:` wants it: "latents" (or None) as it is, "tokens" as ids.

    Raises VgmError for another word, or for tokens of a codec that has none.
    """
    if output in (None, "latents"):
        return codec
    if output != "tokens":
        raise unknown("codec output", str(output), OUTPUTS)
    if not isinstance(codec, Tokenizer):
        raise VgmError(
            f"{type(codec).__name__} gives latents, not tokens",
            "train a tokenizer (`vgm train vqgan`), or take a model of latents",
            USAGE,
        )
    return TokenCodec(codec)


def compression_factor(values: int, tokens: int, codebook_size: int) -> float:
    """How many times fewer bits so many tokens take than so many 8-bit values: a token is one of codebook_size."""
    return 8 * values / (tokens * math.log2(codebook_size)) if codebook_size > 1 else math.inf
