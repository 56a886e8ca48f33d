"""The laws of the trainer: resume, processes, kills, signals, divergence, what a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vgm_cli import recipe as recipes
from vgm_cli.engine.train.loop import train
from vgm_cli.engine.train.report import Report
from vgm_cli.errors import VgmError


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


OBJECTIVES = {
    "flow-matching": ["objective={name: flow-matching}"],
    "iddpm": ["objective={name: iddpm, schedule: cosine, resampler: loss-second-moment}", "model.learn_sigma=true"],
    "gaussian": ["objective={name: gaussian, path: cosine, prediction: v}"],
    "rectified-flow": ["objective={name: rectified-flow}"],
    "two emas, accumulation, clipping": ["train.ema=[0.9, {sigma_rel: 0.1}]", "train.accumulate=2", "train.clip=0.1"],
    "schedule": ["optimizer.schedule=cosine", "optimizer.warmup=3"],
    "groups, plateaus, skipping, an average of every third step": [
        "optimizer.groups=[{match: blocks, lr: 0.5, weight_decay: 0}]",
        "optimizer.weight_decay=0.1",
        "optimizer.final_weight_decay=0.2",
        "optimizer.schedule=steps",
        "optimizer.milestones={3: 0.1}",
        "train.skip={above: 1, norm: sum, after: 5}",
        "train.ema=[{decay: 0.9, every: 3}]",
    ],
    "bf16": ["train.precision=bf16"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resume_is_bit_exact(tiny: Path, tmp_path: Path, name: str) -> None:
    """4 + 4 steps with a resume in between equal 8 steps: weights, averages and optimizer state."""

    def fresh() -> recipes.Recipe:
        return recipes.load(str(tiny), None, OBJECTIVES[name])

    train(fresh(), tmp_path / "whole")
    train(fresh(), tmp_path / "parts", stop_after=4)
    train(fresh(), tmp_path / "parts", resume=True)
    files = sorted(p.stem for p in (tmp_path / "whole/checkpoints/step-00000008").glob("*.safetensors"))
    assert {"model", "trainer"} < set(files) and any(f.startswith("ema-") for f in files)
    for file in files:
        assert_same(weights(tmp_path / "whole", 8, file), weights(tmp_path / "parts", 8, file))
    logs = [(tmp_path / r / "metrics.jsonl").read_text() for r in ("whole", "parts")]
    rows = [[json.loads(x) for x in log.splitlines()] for log in logs]
    assert [r["step"] for r in rows[0]] == list(range(1, 9))
    assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]


def test_training_changes_weights_and_lowers_the_loss(tiny: Path, tmp_path: Path) -> None:
    r = recipes.load(str(tiny), None, ["train.steps=60", "train.batch_size=64", "optimizer.lr=3e-3"])
    train(r, tmp_path / "run")
    losses = [json.loads(x)["loss"] for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_two_processes_equal_one(tiny: Path, tmp_path: Path, vgm, process: type) -> None:
    """Gradients, and so weights, do not depend on how many processes share the batch."""
    one = vgm("train", tiny, "--out", tmp_path / "one")
    two = process("train", tiny, "--out", tmp_path / "two", "--nproc", 2).wait()
    assert one[0] == 0, one[2]
    assert two[0] == 0, two[2]
    a, b = weights(tmp_path / "one", 8), weights(tmp_path / "two", 8)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=2e-6)
    rows = [[json.loads(x) for x in (tmp_path / r / "metrics.jsonl").read_text().splitlines()] for r in ("one", "two")]
    assert [r["loss"] for r in rows[0]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-4)


def test_killed_at_any_moment_it_resumes_bit_exactly(tiny: Path, tmp_path: Path, forked: Any) -> None:
    """SIGKILL, several times, then resume until done: identical to a run that was never killed."""
    long = ["train.steps=20", "train.save_every=1", "train.keep=3"]
    whole = forked("train", tiny, *long, "--out", tmp_path / "whole").wait()
    assert whole[0] == 0, whole[2]
    run = tmp_path / "killed"
    for wanted in (3, 11):
        resume = ["--resume"] if run.exists() else []
        child = forked("train", tiny, *long, "--out", run, *resume)
        deadline = time.time() + 120
        while time.time() < deadline and not (run / f"checkpoints/step-{wanted:08d}").exists():
            assert child.running(), child.wait()[2]
            time.sleep(0.005)
        child.kill(signal.SIGKILL)
        child.wait()
    last = forked("train", tiny, *long, "--out", run, "--resume").wait()
    assert last[0] == 0, last[2]
    for file in ("model", "ema-0.9", "trainer"):
        assert_same(weights(tmp_path / "whole", 20, file), weights(run, 20, file))
    assert not list((run / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(tiny: Path, tmp_path: Path, forked: Any, number: int, code: int) -> None:
    run = tmp_path / "run"
    child = forked("train", tiny, "train.steps=100000", "train.save_every=100000", "--out", run)
    deadline = time.time() + 120
    while time.time() < deadline and not (run / "metrics.jsonl").exists():
        assert child.running(), child.wait()[2]
        time.sleep(0.02)
    child.kill(number)
    got, _, err = child.wait()
    assert got == code, err
    assert "--resume" in err and "Traceback" not in err
    step = json.loads((run / "checkpoints/last/state.json").read_text())["step"]
    assert step == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_a_signal_between_step_and_save_loses_nothing(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """It comes while a step is logged, after the decision whether to save: the next step is saved and the last."""
    row = Report.row

    def interrupted(self: Report, done: int, regular: bool) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        row(self, done, regular)

    monkeypatch.setattr(Report, "row", interrupted)
    r = recipes.load(str(tiny), None, ["train.log_every=1", "train.save_every=1000"])
    with pytest.raises(VgmError, match="stopped after step 3") as stopped:
        train(r, tmp_path / "run")
    assert stopped.value.code == 130
    assert json.loads((tmp_path / "run/checkpoints/last/state.json").read_text())["step"] == 3


def test_divergence_stops_with_the_last_good_checkpoint(tiny: Path, tmp_path: Path, vgm) -> None:
    bad = ["optimizer.lr=1e30", "train.steps=50", "train.save_every=1"]
    code, _, err = vgm("train", tiny, *bad, "--out", tmp_path / "run")
    assert code == 5 and "not finite" in err
    for file in (tmp_path / "run/checkpoints").glob("step-*/state.json"):
        assert json.loads(file.read_text())["step"] < 50


def test_run_directory_is_complete(tiny: Path, tmp_path: Path) -> None:
    r = recipes.load(str(tiny), None, ["train.preview_every=8", "train.preview_n=20"])
    train(r, tmp_path / "run")
    run = tmp_path / "run"
    for name in (
        "config.yaml",
        "origins.json",
        "command.txt",
        "env.json",
        "git.json",
        "data.json",
        "card.md",
        "metrics.jsonl",
        "samples/step-000008.png",
        "samples/step-000008.json",
    ):
        assert (run / name).exists(), name
    assert (run / "checkpoints/last").resolve().name == "step-00000008"
    assert json.loads((run / "origins.json").read_text())["train.preview_n"] == "command line"
    again = recipes.load(str(run / "config.yaml"))
    assert again.config["model"] == r.config["model"]
    card = (run / "card.md").read_text()
    assert "8 steps" in card and "TODO" not in card


def test_a_used_directory_is_not_written_into(tiny: Path, tmp_path: Path, vgm) -> None:
    assert vgm("train", tiny, "--out", tmp_path / "run")[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_text()
    code, _, err = vgm("train", tiny, "--out", tmp_path / "run")
    assert code == 2 and "--resume" in err
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    code, _, err = vgm("train", tiny, "optimizer.lr=1", "--out", tmp_path / "run", "--resume")
    assert code == 2 and "optimizer.lr" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    code, _, err = vgm("train", tiny, "--out", tmp_path / "mine", "--overwrite")
    assert code == 2 and (tmp_path / "mine/thesis.txt").exists()


def test_batches_that_do_not_divide_are_refused(tiny: Path) -> None:
    with pytest.raises(VgmError, match="does not divide"):
        train(recipes.load(str(tiny), None, ["train.batch_size=10", "train.accumulate=4"]))


@pytest.mark.parametrize("paper", ["vae", "vqgan", "stylegan", "glow", "dit", "rectified-flow"])
def test_default_recipes_take_an_unlabelled_folder(tmp_path: Path, vgm, paper: str) -> None:
    """RGB images of 32 x 32 without classes or splits; the recipe's split belongs to its own data."""
    import numpy as np
    from PIL import Image

    (tmp_path / "data").mkdir()
    for i in range(9):
        image = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "data" / f"{i}.png")
    codec = []
    if paper == "dit":
        (tmp_path / "codec.yaml").write_text("base: ldm/small-codec\ntrain: {steps: 2, batch_size: 4}\n")
        codec = [f"codec.fallback={tmp_path / 'codec.yaml'}"]
    few = ("train.steps=2", "train.batch_size=4", "train.preview_n=2", *codec)
    code, _, err = vgm("train", paper, f"data.path={tmp_path / 'data'}", "--out", tmp_path / "run", *few)
    assert code == 0, err
    if paper != "vqgan":
        code, _, err = vgm("sample", tmp_path / "run", "-n", 2, "--out", tmp_path / "x.png")
        assert code == 0, err
    kept = recipes.load("vae", None, ["data.path=mnist5k"]).config["data"]["split"]
    asked = recipes.load("vae", None, ["data.split=val", "data.path=elsewhere"]).config["data"]["split"]
    assert (kept, asked) == ("train", "val")


