"""`vgm evaluate` says what it compares and what it leaves out: pairs by name, colour, few images, options without effect,
numbers that are none, files that are there already."""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from vgm_cli.cli.evaluate import evaluate as command
from vgm_cli.data import open_dataset
from vgm_cli.engine.evaluate.compare import read_results
from vgm_cli.engine.evaluate.run import build_metric, evaluate, finite, refuse_non_finite
from vgm_cli.engine.evaluate.setup import ineffective
from vgm_cli.engine.evaluate.targets import Options, Target
from vgm_cli.errors import FAILED, INTERRUPTED, USAGE, VgmError
from vgm_cli.images import write_npz
from vgm_cli.metrics.features import mnist_features
from vgm_cli.metrics.frechet import Moments, frechet_distance, frechet_spread, frechet_with_error
from vgm_cli.metrics.pictures import Items, pairs
from vgm_cli.ui import with_error

Run = Callable[..., tuple[int, str, str]]


def results(out: str) -> dict[str, dict[str, Any]]:
    return {r["metric"]: r for r in json.loads(out)}


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """200 digits, uint8 (N, 28, 28, 1)."""
    return open_dataset(quiet=True).images(np.arange(3, 5000, 25)[:200]).permute(0, 2, 3, 1).numpy()


def noise(n: int, channels: int, seed: int = 0, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), np.uint8)


def folder(path: Path, pictures: dict[str, np.ndarray]) -> Path:
    for name, a in pictures.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a).save(path / name)
    return path


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_go_by_name_and_what_is_missing_is_told(vgm: Run, tmp_path: Path) -> None:
    x = noise(6, 3)
    a = folder(tmp_path / "a", {f"{i}.png": x[i] for i in range(6)})
    b = folder(tmp_path / "b", {f"{i}.bmp": x[i] for i in (5, 4, 3, 1, 0)})  # other suffix, 2 is missing
    (a / "3.png").write_bytes((a / "3.png").read_bytes()[:60])  # cut off
    (b / "extra.png").write_bytes((b / "4.bmp").read_bytes())
    code, out, err = vgm("evaluate", a, "--reference", b, "--metrics", "ssim,psnr", "--json")
    found = results(out)
    assert code == 0 and found["ssim"]["value"] == pytest.approx(1) and found["ssim"]["n"] == 4
    assert found["psnr"]["value"] is None and found["psnr"]["identical_pairs"] == 4  # infinity, which JSON lacks
    assert found["ssim"]["paired_by"] == "file name"
    assert found["ssim"]["samples_unpaired"] == {"n": 1, "first": ["2.png"]}
    assert found["ssim"]["reference_unpaired"]["n"] == 2 and found["ssim"]["samples_unreadable"] == 1
    assert "3.png" in err and "2.png" in err and "extra.png" in err
    text = vgm("evaluate", a, "--reference", b, "--metrics", "psnr")[1]
    assert text.startswith("psnr: inf  (n=4")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (["x/1.png", "x/2.png"], ["2.jpg", "1.jpg"], ([0, 1], [1, 0])),  # the folder differs
        (["x/1.png", "y/1.png"], ["y/1.png", "x/1.jpg"], ([0, 1], [1, 0])),  # and is needed here
        (["1.png", "1.jpg"], ["1.jpg", "1.png"], ([0, 1], [1, 0])),  # and the suffix here
        (["a.1.png", "a.2.png"], ["a.2.webp"], ([1], [0])),
    ],
)
def test_names_are_compared_as_far_as_they_tell_pictures_apart(a: list[str], b: list[str], expected: Any) -> None:
    found = pairs(Items(range(len(a)), len(a), a), Items(range(len(b)), len(b), b))
    assert (found.samples, found.reference) == expected


def test_without_names_position_decides(vgm: Run, tmp_path: Path) -> None:
    x = noise(8, 1)
    a, b = tmp_path / "a.npz", folder(tmp_path / "b", {f"{i}.png": x[i] for i in range(8)})
    write_npz(a, x)
    (b / "2.png").write_bytes(b"no picture")
    code, out, _ = vgm("evaluate", a, "--reference", b, "--metrics", "ssim", "-n", 4, "--json")  # 0, 2, 4, 6
    (r,) = json.loads(out)
    assert code == 0 and r["value"] == pytest.approx(1) and (r["n"], r["paired_by"]) == (3, "position")
    write_npz(a, x[:7])
    code, _, err = vgm("evaluate", a, "--reference", b, "--metrics", "ssim")
    assert code == USAGE and "7 samples and 8 references" in err
    c = folder(tmp_path / "c", {f"other{i}.png": x[i] for i in range(8)})
    code, _, err = vgm("evaluate", b, "--reference", c, "--metrics", "psnr")
    assert code == USAGE and "no picture of the samples has a partner" in err


