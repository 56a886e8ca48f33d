"""Sampling: a loaded network, a sampler and per-item seeds in; images out. Sample i depends on (seed, i) alone, not on
the batch size nor on the number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.api import Request, generators, seed_of
from vgm_cli.engine.checkpoint import Loaded, load
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import save_grid
from vgm_cli.registry import registry

OPTIONAL = ("steps", "guidance_scale", "guidance_interval")  # of a Request; not every sampler has a use for them


@dataclass
class Plan:
    """What to sample. labels: one per item, or empty for an unconditional network. images: see api.Request; source: the
    data they were read from. precision: fp32, or bf16 autocast of networks and codec. named: those of OPTIONAL that the
    user gave; `stream` reports which had no effect."""

    n: int
    seed: int = 0
    labels: list[int] = field(default_factory=list)
    sampler: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    batch_size: int = 64
    images: Tensor | None = None
    source: str | None = None
    precision: str = "fp32"
    named: tuple[str, ...] = ()

    def seeds(self, first: int, last: int) -> list[int]:
        return [seed_of("sample", self.seed, i) for i in range(first, last)]


class Watched(Request):
    """A request that remembers which of its optional settings were looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in OPTIONAL:
            object.__getattribute__(self, "__dict__").setdefault("seen", set()).add(name)
        return object.__getattribute__(self, name)

    def ignored(self, names: Sequence[str]) -> list[str]:
        """Those of the names that had no effect."""
        seen = self.__dict__.get("seen", set())
        return [k for k in names if k not in seen or (k.startswith("guidance") and not self.cond)]


def class_labels(n: int, num_classes: int, wanted: Sequence[int] = ()) -> list[int]:
    """Labels for n items: the wanted ones in turn, or every class in turn; [] for an unconditional network."""
    if not num_classes:
        if wanted:
            raise VgmError("this network is unconditional, it takes no labels", code=USAGE)
        return []
    for w in wanted:
        if not 0 <= w < num_classes:
            raise VgmError(f"label {w} does not exist", f"labels are 0 to {num_classes - 1}", USAGE)
    cycle = list(wanted) or list(range(num_classes))
    return [cycle[i % len(cycle)] for i in range(n)]


def class_numbers(names: Sequence[str], loaded: Loaded) -> list[int]:
    """'3,7' or class names -> label numbers."""
    known = loaded.header.data.get("class_names") or []
    out = []
    for name in names:
        if name.lstrip("-").isdigit() and name not in known:
            out.append(int(name))
        elif name in known:
            out.append(known.index(name))
        else:
            from vgm_cli.errors import unknown

            raise unknown("class", name, known)
    return out


