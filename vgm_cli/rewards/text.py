"""Text rendering: how much of the text that a prompt asks for is read back from the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import uint8_round
from vgm_cli.registry import load_code


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def text_score(wanted: str, read: Sequence[str]) -> float:
    """1 - min(distance, len) / len without spaces and case; 1 where the wanted text occurs in what was read.

    As yifan123/flow_grpo ocr.py. VgmError: nothing is wanted.
    """
    wanted, found = (s.replace(" ", "").lower() for s in (wanted, "".join(read)))
    if not wanted:
        raise VgmError("the prompt asks for no text", 'put it in double quotes: a sign that says "open"', USAGE)
    distance = 0 if wanted in found else edit_distance(found, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


def quoted(prompt: str) -> str:
    """The text between the first two double quotes. VgmError: there is none."""
    parts = prompt.split('"')
    if len(parts) < 3:
        raise VgmError(f"no text in double quotes in the prompt: {prompt}", 'e.g. a sign that says "open"', USAGE)
    return parts[1]


class OCR:
    """text_score of each prompt's quoted text. reader: "module:function" that gives, for one uint8 image (H, W, C), the
    pieces of text it finds, as any OCR library does in a line or two."""

    def __init__(self, reader: str):
        self.reader = load_code(reader, "ocr reader")

    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        prompts = batch.get("text")
        if prompts is None:
            raise VgmError("the ocr reward needs prompts, this model has none", "a model conditioned on text", USAGE)
        arrays = uint8_round(images.detach().float().cpu()).permute(0, 2, 3, 1).numpy()
        scores = [text_score(quoted(p), self.reader(a)) for p, a in zip(prompts, arrays, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
