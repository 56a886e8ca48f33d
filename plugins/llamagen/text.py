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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.errors import MISSING_ASSET, VgmError

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
    """captions -> (features (B, tokens, C), mask (B, tokens)). path: folder of the encoder; loaded at the first call.

    Without a path only the empty batch of plans works: VgmError (exit code 4) says what is missing.
    """

    def __init__(self, path: str | None = None, tokens: int = 120, dim: int = 2048, dtype: str = "bfloat16"):
        super().__init__()
        self.path, self.tokens, self.dim, self.dtype = path, tokens, dim, dtype
        self._parts: tuple[Any, Any] | None = None  # not a submodule: its weights are not ours to save or train

    @torch.no_grad()
    def forward(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        tokenizer, encoder = self.load(device)
        text = tokenizer(
            [clean(clean(c)) for c in captions],
            max_length=self.tokens,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(device)
        features = encoder(input_ids=text["input_ids"], attention_mask=text["attention_mask"])["last_hidden_state"]
        return left_pad(features.float(), text["attention_mask"])

    def load(self, device: torch.device) -> tuple[Any, Any]:
        if self._parts is None:
            if self.path is None or not Path(self.path).is_dir():
                raise VgmError(
                    f"no text encoder at {self.path}" if self.path else "captions need a text encoder",
                    "a folder of google/flan-t5-xl: roles.text.path=DIR in training, text_encoder=DIR in sampling",
                    MISSING_ASSET,
                )
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError as e:
                raise VgmError("captions need the package transformers", "pip install 'vgm[hf]'", MISSING_ASSET) from e
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            encoder = T5EncoderModel.from_pretrained(self.path, local_files_only=True)
            self._parts = tokenizer, encoder.to(getattr(torch, self.dtype)).to(device).eval().requires_grad_(False)
        return self._parts


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
