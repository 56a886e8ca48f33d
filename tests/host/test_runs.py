"""Run directories: who may write into one, what a kill or a full disk leaves, what a resumed run refuses."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vgm_cli import atomic
from vgm_cli import recipe as recipes
from vgm_cli.__main__ import run as main
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import run as runs
from vgm_cli.engine import run_files
from vgm_cli.engine.processes import pick_device
from vgm_cli.engine.run import Run
from vgm_cli.engine.train import tracking
from vgm_cli.engine.train.loop import train
from vgm_cli.engine.train.optim import load_optimizer_tensors
from vgm_cli.engine.train.signals import Guard
from vgm_cli.errors import VgmError
from vgm_cli.ui import ui


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
        assert run_files.newest(name) == new, name
        assert ckpt.resolve(name) == new / "checkpoints/step-00000008/model.safetensors"
    assert run_files.newest("last") == run_files.newest("runs") == other
    assert run_files.newest("di") is None and run_files.newest(old.parent / "20270101-000000") is None
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


# -- a cheap run to do things to ----------------------------------------------------------------------------------------

RECORDS = ("config.yaml", "origins.json", "command.txt", "env.json", "git.json", "data.json")


@pytest.fixture
def small(tiny: Path) -> Any:
    """train(*KEY=VALUE, **options) of the smallest recipe, in this process."""

    def start(*assignments: str, **options: Any) -> Any:
        base = ["train.steps=4", "train.save_every=1", "train.batch_size=4", "model.hidden_size=16", "train.ema=[]"]
        return train(recipes.load(str(tiny), None, [*base, *assignments]), quiet_end=True, **options)

    return start


def rows(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {f"{f.stem}.{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_same_run(a: Path, b: Path, step: int) -> None:
    assert rows(a) == rows(b)
    first, second = tensors(a, step), tensors(b, step)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# -- who may write ----------------------------------------------------------------------------------------------------


def test_a_run_in_use_is_left_alone(small, tiny: Path, vgm) -> None:
    small(out=Path("r"))
    before = (Path("r") / "metrics.jsonl").read_text()
    with Run.create(Path("r"), "dit/mnist", resume=True):
        for args in (
            ("train", tiny, "--out", "r", "--resume"),
            ("train", tiny, "--out", "r", "--overwrite"),
            ("runs", "rm", "r", "-y"),
        ):
            code, _, err = vgm(*args)
            assert code == 2 and f"in use by process {os.getpid()}" in err
        pid = os.fork()
        if not pid:
            time.sleep(20)  # a worker that outlives the one who trains
            os._exit(0)
    try:
        assert (Path("r") / "metrics.jsonl").read_text() == before
        assert vgm("runs", "rm", "r", "-y")[0] == 0 and not Path("r").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_starts_of_one_second_get_folders_of_their_own() -> None:
    made = [Run.create(None, "dit/mnist", resume=False) for _ in range(4)]
    assert len({r.path for r in made}) == 4 and all(r.path.parent == Path("runs/dit-mnist") for r in made)
    for r in reversed(made):
        r.release()
    assert not Path("runs").exists()  # none of them started


@pytest.mark.parametrize("wrong", ["data.path=nowhere", "model.patch_size=5", "train.accumulate=3"])
def test_a_start_that_fails_leaves_nothing(tiny: Path, vgm, wrong: str) -> None:
    assert vgm("train", tiny, wrong)[0] != 0 and not Path("runs").exists()
    Path("mine").mkdir()
    assert vgm("train", tiny, wrong, "--out", "mine")[0] != 0 and not list(Path("mine").iterdir())


def test_what_failed_starts_left_is_listed_and_removed(vgm) -> None:
    make_run(Path("runs/dit-mnist/good"), 4)
    for name in ("checkpoints", "samples"):
        (Path("runs/dit-mnist/failed") / name).mkdir(parents=True)
    Path("runs/dit-mnist/empty").mkdir()
    Path("runs/dit-mnist/mine/checkpoints").mkdir(parents=True)
    Path("runs/dit-mnist/mine/checkpoints/thesis.txt").write_text("years of work")
    assert vgm("runs")[0] == 0
    listed = [
        {Path(r["path"]).name for r in json.loads(vgm("runs", "ls", *more, "--json")[1])} for more in ((), ("--all",))
    ]
    assert listed == [{"good"}, {"good", "failed", "empty"}]
    assert vgm("runs", "rm", "runs/dit-mnist/mine", "-y")[0] == 2
    assert vgm("runs", "rm", "runs/dit-mnist/failed", "runs/dit-mnist/empty", "-y")[0] == 0
    assert sorted(p.name for p in Path("runs/dit-mnist").iterdir()) == ["good", "mine"]


def test_overwrite_removes_a_run_and_nothing_else(small, tiny: Path, vgm) -> None:
    small(out=Path("r"))
    before = tensors(Path("r"), 4)
    code, _, err = vgm("train", tiny, "--out", "r", "--overwrite", "data.path=nowhere")
    assert code == 2 and tensors(Path("r"), 4).keys() == before.keys()  # the mistake was found first
    assert vgm("train", tiny, "--out", "r", "--overwrite", "--resume")[0] == 2
    for foreign in ("notes.txt", "samples/talk.key", "checkpoints/step-00000004/README"):
        (Path("r") / foreign).write_text("mine")
        code, _, err = vgm("train", tiny, "--out", "r", "--overwrite")
        assert code == 2 and foreign in err and tensors(Path("r"), 4).keys() == before.keys()
        (Path("r") / foreign).unlink()
    (Path("r/samples") / "sample-000004-seed0.png").write_bytes(b"")
    small("train.steps=2", "train.seed=7", out=Path("r"), overwrite=True)
    assert [p.name for p in Run(Path("r")).checkpoints()] == ["step-00000001", "step-00000002"]
    assert not list(Path("r/samples").iterdir()) and len(rows(Path("r"))) == 2


# -- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No handler of errors sees it, and nothing is cleaned up after it."""


