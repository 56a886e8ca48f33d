"""Where samples go: one grid, a folder of PNGs, or an ADM-layout .npz. Folders and .npz are made batch by batch, shared
by the processes of a run, and go on where an interrupted one stopped."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.engine import generate, ranks
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.generate import Plan
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.images import read_png_metadata, save_grid, save_png, to_uint8

TRACED_ITEMS, TRACED_STEPS = 8, 12


def default_target(loaded: Loaded, model: str, plan: Plan) -> Path:
    """samples/ of the run, or beside the file, named by what it holds."""
    path = loaded.path.resolve()
    run = next((p for p in path.parents if (p / "config.yaml").exists()), None)
    scale = "" if plan.guidance_scale in (None, 1) or not plan.labels else f"-w{plan.guidance_scale:g}"
    name = f"sample-{loaded.header.step:06d}-seed{plan.seed}{scale}.png"
    return (run / "samples" if run else Path.cwd()) / name


def write(
    loaded: Loaded, plan: Plan, target: Path, model: str, device: torch.device, progress: Any = None
) -> dict[str, Any]:
    """Sample the plan into `target` and return what was done (n, seconds, NFE, path)."""
    began = time.perf_counter()
    info: dict[str, Any] = {}
    suffix = target.suffix.lower()
    if suffix not in (".png", ".npz", ""):
        raise VgmError(f"--out {target}: unknown kind of output", "grid.png, x.npz (ADM layout) or a folder", USAGE)
    meta = generate.provenance(loaded, plan, model)
    if suffix == "":
        made = write_folder(loaded, plan, target, device, meta, info, progress)
    elif suffix == ".npz":
        made = write_npz(loaded, plan, target, device, meta, info, progress)
    else:
        made = write_grid(loaded, plan, target, device, meta, info, progress)
    made = sum(ranks.shares(range(ranks.rank_world()[1]), lambda _: made))
    seconds = time.perf_counter() - began
    return {
        "out": str(target),
        "n": plan.n,
        "made": made,
        "seconds": round(seconds, 3),
        "images_per_second": round(made / max(seconds, 1e-9), 3),
        "weights": loaded.header.weights,
        "step": loaded.header.step,
        "seed": plan.seed,
        "sampler": plan.sampler,
        "guidance_scale": plan.guidance_scale,
        "precision": plan.precision,
        **info,
    }


def batches_of(plan: Plan) -> list[tuple[int, int]]:
    return [(first, min(first + plan.batch_size, plan.n)) for first in range(0, plan.n, plan.batch_size)]


def pictures(
    loaded: Loaded, plan: Plan, first: int, last: int, device: torch.device, info: dict[str, Any]
) -> np.ndarray:
    """Items first..last as uint8 (N, H, W, C)."""
    x = torch.cat([x.cpu() for x, _ in generate.stream(loaded, plan, device, first, last, info=info)])
    return to_uint8(x).permute(0, 2, 3, 1).numpy()


def write_grid(
    loaded: Loaded, plan: Plan, target: Path, device: torch.device, meta: dict[str, str], info: dict[str, Any],
    progress: Any,
) -> int:  # fmt: skip
    """One PNG of all images, classes in columns."""
    done = 0

    def one(span: tuple[int, int]) -> Tensor:
        nonlocal done
        x = torch.cat([x.cpu() for x, _ in generate.stream(loaded, plan, device, *span, info=info)])
        done += len(x)
        if progress is not None:
            progress.update(done)
        return x

    parts = ranks.in_order({i: one(span) for i, span in ranks.mine(batches_of(plan))})
    if parts:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_grid(torch.cat(parts), target, nrow=columns_of(loaded, plan), metadata=meta)
    return done


def columns_of(loaded: Loaded, plan: Plan) -> int:
    classes = loaded.header.data.get("num_classes") or 0
    own = len(set(plan.labels)) if plan.labels else 0
    return generate.grid_columns(plan.n, own if own < classes else classes)


# -- many images -----------------------------------------------------------------------------------------------------


def same_job(there: str | None, meta: dict[str, str], where: Path) -> None:
    """VgmError when what lies there was made with other settings than these."""
    if there is None:
        raise VgmError(f"{where} was not written by vgm sample", "choose another --out", USAGE)
    before, now = json.loads(there), json.loads(meta["vgm"])
    free = ("version", "n", "labels", "model")
    changed = [k for k in now if k not in free and before.get(k) != now[k]]
    if changed:
        k = changed[0]
        raise VgmError(
            f"{where} holds images made with {k}={before.get(k)}, now {k}={now[k]}", "choose another --out", USAGE
        )


def write_folder(
    loaded: Loaded, plan: Plan, folder: Path, device: torch.device, meta: dict[str, str], info: dict[str, Any],
    progress: Any,
) -> int:  # fmt: skip
    """000000.png …; images already there are kept, so an interrupted job goes on. Gives how many this process made."""
    if folder.is_file():
        raise VgmError(f"{folder} is a file", "name a folder, a .png or a .npz", USAGE)
    folder.mkdir(parents=True, exist_ok=True)
    first_there = next(iter(sorted(folder.glob("[0-9]*.png"))), None)
    if first_there is not None:
        same_job(read_png_metadata(first_there).get("vgm"), meta, folder)
    made = 0
    for _, (first, last) in ranks.mine(batches_of(plan)):
        wanted = [folder / f"{i:06d}.png" for i in range(first, last)]
        if all(p.exists() for p in wanted):
            continue
        for i, image in enumerate(pictures(loaded, plan, first, last, device, info)):
            save_png(image, wanted[i], {**meta, "vgm.item": str(first + i)})
        made += last - first
        if progress is not None:
            progress.update(last)
    ranks.from_main(None)  # nobody leaves before all are done
    return made


def write_npz(
    loaded: Loaded, plan: Plan, target: Path, device: torch.device, meta: dict[str, str], info: dict[str, Any],
    progress: Any,
) -> int:  # fmt: skip
    """ADM layout: arr_0 uint8 (N, H, W, C), arr_1 int64 labels. Batches are kept in NAME.npz.parts until all are there,
    so an interrupted job goes on; the file is then written in one pass that holds one batch in memory."""
    parts = target.with_name(target.name + ".parts")
    main = ranks.rank_world()[0] == 0
    if main:
        parts.mkdir(parents=True, exist_ok=True)
        settings = parts / "settings.json"
        if settings.exists():
            same_job(settings.read_text(), meta, parts)
        else:
            atomic.write_text(settings, meta["vgm"])
    ranks.from_main(None)
    spans, made = batches_of(plan), 0
    for _, (first, last) in ranks.mine(spans):
        part = parts / f"{first:08d}-{last:08d}.npy"
        if part.exists():
            continue
        with atomic.replacing(part) as temp, open(temp, "wb") as f:
            np.save(f, pictures(loaded, plan, first, last, device, info))
        made += last - first
        if progress is not None:
            progress.update(last)
    ranks.shares(range(ranks.rank_world()[1]), lambda r: r)  # all parts are there
    if main:
        join_parts([parts / f"{first:08d}-{last:08d}.npy" for first, last in spans], plan, target)
        shutil.rmtree(parts, ignore_errors=True)
    return made


def join_parts(files: list[Path], plan: Plan, target: Path) -> None:
    """Stream part after part into one uncompressed .npz."""
    shape = (plan.n, *np.load(files[0], mmap_mode="r").shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic.replacing(target) as temp, zipfile.ZipFile(temp, "w", zipfile.ZIP_STORED, allowZip64=True) as z:
        with z.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for file in files:
                f.write(np.load(file).tobytes())
        if plan.labels:
            with z.open("arr_1.npy", "w") as f:
                np.save(f, np.asarray(plan.labels, np.int64))


# -- how a sample comes about ------------------------------------------------------------------------------------------


def write_trace(loaded: Loaded, plan: Plan, target: Path, device: torch.device) -> Path:
    """NAME-trace.png: for the first items, two strips each, x_t and the estimate of x_0, from noise to image.

    VgmError: the sampler reports no steps.
    """
    seen: list[tuple[Tensor, Tensor | None]] = []
    n = min(plan.n, TRACED_ITEMS)
    for _ in generate.stream(loaded, plan, device, 0, n, callback=lambda i, total, x, x0: seen.append((x, x0))):
        pass
    if not seen:
        raise VgmError("this sampler reports no steps to trace", "a diffusion or flow sampler does", FAILED)
    chosen = sorted({round(k * (len(seen) - 1) / (TRACED_STEPS - 1)) for k in range(TRACED_STEPS)})
    strips = [seen[k][0] for k in chosen], [seen[k][1] if seen[k][1] is not None else seen[k][0] for k in chosen]
    rows = []
    for i in range(n):
        for strip in strips:
            rows += [shown(loaded, torch.stack([x[i].float() for x in strip if x is not None]), device)]
    out = target.with_name(f"{target.stem}-trace.png")
    save_grid(torch.cat(rows), out, nrow=len(chosen))
    return out


@torch.no_grad()
def shown(loaded: Loaded, x: Tensor, device: torch.device) -> Tensor:
    """States as pictures: latents decoded, noise scaled into view."""
    x = x.to(device)
    if loaded.codec is not None:
        x = loaded.codec.decode(x)
    else:
        x = x / x.flatten(1).abs().amax(1).clamp(min=1.0).view(-1, 1, 1, 1)
    return x.float().cpu()


def rerun(image: Path, out: Path | None, device: torch.device) -> dict[str, Any]:
    """Make the same picture again from what the PNG remembers, and say whether every pixel agrees.

    VgmError: no provenance (2), other weights than then (1).
    """
    from PIL import Image

    from vgm_cli.engine.sampling import given_images, open_model

    if not image.is_file():
        raise VgmError(f"no such image: {image}", code=USAGE)
    remembered = read_png_metadata(image)
    try:
        s = json.loads(remembered["vgm"])
    except (KeyError, ValueError) as e:
        raise VgmError(f"{image} does not say how it was made", "PNGs of `vgm sample` do", USAGE) from e
    if "sampler" not in s:
        raise VgmError(f"{image} was made by vgm {s.get('command', '?')}", "PNGs of `vgm sample` are made again", USAGE)
    loaded, device = open_model(s["model"], s["weights"])
    if s.get("sha256") and loaded.sha256() != s["sha256"]:
        raise VgmError(f"{s['model']} holds other weights than {image} was made with (step {s['step']})", code=FAILED)
    interval = tuple(s["guidance_interval"]) if s.get("guidance_interval") else None
    given = given_images(loaded, s["input"], s["n"]) if s.get("input") else None
    plan = Plan(n=s["n"], seed=s["seed"], labels=s["labels"], sampler=s["sampler"], steps=s["steps"], images=given,
                guidance_scale=s["guidance_scale"], guidance_interval=interval, precision=s.get("precision", "fp32"),
                batch_size=s.get("batch_size", 64))  # fmt: skip
    target = out or image.with_name(f"{image.stem}-again.png")
    item = remembered.get("vgm.item")
    if item is None:
        write_grid(loaded, plan, target, device, {"vgm": remembered["vgm"]}, {}, None)
    else:
        first = int(item) // plan.batch_size * plan.batch_size
        batch = pictures(loaded, plan, first, min(first + plan.batch_size, plan.n), device, {})
        save_png(batch[int(item) - first], target, remembered)
    with Image.open(image) as a, Image.open(target) as b:
        x, y = np.asarray(a).astype(int), np.asarray(b).astype(int)
    same = x.shape == y.shape and bool((x == y).all())
    return {"image": str(image), "again": str(target), "identical": same,
            "largest_difference": int(abs(x - y).max()) if x.shape == y.shape else None}  # fmt: skip
