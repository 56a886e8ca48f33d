"""What a GPU would show, on a machine without one: the script of `make gpu` in a dry run, training and sampling on a
pretended device, sharding over two CPU processes, and the sentence for a full memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vgm_cli import recipe as recipes
from vgm_cli.engine.train import loop as trainers
from vgm_cli.engine.train.setup import should_compile

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "checks",
    [
        "peak,dit,memory",
        pytest.param(
            "dit,lightningdit,meanflow,var,mar,scm,maskgit,randar,starflow,ldm,score-sde,vdmpp,vqvae",
            marks=pytest.mark.slow,
        ),
        pytest.param("dit,add,controlnet,supir,ldm-openmoji,sit-openmoji", marks=pytest.mark.slow),
        pytest.param(
            "peak,dit,dit-sampling,glow,llamagen-sampling,sampling,networks,compile-sit,memory,precision,warm-1,sit",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_script_runs_dry(checks: str, tmp_path: Path) -> None:
    """Tiny and on the CPU: all parts of the report are there."""
    command = ["bash", str(ROOT / "tests/gpu/run.sh"), str(tmp_path / "out"), "--dry-run", "--only", checks]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    assert report["dry_run"] and list(report["checks"]) == checks.split(",")
    assert {c["status"] for c in report["checks"].values()} == {"ok"}
    rows = {r["what"]: r for c in report["checks"].values() for r in c["rows"]}
    assert rows["DiT-XL/2 256: plain"]["ours_over_plain"] > 0 and rows["DiT-XL/2 256: ours"]["mfu"] > 0
    assert "networks" not in checks or rows["sit/mnist"]
    assert "memory" not in checks or "says" in rows["vgm train out of memory"]
    last = found.stdout.strip().splitlines()
    assert any("DiT-XL/2 256: ours" in line for line in last) and (tmp_path / "out/log.txt").is_file()


def test_every_paper_that_trains_at_scale_has_a_row() -> None:
    """A published recipe of another paper needs a training row, in speed.py or papers.py."""
    sys.path.insert(0, str(ROOT / "tests/gpu"))
    import jobs
    import papers

    own = {"adm-unet": "adm", "stylegan": "stylegan2"}
    # trained like another paper's, or only sampled
    elsewhere = {"vae", "vqgan", "dps", "flow-grpo", "consistency", "rectified-flow"}
    shipped = {name.partition("/")[0] for name in recipes.shipped()}
    assert not {p for p in shipped if own.get(p, p) not in jobs.ALONE} - elsewhere
    assert set(papers.PAPERS) <= set(jobs.ALONE) and all(p.recipe in recipes.shipped() for p in papers.PAPERS.values())


def test_the_script_refuses_unknown_checks(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/gpu/run.py"), str(tmp_path), "--only", "pek"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and "no such check: pek" in found.stderr


# -- the pretended device ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["not slow", "slow"])
def test_everything_computes_where_it_is_told(chosen: str) -> None:
    """tests/gpu/pretended.py: no step mixes devices or makes the CPU wait."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"addopts=-m '{chosen}'"]
    found = subprocess.run([*command, str(ROOT / "tests/gpu/pretended.py")], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-1000:]
    assert " passed" in found.stdout or " skipped" in found.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vgm_cli.data import open_dataset

    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    found = open_dataset("mnist5k").gather(range(0, 5000, 312))
    np.savez(path, images=found["x"].permute(0, 2, 3, 1).numpy(), labels=found["label"].numpy())
    return path


# -- sharding ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("again", ["sharded", "alone"])
def test_sharded_over_two_processes_equals_one(again: str, tiny: Path, tmp_path: Path, process: type) -> None:
    """FSDP2: 4 steps in two processes, and 4 more that go on from there, sharded as before or unsharded in one, leave
    the weights, averages and moments of 8 unsharded steps."""
    settings = ("train.fsdp=true", "train.clip=1.0")
    out = ("--out", tmp_path / "two")
    done = process("train", tiny, *out, "--nproc", 2, "--stop-after", 4, *settings).wait()
    assert done[0] == 0, done[2]
    whole = recipes.load(str(tiny), None, list(settings))
    if again == "sharded":
        done = process("train", tiny, *out, "--nproc", 2, "--resume", *settings).wait()
        assert done[0] == 0, done[2]
    else:
        trainers.train(whole, tmp_path / "two", resume=True)
    trainers.train(whole, tmp_path / "one")
    for file in ("model", "ema-0.9", "trainer"):
        for step in (4, 8):
            a, b = (
                load_file(tmp_path / r / f"checkpoints/step-{step:08d}" / f"{file}.safetensors") for r in ("one", "two")
            )
            assert a.keys() == b.keys()
            for k in a:
                torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=2e-6)


