"""Conditions: labels and texts on their way from the data and the command line to the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from vgm_cli import recipe as recipes
from vgm_cli import renamed
from vgm_cli.api import Step
from vgm_cli.conditioning import ClassLabel, Conditions, Part, build_parts, lines_of, unconditional
from vgm_cli.data.arrays import COLOURS, SHAPES
from vgm_cli.errors import VgmError
from vgm_cli.nets.text import WordEncoder
from vgm_cli.overrides import parse_yaml
from vgm_cli.registry import registry

OWN = """
model: {name: sit, patch_size: 4, hidden_size: 8, depth: 1, num_heads: 1}
conditions: {class: {}}
objective: {name: flow-matching}
sampler: {name: euler, steps: 1}
train: {batch_size: 2, preview_n: 0, save_every: 0}
"""
WORDS = ["a", *COLOURS, *SHAPES]
Vgm = Callable[..., tuple[int, str, str]]


def silhouettes(side: int = 16) -> dict[str, np.ndarray]:
    x, y = np.arange(side) + 0.5 - side / 2, (np.arange(side)[:, None] + 0.5) / 2
    circle = np.hypot(x, x[:, None]) <= side / 2
    return {"circle": circle, "square": np.ones_like(circle), "triangle": abs(x) <= y}


def judged(image: np.ndarray) -> str:
    """What a picture (H, W, 3) of a coloured shape on white shows: by its median colour, and by the silhouette that its
    own, stretched to a square, has most in common with."""
    distance = np.abs(image.astype(float) - 255).max(-1)
    inside = distance > 0.5 * distance.max()
    colour = np.median(image[inside], 0)
    name = min(COLOURS, key=lambda c: float(np.square(colour - COLOURS[c]).sum()))
    rows, columns = (inside.any(axis).nonzero()[0] for axis in (1, 0))
    box = torch.tensor(inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], dtype=torch.float)
    own = F.interpolate(box[None, None], (16, 16), mode="bilinear", align_corners=False)[0, 0].numpy() > 0.5
    shape = max((forms := silhouettes()), key=lambda k: (own & forms[k]).sum() / (own | forms[k]).sum())
    return f"a {name} {shape}"


def test_the_judge_knows_the_shipped_shapes() -> None:
    from vgm_cli.data import open_dataset

    data = open_dataset("shapes", split="test", quiet=True)
    images = data.images(range(len(data))).permute(0, 2, 3, 1).numpy()
    right = [judged(image) == data.caption(i) for i, image in enumerate(images)]
    assert np.mean(right) > 0.99


class Null(nn.Module):
    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "y": torch.full_like(cond["y"], 9)}


def test_rows_are_dropped_once_wherever_they_are_computed() -> None:
    conditions = Conditions([Part("class", ClassLabel(9), "label", dropout=0.5)], Null())
    batch = {"label": torch.arange(8)}
    whole = conditions.apply(batch, Step(3))["cond"]["y"]
    assert 0 < (whole == 9).sum() < 8 and torch.equal(whole[whole != 9], torch.arange(8)[whole != 9])
    halves = [conditions.apply({"label": torch.arange(8)[4 * r : 4 * r + 4]}, Step(3, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(torch.cat([h["cond"]["y"] for h in halves]), whole)
    assert not torch.equal(conditions.apply(batch, Step(4))["cond"]["y"], whole)


def test_a_condition_without_its_column_is_told() -> None:
    with pytest.raises(VgmError, match=r"conditions\.text reads 'text'") as e:
        Conditions([Part("text", WordEncoder(WORDS), "text")]).apply({"label": torch.arange(2)}, Step(0))
    assert e.value.code == 2


def test_captions_are_offered_in_place_of_classes() -> None:
    """A network with a place for a class is refused pictures without any, and the way out is one that works."""
    with pytest.raises(VgmError, match="of classes") as refused:
        build_parts({"class": {"name": "class-token", "width": 8}}, {"captions": True, "words": WORDS})
    assert "conditions.class=null" in refused.value.hint
    node = parse_yaml(refused.value.hint.split("conditions.text=")[1].rstrip("'"), "")
    part = build_parts({"class": None, "text": node}, {"captions": True, "words": WORDS})[0]
    assert part.trained and part.condition.encode(["a red circle"], torch.device("cpu"))["context"].shape == (1, 8, 8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_prompts_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    """Byte order marks and line ends are no part of a prompt, blank lines are none."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("un café\r\n\r\n  a pear \r\n".encode(encoding))
    assert lines_of(file, "--prompts") == ["un café", "a pear"]


