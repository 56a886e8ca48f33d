"""vgm report: one page about runs, whatever state they are in and whoever made them."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from vgm_cli import recipe as recipes
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.parts import Reference
from vgm_cli.engine.report import charts, gather
from vgm_cli.engine.train.loop import train

FEW = ("train.steps=4", "train.save_every=2", "train.preview_every=2", "train.preview_n=4", "model.hidden_size=16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with previews; tests work on copies."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.yaml").write_text(textwrap.dedent(TINY))
    train(recipes.load(str(folder / "tiny.yaml"), None, list(FEW)), folder / "r", quiet_end=True)
    return folder / "r"


@pytest.fixture
def runs(trained: Path) -> tuple[Path, Path]:
    """Two runs that differ in their learning rate."""
    for name in ("a", "b"):
        shutil.copytree(trained, Path("runs") / name, symlinks=True)
    config = Path("runs/b/config.yaml")
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.003"))
    return Path("runs/a"), Path("runs/b")


def result(value: float, **more: Any) -> dict[str, Any]:
    return {"metric": "fid", "value": value, "uncertainty": 0.5, "n": 100, "n_reference": 500,
            "protocol": {"name": "vgm", "features": "mnist", **more}}  # fmt: skip


def test_one_run(vgm, runs: tuple[Path, Path]) -> None:
    code, out, err = vgm("report", runs[0], "--png", "curves")
    assert code == 0, err
    html = Path("report.html").read_text()
    assert "<script" not in html and "http" not in re.sub(r'xmlns="[^"]*"|http-equiv', "", html)  # nothing from outside
    assert html.count("data:image/png;base64,") == 3 and "step 2</figcaption>" in html  # reals, two previews
    assert "<td class=n>train.preview_n</td><td class=n>4</td><td class=n>command line</td>" in html
    assert "4 of 4" in html and "mnist5k, 5000 images" in html and html.count("<polyline") > 2
    with Image.open("curves/loss.png") as picture:
        assert picture.size == (2 * charts.WIDTH, 2 * charts.HEIGHT)
        assert len(set(map(tuple, np.asarray(picture).reshape(-1, 3)))) > 10
    assert out.strip() == "report.html"
    assert vgm("report", runs[0])[0] == 2  # it is there
    assert vgm("report", runs[0], "--png", "curves", "--overwrite", "-o", "again.html")[0] == 0
    assert vgm("report", "-o", "newest.html")[0] == 0


def test_two_runs_and_their_figures(vgm, runs: tuple[Path, Path]) -> None:
    for name, value, more in (("a", 9.8, {}), ("b", 8.1, {}), ("c", 7.0, {"features": "inception"})):
        Path(f"{name}.json").write_text(json.dumps([result(value, **more)]))
    code, _, err = vgm("report", *runs, "a.json", "b.json", "c.json")
    assert code == 0, err
    html = Path("report.html").read_text()
    differ = html[html.index("Settings that differ") : html.index("<h2>Where")]
    assert differ.count("<tr>") == 2 and "optimizer.lr" in differ and "0.003" in differ
    assert all(f"{v} ± 0.50 (n=100){mark}<" in html for v, mark in (("9.80", ""), ("8.10", ""), ("7.00", " *")))
    assert "c.json is not comparable with the first: features come from different networks" in html
    assert ">a</text>" in html and ">b</text>" in html  # names of the curves


def test_a_strangers_run_only_shows(vgm, runs: tuple[Path, Path]) -> None:
    evil = "<img src=x onerror=alert(1)>"
    run = runs[0]
    (run / "command.txt").write_text(f"vgm train {evil}\n")
    with open(run / "config.yaml", "a") as f:
        f.write(f'"{evil}": "{evil}"\n')
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 5, evil: 1.0}) + "\n" + json.dumps({"step": 6, evil: 2.0}) + "\n")
    (run / "data.json").write_text(json.dumps({"root": evil}))
    (run / "samples/step-000003.png").write_text(evil)
    (run / "samples/step-000009.png").symlink_to("/etc/hostname")
    code, _, err = vgm("report", run, "--png", "curves")
    assert code == 0 and "step-000003.png is left out" in err, err
    html = Path("report.html").read_text()
    assert evil not in html and "&lt;img src=x" in html and html.count("data:image/png") == 3
    assert all(p.parent == Path("curves") for p in Path("curves").rglob("*"))


def test_damage_leaves_gaps(vgm, runs: tuple[Path, Path]) -> None:
    run = runs[0]
    for name in ("env.json", "origins.json", "checkpoints/last/state.json"):
        (run / name).write_text("{cut")
    (run / "data.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    (run / "checkpoints/last/model.safetensors").write_bytes(b"cut")
    code, _, err = vgm("report", run)
    assert code == 0 and "env.json is damaged" in err, err
    html = Path("report.html").read_text()
    assert "dit" in html and "<h2>Curves" not in html and "<h2>Pictures" in html


def test_the_chain_goes_through_parts_that_are_there_and_names_those_that_are_not(runs: tuple[Path, Path]) -> None:
    first, second = (ckpt.resolve(r) for r in runs)
    header = ckpt.read_header(first)
    other = Reference(str(second.resolve()), ckpt.file_hash(second), "dit")
    header.parts = {"teacher": other, "codec": Reference("/nowhere.safetensors", "00ff", "kl-f8")}
    ckpt.save_network(first, load_file(first), header)
    chain = gather.read(runs[0], "a").chain
    assert chain is not None and chain.says.startswith("dit, step 4")
    assert chain.parts["teacher"].says == "dit, step 4, ema-0.9" and not chain.parts["teacher"].note
    assert chain.parts["codec"].path == "/nowhere.safetensors" and "missing" in chain.parts["codec"].note


@pytest.mark.parametrize(("target", "code"), [("nosuch", 2), (".", 2), ("text.json", 1)])
def test_what_is_no_run_is_said(vgm, target: str, code: int) -> None:
    Path("text.json").write_text("{}")
    found, _, err = vgm("report", target)
    assert found == code and "error" in err and not Path("report.html").exists()


def test_curves_of_any_numbers() -> None:
    """One point, equal values, decades, nothing finite: a picture or none, and coordinates that are numbers."""
    for points in (
        [(1, 2.0)],
        [(1, 5.0), (2, 5.0)],
        [(1, 0.0), (9, 0.0)],
        [(0, 1e-6), (5, 1e6)],
        [(1, -3.0), (2, -1.0)],
    ):
        for log in {False, all(y > 0 for _, y in points)}:
            drawn = charts.svg({"x": points}, "step", log)
            assert drawn.count("<polyline") >= 2 and "nan" not in drawn and "inf" not in drawn, (points, log)
    assert charts.svg({"x": [(1, float("nan"))]}, "step") == ""
    long = charts.drawable({"x": [(i, float(i)) for i in range(50_001)]}, log=False)["x"]
    assert len(long) <= charts.POINTS + 1 and long[-1] == (50_000, 50_000.0)
