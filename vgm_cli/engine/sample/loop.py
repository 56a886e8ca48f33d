"""Sampling: a loaded network, a sampler and one seed per item in; images out.

Sample i depends on (seed, i) alone, not on the batch size nor on the number of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.api import FinishesImages, Request, TakesSteps, generators, seed_of
from vgm_cli.conditioning import Conditions
from vgm_cli.data import Dataset
from vgm_cli.data.latents import to_model
from vgm_cli.engine.checkpoint import Loaded, load
from vgm_cli.engine.conditions import followed
from vgm_cli.engine.sample.accept import Judge
from vgm_cli.engine.sample.given import Given
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.images import Layout, compared, layout_of, save_grid, save_png
from vgm_cli.ranges import fit
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.ui import Progress, ui

OPTIONAL = ("steps", "guidance_scale", "guidance_interval", "images")  # of a Request; not every sampler uses them


@dataclass
class Plan:
    """A sampling job: how many items, of what, by which sampler. `stream` carries it out."""

    n: int  # number of items
    seed: int = 0  # item i draws from a stream of (seed, i)
    given: dict[str, Sequence[Any]] = field(default_factory=dict)  # {condition: one item for each image}
    labels: list[int] = field(default_factory=list)  # the classes among them; empty where there are none
    words: dict[str, list[str]] = field(default_factory=dict)  # {condition: what the user typed}, for the records
    negative: dict[str, list[str]] = field(default_factory=dict)  # what to be guided away from, as typed
    conditions: dict[str, Any] = field(default_factory=dict)  # keywords of conditions set anew: conditions.NAME.KEY
    sampler: dict[str, Any] = field(default_factory=dict)  # its component node
    steps: int | None = None  # None: the sampler's own
    guidance_scale: float | None = None  # None: the sampler's own
    guidance_interval: tuple[float, float] | None = None  # host times between which to guide
    batch_size: int = 64
    pictures: Given | None = None  # to start from
    precision: str = "fp32"  # or bf16: autocast of networks and codec
    named: tuple[str, ...] = ()  # options that the user gave; `stream` reports which had no effect
    judge: Judge | None = None  # chooses among several candidates for every image
    built: Any = field(default=None, repr=False, compare=False)  # the sampler, see `build`
    roles: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # see Loaded.roles

    def build(self, device: torch.device | str) -> Any:
        """The sampler; made at the first call, then kept."""
        if self.built is None:
            self.built = build_sampler(self.sampler, device, self.roles)
        return self.built

    def first(self, n: int) -> Plan:
        """The same plan for its first n items alone."""
        given = {name: items[:n] for name, items in self.given.items()}
        return replace(self, n=min(n, self.n), given=given, labels=self.labels[:n])

    def period(self) -> int:
        """The number of items after which labels repeat, by which grids arrange them; n where they do not repeat, 0
        without labels."""
        rows = list(zip(*self.given.values()))  # items are compared: a picture by its pixels
        return next((k for k in range(1, self.n) if rows[k:] == rows[:-k]), self.n) if rows else 0

    def asked(self) -> dict[str, Any]:
        """What the user typed besides labels, for the records; nothing where it is nothing."""
        said = {"words": self.words, "negative": self.negative, "conditions": self.conditions}
        said["accept"] = self.judge.described() if self.judge else {}
        return {k: v for k, v in said.items() if v}

    def settings(self, device: torch.device | str) -> dict[str, Any]:
        """Sampler, steps and guidance as they count: steps of a sampler that takes none, guidance without conditions,
        and an interval without guidance are None. asked: what the user named."""
        sampler, steps = self.build(device), None
        if isinstance(sampler, TakesSteps):
            steps = sampler.steps if self.steps is None else self.steps
        scale = self.guidance_scale if self.given else None
        return {
            "sampler": {**self.sampler, "steps": steps} if "steps" in self.sampler else self.sampler,
            "steps": steps,
            "guidance_scale": scale,
            "guidance_interval": None if scale in (None, 1) else self.guidance_interval,
            "asked": list(self.named),
        }

    def seeds(self, first: int, last: int, candidate: int = 0) -> list[int]:
        """Of the items first to last; every candidate for an item has its own."""
        more = (candidate,) if candidate else ()
        return [seed_of("sample", self.seed, i, *more) for i in range(first, last)]


class Watched(Request):
    """A request that remembers which of its optional settings the sampler read, so that settings without effect can
    be told."""

    def __getattribute__(self, name: str) -> Any:
        if name in OPTIONAL:
            object.__getattribute__(self, "__dict__").setdefault("seen", set()).add(name)
        return object.__getattribute__(self, name)

    def ignored(self, names: Sequence[str]) -> list[str]:
        """Those of the names that the sampler never read."""
        seen = self.__dict__.get("seen", set())
        return [k for k in names if k not in seen or (k.startswith("guidance") and not self.cond)]


def items_for(
    conditions: Conditions, n: int, items: Mapping[str, Sequence[Any]] | None = None, table: Any = None
) -> dict[str, Sequence[Any]]:
    """{condition: an item for each of n images}: the given items in turn, or all that there are. table: a sampler whose
    images make one: an item for each of its columns, or of its rows where it says so.

    VgmError: a condition without items, such as a text, of which none is given.
    """
    columns = (table.grid_columns if table is not None else None) or max(n, 1)
    by_row = table is not None and table.grid_labels == "rows"
    places = [i // columns if by_row else i % columns for i in range(n)]
    return {name: part.in_turn(places, (items or {}).get(name, ())) for name, part in conditions.parts.items()}


def labels_in(conditions: Conditions, given: Mapping[str, Sequence[Any]]) -> list[int]:
    """The classes among the items of `items_for`; [] where there are none."""
    part = conditions.of_column("label")
    return list(given[part.name]) if part is not None else []


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
    """The context of sampling in "bf16" or "fp32"; the latter leaves the caller's setting as it is."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def build_sampler(node: Mapping[str, Any], device: torch.device | str, given: Mapping[str, Any] | None = None) -> Any:
    """The sampler of a node. Networks that guide it are runs or files: `classifier`, of noisy images, and
    `autoguidance`, a worse version of what is sampled; `also`, others whose maps are added. given: see
    Loaded.roles."""
    node = dict(node)
    roles: dict[str, Any] = dict(given or {})
    component, _ = registry().config("sampler", node)
    if "also" in signature(load_target(component.target, component.name)).parameters and node.get("also"):
        also = node.pop("also")
        runs = fit([also] if isinstance(also, str) else also, list[str], "sampler.also")
        roles["also"] = [load(run, device=device) for run in runs]
    for role, part in (("classifier", "model"), ("autoguidance", "view")):
        if isinstance(node.get(role), str):
            roles[role] = getattr(load(node.pop(role), device=device), part)
    return registry().build("sampler", node, **roles)