def test_the_bare_paper_takes_the_recipe_that_reads_captions(vgm: Vgm, tmp_path: Path) -> None:
    """Of pictures with captions and without classes; not where there are classes or the user names conditions."""
    for name in ("told", "sorted/pear", "sorted/plum"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32)).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text("a pear")

    def conditions(*words: str) -> tuple[set[str], str]:
        code, out, err = vgm("train", *words, "--print-config")
        assert code == 0, err
        return {line.split(".")[1] for line in out.splitlines() if line.startswith("conditions.")}, err

    found, err = conditions("ldm", f"data.path={tmp_path / 'told'}")
    assert found == {"text"} and "has captions: recipe ldm/openmoji" in err and "--recipe mnist" in err
    for words in (
        ("ldm", f"data.path={tmp_path / 'sorted'}"),
        ("ldm", f"data.path={tmp_path / 'told'}", "conditions.class.dropout=0"),
        ("ldm", "data.path=openmoji"),
        ("ldm", "--recipe", "mnist", f"data.path={tmp_path / 'told'}"),
        ("dit", f"data.path={tmp_path / 'told'}"),
    ):
        found, err = conditions(*words)
        assert found == {"class"} and "has captions" not in err, (words, err)


def test_what_becomes_of_somebodys_captions_is_told(vgm: Vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a network does not read them, was given other words, or misses them; where a class is wanted, the way."""
    monkeypatch.chdir(tmp_path)
    for name in ("pear", "plum"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    (tmp_path / "own.yaml").write_text(OWN)
    words = (tmp_path / "own.yaml", f"data.path={tmp_path}", "train.steps=1")
    code, _, err = vgm("train", *words, "--out", tmp_path / "a")
    assert code == 0 and "captions of the data are not read: `vgm train" in err, err
    text = "{text: {name: words, train: true, width: 8, words: [red]}}"
    code, _, err = vgm("train", *words, "model.context_dim=8", f"conditions={text}", "--out", tmp_path / "b")
    assert code == 0 and "3 of the 3 words of the captions are none of the 1 that conditions.text knows" in err, err
    text = text.replace(", words: [red]", "")
    code, _, err = vgm("train", *words, "model.context_dim=8", f"conditions={text}", "--out", tmp_path / "c")
    assert code == 0 and "captions" not in err, err
    code, _, err = vgm("train", words[0], "data.path=mnist5k", "model.context_dim=8", f"conditions={text}")
    assert code == 2 and "reads 'text', which the data does not have" in err and not Path("runs").exists(), err
    code, _, err = vgm("train", *words, "conditions={class: {name: class-token, width: 8, train: true}}")
    assert code == 2 and "told its captions: conditions.class=null 'conditions.text={name: words" in err, err


def test_no_condition_beside_one() -> None:
    cond = {"y": torch.tensor([1, 2]), "context": torch.ones(2, 3, 4)}
    null = unconditional(Null(), cond, {"context": torch.zeros(1, 3, 4)})
    assert null["y"].tolist() == [9, 9] and null["context"].shape == (2, 3, 4) and not null["context"].any()
    with pytest.raises(VgmError, match="no null class"):
        unconditional(nn.Identity(), cond)


def test_words_are_read_by_the_word() -> None:
    encoder = WordEncoder(WORDS, width=4, length=3)
    context = encoder.encode(["a red circle", "A RED", "a mauve thing here"], torch.device("cpu"))["context"]
    assert torch.equal(context[0, :2], context[1, :2]) and not context[1, 2].any()
    assert torch.isfinite(context[2]).all(), "captions may have other words"
    both = WordEncoder(WORDS, width=4, length=3, vector=True).encode(["a red circle", ""], torch.device("cpu"))
    assert torch.equal(both["vector"], both["context"].sum(1)) and both["vector"].shape == (2, 4)
    for wrong, told in (("a mauve circle", "mauve"), ("a red red circle", "4 words")):
        with pytest.raises(VgmError, match=told):
            encoder.parse([wrong])


def test_an_encoder_is_trained_or_read_from_a_file(vgm: Vgm) -> None:
    code, _, err = vgm("validate", "sit/text", "conditions.text.train=false")
    assert code == 2 and "nothing trains" in err
    code, _, err = vgm("validate", "sit/text", "conditions.text.weights=nowhere")
    assert code == 2 and "nowhere" in err


def test_a_header_names_no_file_of_another_folder(tmp_path: Path) -> None:
    from vgm_cli.engine import checkpoint as ckpt

    component = {
        "kind": "model",
        "name": "sit",
        "kwargs": {"hidden_size": 8, "depth": 1, "num_heads": 2, "input_size": 4},
    }
    header = ckpt.Header(component=component, conditions={"../text": {"name": "words", "words": ["a"], "train": True}})
    with torch.device("meta"):
        network = registry().build("model", {"name": "sit", **component["kwargs"]})
    state = {k: torch.zeros(v.shape) for k, v in network.state_dict().items()}
    ckpt.save_network(tmp_path / "x.safetensors", state, header)
    with pytest.raises(VgmError, match="no name of a condition"):
        ckpt.load(tmp_path / "x.safetensors")


OLD = {
    "dropout of labels": (
        {"objective": {"name": "iddpm", "label_dropout": 0.3}},
        {"objective": {"name": "iddpm"}, "conditions": {"class": {"dropout": 0.3}}},
    ),
    "its default": (
        {"objective": {"name": "flow-matching"}},
        {"objective": {"name": "flow-matching"}, "conditions": {"class": {"dropout": 0.1}}},
    ),
    "none": ({"objective": {"name": "vae"}}, {"objective": {"name": "vae"}, "conditions": {"class": {"dropout": 0.0}}}),
    "an own keyword": (
        {"objective": {"name": "mine", "label_dropout": 0.3}},
        {"objective": {"name": "mine", "label_dropout": 0.3}, "conditions": {"class": {"dropout": 0.0}}},
    ),
    "a text encoder": (
        {
            "objective": {"name": "llamagen", "label_dropout": 0.2},
            "roles": {"text": {"kind": "model", "name": "flan-t5", "path": "T5"}},
        },
        {"objective": {"name": "llamagen"}, "conditions": {"text": {"name": "flan-t5", "path": "T5", "dropout": 0.2}}},
    ),
    "said anew": (
        {"objective": {"name": "iddpm"}, "conditions": {"text": {"name": "words"}}},
        {"objective": {"name": "iddpm"}, "conditions": {"text": {"name": "words"}}},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_recipes_of_earlier_versions(name: str) -> None:
    then, now = OLD[name]
    renamed.conditions(then)
    assert then == now
    renamed.conditions(then)
    assert then == now, "nothing is left to rename"


def test_the_command_line_may_say_it_as_before() -> None:
    new = recipes.load("dit/mnist", None, ["objective.label_dropout=0.25"])
    assert new.config["conditions"] == {"class": {"dropout": 0.25}} and "label_dropout" not in new.config["objective"]
    assert (
        recipes.load("dit/mnist", None, ["conditions.class.dropout=0.5"]).config["conditions"]["class"]["dropout"]
        == 0.5
    )


TINY = ("model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.context_dim=8", "conditions.text.width=8",
        "train.steps=2", "train.batch_size=8", "train.preview_n=2", "train.precision=fp32")  # fmt: skip


def test_texts_from_training_to_pictures(vgm: Vgm, tmp_run: Path) -> None:
    """The encoder is trained, kept beside the network, found again; a picture depends on its prompt and number alone."""
    run = tmp_run / "text"
    code, _, err = vgm("train", "sit", "--recipe", "text", *TINY, "--out", run)
    assert code == 0 and f"next: vgm sample {run} --prompt 'a " in err, err
    step = run / "checkpoints/step-00000002"
    assert (step / "text.safetensors").is_file()

    def drawn(*words: Any) -> np.ndarray:
        out = tmp_run / "x.npz"
        code, _, err = vgm("sample", run, "-n", 5, "--steps", 2, *words, "--out", out, "--overwrite")
        assert code == 0, err
        return np.load(out)["arr_0"].astype(int)

    two = ("--prompt", "a red circle", "--prompt", "a blue square", "--guidance-scale", 3)
    images = drawn(*two, "--batch-size", 64)
    assert abs(images - drawn(*two, "--batch-size", 2)).max() <= 1
    assert abs(images[::2] - drawn("--prompt", "a red circle", "--guidance-scale", 3)[::2]).max() <= 1
    code, _, err = vgm("sample", run, "--prompt", "a purple circle", "--out", tmp_run / "y.png")
    assert code == 2 and "purple" in err and "triangle" in err
    code, _, err = vgm(
        "sample", run, "-n", 2, "--steps", 2, *two[:4], "--negative", "a triangle", "--out", tmp_run / "y.png"
    )
    assert code == 0, err
    code, _, err = vgm("rerun", tmp_run / "y.png", "--out", tmp_run / "z.png")
    assert code == 0, err
    (step / "text.safetensors").unlink()
    code, _, err = vgm("sample", run, *two, "--out", tmp_run / "w.png")
    assert code == 4 and "text.safetensors" in err


@pytest.mark.slow
def test_the_text_recipe_obeys_its_prompts(vgm: Vgm, tmp_run: Path) -> None:
    """At least 90 % of the colours that prompts ask for, and 75 % of the forms (by chance: 25 and 33 %)."""
    run, out, asked = tmp_run / "text", tmp_run / "x.npz", [f"a {c} {s}" for c in COLOURS for s in SHAPES]
    code, _, err = vgm("train", "sit", "--recipe", "text", "--out", run)
    assert code == 0, err
    words = [w for prompt in asked for w in ("--prompt", prompt)]
    code, _, err = vgm("sample", run, "-n", 240, *words, "--out", out)
    assert code == 0, err
    shown = [judged(image).split() for image in np.load(out)["arr_0"]]
    wanted = [asked[i % len(asked)].split() for i in range(240)]
    colours = np.mean([a[1] == b[1] for a, b in zip(shown, wanted)])
    forms = np.mean([a[2] == b[2] for a, b in zip(shown, wanted)])
    print(f"colours {colours:.3f}, forms {forms:.3f}")
    assert colours >= 0.9 and forms >= 0.75
