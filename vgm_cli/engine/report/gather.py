"""What a run directory says of itself, read without trust: damaged or missing files leave gaps, none is run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vgm_cli import limits
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import run_files
from vgm_cli.engine.parts import locate
from vgm_cli.engine.run import Run
from vgm_cli.errors import VgmError
from vgm_cli.ui import duration, flat, human, ui

PICTURES = 8  # of one run
LARGEST = 8 << 20  # bytes of a picture
DEPTH = 6  # of the chain of checkpoints that a run was made from
AXES = ("step", "images")  # columns of the log that are no curves


@dataclass
class Link:
    """A checkpoint, and those that it was made from, by role. note: why it could not be read."""

    path: str
    says: str = ""
    note: str = ""
    parts: dict[str, Link] = field(default_factory=dict)


@dataclass
class Told:
    """One run. config, origins: dotted keys, and where each value came from; rows: of the log; pictures: files with
    what they show; chain: the weights that a sample would use."""

    path: Path
    name: str
    config: dict[str, Any]
    origins: dict[str, str]
    rows: list[dict[str, Any]]
    summary: dict[str, str]
    pictures: list[tuple[str, Path]]
    commands: list[str]
    chain: Link | None


def read(path: Path, name: str) -> Told:
    """Everything of one run."""
    run, config, rows = Run(path), run_files.config_of(path), run_files.metrics_of(path)
    return Told(
        path,
        name,
        flat(config),
        {k: str(v) for k, v in record(path, "origins.json").items()},
        rows,
        summary(run, config, rows),
        list(pictures(path / "samples")),
        text_of(path / "command.txt").splitlines(),
        newest_weights(run),
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each run, the last parts of its path in which they differ."""
    whole = [p.resolve().parts for p in paths]
    for n in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-n:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(p) for p in paths]


def text_of(file: Path) -> str:
    try:
        return limits.read_text(file)
    except (OSError, UnicodeDecodeError, VgmError):
        return ""


def record(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of a run; {} where it is missing or damaged, which is told."""
    try:
        return run_files.read_record(run / name)
    except VgmError as e:
        ui.warn(e.message)
        return {}


def summary(run: Run, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{what: value} for the table at the top."""
    data, env, git = (record(run.path, f"{n}.json") for n in ("data", "env", "git"))
    last, train = run.last(), config.get("train")
    state = record(last, "state.json") if last else {}
    steps = train.get("steps") if isinstance(train, dict) else None
    rates = sorted(r for row in rows if (r := number(row.get("images_per_second"))) is not None)
    seconds = number(state.get("seconds"))
    out = {
        "paper": config.get("paper"),
        "parameters": parameters(last / "model.safetensors") if last else None,
        "step": f"{state.get('step', 0)} of {steps or '?'}",
        "images": state.get("images"),
        "time": duration(seconds) if seconds is not None else None,
        "images/s": f"{rates[len(rates) // 2]:.4g}" if rates else None,
        "data": data.get("root") and f"{data['root']}, {data.get('count', '?')} images",
        "data fingerprint": data.get("fingerprint"),
        "processes": state.get("world"),
        "device": ", ".join(map(str, env["gpus"])) if env.get("gpus") else env.get("cpu"),
        "vgm": env.get("vgm"),
        "torch": (env.get("packages") or {}).get("torch") if isinstance(env.get("packages"), dict) else None,
        "commit": git.get("commit"),
    }
    return {k: str(v) for k, v in out.items() if v not in (None, "", 0)}


def number(value: Any) -> float | None:
    """A finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def parameters(file: Path) -> str | None:
    """How many numbers a weights file holds."""
    try:
        entries = limits.safetensors_header(file)[0]
    except (OSError, VgmError):
        return None
    return human(sum(math.prod(e["shape"]) for name, e in entries.items()))


def curves(runs: Sequence[Told]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{column of the logs: {run: [(step, value), ...]}}, losses first. A column that says nothing, being one number
    throughout, is left out."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in runs:
        for row in run.rows:
            step = number(row.get("step"))
            for key, value in row.items():
                y = number(value)
                if step is not None and y is not None and key not in AXES:
                    found.setdefault(key, {}).setdefault(run.name, []).append((step, y))
    said = {k: lines for k, lines in found.items() if len({y for points in lines.values() for _, y in points}) > 1}
    return dict(sorted(said.items(), key=lambda kv: (kv[0] != "loss", not kv[0].endswith("/loss"))))


def pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    """(what it shows, file): the training images, then previews spread over the steps, the last among them."""
    files = [p for p in sorted(folder.glob("*.png")) if p.is_file() and not p.is_symlink()]
    steps = [p for p in files if p.stem.startswith("step-") and p.stem.removeprefix("step-").isdecimal()]
    n = min(PICTURES - 1, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(1, n - 1))] for i in range(n)] if n > 1 else steps[-1:]
    named = [(f"step {int(p.stem.removeprefix('step-'))}", p) for p in chosen]
    for what, p in [("training images", p) for p in files if p.name == "reals.png"] + named:
        if p.stat().st_size > LARGEST or p.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
            ui.warn(f"{p} is left out: it is no PNG of at most {LARGEST >> 20} MB")
            continue
        yield what, p


# -- where the weights come from ---------------------------------------------------------------------------------------


def newest_weights(run: Run) -> Link | None:
    last = run.last()
    return link(ckpt.resolve(run.path), 0) if last else None


def link(path: Path, depth: int) -> Link:
    """A checkpoint and what its header refers to, whether those files are still there or not."""
    try:
        header = ckpt.read_header(path)
    except (VgmError, OSError) as e:
        return Link(str(path), note=e.message if isinstance(e, VgmError) else limits.reason(e))
    says = f"{header.component.get('name')}, step {header.step}, {header.weights}"
    found = Link(str(path), says)
    for role, ref in header.parts.items() if depth < DEPTH else ():
        try:
            found.parts[role] = link(locate(ref, path, role), depth + 1)
        except VgmError as e:
            found.parts[role] = Link(ref.asset or ref.path, ref.sha256 and f"sha256 {ref.sha256}", e.message)
    return found
