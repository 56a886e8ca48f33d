"""Texts -> T5 features, as STARFlow's text models read them: padded on the right, zero where padded.

Official code: apple/ml-starflow@e565a46 utils/common.py (encode_text, preprocess_text). Weights are a folder that the
user has (google/flan-t5-xl in transformers' layout); transformers is an extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.errors import MISSING_ASSET, VgmError
from vgm_cli.nets.t5 import T5Features
from vgm_cli.ranges import NonNegative, Width


def decorated(text: str, noise_std: float | None = None, aspect: str | None = None) -> str:
    """A prompt with what else the network may be told in words: the noise level in thousandths, the sides' ratio."""
    if noise_std is not None:
        text = f"Noise Level {int(noise_std * 1000)}:\n{text}"
    if aspect is not None:
        text = f"{text}\n in a {aspect} aspect ratio.\n"
    return text


class T5Text(nn.Module):
    """The condition `starflow-t5`: texts -> {"context": (B, tokens, width)}. No text is the empty text."""

    column = "text"
    choices: Sequence[Any] = ()

    def __init__(
        self,
        path: str | None = None,  # google/flan-t5-xl in transformers' layout
        tokens: Width = 128,
        width: Width = 2048,  # of the features
        noise_std: NonNegative | None = None,  # told in words; None: not told
        aspect: str | None = None,  # width:height, told in words; None: not told
    ):
        super().__init__()
        self.path, self.tokens, self.width = path, tokens, width
        self.noise_std, self.aspect = noise_std, aspect
        self.encoder: T5Features | None = None  # not a submodule: its weights are not ours to save or train
        self.empty: Tensor | None = None  # features of no text

    def parse(self, words: Sequence[str]) -> list[Any]:
        return list(words)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        if self.encoder is None:
            if self.path is None:
                hint = "conditions.text.path=FOLDER of flan-t5-xl"
                raise VgmError("captions need a text encoder", hint, MISSING_ASSET)
            self.encoder = T5Features(self.path, self.tokens, device)
        features, mask = self.encoder([decorated(str(text), self.noise_std, self.aspect) for text in items])
        return {"context": (features * mask[..., None].to(features)).to(device)}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        if self.empty is None:
            self.empty = self.encode([""], device)["context"]
        return {"context": self.empty.to(device).expand(n, -1, -1)}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {"context": torch.zeros(n, self.tokens, self.width, device=device)}
