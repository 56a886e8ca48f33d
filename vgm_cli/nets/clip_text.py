"""CLIP's text tower as a condition: Stable Diffusion 1's, 2's, and both of SDXL's together.

Radford et al. 2021 (arXiv 2103.00020); OpenCLIP, mlfoundations/open_clip. What diffusion models take of it:
CompVis/stable-diffusion@21f890f ldm/modules/encoders/modules.py, Stability-AI/generative-models@fbdc58c
sgm/modules/encoders/modules.py. Padding is not masked, as officially.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.text import TextCondition
from vgm_cli.nets.tokenizers import BytePairs, clip_tokenizer
from vgm_cli.nets.unet_blocks import timestep_embedding
from vgm_cli.nets.vit import Block
from vgm_cli.ranges import Blocks, Depth, Side, Vocabulary, Whole, Width


class CLIPText(TextCondition):
    """The condition `clip-text`: texts -> {"context": (B, length, width)}, a causal transformer over their tokens.

    The largest id ends a text, and what stands at the first of these is the text as a whole. VgmError: no tokenizer, or
    another encoder's.
    """

    def __init__(
        self,
        width: Width = 768,  # of a token's vector
        depth: Depth = 12,  # number of blocks
        heads: Depth = 12,  # attention heads
        vocabulary: Vocabulary = 49408,  # of the tokenizer, its two marks included
        length: Width = 77,  # tokens of a text, its two marks included
        hidden: Width | None = None,  # width inside the blocks' two layers; None: four times the width
        activation: Literal["quick-gelu", "gelu"] = "quick-gelu",  # OpenAI's towers have the quick one
        skip: Blocks = 0,  # last blocks whose work the context leaves out
        norm: bool = True,  # the context is normalised by the last layer
        head: Whole = 0,  # width of the projection of the whole text; 0: none
        pad: Whole | None = None,  # number behind the end of a text; None: the end's own (OpenCLIP: 0)
        tokenizer: str | None = None,  # bpe_simple_vocab_16e6.txt.gz, or a tokenizer's folder
    ):
        super().__init__()
        if skip >= depth:
            raise VgmError(f"skip={skip} leaves nothing of {depth} blocks", "skip=1 is the last but one", USAGE)
        self.width, self.length, self.vocabulary, self.whole = width, length, vocabulary, head or width
        self.skip, self.normalised = skip, norm
        self.pad, self.path = pad, tokenizer
        self.tokenizer: BytePairs | None = None
        self.token = nn.Embedding(vocabulary, width)
        self.pos = nn.Parameter(torch.randn(length, width) * 0.01)
        own = (width, heads, hidden or 4 * width, activation, False, 1e-5)
        self.blocks = nn.ModuleList(Block(*own) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, head, bias=False) if head else nn.Identity()
        nn.init.normal_(self.token.weight, std=0.02)

    def ids(self, items: Sequence[Any], device: torch.device) -> Tensor:
        """(B, length) numbers of texts, of a tokenizer that is read when the first comes."""
        if self.tokenizer is None:
            self.tokenizer = clip_tokenizer(self.path, self.pad)
        return self.numbers(self.tokenizer, items, device)

    def both(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids, L at most `length` -> context (B, L, width), and of the whole text (B, head or width)."""
        x = self.token(ids) + self.pos[: ids.shape[1]]
        context = x
        for i, block in enumerate(self.blocks):
            x = block(x, causal=True)
            context = x if i == len(self.blocks) - 1 - self.skip else context
        last = self.norm(x)
        whole = last[torch.arange(len(ids), device=ids.device), ids.argmax(1)]
        if self.normalised:
            context = self.norm(context) if self.skip else last
        return context, self.head(whole)

    def forward(self, ids: Tensor) -> Tensor:
        return self.both(ids)[0]

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        return {"context": self(self.ids(items, device))}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {"context": torch.zeros(n, self.length, self.width, device=device)}


class SDXLText(TextCondition):
    """The condition `sdxl-text`: texts -> {"context": (B, 77, 2048), "vector": (B, 2816)}.

    The context is CLIP-L's and OpenCLIP-bigG's side by side, the vector bigG's of the whole text and three pairs of
    numbers as sinusoids: the size of the picture that training saw, where it was cut, and the size wanted.
    """

    def __init__(
        self,
        clip: dict[str, Any],  # keywords of the first tower, see `clip-text`
        open_clip: dict[str, Any],  # keywords of the second, which has a head
        size: Side = 1024,  # of both sides, as it was and as wanted
        crop: tuple[Whole, Whole] = (0, 0),  # rows and columns that were cut off above and to the left
        sinusoids: Width = 256,  # for each of the six numbers
        tokenizer: str | None = None,  # of both towers
    ):
        super().__init__()
        self.clip = CLIPText(**{**clip, "tokenizer": tokenizer})
        self.open_clip = CLIPText(**{**open_clip, "tokenizer": tokenizer})
        self.sizes, self.sinusoids = (size, size, *crop, size, size), sinusoids
        self.width, self.length = self.clip.width + self.open_clip.width, self.clip.length

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        context, whole = self.open_clip.both(self.open_clip.ids(items, device))
        context = torch.cat([self.clip(self.clip.ids(items, device)), context], dim=-1)
        return {"context": context, "vector": self.vector(whole)}

    def vector(self, whole: Tensor) -> Tensor:
        """(B, head) of whole texts -> with the six numbers, (B, head + 6 * sinusoids)."""
        numbers = torch.tensor(self.sizes, dtype=torch.float32, device=whole.device)
        told = timestep_embedding(numbers, self.sinusoids).flatten()
        return torch.cat([whole, told.to(whole).expand(len(whole), -1)], dim=-1)

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        vector = torch.zeros(n, self.open_clip.whole + 6 * self.sinusoids, device=device)
        return {"context": torch.zeros(n, self.length, self.width, device=device), "vector": vector}
