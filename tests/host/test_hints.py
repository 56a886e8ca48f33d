"""Pictures as conditions: columns of the data, hints and masks, from training to `--hint`."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vgm_cli.api import Step
from vgm_cli.conditioning import Conditions, Picture, build_parts
from vgm_cli.data import open_dataset
from vgm_cli.errors import VgmError

Vgm = Callable[..., tuple[int, str, str]]
PLUGIN = Path(__file__).with_name("hinted.py")
FACTS = {"image_size": 8, "image_channels": 3, "columns": {"lineart": 1}}
RECIPE = """
paper: dit
model: {name: hinted, hint_channels: %d}
conditions: {%s}
objective: {name: flow-matching}
sampler: {name: euler, steps: 2}
guidance_scale: 2.0
data: {path: %s}
optimizer: {lr: 1.0e-3}
train: {steps: 4, batch_size: 8, precision: fp32, save_every: 2, preview_n: 2, ema: []}
"""
LINEART = "hint: {column: lineart, invert: true, dropout: 0.5, guided: true}"


def picture(grey: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, grey)


def pairs(folder: Path, layout: str) -> tuple[Path, dict[str, Any]]:
    """Four coloured images and the grey line art of each, laid out in one of the ways; (path, how to open it)."""
    folder.mkdir()
    colour = [Image.new("RGB", (8, 8), (10 * i, 200, 0)) for i in range(4)]
    lines = [picture(50 * i) for i in range(4)]

    def put(name: str, image: Image.Image) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)

    if layout == "npz":
        arrays = {"images": np.stack(colour), "lineart": np.stack(lines), "split": np.array(["train"] * 3 + ["test"])}
        np.savez(folder / "x.npz", captions=np.array([f"number {i}" for i in range(4)]), **arrays)
        return folder / "x.npz", {}
    for i in range(4):
        named = {"suffix": (f"{i}.png", f"{i}.lineart.png"), "inside": (f"a/{i}.png", f"lineart/a/{i}.png"),
                 "beside": (f"images/{i}.png", f"lineart/{i}.png"), "table": (f"c/{i}.png", f"d/l{i}.png"),
                 "parent": (f"images/{i}.png", f"lineart/{i}.png")}  # fmt: skip
        image, line = named["suffix" if layout in ("tar", "zip") else layout]
        put(image, colour[i])
        put(line, lines[i])
        (folder / image).with_suffix(".txt").write_text(f"number {i}")
    if layout == "table":
        rows = [
            {"file_name": f"c/{i}.png", "lineart_file_name": f"d/l{i}.png", "text": f"number {i}"} for i in range(4)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = sorted(p for p in folder.rglob("*.*") if p.is_file())
    if layout == "tar":
        with tarfile.open(folder / "x.tar", "w") as tar:
            for file in files:
                tar.add(file, file.name)
        return folder / "x.tar", {}
    if layout == "zip":
        with zipfile.ZipFile(folder / "x.zip", "w") as z:
            for file in files:
                z.write(file, file.relative_to(folder))
        return folder / "x.zip", {}
    return (folder / "images" if layout == "parent" else folder), {}


@pytest.mark.parametrize("layout", ["npz", "suffix", "inside", "beside", "parent", "table", "tar", "zip"])
def test_pictures_beside_images_are_a_column(tmp_path: Path, layout: str) -> None:
    path, how = pairs(tmp_path / "set", layout)
    data = open_dataset(path, columns=["lineart"], quiet=True, **how)
    batch = data.gather(range(4), flip=[False] * 4)
    assert len(data) == 4 and data.channels == 3 and data.facts.columns == {"lineart": 1}
    order = (batch["x"][:, 0, 0, 0] / 10).round().int().tolist()
    assert sorted(order) == [0, 1, 2, 3]
    assert batch["lineart"].shape == (4, 1, 8, 8) and (batch["lineart"][:, 0, 0, 0] // 50).tolist() == order
    assert batch["text"] == [f"number {i}" for i in order]
    assert data.fingerprint() != open_dataset(path, quiet=True, **how).fingerprint()


@pytest.mark.parametrize("kind", ["zip", "tar", "npz"])
def test_packed_columns_and_captions_are_read_again(tmp_path: Path, vgm: Vgm, kind: str) -> None:
    path, _ = pairs(tmp_path / "set", "suffix")
    code, _, err = vgm("data", "pack", path, f"packed.{kind}", "--column", "lineart")
    assert code == 0, err
    before, after = (
        open_dataset(p, columns=["lineart"], quiet=True).gather(range(4)) for p in (path, f"packed.{kind}")
    )
    assert torch.equal(before["x"], after["x"]) and torch.equal(before["lineart"], after["lineart"])
    assert before["text"] == after["text"] and len(open_dataset(f"packed.{kind}", quiet=True)) == 4


def test_an_array_of_splits_divides_an_npz(tmp_path: Path) -> None:
    path, _ = pairs(tmp_path / "set", "npz")
    assert len(open_dataset(path, split="train")) == 3 and len(open_dataset(path, split="test")) == 1


def test_images_without_a_picture_are_left_out(tmp_path: Path, vgm: Vgm) -> None:
    path, _ = pairs(tmp_path / "set", "suffix")
    (path / "2.lineart.png").unlink()
    data = open_dataset(path, columns=["lineart"], quiet=True)
    assert len(data) == 3 and any("without 'lineart'" in r for r in data.facts.remarks)
    with pytest.raises(VgmError, match="has no 'depth' beside its images") as e:
        open_dataset(path, columns=["depth"], quiet=True)
    assert e.value.code == 2


def test_pictures_are_cropped_and_mirrored_with_their_image(tmp_path: Path) -> None:
    ramp = np.arange(16 * 12, dtype=np.uint8).reshape(12, 16)
    for i in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
        Image.fromarray(ramp).save(tmp_path / f"{i}.mask.png")
    for crop, seeds in (("adm", None), ("random", [1, 2, 3])):
        batch = open_dataset(tmp_path, size=8, crop=crop, columns=["mask"], quiet=True).gather(
            range(3), flip=[True, False, True], seeds=seeds
        )
        assert torch.equal(batch["x"], batch["mask"])


def test_the_shipped_emojis(vgm: Vgm) -> None:
    data = open_dataset("openmoji", split="train", columns=["lineart"])
    assert len(data) == 1704 and data.facts.num_classes == 8 and data.facts.captions and data.size == 32
    assert len(open_dataset("openmoji", split="test")) == 205 and len(open_dataset("openmoji")) == 1909
    code, out, err = vgm("data", "info", "openmoji", "--json")
    assert code == 0, err
    assert json.loads(out)["columns"] == ["lineart"] and json.loads(out)["class_names"][2] == "food-drink"


# -- the components ----------------------------------------------------------------------------------------------------


def made(**node: Any) -> Conditions:
    return Conditions(build_parts({"hint": node}, FACTS))


def test_a_hint_of_a_column() -> None:
    conditions = made(column="lineart", invert=True, dropout=0.5)
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).repeat(16, 1, 1, 1)
    cond = conditions.apply({"lineart": x}, Step(0))["cond"]["hint"]
    kept = cond.flatten(1).any(1)
    assert 0 < kept.sum() < 16 and torch.allclose(cond[kept], (1 - x[kept]) / 2)
    with pytest.raises(VgmError, match=r"hint is of 1×8×8, got one of 1×4×4") as e:
        conditions.apply({"lineart": x[..., :4, :4]}, Step(0))
    assert e.value.code == 2


def test_guidance_keeps_pictures_unless_they_say_so() -> None:
    for guided, there in ((None, set()), (False, set()), (True, {"hint"})):
        conditions = made(column="lineart", dropout=0.5, **({} if guided is None else {"guided": guided}))
        assert set(conditions.null(torch.device("cpu"))) == there
        assert set(conditions.null(torch.device("cpu"), guided=False)) == {"hint"}
        batch = conditions.apply({"lineart": torch.ones(16, 1, 8, 8)}, Step(0))
        assert set(batch["null"]) == there and not batch["cond"]["hint"].all(), "dropped all the same"


def test_a_hint_that_an_operator_makes() -> None:
    """What is drawn depends on the row and the step alone, wherever it is computed."""
    conditions = made(name="hint", operator={"name": "inpainting", "mask": "random"}, low=-1)
    x = torch.ones(4, 3, 8, 8)
    whole = conditions.apply({"image": x}, Step(5))["cond"]["hint"]
    halves = [conditions.apply({"image": x[:2]}, Step(5, rank=r, world=2))["cond"]["hint"] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), whole) and len({tuple(row.flatten().tolist()) for row in whole}) == 4
    assert not torch.equal(whole, conditions.apply({"image": x}, Step(6))["cond"]["hint"])
    small = made(operator={"name": "super-resolution", "scale": 2}, low=-1)
    assert (
        small.apply({"image": x}, Step(0))["cond"]["hint"].shape
        == small.example(4, torch.device("cpu"))["cond"]["hint"].shape
    )


def test_masks_hide_a_part_of_the_image() -> None:
    x, bright = torch.ones(2, 3, 8, 8), torch.full((2, 1, 8, 8), -1.0)
    bright[:, :, :3] = 1
    nodes = {"mask": {"invert": True}}
    cond = Conditions(build_parts(nodes, FACTS)).apply({"image": x, "mask": bright}, Step(0))["cond"]
    assert cond["mask"][:, 0, :, 0].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 2
    assert torch.equal(cond["masked"], x * (1 - cond["mask"]))
    drawn = Conditions(build_parts({"mask": {"operator": {"name": "inpainting", "mask": "random"}}}, FACTS))
    cond = drawn.apply({"image": x}, Step(0))["cond"]
    assert torch.equal(cond["masked"], x * cond["mask"]) and not torch.equal(cond["mask"][0], cond["mask"][1])
    assert drawn.null(torch.device("cpu"), guided=False)["mask"].abs().sum() == 0
    with pytest.raises(VgmError, match="hides no pixels"):
        Conditions(build_parts({"mask": {"operator": {"name": "jpeg"}}}, FACTS)).apply({"image": x}, Step(0))


def test_a_frozen_encoder_sees_each_picture_once() -> None:
    class Encoder(torch.nn.Module):
        column, choices, reads, draws, seen = "hint", (), ("hint",), False, 0

        def items_of(self, columns: dict[str, torch.Tensor], drawn: Any) -> torch.Tensor:
            return columns["hint"]

        def encode(self, items: list[Picture], device: torch.device) -> dict[str, torch.Tensor]:
            self.seen += len(items)
            return {"code": torch.stack([i.pixels.mean((1, 2)) for i in items])}

        def null(self, n: int, device: torch.device) -> dict[str, torch.Tensor]:
            return {}

    from vgm_cli.conditioning import Part

    encoder, x = Encoder(), torch.rand(4, 3, 8, 8)
    conditions = Conditions([Part("hint", encoder, "hint")])
    for rows in (x, x[[1, 1, 2]], x.flip(0)):
        code = conditions.apply({"hint": rows}, Step(0))["cond"]["code"]
        assert torch.allclose(code, rows.mean((2, 3)))
    assert encoder.seen == 4


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def write(conditions: str = LINEART, channels: int = 1, data: str = "openmoji") -> Path:
        path = tmp_path / "hinted.yaml"
        path.write_text(RECIPE % (channels, conditions, data))
        return path

    return write


def test_line_art_from_training_to_pictures(vgm: Vgm, tmp_path: Path, recipe: Any) -> None:
    """A run resumes bit for bit; a picture depends on its hint and number alone; one of a stranger's size is cut."""
    file, own = recipe(), ("--plugin", PLUGIN)
    for out, more in (("whole", ()), ("parts", ("--stop-after", 2)), ("parts", ("--resume",))):
        code, _, err = vgm(*own, "train", file, "--out", out, *more)
        assert code == 0, err
    states = [load_file(tmp_path / r / "checkpoints/step-00000004/model.safetensors") for r in ("whole", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    lines = tmp_path / "lines"
    lines.mkdir()
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32), np.uint8)).save(lines / f"{i}.png")

    def drawn(*words: Any) -> np.ndarray:
        code, _, err = vgm(*own, "sample", "whole", "-n", 4, *words, "--out", "x.npz", "--overwrite")
        assert code == 0, err
        return np.load("x.npz")["arr_0"].astype(int)

    images = drawn("--hint", lines)
    assert abs(images - drawn("--hint", lines, "--batch-size", 3)).max() <= 1
    assert abs(images[::2] - drawn("--hint", lines / "0.png")[::2]).max() <= 1
    assert abs(images[1] - drawn("--hint", lines / "0.png")[1]).max() > 1, "the hint is followed"
    for words in (("--hint", lines / "0.png", "--out", "y.png"), ("--hint", "hint=lines", "--out", "z.png")):
        code, _, err = vgm(*own, "sample", "whole", "-n", 2, *words)
        assert code == 0, err
    code, _, err = vgm(*own, "sample", "whole", "--hint", "hnit=lines", "--out", "w.png")
    assert code == 2 and "unknown picture 'hnit'" in err and "hint" in err
    code, _, err = vgm(*own, "rerun", "y.png", "--out", "again.png")
    assert code == 0, err
    code, out, err = vgm(*own, "evaluate", "whole", "-n", 6, "--metrics", "straightness:steps=2", "--json")
    assert code == 0 and json.loads(out)[0]["conditions"] == "openmoji", err
    small = ("train.steps=2", "train.batch_size=8", "train.preview_n=0", "train.save_every=2", "train.precision=fp32")
    pairs = ("pairs.count=8", "pairs.steps=2", "--out", "student")
    code, _, err = vgm(*own, "distill", "rectified-flow", "--teacher", "whole", *small, *pairs)
    assert code == 0, err
    code, _, err = vgm(*own, "sample", "student", "-n", 2, "--hint", lines, "--out", "s.png")
    assert code == 0, err
    code, _, err = vgm(*own, "finetune-rl", "flow-grpo", "--model", "whole", "--reward", "brightness", *small)
    assert code == 2 and "told pictures" in err
    picture(9, (50, 40)).save("odd.png")
    code, _, err = vgm(*own, "sample", "whole", "-n", 1, "--hint", "odd.png", "--out", "o.png")
    assert code == 0 and "50×40" in err
    for words, said in (((), "follows a picture"), (("--hint", "nowhere.png"), "nowhere.png"),
                        (("--hint", file), "cannot be read"), (("--prompt", "a cat"), "takes no --prompt")):  # fmt: skip
        code, _, err = vgm(*own, "sample", "whole", *words, "--out", "w.png")
        assert code in (1, 2) and said in err and len(err.strip().splitlines()) <= 3, err


