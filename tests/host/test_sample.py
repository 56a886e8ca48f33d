"""vgm sample and vgm rerun: per-item seeds, outputs, continuation, processes, traces, provenance."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vgm_cli.images import read_png_metadata


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained run, made once."""
    from conftest import TINY

    from vgm_cli import recipe as recipes
    from vgm_cli.engine.train.loop import train

    folder = tmp_path_factory.mktemp("sample")
    (folder / "tiny.yaml").write_text(TINY)
    train(recipes.load(str(folder / "tiny.yaml"), None, ["optimizer.lr=0.02"]), folder / "run", quiet_end=True)
    return folder / "run"


def arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as f:
        return f["arr_0"], f["arr_1"]


def test_image_i_depends_on_seed_and_i_alone(run: Path, vgm, tmp_path: Path) -> None:
    """Neither on how many are asked for nor on the batch size; another seed gives other images."""
    assert vgm("sample", run, "-n", 12, "--out", "a.npz")[0] == 0
    assert vgm("sample", run, "-n", 5, "--batch-size", 2, "--out", "b.npz")[0] == 0
    assert vgm("sample", run, "-n", 5, "--seed", 1, "--out", "c.npz")[0] == 0
    a, b, c = (arrays(tmp_path / f"{k}.npz")[0].astype(int) for k in "abc")
    assert a.shape == (12, 28, 28, 1) and a.dtype == int
    assert abs(a[:5] - b).max() <= 1  # rounding at the edge of two grey levels
    assert abs(a[:5] - c).max() > 20
    assert list(arrays(tmp_path / "a.npz")[1]) == [i % 10 for i in range(12)]


def test_labels_and_guidance(run: Path, vgm, tmp_path: Path) -> None:
    assert vgm("sample", run, "-n", 4, "--label", "3,7", "--out", "a.npz")[0] == 0
    assert list(arrays(tmp_path / "a.npz")[1]) == [3, 7, 3, 7]
    assert vgm("sample", run, "-n", 4, "--label", "3,7", "--guidance-scale", 200, "--out", "b.npz")[0] == 0
    assert vgm("sample", run, "-n", 4, "--label", "3,7", "--guidance-scale", 200, "--guidance-interval", "2,3",
               "--out", "c.npz")[0] == 0  # fmt: skip
    a, b, c = (arrays(tmp_path / f"{k}.npz")[0].astype(int) for k in "abc")
    assert abs(a - b).max() > 1
    plain = vgm("sample", run, "-n", 4, "--label", "3,7", "--guidance-scale", 1, "--out", "d.npz")
    assert plain[0] == 0 and abs(arrays(tmp_path / "d.npz")[0].astype(int) - c).max() <= 1


def test_autoguidance(run: Path, vgm, tmp_path: Path) -> None:
    """Away from a worse network: at scale 1 the network itself; of another shape, or of no diffusion, is refused."""
    from vgm_cli import atomic
    from vgm_cli.engine import checkpoint as ckpt

    tensors, metadata = ckpt.read_tensors(ckpt.resolve(run))
    atomic.save_safetensors({k: 0.5 * v for k, v in tensors.items()}, tmp_path / "weak.safetensors", metadata)
    images = {}
    for scale in (0, 1, 3):
        code, _, err = vgm("sample", run, "-n", 4, "--guidance-scale", 1, "--sampler", "euler", "--steps", 3,
                           "autoguidance=weak.safetensors", f"autoguidance_scale={scale}", "--out", f"{scale}.npz")  # fmt: skip
        assert code == 0, err
        images[scale] = arrays(tmp_path / f"{scale}.npz")[0].astype(int)
    for name, model in (("plain", run), ("weak", "weak.safetensors")):
        vgm("sample", model, "-n", 4, "--guidance-scale", 1, "--sampler", "euler", "--steps", 3, "--out", f"{name}.npz")
        images[name] = arrays(tmp_path / f"{name}.npz")[0].astype(int)
    assert abs(images[1] - images["plain"]).max() <= 1 and abs(images[0] - images["weak"]).max() <= 1
    assert abs(images[3] - images["plain"]).max() > 1
    code, _, err = vgm("sample", run, "-n", 1, "autoguidance=mnist-codec", "--out", "x.npz")
    assert code == 2 and "autoguidance needs another diffusion or flow network" in err, err


