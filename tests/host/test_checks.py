"""What is wrong is told before the first step, before a file is written, by every verb alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from vgm_cli import recipe as recipes
from vgm_cli import settings
from vgm_cli.errors import VgmError
from vgm_cli.ranges import Count, Fraction, Positive, Unbounded, explain, fit
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.validation import check

WRONG = ("-1", "0", "1" + "0" * 30, ".nan", ".inf", "", "[1, a]", "{1: 2}", "true", "wordy")


def refused(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    got, _, err = result
    assert got == code, err
    assert "may be a bug" not in err and "Traceback" not in err, err
    for word in words:
        assert word in err, err


# -- every key, every kind of wrong value ------------------------------------------------------------------------------


def told(recipe: Path, assignment: str) -> None:
    """It validates or is refused in a sentence; any other exception fails the test that calls this."""
    try:
        check(recipes.load(str(recipe), None, [assignment]))
    except VgmError as e:
        assert e.code in (2, 4) and e.message, assignment


@pytest.mark.parametrize("node", recipes.NODES)
def test_no_value_of_a_host_key_surprises(tiny: Path, node: str) -> None:
    for key in settings.keys_of(recipes.NODES[node]):
        for value in WRONG:
            told(tiny, f"{node}.{key}={value}")


@pytest.mark.parametrize("kind", ["model", "objective", "sampler"])
def test_no_value_of_a_component_key_surprises(tiny: Path, kind: str) -> None:
    name = recipes.load(str(tiny)).config[kind]["name"]
    for key in signature(load_target(registry().find(kind, name).target)).parameters:
        if kind == "model" or key != "model":
            for value in WRONG:
                told(tiny, f"{kind}.{key}={value}")


@pytest.mark.parametrize("key", [k for k in recipes.TOP if k != "base"])
def test_no_value_of_a_node_surprises(tiny: Path, key: str) -> None:
    for value in WRONG:
        told(tiny, f"{key}={value}")


def test_a_long_word_is_told(vgm, tiny: Path) -> None:
    refused(vgm("validate", tiny, "data.path=" + "x" * 5000), "too long")
    refused(vgm("validate", "x" * 5000 + ".yaml"), "too long")


def constructors() -> list[tuple[str, str]]:
    return [(k, n) for k, n in sorted(registry().components) if k in ("model", "codec", "objective", "sampler")]


@pytest.mark.parametrize(("kind", "name"), constructors(), ids=lambda v: v)
def test_numbers_of_components_have_ranges(kind: str, name: str) -> None:
    """Shares, rates, counts and sizes of every registered component refuse what they cannot be."""
    for key, p in signature(load_target(registry().find(kind, name).target)).parameters.items():
        if "dropout" in key and key not in ("token_dropout_", "dropout_below"):
            with pytest.raises(VgmError, match=key):
                fit(5.0, p.annotation, key)
        if key in ("steps", "num_heads", "depth", "in_channels", "hidden_size", "ch", "model_channels"):
            with pytest.raises(VgmError, match=key):
                fit(0, p.annotation, key)
            with pytest.raises(VgmError, match=key):
                fit(10**30, p.annotation, key)


EVERYWHERE = ("train.steps=-1", "guidance_scale=abc", "sampler.steps=0", "optimizers.nobody.lr=1", "model.weights=nope")


# -- the same sentences from train, validate, --plan -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("train.steps=-1", "train.steps=-1"),
        ("train.steps=0", "train.steps=0"),
        ("train.steps=1" + "0" * 30, "train.steps"),
        ("train.batch_size=0", "train.batch_size=0"),
        ("train.batch_size=1000000000000", "train.batch_size"),
        ("train.ema=[2]", "train.ema=[2]"),
        ("train.ema=[0.9, 0.9]", "twice"),
        ("train.ema=[{half_life: 10, decay: 0.9}]", "half_life"),
        ("train.keep=-2", "train.keep=-2"),
        ("train.preview_n=-3", "train.preview_n=-3"),
        ("train.accumulate=3", "train.batch_size=16"),
        ("optimizer.lr=-1", "optimizer.lr=-1"),
        ("optimizer.lr=.nan", "optimizer.lr=nan"),
        ("optimizer.warmup=-1", "optimizer.warmup=-1"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas"),
        ("optimizers.nobody.lr=1", "nobody"),
        ("guidance_scale=abc", "guidance_scale='abc'"),
        ("guidance_scale=-1", "guidance_scale=-1"),
        ("sampler.steps=0", "steps=0"),
        ("conditions.class.dropout=5", "conditions.class.dropout=5"),
        ("objective.label_dropout=5", "conditions.class.dropout=5"),
        ("conditions.class.dropout=.nan", "conditions.class.dropout=nan"),
        ("model.depth=1000000", "depth=1000000"),
        ("model.depth=true", "depth=True"),
        ("roles={1: 2}", "roles"),
        ("codec=nope", "no such run or checkpoint: nope"),
        ("model.weights=nope", "no such run or checkpoint: nope"),
        ("train.device=cuda", "--device cuda:0"),
    ],
)
def test_one_check_for_every_verb(vgm, tiny: Path, tmp_path: Path, assignment: str, word: str) -> None:
    if assignment.startswith("codec"):
        word = "takes no codec"
    verbs = (("validate",), ("train",), ("train", "--plan")) if assignment in EVERYWHERE else (("train",),)
    for verb in verbs:
        refused(vgm(*verb[:1], tiny, assignment, *verb[1:]), word)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "assignments",
    [
        ("data.path=/nope",),
        ("data.path=empty",),
        ("data=empty",),
        ("data.path=flat", "data.labels=true"),
        ("data.size=30",),
        ("data.path=",),
        ("data.path=null",),
        ("model.num_heads=3",),
        ("train.batch_size=15", "train.accumulate=2"),
    ],
    ids=" ".join,
)
def test_a_failed_start_leaves_nothing(vgm, tiny: Path, tmp_path: Path, assignments: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("L", (28, 28), 20 * i).save(tmp_path / "flat" / f"{i}.png")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = vgm("train", tiny, *assignments)
    assert code in (1, 2) and "may be a bug" not in err, err
    assert code == 2 or "empty" in " ".join(assignments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("side", [30, 27, 25, 18])
@pytest.mark.parametrize("name", ["adm-unet", "rectified-flow"])
def test_sides_that_a_network_cannot_halve(vgm, tmp_path: Path, name: str, side: int) -> None:
    for more in ((), ("--plan",)):
        refused(vgm("train", name, "data.path=shapes", f"data.size={side}", *more), f"{side}", "halved", "data.size")
    assert not (tmp_path / "runs").exists()


# -- data are named ----------------------------------------------------------------------------------------------------


def full_scale() -> list[str]:
    return [n for n, f in recipes.shipped().items() if not (recipes.load_file(f, n)[0].get("data") or {}).get("path")]


@pytest.mark.parametrize("name", [n for n in full_scale() if not n.startswith(("dmd/", "flow-grpo/"))])
def test_no_recipe_falls_back_on_other_data(vgm, name: str, tmp_path: Path) -> None:
    from vgm_cli.engine.train import data_feed

    with pytest.raises(VgmError, match="names no data") as e:
        data_feed.open_images(recipes.load(name))
    assert e.value.code == 2 and "data.path=FOLDER" in e.value.hint


def test_full_scale_recipes_refuse_to_train_without_data(vgm, tmp_path: Path) -> None:
    small = ("train.steps=1", "train.batch_size=2")
    refused(vgm("train", "rectified-flow", "--recipe", "cifar10", *small), "names no data", "mnist5k")
    refused(vgm("train", "dit", "--recipe", "imagenet256", *small), "names no data")
    assert not (tmp_path / "runs").exists()


def test_an_unset_variable_is_no_data(vgm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(vgm("train", tiny, "data.path="), "data.path= is empty", "data.path=mnist5k")
    monkeypatch.setenv("VGM_DATA__PATH", "")
    refused(vgm("train", tiny), "data.path= is empty")


# -- words for nodes ---------------------------------------------------------------------------------------------------


def test_a_node_may_be_one_word(tiny: Path) -> None:
    def config(*assignments: str) -> dict:
        return recipes.load(str(tiny), None, assignments).config

    assert config("sampler=ddim")["sampler"] == {"name": "ddim"}
    assert config("objective=gaussian", "objective.path=linear")["objective"] == {"name": "gaussian", "path": "linear"}
    assert config("optimizer=sgd")["optimizer"]["name"] == "sgd"
    assert config("optimizer=sgd")["optimizer"]["lr"] == 1e-3  # the rest of a host node stays
    assert config("data=shapes")["data"]["path"] == "shapes"
    with pytest.raises(VgmError, match="unknown optimizer 'sdg'"):
        config("optimizer=sdg")


def test_a_codec_may_be_named(vgm) -> None:
    node = recipes.load("dit", None, ["codec=mnist-codec"]).config["codec"]
    assert node["weights"] == "mnist-codec" and node["fallback"] is None


# -- intervals, options, hints -----------------------------------------------------------------------------------------


def test_intervals_may_be_off(vgm, tiny: Path, tmp_path: Path) -> None:
    off = ("train.log_every=0", "train.save_every=null", "train.preview_every=0", "train.preview_n=4")
    code, _, err = vgm("train", tiny, "train.steps=3", *off, "--out", "run")
    assert code == 0, err
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").glob("step-*"))] == ["step-00000003"]
    assert [json.loads(r)["step"] for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [3]
    assert not list((tmp_path / "run/samples").glob("step-*"))


@pytest.mark.parametrize(("keep", "left"), [(0, 1), (1, 1), (2, 2)])
def test_keep_is_the_number_kept(vgm, tiny: Path, tmp_path: Path, keep: int, left: int) -> None:
    code, _, err = vgm("train", tiny, "train.steps=4", "train.save_every=1", f"train.keep={keep}", "--out", "run")
    assert code == 0, err
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == left


@pytest.mark.parametrize(
    ("option", "key"),
    [
        (("--steps", "30"), "train.steps=30"),
        (("--batch-size=8",), "train.batch_size=8"),
        (("--lr", "1e-3"), "optimizer.lr=1e-3"),
        (("--hidden-size", "64"), "model.hidden_size=64"),
        (("--train.steps", "3"), "train.steps=3"),
    ],
)
def test_an_option_that_is_a_key(vgm, option: tuple[str, ...], key: str) -> None:
    refused(vgm("train", "dit", *option), key)
    refused(vgm("train", "dit", "--nonsense", "3"))


def test_a_stop_before_the_first_step(vgm, tiny: Path, tmp_path: Path) -> None:
    for step in (0, -5):
        assert vgm("train", tiny, "--stop-after", step)[0] == 2
    assert not (tmp_path / "runs").exists()


def test_validate_says_that_the_data_are_elsewhere(vgm, tiny: Path) -> None:
    code, _, err = vgm("validate", tiny, "data.path=/cluster/images", "data.size=28", "data.channels=1")
    assert code == 0 and "no such data here: /cluster/images" in err


def test_resume_without_the_recipe(vgm, tiny: Path, tmp_path: Path) -> None:
    assert vgm("train", tiny, "train.steps=2", "--out", "run")[0] == 0
    code, _, err = vgm("train", "--resume", "--out", "run", "train.steps=4")
    assert code == 0, err
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()
    refused(vgm("train", "--resume", "--out", "nowhere"), "no run to go on with")
    refused(vgm("train", "--resume"), "--out")
    refused(vgm("train"), "no paper is named")
    refused(vgm("train", "sit", "--resume", "--out", "run"), "paper=dit", "paper=sit")


def test_overwriting_waits_for_the_check(vgm, tiny: Path, tmp_path: Path) -> None:
    assert vgm("train", tiny, "train.steps=1", "--out", "run")[0] == 0
    refused(vgm("train", tiny, "data.path=nope", "--out", "run", "--overwrite"), "nope")
    assert (tmp_path / "run/checkpoints/step-00000001/model.safetensors").is_file()


def test_settings_of_sampling_are_checked_before_it(vgm, tiny: Path, tmp_path: Path) -> None:
    assert vgm("train", tiny, "train.steps=1", "--out", "run")[0] == 0
    for words, told in (
        (("--guidance-scale", "nan"), "--guidance-scale"),
        (("--guidance-scale", "-1"), "--guidance-scale"),
        (("--guidance-interval", "0.9,0.1"), "--guidance-interval"),
        (("steps=0",), "steps=0"),
        (("--steps", "1" + "0" * 30), "--steps"),
        (("--sampler", "edm", "sigma_min=3", "sigma_max=2"), "sigma_min"),
    ):
        refused(vgm("sample", "run", "-n", 2, "--out", "x.png", *words), told)
        assert not (tmp_path / "x.png").exists()
    refused(vgm("evaluate", "run", "-n", 4, "--assert", "foo<3"), "unknown number in --assert 'foo'", "fid")
    refused(vgm("evaluate", "run", "-n", 4, "--metrics", "kid:subsets=-1"), "subsets=-1")
    refused(vgm("train", "dit", "train.lr=1"), "unknown key 'lr' in train", "did you mean optimizer.lr?")
    (tmp_path / "file").touch()
    for words in (("sample", "run"), ("evaluate", "run"), ("restore", "--model", "run", "--input", "mnist5k")):
        refused(vgm(*words, "-n", 2, "--out", "file/x.png"), "file is no folder")
    for metric in ("edge-f1", "retrieval"):
        refused(vgm("evaluate", "run", "-n", 4, "--metrics", metric), f"{metric} compares every sample with", "kid")


def test_another_networks_weights(vgm, tiny: Path) -> None:
    assert vgm("train", tiny, "train.steps=1", "--out", "run")[0] == 0
    refused(vgm("train", "adm-unet", "model.weights=run"), "holds a dit, not an adm-unet")
    refused(vgm("train", "sit", "--codec", "run"), "is no codec but dit")


@pytest.mark.parametrize("paper", sorted(registry().papers))
def test_hints_name_a_recipe_and_a_verb_that_work(vgm, paper: str) -> None:
    command = recipes.next_command(paper)
    words = re.sub("--(teacher|model|base) RUN", "", command).split()
    assert words[0] == "vgm"
    code, _, err = vgm(*words[1:], "--print-config")
    assert code == 0, err
    assert f"next: {command}" in vgm("explain", paper)[2]


def test_no_hint_leads_in_a_circle(vgm) -> None:
    refused(vgm("train", "flow-grpo"), "vgm finetune-rl flow-grpo --model RUN")
    refused(vgm("distill", "flow-grpo"), "vgm finetune-rl flow-grpo --model RUN")
    refused(vgm("finetune-rl", "dmd"), "vgm distill dmd --teacher RUN")
    refused(vgm("train", "dmd"), "vgm distill dmd --teacher RUN")
    refused(vgm("train", "supir"), "vgm train supir --recipe openmoji-encoder", "vgm cat supir/NAME")
    refused(vgm("train", "controlnet"), "--base RUN")
    refused(vgm("train", "scm", "--recipe", "mnist-unet"), "vgm distill scm/mnist-unet --teacher RUN")


def test_components_are_listed(vgm) -> None:
    code, out, err = vgm("ls", "components")
    assert code == 0, err
    assert "sampler\tddim" in out and "codec\t" in out


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_counts_the_codec_and_the_processes(vgm, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli.engine.train import plan

    monkeypatch.setattr(plan, "time_steps", lambda *args: (None, "not timed"))
    monkeypatch.setattr(plan, "count_flops", lambda *args: (None, None))
    code, out, err = vgm("train", "dit", "data.path=shapes", "--plan", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["first"]["recipe"] == "ldm/tuned-codec" and found["first"]["steps"] == 150
    assert found["sample_shape"] == [8, 8, 8]
    one, eight = (json.loads(vgm("train", "dit", "--plan", "--json", "--nproc", n)[1]) for n in (1, 8))
    assert one["first"] is None and eight["processes"] == 8
    assert eight["memory"]["activations"] * 8 == one["memory"]["activations"]
    refused(vgm("train", "dit", "--plan", "--nproc", 7), "does not divide over 7 processes")


def test_a_plan_through_a_codec_that_is_not_trained_yet(vgm, monkeypatch: pytest.MonkeyPatch) -> None:
    """VAR computes what it is fed by its tokenizer, and the tokenizer counts its codes."""
    from vgm_cli.engine.train import plan as plans

    monkeypatch.setattr(plans, "TIMED_SECONDS", 0.1)
    code, out, err = vgm(
        "train", "var", "--plan", "--json", "train.batch_size=2", "model.depth=1", "codec.weights=null"
    )
    plan = json.loads(out)
    assert code == 0 and not err.count("could not be counted"), err
    assert plan["seconds_per_step"] and plan["first"]["flops_step"]


def test_timing_says_what_it_does_and_ends(vgm, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli.engine.train import plan

    code, out, err = vgm("train", tiny, "--plan")
    assert code == 0 and "timing tiny" in err and "timed on this machine" in out
    monkeypatch.setattr(plan, "speed", lambda *args: 1.0)  # a very slow machine
    code, out, err = vgm("train", tiny, "--plan")
    assert code == 0 and "not timed: one image takes" in out


# -- ranges ------------------------------------------------------------------------------------------------------------


def test_fit() -> None:
    assert fit("1e-4", Positive, "x") == 1e-4
    assert fit([1, 2], tuple[int, ...], "x") == (1, 2)
    assert fit(float("inf"), Unbounded, "x") == float("inf")
    assert fit(None, Count | None, "x") is None
    for value, annotation in (
        (True, Count),
        ([1, True], tuple[int, ...]),
        (float("nan"), Fraction),
        (float("inf"), float),
        (10**30, int),
        (2, Fraction),
        ("word", Count),
    ):
        with pytest.raises(VgmError, match=r"^x=.* does not fit") as e:
            fit(value, annotation, "x")
        assert e.value.code == 2
    assert explain(Count | None) == "int >= 1 | null"


def test_a_constructor_that_fails_is_told_as_a_setting() -> None:
    node = {"name": "autoencoder-kl", "ch_mult": [], "ch": 32, "num_res_blocks": 1}
    with torch.device("meta"), pytest.raises(VgmError, match="codec 'autoencoder-kl' cannot be built") as e:
        registry().build("codec", node)
    assert e.value.code == 2 and "ch_mult=" in e.value.hint
    number, word = (registry().config("model", {"name": "adm-unet", "preset": p}) for p in (64, "64"))
    assert number == word
