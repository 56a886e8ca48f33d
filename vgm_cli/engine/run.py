"""The run directory: what a run leaves behind, every write atomic.

runs/<paper>-<recipe>/<time>/   or --out DIR
  config.yaml origins.json command.txt env.json git.json data.json card.md
  metrics.jsonl  samples/step-001000.png (+ .json)
  checkpoints/step-00001000/{model,ema-0.9999}.safetensors trainer.safetensors state.json
  checkpoints/last -> step-00001000
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vgm_cli import __version__, atomic
from vgm_cli.errors import FAILED, USAGE, VgmError

PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "pillow", "typer", "rich", "pluggy", "pydantic", "pyyaml")


DEPTH = 4  # folders below the given one that are searched for runs


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def find_runs(folder: Path) -> Iterator[Path]:
    """Runs at or below `folder`; what lies inside a run (its own codec) is not listed."""
    for root, folders, _ in os.walk(folder):
        path = Path(root)
        if is_run(path):
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
    saved = [(last.stat().st_mtime, p) for p in found if (last := Run(p).last()) is not None]
    return max(saved)[1] if saved else None


class Run:
    """One run directory."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, out: Path | None, name: str, resume: bool, overwrite: bool = False) -> Run:
        """A fresh directory, or an existing one when resuming. A non-empty directory is never written into unasked."""
        if out is None:
            path = Path("runs") / name.replace("/", "-") / time.strftime("%Y%m%d-%H%M%S")
        else:
            path = Path(out)
        if path.is_file():
            raise VgmError(f"{path} is a file, a run needs a directory", code=USAGE)
        used = path.is_dir() and any(p.name != "codec" for p in path.iterdir())
        if used and overwrite:
            if not (path / "config.yaml").exists() and not (path / "checkpoints").exists():
                raise VgmError(f"{path} is not a run, so --overwrite will not empty it", code=USAGE)
            shutil.rmtree(path)
        elif used and not resume:
            raise VgmError(f"{path} is not empty", "--resume goes on with it, --overwrite starts anew", USAGE)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "samples").mkdir(exist_ok=True)
        except OSError as e:
            raise VgmError(f"cannot create {path}: {e.strerror}", "choose another --out", FAILED) from e
        return cls(path)

    # -- records --------------------------------------------------------------------------------------------------

    def write_facts(self, config: str, origins: Mapping[str, str], data: Mapping[str, Any]) -> None:
        """Everything needed to know what was run: written once at the start."""
        atomic.write_text(self.path / "config.yaml", config)
        atomic.write_json(self.path / "origins.json", dict(origins))
        atomic.write_text(self.path / "command.txt", " ".join(sys.argv) + "\n")
        atomic.write_json(self.path / "env.json", environment())
        atomic.write_json(self.path / "git.json", git_state())
        atomic.write_json(self.path / "data.json", dict(data))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one JSON line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(atomic.dump_json(row) + "\n")
        except OSError as e:
            raise VgmError(f"cannot write {self.path / 'metrics.jsonl'}: {e.strerror}", code=FAILED) from e

    def rewind_log(self, step: int) -> None:
        """Drop lines after `step`: a resumed run writes them again."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            rows = [line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            atomic.write_text(file, "".join(r + "\n" for r in rows))

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first (a directory gets its final name only when it is whole)."""
        return sorted(p for p in (self.path / "checkpoints").glob("step-*") if p.is_dir() and p.suffix != ".tmp")

    def last(self) -> Path | None:
        found = self.checkpoints()
        return found[-1] if found else None

    def begin_checkpoint(self, step: int) -> Path:
        temp = self.path / "checkpoints" / f"step-{step:08d}.tmp"
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        return temp

    def commit_checkpoint(self, temp: Path, keep: int) -> Path:
        """Rename into place, point `last` at it, drop the oldest beyond `keep` + 1."""
        final = temp.with_suffix("")
        if final.exists():
            shutil.rmtree(final)
        atomic.sync_folder(temp)
        os.rename(temp, final)
        link = final.parent / "last"
        fresh = final.parent / ".last.tmp"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(final.name)
        os.replace(fresh, link)
        atomic.sync_folder(final.parent)
        for old in self.checkpoints()[: -(keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def clean(self) -> None:
        """Remove what a killed run left half-written."""
        for temp in (self.path / "checkpoints").glob("*.tmp"):
            shutil.rmtree(temp, ignore_errors=True) if temp.is_dir() else temp.unlink(missing_ok=True)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, AttributeError):
        return sys.maxsize  # a line cut off by a kill goes


def environment() -> dict[str, Any]:
    """Versions and hardware, for bug reports and records."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    info: dict[str, Any] = {
        "vgm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": bf16_supported(),
        "packages": versions,
    }
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def bf16_supported() -> bool:
    """Does this machine multiply bf16 matrices in hardware?"""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags() or platform.machine() in ("arm64", "aarch64")


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def git_state() -> dict[str, Any]:
    """Commit and dirtiness of the working directory's repository, {} outside one."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=5).stdout.strip()

    try:
        sha = git("rev-parse", "HEAD")
        return {"sha": sha, "dirty": bool(git("status", "--porcelain"))} if sha else {}
    except (OSError, subprocess.SubprocessError):
        return {}
