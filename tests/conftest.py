"""Shared fixtures. Every test runs with third-party plugins off and inside a temporary folder of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["VGM_PLUGINS"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TINY = """
paper: dit
model: {name: dit, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2, learn_sigma: false}
objective: {name: flow-matching, label_dropout: 0.1}
sampler: {name: euler, steps: 2}
guidance_scale: 1.5
data: {path: mnist5k}
optimizer: {lr: 1.0e-3}
train: {steps: 8, batch_size: 16, precision: fp32, save_every: 4, preview_every: 1000, preview_n: 0, log_every: 1,
        ema: [0.9], keep: 5}
"""

# Files of minutes go to the workers first, so that none is left alone with one at the end.
LONG = (
    "test_tutorial.py",
    "test_training.py",
    "test_distill.py",
    "test_matrix.py",
    "test_convert.py",
    "test_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths (./runs) land in the test's own folder; output modes do not leak between tests."""
    from vgm_cli.ui import ui

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VGM_CACHE", str(tmp_path / "cache"))
    for flag in ("json", "quiet", "debug"):
        monkeypatch.setattr(ui, flag, False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe that trains a small DiT for 8 steps."""
    path = tmp_path / "tiny.yaml"
    path.write_text(textwrap.dedent(TINY))
    return path


class Process:
    """The CLI in a process of its own, for signals and several ranks."""

    def __init__(self, *args: object, env: dict[str, str] | None = None):
        ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup hand no ignored SIGHUP on
        try:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "vgm_cli", *map(str, args)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )
        finally:
            signal.signal(signal.SIGHUP, ours)

    def wait(self, timeout: float = 300) -> tuple[int, str, str]:
        out, err = self.child.communicate(timeout=timeout)
        return self.child.returncode, out, err

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.child.send_signal(number)


@pytest.fixture
def process() -> type[Process]:
    return Process


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vgm_cli.engine.train.loop", "vgm_cli.engine.sample.loop", "torch._dynamo", "pytest"])


def _main(args: list[str], environ: dict[str, str], outputs: list[str]) -> None:
    """What `python -m vgm_cli` does, where torch is imported already."""
    for number, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["vgm", *args]
    from vgm_cli.__main__ import main

    main()


class Forked:
    """The CLI in a process of its own that begins in milliseconds, forked from one that has imported torch; with
    several ranks, those that `torchrun` would start."""

    def __init__(self, *args: object, ranks: int = 1, env: dict[str, str] | None = None):
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            both = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environ |= {k: str(v) for k, v in both.items()}
        self.children, self.outputs = [], []
        for rank in range(ranks):
            own = environ | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            self.outputs.append([f".rank-{rank}-{time.time_ns()}.{name}" for name in ("out", "err")])
            child = FORKS.Process(target=_main, args=([*map(str, args)], own, self.outputs[-1]))
            child.start()
            self.children.append(child)

    def running(self) -> bool:
        return all(child.exitcode is None for child in self.children)

    def wait(self, timeout: float = 300) -> tuple[int, str, str]:
        """(the first exit code that is not 0, or 0; stdout of the first rank; stderr of all)."""
        for child in self.children:
            child.join(timeout)
            assert child.exitcode is not None, "it has not ended"
        texts = [[Path(file).read_text() for file in files] for files in self.outputs]
        codes = [child.exitcode or 0 for child in self.children]
        return next((c for c in codes if c), 0), texts[0][0], "".join(err for _, err in texts)

    def kill(self, number: int = signal.SIGKILL) -> None:
        for child in self.children:
            if child.exitcode is None:
                os.kill(child.pid or 0, number)


@pytest.fixture
def forked() -> Iterator[Callable[..., Forked]]:
    """forked("train", FILE, ranks=2).wait() -> (exit code, stdout, stderr); what a failed test leaves is killed."""
    started: list[Forked] = []

    def start(*args: object, ranks: int = 1, env: dict[str, str] | None = None) -> Forked:
        started.append(Forked(*args, ranks=ranks, env=env))
        return started[-1]

    yield start
    for job in started:
        job.kill()
