"""THE training loop. Every paper runs through it; what differs is the objective.

    for batch in data:
        for part in objective.experience(batch, step):
            for phase in objective.phases():          # one accelerate-prepared root per OPTIMIZER
                loss = root[phase.optimizer](phase.name, part, step)
                backward; clip; optimizer.step()
        objective.after_step(step); ema.update()

Randomness is a function of (seed, step, draw) and data order of (seed, index), so k + k steps with a resume in between
are bit-identical to 2k steps on a CPU, and the number of processes does not change what an item sees.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli import atomic, limits, validation
from vgm_cli.api import Batch, Phase, Step, seed_of
from vgm_cli.data.fingerprint import older
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.distributed import keep_memory, pick_device
from vgm_cli.engine.run import Run, bf16_supported, read_record
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.train import data_feed, sharding, tracking
from vgm_cli.engine.train.ema import EMA
from vgm_cli.errors import DIVERGED, FAILED, INTERRUPTED, USAGE, VgmError
from vgm_cli.recipe import TORCH_OPTIMIZERS, Optimizer, Recipe, parse_yaml, rename
from vgm_cli.registry import registry
from vgm_cli.ui import Progress, duration, flat, ui

GO_ON = "--resume goes on"
OLDER = "remove the checkpoint to resume from the one before"
NEW_RUN = "put back what was there; a new run may begin from the old weights: model.weights=RUN"
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "exp_inf")
MAY_CHANGE = ("steps", "log_every", "save_every", "keep", "preview_every", "preview_n", "compile")  # on resume


class Root(nn.Module):
    """What one optimizer trains, wrapped once by DDP/FSDP; its forward is a phase's loss, so that whatever happens
    inside (two discriminator calls, double backward, JVPs) stays inside one wrapped forward."""

    def __init__(self, objective: Any, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self._objective = [objective]  # in a list: the objective's other networks are not this root's children

    def forward(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return self._objective[0].loss(phase, batch, step)


@dataclass
class Outcome:
    """What a training run came to."""

    path: Path
    step: int
    images: int
    seconds: float
    images_per_second: float
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    track: str = "jsonl",
    roles: Mapping[str, Any] | None = None,
    open_feed: Callable[..., Any] = data_feed.open_feed,
    quiet_end: bool = False,
    device: str | None = None,
) -> Outcome:
    """Run a recipe to its last step (or `stop_after`) and leave a run directory behind.

    roles: what the objective is given besides the recipe's networks. open_feed: makes the batches, from the recipe's
    data unless the caller knows better (see data_feed.open_feed). device: see distributed.pick_device.

    Raises VgmError with code 5 when the loss is not finite (the last good checkpoint stays), 128 + signal after saving
    on SIGHUP, SIGINT or SIGTERM, 2 for configuration mistakes.
    """
    build.settle(recipe)
    accelerator = make_accelerator(recipe, track, device)
    if accelerator.device.type == "cpu":
        keep_memory()
    opts = recipe.node("train")
    if open_feed is data_feed.open_feed:
        dataset = validation.before_start(recipe, accelerator.num_processes)
        open_feed = partial(open_feed, dataset=dataset)
    else:
        validation.before_start(recipe, accelerator.num_processes, reads_data=False)
    with open_run(recipe, out, resume, overwrite, accelerator) as run, Guard() as guard:
        trainer = Trainer(recipe, run, accelerator, roles or {}, track, open_feed)
        if resume:
            trainer.restore()
        trainer.begin()
        try:
            return trainer.loop(min(opts.steps, stop_after or opts.steps), guard, quiet_end)
        except KeyboardInterrupt:
            raise VgmError(f"stopped at once; {run.kept()}", GO_ON, INTERRUPTED) from None
        except VgmError as e:
            if e.code != FAILED:
                raise
            raise VgmError(f"{e.message}; {run.kept()}", GO_ON, FAILED) from e


def make_accelerator(recipe: Recipe, track: str = "jsonl", device: str | None = None) -> Any:
    """accelerate's Accelerator for the recipe's precision; CPU processes talk through gloo."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    opts = recipe.node("train")
    chosen = pick_device(device)
    precision = opts.precision
    if precision == "auto":
        precision = "bf16" if bf16_supported(chosen) else "fp32"
    if precision == "fp16" and chosen.type != "cuda":
        raise VgmError("fp16 training needs a GPU", "train.precision=bf16 or fp32", USAGE)
    mixed = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # a codec trained first may use another precision
    tracking.check(track)
    if chosen.type == "mps" or chosen.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(chosen)
    if chosen.type == "cuda":
        if chosen.index is not None:
            torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return Accelerator(
        mixed_precision=mixed,
        cpu=chosen.type == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def open_run(recipe: Recipe, out: Path | None, resume: bool, overwrite: bool, accelerator: Any) -> Run:
    """Only the first process creates and locks; the others take the same path."""
    if resume and out is None:
        raise VgmError("--resume needs the run's directory", "vgm train … --out RUN --resume", USAGE)
    paths: list[Any] = [None]
    problem: list[Any] = [None]
    run = None
    if accelerator.is_main_process:
        try:
            run = Run.create(out, recipe.name, resume, overwrite)
            if resume:
                compare(recipe, run)
                run.repair()
            paths[0] = str(run.path)
        except VgmError as e:
            problem[0] = (e.message, e.hint, e.code)
            if run is not None:
                run.release()
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(paths)
        torch.distributed.broadcast_object_list(problem)
    if problem[0]:
        raise VgmError(*problem[0])
    return run or Run(Path(paths[0]))


def compare(recipe: Recipe, run: Run) -> None:
    """A resumed run must be the same run: only lengths and intervals may change."""
    file = run.path / "config.yaml"
    if not file.exists():
        return
    try:
        then = parse_yaml(limits.read_text(file), str(file))
    except (OSError, UnicodeDecodeError, VgmError) as e:
        raise VgmError(f"{file} is damaged: {e}", "resume needs the recipe that the run began with", FAILED) from e
    if not isinstance(then, dict):
        raise VgmError(f"{file} is damaged: it is no recipe", code=FAILED)
    rename(then, {})
    free = {f"train.{k}" for k in MAY_CHANGE} | {f"roles.{role}.run" for role in recipe.roles()}  # by its hash
    before, now = flat(then), flat(parse_yaml(recipe.dump(), "the recipe"))
    order = ("paper", "model", "roles", "codec", "objective", "data")  # what says most comes first
    changed = sorted(
        (k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in free),
        key=lambda k: (order.index(head) if (head := k.split(".")[0]) in order else len(order), k != f"{head}.name", k),
    )
    if changed:
        k = changed[0]
        role = next((r for r in recipe.roles() if f"roles.{r}.sha256" in changed), None)
        if role is not None:
            message = f"{run.path} was trained with another {role}"
            raise VgmError(message, "resume with the same one, or start a new run with --out", USAGE)
        raise VgmError(
            f"{run.path} was trained with {k}={before.get(k, 'absent')}, now {k}={now.get(k, 'absent')}",
            "resume with the same recipe and overrides, or start a new run with --out",
            USAGE,
        )


class Guard:
    """First SIGINT, SIGTERM or SIGHUP (unless nohup has it ignored): finish the step, save, leave. Second: at once.
    Meanwhile nothing depends on who reads the output."""

    def __enter__(self) -> Guard:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}
        self.lasting, ui.lasting = ui.lasting, True
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
                if s is not None and (s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN):
                    self.before[s] = signal.signal(s, self._note)
        return self

    def _note(self, number: int, _frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        ui.info("stopping after this step (once more to stop at once)")

    def __exit__(self, *exc: object) -> None:
        ui.lasting = self.lasting
        for s, handler in self.before.items():
            signal.signal(s, handler)


class Trainer:
    """State of one run between steps."""

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        accelerator: Any,
        roles: Mapping[str, Any],
        track: str = "jsonl",
        open_feed: Callable[..., Any] = data_feed.open_feed,
    ):
        self.recipe, self.run, self.acc, self.track = recipe, run, accelerator, track
        self.opts = recipe.node("train")
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        per_step = self.world * self.opts.accumulate
        self.micro_size = self.opts.batch_size // per_step
        self.start, self.images, self.seconds = 0, 0, 0.0
        self.window: dict[str, Tensor] = {}  # sums of what is logged, since the last row
        self.counts: dict[str, int] = {}

        torch.manual_seed(self.opts.seed)
        self.feed = open_feed(recipe, run, accelerator, self.micro_size)
        self.facts = self.feed.facts
        torch.manual_seed(self.opts.seed)  # opening the data may have trained a codec
        built = build.build_objective(recipe, self.facts, {"codec": self.feed.codec, **roles})
        built.check_parts()
        self.objective, self.networks, self.components = built.objective, built.networks, built.components
        self.parts, self.sampled_with = built.parts, built.sampled_with
        ckpt.check_view(self.objective.view() if hasattr(self.objective, "view") else None)
        self.phases: list[Phase] = list(self.objective.phases())
        self._prepare()

    def begin(self) -> None:
        """Everything is checked: from here on the run directory is this run's."""
        name = self.track if self.acc.is_main_process else "none"
        if self.acc.is_main_process:
            self.run.start(self.recipe.dump(), self.recipe.origins, self.data_facts())
        self.tracker = tracking.Tracker(name, self.run.path, flat(self.recipe.config), self.start)

    def data_facts(self) -> dict[str, Any]:
        return {**self.feed.describe(), **asdict(self.facts)}

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Device, memory format, compilation, one wrapped root and optimizer per optimizer name, the averages."""
        for network in self.networks.values():
            network.to(self.device)
            if channels_last(network, self.opts.channels_last):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        if hasattr(self.objective, "to"):
            self.objective.to(self.device)
        if hasattr(self.objective, "prepare"):
            first = self.feed.first(self.micro_size, getattr(self.objective, "prepare_size", None))
            self.objective.prepare(self._to_model(first, self._step(0)), self._step(0))
        trained = sorted({r for p in self.phases for r in p.trains})
        self.trained = trained
        for name, network in self.networks.items():
            network.train(name in trained)
        if self.opts.checkpointing:
            for r in trained:
                if not hasattr(self.networks[r], "checkpointing"):
                    raise VgmError(f"{self.components[r]['name']} has no activation checkpointing", code=USAGE)
                setattr(self.networks[r], "checkpointing", True)  # noqa: B010  # a plain attribute, not a submodule
        if should_compile(self.opts, self.device, [self.networks[r] for r in trained]):
            self._compile(trained)
        self.roots: dict[str, Any] = {}
        members: dict[str, list[str]] = {}
        for name in dict.fromkeys(p.optimizer for p in self.phases):
            members[name] = sorted({r for p in self.phases if p.optimizer == name for r in p.trains})
            self.roots[name] = Root(self.objective, {r: self.networks[r] for r in members[name]})
        if self.opts.fsdp:
            sharding.check(self.objective, self.phases)
        self.sharded = bool(self.opts.fsdp and torch.distributed.is_initialized())  # else there is nobody to share with
        if self.sharded:
            for root in self.roots.values():
                sharding.shard(root, self.device)
        self.trainable = {r: [p for p in self.networks[r].parameters() if p.requires_grad] for r in trained}
        wanted = self.opts.ema if "model" in trained else []
        self.averages = [EMA(self.networks["model"], c, self.opts.batch_size) for c in wanted]

        self.optimizers: dict[str, Any] = {}
        self.settings: dict[str, Optimizer] = {}
        for name, root in self.roots.items():
            self.settings[name] = self.recipe.optimizer(name)
            params: list[Any] = [q for r in members[name] for q in self.trainable[r]]
            if self.settings[name].decay != "all":
                params = decay_groups(params, [self.networks[r] for r in members[name]], self.settings[name].decay)
            optimizer = make_optimizer(params, self.settings[name], self.device)
            if self.world > 1:
                partial = any(set(p.trains) != set(members[name]) for p in self.phases if p.optimizer == name)
                self.acc.ddp_handler.find_unused_parameters = partial or getattr(self.objective, "sparse_grads", False)
            # torch keeps the step counters of some optimizers on the CPU, where they are read: they stay there
            self.optimizers[name] = self.acc.prepare_optimizer(optimizer, device_placement=False)
            if not self.sharded:
                self.roots[name] = self.acc.prepare_model(root)

    def _compile(self, trained: Sequence[str]) -> None:
        """torch.compile of the trained networks, but for those that the objective cannot have compiled."""
        left = [r for r in trained if r in getattr(self.objective, "uncompiled", ())]
        if left and self.opts.compile != "auto":
            kind = type(self.objective).__name__
            ui.warn(f"not compiled: {', '.join(left)}; {kind} takes gradients through them more than once a step")
        for r in trained:
            if r not in left:
                self.networks[r].compile()

    def _step(self, index: int, micro: int = 0) -> Step:
        return Step(
            index=index,
            seed=self.opts.seed,
            rank=self.rank,
            world=self.world,
            micro=micro,
            micros=self.opts.accumulate,
            total=self.opts.steps,
            device=self.device,
        )

    def _to_model(self, batch: Batch, step: Step) -> Batch:
        """Device, then latents drawn from the posterior of a frozen codec."""
        return self.feed.to_model(batch, step)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def loop(self, until: int, guard: Guard, quiet_end: bool = False) -> Outcome:
        opts = self.opts
        batches = self.feed.batches(self.start * opts.accumulate)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._announce(until)
        if self.start == 0 and self.acc.is_main_process:
            generate.reals(self.feed, self.run.path / "samples" / "reals.png", opts.preview_n)
        began = mark = time.perf_counter()
        mark_images = self.images
        rate = 0.0
        index, stop = self.start, False
        with Progress(self.recipe.name, until, self.start) as progress:
            for index in range(self.start, until):
                logs, ok = self.one_step(index, batches)
                finite &= ok
                for k, v in logs.items():
                    self.window[k] = self.window[k] + v if k in self.window else v
                    self.counts[k] = self.counts.get(k, 0) + 1
                done = index + 1
                self.images += opts.batch_size
                stop = self._stopped(guard)  # asked once: a signal after this is for the next step
                last = done == until or stop
                regular = due(done, opts.log_every)
                if regular or last:
                    now = time.perf_counter()
                    rate = (self.images - mark_images) / max(now - mark, 1e-9)
                    mark, mark_images = now, self.images
                    row = self._log(done, self.window, self.counts, rate)
                    if regular:
                        self.window, self.counts = {}, {}
                    self._stop_if_diverged(finite, done)
                    left = (until - done) * opts.batch_size / max(rate, 1e-9)
                    losses = (f"{p.name}/loss" for p in self.phases)  # a phase may not have been due
                    told = next((k for k in ("reward", "loss", *losses) if k in row), "loss")
                    note = f"{told} {row.get(told, math.nan):.4g}  {rate:.0f} img/s"
                    progress.update(done, note)
                    progress.line(f"step {done}/{until}  {note}  ETA {duration(left)}")
                elif progress.bar is not None:
                    progress.update(done)
                if due(done, opts.save_every) or last:
                    self._stop_if_diverged(finite, done)
                    self.save(done, self.seconds + time.perf_counter() - began)
                if opts.preview_every and (due(done, opts.preview_every) or done == until) and opts.preview_n:
                    self.preview(done, progress)
                    mark, mark_images = time.perf_counter(), self.images
                if stop:
                    break
        self.seconds += time.perf_counter() - began
        done = index + 1 if until > self.start else self.start
        if stop:
            self.acc.wait_for_everyone()  # a process that leaves takes the others along, and the first one still saves
            code = 128 + (guard.signal or signal.SIGINT)
            raise VgmError(f"stopped after step {done}; everything is saved in {self.run.path}", GO_ON, code)
        overall = (self.images - self.start * opts.batch_size) / max(time.perf_counter() - began, 1e-9)
        outcome = Outcome(self.run.path, done, self.images, self.seconds, overall)
        if self.acc.is_main_process:
            from vgm_cli.engine.train.card import write_card

            write_card(self.run, self.recipe, outcome, self.components)
            if not quiet_end:
                ui.event("result", **asdict(outcome))
                ui.info(f"done: {done} steps in {duration(self.seconds)}, {overall:.0f} img/s")
                ui.data(str(self.run.path))
                ui.info(f"next: vgm {'evaluate' if self.header().is_codec else 'sample'} {self.run.path}")
        self.tracker.finish()
        return outcome

    def one_step(self, index: int, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step of every phase that is due; returns mean logs and whether every loss was finite."""
        torch.manual_seed(seed_of(self.opts.seed, index, self.rank))  # nn.Dropout and the like
        steps = [self._step(index, m) for m in range(self.opts.accumulate)]
        micros = [self._to_model(next(batches), s) for s in steps]
        due = [p for p in self.phases if index % p.every == 0]
        self._schedule(steps[-1])
        logs: dict[str, Tensor] = {}
        ok = torch.ones((), dtype=torch.bool, device=self.device)
        experience = getattr(self.objective, "experience", None)
        with self.acc.autocast():  # lists are made here, in the precision that the loss will see
            played = [experience(b, s) for b, s in zip(micros, steps)] if experience else []
        parts = zip(*played) if experience else [tuple(micros)]
        for group in parts:
            for phase in due:
                self._set_lr(phase.optimizer, index)
                self._freeze(phase)
                root, optimizer = self.roots[phase.optimizer], self.optimizers[phase.optimizer]
                for m, (part, step) in enumerate(zip(group, steps)):
                    last = m == len(steps) - 1
                    if self.sharded:
                        sharding.sync_gradients(root, last)
                    with nullcontext() if last or self.world == 1 or self.sharded else self.acc.no_sync(root):
                        with self.acc.autocast() if self.sharded else nullcontext():  # else the root's wrapper does
                            loss, own = root(phase.name, part, step)
                        self.acc.backward(loss * (phase.gain / len(steps)))
                    ok &= torch.isfinite(loss.detach())
                    key = "loss" if len(self.phases) == 1 else f"{phase.name}/loss"
                    for k, v in {key: loss.detach(), **own}.items():
                        v = torch.as_tensor(v, device=self.device).detach().float() / len(steps)
                        logs[k] = logs[k] + v if k in logs and m else v
                clip = phase.clip if phase.clip is not None else self.opts.clip
                if clip is not None:
                    norm = self.acc.clip_grad_norm_(root.parameters(), clip).detach()
                    logs["grad_norm"] = sharding.full(norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(steps[-1])
        for average in self.averages:
            average.update()
        return logs, ok

    def _freeze(self, phase: Phase) -> None:
        if len(self.phases) > 1:
            for role, params in self.trainable.items():
                for p in params:
                    p.requires_grad_(role in phase.trains)

    def _schedule(self, step: Step) -> None:
        """What the objective itself wants of the optimizers at this step."""
        rates = getattr(self.objective, "rates", None)
        self.rates: Mapping[str, float] = rates(step) if rates else {}
        restarts = getattr(self.objective, "restarts", None)
        if restarts and restarts(step):
            for optimizer in self.optimizers.values():
                optimizer.state.clear()

    def _set_lr(self, name: str, index: int) -> None:
        lr = learning_rate(self.settings[name], index, self.opts.steps) * self.rates.get(name, 1.0)
        for group in self.optimizers[name].param_groups:
            group["lr"] = lr

    def _log(self, done: int, window: Mapping[str, Tensor], counts: Mapping[str, int], rate: float) -> dict[str, Any]:
        row: dict[str, Any] = {"step": done, "images": self.images, "images_per_second": round(rate, 2)}
        keys = sorted(window)
        if keys:
            values = torch.stack([window[k].double() / counts[k] for k in keys])
            if self.world > 1:
                values = self.acc.reduce(values, "mean")
            row |= dict(zip(keys, (float(f"{v:.6g}") for v in values.tolist())))
        for name, setting in self.settings.items():
            key = "lr" if len(self.settings) == 1 else f"{name}/lr"
            row[key] = learning_rate(setting, done - 1, self.opts.steps)
        if self.acc.is_main_process and self.track != "none":
            self.run.log(row)
        ui.event("step", **row)
        self.tracker.log(row, done)
        return row

    def _stop_if_diverged(self, finite: Tensor, done: int) -> None:
        flag = finite.float()
        if self.world > 1:
            flag = self.acc.reduce(flag, "mean")
        if flag.item() < 1:
            raise VgmError(
                f"training diverged: the loss was not finite by step {done}; {self.run.kept()}",
                "lower optimizer.lr, set train.clip=1.0, or train.precision=fp32",
                DIVERGED,
            )

    def _stopped(self, guard: Guard) -> bool:
        """All ranks agree whether a signal came, and which."""
        if self.world > 1:
            seen = torch.tensor([guard.signal or 0], device=self.device)
            guard.signal = int(self.acc.gather(seen).max()) or None
        return guard.signal is not None

    def _announce(self, until: int) -> None:
        count = sum(p.numel() for p in self.networks["model"].parameters()) if "model" in self.networks else 0
        ui.event("start", run=str(self.run.path), parameters=count, steps=until, start=self.start)
        ui.info(
            f"{self.recipe.name}: {count:,} parameters, {self.feed.count:,} images "
            f"{self.facts.image_size}×{self.facts.image_size}×{self.facts.image_channels}"
            + (f", {self.facts.num_classes} classes" if self.facts.num_classes else ", unlabelled")
            + f", {self.acc.mixed_precision.replace('no', 'fp32')}, {self.world} process{'es' * (self.world > 1)}"
        )

    # -- saving and restoring -----------------------------------------------------------------------------------------

    def header(self, role: str = "model", weights: str = "raw") -> ckpt.Header:
        view = self.objective.view() if role == "model" and hasattr(self.objective, "view") else None
        codec = {"codec": self.feed.codec_ref} if role == "model" and self.feed.codec_ref else {}
        return ckpt.Header(
            component=self.components.get(role, {"kind": "model", "name": role, "kwargs": {}}),
            view=view,
            parts=self.parts.get(role, {}) | codec,
            recipe=self.recipe.config,
            data={**asdict(self.facts), **self.feed.describe()},
            step=self.start,
            images=self.images,
            weights=weights,
        )

    def save(self, done: int, seconds: float) -> None:
        """One complete checkpoint; it gets its name only when every byte is on disk."""
        main = self.acc.is_main_process
        states = {r: sharding.gather(self.networks[r].state_dict(), main) for r in {"model", *self.trained}}
        averages = {a.name: sharding.gather(a.state_dict(), main) for a in self.averages}
        tensors: dict[str, Tensor] = {}
        for name, optimizer in self.optimizers.items():
            tensors |= sharding.gather(optimizer_tensors(optimizer, f"optimizer.{name}."), main)
        keys = sorted(self.window)
        sums = torch.stack([self.window[k].double() for k in keys]) if keys else None
        if sums is not None and self.world > 1:
            sums = self.acc.reduce(sums, "mean")
        if not main:
            return
        window = {k: [v, self.counts[k]] for k, v in zip(keys, sums.tolist())} if sums is not None else {}
        with self.run.new_checkpoint(done, self.opts.keep) as temp:
            self._write_checkpoint(temp, done, seconds, window, states, averages, tensors)

    def _write_checkpoint(
        self,
        temp: Path,
        done: int,
        seconds: float,
        window: Mapping[str, Any],
        states: Mapping[str, Mapping[str, Tensor]],
        averages: Mapping[str, Mapping[str, Tensor]],
        tensors: dict[str, Tensor],
    ) -> None:
        """Its files from whole tensors; one identity in all of them tells that they belong together. state.json comes
        last."""
        told = f"{self.recipe.dump()} {self.feed.describe().get('fingerprint')} {done}"
        identity = {"checkpoint": hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:16]}
        header = self.header()
        header.step, header.extra = done, identity
        tensors |= self.save_weights(temp, "model", states["model"], header)
        for name, state in averages.items():
            header.weights = name
            tensors |= self.save_weights(temp, name, state, header)
        for role in self.trained:
            if role != "model":
                own = self.header(role)
                own.step, own.extra = done, identity
                ckpt.save_network(temp / f"{role}.safetensors", states[role], own)
        if hasattr(self.objective, "state_dict"):
            tensors |= {f"objective.{k}": v for k, v in self.objective.state_dict().items()}
        atomic.save_safetensors(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
            temp / "trainer.safetensors",
            {"format": "pt", **{f"vgm.{k}": json.dumps(v) for k, v in identity.items()}},
        )
        scaler = self.acc.scaler.state_dict() if self.acc.scaler is not None else None
        record = {
            "step": done,
            "images": self.images,
            "seconds": seconds,
            "seed": self.opts.seed,
            "world": self.world,
            "ema_updates": {a.name: a.updates for a in self.averages},
            "scaler": scaler,
            "window": window,
            **identity,
        }
        atomic.write_json(temp / "state.json", record)

    def save_weights(
        self, temp: Path, name: str, state: Mapping[str, Tensor], header: ckpt.Header
    ) -> dict[str, Tensor]:
        """One weights file, as others will read it (an objective's `export` folds adapters in); gives what that
        leaves out, which resuming needs."""
        export = getattr(self.objective, "export", None)
        plain = export("model", state) if export else state
        ckpt.save_network(temp / f"{name}.safetensors", plain, header)
        return {f"kept.{name}.{k}": v for k, v in state.items() if k not in plain}

    def read_part(self, file: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """One file of the checkpoint that `state` belongs to. VgmError: it is damaged, or of another one."""
        tensors, metadata = ckpt.read_tensors(file)
        if "checkpoint" in state and metadata.get("vgm.checkpoint") != json.dumps(state["checkpoint"]):
            raise VgmError(f"{file} does not belong to {file.parent}: it is another checkpoint's", OLDER, FAILED)
        return tensors

    def whole(
        self, role: str, own: Mapping[str, Tensor], kept: Mapping[str, Tensor], folder: Path, state: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """The opposite of save_weights: `own` with what was kept of it (the rest of it never changes), or all of the
        file. VgmError: it does not fit."""
        file = folder / f"{role}.safetensors"
        prefix = f"kept.{role}."
        part = {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)}
        found = {**own, **part} if part else self.read_part(file, state)
        wrong = sorted(k for k in own.keys() | found.keys() if k not in own or k not in found)
        wrong = wrong or [k for k in own if own[k].shape != found[k].shape]
        if wrong:
            raise VgmError(f"{file} does not fit this run: {wrong[0]} differs", OLDER, FAILED)
        return found

    def restore(self) -> None:
        """Continue from the last complete checkpoint; from the start when there is none. VgmError: the data or the
        codec are not those of before, or a file is damaged or another run's."""
        self._refuse_other_data()
        folder = self.run.last()
        if folder is None:
            ui.info(f"{self.run.path} has no checkpoint yet: starting at step 0")
            if self.acc.is_main_process:
                self.run.rewind_log(0)
            return
        state = read_state(folder, [a.name for a in self.averages])
        tensors = self.read_part(folder / "trainer.safetensors", state)
        self._refuse_other_codec(folder)
        for role in self.trained:
            own_state = self.networks[role].state_dict()
            stored = self.whole(role, own_state, tensors, folder, state)
            self.networks[role].load_state_dict({k: sharding.like(own_state[k], v) for k, v in stored.items()})
        for average in self.averages:
            weights = self.whole(average.name, average.state_dict(), tensors, folder, state)
            average.load_state_dict(weights, state["ema_updates"][average.name])
        file = folder / "trainer.safetensors"
        if state["step"] and not any(k.startswith("optimizer.") for k in tensors) and self._stateful():
            raise VgmError(f"{file} holds no optimizer state", OLDER, FAILED)
        for name, optimizer in self.optimizers.items():
            load_optimizer_tensors(optimizer, tensors, f"optimizer.{name}.", file)
        own = {k.removeprefix("objective."): v for k, v in tensors.items() if k.startswith("objective.")}
        if hasattr(self.objective, "load_state_dict"):
            try:
                self.objective.load_state_dict(own)
            except (KeyError, RuntimeError, ValueError) as e:
                raise VgmError(f"{file} does not fit this run's objective: {e}", OLDER, FAILED) from e
        if self.acc.scaler is not None and state.get("scaler"):
            self.acc.scaler.load_state_dict(state["scaler"])
        self.start, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        for k, (value, count) in state.get("window", {}).items():
            self.window[k], self.counts[k] = torch.tensor(value, dtype=torch.float32, device=self.device), count
        if self.acc.is_main_process:  # a row for a part of an interval is not one that an uninterrupted run has
            self.run.rewind_log(self.start - bool(self.window))
        ui.info(f"resuming from step {self.start}")

    def _stateful(self) -> bool:
        """Does any optimizer keep more than the weights?"""
        return any(s.name != "sgd" or s.betas[0] for s in self.settings.values())

    def _refuse_other_data(self) -> None:
        """VgmError (exit code 2): the images or classes are not those that the run began with."""
        before, now = self.run.record("data.json"), self.data_facts()
        then, there = list(before.get("class_names") or []), list(now.get("class_names") or [])
        if then and there and then != there:
            first = next(
                (i for i, pair in enumerate(zip(then, there)) if pair[0] != pair[1]), min(len(then), len(there))
            )
            was, is_now = ("missing" if first >= len(n) else n[first] for n in (then, there))
            message = f"the classes are not those of {self.run.path}: class {first} was {was}, now {is_now}"
            raise VgmError(message, NEW_RUN, USAGE)
        for key in ("num_classes", "count", "image_size", "image_channels", "fingerprint"):
            if older(before.get(key), now.get(key)):
                ui.warn(f"{self.run.path} was begun by an older version: that its data is unchanged is not checked")
            elif before.get(key) is not None and before[key] != now.get(key):
                raise VgmError(
                    f"the data is not that of {self.run.path}: {key} was {before[key]}, now {now.get(key)}",
                    NEW_RUN,
                    USAGE,
                )

    def _refuse_other_codec(self, folder: Path) -> None:
        """VgmError (exit code 2): the first stage's file has other bytes than when `folder` was written."""
        before = ckpt.read_header(folder / "model.safetensors").parts.get("codec") if "model" in self.networks else None
        now = self.feed.codec_ref
        if before and now and before.sha256 != now.sha256:
            raise VgmError(f"the codec is not the one that {self.run.path} was trained with", NEW_RUN, USAGE)

    def preview(self, done: int, progress: Progress) -> None:
        """A grid from the first average with the run's fixed noise and labels, comparable between steps; of a codec,
        reconstructions."""
        if not self.acc.is_main_process or self.sharded:
            return  # one process alone cannot sample from a sharded network
        if not (self.recipe.config.get("sampler") or self.header().is_codec):
            return
        file = self.run.path / "samples" / f"step-{done:06d}.png"
        progress.note(f"preview of {self.opts.preview_n} images")
        model = self.networks["model"]
        rng = torch.random.get_rng_state()
        with ExitStack() as stack:
            if self.averages:
                from vgm_cli.engine.train.ema import swap_in

                before = swap_in(model, self.averages[0].state_dict())
                stack.callback(model.load_state_dict, before)
            was_training = model.training
            model.eval()
            stack.callback(model.train, was_training)
            loaded = ckpt.Loaded(
                model,
                ckpt.build_view(model, self.header().view),
                self.feed.codec,
                self.header(),
                self.run.path,
                self.sampled_with,
            )
            with self.acc.autocast():
                generate.preview(
                    loaded,
                    self.recipe,
                    file,
                    self.opts.preview_n,
                    self.device,
                    self.feed,
                )
        progress.update(done, "")
        torch.random.set_rng_state(rng)
        if file.is_file():
            self.tracker.picture(file, done)


# -- small pieces ----------------------------------------------------------------------------------------------------


def decay_groups(params: Sequence[Tensor], networks: Sequence[nn.Module], decay: str) -> list[dict[str, Any]]:
    """Two parameter groups, with and without weight decay. decay: "matrices" decays tensors of two and more dimensions,
    "linear" the weights of linear and convolutional layers alone (no embeddings, no norms, no biases)."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    linear = {id(m.weight) for network in networks for m in network.modules() if isinstance(m, layers)}
    yes = [p for p in params if (p.ndim >= 2 if decay == "matrices" else id(p) in linear)]
    chosen = {id(p) for p in yes}
    return [{"params": yes}, {"params": [p for p in params if id(p) not in chosen], "weight_decay": 0.0}]


def make_optimizer(params: Sequence[Any], setting: Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """torch.optim by name over tensors or parameter groups, fused where the device has a fused kernel, or an optimizer
    component, whose constructor takes params, lr, betas, eps and weight_decay."""
    betas = (setting.betas[0], setting.betas[1])
    common: dict[str, Any] = {"lr": setting.lr, "weight_decay": setting.weight_decay}
    if setting.name not in TORCH_OPTIMIZERS:
        node = {"name": setting.name, "betas": setting.betas, "eps": setting.eps, **common}
        made: torch.optim.Optimizer = registry().build("optimizer", node, params=params)
        return made
    if setting.name in ("adam", "adamw"):
        cls = torch.optim.AdamW if setting.name == "adamw" else torch.optim.Adam
        tensors = [p for q in params for p in (q["params"] if isinstance(q, dict) else [q])]
        fused = device.type in ("cuda", "cpu") and all(p.is_floating_point() for p in tensors)
        return cls(params, betas=betas, eps=setting.eps, fused=fused, **common)
    if setting.name == "rmsprop":
        return torch.optim.RMSprop(params, eps=setting.eps, **common)
    if setting.name == "adagrad":
        return torch.optim.Adagrad(params, eps=setting.eps, **common)
    if setting.name == "adamax":
        return torch.optim.Adamax(params, betas=betas, eps=setting.eps, **common)
    if setting.name == "radam":
        return torch.optim.RAdam(params, betas=betas, eps=setting.eps, **common)
    return torch.optim.SGD(params, momentum=setting.betas[0], **common)


def learning_rate(setting: Optimizer, index: int, total: int) -> float:
    """Learning rate of step `index`: linear warm-up, then constant, linear or cosine decay to final_lr."""
    warm = min(1.0, (index + 1) / setting.warmup) if setting.warmup else 1.0
    if setting.schedule == "constant" or index < setting.warmup:
        return setting.lr * warm
    progress = (index - setting.warmup) / max(1, total - setting.warmup)
    fall = 1 - progress if setting.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return setting.final_lr + (setting.lr - setting.final_lr) * fall


def optimizer_tensors(optimizer: Any, prefix: str) -> dict[str, Tensor]:
    """Optimizer state as named tensors: "<prefix><parameter index>.<entry>"."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}{i}.{k}": torch.as_tensor(v) for i, entries in state.items() for k, v in entries.items()}


