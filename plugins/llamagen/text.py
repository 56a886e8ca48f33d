"""Captions -> FLAN-T5 features, as LlamaGen's text-to-image models take them: cleaned, 120 tokens, padded on the LEFT.

Official code: FoundationVision/LlamaGen@ce98ec4 language/t5.py, dataset/t2i.py, autoregressive/sample/sample_t2i.py.
Weights are a folder that the user has (google/flan-t5-xl in transformers' layout); transformers is an extra.
Deviation: `clean` uses the standard library only, so odd encodings are not repaired (officially ftfy does).
"""

from __future__ import annotations

import html
import re
import urllib.parse
from functools import lru_cache

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
    """captions -> (features (B, tokens, C), mask (B, tokens)), padded on the left. path: folder of the encoder,
    loaded at the first call; without one, only trainings without captions work."""

    def __init__(self, path: str | None = None, tokens: Width = 120):
        super().__init__()
        self.path, self.tokens = path, tokens
        self.encoder: T5Features | None = None  # not a submodule: its weights are not ours to save or train

    def forward(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        if self.encoder is None:
            if self.path is None:
                hint = "a folder of google/flan-t5-xl: roles.text.path=DIR in training, text_encoder=DIR in sampling"
                raise VgmError("captions need a text encoder", hint, MISSING_ASSET)
            self.encoder = T5Features(self.path, self.tokens, device)
        return left_pad(*self.encoder([clean(clean(c)) for c in captions]))


@lru_cache(maxsize=1)
def encoder_at(path: str | None, tokens: int) -> FlanT5:
    return FlanT5(path, tokens)


def prompt_features(
    prompt: str | list[str] | None, path: str | None, n: int, tokens: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Features (n, tokens, C) and mask (n, tokens) of the prompts, taken in turn."""
    if prompt is None:
        raise VgmError("this model draws what a text says", "vgm sample RUN prompt='a red car' text_encoder=DIR")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    features, mask = encoder_at(path, tokens)(prompts, device or torch.device("cpu"))
    rows = torch.arange(n) % len(prompts)
    return features[rows], mask[rows]
