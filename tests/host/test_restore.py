"""`vgm restore` through the CLI on networks of random weights: what it writes, what it refuses. Slow: a trained one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_weights import lpips_weights
from PIL import Image

from vgm_cli.data import open_dataset
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.restore import figures, records, setup
from vgm_cli.errors import VgmError
from vgm_cli.images import read_png_metadata, to_uint8
from vgm_cli.metrics.image import psnr
from vgm_cli.registry import registry
from vgm_cli.testing.suites import randomise

Cli = Callable[..., tuple[int, str, str]]

FLOW = {"name": "denoiser", "path": {"name": "linear"}, "prediction": "velocity", "time": "unit"}
DDPM = {"name": "denoiser", "path": {"name": "vp-discrete"}, "prediction": "eps", "time": "index"}
METHODS = ("dps", "mcg", "projection", "ddrm", "pigdm", "diffpir")


def save(
    path: Path, *, classes: int = 10, null: bool = True, view: dict[str, Any] | None = FLOW, latent: bool = False,
    channels: int = 1,
) -> Path:  # fmt: skip
    """A self-describing small DiT on 28x28 pixels, or on the shipped codec's 4x7x7 latents."""
    shape = (4, 7, 7) if latent else (channels, 28, 28)
    kwargs = {
        "input_size": shape[1],
        "in_channels": shape[0],
        "num_classes": classes,
        "patch_size": 7,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "learn_sigma": False,
        "class_dropout_prob": 0.1 if null else 0.0,
    }
    network = registry().build("model", {"name": "dit", **kwargs})
    randomise(network)
    header = ckpt.Header(
        component={"kind": "model", "name": "dit", "kwargs": kwargs},
        view=view,
        parts={"codec": ckpt.refer_codec(ckpt.ASSETS / "mnist-codec.safetensors")} if latent else {},
        data={"sample_shape": list(shape), "num_classes": classes, "image_size": 28, "image_channels": channels},
    )
    ckpt.save_network(path, network.state_dict(), header)
    return path


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("priors")
    return {
        "flow": save(folder / "flow.safetensors"),
        "ddpm": save(folder / "ddpm.safetensors", classes=0, view=DDPM),
        "strict": save(folder / "strict.safetensors", null=False),
        "latent": save(folder / "latent.safetensors", latent=True),
        "colour": save(folder / "colour.safetensors", classes=0, channels=3),
        "bare": save(folder / "bare.safetensors", view=None),
    }


def digits(folder: Path, count: int = 3) -> Path:
    """Digits as PNG files."""
    folder.mkdir()
    x = to_uint8(open_dataset("mnist5k").pixels(range(0, 5000, 5000 // count)))[:count]
    for i, image in enumerate(x):
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    return folder


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(p)) for p in sorted(folder.glob("*.png"))])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# -- what it writes ---------------------------------------------------------------------------------------------------