def load_optimizer_tensors(optimizer: Any, tensors: Mapping[str, Tensor], prefix: str, file: Path) -> None:
    """The opposite; VgmError: entries of other parameters than this optimizer's."""
    full = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        index, _, entry = key[len(prefix) :].partition(".")
        like = params[int(index)] if index.isdecimal() and int(index) < len(params) else None
        moment = entry in MOMENTS
        if like is None or (moment and value.shape != like.shape):
            raise VgmError(f"{file} is another run's: {key} fits no parameter", OLDER, FAILED)
        if value.shape == like.shape:  # fused kernels read weights and moments in memory order: channels last or not
            there = sharding.like(like, value)
            value = torch.empty_like(like, dtype=value.dtype, device=there.device).copy_(there)
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})


def read_state(folder: Path, averages: Sequence[str]) -> dict[str, Any]:
    """state.json of a checkpoint. VgmError: it is damaged, or not this checkpoint's."""
    try:
        state = read_record(folder / "state.json")
        step, images, seconds = state["step"], state["images"], state["seconds"]
        sound = type(step) is int and type(images) is int and isinstance(seconds, int | float)
        sound = sound and step == int(folder.name.removeprefix("step-")) and images >= 0 and seconds >= 0
        sound = sound and all(type(state["ema_updates"][name]) is int for name in averages)
        sound = sound and all(len(v) == 2 for v in state.get("window", {}).values())
    except (KeyError, TypeError, ValueError, AttributeError, VgmError) as e:
        raise VgmError(f"{folder} is damaged: {e}", OLDER, FAILED) from e
    if not sound:
        raise VgmError(f"{folder} is damaged: its state.json does not belong to it", OLDER, FAILED)
    return state


