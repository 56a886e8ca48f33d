"""Text encoders as conditions: what they share, and a small one of whole words, to be trained with the network."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.data.texts import split
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.spatial_transformer import CrossAttention
from vgm_cli.ranges import Blocks, Depth, Few, Width

PAD, UNKNOWN = 0, 1


class TextCondition(nn.Module, ABC):
    """A condition on texts whose tokenizer knows every text; without a condition it reads the empty one."""

    column = "text"
    choices: Sequence[Any] = ()
    checkpointing = False
    length: int  # tokens of a text
    vocabulary: int  # numbers of the tokenizer

    def parse(self, words: Sequence[str]) -> list[Any]:
        return list(words)

    @abstractmethod
    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        """Texts -> keywords of the network."""

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {k: v.expand(n, *v.shape[1:]) for k, v in self.encode([""], device).items()}

    def numbers(self, tokenizer: Any, items: Sequence[Any], device: torch.device) -> Tensor:
        """(B, length) of texts. VgmError: the tokenizer is another encoder's."""
        if tokenizer.size != self.vocabulary:
            message = f"the tokenizer has {tokenizer.size} numbers, the text encoder {self.vocabulary}"
            raise VgmError(message, "conditions.NAME.tokenizer is the encoder's own", USAGE)
        return torch.tensor([tokenizer(text, self.length) for text in items], device=device)


class EncoderBlock(nn.Module):
    """Pre-norm attention over a text's tokens, and two layers: (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int, head_channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CrossAttention(width, width, heads, head_channels, 0.0)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WordEncoder(TextCondition):
    """The condition `words`: texts -> {"context": (B, length, width)}, one learned vector for each known word and one
    for its place, and transformer blocks over them; with `vector` also their sum {"vector": (B, width)}.

    Without blocks, places behind the last word are zero, and so is no text at all; with blocks they are padding, which
    is not masked, and no text is the empty one. In captions, a word that is not known has a vector of its own, and what
    is longer is cut off; a prompt is refused. VgmError: a width that does not divide into heads.
    """

    def __init__(
        self,
        words: list[str] | None = None,  # that the encoder knows, in lower case; None: those of the data's captions
        width: Width = 64,  # of a word's vector
        length: Few = 8,  # words of a text at most
        depth: Blocks = 0,  # transformer blocks
        heads: Depth = 4,  # their attention heads
        vector: bool = False,  # the sum of the words' vectors, too, for networks that add one to the time
    ):
        super().__init__()
        if depth and width % heads:
            raise VgmError(f"width={width} does not divide into heads={heads}", "heads=4", USAGE)
        self.words, self.width, self.length, self.vector = list(words or []), width, length, vector
        self.numbers_of = {word: UNKNOWN + 1 + i for i, word in enumerate(self.words)}
        self.vocabulary = UNKNOWN + 1 + len(self.words)
        self.word = nn.Embedding(self.vocabulary, width)
        self.place = nn.Embedding(length, width)
        for table in (self.word, self.place):
            nn.init.normal_(table.weight, std=0.5)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, width // heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()

    def parse(self, words: Sequence[str]) -> list[Any]:
        for text in words:
            own = split(text)
            if strange := [w for w in own if w not in self.numbers_of]:
                near = difflib.get_close_matches(strange[0], self.words, 3)
                near += [w for w in self.words if w not in near][: 20 - len(near)]
                message = f"'{strange[0]}' is a word that this network was not taught"
                raise VgmError(message, f"it knows {len(self.words)} words: {', '.join(near)} …", USAGE)
            if len(own) > self.length:
                raise VgmError(f"'{text}' has {len(own)} words, the network reads {self.length}", code=USAGE)
        return list(words)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        ids = torch.full((len(items), self.length), PAD)
        for row, text in zip(ids, items):
            own = [self.numbers_of.get(w, UNKNOWN) for w in split(text)][: self.length]
            row[: len(own)] = torch.tensor(own, dtype=torch.long)
        return self.keywords(self(ids.to(device)))

    def keywords(self, context: Tensor) -> dict[str, Tensor]:
        return {"context": context, **({"vector": context.sum(1)} if self.vector else {})}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return super().null(n, device) if self.blocks else self.example(n, device)

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return self.keywords(torch.zeros(n, self.length, self.width, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, length) word numbers -> (B, length, width)."""
        x = self.word(ids) + self.place(torch.arange(self.length, device=ids.device))
        if not self.blocks:
            return x * (ids != PAD)[..., None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
