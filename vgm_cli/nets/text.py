"""Text encoders as conditions: what they share, and a small one of whole words, to be trained with the network."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Few, Width

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


class WordEncoder(nn.Module):
    """The condition `words`: texts -> {"context": (B, length, width)}, one learned vector for each known word and one
    for its place, zero behind the last word. No text at all is zero everywhere.

    In captions, a word that is not known has a vector of its own, and what is longer is cut off; a prompt is refused.
    """

    column = "text"
    choices: Sequence[Any] = ()
    checkpointing = False

    def __init__(
        self,
        words: list[str],  # that the encoder knows, in lower case
        width: Width = 64,  # of a word's vector
        length: Few = 8,  # words of a text at most
    ):
        super().__init__()
        self.words, self.width, self.length = list(words), width, length
        self.numbers = {word: UNKNOWN + 1 + i for i, word in enumerate(self.words)}
        self.word = nn.Embedding(UNKNOWN + 1 + len(self.words), width)
        self.place = nn.Embedding(length, width)
        for table in (self.word, self.place):
            nn.init.normal_(table.weight, std=0.5)

    def split(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def parse(self, words: Sequence[str]) -> list[Any]:
        for text in words:
            own = self.split(text)
            if strange := [w for w in own if w not in self.numbers]:
                known = ", ".join(self.words[:30])
                raise VgmError(f"'{strange[0]}' is a word that this network was not taught", f"it knows {known}", USAGE)
            if len(own) > self.length:
                raise VgmError(f"'{text}' has {len(own)} words, the network reads {self.length}", code=USAGE)
        return list(words)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        ids = torch.full((len(items), self.length), PAD)
        for row, text in zip(ids, items):
            own = [self.numbers.get(w, UNKNOWN) for w in self.split(text)][: self.length]
            row[: len(own)] = torch.tensor(own, dtype=torch.long)
        return {"context": self(ids.to(device))}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {"context": torch.zeros(n, self.length, self.width, device=device)}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return self.null(n, device)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, length) word numbers -> (B, length, width)."""
        places = torch.arange(self.length, device=ids.device)
        return (self.word(ids) + self.place(places)) * (ids != PAD)[..., None]
