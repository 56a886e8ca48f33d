"""`vgm evaluate`: results with their protocol, references in every form, comparisons, several processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from feature_weights import lpips_weights, seeded_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgm_cli.data import open_dataset
from vgm_cli.engine.evaluate import measure as measuring
from vgm_cli.engine.evaluate.compare import compare
from vgm_cli.engine.evaluate.run import build_metric, check_assertion, evaluate, parse_assertion
from vgm_cli.errors import CHECK_FAILED, FAILED, MISSING_ASSET, USAGE, VgmError
from vgm_cli.images import write_npz
from vgm_cli.metrics.base import Subject
from vgm_cli.metrics.features import mnist_features
from vgm_cli.metrics.frechet import Moments, frechet_distance
from vgm_cli.metrics.path_length import PerceptualPathLength
from vgm_cli.metrics.protocols import PROTOCOLS, deviations, with_options

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """600 real digits uint8 (N, 28, 28, 1), evenly over the classes, and their labels."""
    data = open_dataset()
    rows = np.arange(3, 5000, 8)[:600]
    labels = data.labels()
    assert labels is not None
    return data.images(rows).permute(0, 2, 3, 1).numpy(), labels[rows]


@pytest.fixture
def files(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    """a.npz with labels, b.npz: two halves of the digits."""
    images, labels = digits
    write_npz(tmp_path / "a.npz", images[::2], labels[::2].tolist())
    write_npz(tmp_path / "b.npz", images[1::2])
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe."""
    import conftest

    from vgm_cli.__main__ import run

    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.yaml").write_text(conftest.TINY)
    assert run(["train", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return lpips_weights(tmp_path_factory.mktemp("lpips"))


def results(out: str) -> dict[str, dict[str, Any]]:
    return {r["metric"]: r for r in json.loads(out)}


# -- the engine ------------------------------------------------------------------------------------------------------


def test_a_result_carries_its_protocol(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    reference = open_dataset()
    found = evaluate(
        images, reference=reference, metrics=["fid"], labels=labels, seed=5, facts={"model": "m", "nfe": 7}
    )
    (r,) = found
    net = mnist_features()
    pool = net(images)["pool"]
    everything = net(reference.images(range(5000)).permute(0, 2, 3, 1).numpy())["pool"]
    s, m = Moments.of(pool), Moments.of(everything)
    assert r["value"] == pytest.approx(frechet_distance(s.mean, s.cov, m.mean, m.cov), rel=1e-5)
    assert r["uncertainty"] > 0 and (r["n"], r["n_reference"], r["seed"]) == (600, 5000, 5)
    assert (r["model"], r["nfe"]) == ("m", 7) and {"vgm", "time", "seconds"} <= set(r)
    protocol = r["protocol"]
    assert protocol["features"] == "mnist-features" and protocol["features_sha256"] == net.sha256
    assert protocol["reference"] == "mnist5k" and protocol["reference_fingerprint"] == reference.fingerprint()
    assert protocol["resize"] == net.resize and protocol["image_shape"] == [28, 28, 1]
    json.dumps(found)


def test_metrics_share_one_pass_over_the_samples(
    digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digits
    seen: list[int] = []
    net = mnist_features()
    counting = SimpleNamespace(**{k: getattr(net, k) for k in ("kind", "name", "sha256", "resize", "dim", "outputs")})

    class Counting(SimpleNamespace):
        def __call__(self, batch: np.ndarray, device: Any) -> dict[str, Tensor]:
            seen.append(len(batch))
            return net(batch, device)

        def describe(self) -> dict[str, str]:
            return net.describe()

    monkeypatch.setattr("vgm_cli.metrics.features.choose", lambda *a, **k: Counting(**vars(counting)))
    monkeypatch.setattr(measuring, "_cache", {})
    wanted = ["fid", "kid:subsets=3:subset_size=50", "pr", "prdc", "is", "memorisation", "class-accuracy"]
    shown = {r["metric"] for r in evaluate(images[:200], reference=images[200:], metrics=wanted, labels=labels[:200])}
    assert shown == {
        "fid", "kid", "precision", "recall", "density", "coverage", "inception-score", "class-accuracy",
        "memorisation", "copies", "memorisation-pixels", "copies-pixels",
    }  # fmt: skip
    assert sum(seen) == 200 + 400  # class-accuracy insists on the digit network, which is the others' too


def test_a_reference_is_measured_once_per_process(
    digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_cache", {})
    passes: list[int] = []
    real = measuring.measure

    def spy(pictures: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(pictures))
        return real(pictures, *args, **kwargs)

    monkeypatch.setattr(measuring, "measure", spy)
    reference = open_dataset()
    a = evaluate(digits[0][:50], reference=reference, metrics=["fid"])
    b = evaluate(digits[0][:50], reference=reference, metrics=["fid"])
    assert passes == [5000] and a[0]["value"] == b[0]["value"]


def test_batches_change_nothing_but_rounding(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, _ = digits
    one, other = (evaluate(images, reference=images[::2], metrics=["fid"], batch_size=b)[0]["value"] for b in (600, 7))
    assert one == pytest.approx(other, rel=1e-4)


def test_features_too_many_to_keep_are_streamed(
    digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = digits
    kept = evaluate(images, reference=images[::2], metrics=["fid:bootstrap=0"])[0]["value"]
    monkeypatch.setattr(measuring, "GATHERED", 0)
    assert evaluate(images, reference=images[::2], metrics=["fid:bootstrap=0"])[0]["value"] == pytest.approx(
        kept, rel=1e-6
    )


def test_metric_options_and_their_errors() -> None:
    assert build_metric("kid:subsets=7:subset_size=20").subsets == 7 and build_metric("pr:k=5").k == 5
    for text, says in (("kid:7", "not KEY=VALUE"), ("kid:sizes=3", "unknown key"), ("fidd", "unknown metric")):
        with pytest.raises(VgmError, match=says) as e:
            build_metric(text)
        assert e.value.code == USAGE


@pytest.mark.parametrize(
    ("metrics", "kwargs", "says"),
    [
        (["fid"], {"reference": None}, "compares with a reference"),
        (["sfid"], {}, "sfid needs spatial features"),
        (["class-accuracy"], {}, "labelled samples"),
        (["bits-per-dim"], {}, "measured on a model"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(metrics: list[str], kwargs: dict[str, Any], says: str) -> None:
    images = np.zeros((4, 28, 28, 1), np.uint8)
    with pytest.raises(VgmError, match=says) as e:
        evaluate(images, **{"reference": images, "metrics": metrics, **kwargs})
    assert e.value.code == USAGE


def test_odd_images_are_refused() -> None:
    with pytest.raises(VgmError, match="uint8"):
        evaluate(np.zeros((4, 28, 28, 1), np.float32), reference=None, metrics=["is"])
    with pytest.raises(VgmError, match="1 image cannot"):
        evaluate(np.zeros((1, 28, 28, 1), np.uint8), reference=None, metrics=["is"])


# -- assertions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("fid<5", ("fid", "<", 5)), (" fid-inf >= 1e-3 ", ("fid-inf", ">=", 1e-3)), ("kid>-0.5", ("kid", ">", -0.5))],
)
def test_assertions_are_read(text: str, expected: tuple[str, str, float]) -> None:
    assert parse_assertion(text) == expected


def test_assertions_hold_or_exit_with_3() -> None:
    found = [{"metric": "fid", "value": 4.0}, {"metric": "precision", "value": float("nan")}]
    check_assertion("fid<5", found)
    check_assertion("fid<=4", found)
    for text, code in (("fid<4", CHECK_FAILED), ("precision>0", CHECK_FAILED), ("recall>0", USAGE), ("fid=4", USAGE)):
        with pytest.raises(VgmError) as e:
            check_assertion(text, found)
        assert e.value.code == code, text


# -- protocols -------------------------------------------------------------------------------------------------------


def test_protocols_fill_in_what_is_open_and_name_departures() -> None:
    adm = PROTOCOLS["adm"]
    assert with_options("inception-score", adm) == "inception-score:split_size=5000:shuffle=false"
    assert build_metric(with_options("inception-score:split_size=9", adm)).split_size == 9
    for p in PROTOCOLS.values():
        for metric in p.metrics:
            build_metric(with_options(metric, p))
    result = {
        "metric": "inception-score",
        "n": 100,
        "protocol": {"features_kind": "mnist", "options": {"split_size": 9}},
    }
    told = " ".join(deviations(adm, result, "edm"))
    for part in ("100 samples instead of 50,000", "uint8 rule edm", "mnist features", "split_size 9 instead of 5000"):
        assert part in told
    assert deviations(PROTOCOLS["vgm"], result, "edm") == []
    exact = {"metric": "fid", "n": 50_000, "protocol": {"features_kind": "inception", "options": {}}}
    assert deviations(adm, exact, "adm") == []


def test_protocol_is_recorded_and_departures_warned_about(vgm: Run, files: Path) -> None:
    args = ("evaluate", files / "a.npz", "--reference", files / "b.npz", "--features", "mnist", "--json")
    code, out, err = vgm(*args, "--protocol", "torch-fidelity", "--metrics", "inception-score,fid")
    found = results(out)
    assert code == 0 and found["fid"]["protocol"]["name"] == "torch-fidelity"
    assert found["inception-score"]["protocol"]["options"]["splits"] == 10
    assert "300 samples instead of 50,000" in err and "mnist features instead of inception" in err
    assert found["fid"]["protocol"]["deviations"]
    assert vgm(*args, "--protocol", "admm")[0] == USAGE


def test_a_protocol_decides_how_a_run_is_rounded_and_says_what_it_asks_for(vgm: Run, trained: Path) -> None:
    args = ("evaluate", trained, "-n", "20", "--steps", "2", "--metrics", "fid", "--features", "mnist", "--json")
    for name, rule in (("adm", "adm"), ("edm", "edm"), ("mar", "round"), ("vgm", "edm")):
        (r,) = json.loads(vgm(*args, "--protocol", name)[1])
        protocol = r["protocol"]
        assert (protocol["name"], protocol["uint8"], r["n"]) == (name, rule, 20)
        assert protocol["resize"] == mnist_features().resize and protocol["features_sha256"]
        assert protocol.get("prescribes", {}).get("n") == (None if name == "vgm" else 50_000)


# -- targets and references ------------------------------------------------------------------------------------------


def test_files_are_measured(vgm: Run, files: Path, tmp_path: Path) -> None:
    code, out, _ = vgm("evaluate", files / "a.npz", "--reference", "mnist5k", "--metrics", "fid,class-accuracy",
                       "--out", tmp_path / "r.json", "--assert", "class-accuracy>0.9")  # fmt: skip
    assert code == 0
    assert re.search(r"^fid: \d+\.\d+ ± .* \(n=300, reference 5000, mnist-features\)$", out, re.M)
    assert "holds: class-accuracy>0.9" in out
    stored = {r["metric"]: r for r in json.loads((tmp_path / "r.json").read_text())}
    assert stored["fid"]["samples_fingerprint"] and stored["fid"]["protocol"]["uint8"] == "as stored"
    assert vgm("evaluate", files / "a.npz", "--reference", "mnist5k", "--assert", "fid<0.001")[0] == CHECK_FAILED
    assert vgm("evaluate", files / "a.npz", "--reference", "mnist5k", "--assert", "fid~1")[0] == USAGE
    assert vgm("evaluate", files / "a.npz")[0] == USAGE  # no reference


def test_a_part_of_the_samples_is_even_and_recorded(vgm: Run, files: Path) -> None:
    code, out, _ = vgm("evaluate", files / "a.npz", "--reference", files / "b.npz", "-n", "100", "--json")
    (r,) = json.loads(out)
    assert code == 0 and r["n"] == 100 and r["samples_subset"] == "every k-th, 100 of 300"


def test_a_run_is_sampled_and_measured(vgm: Run, trained: Path) -> None:
    args = ("evaluate", trained, "steps=3", "-n", "30", "--metrics", "fid,class-accuracy", "--json", "--batch-size")
    code, out, _ = vgm(*args, 30)
    found = results(out)
    assert code == 0
    r = found["fid"]
    assert (r["n"], r["n_reference"], r["protocol"]["reference"]) == (30, 5000, "mnist5k")
    assert r["weights"] == "ema-0.9" and r["step"] == 8 and r["sampler"] == {"name": "euler", "steps": 3}
    assert r["guidance_scale"] == 1.5 and r["nfe"] > 0 and r["protocol"]["uint8"] == "edm"
    assert results(vgm(*args, 7)[1])["fid"]["value"] == pytest.approx(r["value"], rel=1e-4)
    other = results(vgm(*args, 30, "--seed", "1")[1])["fid"]
    assert other["value"] != r["value"] and other["seed"] == 1


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(process: Any, trained: Path, tmp_path: Path) -> None:
    def numbers(nproc: int) -> dict[str, dict[str, Any]]:
        out = tmp_path / f"{nproc}.json"
        metrics = "fid,kid:subsets=3:subset_size=20,memorisation,bits-per-dim:n=2"
        job = process("evaluate", trained, "-n", "50", "--metrics", metrics, "--batch-size", "10", "--nproc", nproc,
                      "--out", out, "--quiet", "--assert", "fid>0")  # fmt: skip
        code, _, err = job.wait()
        assert code == 0, err
        return {r["metric"]: r for r in json.loads(out.read_text())}

    one, two = numbers(1), numbers(2)
    assert one.keys() == two.keys()
    for name, r in one.items():
        assert (two[name]["value"], two[name]["uncertainty"], two[name]["n"]) == (r["value"], r["uncertainty"], r["n"])


def test_statistics_stand_in_for_the_images(vgm: Run, files: Path, tmp_path: Path) -> None:
    code, out, _ = vgm("evaluate", "stats", files / "b.npz", "-o", tmp_path / "ref.safetensors", "--keep-features")
    assert code == 0 and "300 images, 64 features of mnist-features" in out
    wanted = "fid,kid:subsets=3:subset_size=50,precision-recall"
    direct = vgm("evaluate", files / "a.npz", "--reference", files / "b.npz", "--metrics", wanted, "--json",
                 "--save-stats", tmp_path / "again.safetensors")  # fmt: skip
    through = vgm(
        "evaluate", files / "a.npz", "--reference", tmp_path / "ref.safetensors", "--metrics", wanted, "--json"
    )
    a, b = results(direct[1]), results(through[1])
    for name in a:
        assert b[name]["value"] == pytest.approx(a[name]["value"], rel=1e-4, abs=1e-6)
        same = ("n_reference",), ("protocol", "reference_fingerprint"), ("protocol", "reference")
        for path in same:
            x, y = a[name], b[name]
            for key in path:
                x, y = x[key], y[key]
            assert x == y
    assert all(c["comparable"] for c in compare(list(a.values()), list(b.values())))
    with safe_open(tmp_path / "again.safetensors", framework="pt") as f:
        assert set(f.keys()) == {"mu", "sigma"} and f.metadata()["vgm.n"] == "300"


def test_statistics_in_another_format_are_restated(vgm: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(64), sigma=np.eye(64))
    code, out, _ = vgm("evaluate", "stats", tmp_path / "edm.npz", "-o", tmp_path / "s.safetensors")
    assert code == 0 and "an unknown network" in out
    write_npz(tmp_path / "a.npz", np.zeros((20, 28, 28, 1), np.uint8))
    a, b = (
        vgm("evaluate", tmp_path / "a.npz", "--reference", tmp_path / n, "--json")[1]
        for n in ("edm.npz", "s.safetensors")
    )
    x, y = results(a)["fid"], results(b)["fid"]
    assert x["value"] == pytest.approx(y["value"]) and x["n_reference"] is None
    assert x["protocol"]["reference_fingerprint"] == y["protocol"]["reference_fingerprint"]


def test_statistics_of_another_network_are_refused(vgm: Run, files: Path, tmp_path: Path) -> None:
    tensors = {"mu": torch.zeros(64), "sigma": torch.eye(64)}
    facts = {"features": "another net", "features_sha256": "00"}
    save_file(tensors, tmp_path / "s.safetensors", {"vgm.statistics": json.dumps(facts), "vgm.n": "9"})
    code, _, err = vgm("evaluate", files / "a.npz", "--reference", tmp_path / "s.safetensors")
    assert code == USAGE and "made with another net" in err
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = vgm("evaluate", files / "a.npz", "--reference", tmp_path / "wide.npz")
    assert code == USAGE and "is of 2048 features, mnist-features has 64" in err
    np.savez(tmp_path / "mean.npz", mu=np.zeros(64), sigma=np.eye(64))
    code, _, err = vgm("evaluate", files / "a.npz", "--reference", tmp_path / "mean.npz", "--metrics", "kid")
    assert code == USAGE and "no features of every image" in err


def test_adm_batch_gives_statistics_and_images(vgm: Run, files: Path, tmp_path: Path, digits: Any) -> None:
    images = digits[0][1::2]
    np.savez(tmp_path / "batch.npz", arr_0=images, mu=np.zeros(64), sigma=np.eye(64))
    args = ("--metrics", "fid,precision-recall", "--json")
    found = results(vgm("evaluate", files / "a.npz", "--reference", tmp_path / "batch.npz", *args)[1])
    direct = results(vgm("evaluate", files / "a.npz", "--reference", files / "b.npz", *args)[1])
    assert found["recall"]["value"] == direct["recall"]["value"]  # from its images
    assert found["fid"]["value"] > 2 * direct["fid"]["value"]  # from its mu and sigma, which are others here


def test_reference_is_brought_to_the_samples_size(vgm: Run, tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", np.zeros((20, 32, 32, 1), np.uint8))
    code, out, err = vgm("evaluate", tmp_path / "a.npz", "--reference", "mnist5k", "--json")
    assert code == 0 and "the first of 28×28 pixels, were resized to 32" in err
    assert json.loads(out)[0]["protocol"]["image_shape"] == [32, 32, 1]


def test_colour_images_get_the_colour_network_or_what_is_named(
    vgm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VGM_INCEPTION", raising=False)
    rng = np.random.default_rng(0)
    for name in "ab":
        write_npz(tmp_path / f"{name}.npz", rng.integers(0, 255, (12, 32, 32, 3), np.uint8))
    args = ("evaluate", tmp_path / "a.npz", "--reference", tmp_path / "b.npz")
    code, out, _ = vgm(*args, "--json")
    assert code == 0 and json.loads(out)[0]["protocol"]["features"] == "colour-features"
    code, _, err = vgm(*args, "--features", "inception")
    assert code == MISSING_ASSET and "VGM_INCEPTION" in err
    code, out, _ = vgm(*args, "--features", "mnist", "--json")
    assert code == 0 and json.loads(out)[0]["protocol"]["features"] == "mnist-features"
    assert vgm(*args, "--metrics", "psnr,ssim")[0] == 0  # these look at pixels alone


def test_dinov2_and_clip_metrics_find_their_networks(vgm: Run, files: Path, tmp_path: Path) -> None:
    with safe_open(Path(__file__).parent / "oracles" / "feature-networks.safetensors", framework="pt") as f:
        layouts = {k: json.loads(f.metadata()[f"{k}.keys"]) for k in ("dinov2", "clip-hf")}
    torch.save(seeded_state(layouts["dinov2"]), tmp_path / "dino.pth")
    save_file(seeded_state(layouts["clip-hf"]), tmp_path / "clip.safetensors")
    args = ("evaluate", files / "a.npz", "-n", "20", "--reference", files / "b.npz", "--metrics", "fid,fd-dinov2,cmmd")
    code, _, err = vgm(*args, "--features", "mnist")
    assert code == MISSING_ASSET and "VGM_DINOV2" in err
    both = f"mnist,{tmp_path / 'dino.pth'},{tmp_path / 'clip.safetensors'}"
    code, out, _ = vgm(*args, "--features", both, "--json")
    found = results(out)
    assert code == 0
    kinds = {name: r["protocol"]["features_kind"] for name, r in found.items()}
    assert kinds == {"fid": "mnist", "fd-dinov2": "dinov2", "cmmd": "clip"}
    assert found["cmmd"]["value"] > 0 and found["fd-dinov2"]["uncertainty"] > 0


def test_pairs_of_folders(vgm: Run, tmp_path: Path, digits: Any) -> None:
    from PIL import Image

    images = digits[0][:6]
    for name, shift in (("a", 0), ("b", 10)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray((image[..., 0] // 2 + shift).astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    args = ("evaluate", tmp_path / "a", "--reference", tmp_path / "b", "--metrics")
    found = results(vgm(*args, "psnr,ssim", "--json")[1])
    assert found["psnr"]["value"] == pytest.approx(20 * np.log10(255 / 10), rel=1e-4)
    assert 0 < found["ssim"]["value"] < 1 and found["psnr"]["protocol"]["features"] == "pixels"


def test_a_reader_is_cautioned(vgm: Run, files: Path) -> None:
    few = vgm("evaluate", files / "a.npz", "-n", "20", "--reference", "mnist5k")
    assert "20 samples with 64 features is far too high" in few[2]
    assert "digits only" not in few[2]
    assert "digits only" in vgm("evaluate", files / "a.npz", "--reference", files / "b.npz")[2]
    assert (
        "digits only" not in vgm("evaluate", files / "a.npz", "--reference", files / "b.npz", "--features", "mnist")[2]
    )


def test_a_codec_is_measured_by_its_reconstructions(vgm: Run) -> None:
    code, out, _ = vgm("evaluate", "mnist-codec", "--metrics", "fid,psnr", "-n", "60", "--json")
    found = results(out)
    assert code == 0 and found["psnr"]["value"] > 25 and found["psnr"]["n_reference"] == 60
    assert found["fid"]["samples"] == "reconstructions"


def test_a_trained_tokenizer_is_a_codec(vgm: Run, tiny_dataset: Path, tmp_path: Path) -> None:
    run, small = tmp_path / "run", ("train.steps=2", "train.batch_size=4", "train.preview_n=0", "train.precision=fp32")
    code, _, err = vgm("train", "vqgan", "--out", run, f"data.path={tiny_dataset}", *small)
    assert code == 0 and f"next: vgm evaluate {run}" in err
    code, out, err = vgm("evaluate", run, "--metrics", "psnr,ssim", "-n", "6", "--json")
    found = results(out)
    assert code == 0, err
    assert found["psnr"]["samples"] == "reconstructions" and found["psnr"]["value"] > 3 and found["psnr"]["n"] == 6
    code, _, err = vgm("sample", run, "-n", "2", "--out", tmp_path / "x.png")
    assert code == 2 and "is a codec" in err
    code, _, err = vgm("evaluate", run, "--metrics", "bits-per-dim", "-n", "6")
    assert code == 2 and "measured on a model" in err


def test_memorised_samples_are_found(vgm: Run, files: Path) -> None:
    args = ("evaluate", files / "a.npz", "--metrics", "memorisation", "--json", "--reference")
    copied = results(vgm(*args, files / "a.npz", "--held-out", files / "b.npz")[1])
    fresh = results(vgm(*args, files / "b.npz")[1])
    assert copied["memorisation-pixels"]["value"] == 0 and copied["copies"]["value"] == 1
    assert (
        copied["memorisation"]["protocol"]["held_out"]
        and "held-out" in copied["copies"]["protocol"]["options"]["against"]
    )
    assert 0.4 < fresh["memorisation"]["value"] < 0.6 and fresh["copies"]["value"] < 0.05


# -- models ----------------------------------------------------------------------------------------------------------


def test_bits_per_dim_of_a_run(vgm: Run, trained: Path) -> None:
    args = ("evaluate", trained, "--metrics", "bits-per-dim", "-n", "4", "--json", "--batch-size")
    code, out, _ = vgm(*args, 4)
    (r,) = json.loads(out)
    assert code == 0 and 0 < r["value"] < 20 and r["n"] == 4
    assert "uniform dequantisation" in r["protocol"]["options"]["likelihood"] and "uint8" not in r["protocol"]
    assert json.loads(vgm(*args, 1)[1])[0]["value"] == pytest.approx(r["value"], rel=1e-5)
    assert r["protocol"]["reference"] == "mnist5k" and r["protocol"]["features"] == "none"


def test_ppl_needs_weights_and_a_model_with_paths(vgm: Run, trained: Path, lpips_files: Any, monkeypatch: Any) -> None:
    for variable in ("VGM_LPIPS_VGG", "VGM_LPIPS_HEADS"):
        monkeypatch.delenv(variable, raising=False)
    code, _, err = vgm("evaluate", trained, "--metrics", "ppl")
    assert code == MISSING_ASSET and "VGM_LPIPS_VGG" in err
    monkeypatch.setenv("VGM_LPIPS_VGG", str(lpips_files[0]))
    monkeypatch.setenv("VGM_LPIPS_HEADS", str(lpips_files[1]))
    code, _, err = vgm("evaluate", trained, "--metrics", "ppl")
    assert code == USAGE and "no latent paths" in err


def test_ppl_of_a_stylegan_run(vgm: Run, tiny_dataset: Path, tmp_path: Path, lpips_files: Any) -> None:
    run, small = tmp_path / "run", ("train.steps=2", "train.batch_size=4", "train.preview_n=0", "train.precision=fp32")
    code, _, err = vgm("train", "stylegan", "--out", run, f"data.path={tiny_dataset}", *small)
    assert code == 0, err
    files = f"vgg={lpips_files[0]}:heads={lpips_files[1]}"
    args = ("evaluate", run, "--json", "-n", "5", "--metrics")
    (w,) = json.loads(vgm(*args, f"ppl:{files}")[1])
    (z,) = json.loads(vgm(*args, f"ppl:space=z:sampling=full:{files}")[1])
    assert w["n"] == 5 and w["value"] > 0 and z["value"] > 0 and z["value"] != w["value"]


class Paths:
    """A generator whose images move by a known amount along its paths."""

    def path_samples(
        self, generators: list[torch.Generator], epsilon: float, space: str, sampling: str
    ) -> tuple[Tensor, Tensor]:
        start = torch.stack([torch.rand(3, 16, 16, generator=g) for g in generators]) - 0.5
        return start, start + epsilon


def test_ppl_is_the_mean_distance_over_epsilon_squared(lpips_files: tuple[Path, Path]) -> None:
    from vgm_cli.api import generators, seed_of
    from vgm_cli.losses.lpips import LPIPS

    metric = PerceptualPathLength(n=9, epsilon=0.1, vgg=str(lpips_files[0]), heads=str(lpips_files[1]))
    header = SimpleNamespace(component={"name": "toy"}, data={})

    def measure(batch_size: int) -> float:
        subject = Subject(Paths(), None, header, None, torch.device("cpu"), batch_size, None,
                          lambda items, work: [work(i) for i in items])  # fmt: skip
        (value,) = metric(subject, seed=3)
        assert value.n == 9 and value.options["space"] == "w"
        return value.value

    a, b = Paths().path_samples(generators(seed_of("path", 3, i) for i in range(9)), 0.1, "w", "end")
    with torch.no_grad():
        d = LPIPS(*map(str, lpips_files))(a, b).flatten()
    assert measure(9) == pytest.approx(float(d.mean()) / 0.01, rel=1e-4)
    assert measure(4) == pytest.approx(measure(9), rel=1e-4)


# -- diff ------------------------------------------------------------------------------------------------------------


def result(**changes: Any) -> dict[str, Any]:
    base = {
        "metric": "fid", "value": 5.0, "uncertainty": 0.3, "n": 100, "n_reference": 500, "seed": 0, "vgm": "1",
        "protocol": {"name": "vgm", "features": "net", "features_sha256": "a", "resize": "r", "uint8": "edm",
                     "reference_fingerprint": "f", "options": {"uncertainty": "first order"}},
    }  # fmt: skip
    protocol = {**base["protocol"], **changes.pop("protocol", {})}
    return {**base, **changes, "protocol": protocol}


def test_numbers_of_one_protocol_may_be_compared() -> None:
    (c,) = compare([result()], [result(value=6.0, uncertainty=0.4, seed=1)])
    assert c["comparable"] and c["sigmas"] == pytest.approx(2) and c["notes"] == ["seed: 0 and 1"]
    (c,) = compare([result()], [result(protocol={"options": {"uncertainty": "bootstrap of 20"}})])
    assert c["comparable"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 200}, "depends on their number"),
        ({"n_reference": 400}, "references of 500 and of 400"),
        ({"protocol": {"features_sha256": "b"}}, "different networks"),
        ({"protocol": {"resize": "s"}}, "different rules"),
        ({"protocol": {"uint8": "adm"}}, "8 bits"),
        ({"protocol": {"reference_fingerprint": "g"}}, "references differ"),
        ({"protocol": {"options": {"k": 3}}}, "k differs"),
    ],
)
def test_numbers_of_different_protocols_may_not(changes: dict[str, Any], reason: str) -> None:
    (c,) = compare([result()], [result(**changes)])
    assert not c["comparable"] and any(reason in r for r in c["reasons"]) and "sigmas" not in c


def test_an_unbiased_number_may_be_compared_across_sizes() -> None:
    (c,) = compare([result(metric="psnr")], [result(metric="psnr", n=50)])
    assert c["comparable"] and any("samples" in note for note in c["notes"])


def test_diff_command(vgm: Run, tmp_path: Path) -> None:
    for name, value in (
        ("a", [result()]),
        ("b", [result(value=5.1)]),
        ("c", [result(n=7)]),
        ("d", [result(metric="kid")]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    code, out, _ = vgm("evaluate", "diff", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0 and "fid: 5 and 5.1 are comparable" in out
    code, out, _ = vgm("evaluate", "diff", tmp_path / "a.json", tmp_path / "c.json")
    assert code == CHECK_FAILED and "NOT comparable" in out and "because made of 100 and of 7" in out
    assert vgm("evaluate", "diff", tmp_path / "a.json", tmp_path / "d.json")[0] == USAGE  # nothing in common
    assert vgm("evaluate", "diff", tmp_path / "a.json", tmp_path / "none.json")[0] == USAGE
    (tmp_path / "e.json").write_text("[1]")
    assert vgm("evaluate", "diff", tmp_path / "a.json", tmp_path / "e.json")[0] == FAILED


# -- the command line ------------------------------------------------------------------------------------------------


def test_help_and_usage(vgm: Run, tmp_path: Path) -> None:
    code, out, _ = vgm("evaluate", "--help")
    assert code == 0 and "vgm evaluate [OPTIONS]" in out and "--reference" in out and "evaluate diff" in out
    assert "vgm evaluate diff" in vgm("evaluate", "diff", "--help")[1]
    assert vgm("evaluate")[0] == USAGE
    code, _, err = vgm("evaluate", "nothing-here", "--reference", "mnist5k")
    assert code == USAGE and "no such run or checkpoint" in err


def test_a_folder_may_be_called_like_anything(vgm: Run, tmp_path: Path, files: Path) -> None:
    (files / "a.npz").rename(tmp_path / "run.npz")
    code, out, _ = vgm("evaluate", "--metrics", "is", "run.npz")  # options may come first
    assert code == 0 and out.startswith("inception-score: ")


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [("vgm evaluate ", 2, {"diff", "stats", "runs/a/b"}), ("vgm evaluate x --samp", 3, {"--sampler"})],
)
def test_completion_offers_runs_and_commands(
    vgm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, position: int, expected: set[str]
) -> None:
    (tmp_path / "runs" / "a" / "b").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "b" / "config.yaml").touch()
    monkeypatch.setenv("_VGM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(position))
    assert set(vgm()[1].split()) == expected