def test_options_without_effect_are_told(run: Path, vgm, tmp_path: Path) -> None:
    """An interval without guidance, here; with it nothing is said. `vgm evaluate` takes it and says the same."""
    args = (run, "-n", 4, "--batch-size", 2, "--steps", 2, "--guidance-interval", "0.9,2", "--guidance-scale")
    sample, measure = ("sample", *args), ("evaluate", *args)
    told = "--guidance-interval has no effect on the sampler euler"
    code, _, err = vgm(*sample, 1, "--out", tmp_path / "a.png")
    assert code == 0 and err.count(told) == 1 and "--steps has" not in err
    code, _, err = vgm(*sample, 2, "--out", tmp_path / "b.png")
    assert code == 0 and "no effect" not in err
    few = {"images": np.random.default_rng(0).integers(0, 255, (16, 28, 28, 1), dtype=np.uint8)}
    np.savez(tmp_path / "few.npz", **few, labels=np.arange(16) % 10)
    last = ("--metrics", "fid", "--reference", tmp_path / "few.npz", "--json")
    code, _, err = vgm(*measure, 1, *last)
    assert code == 0 and err.count(told) == 1
    code, part, err = vgm(*measure, 200, *last)
    assert code == 0 and "no effect" not in err
    code, whole, _ = vgm(*measure[:-3], "--guidance-scale", 200, *last)
    (part,), (whole,) = json.loads(part), json.loads(whole)
    assert part["guidance_interval"] == [0.9, 2] and part["value"] != whole["value"]


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_an_interrupted_job_goes_on(run: Path, vgm, tmp_path: Path, kind: str) -> None:
    """What was made stays as it is; the rest is added; another setting is refused."""
    target = tmp_path / ("images" if kind == "folder" else "images.npz")
    args = ("sample", run, "-n", 6, "--batch-size", 2, "--json", "--out", target)
    assert vgm(*args)[0] == 0
    if kind == "folder":
        before = (target / "000000.png").stat().st_mtime_ns
        for i in (2, 3):
            (target / f"{i:06d}.png").unlink()
    else:
        whole = arrays(target)[0]
        half = tmp_path / "half.npz"
        from vgm_cli.engine.sample import output

        with pytest.MonkeyPatch.context() as patch:  # stopped before the parts are joined
            patch.setattr(output, "join_parts", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            assert vgm("sample", run, "-n", 6, "--batch-size", 2, "--out", half)[0] == 130
        assert not half.exists()
        parts = sorted((tmp_path / "half.npz.parts").glob("*.npy"))
        assert len(parts) == 3
        parts[1].unlink()
        target, args = half, (*args[:-1], half)
    code, out, err = vgm(*args)
    assert code == 0, err
    assert json.loads(out)["made"] == 2
    if kind == "folder":
        assert (target / "000000.png").stat().st_mtime_ns == before
        assert len(list(target.glob("*.png"))) == 6
        code, _, err = vgm(*args[:-2], "--seed", 5, "--out", target)
        assert code == 2 and "seed" in err
        code, out, err = vgm(*args)
        assert code == 0 and json.loads(out)["made"] == 0
    else:
        assert np.array_equal(arrays(target)[0], whole)
        assert not (tmp_path / "half.npz.parts").exists()


def test_two_processes_make_the_same_images(run: Path, vgm, forked: Any, tmp_path: Path) -> None:
    args = ("sample", run, "-n", 10, "--batch-size", 3)
    one = vgm(*args, "--out", tmp_path / "one.npz")
    two = forked(*args, "--out", tmp_path / "two.npz", ranks=2).wait()
    assert one[0] == two[0] == 0, one[2] + two[2]
    a, b = (arrays(tmp_path / f"{k}.npz") for k in ("one", "two"))
    assert abs(a[0].astype(int) - b[0].astype(int)).max() <= 1 and np.array_equal(a[1], b[1])


@pytest.mark.slow
def test_a_killed_job_of_two_processes_goes_on(run: Path, vgm, process: type, tmp_path: Path) -> None:
    """Killed while writing, continued by as many processes: the images of an undisturbed job."""
    args = ("sample", run, "-n", 120, "--batch-size", 2, "--steps", 4)
    job = process(*args, "--nproc", 2, "--out", tmp_path / "killed")
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "killed").glob("*.png"))) < 6 and job.child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.kill(signal.SIGTERM)
    job.wait()
    before = len(list((tmp_path / "killed").glob("*.png")))
    assert before >= 6
    code, out, err = process(*args, "--nproc", 2, "--json", "--out", tmp_path / "killed").wait()
    assert code == 0, err
    assert json.loads(out)["made"] == 120 - before
    assert vgm(*args, "--out", tmp_path / "whole")[0] == 0
    whole, killed = (sorted((tmp_path / k).glob("*.png")) for k in ("whole", "killed"))
    assert [f.name for f in whole] == [f.name for f in killed]
    for f, g in zip(whole, killed):
        assert abs(np.asarray(Image.open(f)).astype(int) - np.asarray(Image.open(g))).max() <= 1


