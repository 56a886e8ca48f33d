"""Run directories: who may write into one, what a kill or a full disk leaves, what a resumed run refuses."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from vgm_cli import atomic
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import run as runs
from vgm_cli.engine.distributed import pick_device
from vgm_cli.errors import VgmError


def test_json_holds_no_number_that_json_does_not_know() -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": (1, {"d": -math.inf}), "e": Path("x"), 1: True}
    text = atomic.dump_json(value)
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": [1, {"d": None}], "e": "x", "1": True}


def make_run(path: Path, *steps: int, at: float = 0.0, paper: str = "dit") -> Path:
    """What tells a run: its recipe and complete checkpoints."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(f"paper: {paper}\ntrain: {{steps: 8}}\n")
    for step in steps:
        folder = path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        os.utime(folder, (at, at))
    return path


def test_short_names_mean_the_newest_run() -> None:
    old = make_run(Path("runs/dit-mnist/20260101-000000"), 4, at=10)
    new = make_run(Path("runs/dit-mnist/20250101-000000"), 4, 8, at=20)
    other = make_run(Path("runs/sit-mnist/20260101-000000"), 4, at=30, paper="sit")
    make_run(Path("runs/dit-mnist/20270101-000000"))  # nothing saved yet
    for name in ("dit", "dit/mnist", "dit-mnist", "runs/dit-mnist"):
        assert runs.newest(name) == new, name
        assert ckpt.resolve(name) == new / "checkpoints/step-00000008/model.safetensors"
    assert runs.newest("last") == runs.newest("runs") == other
    assert runs.newest("di") is None and runs.newest(old.parent / "20270101-000000") is None
    assert ckpt.resolve(old).parents[2] == old
    for name in ("di", "runs/dit-mnist/20270101-000000"):
        with pytest.raises(VgmError) as e:
            ckpt.resolve(name)
        assert e.value.code == 2


def test_devices_by_name() -> None:
    assert pick_device().type in ("cpu", "cuda")
    assert pick_device("cpu").type == "cpu"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name in ("gpu", "cpu:1", "cuda:", "cuda:x", "cuda:-1", f"cuda:{gpus}", "tpu", "mps:0"):
        with pytest.raises(VgmError) as e:
            pick_device(name)
        assert e.value.code == 2, name
