"""make leaderboard: rows are made by public commands, kept stage by stage, ranked, and written down whatever is missing."""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vgm_cli import recipe as recipes
from vgm_cli.data import open_dataset
from vgm_cli.registry import registry

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def board() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("generate_results")
    sys.path.remove(str(DOCS))


@pytest.fixture
def call(vgm, board: ModuleType) -> Callable[..., Any]:
    def run(*args: str, threads: int | None = None, deadline: float = float("inf")) -> Any:
        if time.monotonic() > deadline:
            raise board.OutOfTime
        code, out, err = vgm(*args, "--json")
        if code:
            raise board.Failed(board.reason(err))
        return None if args[0] in ("train", "distill", "finetune-rl") else json.loads(out)

    return run


WRITER = "model.n_layer=1 model.n_head=2 model.n_embd=16"
FEW = "train.steps=2 train.batch_size=8 train.preview_n=0 train.precision=fp32"


@pytest.fixture
def digits() -> Path:
    """A set of 200 digits in two parts."""
    images = open_dataset("mnist5k", quiet=True)
    rows = list(range(0, 5000, 25))
    file = Path("digits.npz").absolute()
    pixels = images.images(rows).permute(0, 2, 3, 1).numpy()
    np.savez(file, images=pixels, labels=images.labels()[rows], split=(np.arange(200) % 5 == 4).astype(np.int64))
    return file


