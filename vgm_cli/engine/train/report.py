"""What a training run reports: sums between two rows of its log, the rows, the progress line, the last words."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgm_cli.data import SHIPPED
from vgm_cli.engine.facts import words_of
from vgm_cli.engine.train.captioned import reading
from vgm_cli.engine.train.card import write_card
from vgm_cli.engine.train.optim import learning_rate
from vgm_cli.errors import DIVERGED, VgmError
from vgm_cli.ui import Progress, counted, duration, ui

if TYPE_CHECKING:
    from vgm_cli.engine.train.setup import Outcome, Trainer


class Window:
    """Sums of logged values since the last row. They stay on the device, so that no step waits for them. finite:
    whether every loss was finite."""

    def __init__(self, accelerator: Any):
        self.acc = accelerator
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)

    def add(self, logs: Mapping[str, Tensor]) -> None:
        """One step's values."""
        for k, v in logs.items():
            self.sums[k] = self.sums[k] + v if k in self.sums else v
            self.counts[k] = self.counts.get(k, 0) + 1

    def totals(self) -> dict[str, float]:
        """The sums averaged over processes. A collective operation: every process has to call it."""
        keys = sorted(self.sums)
        if not keys:
            return {}
        values = torch.stack([self.sums[k].double() for k in keys])
        if self.acc.num_processes > 1:
            values = self.acc.reduce(values, "mean")
        return dict(zip(keys, values.tolist()))

    def means(self) -> dict[str, float]:
        return {k: float(f"{v / self.counts[k]:.6g}") for k, v in self.totals().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """state: {name: (sum, count)} of an interrupted interval."""
        for k, (value, count) in state.items():
            self.sums[k], self.counts[k] = torch.tensor(value, dtype=torch.float32, device=self.acc.device), count

    def clear(self) -> None:
        self.sums, self.counts = {}, {}

    def refuse_divergence(self, done: int, kept: str) -> None:
        """VgmError (exit code 5): some process saw a loss that was not finite."""
        flag = self.finite.float()
        if self.acc.num_processes > 1:
            flag = self.acc.reduce(flag, "mean")
        if flag.item() < 1:
            raise VgmError(
                f"training diverged: the loss was not finite by step {done}; {kept}",
                "lower optimizer.lr, set train.clip=1.0, or train.precision=fp32",
                DIVERGED,
            )


def collect(logs: dict[str, Tensor], loss: Tensor, values: Mapping[str, Any], name: str, part: int, parts: int) -> None:
    """Add the loss, by its name, and the values of micro-batch `part` to those of a step, which are means over all
    `parts` of them. What an earlier batch of the same step left is replaced."""
    for k, v in {name: loss, **values}.items():
        v = torch.as_tensor(v, device=loss.device).detach().float() / parts
        logs[k] = logs[k] + v if part and k in logs else v


class Report:
    """Progress of one call of the loop. rate: images per second since the last row."""

    def __init__(self, t: Trainer, until: int, progress: Progress):
        self.t, self.until, self.progress = t, until, progress
        self.began = time.perf_counter()
        self.rate = 0.0
        self.remarks: set[str] = set()
        self.mark()

    def mark(self) -> None:
        """Measure the rate from now on, so that a preview does not count as training time."""
        self.since, self.images = time.perf_counter(), self.t.images

    def seconds(self) -> float:
        """Of training, those before a resume included."""
        return self.t.seconds + time.perf_counter() - self.began

    def step(self, done: int) -> None:
        if self.progress.bar is not None:
            self.progress.update(done)

    def row(self, done: int, regular: bool) -> None:
        """One row for metrics.jsonl, the tracker and the terminal. regular: the interval is complete."""
        t, opts = self.t, self.t.opts
        self.rate = (t.images - self.images) / max(time.perf_counter() - self.since, 1e-9)
        self.mark()
        row: dict[str, Any] = {"step": done, "images": t.images, "images_per_second": round(self.rate, 2)}
        row |= t.window.means()
        for name, optimizer in t.optimizers.items():
            key = "lr" if len(t.optimizers) == 1 else f"{name}/lr"
            row[key] = learning_rate(optimizer.setting, done - 1, opts.steps)
        if t.acc.is_main_process and t.track != "none":
            t.run.log(row)
        ui.event("step", **row)
        t.tracker.log(row, done)
        if (remark := t.objective.remark(row)) is not None and remark not in self.remarks:
            self.remarks.add(remark)
            ui.warn(remark)
        if regular:
            t.window.clear()
        t.window.refuse_divergence(done, t.run.kept())
        losses = (f"{p.name}/loss" for p in t.phases)  # a phase may not have been due
        shown = next((k for k in ("reward", "loss", *losses) if k in row), "loss")
        note = f"{shown} {row.get(shown, math.nan):.4g}  {self.rate:.0f} img/s"
        left = (self.until - done) * opts.batch_size / max(self.rate, 1e-9)
        self.progress.update(done, note)
        self.progress.line(f"step {done}/{self.until}  {note}  ETA {duration(left)}")


def announce(t: Trainer, until: int) -> None:
    """The first lines of a run: its size, its data, its precision."""
    count = sum(p.numel() for p in t.networks["model"].parameters()) if "model" in t.networks else 0
    ui.event("start", run=str(t.run.path), parameters=count, steps=until, start=t.start)
    ui.info(
        f"{t.recipe.name}: {count:,} parameters, {counted(t.feed.count, 'image')} "
        f"{t.facts.image_size}×{t.facts.image_size}×{t.facts.image_channels}"
        + (f", {t.facts.num_classes} classes" if t.facts.num_classes else ", unlabelled")
        + f", {t.acc.mixed_precision.replace('no', 'fp32')}, {t.world} process{'es' * (t.world > 1)}"
    )
    if t.facts.captions and t.recipe.config.get("conditions") and t.feed.data.path not in SHIPPED:
        tell_of_captions(t)


def tell_of_captions(t: Trainer) -> None:
    """Say what becomes of the captions of somebody's own pictures: that the network reads none, or few of the words."""
    part = t.conditions.of_column("text")
    if part is None:
        name = reading(t.recipe.paper)
        how = "" if name is None else ": `vgm train {} --recipe {} data.path=…` does".format(*name.split("/"))
        return ui.info(f"the captions of the data are not read{how}")
    known, own = t.recipe.config["conditions"][part.name].get("words"), words_of(t.feed.dataset)
    if known and len(strange := [w for w in own if w not in known]) > len(own) / 2:
        ui.warn(
            f"{len(strange)} of the {len(own)} words of the captions are none of the {len(known)} that "
            f"conditions.{part.name} knows: conditions.{part.name}.words=null learns those of the captions"
        )


def finish(t: Trainer, outcome: Outcome, is_codec: bool, quiet: bool) -> None:
    """The card, the last lines, the tracker's end."""
    if t.acc.is_main_process:
        write_card(t.run, t.recipe, outcome, t.components)
        if not quiet:
            ui.event("result", **asdict(outcome))
            took = f"{counted(outcome.step, 'step')} in {duration(t.seconds)}"
            ui.info(f"done: {took}, {outcome.images_per_second:.0f} img/s")
            ui.data(str(t.run.path))
            run = shlex.quote(str(t.run.path))
            ui.info(f"next: vgm {'evaluate' if is_codec else 'sample'} {run}{'' if is_codec else asking(t)}")
    t.tracker.finish()


def asking(t: Trainer) -> str:
    """The options without which `vgm sample` of this run would not know what to draw."""
    words = ""
    for name, items in t.feed.items(t.conditions, 8).items():
        option = t.conditions.parts[name].option
        texts = [i for i in items[:] if isinstance(i, str) and i.strip()] if option == "--prompt" else []
        words += f" {option} " + (shlex.quote(min(texts, key=len)) if texts else "IMAGE")
    return words