def test_trace(run: Path, vgm, tmp_path: Path) -> None:
    """Two named strips an item, times above the steps; the first state is noisier than the last."""
    code, out, err = vgm("sample", run, "-n", 3, "--steps", 5, "--trace", "--out", "grid.png")
    assert code == 0, err
    picture = np.asarray(Image.open(tmp_path / "grid-trace.png"))
    left, top = picture.shape[1] - 5 * 86, 23
    assert picture.shape[0] == top + 6 * 86 + 2 * 8 and 30 < left < 100
    assert "grid-trace.png" in out
    tile = lambda row, column: picture[top + row * 86 :, left + column * 86 :][:84:3, :84:3].astype(float)
    first, last = tile(0, 0), tile(0, 4)
    assert not np.array_equal(first, last)
    assert not np.array_equal(first, tile(1, 0)), "below the state is the estimate, not the state again"
    assert (picture[: top - 2, left:] < 100).any() and (picture[top:, : left - 2] < 100).any(), "names are drawn"
    shutil.copy(tmp_path / "grid-trace.png", tmp_path / "kept")
    (tmp_path / "grid.png").unlink()
    code, _, err = vgm("sample", run, "-n", 3, "--steps", 2, "--trace", "--out", "grid.png")
    assert code == 2 and "grid-trace.png exists" in err and not (tmp_path / "grid.png").exists()
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "grid-trace.png").read_bytes()


def test_a_trace_of_a_sampler_without_steps_is_refused_before_anything_is_written(
    run: Path, vgm, tmp_path: Path
) -> None:
    from vgm_cli.diffusion.samplers import EulerSampler

    with pytest.MonkeyPatch.context() as patch:  # a sampler that tells of no step
        patch.setattr(EulerSampler, "solve", lambda self, model, request, steps: request.randn())
        code, _, err = vgm("sample", run, "-n", 2, "--trace", "--out", "none.png")
    assert code == 1 and "euler reports no steps" in err and not list(tmp_path.glob("none*"))


def test_trace_of_latents_shows_pictures(vgm, tmp_path: Path) -> None:
    """Behind a codec, states and estimates are decoded."""
    small = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "train.steps=1", "train.preview_n=0"]
    small += ["data.cache_latents=false"]
    assert vgm("train", "dit", *small, "train.batch_size=8", "train.precision=fp32", "--out", "latent")[0] == 0
    code, _, err = vgm("sample", "latent", "-n", 1, "--steps", 3, "--trace", "--out", "grid.png")
    assert code == 0, err
    height, width = np.asarray(Image.open(tmp_path / "grid-trace.png")).shape
    assert height == 23 + 2 * 86 and width > 3 * 86


def test_a_sampler_of_another_family_is_refused(run: Path, vgm) -> None:
    code, _, err = vgm("sample", run, "-n", 2, "--sampler", "glow", "--out", "x.png")
    assert code == 2 and "the sampler glow asks for" in err and "dit does not have" in err
    code, _, err = vgm("sample", run, "-n", 2, "--sampler", "dps", "--out", "x.png")
    assert code == 2 and "vgm restore" in err


