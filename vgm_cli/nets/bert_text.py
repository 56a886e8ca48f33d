"""Latent diffusion's own text encoder, trained with its U-Net: a transformer over BERT's word pieces.

Rombach et al. 2022 (arXiv 2112.10752), sec. 4.3.1. Official code: CompVis/latent-diffusion@a506df5
ldm/modules/encoders/modules.py (BERTEmbedder, TransformerEmbedder, ClassEmbedder) and x_transformer.py. Padding is not
masked, as officially. Deviation: the last layer to logits, which nothing uses, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.conditioning import ClassLabel
from vgm_cli.nets.text import EncoderBlock, TextCondition
from vgm_cli.nets.tokenizers import WordPieces, bert_tokenizer
from vgm_cli.ranges import Depth, Fraction, Vocabulary, Whole, Width


class BERTText(TextCondition):
    """The condition `bert-text`: texts -> {"context": (B, length, width)}, trained with the network.

    VgmError: no tokenizer, or another encoder's.
    """

    def __init__(
        self,
        width: Width = 1280,  # of a token's vector
        depth: Depth = 32,  # number of blocks
        vocabulary: Vocabulary = 30522,  # of the tokenizer
        length: Width = 77,  # tokens of a text, its two marks included
        heads: Depth = 8,  # attention heads
        head_channels: Width = 64,  # width of a head
        dropout: Fraction = 0.0,  # share of the tokens' vectors dropped
        tokenizer: str | None = None,  # vocab.txt of bert-base-uncased, or its folder
    ):
        super().__init__()
        self.width, self.length, self.vocabulary, self.path = width, length, vocabulary, tokenizer
        self.tokenizer: WordPieces | None = None
        self.token, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, head_channels) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for table in (self.token, self.pos):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) ids, L at most `length` -> (B, L, width)."""
        x = self.drop(self.token(ids) + self.pos.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        if self.tokenizer is None:
            self.tokenizer = bert_tokenizer(self.path)
        return {"context": self(self.numbers(self.tokenizer, items, device))}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {"context": torch.zeros(n, self.length, self.width, device=device)}


class ClassToken(nn.Module):
    """The condition `class-token`: classes -> {"context": (B, 1, width)}, a vector learned for each.

    Without a condition it is the vector of one more class. What --label may say is as of the condition `class`.
    """

    column = "label"
    checkpointing = False

    def __init__(
        self,
        num_classes: Whole = 0,  # of the data
        class_names: list[str] | None = None,  # of the data
        width: Width = 512,  # of a class's vector
        null_class: bool = True,  # there is a vector for no class; LDM's models without guidance have none
    ):
        super().__init__()
        self.classes, self.width, self.null_class = ClassLabel(num_classes, class_names), width, null_class
        self.choices: Sequence[Any] = self.classes.choices
        self.embedding = nn.Embedding(num_classes + null_class, width)

    def parse(self, words: Sequence[str]) -> list[Any]:
        return self.classes.parse(words)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        return {"context": self.embedding(self.classes.encode(items, device)["y"])[:, None]}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        if not self.null_class:
            return {}
        return {"context": self.embedding.weight[-1].to(device).expand(n, 1, -1)}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {"context": torch.zeros(n, 1, self.width, device=device)}
