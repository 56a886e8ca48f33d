"""Optimizers of a run: which parameters each has, their learning rates and weight decays at every step, the update.

A recipe's `optimizer:` node (recipe.Optimizer) says all of it; an objective's `schedule` comes on top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.api import Phase
from vgm_cli.engine.train import sharding
from vgm_cli.errors import FAILED, USAGE, VgmError, unknown
from vgm_cli.recipe import Recipe
from vgm_cli.registry import registry
from vgm_cli.settings import TORCH_OPTIMIZERS, Optimizer, Skip

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "exp_inf")
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
OLDER = "remove the checkpoint to resume from the one before"


# -- which parameters --------------------------------------------------------------------------------------------------


def part_of(networks: Mapping[str, nn.Module], name: str) -> nn.Module:
    """What a phase trains by this name: a role's network, or a part of it (model.control). VgmError: none is there."""
    role, _, rest = name.partition(".")
    if role not in networks:
        raise unknown("role", role, networks, "what the objective trains")
    try:
        return networks[role].get_submodule(rest)
    except AttributeError:
        parts = [n for n, _ in networks[role].named_children()]
        raise unknown(f"part of the {role}", rest, parts, "what the objective trains") from None


def trained(networks: Mapping[str, nn.Module], phases: Sequence[Phase]) -> dict[str, dict[str, nn.Parameter]]:
    """{name in Phase.trains: {dotted name: parameter}}: what may be trained of it."""
    return {
        name: {f"{name}.{n}": p for n, p in part_of(networks, name).named_parameters() if p.requires_grad}
        for name in sorted({n for phase in phases for n in phase.trains})
    }


