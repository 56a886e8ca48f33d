"""THE training loop. Every paper runs through it; what differs is the objective.

Randomness is a function of (seed, step, draw) and data order of (seed, index), so k + k steps with a resume in between
are bit-identical to 2k steps on a CPU, and the number of processes does not change what an item sees. What the loop
works with is made in `setup`, written and read in `saving`, told in `report`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import validation
from vgm_cli.api import Batch, seed_of
from vgm_cli.engine import build
from vgm_cli.engine.processes import keep_memory
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.train import data_feed, report, saving
from vgm_cli.engine.train.preview import preview
from vgm_cli.engine.train.setup import Outcome, Trainer, make_accelerator, open_run
from vgm_cli.engine.train.signals import Guard
from vgm_cli.errors import FAILED, INTERRUPTED, VgmError
from vgm_cli.recipe import Recipe
from vgm_cli.ui import Progress

GO_ON = "--resume goes on"


def update(t: Trainer, index: int, batches: Iterator[Batch]) -> None:
    """One step: gradients of `accumulate` micro-batches, {"x": (B, ...), ...} as Feed.to_model gives them, then one
    optimizer step for every phase that is due; again for every further batch that `experience` made of them."""
    torch.manual_seed(seed_of(t.opts.seed, index, t.rank))  # nn.Dropout and the like
    steps = [t.step(index, micro) for micro in range(t.opts.accumulate)]
    micros = [t.to_model(next(batches), step) for step in steps]
    t.begin_step(steps[-1])  # learning rates, weight decays
    logs: dict[str, Tensor] = {}

    with t.acc.autocast():  # lists are made here, in the precision that the loss will see
        played = [t.objective.experience(batch, step) for batch, step in zip(micros, steps)]
    for parts in zip(*played):
        for phase in (p for p in t.phases if index % p.every == 0):
            t.freeze_all_but(phase)
            optimizer = t.optimizers[phase.optimizer]
            for step, part in zip(steps, parts):
                with t.synchronised(optimizer.root, last=step is steps[-1]):
                    loss, own = optimizer.root(phase.name, part, step)
                    t.acc.backward(loss * (phase.gain / len(steps)))
                t.window.finite &= torch.isfinite(loss.detach())
                report.collect(logs, loss, own, t.loss_name(phase), step.micro, len(steps))
            clip = t.opts.clip if phase.clip is None else phase.clip
            logs |= optimizer.step(t.acc, index, clip, t.skip)

    t.objective.after_step(steps[-1])
    for average in t.averages:
        average.update()
    t.window.add(logs)


def run(t: Trainer, until: int, guard: Guard, quiet_end: bool = False) -> Outcome:
    """Train from step t.start to `until`, with logging, saving and previews. quiet_end: the caller says the last
    words."""
    opts = t.opts
    batches = t.feed.batches(t.start * opts.accumulate)
    report.announce(t, until)
    if t.start == 0 and t.acc.is_main_process:
        generate.reals(t.feed, t.run.path / "samples" / "reals.png", opts.preview_n)
    done, stop = t.start, False
    with Progress(t.recipe.name, until, t.start) as progress:
        reporter = report.Report(t, until, progress)
        for index in range(t.start, until):
            update(t, index, batches)
            done = index + 1
            t.images += opts.batch_size
            stop = guard.came(t.acc)  # asked once: a signal after this is for the next step
            last = stop or done == until
            regular = due(done, opts.log_every)
            if regular or last:
                reporter.row(done, regular)
            else:
                reporter.step(done)
            if last or due(done, opts.save_every):
                t.window.refuse_divergence(done, t.run.kept())
                saving.save(t, done, reporter.seconds())
            if opts.preview_n and opts.preview_every and (done == until or due(done, opts.preview_every)):
                preview(t, done, progress)
                reporter.mark()
            if stop:
                break
    took, t.seconds = reporter.seconds() - t.seconds, reporter.seconds()
    if stop:
        t.acc.wait_for_everyone()  # a process that leaves takes the others along, and the first one still saves
        code = 128 + (guard.signal or signal.SIGINT)
        raise VgmError(f"stopped after step {done}; everything is saved in {t.run.path}", GO_ON, code)
    rate = (done - t.start) * opts.batch_size / max(took, 1e-9)
    outcome = Outcome(t.run.path, done, t.images, t.seconds, rate)
    report.finish(t, outcome, saving.header(t).is_codec, quiet_end)
    return outcome


def due(done: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after step `done`; 0 and None mean never."""
    return bool(every) and done % (every or 1) == 0


def train(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    track: str = "jsonl",
    roles: Mapping[str, Any] | None = None,
    open_feed: Callable[..., Any] | None = None,
    quiet_end: bool = False,
    device: str | None = None,
) -> Outcome:
    """Run a recipe to its last step (or `stop_after`) and leave a run directory behind.

    roles: what the objective is given besides the recipe's networks. open_feed: makes the batches, where they do not
    come from the recipe's data (see data_feed.open_feed). device: see processes.pick_device.

    Raises VgmError with code 5 when the loss is not finite (the last good checkpoint stays), 128 + signal after saving
    on SIGHUP, SIGINT or SIGTERM, 2 for configuration mistakes.
    """
    build.settle(recipe)
    accelerator = make_accelerator(recipe, track, device)
    if accelerator.device.type == "cpu":
        keep_memory()
    dataset = validation.before_start(recipe, accelerator.num_processes, reads_data=open_feed is None)
    feed = open_feed or partial(data_feed.open_feed, dataset=dataset, train=train)
    with open_run(recipe, out, resume, overwrite, accelerator) as directory, Guard() as guard:
        t = Trainer(recipe, directory, accelerator, roles or {}, track, feed)
        if resume:
            saving.restore(t)
        t.begin()
        try:
            return run(t, min(t.opts.steps, stop_after or t.opts.steps), guard, quiet_end)
        except KeyboardInterrupt:
            raise VgmError(f"stopped at once; {directory.kept()}", GO_ON, INTERRUPTED) from None
        except VgmError as e:
            if e.code != FAILED:
                raise
            raise VgmError(f"{e.message}; {directory.kept()}", "; ".join(filter(None, (e.hint, GO_ON))), FAILED) from e
