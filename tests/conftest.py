"""Shared fixtures. Every test runs with third-party plugins off and inside a temporary folder of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
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
        self.child = subprocess.Popen(
            [sys.executable, "-m", "vgm_cli", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )

    def wait(self, timeout: float = 300) -> tuple[int, str, str]:
        out, err = self.child.communicate(timeout=timeout)
        return self.child.returncode, out, err

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.child.send_signal(number)


@pytest.fixture
def process() -> type[Process]:
    return Process
