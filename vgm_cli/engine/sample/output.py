"""Where samples go: one grid, a folder of PNGs, or an ADM-layout .npz. Folders and .npz are made batch by batch, shared
by the processes of a run, and go on where an interrupted one stopped."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.engine import processes
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.sample.loop import Plan
from vgm_cli.engine.sample.trace import trace_of
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.images import SHOWN, Layout, read_png_metadata, save_grid, save_png, to_uint8
from vgm_cli.ui import ui

JOB = ".vgm-job.json"  # in a folder of samples: how they are made
KINDS = "grid.png, x.npz (ADM layout) or a folder"


def default_target(loaded: Loaded, plan: Plan, device: torch.device) -> Path:
    """In samples/ of the run, or in the working folder, named by how it is made; a number where the name is taken."""
    path = loaded.path.resolve()
    run = next((p for p in path.parents if (p / "config.yaml").exists()), None)
    s = plan.settings(device)
    parts = [f"sample-{loaded.header.step:06d}", str(plan.sampler["name"]).replace(":", ".")]
    parts += [f"{s['steps']}steps"] if s["steps"] else []
    parts += [f"seed{plan.seed}"]
    parts += [f"w{s['guidance_scale']:g}"] if s["guidance_scale"] not in (None, 1) else []
    parts += [f"best-of-{plan.judge.candidates}"] if plan.judge else []
    chosen = plan.labels[: plan.period()]
    if chosen and chosen != list(range(loaded.header.data.get("num_classes") or 0))[: plan.n]:
        parts += ["label" + "-".join(map(str, chosen[:8])) + ("-and-more" if len(chosen) > 8 else "")]
    said = "-".join(dict.fromkeys(words[0] for words in plan.words.values()))
    parts += [re.sub(r"[^\w]+", "-", said).strip("-")[:40]] if said else []
    return free_name((run / "samples" if run else Path.cwd()) / ("-".join(parts) + ".png"))


def free_name(path: Path) -> Path:
    """The path itself, or with the first number that makes it new."""
    names = (path.with_name(f"{path.stem}_{k}{path.suffix}") for k in itertools.count(2))
    return path if not os.path.lexists(path) else next(p for p in names if not os.path.lexists(p))


def fitted(plan: Plan, target: Path, device: torch.device, chosen: bool) -> Plan:
    """The plan with as many items as a grid can show. chosen: whether the user gave the number of images. VgmError: the
    number does not fill the rows of a sampler's table."""
    if target.suffix.lower() != ".png":
        return plan
    columns = plan.build(device).grid_columns or 1  # of a table, which is shown whole
    if plan.n % columns and (chosen or plan.n < columns):
        low = plan.n // columns * columns
        hint = " or ".join(f"-n {k}" for k in (low, low + columns) if k)
        raise VgmError(f"-n {plan.n} does not fill rows of {columns}", hint, USAGE)
    most = max(SHOWN - SHOWN % columns, columns**2)
    if plan.n > most:
        ui.warn(f"a grid shows {most} images: the first of {plan.n} are made; a folder or an .npz as --out keeps all")
    return plan.first(min(plan.n - plan.n % columns, most))


def check_target(target: Path, meta: dict[str, str], plan: Plan, overwrite: bool, trace: bool = False) -> None:
    """Check a target before anything is sampled, so that no file is lost or mixed with new ones.

    VgmError: something else than an unfinished part of this same job is there and may not be replaced, or the kind of
    file is not supported.
    """

    def look() -> None:
        suffix = target.suffix.lower()
        if suffix not in (".png", ".npz", ""):
            raise VgmError(f"--out {target}: unknown kind of output", KINDS, USAGE)
        if trace:
            atomic.refuse_existing(trace_of(target), overwrite)
        if suffix == "":
            check_folder(target, meta, overwrite)
            return
        if target.is_dir():
            raise VgmError(f"{target} is a folder", "a folder of images has no suffix", USAGE)
        atomic.refuse_existing(target, overwrite)
        if suffix == ".npz" and not overwrite:
            check_parts(parts_of(target), meta)

    processes.on_main(look)


