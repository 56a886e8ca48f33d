"""LDM's tasks from training to pictures: img2img, holes, super-resolution, maps of labels, boxes, words of captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vgm_plugins.ldm.conditions import Layout

from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import VgmError
from vgm_cli.nets.text import WordEncoder

Vgm = Callable[..., tuple[int, str, str]]
NETWORK = (
    "name: ldm-unet, model_channels: 8, num_res_blocks: 1, channel_mult: [1], attention_resolutions: [1], "
    "num_heads: 2, norm_groups: 4"
)
TRAIN = """
paper: ldm
objective: {name: ldm}
sampler: {name: ldm, steps: 5}
optimizer: {lr: 3.0e-2}
train: {steps: 6, batch_size: 4, precision: fp32, preview_n: 0, ema: []}
"""
CODEC = "codec: {name: autoencoder-kl, weights: mnist-codec}\n"
PLAIN = "use_spatial_transformer: false, context_dim: null"


def train(vgm: Vgm, folder: Path, model: str, more: str) -> Path:
    """A run of a few steps of a very small network."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"{TRAIN}model: {{{NETWORK}, {model}}}\n{more}")
    code, _, err = vgm("train", recipe, "--out", folder / "run", "--overwrite")
    assert code == 0, err
    return folder / "run"


def drawn(vgm: Vgm, run: Path, *words: Any, n: int = 2) -> np.ndarray:
    out = run.parent / "x.npz"
    code, _, err = vgm("sample", run, "-n", n, "--weights", "raw", *words, "--out", out, "--overwrite")
    assert code == 0, err
    return np.load(out)["arr_0"].astype(int)


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the shipped digits' size, a cross."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[12:16], pixels[:, 12:16] = 255, 255
    path = tmp_path_factory.mktemp("digit") / "cross.png"
    for i in range(8):
        Image.fromarray(np.roll(pixels, i, (0, 1))).save(path.with_name(f"{i}.png"))
    Image.fromarray(pixels).save(path)
    return path


def digits(digit: Path) -> str:
    return f"{CODEC}data: {{path: {digit.parent}}}\n"


def test_img2img_and_holes(vgm: Vgm, tmp_path: Path, digit: Path) -> None:
    run = train(vgm, tmp_path, PLAIN, digits(digit))
    near, far = (drawn(vgm, run, "--image", digit, "--strength", s) for s in (0.0, 0.8))
    cross = np.array(Image.open(digit)).astype(int)[None, ..., None]
    assert abs(near - cross).mean() < 30 < abs(far - cross).mean()
    half = drawn(vgm, run, "--image", digit, "--mask", "upper")  # the upper half is made anew
    assert (half[:, 14:] == cross[:, 14:]).all() and (half[:, :14] != cross[:, :14]).any()
    both = drawn(vgm, run, "--image", digit, "--mask", "upper", "--strength", 0.2)
    assert (both[:, 14:] == cross[:, 14:]).all() and (both != half).any()

    png = tmp_path / "x.png"
    code, _, err = vgm("sample", run, "-n", 1, "--image", digit, "--mask", "left", "--out", png)
    assert code == 0, err
    code, _, err = vgm("rerun", png, "--out", tmp_path / "y.png")
    assert code == 0, err
    code, _, err = vgm("sample", run, "-n", 1, "--image", digit, "--out", png, "--overwrite")
    assert code == 0 and "strength 0.75" in err
    for words, told in (
        (("--strength", "0.5"), "--image"),
        (("--mask", "upper"), "--image"),
        (("--image", digit, "--strength", "0.5", "--sampler", "ddim"), "noise alone"),
        (("--image", digit, "--mask", "upper", "--sampler", "ddim"), "whole pictures"),
    ):
        code, _, err = vgm("sample", run, "-n", 1, *words, "--out", tmp_path / "z.png")
        assert code == 2 and told in err, err


def test_pictures_without_classes(vgm: Vgm, tmp_path: Path, digit: Path) -> None:
    args = ("train", "ldm", f"data.path={digit.parent}", "train.steps=1", "train.batch_size=4", "codec.fallback=null")
    code, _, err = vgm(*args, "--out", tmp_path / "run")
    assert code == 2 and "classes" in err and not (tmp_path / "run").exists()
    none = ("conditions.class=null", "model.use_spatial_transformer=false", "model.context_dim=null")
    code, _, err = vgm(*args, *none, "train.preview_n=0", "--out", tmp_path / "run")
    assert code == 0, err


def test_a_network_of_its_own_for_holes(vgm: Vgm, tmp_path: Path, digit: Path) -> None:
    mask = "operator: {name: inpainting, mask: lama}, keyword: concat, picture: concat, invert: true, fill: -1, low: -1"
    more = f"{digits(digit)}conditions: {{mask: {{{mask}, latents: true}}}}"
    run = train(vgm, tmp_path, f"{PLAIN}, concat_channels: 5", more)
    half = drawn(vgm, run, "--image", digit, "--mask", "left")
    cross = np.array(Image.open(digit)).astype(int)[None, ..., None]
    assert (half[:, :, 14:] == cross[:, :, 14:]).all() and (half[:, :, :14] != cross[:, :, :14]).any()