def sampler_node(
    recipe: Mapping[str, Any], name: str | None = None, own: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The recipe's sampler, or another by name; `own` are KEY=VALUE overrides of its keywords."""
    node = dict(recipe.get("sampler") or {})
    if name is not None and name != node.get("name"):
        node = {"name": name}
    if not node:
        raise VgmError("this checkpoint names no sampler", "choose one with --sampler; `vgm ls samplers`", USAGE)
    return {**node, **(own or {})}


def autocast(precision: str, device: torch.device) -> Any:
    """fp32: whatever the caller has set."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def build_sampler(node: Mapping[str, Any], device: torch.device | str) -> Any:
    """The sampler of a node. `classifier: RUN|FILE` is the network that guides it."""
    node = dict(node)
    roles: dict[str, Any] = {}
    if isinstance(node.get("classifier"), str):
        roles["classifier"] = load(node.pop("classifier"), device=device).model
    return registry().build("sampler", node, **roles)


def stream(
    loaded: Loaded,
    plan: Plan,
    device: torch.device | str = "cpu",
    first: int = 0,
    last: int | None = None,
    callback: Any = None,
    info: dict[str, Any] | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches of images (B, C, H, W) about [-1, 1] with their labels, items first..last of the plan."""
    sampler = build_sampler(plan.sampler, device)
    shape = tuple(loaded.header.data.get("sample_shape") or ())
    if not shape:
        raise VgmError(f"{loaded.path} does not say the shape of a sample", code=USAGE)
    last = plan.n if last is None else last
    for start in range(first, last, plan.batch_size):
        stop = min(start + plan.batch_size, last)
        labels = plan.labels[start:stop]
        cond = {"y": torch.tensor(labels, device=device)} if labels else {}
        request = Watched(
            shape=shape,
            generators=generators(plan.seeds(start, stop)),
            cond=cond,
            steps=plan.steps,
            guidance_scale=plan.guidance_scale if labels else None,
            guidance_interval=plan.guidance_interval,
            device=torch.device(device),
            callback=callback,
            index=list(range(start, stop)),
            images=plan.images,
            codec=loaded.codec,
        )
        with torch.no_grad(), autocast(plan.precision, request.device):
            try:
                z = sampler(loaded.view, request)
            except AttributeError as e:
                if getattr(e, "obj", None) is not loaded.view:
                    raise
                name, network = plan.sampler.get("name"), loaded.header.component.get("name")
                text = f"the sampler {name} asks for '{e.name}', which {network} does not have"
                raise VgmError(text, "`vgm ls samplers` shows others", USAGE) from e
            x = z if loaded.codec is None else loaded.codec.decode(z.float() if z.is_floating_point() else z)
        if info is not None:
            info.update(request.info)
            if ignored := request.ignored(plan.named):
                info["ignored"] = ignored
        yield x.float(), labels


def sample(
    loaded: Loaded,
    plan: Plan,
    device: torch.device | str = "cpu",
    progress: Any = None,
    info: dict[str, Any] | None = None,
) -> tuple[Tensor, list[int]]:
    """All images of a plan at once: (N, C, H, W), labels."""
    images, labels = [], []
    for x, y in stream(loaded, plan, device, info=info):
        images.append(x.cpu())
        labels += y
        if progress is not None:
            progress.update(sum(len(i) for i in images))
    return torch.cat(images), labels


def preview(loaded: Loaded, recipe: Any, path: Path, n: int, device: torch.device) -> None:
    """A run's grid: fixed seeds, classes in columns, side-car JSON with labels and settings."""
    config = recipe.config
    if loaded.header.component.get("kind") == "codec" or config.get("sampler") is None:
        return
    labels = class_labels(n, loaded.header.data.get("num_classes") or 0)
    plan = Plan(n=n, seed=0, labels=labels, sampler=sampler_node(config), guidance_scale=config.get("guidance_scale"))
    began = time.perf_counter()
    x, _ = sample(loaded, plan, device)
    save_grid(x, path, nrow=grid_columns(n, loaded.header.data.get("num_classes") or 0))
    atomic.write_json(
        path.with_suffix(".json"),
        {
            "labels": labels,
            "sampler": plan.sampler,
            "guidance_scale": plan.guidance_scale,
            "seed": 0,
            "seconds": round(time.perf_counter() - began, 2),
        },
    )


def grid_columns(n: int, num_classes: int) -> int:
    """One class per column where they fit, else a square."""
    return num_classes if 2 <= num_classes <= 20 and n >= num_classes else math.ceil(math.sqrt(n))


def provenance(loaded: Loaded, plan: Plan, target: str) -> dict[str, str]:
    """What a PNG remembers of how it was made."""
    from vgm_cli import __version__

    settings = {
        "version": __version__,
        "model": target,
        "weights": loaded.header.weights,
        "step": loaded.header.step,
        "n": plan.n,
        "seed": plan.seed,
        "labels": plan.labels,
        "sampler": plan.sampler,
        "steps": plan.steps,
        "guidance_scale": plan.guidance_scale,
        "guidance_interval": plan.guidance_interval,
        "input": plan.source,
        "precision": plan.precision,
        "batch_size": plan.batch_size,
        "sha256": loaded.sha256(),
    }
    return {"vgm": atomic.dump_json(settings)}
