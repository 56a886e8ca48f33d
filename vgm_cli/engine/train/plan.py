"""`vgm train … --plan`: what a run costs, before it is paid. Works without the data set and without weights."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from vgm_cli import validation
from vgm_cli.api import Batch, Step
from vgm_cli.conditioning import Conditions
from vgm_cli.engine import build
from vgm_cli.engine.build import Facts
from vgm_cli.engine.environment import bf16_supported
from vgm_cli.engine.processes import pick_device
from vgm_cli.engine.tokens import TokenCodec
from vgm_cli.engine.train import optim
from vgm_cli.engine.train.data_feed import IN_MEMORY
from vgm_cli.engine.train.scale import LINK, LatentCache, Traffic, latent_cache, tokens_of, traffic
from vgm_cli.errors import MISSING_ASSET, VgmError
from vgm_cli.nn.meta import with_zeros
from vgm_cli.recipe import Recipe
from vgm_cli.ui import duration, human, ui

TIMED_FLOPS = 4e12  # a step above this many FLOPs is timed on a smaller batch and scaled
TIMED_SECONDS = 20.0  # what timing may take; on a CPU batches are chosen for it
TIMED_PARAMETERS = 3e8  # above this many, timing alone would take minutes on a CPU


@dataclass
class RunPlan:
    """What `--plan` tells of a run. Bytes are those of one process.

    flops_forward is of one image, flops_step of the forward and backward passes of a whole batch; both are None where
    they cannot be counted, and then `memory` has no entry for activations. tokens: per image, of networks that see
    sequences. processes: on how many machines together, `nodes`. communication: of several processes. latents: of sets
    that are too large to be encoded into memory. first is the plan of the codec's own training, where a codec has to be
    trained before.
    """

    recipe: str
    parameters: int
    trainable: int
    roles: dict[str, int]
    sample_shape: tuple[int, ...]
    num_classes: int
    precision: str
    batch_size: int
    steps: int
    epochs: float | None
    flops_forward: float | None
    flops_step: float | None
    memory: dict[str, int]
    seconds_per_step: float | None
    timed: str
    total_seconds: float | None
    disk: dict[str, int]
    tokens: int | None = None
    processes: int = 1
    nodes: int = 1
    communication: Traffic | None = None
    latents: LatentCache | None = None
    first: RunPlan | None = None


def make_plan(recipe: Recipe, device: torch.device | None = None, world: int = 1, nodes: int = 1) -> RunPlan:
    """Build the run on the meta device (shapes without memory), count its parameters, FLOPs and bytes, and time a few
    steps for real where that takes seconds.

    world: processes that share the batch, on `nodes` machines. VgmError: whatever would keep the recipe from training,
    except missing data.
    """
    device = device or pick_device()
    opts = recipe.node("train")
    build.settle(recipe)
    validation.check_parts(recipe)
    validation.check_batch(recipe, world)
    facts, count, planned = build.plan_facts(recipe)
    before = None
    if planned is not None and planned.recipe is not None:
        ui.info(f"a codec is trained first: {planned.recipe.name}")
        before = make_plan(planned.recipe, device, world, nodes)
    built = validation.build_on_meta(recipe, facts, planned)
    phases = built.phases()
    trained = sorted({r for p in phases for r in p.roles})
    numbers = {r: sum(p.numel() for p in n.parameters()) for r, n in built.networks.items()}
    parts = optim.trained(built.networks, phases)
    trainable = sum(p.numel() for p in {id(p): p for part in parts.values() for p in part.values()}.values())
    micro = opts.batch_size // (opts.accumulate * world)
    forward, step = count_flops(built, facts)
    precision = opts.precision if opts.precision != "auto" else ("bf16" if bf16_supported() else "fp32")
    memory = memory_by_part(built, trained, recipe, precision, micro, facts)
    if opts.fsdp:
        memory |= {k: -(-v // world) for k, v in memory.items() if k != "activations"}
    seconds, how = time_steps(recipe, facts, planned, device, precision, step or 0, trainable, world)
    latents = None
    if planned is not None and count and count > IN_MEMORY and recipe.node("data").cache_latents is not False:
        latents = latent_cache(
            planned.codec, facts.image_shape, count, recipe.node("data").hflip, device, speed(device, None)
        )
    weights = 4 * numbers.get("model", 0)
    one = weights * (1 + len(opts.ema)) + 8 * trainable
    return RunPlan(
        recipe=recipe.name,
        parameters=numbers.get("model", sum(numbers.values())),
        trainable=trainable,
        roles=numbers,
        sample_shape=facts.sample_shape,
        num_classes=facts.num_classes,
        precision=precision,
        batch_size=opts.batch_size,
        steps=opts.steps,
        epochs=opts.steps * opts.batch_size / count if count else None,
        flops_forward=forward,
        flops_step=None if step is None else step * opts.batch_size,
        memory=memory,
        seconds_per_step=seconds,
        timed=how,
        total_seconds=seconds * opts.steps if seconds else None,
        disk={"one checkpoint": one, f"kept ({max(opts.keep, 1)})": one * max(opts.keep, 1)},
        tokens=tokens_of(
            built.networks.get("model"), built.components.get("model", {}), facts.vocab_size, facts.sample_shape
        ),
        processes=world,
        nodes=nodes,
        communication=traffic(built.networks, phases, world, opts.accumulate, opts.fsdp) if world > 1 else None,
        latents=latents,
        first=before,
    )


def example(facts: Facts, n: int, device: torch.device | str, conditions: Conditions) -> Batch:
    """A batch of n rows as the objective will see it: "x" (n, C, H, W), a ramp of brightness, or "tokens" (n, *grid),
    "index", and "y" (n,) where there are classes, all zeros."""
    tokens = bool(facts.vocab_size)
    shape = (n, *facts.sample_shape)  # of pixels that differ, since an objective may divide by their variance
    seen = torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)
    seen = torch.zeros_like(seen, dtype=torch.long) if tokens else seen
    batch: Batch = {"tokens" if tokens else "x": seen, "index": torch.zeros(n, dtype=torch.long, device=device)}
    if facts.num_classes:
        batch["label"] = torch.zeros(n, dtype=torch.long, device=device)
    return batch | conditions.example(n, torch.device(device))


class _MetaStep(Step):
    """A Step whose draws have the right shape and no values, for losses on the meta device."""

    def generator(self, name: str = "") -> torch.Generator:
        return torch.Generator()

    def _rows(self, n: int, name: str, draw: Any) -> torch.Tensor:
        return draw(n, device=self.device)


class Unfollowed(ModuleTracker):
    """Takes the place of torch's ModuleTracker inside FlopCounterMode and does nothing.

    The tracker attributes FLOPs to modules through backward hooks, and these fail on outputs that need no gradient.
    Here only the total is wanted.
    """

    def __enter__(self) -> Unfollowed:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def count_flops(built: build.Built, facts: Facts) -> tuple[float | None, float | None]:
    """FLOPs for one image, summed over the losses of all phases: (forward, forward and backward).

    Torch's counter runs on meta tensors, which have shapes and no values. (None, None), with a warning, where a loss
    looks at values.
    """
    n = 2  # losses may take statistics over the batch
    step = _MetaStep(index=0, device=torch.device("meta"))
    batch = example(facts, n, "meta", built.conditions)
    forward = total = 0.0
    try:
        for phase in built.objective.phases():
            counter = FlopCounterMode(display=False)
            counter.mod_tracker = Unfollowed()
            with counter:
                loss, _ = built.objective.loss(phase.name, batch, step)
                one = counter.get_total_flops()
                loss.backward()
            forward += one / n / phase.every
            total += counter.get_total_flops() / n / phase.every
    except RuntimeError as e:
        ui.warn(f"FLOPs could not be counted: {str(e).splitlines()[0]}")
        return None, None
    finally:
        for network in built.networks.values():
            network.zero_grad(set_to_none=True)
    return forward, total


def memory_by_part(
    built: build.Built, trained: list[str], recipe: Recipe, precision: str, micro: int, facts: Facts
) -> dict[str, int]:
    """Bytes by purpose: weights, gradients, optimizer state, averages, and the activations that are saved for the
    backward pass, which are measured on meta tensors and left out where a loss looks at values."""
    opts = recipe.node("train")
    weights = sum(p.numel() * 4 for n in built.networks.values() for p in n.parameters())
    grads = sum(p.numel() * 4 for r in trained for p in built.networks[r].parameters() if p.requires_grad)
    moments = {"rmsprop": 1, "sgd": 1, "adagrad": 1}.get(recipe.node("optimizer").name, 2)
    model = sum(p.numel() * 4 for p in built.networks["model"].parameters()) if "model" in built.networks else 0
    parts = {
        "weights": weights,
        "gradients": grads,
        "optimizer state": grads * moments,
        "averages": model * len(opts.ema),
    }
    saved = 0

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        if not isinstance(t, nn.Parameter):
            saved += t.numel() * (2 if precision != "fp32" else 4)
        return t

    step = _MetaStep(index=0, device=torch.device("meta"))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for phase in built.objective.phases():
                built.objective.loss(phase.name, example(facts, 2, "meta", built.conditions), step)
        parts["activations"] = saved // 2 * micro
    except RuntimeError:
        pass
    return parts


def speed(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOPs per second of a large matrix product on this device, an upper limit for a training step."""
    a = torch.ones(512, 512, device=device, dtype=dtype or torch.float32)
    a @ a
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 512**3 / max(time.perf_counter() - began, 1e-9)