@pytest.mark.parametrize("kind", ["grid", "one of a folder"])
def test_rerun_makes_the_same_image(run: Path, vgm, tmp_path: Path, kind: str) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    if kind == "grid":
        image = tmp_path / "grid.png"
        assert vgm("sample", copy, "-n", 20, "--sampler", "heun", "--steps", 3, "--out", image)[0] == 0
    else:
        assert (
            vgm("sample", copy, "-n", 8, "--batch-size", 3, "eta=1.0", "--sampler", "ddim", "--out", "images")[0] == 0
        )
        image = tmp_path / "images/000004.png"
    said = json.loads(read_png_metadata(image)["vgm"])
    assert said["sampler"]["name"] in ("heun", "ddim") and said["step"] == 8 and len(said["sha256"]) > 8
    code, out, err = vgm("rerun", image)
    assert code == 0, err
    assert "identical" in err
    again = Path(out.strip())
    assert np.array_equal(np.asarray(Image.open(image)), np.asarray(Image.open(again)))
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    code, _, err = vgm("rerun", image)
    assert code == 2 and "no complete checkpoint" in err


def test_steps_that_are_a_spacing_are_remembered() -> None:
    from vgm_cli import foreign

    assert foreign.check({"steps": "ddim50"}, "picture", "a.png") == {"steps": "ddim50"}


def test_rerun_refuses_other_images_and_other_weights(run: Path, vgm, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "plain.png")
    code, _, err = vgm("rerun", tmp_path / "plain.png")
    assert code == 2 and "does not say how it was made" in err
    assert vgm("rerun", tmp_path / "none.png")[0] == 2
    copy = shutil.copytree(run, tmp_path / "run")
    assert vgm("sample", copy, "-n", 2, "--out", "grid.png")[0] == 0
    last = copy / "checkpoints" / "step-00000008"
    shutil.copy(last / "model.safetensors", last / "ema-0.9.safetensors")
    code, _, err = vgm("rerun", "grid.png")
    assert code == 1 and "other weights" in err


def test_precision(run: Path, vgm) -> None:
    """auto follows training (fp32 here); names are checked."""
    code, out, err = vgm("sample", run, "-n", 2, "--json", "--out", "a.png")
    assert code == 0 and json.loads(out)["precision"] == "fp32", err
    assert vgm("sample", run, "-n", 2, "--precision", "bf16", "--out", "b.png")[0] == 0
    code, _, err = vgm("sample", run, "--precision", "fp8")
    assert code == 2 and "fp8" in err


