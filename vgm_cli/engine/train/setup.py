"""Before the first step: processes and precision, the run directory, and everything that a run holds between steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli import limits
from vgm_cli.api import Batch, Checkpointing, Phase, Step
from vgm_cli.conditioning import Conditions
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.conditions import check_column
from vgm_cli.engine.environment import bf16_supported
from vgm_cli.engine.processes import pick_device
from vgm_cli.engine.run import Run
from vgm_cli.engine.train import optim, sharding, tracking
from vgm_cli.engine.train.ema import EMA
from vgm_cli.engine.train.report import Window
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.recipe import Recipe, rename, with_defaults
from vgm_cli.ui import flat, ui
from vgm_cli.yaml_text import parse_yaml

MAY_CHANGE = ("steps", "log_every", "save_every", "keep", "preview_every", "preview_n", "compile")  # on resume


class Root(nn.Module):
    """The module that one optimizer trains, wrapped once by DDP or FSDP. Its forward returns a phase's loss, so that
    whatever the loss does (two discriminator calls, double backward, JVPs) happens inside one wrapped forward."""

    def __init__(
        self,
        objective: Any,
        networks: Mapping[str, nn.Module],
        conditions: Conditions,
        autocast: Callable[[], Any] = nullcontext,
    ):
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self._others = objective, conditions  # in a tuple: their other networks are not this root's children
        self._autocast = autocast  # where nothing wraps the root that would do it

    def forward(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        with self._autocast():
            objective, conditions = self._others
            return objective.loss(phase, conditions.apply(batch, step, trained=True), step)  # type: ignore[no-any-return]


@dataclass
class Outcome:
    """The result of a training run: where it is, how far it went, how long it took."""

    path: Path
    step: int
    images: int
    seconds: float
    images_per_second: float
    metrics: dict[str, float] = field(default_factory=dict)


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
    """A resumed run must be the same run: only lengths and intervals may change. Keys that an older version did not
    write count as left at their defaults."""
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
    before, now = flat(with_defaults(then)), flat(with_defaults(parse_yaml(recipe.dump(), "the recipe")))
    order = ("paper", "model", "roles", "codec", "conditions", "objective", "data")  # what says most comes first
    changed = sorted(
        (k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in free),
        key=lambda k: (order.index(head) if (head := k.split(".")[0]) in order else len(order), k != f"{head}.name", k),
    )
    if changed:
        role = next((r for r in recipe.roles() if f"roles.{r}.sha256" in changed), None)
        if role is not None:
            message = f"{run.path} was trained with another {role}"
            raise VgmError(message, "resume with the same one, or start a new run with --out", USAGE)
        k = changed[0]
        raise VgmError(
            f"{run.path} was trained with {k}={before.get(k, 'absent')}, now {k}={now.get(k, 'absent')}",
            "resume with the same recipe and overrides, or start a new run with --out",
            USAGE,
        )


class Trainer:
    """State of one run between steps.

    acc: accelerate's Accelerator. opts: the recipe's `train:`. start, images, seconds: where the run stands. parts:
    what the phases train, {name in Phase.trains: {dotted name: parameter}}. optimizers: by name, with their roots.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        accelerator: Any,
        roles: Mapping[str, Any],
        track: str,
        open_feed: Callable[..., Any],
    ):
        self.recipe, self.run, self.acc, self.track = recipe, run, accelerator, track
        self.opts = recipe.node("train")
        self.skip = self.opts.skip_rule()
        self.world, self.rank, self.device = accelerator.num_processes, accelerator.process_index, accelerator.device
        self.start, self.images, self.seconds = 0, 0, 0.0
        self.window = Window(accelerator)
        torch.manual_seed(self.opts.seed)
        micro_size = self.opts.batch_size // (self.world * self.opts.accumulate)
        self.feed = open_feed(recipe, run, accelerator, micro_size)
        self.facts = self.feed.facts
        torch.manual_seed(self.opts.seed)  # opening the data may have trained a codec
        built = build.build_objective(recipe, self.facts, {"codec": self.feed.codec, **roles})
        built.check_parts()
        self.objective, self.networks, self.components = built.objective, built.networks, built.components
        self.references, self.sampled_with, self.conditions = built.parts, built.sampled_with, built.conditions
        if self.feed.dataset is not None:
            for part in self.conditions.on("text"):
                check_column(part, self.feed.dataset)
        ckpt.check_view(self.objective.view())
        self.phases: list[Phase] = built.phases()
        self.trained = sorted({role for phase in self.phases for role in phase.roles})
        self.kept = sorted({*self.trained, *self.conditions.networks})  # with files of their own
        self._place(micro_size)
        self._choose_kernels()
        roots = self._wrap()
        self.averages = [
            EMA(self.networks["model"], config, self.opts.batch_size)
            for config in (self.opts.ema if "model" in self.trained else [])
        ]
        self.optimizers = {name: self._optimizing(name, root) for name, root in roots.items()}

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _place(self, micro_size: int) -> None:
        """Networks and objective on the device, initialised on the first batch, in training or evaluation mode."""
        asked = self.opts.channels_last
        if self.objective.forward_mode:  # torch's forward derivative of group norms refuses that order of memory
            if asked:
                said = f"{type(self.objective).__name__} takes forward-mode derivatives"
                raise VgmError(said, "train.channels_last=false", USAGE)
            asked = False
        for network in self.networks.values():
            network.to(self.device)
            if channels_last(network, asked):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.objective.to(self.device)
        self.conditions.to(self.device)
        first = self.feed.first(micro_size, self.objective.prepare_size)
        self.objective.prepare(self.to_model(first, self.step(0)), self.step(0))
        for network in self.networks.values():
            network.eval()
        for name in {n for phase in self.phases for n in phase.trains}:
            optim.part_of(self.networks, name).train()

    def _choose_kernels(self) -> None:
        """Activation checkpointing and torch.compile, where they are asked for and possible."""
        kind = type(self.objective).__name__
        if self.objective.forward_mode and self.opts.precision in ("bf16", "fp16"):
            ui.warn(f"{kind} takes its derivatives in float32: {self.opts.precision} speeds up the rest alone")
        if self.opts.checkpointing:
            if self.objective.forward_mode:
                raise VgmError(f"{kind} takes forward-mode derivatives", "train.checkpointing=false", USAGE)
            able = [n for n in map(self.networks.__getitem__, self.trained) if isinstance(n, Checkpointing)]
            if not able:
                names = ", ".join(self.components.get(r, {"name": r})["name"] for r in self.trained)
                hint = "train.checkpointing=false, train.accumulate=2 halves the memory for activations"
                raise VgmError(f"{names}: no activation checkpointing", hint, USAGE)
            for network in able:
                network.checkpointing = True
        if should_compile(self.opts, self.device, [self.networks[r] for r in self.trained]):
            left = [r for r in self.trained if self.objective.forward_mode or r in self.objective.uncompiled]
            if left and self.opts.compile != "auto":
                why = "takes gradients through them more than once a step"
                why = "takes forward-mode derivatives" if self.objective.forward_mode else why
                ui.warn(f"not compiled: {', '.join(left)}; {kind} {why}")
            for role in self.trained:
                if role not in left:
                    self.networks[role].compile()

    def _wrap(self) -> dict[str, Any]:
        """One root per optimizer, sharded where asked; self.parts of the parameters as they are then, all others of the
        trained networks frozen."""
        if self.opts.fsdp:
            sharding.check(self.objective, self.phases)
        self.sharded = bool(self.opts.fsdp and torch.distributed.is_initialized())  # else there is nobody to share with
        roots = {}
        for name in dict.fromkeys(p.optimizer for p in self.phases):
            roles = sorted({r for p in self.phases if p.optimizer == name for r in p.roles})
            networks = {r: self.networks[r] for r in roles}
            roots[name] = Root(
                self.objective, networks, self.conditions, self.acc.autocast if self.sharded else nullcontext
            )
            if self.sharded:
                sharding.shard(roots[name], self.device)
        self.parts = optim.trained(self.networks, self.phases)
        chosen = {id(p) for part in self.parts.values() for p in part.values()}
        for role in self.trained:
            for p in self.networks[role].parameters():
                p.requires_grad_(id(p) in chosen)
        return roots

    def _optimizing(self, name: str, root: Any) -> optim.Optimizing:
        """An optimizer over its groups, and its root wrapped for several processes."""
        setting = self.recipe.optimizer(name)
        params = optim.members(name, self.phases, self.parts)
        groups = optim.group(params, setting, root.networks.values())
        made = optim.make_optimizer([{"params": [params[n] for n in g.names]} for g in groups], setting, self.device)
        if self.world > 1:
            trains = {p.trains for p in self.phases if p.optimizer == name}
            self.acc.ddp_handler.find_unused_parameters = len(trains) > 1 or self.objective.sparse_grads
        # torch keeps the step counters of some optimizers on the CPU, where they are read: they stay there
        optimizer = self.acc.prepare_optimizer(made, device_placement=False)
        wrapped = root if self.sharded else self.acc.prepare_model(root)
        return optim.Optimizing(wrapped, optimizer, groups, setting, self.opts.steps)

    # -- steps ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Everything has been checked: write the run directory's first files."""
        if self.acc.is_main_process:
            self.run.start(self.recipe.dump(), self.recipe.origins, self.data_facts())
        name = self.track if self.acc.is_main_process else "none"
        self.tracker = tracking.Tracker(name, self.run.path, flat(self.recipe.config), self.start)

    def data_facts(self) -> dict[str, Any]:
        return {**self.feed.describe(), **asdict(self.facts)}

    def step(self, index: int, micro: int = 0) -> Step:
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

    def to_model(self, batch: Batch, step: Step) -> Batch:
        """On the device, latents drawn from the posterior of a frozen codec, then conditions; those whose encoders are
        trained are left to the root."""
        out = self.feed.to_model(batch, step)
        return out if self.feed.dataset is None else self.conditions.apply(out, step)

    def begin_step(self, step: Step) -> None:
        """Set the learning rates and weight decays that the recipe and the objective want at this step."""
        wanted = self.objective.schedule(step)
        restarts = self.objective.restarts(step)
        for name, optimizing in self.optimizers.items():
            optimizing.begin(step.index, wanted.get(name, {}))
            if restarts:
                optimizing.optimizer.state.clear()

    def freeze_all_but(self, phase: Phase) -> None:
        """Let only the parameters that a phase trains receive gradients."""
        if len(self.phases) > 1:
            mine = {id(p) for name in phase.trains for p in self.parts[name].values()}
            for part in self.parts.values():
                for p in part.values():
                    p.requires_grad_(id(p) in mine)

    @contextmanager
    def synchronised(self, root: Any, last: bool) -> Iterator[None]:
        """Context of one micro-batch. Processes exchange gradients after the last micro-batch of a step alone."""
        if self.sharded:
            sharding.sync_gradients(root, last)
        with nullcontext() if last or self.world == 1 or self.sharded else self.acc.no_sync(root):
            yield

    def loss_name(self, phase: Phase) -> str:
        return "loss" if len(self.phases) == 1 else f"{phase.name}/loss"


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
