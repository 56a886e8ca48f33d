"""T5's encoder from a folder that the user has. Raffel et al. 2020 (arXiv 1910.10683); transformers is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import MISSING_ASSET, VgmError, needs_extra


class T5Features:
    """texts -> (features (B, length, C) float32, mask (B, length)), padded on the right to `length`.

    path: a folder in transformers' layout (google/flan-t5-xl, ...); nothing is downloaded. Raises VgmError (code 4)
    when the folder or the package is not there.
    """

    def __init__(self, path: str, length: int, device: torch.device, dtype: torch.dtype = torch.bfloat16):
        if not Path(path).is_dir():
            raise VgmError(
                f"no text encoder at {path}", "a folder of T5 weights in transformers' layout", MISSING_ASSET
            )
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as e:
            raise needs_extra("a text encoder", "transformers", "hf") from e
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        encoder: Any = T5EncoderModel.from_pretrained(path, local_files_only=True)
        self.encoder = encoder.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.length, self.device = length, device

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(
            texts, max_length=self.length, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.device)
        found = self.encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
        return found["last_hidden_state"].float(), ids["attention_mask"]
