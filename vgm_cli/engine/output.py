"""Where samples go: one grid, a folder of PNGs (continued if interrupted), or an ADM-layout .npz."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from vgm_cli.engine import generate
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.generate import Plan
from vgm_cli.engine.sampling import autocast
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import save_grid, save_png, to_uint8, write_npz


def default_target(loaded: Loaded, model: str, plan: Plan) -> Path:
    """samples/ of the run, or beside the file, named by what it holds."""
    path = loaded.path.resolve()
    run = next((p for p in path.parents if (p / "config.yaml").exists()), None)
    scale = "" if plan.guidance_scale in (None, 1) or not plan.labels else f"-w{plan.guidance_scale:g}"
    name = f"sample-{loaded.header.step:06d}-seed{plan.seed}{scale}.png"
    return (run / "samples" if run else Path.cwd()) / name


def write(
    loaded: Loaded,
    plan: Plan,
    target: Path,
    model: str,
    device: torch.device,
    progress: Any = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Sample the plan into `target` and return what was done (n, seconds, NFE, path)."""
    began = time.perf_counter()
    info: dict[str, Any] = {}
    suffix = target.suffix.lower()
    if suffix not in (".png", ".npz", ""):
        raise VgmError(f"--out {target}: unknown kind of output", "grid.png, x.npz (ADM layout) or a folder", USAGE)
    meta = generate.provenance(loaded, plan, model)
    done = plan.n
    with autocast(precision, device):
        if suffix == "":
            done = write_folder(loaded, plan, target, device, meta, info, progress)
        else:
            x, labels = generate.sample(loaded, plan, device, progress, info)
            if suffix == ".png":
                target.parent.mkdir(parents=True, exist_ok=True)
                classes = loaded.header.data.get("num_classes") or 0
                own = len(set(plan.labels)) if plan.labels else 0
                save_grid(
                    x, target, nrow=generate.grid_columns(plan.n, own if own < classes else classes), metadata=meta
                )
            else:
                write_npz(target, to_uint8(x).permute(0, 2, 3, 1).numpy(), labels or None)
    seconds = time.perf_counter() - began
    return {
        "out": str(target),
        "n": plan.n,
        "seconds": round(seconds, 3),
        "images_per_second": round(done / max(seconds, 1e-9), 3),
        "weights": loaded.header.weights,
        "step": loaded.header.step,
        "seed": plan.seed,
        "sampler": plan.sampler,
        "guidance_scale": plan.guidance_scale,
        **info,
    }


def write_folder(
    loaded: Loaded,
    plan: Plan,
    folder: Path,
    device: torch.device,
    meta: dict[str, str],
    info: dict[str, Any],
    progress: Any,
) -> int:
    """000000.png … ; files already there are kept, so an interrupted job goes on. Returns how many were made."""
    if folder.is_file():
        raise VgmError(f"{folder} is a file", "name a folder, a .png or a .npz", USAGE)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [folder / f"{i:06d}.png" for i in range(plan.n)]
    made = 0
    for first in range(0, plan.n, plan.batch_size):
        last = min(first + plan.batch_size, plan.n)
        if all(p.exists() for p in wanted[first:last]):
            continue
        for x, _ in generate.stream(loaded, plan, device, first, last, info=info):
            images = to_uint8(x).permute(0, 2, 3, 1).numpy()
            for i, image in zip(range(first, last), images):
                save_png(image, wanted[i], {**meta, "vgm.item": str(i)})
        made += last - first
        if progress is not None:
            progress.update(last)
    return made
