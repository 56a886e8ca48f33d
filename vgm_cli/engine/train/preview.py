"""Previews: a picture of what the network makes, every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn

from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.train.ema import swap_in
from vgm_cli.engine.train.saving import header
from vgm_cli.ui import Progress

if TYPE_CHECKING:
    from vgm_cli.engine.train.setup import Trainer


def preview(t: Trainer, done: int, progress: Progress) -> None:
    """A grid from the first average with the run's fixed noise and labels, comparable between steps; of a codec,
    reconstructions. Nothing where one process alone cannot sample: from a sharded network."""
    own = header(t)
    if not t.acc.is_main_process or t.sharded or not (t.recipe.config.get("sampler") or own.is_codec):
        return
    file = t.run.path / "samples" / f"step-{done:06d}.png"
    progress.note(f"preview of {t.opts.preview_n} images")
    model = t.networks["model"]
    rng = torch.random.get_rng_state()
    with ExitStack() as stack:
        if t.averages:
            before = swap_in(model, t.averages[0].state_dict())
            stack.callback(model.load_state_dict, before)
        modes = [(module, module.training) for module in model.modules()]  # a part of it may be frozen
        model.eval()
        stack.callback(restore_modes, modes)
        loaded = ckpt.Loaded(
            model, ckpt.build_view(model, own.view), t.feed.codec, own, t.run.path, t.sampled_with, t.conditions
        )
        with t.acc.autocast():
            generate.preview(loaded, t.recipe, file, t.opts.preview_n, t.device, t.feed)
    progress.update(done, "")
    torch.random.set_rng_state(rng)
    if file.is_file():
        t.tracker.picture(file, done)


def restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