@pytest.mark.parametrize("operator", ["{name: bsr}", "{name: super-resolution, scale: 4}"])
def test_super_resolution(vgm: Vgm, tmp_path: Path, digit: Path, operator: str) -> None:
    """The network is told the small picture: one that is made of a large one, or one that is small already."""
    told = f"conditions: {{small: {{name: hint, operator: {operator}, small: true, keyword: concat, low: -1}}}}"
    run = train(vgm, tmp_path, f"{PLAIN}, concat_channels: 1", digits(digit) + told)
    assert drawn(vgm, run, "--hint", digit).shape == (2, 28, 28, 1)
    small = tmp_path / "small.png"
    Image.open(digit).resize((7, 7)).save(small)
    own = ("conditions.small.operator=null", "conditions.small.size=7")
    assert drawn(vgm, run, "--hint", small, *own).shape == (2, 28, 28, 1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a map of labels beside them and a caption that says their boxes."""
    folder, rng = tmp_path_factory.mktemp("scenes"), np.random.RandomState(0)
    for i in range(8):
        Image.fromarray(rng.randint(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        Image.fromarray(rng.randint(0, 5, (8, 8), np.uint8)).save(folder / f"{i}.semantic.png")
        (folder / f"{i}.txt").write_text(f"apple 0 0 0.5 {0.1 * i + 0.1:.1f}; {i % 3}* 0.5 0.5 0.5 0.5")
    return folder


def test_maps_of_labels(vgm: Vgm, tmp_path: Path, scenes: Path) -> None:
    more = (
        f"data: {{path: {scenes}}}\nconditions: {{semantic: {{classes: 5, stages: 0, out_channels: 2, train: true}}}}"
    )
    run = train(vgm, tmp_path, f"{PLAIN}, concat_channels: 2", more)
    one, other = (drawn(vgm, run, "--hint", scenes / f"{i}.semantic.png", n=1) for i in (0, 1))
    assert one.shape == (1, 8, 8, 3) and (one != other).any()
    assert (run / "checkpoints/step-00000006/semantic.safetensors").is_file()
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "wrong.png")
    code, _, err = vgm("sample", run, "--hint", tmp_path / "wrong.png", "--out", tmp_path / "y.png")
    assert code == 2 and "label 9" in err


def test_boxes(vgm: Vgm, tmp_path: Path, scenes: Path) -> None:
    layout = "num_classes: 3, classes: [apple], objects: 2, vocabulary: 64, width: 8, depth: 1, heads: 2, train: true"
    more = f"data: {{path: {scenes}}}\nconditions: {{layout: {{{layout}, dropout: 0.5}}}}"
    run = train(vgm, tmp_path, "context_dim: 8", more)
    one, other = (drawn(vgm, run, "--prompt", f"apple {x} 0 0.5 0.5; 2 0 0 1 1", n=1) for x in (0, 0.5))
    assert one.shape == (1, 8, 8, 3) and (one != other).any()
    code, _, err = vgm("sample", run, "--prompt", "pear 0 0 1 1", "--out", tmp_path / "y.png")
    assert code == 2 and "pear" in err
    encoder = Layout(num_classes=3, objects=2, vocabulary=64, width=8, depth=1, heads=2)
    assert encoder.encode([""], torch.device("cpu"))["context"].shape == (1, 8, 8)
    for wrong in ("apple 0 0", "0 a b c d", "3 0 0 1 1"):
        with pytest.raises(VgmError):
            encoder.parse([wrong])


def test_the_words_of_captions(vgm: Vgm, tmp_path: Path) -> None:
    """The vocabulary comes from the data and stays with the checkpoint; blocks read words in their context."""
    for i, text in enumerate(["a red apple", "a green apple", "green tree", "red"]):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    words = "text: {name: words, width: 8, length: 4, depth: 1, heads: 2, train: true, dropout: 0.1}"
    run = train(vgm, tmp_path, "context_dim: 8", f"data: {{path: {tmp_path}}}\nconditions: {{{words}}}")
    loaded = ckpt.load(run, "raw")
    assert loaded.header.data["words"] == ["a", "apple", "green", "red", "tree"]
    red, green = (drawn(vgm, run, "--prompt", f"a {c} apple", "--guidance-scale", 2) for c in ("red", "green"))
    assert (red != green).any()
    code, _, err = vgm("sample", run, "--prompt", "a blue apple", "--out", tmp_path / "y.png")
    assert code == 2 and "blue" in err and "5 words" in err
    encoder = WordEncoder(["red", "apple"], width=8, length=3, depth=1, heads=2)
    none, one = (encoder.encode([t], torch.device("cpu"))["context"] for t in ("", "red"))
    assert torch.equal(encoder.null(1, torch.device("cpu"))["context"], none) and not torch.equal(none, one)
    with pytest.raises(VgmError, match="heads"):
        WordEncoder(["red"], width=6, depth=1)


@pytest.mark.parametrize("recipe", ["inpainting256", "superres256", "semantic256", "layout256", "sd1"])
def test_recipes_say_which_files_they_need(recipe: str, vgm: Vgm, scenes: Path) -> None:
    code, _, err = vgm("train", "ldm", "--recipe", recipe, f"data.path={scenes}", "data.size=64")
    assert code == 4 and ("codec.weights" in err or "conditions." in err), err
