"""The shipped networks of colour pictures: features, retrieval by caption, the codec and its tuning on other pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vgm_cli import recipe as recipes
from vgm_cli.data import open_dataset
from vgm_cli.engine import build
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.facts import Facts
from vgm_cli.errors import MISSING_ASSET, USAGE, VgmError
from vgm_cli.images import write_npz
from vgm_cli.metrics import train_colour_features as script
from vgm_cli.metrics.base import Measured
from vgm_cli.metrics.features import colour_features, file_sha256, load_features
from vgm_cli.metrics.pictures import Items
from vgm_cli.metrics.retrieval import Retrieval, nearest
from vgm_cli.nn import augment

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    """The 205 pictures of the test split, uint8 (205, 32, 32, 3)."""
    data = open_dataset("openmoji", split="test", quiet=True)
    return data.images(range(len(data))).permute(0, 2, 3, 1).numpy()


def worse(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Pictures changed as a small generative model might have drawn them."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = script.changed(x, torch.Generator().manual_seed(seed))
    return ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def results(out: str) -> dict[str, dict[str, Any]]:
    return {r["metric"]: r for r in json.loads(out)}


# -- features ----------------------------------------------------------------------------------------------------------


def test_colour_network_finds_pictures_that_it_never_saw(held_out: np.ndarray) -> None:
    net = colour_features()
    plain, again = net(held_out)["pool"], net(worse(held_out))["pool"]
    assert plain.shape == (205, net.dim) and 0.5 < float(plain.std(0).mean()) < 2
    found = nearest(again, plain, 5)
    own = torch.arange(205)[:, None]
    assert (found[:, :1] == own).float().mean() > 0.75 and (found == own).any(1).float().mean() > 0.9


def test_colour_network_takes_any_size_and_grey(held_out: np.ndarray) -> None:
    net, few = colour_features(), held_out[:8]
    large = few.repeat(2, axis=1).repeat(2, axis=2)
    torch.testing.assert_close(net(large)["pool"], net(few)["pool"], rtol=0.2, atol=0.3)
    grey = few.mean(-1, keepdims=True).astype(np.uint8)
    torch.testing.assert_close(net(grey)["pool"], net(grey.repeat(3, axis=-1))["pool"])


def test_the_script_writes_a_network_that_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(script.DATA) as f:
        few = {k: f[k][::12] for k in ("images", "labels", "split")}
    np.savez(tmp_path / "few.npz", **few)
    out = tmp_path / "own.safetensors"
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(tmp_path / "few.npz"), "--out", str(out), "--epochs", "2"])
    script.main()
    net = load_features(out)
    assert net.kind == "colour" and net.sha256 == file_sha256(out) != colour_features().sha256
    assert net(few["images"][:4])["pool"].shape == (4, net.dim)


# -- choice, and the command -------------------------------------------------------------------------------------------


def test_colour_pictures_are_measured_at_once(vgm: Run, tmp_path: Path, held_out: np.ndarray) -> None:
    write_npz(tmp_path / "a.npz", worse(held_out))
    asked = ("--reference", "openmoji", "--split", "test", "--json")
    code, out, err = vgm("evaluate", tmp_path / "a.npz", *asked, "--metrics", "fid,kid,precision-recall,retrieval")
    assert code == 0, err
    found = results(out)
    assert found["fid"]["protocol"]["features"] == "colour-features" and found["fid"]["protocol"]["name"] == "vgm"
    assert found["fid"]["protocol"]["features_sha256"] == colour_features().sha256
    assert found["retrieval-top5"]["value"] > 0.9 and found["retrieval-top5"]["chance"] == 5 / 205
    assert found["retrieval-top1"]["value"] <= found["retrieval-top5"]["value"] and found["retrieval-class"]["n"] == 205
    code, _, err = vgm("evaluate", tmp_path / "a.npz", *asked, "--protocol", "adm")
    assert code == MISSING_ASSET and "VGM_INCEPTION" in err  # published numbers are Inception's
    code, _, err = vgm("evaluate", tmp_path / "a.npz", *asked, "--metrics", "sfid")
    assert code == USAGE and "colour-features does not have" in err


def test_a_text_model_is_asked_for_captions_of_what_it_was_trained_on(vgm: Run, tmp_path: Path) -> None:
    small = ("model.hidden_size=32", "model.depth=1", "train.steps=1", "train.batch_size=8", "train.preview_n=0")
    code, _, err = vgm("train", "sit", "--recipe", "openmoji", *small, "--out", tmp_path / "run")
    assert code == 0, err
    args = ("--metrics", "retrieval:k=3", "-n", 12, "--steps", 2, "--json")
    code, out, err = vgm("evaluate", tmp_path / "run", *args)
    assert code == 0, err
    found = results(out)
    assert list(found) == ["retrieval-top1", "retrieval-top3", "retrieval-class"]
    one = found["retrieval-top3"]
    assert (one["n"], one["n_reference"], one["paired_by"], one["conditions"]) == (12, 1704, "position", "openmoji")


# -- the metric --------------------------------------------------------------------------------------------------------


def measured(pool: Tensor, items: Items, labels: Any = None) -> Measured:
    return Measured(len(pool), pool=pool, items=items, labels=None if labels is None else np.array(labels))


def test_retrieval_counts_neighbours_by_cosine() -> None:
    pictures = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    labels = [0, 0, 1, 1]
    samples = torch.tensor([[9.0, 0.0], [3.0, 3.1], [0.0, -2.0], [-5.0, 1.0], [0.2, 0.0]])
    asked = Items([0, 1, 2, 3, 2], 4)  # a caption may be drawn twice
    values = Retrieval(k=2)(measured(samples, asked), measured(pictures, Items(range(4), 4), labels), 0)
    found = {v.metric: v.value for v in values}
    # nearest two: 0 2 | 2 1 | 0 or 3 (both at right angles) | 3 1 | 0 2
    assert found["retrieval-top1"] == pytest.approx(2 / 5) and found["retrieval-top2"] == pytest.approx(4 / 5)
    assert values[0].n == 5 and 0 <= found["retrieval-class"] <= 1
    unlabelled = Retrieval(k=2)(measured(samples, asked), measured(pictures, Items(range(4), 4)), 0)
    assert [v.metric for v in unlabelled] == ["retrieval-top1", "retrieval-top2"]


def test_retrieval_is_refused_where_nothing_belongs_together() -> None:
    x = torch.eye(4)
    with pytest.raises(VgmError, match="4 samples and 9 references"):
        Retrieval()(measured(x, Items(range(4), 4)), measured(torch.eye(9), Items(range(9), 9)), 0)
    with pytest.raises(VgmError, match="not statistics"):
        Retrieval()(measured(x, Items(range(4), 4)), Measured(4, pool=x), 0)
    with pytest.raises(VgmError, match="fewer than 5"):
        Retrieval().check(10, 4, (32, 32, 3))


# -- changes of pictures -----------------------------------------------------------------------------------------------


def test_changes_of_pictures_are_functions_of_their_draws() -> None:
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    half = lambda k: torch.full((3, k), 0.5)
    torch.testing.assert_close(augment.move(x, half(augment.MOVE)), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(augment.recolour(x, half(augment.RECOLOUR)), x)
    torch.testing.assert_close(augment.defocus(x, torch.zeros(3, 1)), x)
    flat = torch.full((3, 3, 16, 16), 0.3)
    torch.testing.assert_close(augment.defocus(flat, torch.ones(3, 1)), flat)
    g = torch.Generator().manual_seed(0)
    for change, k in ((augment.move, augment.MOVE), (augment.recolour, augment.RECOLOUR), (augment.hole, augment.HOLE)):
        u = torch.rand(3, k, generator=g)
        y = change(x, u)
        assert y.shape == x.shape and y.abs().max() <= 1 and not torch.equal(y, x)
        torch.testing.assert_close(change(x[1:], u[1:]), y[1:])  # a row is its own


# -- codec -------------------------------------------------------------------------------------------------------------


def psnr(codec: Any, x: Tensor) -> float:
    with torch.no_grad():
        y = codec.decode(codec.latents(codec.encode(x))).clamp(-1, 1)
    return float(-10 * ((y - x).square().mean() / 4).log10())


def test_shipped_codec_carries_pictures_that_it_never_saw() -> None:
    codec = ckpt.read_codec(ckpt.resolve("openmoji-codec"))
    x = open_dataset("openmoji", split="test", quiet=True).pixels(range(0, 205, 2))
    assert codec.latent_shape((3, 32, 32)) == (8, 8, 8) and codec.latent_shape((3, 64, 64)) == (8, 16, 16)
    assert psnr(codec, x) > 20.5
    with torch.no_grad():
        moments = codec.encode(x)
        z = codec.latents(moments, torch.randn(len(x), 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert (z.std(dim=(0, 2, 3)) - 1).abs().max() < 0.25 and z.mean(dim=(0, 2, 3)).abs().max() < 0.25


def test_colour_pictures_start_from_the_shipped_codec() -> None:
    sit = recipes.load("sit", None, ["data.path=shapes"])
    names = sit.config["codec"]["fallback"]
    for size, channels, expected in ((32, 3, "tuned"), (64, 3, "tuned"), (64, 1, "small"), (30, 3, "small")):
        assert build.codec_recipe(names, sit, Facts.of_pixels(size, channels)).name == f"ldm/{expected}-codec"
    assert build.codec_recipe("ldm/small-codec", sit, Facts.of_pixels(32, 3)).name == "ldm/small-codec"


def test_the_shipped_codec_is_tuned_on_own_pictures_and_told(vgm: Run, tmp_path: Path) -> None:
    y, x = np.mgrid[:32, :32]
    for i in range(12):
        Path(tmp_path / "data").mkdir(exist_ok=True)
        waves = np.stack([np.sin((x * (i % 4) + y) / 9 + c) for c in range(3)], -1)
        Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "codec.yaml").write_text("base: ldm/tuned-codec\ntrain: {steps: 3, batch_size: 4, save_every: 3}\n")
    quick = ("codec.fallback=codec.yaml", "train.steps=1", "train.batch_size=4", "train.preview_n=0")
    code, _, err = vgm("train", "sit", f"data.path={tmp_path / 'data'}", *quick, "--out", tmp_path / "run")
    assert code == 0 and "openmoji-codec" in err and "tuned on them first: 3 steps" in err
    own = ckpt.read_codec(ckpt.resolve(tmp_path / "run" / "codec"))
    assert psnr(own, open_dataset(tmp_path / "data", quiet=True).pixels(range(12))) > 20