def time_steps(
    recipe: Recipe,
    facts: Facts,
    planned: build.PlannedCodec | None,
    device: torch.device,
    precision: str,
    flops_image: float,
    trainable: int,
    world: int = 1,
) -> tuple[float | None, str]:
    """(seconds of one training step, how they were measured).

    Three forward and backward passes are timed, on fewer images where the full batch would take too long, and their
    median is scaled to this process's share of the batch. (None, the reason) where even that would take longer than
    TIMED_SECONDS, or a frozen network's file is not there.
    """
    opts = recipe.node("train")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    share = max(1, opts.batch_size // (opts.accumulate * world))
    affordable = TIMED_FLOPS
    if device.type == "cpu":
        if precision == "fp16":
            return None, "not timed: training in fp16 needs a GPU"
        if trainable > TIMED_PARAMETERS:
            return None, f"not timed: {human(trainable)} parameters would take minutes to set up on this CPU"
        affordable = speed(device, dtype) * TIMED_SECONDS / 12  # four passes, each at about a third of the best speed
        if 2 * flops_image > 4 * affordable:
            return None, f"not timed: one image takes {human(flops_image)} FLOPs, minutes on this CPU"
    n = max(2, min(share, int(affordable / max(flops_image, 1))))
    ui.info(f"timing {recipe.name} with {n} images on {device.type}, at most about {TIMED_SECONDS:.0f} s …")
    codec = {"codec": at_hand(planned.codec, device)} if planned else {}
    given = {**codec, **build.plan_roles(recipe, facts, codec.get("codec"))}
    built = build.build_objective(recipe, facts, given, drawn=True)
    for network in built.networks.values():
        network.to(device)
    step = Step(index=0, device=device)
    batch = example(facts, n, device, built.conditions)
    built.objective.prepare(batch, step)
    times: list[float] = []
    while len(times) < 4 and sum(times) < TIMED_SECONDS / 2:
        began = time.perf_counter()
        try:
            for phase in built.objective.phases():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss, _ = built.objective.loss(phase.name, batch, step)
                loss.backward()
        except VgmError as e:  # a frozen network's file, which training asks for before it starts
            if e.code != MISSING_ASSET:
                raise
            return None, f"not timed: {e.message}"
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    timed = times[1:] or times  # the first one warms up
    seconds = sorted(timed)[len(timed) // 2] * share * opts.accumulate / n
    note = f"{len(timed)} step{'s' * (len(timed) > 1)} timed on this machine ({device.type}, {n} images each"
    note += ", scaled to the batch" if n != share * opts.accumulate else ""
    return seconds, note + (f"; {world} processes are taken to be as fast as one)" if world > 1 else ")")


def at_hand(codec: Any, device: torch.device) -> Any:
    """A planned codec as objectives that compute through it need it: off the meta device."""
    if isinstance(codec, TokenCodec):
        return TokenCodec(at_hand(codec.codec, device))
    return with_zeros(codec, device) if isinstance(codec, nn.Module) else codec


def show_plan(plan: RunPlan) -> None:
    """The plan for people, or as JSON."""
    ui.document(asdict(plan))
    lines(plan)


def lines(plan: RunPlan) -> None:
    if plan.first is not None:
        lines(plan.first)
    shape = "×".join(str(s) for s in plan.sample_shape)
    ui.data(f"{plan.recipe}")
    ui.data(f"  parameters       {plan.parameters:,} ({plan.trainable:,} trained)")
    for role, n in plan.roles.items():
        if role != "model":
            ui.data(f"    {role:<14} {n:,}")
    ui.data(f"  model sees       {shape}, {plan.num_classes or 'no'} classes")
    if plan.flops_forward is not None and plan.flops_step is not None:
        ui.data(f"  FLOPs            {human(plan.flops_forward)} forward per image, {human(plan.flops_step)} per step")
    parts = ", ".join(f"{k} {gib(v)}" for k, v in plan.memory.items())
    more = "" if "activations" in plan.memory else " and activations, which could not be counted"
    machines = f" on {plan.nodes} machines" if plan.nodes > 1 else ""
    each = f" in each of {plan.processes} processes{machines}" if plan.processes > 1 else ""
    ui.data(f"  memory           {gib(sum(plan.memory.values()))} = {parts}{more}{each}")
    epochs = f" = {plan.epochs:,.1f} epochs" if plan.epochs else ""
    ui.data(f"  length           {plan.steps:,} steps of {plan.batch_size} images{epochs}, {plan.precision}")
    if plan.seconds_per_step is not None and plan.total_seconds is not None:
        ui.data(f"  time             {plan.seconds_per_step:.3g} s per step, {duration(plan.total_seconds)} in all")
        rate = plan.batch_size / plan.seconds_per_step
        tokens = f", {human(plan.tokens * rate)} tokens/s of {plan.tokens:,} per image" if plan.tokens else ""
        ui.data(f"                   {rate:,.3g} images/s{tokens}")
        if plan.first is not None and plan.first.total_seconds is not None:
            ui.data(f"                   {duration(plan.total_seconds + plan.first.total_seconds)} with the codec")
    ui.data(f"                   {plan.timed}")
    if (sent := plan.communication) is not None:
        link = f"{sent.seconds:.3g} s at {LINK / 1e9:.0f} GB/s where nothing hides it"
        ui.data(f"  communication    {gib(sent.bytes_per_step)} from each process per step ({sent.pattern}), {link}")
    ui.data("  disk             " + ", ".join(f"{k} {gib(v)}" for k, v in plan.disk.items()))
    if (cache := plan.latents) is not None:
        took = f", {duration(cache.seconds)} in one process, {cache.how}" if cache.seconds else f"; {cache.how}"
        ui.data(f"  latent cache     {gib(cache.bytes)} for {cache.images:,} images{took}")


def gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"
