"""Where samples go: one grid, a folder of PNGs, or an ADM-layout .npz. Folders and .npz are made batch by batch, shared
by the processes of a run, and go on where an interrupted one stopped."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli import atomic, foreign
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import processes
from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.sample.loop import Plan
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.images import SHOWN, Layout, make_grid, read_png_metadata, save_grid, save_png, to_uint8
from vgm_cli.registry import registry
from vgm_cli.ui import ui

REMEMBERED = ("model", "weights", "sha256", "step", "n", "seed", "labels", "steps", "guidance_scale")
TRACED_ITEMS, TRACED_STEPS = 8, 12
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
    chosen = plan.labels[: plan.period()]
    if chosen and chosen != list(range(loaded.header.data.get("num_classes") or 0))[: plan.n]:
        parts += ["label" + "-".join(map(str, chosen[:8])) + ("-and-more" if len(chosen) > 8 else "")]
    said = "-".join(words[0] for words in plan.words.values())
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
    for k in now:
        if k not in free and before[k] != now[k]:
            raise VgmError(f"{where} holds images made with {k}={before[k]}, now {k}={now[k]}", hint, USAGE)
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


# -- how a sample comes about ------------------------------------------------------------------------------------------


def trace_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}-trace.png")


def trace(loaded: Loaded, plan: Plan, device: torch.device) -> np.ndarray:
    """A picture of how the first samples form. Each takes two rows, x_t and the estimate of x_0, from noise to image,
    with the time above each column. VgmError: the sampler reports no steps."""
    seen: list[tuple[Tensor, Tensor | None, float | None]] = []

    def watch(i: int, total: int, x: Tensor, x0: Tensor | None) -> None:
        at = getattr(loaded.view, "asked_at", None)
        seen.append((x, x0, None if at is None else float(at.flatten()[0])))

    n = min(plan.n, TRACED_ITEMS)
    for _ in generate.stream(loaded, replace(plan, batch_size=max(n, 1)), device, 0, n, callback=watch):
        pass
    if not seen:
        text = f"the sampler {plan.sampler['name']} reports no steps to trace"
        raise VgmError(text, "a diffusion or flow sampler does", FAILED)
    chosen = sorted({round(k * (len(seen) - 1) / (TRACED_STEPS - 1)) for k in range(TRACED_STEPS)})
    strips = {"x_t": [seen[k][0] for k in chosen]}
    if all(seen[k][1] is not None for k in chosen):
        strips["estimate"] = [seen[k][1] for k in chosen]  # type: ignore[misc]
    rows = [
        shown(loaded, torch.stack([x[i].float() for x in strip]), device) for i in range(n) for strip in strips.values()
    ]
    letter = "sigma" if getattr(getattr(loaded.view, "path", None), "t_max", 1) > 1 else "t"
    times = [f"step {k + 1}" if seen[k][2] is None else f"{letter} {seen[k][2]:.3g}" for k in chosen]
    return make_grid(torch.cat(rows), len(chosen), rows=list(strips) * n, columns=times, block=len(strips))


@torch.no_grad()
def shown(loaded: Loaded, x: Tensor, device: torch.device) -> Tensor:
    """States (B, ...) as pictures: latents are decoded, and noise is scaled into the visible range."""
    x = x.to(device)
    if loaded.codec is not None:
        x = loaded.codec.decode(x)
    else:
        x = x / x.flatten(1).abs().amax(1).clamp(min=1.0).view(-1, 1, 1, 1)
    return x.float().cpu()


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
    from vgm_cli.data.decode import open_image
    from vgm_cli.engine.sample.setup import adopt_conditions, given_images, open_model

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
    start = given_images(loaded, s["input"], s["n"]) if s.get("input") else None
    steps = s["steps"] if "steps" in s.get("asked", ["steps"]) else None
    told, words = loaded.conditions, s.get("words") or {}
    foreign.tell_files([words, s.get("conditions")], image)
    adopt_conditions(loaded, dict(s.get("conditions") or {}), ())
    items = {name: told.parts[name].condition.parse(own) for name, own in words.items() if name in told.parts}
    if (part := told.of_column("label")) is not None and s["labels"]:
        items[part.name] = part.condition.parse(list(map(str, s["labels"])))
    given = generate.items_for(told, s["n"], items)
    plan = Plan(n=s["n"], seed=s["seed"], given=given, labels=generate.labels_in(told, given), words=words,
                negative=s.get("negative") or {}, sampler=s["sampler"], steps=steps, images=start,
                guidance_scale=s["guidance_scale"], guidance_interval=interval, precision=s.get("precision", "fp32"),
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