def test_sharding_refuses_objectives_that_need_whole_networks(vgm: Any, digits: Path, tmp_path: Path) -> None:
    code, _, err = vgm("train", "glow", "train.fsdp=true", f"data.path={digits}", "--out", tmp_path / "run")
    assert code == 2 and "train.fsdp=true does not go with the objective GlowObjective" in err


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
@pytest.mark.parametrize(
    ("command", "lower"),
    [
        (["train", "sit", "--out", "run"], "train.accumulate=2"),
        (["sample", "mnist-codec", "-n", "4"], "--batch-size"),
        (["evaluate", "mnist-codec", "--metrics", "psnr"], "--batch-size"),
    ],
)
def test_out_of_memory_is_one_sentence(
    vgm: Any, monkeypatch: pytest.MonkeyPatch, problem: Exception, command: list[str], lower: str
) -> None:
    from vgm_cli.engine import checkpoint
    from vgm_cli.engine.train import loop as trainer

    def full(*args: Any, **kwargs: Any) -> Any:
        raise problem

    monkeypatch.setattr(trainer, "train", full)
    monkeypatch.setattr(checkpoint, "read_tensors", full)
    code, _, err = vgm(*command)
    assert code == 1 and "out of GPU memory" in err and lower in err
    assert "Traceback" not in err and "bug" not in err


def test_networks_that_cannot_recompute_activations_are_named(vgm: Any, digits: Path, tmp_path: Path) -> None:
    code, _, err = vgm("train", "vae", "train.checkpointing=true", f"data.path={digits}", "--out", tmp_path / "run")
    assert code == 2 and "vae: no activation checkpointing" in err and "train.accumulate" in err


# -- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "left"),
    [
        ("stylegan/mnist", ["objective.path_weight=2"], ["discriminator", "model"]),
        (
            "vqgan/small-tokenizer",
            [
                "objective.disc_start=0",
                "roles.discriminator={kind: model, name: patchgan, in_channels: 1, n_layers: 1}",
            ],
            ["discriminator", "model"],
        ),
        ("sit/mnist", ["codec=null", "model={name: sit, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2}"], []),
    ],
)
def test_networks_that_are_differentiated_twice_are_not_compiled(
    vgm: Any, name: str, more: list[str], left: list[str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.compile=on says so in one sentence and trains; the other networks are compiled, which differentiates once."""
    compiled: list[Any] = []
    original = torch.nn.Module.compile

    def compile_(self: Any) -> None:
        compiled.append(self)
        original(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    own = ["train.steps=1", "train.batch_size=4", "train.preview_n=0", "train.precision=fp32", f"data.path={digits}"]
    code, _, err = vgm("train", name, "train.compile=on", "--out", tmp_path / "run", *own, *more)
    assert code == 0, err
    assert (f"not compiled: {', '.join(left)};" in err) == bool(left) and len(compiled) == (not left)


@pytest.mark.parametrize(
    ("asked", "device", "steps", "width", "want"),
    [
        ("auto", "cuda", 2400, 8, False),  # the shipped demo: a small network is compiled longer than it trains
        ("auto", "cuda", 20_000, 8, True),
        ("auto", "cuda", 2400, 8000, True),  # 64 M parameters
        ("auto", "cuda", 1999, 8000, False),
        ("auto", "cpu", 10**6, 8000, False),
        ("on", "cpu", 1, 8, True),
        (False, "cuda", 10**6, 8000, False),
    ],
)
def test_auto_compiles_where_the_run_wins_it_back(asked: Any, device: str, steps: int, width: int, want: bool) -> None:
    from types import SimpleNamespace

    network = torch.nn.Linear(width, width, device="meta")
    options = SimpleNamespace(compile=asked, steps=steps)
    assert should_compile(options, torch.device(device), [network]) is want


def test_full_precision_breaks_no_graph() -> None:
    from vgm_cli.nn.precision import full_precision

    def inside(x: torch.Tensor) -> torch.Tensor:
        with full_precision(x.device):
            return x.float() @ x.float()

    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.compile(inside, backend="eager", fullgraph=True)(x)
    assert got.dtype == torch.float32 and torch.equal(got, x @ x)


def test_the_script_prints_its_figures_as_markdown(tmp_path: Path) -> None:
    ours = {"what": "A: ours", "ms": 10.0, "images_per_s": 100.0, "mfu": 0.5, "gib": 2.0, "batch": 8,
            "compiled": True, "checkpointing": False}  # fmt: skip
    rows = [ours, {"what": "A: plain", "ms": 11.0}, {"what": "other", "value": 0.25}]
    checks = {"a": {"status": "ok", "seconds": 3.0, "error": "", "rows": rows}}
    facts = {"device": "A card", "torch": "2", "cores": 4, "date": "2026-01-01", "checks": checks}
    (tmp_path / "gpu.json").write_text(json.dumps(facts))
    command = [sys.executable, str(ROOT / "tests/gpu/run.py"), str(tmp_path), "--table"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert "| A, 8 images, compiled | 10 ms | 100 | 50.0 % | 2.0 GiB | 11 ms |" in found.stdout, found.stderr
    assert "- `a`: ok in 3 s\n  - other: value 0.25" in found.stdout and found.stdout.startswith("A card, torch 2")