class Killer:
    """From its n-th change of the file system on, the process makes none any more."""

    NAMES = ("replace", "rename", "mkdir", "symlink", "unlink", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int):
        self.left = at
        with monkeypatch.context() as patch:
            for name in self.NAMES:
                patch.setattr(os, name, self.counted(getattr(os, name)))
            self.patched = {name: getattr(os, name) for name in self.NAMES}
        self.monkeypatch = monkeypatch

    def counted(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*args, **options)

        return call

    def run(self, job: Any) -> bool:
        """Was it killed?"""
        with self.monkeypatch.context() as patch:
            for name, function in self.patched.items():
                patch.setattr(os, name, function)
            try:
                job()
            except Killed:
                runs._forget()  # the system takes a dead process's locks
                return True
        return False


@pytest.mark.parametrize("at", [3, 6, 12, 17, 20, 24, 31])
def test_a_kill_at_any_moment_costs_nothing(small, tmp_path: Path, monkeypatch, at: int) -> None:
    """Checkpoints, log and records end as if nothing had happened, and nothing is left over."""
    few = ("train.steps=3", "train.keep=1", "train.log_every=2")
    small(*few, out=Path("whole"))
    assert Killer(monkeypatch, at).run(lambda: small(*few, out=Path("r")))
    for file in Path("r/checkpoints").glob("step-????????/state.json"):
        assert {p.name for p in file.parent.iterdir()} == {"model.safetensors", "trainer.safetensors", "state.json"}
    small(*few, out=Path("r"), resume=True)
    assert_same_run(Path("whole"), Path("r"), 3)
    assert all((Path("r") / name).is_file() for name in RECORDS)
    found = sorted(p.name for p in Path("r/checkpoints").iterdir())
    assert found == ["last", "step-00000003"] and os.readlink("r/checkpoints/last") == "step-00000003"
    assert {p.name for p in Path("r").iterdir()} == {
        *RECORDS,
        ".lock",
        "card.md",
        "checkpoints",
        "metrics.jsonl",
        "samples",
    }


def test_the_log_does_not_show_where_a_run_was_interrupted(small) -> None:
    """Rows of an interval that a stop or a save divides, and of one that was longer than the run."""
    every = ("train.log_every=3", "train.save_every=2")
    small(*every, "train.steps=8", out=Path("whole"))
    small(*every, "train.steps=4", out=Path("parts"))
    small(*every, "train.steps=8", out=Path("parts"), resume=True, stop_after=5)
    small(*every, "train.steps=8", out=Path("parts"), resume=True)
    assert [r[0] for r in rows(Path("whole"))] == [3, 6, 8]
    assert_same_run(Path("whole"), Path("parts"), 8)