# -- grey and colour ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grey_first", [True, False])
def test_grey_against_colour_is_compared_in_colour(vgm: Run, tmp_path: Path, grey_first: bool) -> None:
    grey, colour = noise(4, 1), noise(4, 3, seed=1)
    folder(tmp_path / "grey", {f"{i}.png": v for i, v in enumerate(grey)})
    folder(tmp_path / "colour", {f"{i}.png": v for i, v in enumerate(colour)})
    a, b = ("grey", "colour") if grey_first else ("colour", "grey")
    args = ("evaluate", tmp_path / a, "--reference", tmp_path / b)
    code, out, err = vgm(*args, "--metrics", "psnr", "--json")
    (r,) = json.loads(out)
    mse = ((grey.astype(float) - colour) ** 2).mean((1, 2, 3)) / 255**2
    assert code == 0 and r["value"] == pytest.approx(float((-10 * np.log10(mse)).mean()))
    assert "three equal channels" in err and "three equal channels" in r["protocol"]["channels"]
    assert r["protocol"]["image_shape"] == [16, 16, 3]
    assert "colour-features" in vgm(*args)[1]


# -- few, alike, NaN ---------------------------------------------------------------------------------------------------


def test_copies_of_one_image_have_a_distance(vgm: Run, tmp_path: Path, digits: np.ndarray) -> None:
    write_npz(tmp_path / "a.npz", digits)
    write_npz(tmp_path / "one.npz", np.repeat(digits[:1], 80, 0))
    pool, one = mnist_features()(digits)["pool"].double(), mnist_features()(digits[:1])["pool"].double()
    expected = float((pool.mean(0) - one[0]).square().sum() + torch.cov(pool.T).trace())  # the other covariance is 0
    for metric in ("fid", "fid:bootstrap=3"):
        args = ("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "one.npz", "--metrics", metric, "--json")
        code, out, _ = vgm(*args)
        assert code == 0 and json.loads(out)[0]["value"] == pytest.approx(expected, rel=1e-4)
    a, b = tmp_path / "a.npz", tmp_path / "one.npz"
    (back,) = json.loads(vgm("evaluate", b, "--reference", a, "--json")[1])
    (same,) = json.loads(vgm("evaluate", b, "--reference", b, "--json")[1])
    assert back["value"] == pytest.approx(expected, rel=1e-4) and same["value"] == pytest.approx(0, abs=1e-4)


def test_a_covariance_of_zero_is_one() -> None:
    x, mu, zero = torch.randn(9, 4, dtype=torch.float64), torch.zeros(4), torch.zeros(4, 4)
    expected = float(x.mean(0).square().sum() + torch.cov(x.T).trace())
    value, error = frechet_with_error(x, mu, zero)
    assert value == pytest.approx(expected) and error > 0 and frechet_spread(x, mu, zero, 3) > 0
    own = Moments.of(x)
    assert frechet_distance(own.mean, own.cov, mu, zero) == pytest.approx(expected)
    assert frechet_with_error(torch.ones(5, 4), mu, zero) == (pytest.approx(4), 0)


def test_few_references_and_shrunken_subsets_are_told(vgm: Run, tmp_path: Path, digits: np.ndarray) -> None:
    write_npz(tmp_path / "a.npz", digits)
    write_npz(tmp_path / "b.npz", digits[:2])
    code, _, err = vgm("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "b.npz")
    assert code == 0 and "2 references with 64 features" in err
    args = ("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "a.npz", "--metrics", "kid:subset_size=1000")
    code, out, err = vgm(*args, "--json")
    (r,) = json.loads(out)
    assert r["uncertainty"] is None and r["protocol"]["options"]["subset_size"] == 200
    assert r["subset_size_asked"] == 1000 and "subsets of 200 instead of 1000" in err and "no uncertainty" in err
    assert "±" not in vgm(*args)[1]
    code, out, err = vgm(*args[:-1], "kid:subset_size=50:subsets=3", "--json")
    assert json.loads(out)[0]["uncertainty"] > 0 and "subsets" not in err


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_statistics_that_are_not_finite_are_refused(vgm: Run, tmp_path: Path, value: float, suffix: str) -> None:
    write_npz(tmp_path / "a.npz", np.zeros((4, 28, 28, 1), np.uint8))
    mu, sigma = np.zeros(64), np.eye(64)
    mu[3] = value
    if suffix == ".npz":
        np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    else:
        save_file({"mu": torch.from_numpy(mu), "sigma": torch.from_numpy(sigma)}, tmp_path / "ref.safetensors", {})
    code, out, err = vgm("evaluate", tmp_path / "a.npz", "--reference", tmp_path / f"ref{suffix}", "--json")
    assert code == FAILED and "NaN or infinite" in err and strict(out)["code"] == FAILED


def test_a_number_that_is_none_is_an_error(vgm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli.metrics.image import SSIM

    monkeypatch.setattr(SSIM, "measure", lambda self, x, y: x.flatten(1).mean(1) * math.nan)
    write_npz(tmp_path / "a.npz", noise(4, 1))
    args = ("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "a.npz", "--metrics", "psnr,ssim")
    code, out, err = vgm(*args)
    assert code == FAILED and "ssim came out as NaN" in err and "psnr: inf" in out and "nan" not in out
    code, out, _ = vgm(*args, "--json")
    document, error = out.rsplit("\n{", 1)
    assert code == FAILED and [r["value"] for r in strict(document)] == [None, None] and strict("{" + error)
    assert not finite({"value": math.inf}) and finite({"value": math.inf, "identical_pairs": 2})
    refuse_non_finite([{"metric": "psnr", "value": 3.0}])


def test_features_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    net = mnist_features()
    broken = type(net)(**{**vars(net), "run": lambda x: {"pool": torch.full((len(x), 64), math.nan)}})
    with pytest.raises(VgmError, match="NaN") as e:
        broken(np.zeros((2, 28, 28, 1), np.uint8))
    assert e.value.code == FAILED


# -- refused before the work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("pr:k=30", "30 nearest neighbours"),
        ("prdc:k=20", "20 nearest neighbours"),
        ("is:splits=30", "30 splits"),
        ("fid-inf", "at least 20"),
        ("ms-ssim", "at least 176 pixels"),
    ],
)
def test_what_so_few_images_cannot_give_is_known_before(metric: str, says: str) -> None:
    class Unread:
        labels, facts = None, {}  # type: ignore[var-annotated]

        def __len__(self) -> int:
            return 15

        def shape(self) -> tuple[int, int, int]:
            return 28, 28, 1

        def batch(self, first: int, last: int) -> np.ndarray:
            raise AssertionError("nothing may be read yet")

    with pytest.raises(VgmError, match=says) as e:
        evaluate(Unread(), reference=Unread(), metrics=[metric])
    assert e.value.code == USAGE


@pytest.mark.parametrize(
    "metric",
    ["kid:subset_size=1", "kid:subsets=0", "fid:bootstrap=1", "is:splits=0", "pr:k=0", "ssim:padding=odd",
     "fid-inf:points=2", "bits-per-dim:method=magic", "bits-per-dim:probes=-1", "straightness:steps=0"],
)  # fmt: skip
def test_options_out_of_range_are_refused(metric: str) -> None:
    with pytest.raises(VgmError) as e:
        build_metric(metric)
    assert e.value.code == USAGE


# -- options without effect --------------------------------------------------------------------------------------------

ALWAYS = {"ctx", "target", "metrics", "protocol", "n", "nproc", "check", "save_stats", "out", "overwrite"}
EXAMPLES = {"seed": 3, "steps": 4, "guidance_scale": 2, "guidance_interval": "0,1", "batch_size": 9, "overrides": "eta=1",
            "precision": "fp32", "sampler": "ddim", "weights": "raw", "split": "train", "features": "mnist",
            "reference": "mnist5k", "device": "cpu"}  # fmt: skip


def test_every_option_without_effect_on_pictures_is_told(vgm: Run, tmp_path: Path) -> None:
    """A law over all options: they count, or it is said that they do not."""
    write_npz(tmp_path / "a.npz", noise(4, 1))
    options = set(inspect.signature(command).parameters) - ALWAYS
    assert options == {*EXAMPLES, "held_out"}
    words: list[Any] = ["--held-out", "mnist5k"]
    for name, value in EXAMPLES.items():
        if name not in ("reference", "split"):
            words += [value] if name == "overrides" else [f"--{name.replace('_', '-')}", value]
    code, _, err = vgm("evaluate", tmp_path / "a.npz", *words, "--reference", tmp_path / "a.npz", "--metrics", "psnr")
    assert code == 0, err
    for name in options - {"reference", "split"}:
        told = "eta=1" if name == "overrides" else "--" + name.replace("_", "-")
        assert f"{told} has no effect on {tmp_path / 'a.npz'}: " in err, name
    write_npz(tmp_path / "d.npz", np.zeros((12, 28, 28, 1), np.uint8))
    words = [
        "--reference",
        "mnist5k",
        "--split",
        "train",
        "--metrics",
        "inception-score",
        "--seed",
        1,
        "--batch-size",
        5,
    ]
    code, _, err = vgm("evaluate", tmp_path / "d.npz", *words)
    assert code == 0 and "--reference has no effect" in err and "--split has no effect" in err
    assert "--seed has" not in err and "--batch-size has" not in err  # these count here
    assert "no effect" not in vgm("evaluate", tmp_path / "d.npz", "--metrics", "is")[2]  # defaults are not given
    assert "--overwrite has no effect" in vgm("evaluate", tmp_path / "d.npz", "--metrics", "is", "--overwrite")[2]


def test_named_options_are_those_of_the_command() -> None:
    """What is told of is an option: a renamed one is noticed."""
    for kind in ("files", "codec", "model"):
        found = Target(kind, 28, 1, torch.device("cpu"))
        names = ineffective(Options(), found, [build_metric("psnr")], None)
        assert set(names) <= set(inspect.signature(command).parameters) & set(typing.get_type_hints(Options))


# -- numbers of pictures, by-products, names ---------------------------------------------------------------------------


def test_number_of_pictures_is_told(vgm: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", noise(6, 1))
    args = ("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "a.npz", "--metrics", "psnr", "-n")
    assert "-n 50: " in (err := vgm(*args, 50)[2]) and "has 6 pictures, all are measured" in err
    assert "3 of the 6 pictures" in vgm(*args, 3)[2]


def test_our_own_by_products_are_not_samples(vgm: Run, tmp_path: Path) -> None:
    x = noise(4, 1)
    where = folder(tmp_path / "s", {f"{i:06d}.png": v for i, v in enumerate(x)})
    for name in ("grid.png", "000001-trace.png", "000002-again.png", "reals.png"):
        info = PngImagePlugin.PngInfo()
        info.add_text("vgm.grid", "{}")
        Image.fromarray(noise(1, 1, side=40)[0, ..., 0]).save(where / name, pnginfo=info)
    (where / ".vgm-job.json").write_text('{"n": 9}')
    code, out, err = vgm("evaluate", where, "--reference", where, "--metrics", "psnr", "--json")
    (r,) = json.loads(out)
    assert code == 0 and r["n"] == 4 and "grid.png" in err and "4 of 9 images are there" in err
    Image.fromarray(x[0, ..., 0]).save(where / "grid.png")  # somebody's own picture of that name
    assert json.loads(vgm("evaluate", where, "--reference", where, "--metrics", "psnr", "--json")[1])[0]["n"] == 5


def test_a_folder_of_restorations_is_not_samples(vgm: Run, tmp_path: Path) -> None:
    x = noise(2, 1)
    where = folder(tmp_path / "r", {"restored/0.png": x[0], "degraded/0.png": x[1]})
    (where / "results.json").write_text("{}")
    code, _, err = vgm("evaluate", where, "--metrics", "psnr", "--reference", where / "restored")
    assert code == USAGE and "vgm restore" in err and str(where / "restored") in err


def test_metrics_with_their_own_number_do_not_heed_n() -> None:
    found = Target("model", 28, 1, torch.device("cpu"))
    own = ineffective(Options(), found, [build_metric("straightness:n=5")], None)
    assert "n" in own and "n" not in ineffective(Options(), found, [build_metric("straightness")], None)


def test_without_a_name_the_newest_run_is_meant(vgm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VGM_INCEPTION", raising=False)
    code, _, err = vgm("evaluate")
    assert code == USAGE and "no run below ./runs" in err
    small = ("train.steps=2", "train.batch_size=4", "train.preview_n=0", "train.precision=fp32")
    assert vgm("train", "vqgan", "data.path=shapes", *small)[0] == 0
    for target in ([], ["vqgan"], ["runs"]):  # a codec of colour images
        code, out, err = vgm("evaluate", *target, "-n", 4, "--device", "cpu")
        assert code == 0 and out.startswith("fid: ") and "colour-features" in out and "\npsnr: " in out, err
    code, _, err = vgm("evaluate", next(Path("runs").glob("*/*")), "--reference", next(Path("runs").glob("*/*")))
    assert code == USAGE and "is a run, not data" in err
    assert "--steps has no effect" in vgm("evaluate", "vqgan", "-n", 4, "--steps", 3)[2]
    assert vgm("evaluate", "vqgan", "--device", "tpu")[0] == USAGE


def test_interruption_says_what_is_left(vgm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    write_npz(tmp_path / "a.npz", noise(4, 1))
    monkeypatch.setattr("vgm_cli.engine.evaluate.run.measure", stop)
    code, _, err = vgm("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "a.npz", "--metrics", "psnr")
    assert code == INTERRUPTED and "nothing is written" in err


# -- what is written ---------------------------------------------------------------------------------------------------


def test_results_and_statistics_replace_nothing_unasked(vgm: Run, tmp_path: Path, digits: np.ndarray) -> None:
    data, kept, stats = tmp_path / "a.npz", tmp_path / "r.json", tmp_path / "s.safetensors"
    write_npz(data, digits[:70])
    kept.write_text("precious")
    stats.write_text("precious")
    args = ("evaluate", data, "--reference", data)
    for words in (("--out", kept), ("--save-stats", stats)):
        code, _, err = vgm(*args, *words)
        assert code == USAGE and "exists" in err and "--overwrite" in err
    assert vgm("evaluate", "stats", data, "-o", stats)[0] == USAGE and stats.read_text() == "precious"
    assert vgm("evaluate", "stats", data, "-o", stats, "--overwrite")[0] == 0
    assert vgm(*args, "--out", kept, "--save-stats", stats, "--overwrite")[0] == 0 and json.loads(kept.read_text())
    assert vgm(*args, "--metrics", "psnr", "--save-stats", tmp_path / "t.safetensors")[0] == USAGE  # no features
    code, out, err = vgm("evaluate", "stats", stats, "-o", tmp_path / "u.safetensors", "--size", 32)
    assert code == 0 and "70 images" in out and "--size has no effect" in err


def test_statistics_of_others_say_only_what_they_may(vgm: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", np.full((4, 28, 28, 1), 9, np.uint8))
    tensors = {"mu": torch.zeros(64), "sigma": torch.eye(64)}
    args = ("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "s.safetensors")
    for facts in ([1], {"features_sha256": {"a": 1}}, {"reference_shape": "x"}, {"resize": 3}):
        save_file(tensors, tmp_path / "s.safetensors", {"vgm.statistics": json.dumps(facts), "vgm.n": "9" * 40})
        assert vgm(*args)[0] == FAILED
    save_file(tensors, tmp_path / "s.safetensors", {"vgm.statistics": '{"reference_shape": [32, 32, 3]}'})
    code, _, err = vgm(*args)
    assert code == 0 and "statistics of 32×32 colour pictures" in err and "does not say which network" in err
    save_file({"mu": torch.zeros(64), "sigma": -torch.eye(64)}, tmp_path / "s.safetensors", {})
    assert vgm(*args)[0] == FAILED


def test_results_are_read_with_care(tmp_path: Path) -> None:
    good = {"metric": "psnr", "value": None, "identical_pairs": 3, "n": 3, "protocol": {"options": {}}}
    (tmp_path / "r.json").write_text(json.dumps([good]))
    assert read_results(tmp_path / "r.json")[0]["value"] == math.inf
    for changes in ({"identical_pairs": 0}, {"protocol": 3}, {"metric": 4}, {"value": "x"}, {"uncertainty": "y"}):
        (tmp_path / "r.json").write_text(json.dumps([{**good, **changes}]))
        with pytest.raises(VgmError) as e:
            read_results(tmp_path / "r.json")
        assert e.value.code == FAILED
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(VgmError):
        read_results(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (802.9, 137.0, "803 ± 140"),
        (0.617283, 0.0123, "0.617 ± 0.012"),
        (5.8734, 0.31, "5.87 ± 0.31"),
        (-0.00012, 0.00031, "-0.00012 ± 0.00031"),
        (3.14159, None, "3.142"),
        (1.0, 0.0, "1 ± 0"),
        (1.5e-9, 2e-10, "1.5e-09 ± 2.0e-10"),
        (math.inf, None, "inf"),
    ],
)
def test_a_number_and_its_error_end_at_one_digit(value: float, error: float | None, text: str) -> None:
    assert with_error(value, error) == text