def members(optimizer: str, phases: Sequence[Phase], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{dotted name: parameter} of one optimizer, each parameter once, however many of its phases train it."""
    names = sorted({n for phase in phases if phase.optimizer == optimizer for n in phase.trains})
    return {key: p for name in names for key, p in parts[name].items()}


@dataclass(frozen=True)
class Group:
    """Parameters that share their settings. lr: factor on the optimizer's rate. weight_decay: a number of their own;
    None: the optimizer's, which may change from step to step."""

    names: tuple[str, ...]
    lr: float = 1.0
    weight_decay: float | None = None


def group(params: Mapping[str, Tensor], setting: Optimizer, networks: Iterable[nn.Module] = ()) -> list[Group]:
    """The groups of an optimizer: those of `groups:`, a parameter belonging to the first that its dotted name matches,
    then the rest; in each, what `decay` leaves out of the weight decay apart. networks: whose linear and convolutional
    layers decay=linear means. VgmError: a pattern matches nothing."""
    linear = {id(m.weight) for network in networks for m in network.modules() if isinstance(m, LINEAR)}
    decays = {
        "all": lambda p: True,
        "matrices": lambda p: p.ndim >= 2,  # no norms, no biases
        "linear": lambda p: id(p) in linear,  # no embeddings either
    }[setting.decay]
    decayed = {n for n, p in params.items() if decays(p)}
    left, out = list(params), list[Group]()
    for i, node in enumerate(setting.parameter_groups()):
        names = [n for n in left if re.search(node.match, n)]
        if not any(re.search(node.match, n) for n in params):
            raise VgmError(
                f"optimizer.groups.{i}.match={node.match!r} matches no trained parameter",
                f"names look like {', '.join(list(params)[:3])}",
                USAGE,
            )
        out += split(names, node.lr, node.weight_decay, decayed)
        left = [n for n in left if n not in set(names)]
    return out + split(left, 1.0, None, decayed)


def split(names: Sequence[str], lr: float, weight_decay: float | None, decayed: set[str]) -> list[Group]:
    """One group, or two where the optimizer's weight decay is for some of the names alone."""
    if weight_decay is not None:
        return [Group(tuple(names), lr, weight_decay)] if names else []
    with_it = tuple(n for n in names if n in decayed)
    without = tuple(n for n in names if n not in decayed)
    return [g for g in (Group(with_it, lr), Group(without, lr, 0.0)) if g.names]


def check(recipe: Recipe, networks: Mapping[str, nn.Module], phases: Sequence[Phase]) -> None:
    """VgmError: a phase trains what is not there, an optimizer is named that no phase has, a group matches nothing."""
    parts = trained(networks, phases)
    known = {p.optimizer for p in phases}
    for name in recipe.config.get("optimizers") or {}:
        if name not in known and name not in (recipe.config.get("roles") or {}):  # a role that was set to null is known
            raise unknown("optimizer", name, known, "optimizers")
    for name in known:
        group(members(name, phases, parts), recipe.optimizer(name), networks.values())


# -- schedules ---------------------------------------------------------------------------------------------------------


def learning_rate(setting: Optimizer, index: int, total: int) -> float:
    """Learning rate of step `index` of `total`: a linear warm-up, then what `schedule` says.

    Warm-up: step i of w takes the share (i + 1) / w of lr; with warmup_from = f, f + (1 - f) i / w. The decay begins
    after the warm-up, or at the share decay_from of the run, and ends at final_lr behind the last step, or with
    reach_final at the last one. It never goes below least_lr. Steps: lr times the factor of the latest milestone.
    """
    if index < setting.warmup:
        if setting.warmup_from is None:
            return setting.lr * (index + 1) / setting.warmup
        return setting.lr * (setting.warmup_from + (1 - setting.warmup_from) * index / setting.warmup)
    if setting.schedule == "constant":
        return setting.lr
    if setting.schedule == "steps":
        passed = [step for step in setting.milestones if step <= index]
        return setting.lr * (setting.milestones[max(passed)] if passed else 1.0)
    end = total - setting.reach_final
    start = max(0.0 if setting.decay_in_warmup else float(setting.warmup), setting.decay_from * end)
    progress = min(1.0, max(0.0, (index - start) / max(end - start, 1e-9)))
    fall = 1 - progress if setting.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return max(setting.final_lr + (setting.lr - setting.final_lr) * fall, setting.least_lr)


def weight_decay(setting: Optimizer, index: int, total: int) -> float:
    """Weight decay of step `index`: constant, or half a cosine from weight_decay to final_weight_decay over the run."""
    if setting.final_weight_decay is None:
        return setting.weight_decay
    progress = min(1.0, index / max(total - setting.reach_final, 1))
    fall = (1 + math.cos(math.pi * progress)) / 2
    return setting.final_weight_decay + (setting.weight_decay - setting.final_weight_decay) * fall


# -- an optimizer at work ----------------------------------------------------------------------------------------------


class Optimizing:
    """One optimizer of a run: its wrapped root, its groups, and the update.

    root: what a phase calls for its loss. optimizer: torch's, over `groups` in their order. total: steps of the run.
    """

    def __init__(self, root: Any, optimizer: Any, groups: Sequence[Group], setting: Optimizer, total: int):
        self.root, self.optimizer, self.groups, self.setting, self.total = root, optimizer, groups, setting, total

    def begin(self, index: int, own: Mapping[str, float]) -> None:
        """Set the learning rates and weight decays of this step. own: what the objective asks for, {"lr": factor,
        "weight_decay": value}."""
        lr = learning_rate(self.setting, index, self.total) * own.get("lr", 1.0)
        decay = own.get("weight_decay", weight_decay(self.setting, index, self.total))
        for mine, theirs in zip(self.groups, self.optimizer.param_groups, strict=True):
            theirs["lr"] = lr * mine.lr
            theirs["weight_decay"] = decay if mine.weight_decay is None else mine.weight_decay

    def step(self, accelerator: Any, index: int, clip: float | None, skip: Skip | None) -> dict[str, Tensor]:
        """Clip the gradients, update the weights and clear the gradients; returns what to log.

        skip: the rule by which an update with outlying gradients is left out (`train.skip`), or None.
        """
        logs: dict[str, Tensor] = {}
        params = [p for p in self.root.parameters() if p.grad is not None]
        if clip is not None:
            norm = accelerator.clip_grad_norm_(self.root.parameters(), clip).detach()
            logs["grad_norm"] = sharding.full(norm)
        elif skip is not None:
            accelerator.unscale_gradients(self.optimizer)
        taken = True
        if skip is not None:
            norms = [sharding.full(torch.linalg.vector_norm(p.grad.detach())).float() for p in params]  # type: ignore[union-attr]
            found = torch.stack(norms)
            statistic = found.sum() if skip.norm == "sum" else torch.linalg.vector_norm(found)
            taken = index < skip.after or bool(statistic < skip.above)
            logs |= {"grad_statistic": statistic, "skipped": statistic.new_tensor(float(not taken))}
        if taken:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logs


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


# -- state -------------------------------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: Any, prefix: str) -> dict[str, Tensor]:
    """Optimizer state as named tensors: "<prefix><parameter index>.<entry>"."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}{i}.{k}": torch.as_tensor(v) for i, entries in state.items() for k, v in entries.items()}


def load_optimizer_tensors(optimizer: Any, tensors: Mapping[str, Tensor], prefix: str, file: Path) -> None:
    """Load what `optimizer_tensors` wrote. VgmError: entries of other parameters than this optimizer's."""
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
