"""The nodes of a recipe that are the host's own, each a dataclass: keys with their types, ranges, defaults, meanings.

`vgm train … --help-config` shows them. A value is fitted to its annotation (ranges.fit); an unknown key is refused with
the nearest ones. Torch-free.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import (
    Count,
    Decay,
    Fraction,
    NonNegative,
    Positive,
    Rate,
    Seed,
    Side,
    Steps,
    Text,
    Whole,
    fit,
    shown,
)

COMPONENT_NODES = ("model", "codec", "objective", "sampler")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
AverageKey = Literal["decay", "warmup", "every", "half_life", "ramp", "sigma_rel"]
TORCH_OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop", "adagrad", "adamax", "radam")


@dataclass
class Data:
    """`data:` where the images come from. size, channels and num_classes are read off the data when it is there."""

    path: str | None = None  # folder, .zip, .tar, .npz or a shipped set (`vgm ls datasets`); nothing trains without
    size: Side | None = None  # pixels per side; null: as found
    channels: Literal[1, 3] | None = None  # null: as found
    num_classes: Whole | None = None  # used only where there is no data to count (--plan)
    count: Count | None = None  # images in the set; used only where there is no data to count (--plan)
    crop: Literal["adm", "center", "random", "resize", "none"] = "adm"  # adm: the centre as ADM and DiT cut it
    decode: Literal["exact", "fast"] = "exact"  # fast: large JPEGs at 1/2, 1/4, 1/8 of their size, quick resampling
    hflip: bool = False  # random horizontal flips
    labels: bool | None = None  # null: use labels where the data has them
    split: str | None = None  # train | val | test where the set has them; shipped sets have fit, too: train without val
    workers: Annotated[int, Ge(0), Le(1024)] = 0  # loader processes for sets that do not fit in memory
    cache_latents: Text | bool = "auto"  # latents of a frozen codec: auto (memory if small), a folder, or false


@dataclass
class Optimizer:
    """`optimizer:` the default of every optimizer; `optimizers: {NAME: {...}}` changes one of them."""

    name: str = "adamw"  # one of TORCH_OPTIMIZERS, or an optimizer component
    lr: NonNegative = 1e-4  # learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # of Adam and its kin; SGD's momentum is the first
    eps: Positive = 1e-8  # added to Adam's denominator
    weight_decay: NonNegative = 0.0  # decoupled where the optimizer is AdamW
    final_weight_decay: NonNegative | None = None  # half a cosine from weight_decay to here over the run
    decay: Literal["all", "matrices", "linear"] = "all"  # matrices: no 1-D tensors; linear: layers' weights alone
    groups: list[dict[str, Any]] = field(default_factory=list)  # [{match: REGEX, lr: FACTOR, weight_decay: VALUE}], …
    warmup: Whole = 0  # steps of linear warm-up
    warmup_from: Fraction | None = None  # share of lr at the first step; null: 1 / warmup
    schedule: Literal["constant", "linear", "cosine", "steps"] = "constant"  # decay after the warm-up
    decay_from: Rate = 0.0  # linear, cosine: lr is constant up to this share of the run
    decay_in_warmup: bool = False  # linear, cosine: the decay begins at the first step, the warm-up hides its beginning
    final_lr: NonNegative = 0.0  # where linear and cosine end
    reach_final: bool = False  # true: the last step is at the end of every schedule; false: the step after it would be
    least_lr: NonNegative = 0.0  # linear, cosine: the rate never falls below
    milestones: dict[Whole, NonNegative] = field(default_factory=dict)  # steps: {STEP: factor on lr from there on}

    def parameter_groups(self, where: str = "optimizer") -> list[Group]:
        return [typed(Group, node, f"{where}.groups.{i}") for i, node in enumerate(self.groups)]

    def check(self, where: str) -> None:
        """VgmError: keys that do not go together, a pattern that is none."""
        for i, group in enumerate(self.parameter_groups(where)):
            try:
                re.compile(group.match)
            except re.error as e:
                text = f"{where}.groups.{i}.match={shown(group.match)} is no regular expression: {e}"
                raise VgmError(text, "example: match: 'norm|embed'", USAGE) from e
        if bool(self.milestones) != (self.schedule == "steps"):
            hint = "example: optimizer.schedule=steps optimizer.milestones={1000: 0.1}"
            raise VgmError(f"{where}: schedule=steps and milestones belong together", hint, USAGE)


@dataclass
class Group:
    """One of `optimizer.groups:`: the parameters whose dotted name (model.blocks.0.mlp.weight) the pattern is found in,
    unless an earlier group has them."""

    match: Text  # regular expression
    lr: NonNegative = 1.0  # factor on the optimizer's learning rate
    weight_decay: NonNegative | None = None  # in place of the optimizer's, whatever `decay` says; null: the optimizer's


@dataclass
class Skip:
    """`train.skip:` leave out an update whose gradients are an outlier; schedules and averages go on."""

    above: Positive  # the gradient norm from which on an update is left out
    after: Whole = 0  # steps at the beginning that are never left out
    norm: Literal["global", "sum"] = "global"  # of all gradients, or the sum of every tensor's; after clipping


@dataclass
class Train:
    """`train:` length, batch, precision, averaging, saving."""

    steps: Count = 10_000  # optimizer steps
    batch_size: Annotated[int, Ge(1), Le(10**6)] = 64  # images per optimizer step, over all processes and accumulation
    accumulate: Annotated[int, Ge(1), Le(10**6)] = 1  # micro-batches per step
    precision: Precision = "auto"  # auto: bf16 where the hardware has it
    compile: Literal["auto", "off", "on"] | bool = "auto"  # torch.compile; auto: on a GPU, for long runs
    checkpointing: bool = False  # recompute activations in backward
    channels_last: bool | None = None  # null: on where convolutions gain from it and the objective allows it
    clip: Positive | None = None  # gradient-norm limit
    skip: dict[str, Any] | None = None  # {above: NORM, after: STEPS, norm: global|sum}: leave out outlying updates
    ema: list[Decay | dict[AverageKey, NonNegative]] = field(default_factory=lambda: [0.9999])  # several at once
    seed: Seed = 0  # of initial weights, data order and every draw
    log_every: Whole | None = 50  # steps between log lines; 0 or null: only at the end
    save_every: Whole | None = 1000  # steps between checkpoints; 0 or null: only at the end
    keep: Whole = 3  # checkpoints kept, the newest among them; the newest always is
    preview_every: Whole | None = 1000  # steps between previews; 0 or null: none
    preview_n: Annotated[int, Ge(0), Le(10_000)] = 64  # images of a preview; 0: none
    fsdp: bool = False  # shard weights and optimizer over GPUs (FSDP2)

    def skip_rule(self) -> Skip | None:
        return typed(Skip, self.skip, "train.skip") if self.skip is not None else None


@dataclass
class Pairs:
    """A role of kind `pairs`: noise and the teacher's images for it, made before training and kept for the next run."""

    count: Annotated[int, Ge(1), Le(10**8)] = 2000
    sampler: str = "heun"  # deterministic: an image is a function of its noise
    steps: Steps = 25
    batch_size: Count = 64
    seed: Seed = 0
    cache: str | None = None  # folder; null: $VGM_CACHE or ~/.cache/vgm, below it pairs/