def due(done: int, every: int | None) -> bool:
    """Every so many steps; never where that is 0 or null."""
    return bool(every) and done % (every or 1) == 0


def should_compile(opts: Any, device: torch.device, networks: Sequence[nn.Module]) -> bool:
    """auto: on a GPU, and only where the run wins the compilation time back. That is 20 to 70 s (measured on an H200),
    and a step of a network of some ten million parameters takes 10 ms, of which compiling saves a part."""
    if opts.compile in ("on", True):
        return True
    size = max((sum(p.numel() for p in n.parameters()) for n in networks), default=0)
    least = 2000 if size >= 50_000_000 else 20_000
    return opts.compile == "auto" and device.type == "cuda" and opts.steps >= least


def channels_last(network: nn.Module, asked: bool | None) -> bool:
    """Convolutional networks run faster in channels-last memory; others are left alone."""
    if asked is not None:
        return asked
    convs = sum(p.numel() for m in network.modules() if isinstance(m, nn.Conv2d) for p in m.parameters(False))
    return convs > 0.5 * sum(p.numel() for p in network.parameters())


def train_codec(recipe_name: str, recipe: Recipe, out: Path, device: str | None = None) -> Path:
    """Train the fallback codec on this recipe's data into `out`, a run like any other; returns its weights file. A
    finished one is reused, an unfinished one goes on."""
    own = build.codec_recipe(recipe_name, recipe)
    last = Run(out).last()
    if last is None or read_state(last, [])["step"] < own.node("train").steps:
        train(own, out, resume=out.exists(), quiet_end=True, device=device)
    return ckpt.resolve(out)