def test_more_steps_are_told(small, vgm) -> None:
    small(out=Path("r"))
    small("train.steps=6", "train.keep=2", out=Path("r"), resume=True)
    listed = json.loads(vgm("runs", "ls", ".", "--json")[1])
    assert [(r["step"], r["steps"]) for r in listed] == [(6, 6)]
    assert [p.name for p in Run(Path("r")).checkpoints()] == ["step-00000005", "step-00000006"]
    assert len((Path("r") / "command.txt").read_text().splitlines()) == 2


def test_a_full_disk_costs_the_last_steps_alone(small, monkeypatch) -> None:
    small(out=Path("whole"))
    replace, count = os.replace, iter(range(100))

    def full(*args: Any) -> None:
        if next(count) > 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(VgmError, match="no space left on device; the last checkpoint is r/checkpoints/step-") as e:
            small(out=Path("r"))
    assert e.value.code == 1 and "--resume" in e.value.hint
    assert not list(Path("r/checkpoints").glob("*.tmp"))
    small(out=Path("r"), resume=True)
    assert_same_run(Path("whole"), Path("r"), 4)


def test_temporary_files_of_dead_processes_go(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    machine = atomic.beside(Path("x")).name.split(".")[2]
    left, used = (tmp_path / f".x.json.{machine}.{pid}.tmp" for pid in (dead.pid, os.getppid()))
    mine = tmp_path / ".notes.1234.tmp"
    for file in (left, used, mine):
        file.write_text("")
    atomic.write_text(tmp_path / "y.json", "{}")
    assert not left.exists() and used.exists() and mine.exists()


# -- what a resumed run refuses ---------------------------------------------------------------------------------------


def test_a_resumed_run_sees_that_its_data_changed(small) -> None:
    from PIL import Image

    for c, name in enumerate(("cat", "dog")):
        (Path("d") / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (28, 28), 40 * c + i).save(Path("d") / name / f"{i}.png")
    small("data.path=d", "train.steps=2", out=Path("r"))

    def refused(*words: str) -> None:
        with pytest.raises(VgmError) as e:
            small("data.path=d", out=Path("r"), resume=True)
        assert e.value.code == 2 and all(w in e.value.message for w in words), e.value.message
        assert len(rows(Path("r"))) == 2

    os.rename("d/cat", "d/zebra")
    refused("class 0 was cat, now dog")
    os.rename("d/zebra", "d/cat")
    shutil.copytree("d/dog", "d/emu")
    refused("class 2 was missing, now emu")
    shutil.rmtree("d/emu")
    os.rename("d/cat/3.png", "d/dog/9.png")
    refused("fingerprint")
    os.rename("d/dog/9.png", "d/cat/3.png")
    small("data.path=d", out=Path("r"), resume=True)
    assert len(rows(Path("r"))) == 4


def test_a_resumed_run_sees_that_its_codec_was_replaced(vgm) -> None:
    from PIL import Image

    Path("d").mkdir()
    for i in range(4):
        Image.new("L", (28, 28), 60 * i).save(f"d/{i}.png")
    found, metadata = ckpt.read_tensors(ckpt.resolve("mnist-codec"))
    save_file(found, "codec.safetensors", metadata)
    few = ("model.hidden_size=16", "model.depth=1", "model.num_heads=2", "train.batch_size=4", "train.preview_n=0")
    run = ("train", "dit", "data.path=d", "--codec", "codec.safetensors", "--out", "r", *few)
    assert vgm(*run, "train.steps=1")[0] == 0
    assert vgm(*run, "train.steps=2", "--resume")[0] == 0
    save_file({k: v * 1.01 for k, v in found.items()}, "codec.safetensors", metadata)
    code, _, err = vgm(*run, "train.steps=3", "--resume")
    assert code == 2 and "the codec is not the one" in err


def test_names_that_are_not_utf8(small, vgm) -> None:
    out = Path(os.fsdecode(b"r\xff"))
    small("train.steps=1", out=out)
    small("train.steps=2", out=out, resume=True)
    file = out / "checkpoints/last/model.safetensors"
    for args in (("sample", out, "-n", 1), ("runs", "show", out), ("inspect", file)):
        assert vgm(*args)[0] == 0, args


def write(file: Path, text: str) -> None:
    file.write_text(text)


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


DAMAGE = {
    "step -1": lambda f: change(f / "state.json", step=-1),
    "step of another": lambda f: change(f / "state.json", step=3),
    "images in words": lambda f: change(f / "state.json", images="many"),
    "no state": lambda f: (f / "state.json").unlink(),
    "empty state": lambda f: write(f / "state.json", ""),
    "a list": lambda f: write(f / "state.json", "[]"),
    "no optimizer": lambda f: save_file({}, f / "trainer.safetensors"),
    "empty optimizer": lambda f: write(f / "trainer.safetensors", ""),
    "another step's optimizer": lambda f: shutil.copy(f.parent / "step-00000003" / "trainer.safetensors", f),
    "another step's model": lambda f: shutil.copy(f.parent / "step-00000003" / "model.safetensors", f),
    "config": lambda f: write(f.parents[1] / "config.yaml", "[1, 2]"),
    "config not text": lambda f: (f.parents[1] / "config.yaml").write_bytes(b"\xff\xfe\x00"),
    "data": lambda f: write(f.parents[1] / "data.json", "{"),
    "last is a folder": lambda f: ((f.parent / "last").unlink(), (f.parent / "last").mkdir()),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and a run of it."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "tiny.yaml"
    recipe.write_text(textwrap.dedent(TINY))
    few = ["train.steps=4", "train.save_every=1", "train.batch_size=4", "model.hidden_size=16", "train.ema=[]"]
    train(recipes.load(str(recipe), None, few), folder / "r", quiet_end=True)
    return recipe, folder / "r"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(small, trained: tuple[Path, Path], damage: str) -> None:
    shutil.copytree(trained[1], "r", symlinks=True)
    DAMAGE[damage](Path("r/checkpoints/step-00000004"))
    with pytest.raises(VgmError) as e:
        small("train.steps=6", out=Path("r"), resume=True)
    assert e.value.code in (1, 2) and len(rows(Path("r"))) == 4


def test_an_optimizer_of_another_network_is_refused(trained: tuple[Path, Path]) -> None:
    """Checkpoints of before identities: by names and shapes."""
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    for wrong in ({"o.7.exp_avg": torch.zeros(2)}, {"o.0.exp_avg": torch.zeros(2)}, {"o.x.step": torch.zeros(())}):
        with pytest.raises(VgmError, match="another run's"):
            load_optimizer_tensors(optimizer, wrong, "o.", Path("trainer.safetensors"))


@pytest.mark.parametrize("last", ["stale", "copy", "gone", "file"])
def test_last_points_at_the_newest(small, trained: tuple[Path, Path], last: str) -> None:
    shutil.copytree(trained[1], "r", symlinks=True)
    link = Path("r/checkpoints/last")
    link.unlink()
    if last == "stale":
        link.symlink_to("step-00000003")
    elif last == "copy":  # as zip and cp -L make it
        shutil.copytree("r/checkpoints/step-00000004", link)
    elif last == "file":
        link.write_text("step-00000003")
    small(out=Path("r"), resume=True)
    assert os.readlink(link) == "step-00000004"


# -- who listens ------------------------------------------------------------------------------------------------------


def wait_for_rows(run: Path, child: Any, n: int = 2) -> None:
    deadline = time.time() + 200
    while time.time() < deadline and not ((run / "metrics.jsonl").exists() and len(rows(run)) >= n):
        assert child.child.poll() is None, child.wait()[2]
        time.sleep(0.05)


def test_a_hang_up_saves_and_nobody_needs_to_read(tiny: Path, process: type) -> None:
    """The terminal closes: stdout and stderr break, SIGHUP comes."""
    long = ("train.steps=100000", "train.save_every=100000", "train.batch_size=4")
    child = process("train", tiny, *long, "--out", "r", "--json")
    child.child.stdout.close()
    child.child.stderr.close()
    wait_for_rows(Path("r"), child, 4)
    child.kill(signal.SIGHUP)
    assert child.child.wait(200) == 129
    step = json.loads(Path("r/checkpoints/last/state.json").read_text())["step"]
    assert step == rows(Path("r"))[-1][0] >= 4


def test_a_signal_to_the_launcher_saves(tiny: Path, process: type) -> None:
    long = ("train.steps=100000", "train.save_every=100000", "train.batch_size=4")
    child = process("train", tiny, *long, "--out", "r", "--nproc", 2)
    wait_for_rows(Path("r"), child)
    child.kill(signal.SIGTERM)
    code, _, err = child.wait()
    assert code == 143, err
    assert json.loads(Path("r/checkpoints/last/state.json").read_text())["step"] == rows(Path("r"))[-1][0]


def test_a_first_signal_that_arrives_after_the_others_told_of_it_is_no_second() -> None:
    """The launcher passes a signal to one process after the other."""

    class TwoProcesses:
        num_processes, device = 2, torch.device("cpu")

        @staticmethod
        def gather(mine: torch.Tensor) -> torch.Tensor:
            return torch.cat([mine, torch.tensor([int(signal.SIGTERM)])])

    with Guard() as guard:
        assert guard.came(TwoProcesses)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


class Broken(io.StringIO):
    """An output that takes nothing."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_output_that_takes_nothing(small, monkeypatch, capsys, number: int) -> None:
    """Training goes on; a short command ends, without an error where only the reader left."""
    monkeypatch.setattr(ui, "json", True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(number))
        patch.setattr(sys, "stderr", Broken(number))
        assert small("train.steps=2", out=Path("r")).step == 2
        assert main(["ls", "--json"]) == main(["ls"]) == (0 if number == errno.EPIPE else 1)
    assert "Traceback" not in capsys.readouterr().err


def test_what_the_parser_refuses_is_an_event_too(vgm) -> None:
    for args in (("train",), ("sample", "r", "--guidance-scale", "abc"), ("train", "dit", "--bogus"), ("nonsense",)):
        code, out, err = vgm(*args, "--json")
        event = json.loads(out)
        assert code == event["code"] == 2 and event["event"] == "error" and event["error"] and err


# -- trackers ---------------------------------------------------------------------------------------------------------


class FakeTracker:
    """What accelerate's trackers do, in memory."""

    made: list[FakeTracker] = []
    fails = False

    def __init__(self, project: str, **options: Any):
        self.project, self.options, self.seen = project, options, []
        self.made.append(self)

    def start(self) -> None:
        self.seen.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["model.name"] == "dit"

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fails:
            raise ConnectionError("the network is down")
        self.seen.append((step, sorted(values)))

    def log_images(self, values: dict[str, Any], step: int, **options: Any) -> None:
        self.seen.append((step, values["samples"].shape))

    def finish(self) -> None:
        self.seen.append("finish")


@pytest.mark.parametrize("fails", [False, True])
def test_trackers_get_rows_and_previews(small, monkeypatch, capsys, fails: bool) -> None:
    from accelerate import tracking as classes

    monkeypatch.setattr(FakeTracker, "made", [])
    monkeypatch.setattr(FakeTracker, "fails", fails)
    monkeypatch.setitem(classes.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    small("train.steps=2", "train.preview_n=4", "train.preview_every=2", out=Path("r"), track="wandb")
    (tracker,) = FakeTracker.made
    assert tracker.options == {"name": f"{Path.cwd().name}/r", "dir": "r"}
    assert len(rows(Path("r"))) == 2
    if fails:
        assert "the network is down" in capsys.readouterr().err and tracker.seen == ["start"]
    else:
        keys = ["images", "images_per_second", "loss", "lr"]
        image = tracker.seen.pop(-2)
        assert image[0] == 2 and len(image[1]) == 4 and image[1][3] == 3
        assert tracker.seen == ["start", (1, keys), (2, keys), "finish"]


def test_tensorboard(small) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small("train.steps=2", "train.preview_n=4", "train.preview_every=2", out=Path("r"), track="tensorboard")
    seen = EventAccumulator("r/tensorboard", size_guidance={"images": 0}).Reload()
    assert [e.step for e in seen.Scalars("loss")] == [1, 2] and seen.Tags()["images"]


def test_a_missing_tracker_names_its_extra(tiny: Path, vgm, monkeypatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    code, _, err = vgm("train", tiny, "--track", "trackio")
    assert code == 4 and "vgm[trackio]" in err and not Path("runs").exists()


def test_device_option(tiny: Path, vgm) -> None:
    few = ("train.steps=1", "train.batch_size=4")
    assert vgm("train", tiny, *few, "--device", "cpu", "--out", "r")[0] == 0
    code, _, err = vgm("train", tiny, *few, "--device", "gpu")
    assert code == 2 and "cuda:N" in err