# -- nothing is lost or mixed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grid.png", "x.npz"])
def test_a_file_is_replaced_only_when_asked(run: Path, vgm, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    code, _, err = vgm("sample", run, "-n", 2, "--out", name)
    assert code == 2 and f"{name} exists" in err and "--overwrite" in err
    assert (tmp_path / name).read_bytes() == b"precious"
    assert vgm("sample", run, "-n", 2, "--out", name, "--overwrite")[0] == 0
    assert (tmp_path / name).read_bytes() != b"precious"


def test_a_folder_of_something_else_is_left_alone(run: Path, vgm, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "cat").mkdir(parents=True)
    Image.new("L", (28, 28)).save(own / "cat/a.png")
    for extra in ((), ("--overwrite",)):
        code, _, err = vgm("sample", run, "-n", 2, "--out", own, *extra)
        assert code == 2 and "own" in err, extra
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("L", (28, 28)).save(bare / "000000.png")  # named like ours, made by others
    for extra in ((), ("--overwrite",)):
        code, _, err = vgm("sample", run, "-n", 2, "--out", bare, *extra)
        assert code == 2 and len(list(bare.iterdir())) == 1, extra
    assert [p.name for p in own.rglob("*")] == ["cat", "a.png"]
    (tmp_path / "empty").mkdir()
    assert vgm("sample", run, "-n", 2, "--out", "empty")[0] == 0


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize(
    "other, word",
    [(("--label", "7"), "label"), (("--steps", 3), "sampler"), (("--guidance-scale", 4), "guidance_scale"),
     (("-n", 3), "4 images"), (("--weights", "raw"), "weights")],
)  # fmt: skip
def test_a_job_goes_on_only_as_itself(run: Path, vgm, tmp_path: Path, kind: str, other: tuple, word: str) -> None:
    """Begun with one label, steps, guidance or weights and continued with others: refused; --overwrite starts anew."""
    from vgm_cli.engine.sample import output

    target = tmp_path / ("images" if kind == "folder" else "images.npz")
    begun = ("sample", run, "-n", 4, "--label", "3", "--batch-size", 2, "--steps", 2, "--out", target)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "npz":
            patch.setattr(output, "join_parts", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = vgm(*begun)
    if kind == "npz":
        assert code == 130 and "4 of 4 images are kept" in err and "the same command goes on" in err
    there = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "images" in str(p)}
    before = there()
    code, _, err = vgm(*begun, *other)
    assert code == 2 and word in err and "--overwrite" in err and there() == before
    code, out, err = vgm(*begun, *other, "--overwrite", "--json")
    assert code == 0, err
    assert json.loads(out)["made"] == (3 if "-n" in other else 4)
    assert len(list((tmp_path / "images").glob("*.png"))) == json.loads(out)["made"] if kind == "folder" else True


def test_more_images_may_be_added_to_a_folder(run: Path, vgm, tmp_path: Path) -> None:
    assert vgm("sample", run, "-n", 4, "--out", "images")[0] == 0
    before = [(p, p.stat().st_mtime_ns) for p in sorted((tmp_path / "images").glob("*.png"))]
    code, out, err = vgm("sample", run, "-n", 7, "--out", "images", "--json")
    assert code == 0 and json.loads(out)["made"] == 3, err
    assert [(p, p.stat().st_mtime_ns) for p in sorted((tmp_path / "images").glob("*.png"))][:4] == before
    code, _, err = vgm("sample", run, "-n", 7, "--out", "images")
    assert code == 0 and "all 7 images were there" in err and "img/s" not in err


def test_an_interrupted_folder_says_what_is_kept(
    run: Path, vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vgm_cli.engine.sample import output

    real, calls = output.pictures, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(output, "pictures", stopped)
        code, _, err = vgm("sample", run, "-n", 8, "--batch-size", 2, "--out", "images")
    assert code == 130 and "4 of 8 images are kept in images" in err and "the same command goes on" in err
    code, _, err = vgm("sample", run, "-n", 8, "--batch-size", 2, "--out", "images")
    assert code == 0 and "4 images in" in err and "4 were there" in err
    with monkeypatch.context() as patch:
        patch.setattr(output.generate, "stream", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = vgm("sample", run, "-n", 8, "--out", "grid.png")
    assert code == 130 and "nothing is written" in err and not (tmp_path / "grid.png").exists()


def test_temporary_files_of_killed_jobs_go_at_the_next_start(run: Path, vgm, tmp_path: Path) -> None:
    """Those of processes that are gone, on this machine; others', and other files, stay."""
    import subprocess

    from vgm_cli import atomic

    gone = subprocess.Popen(["true"])
    gone.wait()
    machine = atomic._machine()
    dead, alive = (f".x.png.{machine}.{pid}.tmp" for pid in (gone.pid, 1))
    foreign = f".x.png.{int(machine, 16) ^ 1:08x}.{gone.pid}.tmp"
    (tmp_path / "images").mkdir()
    assert vgm("sample", run, "-n", 2, "--out", "images")[0] == 0
    for folder in (tmp_path, tmp_path / "images"):
        for name in (dead, alive, foreign, ".x.tmp"):
            (folder / name).write_bytes(b"")
        (folder / f".y.{machine}.{gone.pid}.old").mkdir()
    atomic._cleaned.clear()
    assert vgm("sample", run, "-n", 4, "--out", "images")[0] == 0
    assert vgm("sample", run, "-n", 2, "--out", "grid.png")[0] == 0
    for folder in (tmp_path, tmp_path / "images"):
        assert {p.name for p in folder.glob(".*") if "job" not in p.name} == {alive, foreign, ".x.tmp"}


def test_rerun_never_adds_to_counted_pictures(run: Path, vgm, tmp_path: Path) -> None:
    assert vgm("sample", run, "-n", 3, "--out", "images")[0] == 0
    code, out, err = vgm("rerun", "images/000001.png")
    assert code == 0 and out.strip() == "images-again/000001.png", err
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    code, out, err = vgm("rerun", "images/000001.png")
    assert code == 0 and out.strip() == "images-again/000001_2.png", err
    code, _, err = vgm("rerun", "images/000001.png", "--out", "images/000002.png")
    assert code == 2 and "exists" in err
    code, _, err = vgm("rerun", "images/000001.png", "--out", "images/000001.png", "--overwrite")
    assert code == 2 and "the picture itself" in err
    assert vgm("rerun", "images/000001.png", "--out", "images-again/000001.png", "--overwrite")[0] == 0
    (tmp_path / "text.png").write_text("no picture")
    code, _, err = vgm("rerun", "text.png")
    assert code == 1 and "text.png is not a picture that can be read" in err


def test_pictures_of_the_first_layout_are_made_again(run: Path, vgm, tmp_path: Path) -> None:
    """A grid that says no layout of its own: black lines of 2, tiles as they are, one class per column."""
    from vgm_cli.images import save_png

    assert vgm("sample", run, "-n", 12, "--out", "new.png")[0] == 0
    assert vgm("sample", run, "-n", 12, "--out", "x.npz")[0] == 0
    meta = {"vgm": read_png_metadata(tmp_path / "new.png")["vgm"]}
    tiles = arrays(tmp_path / "x.npz")[0]
    grid = np.zeros((2 + 2 * 30, 2 + 10 * 30, 1), np.uint8)
    for i, tile in enumerate(tiles):
        grid[2 + i // 10 * 30 :, 2 + i % 10 * 30 :][:28, :28] = tile
    save_png(grid, tmp_path / "old.png", meta)
    code, _, err = vgm("rerun", "old.png")
    assert code == 0 and "identical" in err, err


# -- what is told ------------------------------------------------------------------------------------------------------


def poisoned(run: Path, target: Path) -> Path:
    """The run's weights with one NaN."""
    from vgm_cli import atomic
    from vgm_cli.engine import checkpoint as ckpt

    file = ckpt.resolve(run)
    tensors, metadata = ckpt.read_tensors(file)
    name = next(k for k, v in tensors.items() if v.is_floating_point())
    tensors[name].view(-1)[0] = torch.nan
    atomic.save_safetensors(tensors, target, metadata)
    return target


@pytest.mark.parametrize("name", ["grid.png", "x.npz", "images"])
def test_samples_that_are_not_finite_are_told(run: Path, vgm, tmp_path: Path, name: str) -> None:
    """Not black pictures and success."""
    from vgm_cli.diffusion.samplers import EulerSampler

    real = EulerSampler.solve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EulerSampler, "solve", lambda *a: real(*a) / 0)
        code, _, err = vgm("sample", run, "-n", 3, "--out", name)
    assert code == 1 and "NaN or infinity" in err
    assert not list(tmp_path.glob("**/*.png")) and not (tmp_path / "x.npz").exists()
    assert vgm("sample", poisoned(run, tmp_path / "nan.safetensors"), "-n", 3, "--out", "other.png")[0] == 1


def test_the_numbers_that_counted(run: Path, vgm, tmp_path: Path) -> None:
    """--steps goes before the recipe's 2 everywhere: in the sampler's node, beside it, in the picture."""
    code, out, _ = vgm("sample", run, "-n", 1, "--steps", 3, "--json", "--out", "a.png")
    told, kept = json.loads(out), json.loads(read_png_metadata(tmp_path / "a.png")["vgm"])
    for record in (told, kept):
        assert record["steps"] == record["sampler"]["steps"] == 3 and record["guidance_scale"] == 1.5
    assert code == 0 and told["nfe"] == 6
    code, out, err = vgm("sample", run, "-n", 1, "--json", "--out", "b.png")
    told = json.loads(out)
    assert (told["steps"], told["sampler"]["steps"], told["nfe"], told["asked"]) == (2, 2, 4, [])
    code, _, err = vgm("sample", run, "-n", 1, "--out", "c.png")
    assert "1 image in" in err and "4 NFE" in err
    code, _, err = vgm("sample", run, "-n", 1, "--input", "mnist5k", "--out", "d.png")
    assert code == 0 and "--image has no effect on the sampler euler" in err and "--seed" not in err
    file = next(run.glob("checkpoints/step-00000008/model.safetensors"))
    code, _, err = vgm("sample", file, "-n", 1, "--seed", 4, "--weights", "ema-0.9", "--out", "e.png")
    assert code == 0 and "--weights ema-0.9 has no effect" in err and "--seed has" not in err
    from vgm_cli.diffusion.samplers import EulerSampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EulerSampler, "solve", lambda self, model, request, steps: torch.zeros(1, 1, 28, 28))
        code, _, err = vgm("sample", run, "-n", 1, "--seed", 4, "--out", "f.png")
    assert code == 0 and "--seed has no effect" in err


def test_default_names_say_how_it_is_made(run: Path, vgm, tmp_path: Path) -> None:
    """And never meet: the second of a name is numbered."""
    copy = shutil.copytree(run, tmp_path / "runs/dit-tiny/a")
    names = []
    for extra in ((), (), ("--label", "3,7", "--guidance-scale", 2, "--sampler", "heun", "--steps", 3, "--seed", 5)):
        code, out, err = vgm("sample", copy, "-n", 2, *extra)
        assert code == 0, err
        names.append(Path(out.strip()).name)
    assert names == ["sample-000008-euler-2steps-seed0-w1.5.png", "sample-000008-euler-2steps-seed0-w1.5_2.png",
                     "sample-000008-heun-3steps-seed5-w2-label3-7.png"]  # fmt: skip
    for short in ((), ("last",), ("dit",), ("runs/dit-tiny",), ("steps=1",)):
        code, out, err = vgm("sample", *short, "-n", 1, "--out", "x.png", "--overwrite")
        assert code == 0 and "runs/dit-tiny/a" in err, err
        assert json.loads(read_png_metadata(tmp_path / "x.png")["vgm"])["model"] == "runs/dit-tiny/a"
    shutil.rmtree(tmp_path / "runs")
    code, _, err = vgm("sample", "-n", 1)
    assert code == 2 and "no run below ./runs" in err


def test_progress_by_step(run: Path, vgm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a batch, and without a terminal as plain lines."""
    from vgm_cli import ui

    told = []
    real = ui.Progress.update
    monkeypatch.setattr(
        ui.Progress, "update", lambda self, done, note=None: told.append((done, note)) or real(self, done, note)
    )
    monkeypatch.setattr(ui.Progress, "__init__", _often(ui.Progress.__init__))
    code, _, err = vgm("sample", run, "-n", 6, "--batch-size", 4, "--steps", 4, "--out", "a.png")
    assert code == 0
    assert told == [(1, "step 1/4"), (2, "step 2/4"), (3, "step 3/4"), (4, "step 4/4"), (4, ""),
                    (4.5, "step 1/4"), (5, "step 2/4"), (5.5, "step 3/4"), (6, "step 4/4"), (6, "")]  # fmt: skip
    assert "sampling 2/6, step 2/4" in err


def _often(real):
    return lambda self, what, total, done=0, every=None: real(self, what, total, done, None if every is None else 0)


def test_device(run: Path, vgm) -> None:
    code, out, _ = vgm("sample", run, "-n", 1, "--device", "cpu", "--json", "--out", "a.png")
    assert code == 0 and json.loads(out)["device"] == "cpu"
    code, _, err = vgm("sample", run, "-n", 1, "--device", "tpu", "--out", "b.png")
    assert code == 2 and "tpu" in err


# -- pictures that people can read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, period, columns",
    [(64, 10, 10), (100, 10, 10), (256, 10, 20), (72, 3, 9), (8, 2, 4), (20, 10, 10), (64, 1000, 8), (64, 0, 8),
     (1, 1, 1), (30, 3, 6), (64, 40, 8), (200, 2, 14)],
)  # fmt: skip
def test_grids_are_near_square_and_keep_classes_together(n: int, period: int, columns: int) -> None:
    from vgm_cli.images import near_square

    assert near_square(n, period) == columns
    if 1 < period <= n:
        assert columns % period == 0 or period % columns == 0


def test_small_tiles_are_enlarged_by_whole_numbers(run: Path, vgm, tmp_path: Path) -> None:
    """Exactly: every third pixel is the image; the lines between are visible beside black and beside white."""
    assert vgm("sample", run, "-n", 20, "--out", "grid.png")[0] == 0
    assert vgm("sample", run, "-n", 20, "--out", "x.npz")[0] == 0
    grid, tiles = np.asarray(Image.open(tmp_path / "grid.png")), arrays(tmp_path / "x.npz")[0]
    assert grid.shape == (2 + 2 * 86, 2 + 10 * 86) and 50 < grid[0, 0] < 205
    for i, tile in enumerate(tiles):
        part = grid[2 + i // 10 * 86 :, 2 + i % 10 * 86 :][:84, :84]
        assert (part.reshape(28, 3, 28, 3) == tile[:, None, :, None, 0].transpose(0, 1, 2, 3)).all()
    code, _, err = vgm("sample", run, "-n", 2000, "--steps", 1, "--guidance-scale", 1, "--out", "many.png")
    assert code == 0 and "the first of 2000" in err
    height, width = np.asarray(Image.open(tmp_path / "many.png")).shape
    assert 0.5 < height / width < 2 and json.loads(read_png_metadata(tmp_path / "many.png")["vgm"])["n"] == 256
    code, _, err = vgm("rerun", "many.png")
    assert code == 0, err


def test_tables_have_their_own_columns(run: Path, vgm, tmp_path: Path) -> None:
    """Of samplers whose items make one: whatever the number of classes; a number that fills no row is refused."""
    from vgm_cli.diffusion.samplers import EulerSampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EulerSampler, "grid_columns", 5, raising=False)
        code, _, err = vgm("sample", run, "-n", 12, "--out", "a.png")
        assert code == 2 and "-n 10 or -n 15" in err
        assert vgm("sample", run, "-n", 15, "--out", "b.png")[0] == 0
        assert vgm("sample", run, "--out", "c.png")[0] == 0
    assert Image.open(tmp_path / "b.png").size == (2 + 5 * 86, 2 + 3 * 86)
    assert Image.open(tmp_path / "c.png").size == (2 + 5 * 86, 2 + 12 * 86)
    labels = json.loads(read_png_metadata(tmp_path / "b.png")["vgm"])["labels"]
    assert labels == [0, 1, 2, 3, 4] * 3, "a column has one label"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EulerSampler, "grid_columns", 2, raising=False)
        patch.setattr(EulerSampler, "grid_labels", "rows", raising=False)
        assert vgm("sample", run, "-n", 6, "--label", "3,7", "--out", "e.png")[0] == 0
    assert json.loads(read_png_metadata(tmp_path / "e.png")["vgm"])["labels"] == [3, 3, 7, 7, 3, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EulerSampler, "grid_period", 2, raising=False)
        assert vgm("sample", run, "-n", 18, "--out", "d.png")[0] == 0
    assert Image.open(tmp_path / "d.png").size == (2 + 4 * 86, 2 + 5 * 86)


def test_runs_show_what_they_train_on(vgm, tiny: Path, tmp_path: Path) -> None:
    """reals.png at the start; of codecs, input above output; the preview is announced."""
    code, _, err = vgm("train", "dit", "--recipe", tiny, "train.preview_n=10", "train.steps=1", "--out", "r")
    assert code == 0 and "preview of 10 images" in err, err
    assert Image.open(tmp_path / "r/samples/reals.png").size == (2 + 4 * 86, 2 + 3 * 86)
    told = json.loads((tmp_path / "r/samples/step-000001.json").read_text())
    assert told["steps"] == 2 and told["labels"] == list(range(10))
    small = ("model.ch=16", "train.steps=1", "train.batch_size=4", "train.preview_n=3", "train.precision=fp32")
    code, _, err = vgm("train", "vqgan", *small, "--out", "c")
    assert code == 0, err
    grid = np.asarray(Image.open(tmp_path / "c/samples/step-000001.png"))
    from vgm_cli.data import open_dataset

    real = open_dataset("mnist5k").images([0])[0, 0].numpy()
    left = grid.shape[1] - 3 * 86
    assert (grid[2:, left:][:84:3, :84:3] == real).all() and not (grid[88:, left:][:84:3, :84:3] == real).all()
