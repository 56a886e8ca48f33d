"""The stage before training on latents: a codec is trained first, where no trained one fits the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.run import Run
from vgm_cli.engine.train.saving import read_state
from vgm_cli.recipe import Recipe


def train_codec(train: Callable[..., Any], own: Recipe, out: Path, device: str) -> Path:
    """Train a fallback codec by its own recipe into `out`, a run like any other; returns its weights file. A finished
    one is reused, an unfinished one goes on. train: loop.train, which is running already."""
    last = Run(out).last()
    if last is None or read_state(last, [])["step"] < own.node("train").steps:
        train(own, out, resume=out.exists(), quiet_end=True, device=device)
    return ckpt.resolve(out)
