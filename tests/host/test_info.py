"""ls, cat, cp, validate, explain, env, runs, plan: what a stranger looks at first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("what", ["papers", "recipes", "presets", "models", "objectives", "samplers", "codecs", "operators",
                                  "rewards", "metrics", "converters"])  # fmt: skip
def test_lists(vgm, what: str) -> None:
    code, out, err = vgm("ls", what)
    assert code == 0 and len(out.splitlines()) > 2, err
    rows = json.loads(vgm("ls", what, "--json")[1])
    assert len(rows) == len(out.splitlines()) - 1


def test_unknown_list(vgm) -> None:
    code, _, err = vgm("ls", "sampler")
    assert code == 2 and "samplers" in err


def test_cat_cp_validate_train(vgm, tmp_path: Path) -> None:
    """The way to one's own recipe."""
    assert "model:" in vgm("cat", "dit/mnist")[1]
    resolved = vgm("cat", "dit/imagenet512", "--resolved")[1]
    assert "size: 512" in resolved and "DiT-XL/2" in resolved and "base" not in resolved
    assert vgm("cp", "dit/imagenet512", "mine.yaml")[0] == 0
    assert vgm("cp", "dit/imagenet512", "mine.yaml")[0] == 2
    assert vgm("cp", "dit/imagenet512", "mine.yaml", "--overwrite")[0] == 0
    assert vgm("cp", "dit/mnist", "deep/er/mine.yaml")[0] == 2
    assert vgm("cp", "dit/mnist", "deep/er/mine.yaml", "--make-parents")[0] == 0
    code, out, err = vgm("validate", "mine.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] == 676_014_368
    (tmp_path / "bad.yaml").write_text("base: dit/mnist\nmodel: {dephth: 3}\n")
    code, _, err = vgm("validate", "bad.yaml")
    assert code == 2 and "depth" in err


def test_explain(vgm) -> None:
    code, out, _ = vgm("explain", "dit")
    assert code == 0
    for word in ("2212.09748", "2.27", "vgm_cli.nets.dit:DiT", "iddpm", "imagenet256"):
        assert word in out
    assert vgm("explain", "dti")[0] == 2
    assert "10. That last finding is why" in out and "vgm_cli/nets/dit.py:DiTBlock" in out and "\\n" not in out
    from vgm_cli.registry import registry

    for paper in registry().papers:
        facts = json.loads(vgm("explain", paper, "--json")[1])
        assert len(facts["idea"]) == 10 and facts["equations"], paper


def test_env(vgm) -> None:
    facts = json.loads(vgm("env", "--json")[1])
    assert {"vgm", "python", "packages", "cores", "bf16"} <= set(facts)


def test_the_plan_of_the_papers_run(vgm) -> None:
    """675,129,632 parameters without data or weights; FLOPs are those of the paper."""
    code, out, err = vgm("train", "dit", "--recipe", "imagenet256", "--plan", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["parameters"] == 675_129_632 and plan["trainable"] == 674_834_720
    assert plan["sample_shape"] == [4, 32, 32] and plan["num_classes"] == 1000
    assert plan["flops_forward"] / 2 / 1e9 == pytest.approx(119, rel=0.03)  # the paper counts multiply-adds: 118.6 G
    text = vgm("train", "dit", "--recipe", "imagenet256", "--plan")[1]
    assert "675,129,632" in text and "7,000,000 steps" in text


@pytest.mark.slow
def test_every_digit_recipe_can_be_counted() -> None:
    """Losses with second derivatives, several phases or half precision switched off have FLOPs and activations too."""
    from vgm_cli import recipe as recipes
    from vgm_cli.engine import build
    from vgm_cli.engine.train import plan

    for name in (n for n in recipes.shipped() if "/mnist" in n):
        recipe = recipes.load(*name.split("/"))
        if recipe.node("data").size is None and recipe.node("data").path is None:  # a student's data are its teacher's
            recipe = recipes.load(*name.split("/"), ["data.path=mnist5k"])
        facts, _, _ = build.plan_facts(recipe)
        with torch.device("meta"):
            built = build.build_objective(recipe, facts, build.plan_roles(recipe, facts))
        forward, step = plan.count_flops(built, facts)
        assert forward and step and forward < step, name
        assert plan.memory_by_part(built, ["model"], recipe, "fp32", 4, facts)["activations"] > 0, name


def test_what_cannot_be_counted_is_left_out(vgm, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli.engine.train import plan

    small = ("train", "glow", "model.depth=1", "model.width=8", "train.batch_size=4", "--plan")
    out = vgm(*small)[1]
    assert "FLOPs  " in out and ", activations " in out

    def no_values(*args: object) -> None:
        raise RuntimeError("values are needed")

    monkeypatch.setattr(plan._MetaStep, "rand", no_values)
    code, out, err = vgm(*small)
    assert code == 0 and "FLOPs could not be counted: values are needed" in err
    assert "FLOPs" not in out and "and activations, which could not be counted" in out
    assert json.loads(vgm(*small, "--json")[1])["flops_step"] is None


def test_print_config_and_help_config(vgm) -> None:
    code, out, _ = vgm("train", "dit", "optimizer.lr=3e-4", "--print-config")
    assert code == 0
    line = next(x for x in out.splitlines() if x.startswith("optimizer.lr:"))
    assert "0.0003" in line and "command line" in line
    keys = json.loads(vgm("train", "dit", "--help-config", "--json")[1])
    assert {"train.steps", "model.depth", "objective.schedule", "sampler.steps"} <= {k["key"] for k in keys}
    told = {k["key"]: k["meaning"] for k in keys}
    assert (
        told["train.accumulate"] == "micro-batches per step" and told["model.patch_size"] == "side of a token's patch"
    )


def test_environment_variables_set_keys(vgm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGM_TRAIN__STEPS", "17")
    out = vgm("train", "dit", "--print-config")[1]
    line = next(x for x in out.splitlines() if x.startswith("train.steps:"))
    assert "17" in line and "environment" in line
    out = vgm("train", "dit", "train.steps=18", "--print-config")[1]
    assert "train.steps: 18" in out


def test_runs(vgm, tiny: Path, tmp_path: Path) -> None:
    assert vgm("train", tiny, "train.steps=4", "--out", "runs/tiny/first")[0] == 0
    rows = json.loads(vgm("runs", "ls", "--json")[1])
    assert [r["path"] for r in rows] == ["runs/tiny/first"] and rows[0]["step"] == 4
    code, out, _ = vgm("runs", "show", "runs/tiny/first")
    assert code == 0 and "step 4 of 4" in out and "checkpoint" in out
    assert vgm("runs", "show", "nowhere")[0] == 2
    assert vgm("runs", "rm", "runs/tiny/first")[0] == 1  # not asked, not removed
    assert (tmp_path / "runs/tiny/first").is_dir()
    assert vgm("runs", "rm", "runs/tiny/first", "--yes")[0] == 0
    assert not (tmp_path / "runs/tiny/first").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("not a run")
    assert vgm("runs", "rm", "thesis", "--yes")[0] == 2 and (tmp_path / "thesis").is_dir()


def test_training_tells_events_as_json_lines(vgm, tiny: Path) -> None:
    code, out, err = vgm("--json", "train", tiny, "train.steps=4", "--out", "run")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["start", "step", "step", "step", "step", "result"]
    assert events[1].keys() >= {"step", "loss", "images_per_second", "lr"}
    assert events[-1]["step"] == 4


def test_completion_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from vgm_cli.cli import complete as c; "
        "from types import SimpleNamespace as ctx; one, none = ctx(params={'paper': 'sit'}), ctx(params={});"
        "assert c.papers('di') == ['dit'] and 'dit/mnist' in c.trainable('di') and 'train.steps=' in c.keys('train.st');"
        "assert c.recipes(one, '') == ['imagenet256', 'mnist', 'openmoji', 'text'] and 'imagenet512' in c.recipes(none, 'ima');"
        "assert c.methods('') == ['add', 'consistency', 'dmd', 'meanflow', 'rectified-flow', 'scm'] and c.rl_methods('') == ['flow-grpo'];"
        "assert 'heun' in c.samplers('h'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_examples_of_every_command_fit_80_columns(vgm) -> None:
    """A wrapped line looks like a command; what is longer is continued with a backslash or has its comment above."""
    from vgm_cli.cli import examples

    long = "vgm restore --model RUN --task inpainting mask=box box=0.5 --method ddrm --input photo.png   # a photograph"
    lines = examples.laid_out(f"Do it.\n\nExamples:\n\n    vgm ls\n\n    {long}\n\nNext: go on").splitlines()
    assert lines[4:8] == [
        "    vgm ls",
        "    # a photograph",
        "    vgm restore --model RUN --task inpainting mask=box box=0.5 --method ddrm \\",
        "        --input photo.png",
    ]
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith(("  vgm ", "  # ")))


def test_a_recipes_headline_is_its_first_sentence(vgm) -> None:
    rows = {r["recipe"]: r["summary"] for r in json.loads(vgm("ls", "recipes", "--json")[1])}
    assert rows["stylegan/lsun-bedroom256"] == "StyleGAN on LSUN bedrooms at 256x256 (Karras et al. 2019, app. C)"
    assert all(s.count("(") == s.count(")") for s in rows.values())


def test_numbers_for_people() -> None:
    from vgm_cli.ui import duration, human

    assert [human(n) for n in (12, 1234567, 1.35e15)] == ["12", "1.23 M", "1,350 T"]
    assert [duration(s) for s in (59, 3725, 200000, 69104.2 * 86400)] == ["59 s", "1 h 2 min", "2.3 days", "189 years"]


def test_every_key_of_the_host_and_of_digit_recipes_is_explained() -> None:
    import dataclasses

    from vgm_cli.cli import meanings
    from vgm_cli.recipe import COMPONENT_NODES, NODES, load, shipped
    from vgm_cli.registry import load_target, registry, signature

    for node, cls in NODES.items():
        names = [f.name for f in dataclasses.fields(cls)]
        assert [n for n in names if not meanings.of_class(cls, names).get(n)] == [], node
    unexplained = set()
    for name in (n for n in shipped() if n.endswith("/mnist")):
        config = load(*name.split("/")).config
        for kind in COMPONENT_NODES:
            if config.get(kind):
                target = load_target(registry().find(kind, config[kind]["name"]).target)
                found = meanings.of_keys(target, signature(target).parameters)
                unexplained |= {f"{kind} {config[kind]['name']}: {k}" for k, text in found.items() if not text}
    assert not unexplained, sorted(unexplained)
