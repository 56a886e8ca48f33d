"""The folder that a restoration leaves: pictures, a grid, measurements, what was drawn, residuals and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vgm_cli import __version__, atomic
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.restore.inputs import Inputs
from vgm_cli.engine.restore.setup import Settings
from vgm_cli.engine.sample.output import free_name
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import compared, save_png, to_uint8

GRID_ITEMS = 32  # items shown in the grid


@dataclass
class Restored:
    """Everything of N items. images, pictures (of what is degraded): (N, C, H, W) in [-1, 1]. curve: (steps, N)."""

    images: Tensor
    pictures: Tensor
    measured: Tensor
    baseline: Tensor | None
    residual: Tensor  # (N,) |y - A(image)|
    curve: Tensor
    state: dict[str, Tensor]
    stage1: Tensor | None = None  # what a method of two stages makes first, like images
    info: dict[str, Any] = field(default_factory=dict)


WRITTEN = (
    "restored",
    "degraded",
    "stage1",
    "grid.png",
    "measurements.npz",
    "drawn.safetensors",
    "residual.jsonl",
    "results.json",
)


def default_folder(loaded: Loaded, settings: Settings, seed: int, steps: int | None) -> Path:
    """In restored/ of the run, or of the working folder, named by how it is made; a number where the name is taken."""
    run = next((p for p in loaded.path.resolve().parents if (p / "config.yaml").exists()), None)
    made = [settings.task["name"], settings.method["name"], *([f"{steps}steps"] if steps else []), f"seed{seed}"]
    return free_name((run or Path.cwd()) / "restored" / "-".join(made))


def check_folder(folder: Path, overwrite: bool) -> None:
    """VgmError: something is there that may not be replaced, or that no restoration wrote."""
    if folder.exists() and not folder.is_dir():
        raise VgmError(f"{folder} is a file", "--out names a folder", USAGE)
    atomic.refuse_existing(folder, overwrite)
    others = sorted(p.name for p in folder.iterdir() if p.name not in WRITTEN) if folder.is_dir() else []
    if others:
        text = f"{folder} holds what vgm restore did not write ({', '.join(others[:3])}), so --overwrite leaves it"
        raise VgmError(text, "choose another --out", USAGE)


def write(
    folder: Path, done: Restored, inputs: Inputs, record: dict[str, Any], measures: Mapping[str, Any]
) -> dict[str, Any]:
    """restored/*.png, degraded/*.png, grid.png, measurements.npz, what was drawn, residual.jsonl, results.json: the
    whole folder takes its name at the end."""
    results = {**record, **measures, "residual_curve": [float(r.mean()) for r in done.curve], "out": str(folder)}
    with atomic.replacing_folder(folder) as temp:
        write_records(temp, done, inputs, record)
        atomic.write_json(temp / "results.json", results)
    return results


def write_records(folder: Path, done: Restored, inputs: Inputs, record: dict[str, Any]) -> None:
    meta = {"vgm": atomic.dump_json({"version": __version__, "command": "restore", **record})}
    names = [f"{i:06d}.png" for i in range(len(inputs))]
    parts = {"degraded": done.pictures, "stage1": done.stage1, "restored": done.images}
    rows = {name: x for name, x in parts.items() if x is not None}
    for part, x in rows.items():
        for i, image in enumerate(to_uint8(x).permute(0, 2, 3, 1).numpy()):
            save_png(image, folder / part / names[i], {**meta, "vgm.item": str(i)})
    if inputs.truth is not None:
        rows["truth"] = inputs.truth
    save_png(compared(rows, GRID_ITEMS), folder / "grid.png", meta)
    with atomic.replacing(folder / "measurements.npz") as temp, open(temp, "wb") as f:
        np.savez(f, y=done.measured.numpy())
    if done.state:
        atomic.save_safetensors({k: v.contiguous() for k, v in done.state.items()}, folder / "drawn.safetensors", meta)
    lines = [
        atomic.dump_json({"step": i, "mean": float(row.mean()), "values": [round(float(v), 6) for v in row]})
        for i, row in enumerate(done.curve)
    ]
    atomic.write_text(folder / "residual.jsonl", "".join(line + "\n" for line in lines))
