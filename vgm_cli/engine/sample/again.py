"""`vgm rerun`: a picture made again from what its PNG remembers of how it was made."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from vgm_cli import atomic, foreign
from vgm_cli.data.decode import open_image
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.conditions import adopt_hints
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.sample.accept import Judge
from vgm_cli.engine.sample.given import given_pictures
from vgm_cli.engine.sample.loop import Plan
from vgm_cli.engine.sample.output import free_name, pictures, write_grid
from vgm_cli.engine.sample.setup import adopt_classes, adopt_conditions, open_model
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.images import Layout, read_png_metadata, save_png
from vgm_cli.registry import registry
from vgm_cli.ui import ui

REMEMBERED = ("model", "weights", "sha256", "step", "n", "seed", "labels", "steps", "guidance_scale")


def again_name(image: Path, item: bool) -> Path:
    """The default path of a picture that `vgm rerun` makes, outside of folders whose pictures are counted as
    samples."""
    if not item:
        return free_name(Path(f"{image.stem}-again.png"))
    folder = image.resolve().parent
    where = folder.with_name(f"{folder.name}-again")
    return free_name((Path(os.path.relpath(where)) if not image.is_absolute() else where) / image.name)


def rerun(image: Path, out: Path | None, device_name: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Make the same picture again from what the PNG remembers, and say whether every pixel agrees.

    VgmError: no provenance, or something lies where it would go (2), other weights than then (1).
    """
    if not image.is_file():
        raise VgmError(f"no such image: {image}", code=USAGE)
    try:
        remembered = read_png_metadata(image)
        s = json.loads(remembered["vgm"])
    except (KeyError, ValueError, OSError, SyntaxError, RecursionError) as e:
        raise VgmError(f"{image} does not say how it was made", "PNGs of `vgm sample` do", USAGE) from e
    if isinstance(s, dict) and not s.get("sampler"):
        raise VgmError(f"{image} was made by vgm {s.get('command', '?')}", "PNGs of `vgm sample` are made again", USAGE)
    foreign.check(s, "picture", image)
    missing = [k for k in REMEMBERED if k not in s]
    item = remembered.get("vgm.item")
    if missing or not (item or "0").isdecimal() or int(item or 0) >= s["n"]:
        raise VgmError(f"{image} does not say its {missing[0] if missing else 'item'}", code=FAILED)
    target = out or again_name(image, item is not None)
    if target.suffix.lower() != ".png":
        raise VgmError(f"--out {target}: a picture made again is a .png", code=USAGE)
    if target.resolve() == image.resolve():
        raise VgmError(f"{target} is the picture itself", "name another --out", USAGE)
    atomic.refuse_existing(target, overwrite)
    registry().note(s, str(image))
    foreign.tell_files(s["sampler"], image)
    path = ckpt.resolve(s["model"], s["weights"])
    ui.info(f"model: {path}, as {image} says")
    if ckpt.file_hash(path) != s["sha256"]:
        raise VgmError(f"{path} holds other weights than {image} was made with (step {s['step']})", code=FAILED)
    loaded, device = open_model(str(path), None, device_name)
    if s.get("input"):
        ui.info(f"input: {s['input']}, as {image} says")
    interval = tuple(s["guidance_interval"]) if s.get("guidance_interval") else None
    steps = s["steps"] if "steps" in s.get("asked", ["steps"]) else None
    told, words = loaded.conditions, s.get("words") or {}
    foreign.tell_files([words, s.get("conditions")], image)
    adopt_conditions(loaded, dict(s.get("conditions") or {}), ())
    sampler = generate.build_sampler(s["sampler"], device, loaded.roles)
    adopt_classes(loaded, sampler)
    start = given_pictures(loaded, sampler, s["input"], s.get("mask"), s["n"]) if s.get("input") else None
    adopt_hints(loaded.conditions, sampler)
    items = {name: told.parts[name].condition.parse(own) for name, own in words.items() if name in told.parts}
    if (part := told.of_column("label")) is not None and s["labels"]:
        items[part.name] = part.condition.parse(list(map(str, s["labels"])))
    items |= start.items(told) if start is not None else {}
    given = generate.items_for(told, s["n"], items)
    plan = Plan(n=s["n"], seed=s["seed"], given=given, labels=generate.labels_in(told, given), words=words,
                negative=s.get("negative") or {}, sampler=s["sampler"], steps=steps, pictures=start,
                guidance_scale=s["guidance_scale"], guidance_interval=interval, precision=s.get("precision", "fp32"),
                judge=Judge(s["accept"]["candidates"], s["accept"]["judge"]) if s.get("accept") else None,
                batch_size=s.get("batch_size", 64), roles=loaded.roles)  # fmt: skip
    if item is None:
        known = remembered.get("vgm.grid")
        layout = Layout.parse(known) if known else Layout(plain_columns(plan, loaded))
        write_grid(loaded, plan, target, device, {"vgm": remembered["vgm"]}, {}, None, layout)
    else:
        first = int(item) // plan.batch_size * plan.batch_size
        batch = pictures(loaded, plan, first, min(first + plan.batch_size, plan.n), device, {})
        save_png(batch[int(item) - first], target, remembered)
    with open_image(image) as a, open_image(target) as b:
        x, y = np.asarray(a).astype(int), np.asarray(b).astype(int)
    same = x.shape == y.shape and bool((x == y).all())
    return {"image": str(image), "again": str(target), "identical": same,
            "largest_difference": int(abs(x - y).max()) if x.shape == y.shape else None}  # fmt: skip


def plain_columns(plan: Plan, loaded: Loaded) -> int:
    """Columns of a grid that states no layout: one per class where they fit, else near a square."""
    classes = min(len(set(plan.labels)), loaded.header.data.get("num_classes") or 0)
    return classes if 2 <= classes <= 20 and plan.n >= classes else math.ceil(math.sqrt(plan.n))
