"""Captions -> FLAN-T5 features, as LlamaGen's text-to-image models take them: cleaned, 120 tokens, padded on the LEFT.

Official code: FoundationVision/LlamaGen@ce98ec4 language/t5.py, dataset/t2i.py, autoregressive/sample/sample_t2i.py.
Weights are a folder that the user has (google/flan-t5-xl in transformers' layout); transformers is an extra.
Deviation: `clean` uses the standard library only, so odd encodings are not repaired (officially ftfy does).
"""

from __future__ import annotations

import html
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.errors import MISSING_ASSET, VgmError
from vgm_cli.nets.t5 import T5Features
from vgm_cli.ranges import Width

RULES = (  # applied in order, everything lower case
    (r"<person>", "person"),
    (r"(?:https?://|www\.)\S+", ""),  # addresses
    (r"<[^>]+>", " "),  # markup
    (r"@[\w\d]+\b", ""),  # handles
    (r"[㇀-㇯ㇰ-ㇿ㈀-㋿㌀-㏿㐀-䶿䷀-䷿一-鿿]+", ""),
    (r"[‐-―−—–﹣－]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
    (r"\\n|\s+", " "),
)


def clean(caption: str) -> str:
    """A caption without markup, addresses and handles, lower case."""
    text = html.unescape(html.unescape(urllib.parse.unquote_plus(str(caption)))).strip().lower()
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def left_pad(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded features (B, T, C) with mask (B, T) -> left-padded ones, padding zeroed, and their mask."""
    rows = []
    for row, own in zip(features, mask):
        n = int(own.sum())
        rows.append(torch.cat([row[n:], row[:n]]))
    flipped = mask.flip(-1)
    return torch.stack(rows) * flipped[..., None].to(features), flipped


class FlanT5(nn.Module):
    """The condition `flan-t5`: captions -> {"text": (B, tokens, width), "pad": (B, tokens)}, padded on the left.

    path: folder of the encoder, loaded when the first caption comes. No caption is the network's own null caption.
    """

    column = "text"
    choices: Sequence[Any] = ()

    def __init__(
        self,
        path: str | None = None,  # google/flan-t5-xl in transformers' layout
        tokens: Width = 120,
        width: Width = 2048,  # of the features
    ):
        super().__init__()
        self.path, self.tokens, self.width = path, tokens, width
        self.encoder: T5Features | None = None  # not a submodule: its weights are not ours to save or train

    def parse(self, words: Sequence[str]) -> list[Any]:
        return list(words)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        if self.encoder is None:
            if self.path is None:
                raise VgmError(
                    "captions need a text encoder", "conditions.text.path=FOLDER of flan-t5-xl", MISSING_ASSET
                )
            self.encoder = T5Features(self.path, self.tokens, device)
        features, pad = left_pad(*self.encoder([clean(clean(c)) for c in items]))
        return {"text": features.to(device), "pad": pad.to(device)}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        pad = torch.ones(n, self.tokens, dtype=torch.long, device=device)
        return {"text": torch.zeros(n, self.tokens, self.width, device=device), "pad": pad}
