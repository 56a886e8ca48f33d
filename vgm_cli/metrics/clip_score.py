"""CLIP score: how well samples agree with the texts that they were asked for.

Hessel et al. 2021 (arXiv 2104.08718), without that paper's factor of 2.5: the mean cosine, as papers on text-to-image
state it (0.2 for texts of other pictures, 0.3 and above for their own, by OpenAI's towers).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.conditioning import lines_of
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.metrics.base import Measured, MetricBase, Value
from vgm_cli.metrics.features import VARIABLES
from vgm_cli.nets.clip_text import CLIPText
from vgm_cli.nets.clip_text_checkpoints import CLIP_TEXT, OPEN_CLIP_TEXT
from vgm_cli.weights.state import read_state

AT_ONCE = 64  # texts that are read together
WHERE = "clip-score:text=FILE, or VGM_CLIP: model.safetensors of openai/clip-vit-large-patch14 holds both towers"


class CLIPScore(MetricBase):
    """Mean cosine of every sample's CLIP embedding with that of its text. The image tower is that of --features or
    VGM_CLIP. Both towers have OpenAI's activation. VgmError: no weights or tokenizer, no texts, or the two towers are
    of different networks."""

    network = "clip"
    needs_samples = frozenset({"pool", "texts"})

    def __init__(
        self,
        text: str | None = None,  # weights with CLIP's text tower; None: the file that VGM_CLIP names
        tokenizer: str | None = None,  # bpe_simple_vocab_16e6.txt.gz, or a tokenizer's folder; None: VGM_CLIP_TOKENIZER
        captions: str | None = None,  # file of texts, one a line, taken in turn; None: the samples' own
    ):
        if not (file := text or os.environ.get(VARIABLES["clip"])):
            raise VgmError("clip-score needs weights", WHERE, MISSING_ASSET)
        self.tower = text_tower(str(Path(file).expanduser()), tokenizer or os.environ.get("VGM_CLIP_TOKENIZER"))
        self.captions = None if captions is None else lines_of(Path(captions), "clip-score:captions")
        if self.captions is not None:
            self.needs_samples = frozenset({"pool"})

    def __call__(self, samples: Measured, reference: Measured, seed: int) -> list[Value]:
        assert samples.pool is not None and samples.items is not None
        texts = samples.texts
        if self.captions is not None:
            texts = [self.captions[place % len(self.captions)] for place in samples.items.places]
        assert texts is not None
        told = self.embedded(texts)
        if told.shape[1] != samples.pool.shape[1]:
            widths = f"{told.shape[1]} and {samples.pool.shape[1]} numbers"
            raise VgmError(f"the towers of texts and of images are of two networks: {widths}", WHERE, USAGE)
        found = (F.normalize(samples.pool, dim=1).cpu() * told).sum(1).double()
        n = len(found)
        spread = float(found.std()) / n**0.5 if n > 1 else None
        return [Value("clip-score", float(found.mean()), spread, {"score": "cosine"}, {"texts": len(set(texts))}, n)]

    @torch.no_grad()
    def embedded(self, texts: list[str]) -> Tensor:
        """Unit-length embeddings (N, D)."""
        there = torch.device("cpu")
        parts = (texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE))
        return F.normalize(torch.cat([self.tower.both(self.tower.ids(part, there))[1] for part in parts]), dim=1)


@cache
def text_tower(file: str, tokenizer: str | None) -> CLIPText:
    """CLIP's text tower of a file in transformers' or OpenAI's names. VgmError (code 4): it holds none."""
    if not Path(file).is_file():
        raise VgmError(f"no CLIP weights at {file}", WHERE, MISSING_ASSET)
    state = read_state(file, WHERE)
    layout = next((known for known in (CLIP_TEXT, OPEN_CLIP_TEXT) if known.recognise(state)), None)
    if layout is None:
        raise VgmError(f"{file} has no text tower", WHERE, MISSING_ASSET)
    try:
        ours = layout.to_ours(state)
        config = {**layout.config(state), "activation": "quick-gelu", "skip": 0, "norm": True}
    except KeyError as e:
        raise VgmError(f"{file}: the text tower has no {e}", WHERE, MISSING_ASSET) from e
    tower = CLIPText(**config, tokenizer=tokenizer).eval().requires_grad_(False)
    tower.load_state_dict({k: v.float() for k, v in ours.items()})
    tower.ids([""], torch.device("cpu"))  # a tokenizer that is missing is told before samples are made
    return tower
