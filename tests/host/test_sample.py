"""vgm sample and vgm rerun: per-item seeds, outputs, continuation, processes, traces, provenance."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgm_cli.images import read_png_metadata


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained run, made once."""
    from conftest import TINY

    from vgm_cli import recipe as recipes
    from vgm_cli.engine.trainer import train

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


def test_options_without_effect_are_told(run: Path, vgm, tmp_path: Path) -> None:
    """An interval without guidance, here; with it nothing is said. `vgm evaluate` takes it and says the same."""
    args = (run, "-n", 4, "--batch-size", 2, "--steps", 2, "--guidance-interval", "0.9,2", "--guidance-scale")
    sample, measure = ("sample", *args), ("evaluate", *args)
    told = "--guidance-interval has no effect on the sampler euler"
    code, _, err = vgm(*sample, 1, "--out", tmp_path / "a.png")
    assert code == 0 and err.count(told) == 1 and "--steps has" not in err
    code, _, err = vgm(*sample, 2, "--out", tmp_path / "a.png")
    assert code == 0 and "no effect" not in err
    last = ("--metrics", "fid", "--reference", "mnist5k", "--json")
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
        from vgm_cli.engine import output

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
    else:
        assert np.array_equal(arrays(target)[0], whole)
        assert not (tmp_path / "half.npz.parts").exists()


def test_two_processes_make_the_same_images(run: Path, process: type, tmp_path: Path) -> None:
    for n, name in ((1, "one"), (2, "two")):
        done = process(
            "sample", run, "-n", 10, "--batch-size", 3, "--nproc", n, "--out", tmp_path / f"{name}.npz"
        ).wait()
        assert done[0] == 0, done[2]
    a, b = (arrays(tmp_path / f"{k}.npz") for k in ("one", "two"))
    assert abs(a[0].astype(int) - b[0].astype(int)).max() <= 1 and np.array_equal(a[1], b[1])


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
    assert (
        0 <= json.loads(out)["made"] - (120 - before) <= 2
    )  # of half a batch, one of each process, both are made again
    assert vgm(*args, "--out", tmp_path / "whole")[0] == 0
    whole, killed = (sorted((tmp_path / k).glob("*.png")) for k in ("whole", "killed"))
    assert [f.name for f in whole] == [f.name for f in killed]
    for f, g in zip(whole, killed):
        assert abs(np.asarray(Image.open(f)).astype(int) - np.asarray(Image.open(g))).max() <= 1


def test_trace(run: Path, vgm, tmp_path: Path) -> None:
    """Two strips an item, as many columns as steps; the first state is noisier than the last."""
    code, out, err = vgm("sample", run, "-n", 3, "--steps", 5, "--trace", "--out", "grid.png")
    assert code == 0, err
    picture = np.asarray(Image.open(tmp_path / "grid-trace.png"))
    assert picture.shape == (2 + 6 * 30, 2 + 5 * 30)
    assert "grid-trace.png" in out
    first, last = picture[2:30, 2:30].astype(float), picture[2:30, 122:150].astype(float)
    assert not np.array_equal(first, last)
    assert not np.array_equal(first, picture[32:60, 2:30]), "below the state is the estimate, not the state again"


def test_trace_of_latents_shows_pictures(vgm, tmp_path: Path) -> None:
    """Behind a codec, states and estimates are decoded."""
    small = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "train.steps=1", "train.preview_n=0"]
    assert vgm("train", "dit", *small, "train.batch_size=8", "train.precision=fp32", "--out", "latent")[0] == 0
    code, _, err = vgm("sample", "latent", "-n", 1, "--steps", 3, "--trace", "--out", "grid.png")
    assert code == 0, err
    assert np.asarray(Image.open(tmp_path / "grid-trace.png")).shape == (2 + 2 * 30, 2 + 3 * 30)


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