def test_what_does_not_fit_is_said_before_the_first_step(vgm: Vgm, tmp_path: Path, recipe: Any) -> None:
    code, _, err = vgm("--plugin", PLUGIN, "train", recipe(data="mnist5k"), "--out", "run")
    assert code == 2 and "has no 'lineart' beside its images" in err and not (tmp_path / "run").exists()
    code, _, err = vgm("--plugin", PLUGIN, "validate", recipe("hint: {operator: {name: unknown}}"))
    assert code == 2 and "unknown" in err


def test_masks_and_hints_behind_a_codec(vgm: Vgm, tmp_path: Path, tiny_dataset: Path, recipe: Any) -> None:
    """The images that masks are cut from are kept beside cached latents; a transparent picture is an item."""
    conditions = "mask: {latents: true, operator: {name: inpainting, mask: box}}"
    text = recipe(conditions, 2, str(tiny_dataset)).read_text()
    (tmp_path / "hinted.yaml").write_text(text + "codec: {name: autoencoder-kl, weights: mnist-codec}\n")
    own = ("--plugin", PLUGIN)
    header = json.loads(vgm("inspect", "mnist-codec", "--json")[1])
    channels = header["component"]["kwargs"].get("z_channels") or header["component"]["kwargs"].get("embed_dim")
    for cache in ("auto", "cache", "cache", "false"):
        code, _, err = vgm(
            *own, "train", "hinted.yaml", f"model.hint_channels={channels + 1}", f"data.cache_latents={cache}",
            "train.steps=2", "guidance_scale=1", "--out", f"run-{cache}", "--overwrite",
        )  # fmt: skip
        assert code == 0, err
    states = [load_file(f"run-{c}/checkpoints/step-00000002/model.safetensors") for c in ("auto", "cache", "false")]
    assert all(torch.allclose(states[0][k], s[k], atol=1e-5) for s in states[1:] for k in s)
    known = Image.new("RGBA", (28, 28), (255, 255, 255, 0))
    known.paste((0, 0, 0, 255), (0, 0, 28, 14))
    known.save("known.png")
    code, _, err = vgm(*own, "sample", "run-auto", "-n", 2, "--hint", "known.png", "--out", "x.png")
    assert code == 0, err
    picture(9, (28, 28)).save("opaque.png")
    code, _, err = vgm(*own, "sample", "run-auto", "-n", 2, "--hint", "opaque.png", "--out", "y.png")
    assert code == 2 and "no transparent part" in err


@pytest.mark.slow
def test_two_processes_follow_the_same_hints(process: Any, tmp_path: Path, recipe: Any) -> None:
    file = recipe(conditions=f"{LINEART}, mask: {{operator: {{name: inpainting, mask: random}}}}", channels=5)
    images = []
    for n in (1, 2):
        own = ("--plugin", PLUGIN, "--nproc", n)
        code, _, err = process("train", file, *own, "--out", f"run-{n}").wait()
        assert code == 0, err
    states = [load_file(tmp_path / f"run-{n}/checkpoints/step-00000004/model.safetensors") for n in (1, 2)]
    assert all(torch.allclose(states[0][k], states[1][k], atol=1e-5) for k in states[0])
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save("hint.png")
    for n in (1, 2):
        hints = ("--hint", "hint=hint.png", "--hint", "mask=hint.png", "--batch-size", 2)
        code, _, err = process(
            "--plugin", PLUGIN, "sample", "run-1", "-n", 4, *hints, "--nproc", n, "--out", f"{n}.npz"
        ).wait()
        assert code == 0, err
        images.append(np.load(f"{n}.npz")["arr_0"].astype(int))
    assert abs(images[0] - images[1]).max() <= 1
