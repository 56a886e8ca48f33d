"""Which files and folders are runs, what lies in them, and the newest one that a short name means."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vgm_cli.errors import FAILED, USAGE, VgmError

LOCK = ".lock"
CHECKPOINT = re.compile(r"step-\d+")
DEPTH = 4  # folders below the given one that are searched for runs


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def find_runs(folder: Path, failed: bool = False) -> Iterator[Path]:
    """Runs at or below `folder`; what lies inside a run (its own codec) is not listed. failed: also what starts that
    failed left."""
    for root, folders, _ in os.walk(folder):
        path = Path(root)
        if is_run(path) or (failed and path != folder and is_failed(path)):
            folders.clear()
            yield path
        else:
            deep = len(path.relative_to(folder).parts) >= DEPTH
            folders[:] = [] if deep else sorted(f for f in folders if not f.startswith("."))


def newest(target: str | Path) -> Path | None:
    """The run that was saved last among those that a short name means: a folder of runs, `last` (all below ./runs), a
    paper or PAPER/RECIPE (its runs below ./runs). None where there is none with a checkpoint."""
    name, folder = str(target), Path(target)
    if folder.is_dir():
        found = list(find_runs(folder))
    else:
        base = name.replace("/", "-")
        runs = [(p, p.relative_to("runs").parts[:1]) for p in find_runs(Path("runs"))]
        found = [p for p, top in runs if name == "last" or top == (base,) or (top and top[0].startswith(f"{base}-"))]
    saved = [(done[-1].stat().st_mtime, p) for p in found if (done := complete(p / "checkpoints"))]
    return max(saved)[1] if saved else None


def complete(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first: a directory gets this form of name only when it is whole."""
    return sorted(p for p in folder.glob("step-*") if CHECKPOINT.fullmatch(p.name) and p.is_dir())


def same_text(a: Path, b: Path) -> bool:
    try:
        return a.read_bytes() == b.read_bytes()
    except OSError:
        return False


def read_record(file: Path) -> dict[str, Any]:
    """A JSON file of a run; {} where it is missing. VgmError: it is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise VgmError(f"{file} is damaged: {e}", code=FAILED) from e
    if not isinstance(value, dict):
        raise VgmError(f"{file} is damaged: it holds no JSON object", code=FAILED)
    return value


def config_of(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run; {} where it cannot be read."""
    from vgm_cli.limits import read_text
    from vgm_cli.yaml_text import parse_yaml

    try:
        config = parse_yaml(read_text(run / "config.yaml"), "config.yaml")
    except (OSError, UnicodeDecodeError, VgmError):
        return {}
    return config if isinstance(config, dict) else {}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line cut off by a kill is left out."""
    file = run / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def loss_of(row: dict[str, Any]) -> float | None:
    """ "loss", or the first phase's ("generator/loss")."""
    key = "loss" if "loss" in row else next((k for k in row if k.endswith("/loss")), None)
    return row[key] if key and isinstance(row[key], int | float) else None


# -- what belongs to a run -------------------------------------------------------------------------------------------

# what training and the other verbs write into a run, as paths inside it
OWN = re.compile(
    r"""(codec/)?(
        (config\.yaml|origins\.json|command\.txt|env\.json|git\.json|data\.json|card\.md|metrics\.jsonl|\.lock)
        |\.checkpoints\.tmp/.+
        |checkpoints/(last|\.last\.tmp)
        |checkpoints/(step-\d+(\.tmp|\.old)?|last)/([\w.-]+\.safetensors|state\.json)
        |samples/.+\.(png|json|npz)
        |adapter/adapter_(model\.safetensors|config\.json)
        |restored/.+\.(png|json|jsonl|npz|safetensors)
        |(tensorboard|wandb)/.+
        |(.+/)?\.[^/]+\.tmp
    )""",
    re.VERBOSE | re.DOTALL,
)


def files_in(folder: Path) -> Iterator[Path]:
    """Everything below `folder` but folders, as relative paths; links are not followed."""
    for root, folders, files in os.walk(folder):
        links = [f for f in folders if os.path.islink(os.path.join(root, f))]
        for name in (*files, *links):
            yield (Path(root) / name).relative_to(folder)


def used(path: Path) -> bool:
    """Does the folder hold more than a start that failed and a codec that was trained first?"""
    return any(p.parts[0] != "codec" and str(p) != LOCK for p in files_in(path))


def foreign(path: Path) -> Path | None:
    """A file in the folder that no run writes."""
    return next((p for p in sorted(files_in(path)) if not OWN.fullmatch(p.as_posix())), None)


def refuse_foreign(path: Path, what: str) -> None:
    found = foreign(path)
    if found is not None:
        raise VgmError(f"{path} holds {found}, which no run wrote, {what}", "move it away, or choose --out", USAGE)


def is_failed(path: Path) -> bool:
    """Is it what a start leaves that failed: a folder for a run, with no recipe and nothing foreign in it?"""
    if not path.is_dir() or is_run(path):
        return False
    begun = (path / "checkpoints").is_dir() or all(p.name == LOCK for p in path.iterdir())
    return begun and foreign(path) is None