# what a role is besides a component: PAIRS, made before training; a checkpoint, `{run: RUN|FILE}`
PAIRS = "pairs"
CHECKPOINT = ("run", "sha256", "view")  # keys of a role that is a checkpoint
STARTS = {"distill": "teacher", "finetune-rl": "reference"}  # verb -> the role that its trained network takes
NODES: dict[str, type] = {"data": Data, "optimizer": Optimizer, "train": Train}
TOP = (
    "paper",
    "base",
    *COMPONENT_NODES,
    "conditions",
    "roles",
    "optimizers",
    "guidance_scale",
    "expect",
    "evaluate",
    *NODES,
)
NO_DATA_HINT = "data.path=FOLDER, or data.path=mnist5k for the digits that come with this package"


def typed(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from YAML values: unknown keys refused with the nearest names, values coerced by annotation."""
    if not isinstance(values, Mapping):
        raise not_a_mapping(where, values)
    known = keys_of(cls)
    for key in values:
        if key not in known:
            if hint := ELSEWHERE.get(key):
                raise VgmError(f"unknown key '{key}' in {where}", hint, USAGE)
            if node := next((n for n, other in NODES.items() if key in keys_of(other)), None):
                raise VgmError(f"unknown key '{key}' in {where}", f"did you mean {node}.{key}?", USAGE)
            raise unknown("key", key, known, where)
    none = dataclasses.MISSING
    required = [f.name for f in dataclasses.fields(cls) if f.default is none and f.default_factory is none]
    if missing := [name for name in required if name not in values]:
        raise VgmError(f"{where} needs {', '.join(missing)}", f"its keys: {', '.join(known)}", USAGE)
    return cls(**{k: fit(v, known[k], f"{where}.{k}") for k, v in values.items()})


@cache
def keys_of(cls: type) -> dict[str, Any]:
    """{key: type with its range} of a node's dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def check_average(config: float | Mapping[str, float]) -> dict[str, float]:
    """One of `train.ema` as a mapping. VgmError: not exactly one of decay, half_life and sigma_rel, or out of range."""
    own = dict(config) if isinstance(config, Mapping) else {"decay": float(config)}
    wrong = set(own) - set(typing.get_args(AverageKey))
    if wrong or sum(k in own for k in ("decay", "half_life", "sigma_rel")) != 1:
        raise VgmError(
            f"train.ema: {shown(config)} is no average",
            "a decay, or a mapping with decay [, warmup], half_life [, ramp] or sigma_rel, each with [, every]",
            USAGE,
        )
    for key, fits, wanted in (
        ("decay", 0 <= own.get("decay", 0) <= 1, "in [0, 1]"),
        ("half_life", own.get("half_life", 1) > 0, "above 0"),
        ("sigma_rel", 0 < own.get("sigma_rel", 0.1) < 0.28, "in (0, 0.28)"),
        ("every", own.get("every", 1) >= 1, "at least 1"),
        ("ramp", own.get("ramp", 1) > 0, "above 0"),
    ):
        if not fits:
            raise VgmError(f"train.ema: {key}={own[key]:g} must be {wanted}", code=USAGE)
    return own


def not_a_mapping(where: str, value: Any) -> VgmError:
    return VgmError(f"{where}={shown(value)} is not a mapping of keys to values", f"example: {where}.KEY=VALUE", USAGE)


# words of other programs, and what is meant here
ELSEWHERE = {
    "device": "--device cuda:0 (cpu, mps); a GPU is used where there is one",
    "gpus": "--nproc N trains on N GPUs of this machine",
    "epochs": "train.steps counts: epochs × images / train.batch_size",
    "max_steps": "did you mean train.steps?",
    "learning_rate": "did you mean optimizer.lr?",
    "grad_clip": "did you mean train.clip?",
    "gradient_accumulation_steps": "did you mean train.accumulate?",
    "mixed_precision": "did you mean train.precision?",
    "num_workers": "did you mean data.workers?",
    "root": "did you mean data.path?",
    "resolution": "did you mean data.size?",
    "image_size": "did you mean data.size?",
}