@pytest.mark.parametrize(
    ("size", "codec"),
    [(32, "short"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((64, "short"), (32, "as shipped")))],
)
def test_own_images_train_with_no_other_option(tmp_path: Path, vgm, size: int, codec: str) -> None:
    """Class folders of RGB images: channels, size and class count come from the data, and a codec is trained first. Only
    the length of that training differs between the two."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for c, name in enumerate(("cats", "dogs", "owls")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            image = rng.integers(0, 80, (size, size, 3), dtype=np.uint8)
            image[..., c] += 150
            Image.fromarray(image).save(tmp_path / "data" / name / f"{i}.png")
    quick = []
    if codec == "short":
        (tmp_path / "codec.yaml").write_text("base: ldm/small-codec\ntrain: {steps: 4, batch_size: 4}\n")
        quick = ["codec.fallback=codec.yaml"]
    own = ["train", "dit", f"data.path={tmp_path / 'data'}", "train.steps=3", "train.preview_n=6", *quick]
    code, _, err = vgm(*own, "--out", tmp_path / "run")
    assert code == 0, err
    assert "training one first" in err
    for name in ("metrics.jsonl", "card.md", "samples/step-000004.png" if codec == "short" else "config.yaml"):
        assert (tmp_path / "run/codec" / name).is_file(), name
    six = ("-n", 6, "--label", "owls", "--steps", 2, "--out", tmp_path / "x.png")
    code, _, err = vgm("sample", tmp_path / "run", *six)
    assert code == 0, err
    picture = Image.open(tmp_path / "x.png")
    assert picture.mode == "RGB" and picture.width > 2 * size
    header = json.loads((tmp_path / "run/data.json").read_text())
    assert (header["image_size"], header["image_channels"], header["num_classes"]) == (size, 3, 3)
