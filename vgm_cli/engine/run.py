"""The run directory: what a run leaves behind, every write atomic.

runs/<paper>-<recipe>/<time>/   or --out DIR
  config.yaml origins.json command.txt env.json git.json data.json card.md
  metrics.jsonl  samples/step-001000.png (+ .json)
  checkpoints/step-00001000/{model,ema-0.9999}.safetensors trainer.safetensors state.json
  checkpoints/last -> step-00001000
  .lock
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: runs are not locked
    fcntl = None  # type: ignore[assignment]

from vgm_cli import atomic
from vgm_cli.engine.environment import environment, git_state
from vgm_cli.engine.run_files import LOCK, complete, files_in, read_record, refuse_foreign, same_text, used
from vgm_cli.errors import FAILED, USAGE, VgmError

REMOVED = ".checkpoints.tmp"
_held: set[int] = set()  # descriptors of locks; a forked child must not keep them when its parent dies


def _forget() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Run:
    """One run directory. As a context it holds the run's lock, which no process survives: while somebody trains, nobody
    else goes on with the run or replaces it."""

    def __init__(self, path: Path):
        self.path = path
        self.replaces = False  # what an earlier run left is still there, until this one starts
        self._lock: int | None = None
        self._made: list[Path] = []  # folders that did not exist

    @classmethod
    def create(cls, out: Path | None, name: str, resume: bool, overwrite: bool = False) -> Run:
        """A locked directory, fresh or one to go on with. One that is in use is never written into unasked, and nothing
        in it is touched before `start`."""
        if resume and overwrite:
            raise VgmError("--resume goes on with a run, --overwrite replaces it: one of them", code=USAGE)
        if out is None:
            run = cls._new_folder(Path("runs") / name.replace("/", "-") / time.strftime("%Y%m%d-%H%M%S"))
        else:
            run = cls(Path(out))
            if run.path.is_file():
                raise VgmError(f"{run.path} is a file, a run needs a directory", code=USAGE)
            run._make(run.path)
        try:
            run.lock()
            if run.path.is_dir() and not resume and used(run.path):
                if not overwrite:
                    hint = "--resume goes on with it, --overwrite starts anew"
                    raise VgmError(f"{run.path} is not empty", hint, USAGE)
                refuse_foreign(run.path, "so --overwrite will not empty it")
                run.replaces = True
        except VgmError:
            run.release()
            raise
        return run

    @classmethod
    def _new_folder(cls, wish: Path) -> Run:
        """A folder of our own, however many runs start in this second."""
        for k in itertools.count(1):
            run = cls(wish if k == 1 else wish.with_name(f"{wish.name}-{k}"))
            if run._make(run.path):
                break
        return run

    def _make(self, folder: Path) -> bool:
        """Make `folder` and those above it; was it not there?"""
        try:
            for p in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                with contextlib.suppress(FileExistsError):  # somebody was faster
                    p.mkdir()
                    self._made.append(p)
        except OSError as e:
            self.release()
            raise VgmError(f"cannot create {folder}: {e.strerror}", "choose another --out", FAILED) from e
        return folder in self._made

    # -- the lock -------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """VgmError (exit code 2) when another process trains here."""
        if fcntl is None:
            return
        try:
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise VgmError(f"cannot write into {self.path}: {e.strerror}", "choose another --out", FAILED) from e
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.read(handle, 100).decode("ascii", "replace").strip()
            os.close(handle)
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = f"process {holder}" if holder else "another process"
                hint = "wait for it or stop it, or choose another --out"
                raise VgmError(f"{self.path} is in use by {who}", hint, USAGE) from e
            return  # a file system without locks
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        self._lock = handle
        _held.add(handle)

    def release(self) -> None:
        """Let go of the lock; folders that were made for a run that did not start go."""
        if self._lock is not None:
            handle, self._lock = self._lock, None
            try:
                if all(str(p) == LOCK for p in files_in(self.path)):  # while it is ours still
                    (self.path / LOCK).unlink(missing_ok=True)
            except OSError:
                pass  # a lock file alone does no harm
            finally:
                if handle in _held:
                    _held.discard(handle)
                    os.close(handle)
        for folder in reversed(self._made):
            if folder != self.path and folder not in self.path.parents:
                continue
            with contextlib.suppress(OSError):
                for own in ("checkpoints", "samples") if folder == self.path else ():
                    (folder / own).rmdir() if (folder / own).is_dir() else None
                folder.rmdir()  # only where it is empty
        self._made = []

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    # -- records --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Make room: what the run that this one replaces has left goes, the lock stays."""
        try:
            if self.replaces:
                with contextlib.suppress(FileNotFoundError):  # at once: half of them must not be gone on with
                    os.rename(self.path / "checkpoints", self.path / REMOVED)
                for p in sorted(self.path.iterdir(), key=lambda p: p.name == "config.yaml"):
                    if p.name != LOCK:
                        shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
                self.replaces = False
            (self.path / "checkpoints").mkdir(exist_ok=True)
            (self.path / "samples").mkdir(exist_ok=True)
        except OSError as e:
            raise atomic.failure(self.path, e) from e

    def start(self, config: str, origins: Mapping[str, str], data: Mapping[str, Any]) -> None:
        """Write what makes the run known: everything at its first start, what is missing and what a resumed run may
        change at the later ones. config.yaml comes last: where it is, all is."""
        self.clear()
        command = self.path / "command.txt"
        before = command.read_text(encoding="utf-8", errors="replace") if command.is_file() else ""
        atomic.write_text(command, before + " ".join(sys.argv) + "\n")
        for name, value in (("env.json", environment), ("git.json", git_state), ("data.json", lambda: dict(data))):
            if not (self.path / name).is_file():
                atomic.write_json(self.path / name, value())
        atomic.write_json(self.path / "origins.json", dict(origins))
        atomic.write_text(self.path / "config.yaml", config)

    def record(self, name: str) -> dict[str, Any]:
        """A JSON file of this run; {} where it is missing. VgmError: it is damaged."""
        return read_record(self.path / name)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one JSON line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(atomic.dump_json(row) + "\n")
        except OSError as e:
            raise atomic.failure(self.path / "metrics.jsonl", e) from e

    def rewind_log(self, step: int) -> None:
        """Drop lines after `step`, which a resumed run writes again, and what kills and full disks left: cut lines."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        before = file.read_text(encoding="utf-8", errors="replace")
        rows, last = [], -1
        for line in before.splitlines():
            if last < (at := _step_of(line)) <= step:
                rows.append(line + "\n")
                last = at
        if "".join(rows) != before:
            atomic.write_text(file, "".join(rows))

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return complete(self.path / "checkpoints")

    def last(self) -> Path | None:
        found = self.checkpoints()
        return found[-1] if found else None

    def kept(self) -> str:
        """What a run that stops here leaves, for people."""
        last = self.last()
        return f"the last checkpoint is {last}" if last else "no checkpoint was written yet"

    @contextlib.contextmanager
    def new_checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """A folder to write a checkpoint into. Afterwards it gets its name, `last` points at it and the oldest beyond
        `keep` go; on any error it goes, and the run's other checkpoints are as they were."""
        final = self.path / "checkpoints" / f"step-{step:08d}"
        temp = final.with_name(final.name + ".tmp")
        try:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)
            yield temp
            self._sync_log()
            atomic.sync_folder(temp)
            if final.exists():
                self._discard(final)
            os.rename(temp, final)
            self._point_last()
            for old in self.checkpoints()[: -max(keep, 1)]:
                self._discard(old)
        except OSError as e:
            raise atomic.failure(final, e) from e
        finally:
            shutil.rmtree(temp, ignore_errors=True)

    def _discard(self, checkpoint: Path) -> None:
        """Take its name first: a checkpoint of that name is whole at every moment."""
        gone = checkpoint.with_name(checkpoint.name + ".old")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(checkpoint, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _point_last(self) -> None:
        """checkpoints/last -> the newest one (nowhere where the file system has no links)."""
        newest = self.last()
        link = self.path / "checkpoints" / "last"
        if newest is None:
            link.unlink(missing_ok=True)
            return
        fresh = link.with_name(".last.tmp")
        fresh.unlink(missing_ok=True)
        try:
            fresh.symlink_to(newest.name)
        except OSError as e:
            if e.errno in atomic.FULL:
                raise
            return
        os.replace(fresh, link)
        atomic.sync_folder(link.parent)

    def _sync_log(self) -> None:
        with contextlib.suppress(OSError), open(self.path / "metrics.jsonl", "rb") as f:
            os.fsync(f.fileno())

    def repair(self) -> None:
        """What a kill or a copy left: half-written and half-removed checkpoints and temporary files go, one that lacks
        only its name (state.json is written last) gets it, `last` points at the newest."""
        folder = self.path / "checkpoints"
        try:
            for temp in folder.glob("step-*.tmp"):
                if (temp / "state.json").is_file() and not temp.with_suffix("").exists():
                    os.rename(temp, temp.with_suffix(""))
            for left in (*folder.glob("*.tmp"), *folder.glob("step-*.old"), self.path / REMOVED):
                folders = left.is_dir() and not left.is_symlink()
                shutil.rmtree(left, ignore_errors=True) if folders else left.unlink(missing_ok=True)
            for p in (self.path, self.path / "samples", *self.checkpoints()):
                atomic.clean(p)
            link = folder / "last"
            if link.is_dir() and not link.is_symlink():
                copy = self.last()
                if copy is None or not same_text(link / "state.json", copy / "state.json"):
                    raise VgmError(
                        f"{link} is a folder, not the link to the newest checkpoint", "move it out of the run", USAGE
                    )
                shutil.rmtree(link)
            if folder.is_dir():
                self._point_last()
        except OSError as e:
            raise atomic.failure(folder, e) from e


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, AttributeError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by a kill goes