def test_writes_images_figures_and_records(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    code, out, err = vgm(
        "restore", "--model", priors["flow"], "--task", "super-resolution", "scale=2", "zeta=1.5", "--input", "mnist5k",
        "-n", 5, "--steps", 4, "--seed", 3, "--noise", "gaussian", "sigma=0.1", "--out", tmp_path / "r",
    )  # fmt: skip
    assert code == 0, err
    assert "restored" in out and "baseline" in out and out.strip().endswith(str(tmp_path / "r")) and "dB" in err
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "restored", "degraded", "grid.png", "measurements.npz", "residual.jsonl", "results.json",
    }  # fmt: skip
    found = results(tmp_path / "r")
    assert found["task"] == {"name": "super-resolution", "scale": 2}
    assert found["method"] == {"name": "dps", "zeta": 1.5} and found["noise"] == {"name": "gaussian", "sigma": 0.1}
    assert (found["n"], found["nfe"], found["seed"], found["labels"]) == (5, 4, 3, None)
    assert len(found["images"]) == 5 and len(found["residual_curve"]) == 4
    # the figures are those of the files
    truth = open_dataset("mnist5k").images([0, 1000, 2000, 3000, 4000]).double() / 255
    restored = torch.from_numpy(pixels(tmp_path / "r/restored"))[:, None].double() / 255
    assert [i["name"] for i in found["images"]][1] == "00001000"
    assert found["restored"]["psnr"] == pytest.approx(psnr(restored, truth).mean().item())
    assert found["images"][2]["psnr"] == pytest.approx(psnr(restored, truth)[2].item())
    assert found["gain"] == pytest.approx(found["restored"]["psnr"] - found["baseline"]["psnr"])
    assert 0 < found["baseline"]["ssim"] < 1
    y = np.load(tmp_path / "r/measurements.npz")["y"]
    assert y.shape == (5, 1, 14, 14) and y.dtype == np.float32
    lines = [json.loads(line) for line in (tmp_path / "r/residual.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and all(len(line["values"]) == 5 for line in lines)
    assert lines[-1]["mean"] == pytest.approx(found["residual_curve"][-1], rel=1e-4)
    grid = np.asarray(Image.open(tmp_path / "r/grid.png"))  # named rows of three items, and of the other two
    assert grid.shape[0] == 2 + 6 * 86 + 8 and 3 * 86 < grid.shape[1] < 3 * 86 + 100
    left = grid.shape[1] - 3 * 86
    for row, part in enumerate(("degraded", "restored")):
        assert (grid[2 + row * 86 :, left:][:84:3, :84:3] == pixels(tmp_path / "r" / part)[0]).all(), part
    assert (grid[2 + 2 * 86 :, left:][:84:3, :84:3] == truth[0, 0].numpy() * 255).all()
    assert (grid[:, : left - 2] < 100).any(), "names stand at the left"
    told = json.loads(read_png_metadata(tmp_path / "r/restored/000001.png")["vgm"])
    assert told["command"] == "restore" and told["model"] == str(priors["flow"]) and told["seed"] == 3
    code, _, err = vgm("rerun", tmp_path / "r/restored/000001.png")
    assert code == 2 and "was made by vgm restore" in err
    assert told["task"]["scale"] == 2 and read_png_metadata(tmp_path / "r/restored/000001.png")["vgm.item"] == "1"


def test_json_is_one_document(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    args = ("--input", "mnist5k", "-n", 2, "--steps", 2, "--out", tmp_path / "r", "--json")
    code, out, _ = vgm("restore", "--model", priors["ddpm"], "--task", "denoising", *args)
    assert code == 0 and json.loads(out) == results(tmp_path / "r")


@pytest.mark.parametrize("method", METHODS)
def test_items_do_not_depend_on_their_batch(vgm: Cli, priors: dict[str, Path], tmp_path: Path, method: str) -> None:
    for size in (1, 3):
        args = ("--task", "inpainting", "mask=random", "--method", method, "--input", "mnist5k", "-n", 3, "--steps", 3)
        code, _, err = vgm(
            "restore", "--model", priors["flow"], *args, "--batch-size", size, "--out", tmp_path / str(size)
        )
        assert code == 0, err
    a, b = (pixels(tmp_path / str(size) / "restored").astype(int) for size in (1, 3))
    assert np.abs(a - b).max() <= 1 and not (a[0] == a[1]).all()
    assert (pixels(tmp_path / "1/degraded") == pixels(tmp_path / "3/degraded")).all()


@pytest.mark.parametrize("task", [["inpainting"], ["motion-deblurring", "kernel_size=9"]], ids=lambda t: t[0])
def test_a_degraded_input_is_restored_alike(vgm: Cli, priors: dict[str, Path], tmp_path: Path, task: list[str]) -> None:
    """The measurements and what was drawn and the noise, given back with the truth: the same images and figures."""
    folder = digits(tmp_path / "whole")
    common = ("restore", "--model", priors["flow"], "--task", task[0], "--steps", 3)
    code, _, err = vgm(*common, *task[1:], "--input", folder, "--out", tmp_path / "a")
    assert code == 0, err
    key = "mask" if task[0] == "inpainting" else "kernel"
    given = ("--degraded", f"{key}={tmp_path / 'a/drawn.safetensors'}", "--noise", "gaussian", "--truth", folder)
    code, _, err = vgm(
        *common, *given, "--input", tmp_path / "a/measurements.npz", "--batch-size", 2, "--out", tmp_path / "b"
    )
    assert code == 0, err
    assert np.abs(pixels(tmp_path / "a/restored").astype(int) - pixels(tmp_path / "b/restored")).max() <= 1
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert b["restored"]["psnr"] == pytest.approx(a["restored"]["psnr"], abs=0.05) and b["degraded_by"] == "before"
    assert b["noise"] == a["noise"] == {"name": "gaussian"}


def test_degraded_pictures_without_a_truth(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    """Small PNGs in a folder, and one alone: restored, no figures that would need a truth."""
    folder = tmp_path / "small"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((7, 7), 60 * i, np.uint8)).save(folder / f"{i}.png")
    args = ("restore", "--model", priors["ddpm"], "--degraded", "--steps", 3, "scale=4")
    code, out, err = vgm(*args, "--input", folder, "--out", tmp_path / "r")
    assert code == 0, err
    found = results(tmp_path / "r")
    assert [i["name"] for i in found["images"]] == ["0", "1", "2"] and "gain" not in found and "dB" not in err
    assert "psnr" not in found["restored"] and found["restored"]["residual"] > 0
    assert pixels(tmp_path / "r/restored").shape == (3, 28, 28) and "-" in out
    width, height = Image.open(tmp_path / "r/grid.png").size
    assert height == 2 + 2 * 86 and width > 3 * 86, "degraded above restored"
    code, _, err = vgm(*args, "--input", folder / "1.png", "--out", tmp_path / "one")
    assert code == 0 and results(tmp_path / "one")["n"] == 1, err


@pytest.mark.parametrize(
    ("words", "good", "small"),
    [([], (28, 28), (7, 7)), (["--degraded", "scale=4"], (7, 7), (28, 28))],
    ids=["whole", "degraded"],
)
def test_pictures_of_a_folder_that_do_not_fit_are_left_out(
    words: list[str], good: tuple[int, int], small: tuple[int, int], vgm: Cli, priors: dict[str, Path], tmp_path: Path
) -> None:
    """Each is named, the others are restored; pairs with a truth are refused whole, as is a folder of such pictures."""
    rng = np.random.RandomState(0)
    folder, alone = tmp_path / "in", tmp_path / "alone"
    for path, size in (
        (folder / "a.png", small),
        (folder / "b.png", good),
        (folder / "d.png", good),
        (alone / "a.png", small),
    ):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.randint(0, 255, size, np.uint8)).save(path)
    (folder / "c.png").write_bytes(b"no picture")
    args = ("restore", "--model", priors["flow"], *words, "--steps", 2, "--out", tmp_path / "r")
    code, _, err = vgm(*args, "--input", folder)
    assert code == 0 and "left out: a.png" in err and "c.png" in err, err
    assert [i["name"] for i in results(tmp_path / "r")["images"]] == ["b", "d"]
    code, _, err = vgm(*args, "--overwrite", "--input", alone)
    assert code == 2 and f"{small[0]}x{small[1]}" in err and pixels(tmp_path / "r/restored").shape[0] == 2
    if words:
        code, _, err = vgm(*args, "--overwrite", "--input", folder, "--truth", folder)
        assert code == 2 and "a.png is" in err and "left out" not in err


def test_one_large_colour_photo_on_a_grey_prior(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    """Cropped, resized and made grey as training images are."""
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    args = ("--task", "gaussian-deblurring", "std=1", "kernel_size=5", "--steps", 2, "--out", tmp_path / "r")
    code, _, err = vgm("restore", "--model", priors["flow"], "--input", tmp_path / "photo.png", *args)
    assert code == 0, err
    assert pixels(tmp_path / "r/restored").shape == (1, 28, 28) and results(tmp_path / "r")["baseline"]["psnr"] > 5


@pytest.mark.parametrize("task", ["colorization", "jpeg", "phase-retrieval", "nonlinear-deblurring"])
def test_other_tasks_on_colours(vgm: Cli, priors: dict[str, Path], tmp_path: Path, task: str) -> None:
    args = ("--task", task, "--input", "shapes", "-n", 2, "--steps", 2, "--out", tmp_path / "r", "--noise", "poisson")
    code, _, err = vgm("restore", "--model", priors["colour"], *args)
    assert code == 0, err
    found = results(tmp_path / "r")
    assert found["noise"] == {"name": "poisson"} and ("baseline" in found) == (task != "phase-retrieval")
    assert pixels(tmp_path / "r/restored").shape == (2, 28, 28, 3)


@pytest.mark.parametrize("method", ["dps", "diffpir"])
def test_latent_priors_restore_through_their_codec(
    vgm: Cli, priors: dict[str, Path], tmp_path: Path, method: str
) -> None:
    args = ("--method", method, "--input", "mnist5k", "-n", 2, "--steps", 3, "--out", tmp_path / "r")
    code, _, err = vgm("restore", "--model", priors["latent"], "--task", "super-resolution", *args)
    assert code == 0, err
    found = results(tmp_path / "r")
    assert pixels(tmp_path / "r/restored").shape == (2, 28, 28) and found["baseline"]["psnr"] > 10
    assert all(np.isfinite(found["residual_curve"])) and len(set(found["residual_curve"])) == 3


def test_consistency_editing_restores(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    """Zero-shot editing through the command, its estimates and their residuals recorded like those of the others."""
    args = ("--method", "consistency-edit", "--input", "mnist5k", "-n", 3, "--steps", 4, "--noise", "none")
    code, _, err = vgm(
        "restore", "--model", priors["flow"], "--task", "super-resolution", *args, "--out", tmp_path / "r"
    )
    assert code == 0, err
    found = results(tmp_path / "r")
    assert len(found["residual_curve"]) == 4 and found["residual_curve"][-1] > 0 and found["nfe"] == 4
    assert all(i["residual"] < 1e-3 for i in found["images"]), "the image agrees with what was measured"
    code, _, err = vgm(
        "restore", "--model", priors["flow"], "--task", "phase-retrieval", *args, "--out", tmp_path / "p"
    )
    assert code == 2 and "pseudo-inverse" in err


def test_the_table_has_perceptual_distances(
    vgm: Cli, priors: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PSNR, SSIM and LPIPS of the restored and of the baseline, by weights on disk."""
    vgg, heads = lpips_weights(tmp_path)
    args = ("--task", "denoising", "--input", "mnist5k", "-n", 2, "--steps", 2, "--out", tmp_path / "r")
    code, out, err = vgm("restore", "--model", priors["flow"], *args, "--lpips", f"{vgg},{heads}")
    assert code == 0, err
    found = results(tmp_path / "r")
    for side in ("baseline", "restored"):
        assert found[side]["psnr"] > 0 and found[side]["ssim"] < 1 and found[side]["lpips"] > 0
        line = next(line for line in out.splitlines() if line.startswith(side))
        assert f"{found[side]['lpips']:.4f}" in line
    assert found["images"][1]["lpips"] > 0 and found["images"][1]["baseline_lpips"] > 0
    monkeypatch.setenv("VGM_LPIPS_VGG", str(vgg))
    monkeypatch.setenv("VGM_LPIPS_HEADS", str(heads))
    assert vgm("restore", "--model", priors["flow"], *args, "--overwrite")[0] == 0
    assert results(tmp_path / "r")["restored"]["lpips"] == found["restored"]["lpips"]


def test_labels(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    args = ("restore", "--task", "denoising", "--input", "mnist5k", "-n", 3, "--steps", 3)

    def run(name: str, model: str, *more: str) -> np.ndarray:
        code, _, err = vgm(*args, "--model", priors[model], *more, "--out", tmp_path / name)
        assert code == 0, err
        return pixels(tmp_path / name / "restored")

    null, named, own = run("a", "flow"), run("b", "flow", "--label", "7"), run("c", "flow", "--label", "data")
    assert not (null == named).all() and not (null == own).all()
    assert results(tmp_path / "a")["labels"] is None and results(tmp_path / "b")["labels"] == [7, 7, 7]
    assert results(tmp_path / "c")["labels"] == [0, 3, 6]
    run("d", "strict")  # no null class: the data's labels
    assert results(tmp_path / "d")["labels"] == [0, 3, 6]


def test_tries_keep_what_fits_best(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    for tries in (1, 4):
        args = ("--task", "phase-retrieval", "pad=4", "--input", "mnist5k", "-n", 3, "--steps", 4, "--tries", tries)
        code, _, err = vgm("restore", "--model", priors["flow"], *args, "--out", tmp_path / str(tries))
        assert code == 0, err
    one, four = (results(tmp_path / str(t))["images"] for t in (1, 4))
    assert all(b["residual"] <= a["residual"] for a, b in zip(one, four))
    assert any(b["residual"] < a["residual"] for a, b in zip(one, four))


def test_the_default_folder_lies_in_the_run(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run/checkpoints/step-1"
    run.mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("paper: dit\n")
    (run / "model.safetensors").write_bytes(priors["flow"].read_bytes())
    args = ("--task", "denoising", "--input", "mnist5k", "-n", 1, "--steps", 1)
    code, out, _ = vgm("restore", "--model", tmp_path / "run", *args)
    assert code == 0 and (tmp_path / "run/restored/denoising-dps-1steps-seed0/results.json").is_file()
    assert out.strip().endswith("denoising-dps-1steps-seed0")
    code, out, _ = vgm("restore", "--model", tmp_path / "run", *args)
    assert code == 0 and out.strip().endswith("denoising-dps-1steps-seed0_2")


def test_perceptual_distances_are_measured_on_request() -> None:
    """Any distance of pairs in [-1, 1]; images of 8 bits, as saved."""
    x, truth = torch.rand(3, 1, 28, 28) * 2 - 1, torch.rand(3, 1, 28, 28) * 2 - 1
    found = figures.compare(x, truth, lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True))
    assert set(found) == {"psnr", "ssim", "lpips"}
    assert found["lpips"] == pytest.approx((x - truth).abs().mean((1, 2, 3)).tolist(), abs=0.01)
    assert set(figures.compare(x[..., :8, :8], truth[..., :8, :8], None)) == {"psnr"}, "too small for SSIM's window"


def test_words_go_where_they_belong() -> None:
    s = setup.settings_for(
        "inpainting", "diffpir", "gaussian", ["mask=random", "zeta=0.5", "sigma=0.2", "noise.sigma=0.3"]
    )
    assert s.task == {"name": "inpainting", "mask": "random"} and s.method == {"name": "diffpir", "zeta": 0.5}
    assert s.noise.sigma == 0.3
    s = setup.settings_for("inpainting", "dps", "none", ["method.preset=inpainting", "task.box=0.3"])
    assert s.method == {"name": "dps", "preset": "inpainting"} and s.task["box"] == 0.3


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--input", "mnist5k"], 2, "no prior is given"),
        (["--model", "flow"], 2, "no input is given"),
        (["--model", "flow", "--input", "mnist5k", "--task", "superresolution"], 2, "super-resolution"),
        (["--model", "flow", "--input", "mnist5k", "--method", "dsp"], 2, "unknown restoration method"),
        (["--model", "flow", "--input", "mnist5k", "--method", "ddim"], 2, "does not restore"),
        (["--model", "flow", "--input", "mnist5k", "--noise", "salt"], 2, "unknown noise"),
        (["--model", "flow", "--input", "mnist5k", "skale=4"], 2, "did you mean scale"),
        (["--model", "flow", "--input", "mnist5k", "scale=none"], 2, "scale"),
        (["--model", "flow", "--input", "mnist5k", "scale"], 2, "KEY=VALUE"),
        (["--model", "nowhere", "--input", "mnist5k"], 2, "no such run"),
        (["--model", "bare", "--input", "mnist5k"], 2, "does not take"),
        (["--model", "mnist-codec", "--input", "mnist5k"], 2, "codec"),
        (["--model", "flow", "--input", "nowhere"], 2, "no such data"),
        (["--model", "flow", "--input", "nowhere", "--degraded"], 2, "no such file"),
        (["--model", "flow", "--input", "tiny.png"], 2, "smaller|7x7"),
        (["--model", "flow", "--input", "whole", "--degraded"], 2, "28x28"),
        (["--model", "flow", "--input", "y.npz", "--degraded"], 2, "no array 'y'"),
        (["--model", "flow", "--input", "broken.png", "--degraded"], 1, "cannot be read"),
        (["--model", "flow", "--input", "whole", "--degraded", "--task", "inpainting"], 2, "mask=FILE"),
        (["--model", "flow", "--input", "whole", "--task", "inpainting", "mask=none.png"], 2, "no such mask"),
        (["--model", "flow", "--input", "whole", "--task", "inpainting", "mask=tiny.png"], 2, "7x7"),
        (["--model", "flow", "--input", "tiny.png", "--degraded", "--truth", "whole"], 2, "3 images"),
        (["--model", "flow", "--input", "whole", "--truth", "whole"], 2, "belongs to --degraded"),
        (["--model", "flow", "--input", "whole", "-n", 9], 2, "the input has 3 images"),
        (["--model", "flow", "--input", "mnist5k", "--split", "dev"], 2, "no split"),
        (["--model", "flow", "--input", "whole", "--label", "12"], 2, "label 12"),
        (["--model", "flow", "--input", "whole", "--label", "data"], 2, "no labels"),
        (["--model", "strict", "--input", "whole"], 2, "needs labels"),
        (["--model", "ddpm", "--input", "whole", "--label", "3"], 2, "unconditional"),
        (["--model", "flow", "--input", "whole", "--task", "colorization"], 2, "colour images"),
        (["--model", "flow", "--input", "whole", "--task", "jpeg", "--method", "ddrm"], 2, "not linear"),
        (["--model", "latent", "--input", "whole", "--method", "pigdm"], 2, "pseudo-inverse"),
        (["--model", "latent", "--input", "whole", "--method", "ddrm"], 2, "prior of pixels"),
        (["--model", "flow", "--input", "whole", "--steps", 2000], 2, "2000"),
        (["--model", "flow", "--input", "whole", "--lpips", "vgg.pth"], 2, "VGG,HEADS"),
        (["--model", "flow", "--input", "whole", "--lpips", "vgg.pth,heads.pth"], 4, "no such file"),
        (["--model", "flow", "--input", "whole", "--task", "nonlinear-deblurring", "weights=a.pth"], 2, "256x256"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else None,
)
def test_refusals(vgm: Cli, priors: dict[str, Path], tmp_path: Path, args: list[Any], code: int, text: str) -> None:
    import re

    digits(tmp_path / "whole")
    Image.fromarray(np.zeros((7, 7), np.uint8)).save(tmp_path / "tiny.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    np.savez(tmp_path / "y.npz", x=np.zeros(3))
    words = [str(priors[a]) if args[i - 1 : i] == ["--model"] and a in priors else a for i, a in enumerate(args)]
    got, _, err = vgm("restore", *words, "--out", tmp_path / "out")
    assert got == code, err
    assert re.search(text, err), err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    args = ("--task", "denoising", "--input", "mnist5k", "-n", 1, "--steps", 1, "--out", tmp_path / "out")
    code, _, err = vgm("restore", "--model", priors["flow"], *args)
    assert code == 2 and "is a file" in err and (tmp_path / "out").read_text() == "mine"


def test_an_earlier_restoration_is_replaced_only_when_asked(
    vgm: Cli, priors: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither mixed nor lost: refused, replaced as a whole, and whole after an error or Ctrl-C in the middle."""
    common = ("restore", "--model", priors["flow"], "--input", "mnist5k", "--steps", 1, "--out", tmp_path / "r")
    assert vgm(*common, "--task", "denoising", "-n", 3)[0] == 0
    before = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    left = lambda: {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    other = (*common, "--task", "inpainting", "mask=random", "-n", 1)
    code, _, err = vgm(*other)
    assert code == 2 and "--overwrite" in err and left() == before
    real, calls = records.save_png, []

    def stopped(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_png", stopped)
        code, _, err = vgm(*other, "--overwrite")
    assert code == 130 and "nothing is written" in err and left() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith((".tmp", ".old"))] == []
    assert vgm(*other, "--overwrite")[0] == 0
    assert (
        results(tmp_path / "r")["task"]["name"] == "inpainting" and len(list((tmp_path / "r/restored").iterdir())) == 1
    )
    (tmp_path / "r/notes.txt").write_text("mine")
    code, _, err = vgm(*other, "--overwrite")
    assert code == 2 and "notes.txt" in err and (tmp_path / "r/notes.txt").exists()


def test_restorations_that_are_not_finite_are_told(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    args = ("--task", "super-resolution", "scale=2", "--input", "mnist5k", "-n", 2, "--steps", 3)
    code, out, err = vgm("restore", "--model", priors["flow"], *args, "zeta=1e30", "--out", tmp_path / "r")
    assert code == 1 and "NaN or infinity" in err and "PSNR" not in out and not (tmp_path / "r").exists()


def test_the_noise_that_is_assumed_is_told(vgm: Cli, priors: dict[str, Path], tmp_path: Path) -> None:
    args = (
        "restore",
        "--model",
        priors["flow"],
        "--task",
        "denoising",
        "--input",
        digits(tmp_path / "d", 1),
        "--steps",
        1,
    )
    code, _, err = vgm(*args, "--out", tmp_path / "a")
    assert code == 0 and "gaussian noise, sigma=0.05" in err and "1 image in" in err
    code, _, err = vgm(*args, "--degraded", "--out", tmp_path / "b")
    assert code == 0 and "free of noise" in err
    code, _, err = vgm(*args, "--noise", "none", "--out", tmp_path / "c")
    assert code == 0 and "noise" not in err


def test_ambiguous_words_are_refused() -> None:
    class Twice(registry().build("operator", "denoising").__class__):  # type: ignore[misc]
        def __init__(self, zeta: float = 1.0):
            self.zeta = zeta

    import sys

    module = sys.modules[__name__]
    module.Twice = Twice  # type: ignore[attr-defined]
    name = f"{__name__}:Twice"
    registry().trust(name)
    with pytest.raises(VgmError, match="both task and method have a 'zeta'") as e:
        setup.settings_for(name, "dps", "none", ["zeta=1"])
    assert e.value.code == 2 and "task.zeta or method.zeta" in e.value.hint
    assert setup.settings_for(name, "dps", "none", ["task.zeta=2"]).task == {"name": name, "zeta": 2}


# -- a trained prior --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dps_beats_its_baselines_on_held_out_digits(vgm: Cli, tmp_path: Path) -> None:
    """The shipped recipe, whose prior has not seen every tenth digit: 3 dB above bicubic and above the masked image."""
    assert vgm("train", "dps", "--out", tmp_path / "prior", "train.preview_n=0")[0] == 0
    for task in (["super-resolution", "scale=4"], ["inpainting", "mask=box"]):
        args = ("--input", "mnist5k", "--split", "test", "-n", 64, "--out", tmp_path / task[0])
        code, _, err = vgm("restore", "--model", tmp_path / "prior", "--task", *task, *args)
        assert code == 0, err
        assert results(tmp_path / task[0])["gain"] >= 3, results(tmp_path / task[0])["restored"]