def write(
    loaded: Loaded,
    plan: Plan,
    target: Path,
    meta: dict[str, str],
    device: torch.device,
    progress: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Sample the plan into `target`, which was checked, and return what was done (n, seconds, NFE, path)."""
    processes.on_main(lambda: begin(target, meta, overwrite))
    began = time.perf_counter()
    info: dict[str, Any] = {}
    kinds = {"": write_folder, ".npz": write_npz, ".png": write_grid}
    made = kinds[target.suffix.lower()](loaded, plan, target, device, meta, info, progress)
    made = sum(processes.shares(range(processes.rank_world()[1]), lambda _: made))
    seconds = time.perf_counter() - began
    return {
        "out": str(target),
        "n": plan.n,
        "made": made,
        "seconds": round(seconds, 3),
        "images_per_second": round(made / max(seconds, 1e-9), 3) if made else None,
        "weights": loaded.header.weights,
        "step": loaded.header.step,
        "seed": plan.seed,
        "labels": plan.labels,
        **plan.asked(),
        **plan.settings(device),
        "precision": plan.precision,
        "device": str(device),
        **info,
    }


def begin(target: Path, meta: dict[str, str], overwrite: bool) -> None:
    """Remove what is to be replaced, and write the record by which an interrupted job can go on."""
    suffix = target.suffix.lower()
    if suffix == ".png":
        return
    place, record = (parts_of(target), "settings.json") if suffix == ".npz" else (target, JOB)
    if overwrite and place.is_dir():
        for file in sorted(
            place.iterdir(), key=lambda p: p.name == record
        ):  # the record last: a kill leaves no orphans
            file.unlink()
    atomic.write_text(place / record, meta["vgm"])


def kept(target: Path, plan: Plan) -> tuple[str, str]:
    """A sentence on what an interrupted job has left, and on how to go on."""
    if target.suffix.lower() == ".png":
        return "nothing is written, a grid is made at its end", "a folder or an .npz as --out keeps what was made"
    if target.suffix.lower() == ".npz":
        spans = [p.stem.split("-") for p in parts_of(target).glob("*-*.npy")]
        n, where = sum(int(last) - int(first) for first, last in spans), parts_of(target)
    else:
        n, where = len(list(target.glob("[0-9]*.png"))), target
    return f"{n} of {plan.n} images are kept in {where}", "the same command goes on"


def batches_of(plan: Plan) -> list[tuple[int, int]]:
    return [(first, min(first + plan.batch_size, plan.n)) for first in range(0, plan.n, plan.batch_size)]


def pictures(
    loaded: Loaded, plan: Plan, first: int, last: int, device: torch.device, info: dict[str, Any], progress: Any = None
) -> np.ndarray:
    """Items first..last as uint8 (N, H, W, C)."""
    batches = generate.stream(loaded, plan, device, first, last, info=info, progress=progress)
    x = torch.cat([x.cpu() for x, _ in batches])
    return to_uint8(x).permute(0, 2, 3, 1).numpy()


def write_grid(
    loaded: Loaded, plan: Plan, target: Path, device: torch.device, meta: dict[str, str], info: dict[str, Any],
    progress: Any, layout: Layout | None = None,
) -> int:  # fmt: skip
    """One PNG of all images."""
    done = 0

    def one(span: tuple[int, int]) -> Tensor:
        nonlocal done
        batches = generate.stream(loaded, plan, device, *span, info=info, progress=progress)
        x = torch.cat([x.cpu() for x, _ in batches])
        done += len(x)
        return x

    parts = processes.in_order({i: one(span) for i, span in processes.mine(batches_of(plan))})
    if parts:
        x = torch.cat(parts)
        save_grid(x, target, metadata=meta, layout=layout or generate.layout(plan, x, device))
    return done


# -- many images -----------------------------------------------------------------------------------------------------


def same_job(there: str | None, meta: dict[str, str], where: Path) -> None:
    """VgmError: the samples there were made with other settings than `meta`. Another number of images is allowed."""
    now = json.loads(meta["vgm"])
    try:
        before = json.loads(there or "")
        ours = set(now) <= set(before)
    except (ValueError, TypeError):
        ours = False
    if not ours:
        text = f"{where} is not empty, and not an interrupted job of vgm sample"
        raise VgmError(text, "choose another --out", USAGE)
    hint = "choose another --out; --overwrite starts anew"
    free = ("version", "n", "labels", "model", "asked")
    for k in {**before, **now}:
        if k not in free and before.get(k) != now.get(k):
            raise VgmError(f"{where} holds images made with {k}={before.get(k)}, now {k}={now.get(k)}", hint, USAGE)
    if now["n"] < before["n"]:
        raise VgmError(f"{where} is a job of {before['n']} images, now {now['n']} are asked for", hint, USAGE)
    if before["labels"] != now["labels"][: before["n"]]:
        i = next((i for i, (a, b) in enumerate(zip(before["labels"], now["labels"])) if a != b), 0)
        old, new = (v[i] if i < len(v) else None for v in (before["labels"], now["labels"]))
        raise VgmError(f"{where} holds images made with other labels: image {i} is of {old}, now of {new}", hint, USAGE)


def not_ours(folder: Path) -> list[str]:
    """Names of entries of a folder that no sampling job writes."""
    ours = re.compile(r"\d{6,}\.png|\..+\.tmp|" + re.escape(JOB))
    return sorted(p.name for p in folder.iterdir() if not ours.fullmatch(p.name))


def record_of(folder: Path) -> str | None:
    """How the samples of a folder are made: its record, or what its first picture remembers."""
    if (folder / JOB).is_file():
        return (folder / JOB).read_text(encoding="utf-8", errors="replace")
    first = next(iter(sorted(folder.glob("[0-9]*.png"))), None)
    if first is None or not_ours(folder):
        return None
    try:
        return read_png_metadata(first).get("vgm")
    except VgmError:
        return None


def check_folder(folder: Path, meta: dict[str, str], overwrite: bool) -> None:
    """VgmError: it holds something else than a part of this same job (or, to be replaced, than samples of ours)."""
    if folder.exists() and not folder.is_dir():
        raise VgmError(f"{folder} is a file", "name a folder, a .png or a .npz", USAGE)
    if not folder.is_dir():
        return
    others = not_ours(folder)
    if overwrite and (others or (any(folder.glob("[0-9]*.png")) and record_of(folder) is None)):
        text = f"{folder} holds what vgm sample did not write ({', '.join(others[:3]) or 'its pictures'})"
        raise VgmError(f"{text}, so --overwrite will not empty it", "choose another --out", USAGE)
    if not overwrite and (others or any(folder.glob("[0-9]*.png"))):
        same_job(record_of(folder), meta, folder)


def parts_of(target: Path) -> Path:
    return target.with_name(target.name + ".parts")


def check_parts(parts: Path, meta: dict[str, str]) -> None:
    """VgmError: batches of another job, or something else, lie where those of an .npz go."""
    settings = parts / "settings.json"
    if parts.exists() and (not parts.is_dir() or any(parts.glob("*.npy"))):
        same_job(settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else None, meta, parts)


def write_folder(
    loaded: Loaded, plan: Plan, folder: Path, device: torch.device, meta: dict[str, str], info: dict[str, Any],
    progress: Any,
) -> int:  # fmt: skip
    """000000.png …; images already there are kept, so an interrupted job goes on. Gives how many this process made."""
    made = 0
    for _, (first, last) in processes.mine(batches_of(plan)):
        wanted = [folder / f"{i:06d}.png" for i in range(first, last)]
        if all(p.exists() for p in wanted):
            continue
        for i, image in enumerate(pictures(loaded, plan, first, last, device, info, progress)):
            if not wanted[i].exists():
                save_png(image, wanted[i], {**meta, "vgm.item": str(first + i)})
                made += 1
    processes.from_main(None)  # nobody leaves before all are done
    return made


def write_npz(
    loaded: Loaded, plan: Plan, target: Path, device: torch.device, meta: dict[str, str], info: dict[str, Any],
    progress: Any,
) -> int:  # fmt: skip
    """ADM layout: arr_0 uint8 (N, H, W, C), arr_1 int64 labels. Batches are kept in NAME.npz.parts until all are there,
    so an interrupted job goes on; the file is then written in one pass that holds one batch in memory."""
    parts, main = parts_of(target), processes.rank_world()[0] == 0
    spans, made = batches_of(plan), 0
    for _, (first, last) in processes.mine(spans):
        part = parts / f"{first:08d}-{last:08d}.npy"
        if part.exists():
            continue
        with atomic.replacing(part) as temp, open(temp, "wb") as f:
            np.save(f, pictures(loaded, plan, first, last, device, info, progress))
        made += last - first
    processes.shares(range(processes.rank_world()[1]), lambda r: r)  # all parts are there
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