def test_rows_of_real_runs(
    board: ModuleType, call: Callable[..., Any], tiny: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator with a class, one without, a codec, a completion, a failure, and what waits for the failure."""
    monkeypatch.setattr(board.results_tables, "MAIN", str(digits))
    few = f"{FEW} data.path={digits}"
    runs = [
        board.Run("flow", f"train {tiny} {few}", bits="bits-per-dim:n=2:method=elbo:steps=2",
                  samples=20, variants=("--steps 1",), restore=("--mask lower --method ddrm --steps 2",)),
        board.Run("vae", f"train vae {few}", "fid", bits="bits-per-dim:n=8:samples=1"),
        board.Run("writer", f"train vqgan --recipe mnist-prior {few} {WRITER}", bits="bits-per-dim:n=4"),
        board.Run("codec", f"train vqvae {few}", "fid,psnr", sampled=False),
        board.Run("wrong", "train vae model.no_such=1", "fid"),
        board.Run("pupil", "distill dmd --teacher {dir}/wrong", after="wrong"),
    ]  # fmt: skip
    here = board.Board(Path("runs"), call, samples=40, restored=12)
    lost = board.leaderboard(runs, here, seeds=1, docs=Path("docs"))
    assert set(lost) == {"wrong", "pupil"} and "no_such" in lost["wrong"] and lost["pupil"] == "needs wrong"

    text = Path("docs/results.md").read_text()
    table = [r.split(" | ") for r in text.splitlines() if re.match(r"\| [123] \| ", r)]
    assert {row[1]: row[5] for row in table} == {"flow": "20", "vae": "40", "writer": "40"}  # samples
    written = next(r for r in text.splitlines() if r.startswith("| writer | mnist-tokenizer | 49 of 256 | ")).split(
        " | "
    )
    assert written[4] == "49" and float(written[9].strip(" |")) == pytest.approx(
        49 * float(written[8].split()[0]), rel=0.02
    )
    kept = json.loads(Path("runs/flow.json").read_text())["sampled --steps 1"]["value"]
    assert kept["sampled"]["steps"] == 1 and kept["sampled"]["n"] == 40 and kept["results"][0]["metric"] == "fid"
    for row in table:
        assert row[2].replace(",", "").isdigit() and all(re.search(r"\d", row[k]) for k in (4, 5, 6, 7, 8, 9, 10, 13))
    first = next(row for row in table if row[0].endswith("1"))
    assert ";" in first[7] and f"{first[1]}@1" in text  # the best is measured with two seeds
    assert "ELBO" in text and "| codec |" in text and "| lower" not in text
    assert re.search(r"\| --mask lower.* \| ddrm \| flow \| ", text)
    assert not [t for t in text.splitlines() if len(t) > 120 and t[0] != "|" and " " in t.strip()[:120]]
    assert "- wrong: " in text and "- pupil: needs wrong" in text
    assert "data.split=train" in text and Path("docs/images/results.png").exists()
    assert Path("docs/images/results-restored.png").exists()
    html = Path("runs/leaderboard.html").read_text()
    assert "<script" not in html and "http" not in re.sub(r'xmlns="[^"]*"|http-equiv', "", html)
    assert html.count("data:image/png;base64,") >= 4 and "<summary>flow</summary>" in html and "<polyline" in html

    def nothing(*args: str, **_: Any) -> Any:
        assert args[0] == "env" or "no_such" in " ".join(args), f"repeated: {args}"
        return call(*args)

    again = board.Board(Path("runs"), nothing, samples=40, restored=12)
    board.leaderboard(runs, again, seeds=1, only=["wrong"], docs=Path("docs"))
    board.leaderboard(runs, again, seeds=1, docs=Path("docs"))
    kept = text[text.index("## Every") : text.index("## Not")]
    assert kept in Path("docs/results.md").read_text()


def test_models_of_words_are_asked_for_what_they_learned(board: ModuleType, call: Callable[..., Any]) -> None:
    few = f"{FEW} model.depth=1 model.hidden_size=32 model.num_heads=2"
    run = board.Run("words", f"train sit --recipe text {few}", "fid", samples=8, variants=("--steps 2 method=euler",))
    assert board.leaderboard([run], board.Board(Path("runs"), call, samples=16), docs=Path("docs")) == {}
    asked = Path("runs/shapes-train-8.txt").read_text().splitlines()
    assert len(asked) == 8 and len({text.split()[1] for text in asked}) > 1  # evenly spaced
    head, _, line = Path("docs/results.md").read_text().partition("## Words and hints")[2].split("\n| ")[1:]
    told = dict(zip(head.split(" | "), line.split(" | ")))
    assert told["samples"] == "8" and told["asked for |"].startswith("16 training captions")
    assert (
        all(re.match(r"\d", told[key]) for key in ("FID", "FID in one step", "top-1", "top-5")) and not told["edge F1"]
    )


def value(metric: str, number: float | None, kind: str = "", n: int = 200) -> dict[str, Any]:
    return {"metric": metric, "value": number, "uncertainty": None, "n": n, "protocol": {"likelihood": kind}}


def row(name: str, config: dict[str, Any], **stages: Any) -> dict[str, Any]:
    trained = {"data": "mnist5k", "sampled": "sampled" in stages, "command": f"vgm train {name}", "seconds": 60,
               "steps": 1, "parameters": 1000, "log": {}}  # fmt: skip
    return {k: {"value": v} for k, v in {"trained": trained, "config": config, **stages}.items()}


def table_of(board: ModuleType, rows: dict[str, Any], title: str) -> list[dict[str, str]]:
    found = [t for t in board.results_tables.tables(rows) if t[0].startswith(title)]
    return [dict(zip(heads, line)) for _, _, heads, lines in found for line in lines]


def test_samplers_of_a_score_network_are_beside_each_other(board: ModuleType) -> None:
    plain = {"name": "score-sde", "steps": 200, "corrector": "none"}
    pc = {"name": "score-sde", "steps": 25, "corrector": "langevin", "snr": "0.05"}
    ode = {"name": "score-sde-ode", "rtol": "1e-2"}
    more = {
        f"sampled {i}": {
            "sampled": {"sampler": s, "nfe": 50, "n": 500, "images_per_second": 2.5},
            "results": [value("fid", f)],
        }
        for i, (s, f) in enumerate([(pc, 9.0), (ode, None)])
    }
    config = {"paper": "score-sde", "objective": {"preset": "subvp"}}
    sampled = {"sampler": plain, "nfe": 200, "n": 2000, "images_per_second": 30.0}
    bits = [value("bits-per-dim", 2.9, "ODE, dopri5")]
    made = row("score-sde", config, sampled=sampled, measured=[value("fid", 5.0)], likelihood=bits, **more)
    other = row("dps", {"paper": "dps"}, sampled=sampled, measured=[value("fid", 5.0)])
    lines = table_of(board, {"a": made, "b": other, "a@1": made}, "Score-SDE")
    assert [(x["SDE"], x["NFE"], x["samples"], x["FID"], x["bits/dim"]) for x in lines] == [
        ("sub-VP", "200", "2,000", "5", "2.9 (ODE)"), ("sub-VP", "50", "500", "9", "2.9 (ODE)"),
        ("sub-VP", "50", "500", "", "2.9 (ODE)")]  # fmt: skip
    assert ["predictor (", "predictor-c", "ODE (RK45, "] == [x["sampler"][:11] for x in lines]
    assert "snr 0.05" in lines[1]["sampler"] and "0.01)" in lines[2]["sampler"]


def test_what_was_not_measured_is_left_open(board: ModuleType) -> None:
    hints = [value("edge-f1", 0.6), value("edge-f1-other", 0.3), value("retrieval-top1", 0.5), value("fid", 8.0)]
    rows = {"hinted": row("supir", {}, paired=hints), "written": row("x", {}, sampled={"nfe": 4, "n": 9})}
    rows["written"]["tokens"] = {"value": {"tokenizer": "t", "count": 49, "vocabulary": None, "channels": 4}}
    (line,) = table_of(board, rows, "Words and hints")
    assert (line["edge F1"], line["edge F1, another's"], line["top-1"], line["FID"]) == ("0.6", "0.3", "0.5", "8")
    assert line["samples"] == "200" and not line["top-5"] and not line["FID in one step"] and not line["NFE"]
    (line,) = table_of(board, rows, "The same digit tokens, one way")
    assert line["tokens"] == "49 vectors of 4" and line["passes"] == "4" and not line["bits per token"] + line["FID"]


def test_runs_wait_for_what_they_need_and_for_nobody_else(board: ModuleType) -> None:
    began: list[str] = []
    runs = [board.Run("c", "x", after="b"), board.Run("a", "x"), board.Run("b", "x", after="a"), board.Run("bad", "x"),
            board.Run("d", "x", after="bad"), board.Run("e", "x", after="d"), board.Run("circle", "x", after="circle"),
            board.Run("late", "x")]  # fmt: skip

    def work(run: Any) -> None:
        began.append(run.name)
        if run.name == "bad":
            raise board.Failed("broken")
        if run.name == "late":
            raise board.OutOfTime

    for jobs in (1, 3):
        began.clear()
        lost = board.run_all(runs, work, jobs)
        assert lost == {
            "bad": "broken",
            "d": "needs bad",
            "e": "needs d",
            "circle": "needs circle",
            "late": "out of time",
        }
        assert sorted(began) == ["a", "b", "bad", "c", "late"]
        assert began.index("a") < began.index("b") < began.index("c")


def test_a_stage_that_failed_is_tried_again_and_others_are_not(board: ModuleType) -> None:
    tries: list[str] = []

    def make(name: str, fails: bool) -> Any:
        tries.append(name)
        if fails:
            raise board.Failed("no weights")
        return {"n": 1}

    for fails in (True, False, False):
        kept = board.Kept(Path("x.json"))
        assert kept.stage("good", lambda: make("good", False)) == {"n": 1}
        assert kept.stage("bad", lambda fails=fails: make("bad", fails)) == (None if fails else {"n": 1})
    assert tries == ["good", "bad", "bad"]


def test_when_minutes_are_over_nothing_begins_and_nothing_is_lost(board: ModuleType, call: Callable[..., Any]) -> None:
    runs, here = [board.Run("a", "train vae"), board.Run("b", "distill dmd", after="a")], board.Board(Path("r"), call)
    assert board.leaderboard(runs, here, minutes=0, docs=Path("docs")) == {"a": "out of time", "b": "needs a"}
    assert not Path("r/a.json").exists() and "- a: out of time" in Path("docs/results.md").read_text()


@pytest.mark.slow
def test_when_minutes_are_over_a_run_is_kept_and_goes_on(board: ModuleType, tiny: Path) -> None:
    """The command itself, in a process of its own: it is told to stop, saves, and is continued by the next call."""
    runs, board_of = (
        [board.Run("flow", f"train {tiny} train.steps=100000 train.save_every=100000")],
        board.Board(Path("r")),
    )
    began = time.monotonic()
    assert board.leaderboard(runs, board_of, minutes=0.35, docs=Path("docs")) == {"flow": "out of time"}
    assert time.monotonic() - began < 60
    assert json.loads(Path("r/flow/checkpoints/last/state.json").read_text())["step"] > 0
    assert "- flow: out of time" in Path("docs/results.md").read_text()


def test_every_paper_has_a_row_that_can_be_run(board: ModuleType) -> None:
    runs = board.all_runs()
    assert len({run.name for run in runs}) == len(runs)
    names, papers = [run.name for run in runs], set()
    methods = set(registry().names("sampler"))
    for run in runs:
        verb, paper, *rest = run.command.split()
        papers.add(paper)
        named = rest[rest.index("--recipe") + 1] if "--recipe" in rest else None
        assert recipes.locate(paper, named)[1].is_file() and verb in ("train", "distill", "finetune-rl")
        assert not run.after or names.index(run.after) < names.index(run.name)  # so that none is late for others
        before, one = set(), run.after
        while one:
            before.add(one)
            one = next(r.after for r in runs if r.name == one)
        assert set(re.findall(r"\{dir\}/([\w-]+)", run.command)) <= before, run.name
        assert {m for task in run.restore for m in re.findall(r"--method (\S+)", task)} <= methods
    small = {n.split("/")[0] for n in recipes.shipped() if n.endswith("/mnist")}
    assert small <= papers
