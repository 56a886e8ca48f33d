"""vgm runs: list, show and remove run directories. Torch-free."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.engine.run import Run
from vgm_cli.engine.run_files import config_of, find_runs, is_failed, is_run, loss_of, metrics_of
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.ui import duration, ui

BARS = "▁▂▃▄▅▆▇█"


def register(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True, help="List, show and remove runs; alone: list.")
    group.callback()(alone)
    group.command("ls")(ls)
    group.command("show")(show)
    group.command("rm")(rm)
    app.add_typer(group, name="runs")


# -- reading ---------------------------------------------------------------------------------------------------------


def open_run(path: Path) -> Path:
    if not path.exists():
        raise VgmError(f"no such run: {path}", "`vgm runs ls` shows the runs below ./runs", USAGE)
    if not is_run(path):
        raise VgmError(f"{path} is not a run", "a run holds config.yaml and checkpoints/", USAGE)
    return path


def facts_of(run: Path) -> dict[str, Any]:
    """What `vgm runs ls` says of one run."""
    config, rows = config_of(run), metrics_of(run)
    last = Run(run).last()
    saved = int(last.name.removeprefix("step-")) if last else 0
    changed = max(
        p.stat().st_mtime for p in (run, run / "config.yaml", run / "metrics.jsonl", run / "checkpoints") if p.exists()
    )
    train = config.get("train")
    at = rows[-1].get("step") if rows else 0
    return {
        "paper": config.get("paper", "?"),
        "step": max(saved, at if isinstance(at, int) else 0),
        "steps": train.get("steps") if isinstance(train, dict) else None,
        "saved": saved,
        "loss": loss_of(rows[-1]) if rows else None,
        "age_seconds": round(max(0.0, time.time() - changed)),
        "path": str(run),
    }


# -- commands --------------------------------------------------------------------------------------------------------


def alone(context: typer.Context) -> None:
    """List, show and remove runs; alone: list those below ./runs."""
    if context.invoked_subcommand is None:
        ls()


def ls(
    folder: Annotated[Path, typer.Argument(help="Where to look, up to four folders deep.")] = Path("runs"),
    every: Annotated[bool, typer.Option("--all", help="Also what starts that failed have left.")] = False,
) -> None:
    """List runs, the newest first.

    Examples:

        vgm runs ls

        vgm runs ls /data/experiments --json

        vgm runs ls --all                               # with starts that failed; `vgm runs rm` takes them too

    Next: vgm runs show RUN
    """
    if not folder.is_dir() and folder != Path("runs"):
        raise VgmError(f"no such folder: {folder}", code=USAGE)
    found = sorted((facts_of(r) for r in find_runs(folder, failed=every)), key=lambda f: f["age_seconds"])
    ui.document(found)
    if not found:
        ui.info(f"no runs below {folder}; `vgm train dit` makes one")
        return
    rows = [
        (f["paper"], f"{f['step']}/{f['steps'] or '?'}", number(f["loss"]), duration(f["age_seconds"]), f["path"])
        for f in found
    ]
    ui.table(("paper", "steps", "loss", "age", "path"), rows)


def show(
    run: Annotated[Path, typer.Argument(help="A run directory.", autocompletion=complete.runs)],
) -> None:
    """Show what a run was, how its loss went, and what it left.

    Examples:

        vgm runs show runs/dit-mnist/20260101-120000

    Next: vgm sample RUN
    """
    open_run(run)
    config, rows, facts = config_of(run), metrics_of(run), facts_of(run)
    checkpoints = [str(p) for p in Run(run).checkpoints()]
    previews = sorted((run / "samples").glob("step-*.png"))
    losses = [v for r in rows if (v := loss_of(r)) is not None]
    last = rows[-1] if rows else {}
    preview = str(previews[-1]) if previews else None
    file = run / "command.txt"
    command = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    ui.document(
        {
            **facts,
            "command": command,
            "config": config,
            "metrics": last,
            "losses": losses,
            "checkpoints": checkpoints,
            "preview": preview,
        }
    )
    ui.data(
        f"{run}: {facts['paper']}, step {facts['step']} of {facts['steps'] or '?'}, "
        f"{duration(facts['age_seconds'])} old"
    )
    for node in ("model", "codec", "objective", "sampler", "data", "optimizer"):
        if config.get(node):
            ui.data(f"  {node:<12} {brief(config[node])}")
    if losses:
        curve, log = sparkline(losses)
        scale = ", log scale" if log else ""
        ui.data(f"  loss         {curve} {number(losses[0])} to {number(losses[-1])}{scale}")
    if last:
        ui.data("  last         " + ", ".join(f"{k} {number(v)}" for k, v in last.items()))
    for checkpoint in checkpoints:
        ui.data(f"  checkpoint   {checkpoint}")
    if preview:
        ui.data(f"  preview      {preview}")
    for line in command.splitlines():
        ui.data(f"  command      {line}")


def rm(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", autocompletion=complete.runs)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove runs with everything in them, and what starts that failed have left. Other directories are refused.

    Examples:

        vgm runs rm runs/dit-mnist/20260101-120000

        vgm runs rm runs/dit-mnist/* --yes

    Next: vgm runs ls
    """
    for run in runs:  # all are looked at before the first is removed
        if not is_failed(run):
            open_run(run)
        if run.is_symlink():
            raise VgmError(f"{run} is a link, not the run itself", f"the run: {run.resolve()}", USAGE)
    if not yes:
        names = ", ".join(map(str, runs))
        try:
            agreed = not ui.json and typer.confirm(f"remove {names}?", err=True)
        except typer.Abort:
            agreed = False
        if not agreed:
            raise VgmError("nothing was removed", "--yes removes without asking", FAILED)
    for run in runs:
        try:
            with Run(run) as removed:
                removed.lock()
                shutil.rmtree(run)
        except OSError as e:
            raise VgmError(f"cannot remove {run}: {e.strerror}", code=FAILED) from e
        ui.data(str(run))
    ui.document([str(r) for r in runs])


# -- text ------------------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def brief(node: Any) -> str:
    """A recipe node on one line, without what is unset: 'dit hidden_size=128 depth=4'."""
    if not isinstance(node, dict):
        return str(node)
    rest = " ".join(f"{k}={v}" for k, v in node.items() if k != "name" and v is not None)
    return f"{node.get('name', '')} {rest}".strip()


def sparkline(values: Sequence[float], width: int = 60) -> tuple[str, bool]:
    """(bars, log scale?) of a series averaged into at most `width` columns; values that are not finite leave a gap."""
    n = min(width, len(values))
    columns: list[float | None] = []
    for i in range(n):
        part = [v for v in values[i * len(values) // n : (i + 1) * len(values) // n] if math.isfinite(v)]
        columns.append(sum(part) / len(part) if part else None)
    finite = [c for c in columns if c is not None]
    log = bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 10
    if log:
        columns = [None if c is None else math.log(c) for c in columns]
        finite = [c for c in columns if c is not None]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    try:
        BARS.encode(sys.stdout.encoding or "ascii")
        bars = BARS
    except UnicodeEncodeError:
        bars = "_.-=+*#%"
    return (
        "".join(" " if c is None else bars[round((c - low) / span * 7) if span else 0] for c in columns),
        log,
    )