def stream(
    loaded: Loaded,
    plan: Plan,
    device: torch.device | str = "cpu",
    first: int = 0,
    last: int | None = None,
    callback: Any = None,
    info: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches of images (B, C, H, W) about [-1, 1] with their labels, items first..last of the plan. progress: told of
    every step that the sampler tells of, in images. VgmError: samples that are not finite."""
    sampler = plan.build(device)
    shape = tuple(loaded.header.data.get("sample_shape") or ())
    if not shape:
        raise VgmError(f"{loaded.path} does not say the shape of a sample", code=USAGE)
    last = plan.n if last is None else last
    for start in range(first, last, plan.batch_size):
        stop = min(start + plan.batch_size, last)
        at = torch.device(device)
        items = {name: own[start:stop] for name, own in plan.given.items()}
        cond = loaded.conditions.encode(items, at)
        count = plan.judge.candidates if plan.judge else 1
        best: tuple[Tensor, Tensor] | None = None
        for k in range(count):
            size = (stop - start) / count
            request = Watched(
                shape=shape,
                generators=generators(plan.seeds(start, stop, k)),
                cond=cond,
                null=loaded.conditions.null(at, plan.negative) if cond else {},
                steps=plan.steps,
                guidance_scale=plan.guidance_scale if cond else None,
                guidance_interval=plan.guidance_interval,
                device=at,
                callback=each_step(callback, progress, start + k * size, size),
                index=list(range(start, stop)),
                **(plan.pictures.of_request(range(start, stop)) if plan.pictures else {}),
                codec=loaded.codec,
                asked=loaded.conditions.asked(items),
            )
            before = [g.get_state() for g in request.generators[:1]]
            x = made(loaded, plan, sampler, request)
            x = plan.pictures.pasted(x, range(start, stop)) if plan.pictures else x
            refuse_non_finite(x, start)
            if plan.judge:
                best = plan.judge.better(best, x, request.asked)
        if progress is not None:
            progress.update(stop, "")
        if info is not None:
            info.update(request.info)
            ignored = request.ignored([k for k in plan.named if k in OPTIONAL])
            if "seed" in plan.named and torch.equal(before[0], request.generators[0].get_state()):
                ignored.append("seed")
            if ignored:
                info["ignored"] = ignored
        if plan.judge and best is not None:
            x, said = best
            report = plan.judge.report(said)
            if info is not None:
                info["accepted"] = report
        yield x.float(), plan.labels[start:stop]


def made(loaded: Loaded, plan: Plan, sampler: Any, request: Request) -> Tensor:
    """What the sampler makes of a request, decoded: (B, C, H, W). VgmError: the network has not what it asks for."""
    with torch.no_grad(), autocast(plan.precision, request.device):
        try:
            z = sampler(loaded.view, request)
        except AttributeError as e:
            if getattr(e, "obj", None) is not loaded.view:
                raise
            name, network = plan.sampler.get("name"), loaded.header.component.get("name")
            text = f"the sampler {name} asks for '{e.name}', which {network} does not have"
            raise VgmError(text, "`vgm ls samplers` shows others", USAGE) from e
        x: Tensor = z if loaded.codec is None else loaded.codec.decode(z.float() if z.is_floating_point() else z)
        return sampler.finish(x, request) if isinstance(sampler, FinishesImages) else x


Callback = Callable[[int, int, Tensor, Tensor | None], None]


def each_step(callback: Callback | None, progress: Progress | None, done: float, size: float) -> Callback | None:
    """A callback for a request that calls `callback` and moves the progress by this batch's `size` items, `done` of
    them being finished before."""
    if progress is None:
        return callback

    def on_step(i: int, total: int, x: Tensor, x0: Tensor | None) -> None:
        at = min(i + 1, total)  # adaptive solvers take as many as they need
        progress.update(done + size * at / max(total, 1), f"step {at}/{total}")
        if callback is not None:
            callback(i, total, x, x0)

    return on_step


def refuse_non_finite(x: Tensor, first: int = 0, hint: str = "") -> None:
    """VgmError (exit code 1): images (B, ...) of which some hold NaN or infinity; the first is number `first`."""
    good = torch.isfinite(x).flatten(1).all(1)
    if not bool(good.all()):
        bad = (~good).nonzero().flatten().tolist()
        hint = hint or "weights that are not finite, or a sampler, a guidance or a precision that they do not stand"
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise VgmError(f"image {first + bad[0]}{more} came out as NaN or infinity, and is not written", hint, FAILED)


def sample(
    loaded: Loaded,
    plan: Plan,
    device: torch.device | str = "cpu",
    progress: Any = None,
    info: dict[str, Any] | None = None,
) -> tuple[Tensor, list[int]]:
    """All images of a plan at once: (N, C, H, W), labels."""
    images, labels = [], []
    for x, y in stream(loaded, plan, device, info=info, progress=progress):
        images.append(x.cpu())
        labels += y
    return torch.cat(images), labels


# -- pictures of a run -----------------------------------------------------------------------------------------------


def preview(loaded: Loaded, recipe: Any, path: Path, n: int, device: torch.device, feed: Any = None) -> None:
    """A run's picture at one step, and a side-car JSON: samples of fixed seeds and conditions (texts and pictures are
    those of the data); of a codec, which draws
    nothing, training images above their reconstructions. Samples that are not finite are told of, not shown."""
    config, began = recipe.config, time.perf_counter()
    if config.get("sampler") is None:
        if loaded.header.is_codec and feed is not None:
            reconstructions(loaded.model, real_images(feed, n), path, device)
        return
    conditions = loaded.conditions
    given = items_for(conditions, n, {} if feed is None else feed.items(conditions, n))
    plan = Plan(
        n=n,
        given=given,
        labels=labels_in(conditions, given),
        sampler=sampler_node(config),
        guidance_scale=config.get("guidance_scale"),
        roles=loaded.roles,
    )
    try:
        x, _ = sample(loaded, plan, device)
    except VgmError as e:
        if e.code != FAILED:
            raise
        ui.warn(f"no preview: {e.message}")
        return
    if rows := followed(conditions, given, x):
        save_png(compared({**rows, "sample": x}), path)
    else:
        save_grid(x, path, layout=layout(plan, x, device))
    facts = {k: v for k, v in plan.settings(device).items() if k != "asked"}
    seconds = round(time.perf_counter() - began, 2)
    atomic.write_json(path.with_suffix(".json"), {"labels": plan.labels, **facts, "seed": 0, "seconds": seconds})


@torch.no_grad()
def reconstructions(codec: Any, x: Tensor, path: Path, device: torch.device) -> None:
    """Images (N, C, H, W) above what the codec makes of them, from the mode of its posterior."""
    again = torch.cat(
        [codec.decode(codec.latents(codec.encode(part.to(device)))).float().cpu() for part in x.split(16)]
    )
    mse = float(((again.clamp(-1, 1) - x) ** 2).mean()) / 4
    save_png(compared({"input": x, "output": again}), path)
    psnr = round(-10 * math.log10(mse), 2) if mse > 0 and math.isfinite(mse) else None
    atomic.write_json(path.with_suffix(".json"), {"n": len(x), "psnr": psnr})


@torch.no_grad()
def real_images(feed: Any, n: int) -> Tensor:
    """n images spread over what a run trains on, as its model sees them: (N, C, H, W) in [-1, 1], on the CPU."""
    n = min(n, len(feed.dataset))
    chosen = [i * len(feed.dataset) // n for i in range(n)]
    if isinstance(feed.dataset, Dataset):
        return feed.dataset.pixels(chosen)  # type: ignore[no-any-return]
    moments = feed.dataset.gather(chosen)["moments"].to(feed.device)
    return feed.codec.decode(to_model(feed.codec, moments, drawn=feed.drawn)).float().cpu()  # type: ignore[no-any-return]


def reals(feed: Any, path: Path, n: int) -> None:
    """Save a grid of n training images to `path`, for comparison with samples. Nothing is saved for feeds without
    images."""
    if n and feed.dataset is not None:
        save_grid(real_images(feed, n), path)


def layout(plan: Plan, x: Tensor, device: torch.device | str) -> Layout:
    """The Layout of a plan's grid of images x: the sampler's own columns where its items make a table; else near a
    square in which items of one class (or those that the sampler keeps together) stand under one another."""
    sampler = plan.build(device)
    return layout_of(x, sampler.grid_columns, sampler.grid_period or plan.period())


def provenance(loaded: Loaded, plan: Plan, target: str, device: torch.device | str = "cpu") -> dict[str, str]:
    """What a PNG stores about how it was made, from which `vgm rerun` makes it again."""
    from vgm_cli import __version__

    settings = {
        "version": __version__,
        "model": target,
        "weights": loaded.header.weights,
        "step": loaded.header.step,
        "n": plan.n,
        "seed": plan.seed,
        "labels": plan.labels,
        **plan.asked(),
        **plan.settings(device),
        "input": plan.pictures.source if plan.pictures else None,
        **({"mask": plan.pictures.mask} if plan.pictures and plan.pictures.mask else {}),
        "precision": plan.precision,
        "batch_size": plan.batch_size,
        "sha256": loaded.sha256(),
    }
    return {"vgm": atomic.dump_json(settings)}
