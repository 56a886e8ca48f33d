"""`vgm distill`: any teacher by any method, through the command line; runs like any other; errors in one sentence."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.distill import pairs as made
from vgm_cli.engine.distill import run as engine
from vgm_cli.errors import USAGE, VgmError

Vgm = Callable[..., tuple[int, str, str]]

NETWORKS = {
    "dit": "{name: dit, patch_size: 7, hidden_size: 32, depth: 2, num_heads: 2, learn_sigma: %s}",
    "adm-unet": (
        "{name: adm-unet, model_channels: 32, num_res_blocks: 1, attention_resolutions: [4], channel_mult: [1, 1, 1],"
        " null_class: true, learn_sigma: %s}"
    ),
}
TRAININGS = {
    "ddpm": ("{name: iddpm, learn_sigma: true}", "{name: ddpm, steps: 2}", "true"),
    "flow": ("{name: flow-matching}", "{name: sit-ode, method: heun2, steps: 3}", "false"),
    "edm": ("{name: gaussian, preset: edm}", "{name: edm, steps: 2}", "false"),
}
RECIPE = """
paper: dit
model: {model}
objective: {objective}
sampler: {sampler}
guidance_scale: 1.5
data: {{path: mnist5k}}
optimizer: {{lr: 1.0e-3}}
train: {{steps: 2, batch_size: 8, precision: fp32, save_every: 2, preview_n: 0, log_every: 1, ema: [0.5]}}
"""
SHORT = ("train.steps=4", "train.batch_size=8", "train.save_every=2", "train.preview_n=0", "train.log_every=1",
         "train.precision=fp32", "train.keep=5")  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Runs of two steps, made when first asked for."""
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.train.loop import train

    root = tmp_path_factory.mktemp("teachers")

    def make(network: str, training: str) -> Path:
        out = root / f"{network}-{training}"
        if not out.exists():
            objective, sampler, learned = TRAININGS[training]
            text = RECIPE.format(model=NETWORKS[network] % learned, objective=objective, sampler=sampler)
            file = root / f"{network}-{training}.yaml"
            file.write_text(textwrap.dedent(text))
            train(recipes.load(str(file)), out, quiet_end=True)
        return out

    return make


def distill(vgm: Vgm, *args: object) -> str:
    code, out, err = vgm("distill", *args)
    assert code == 0, err
    return out


def tensors(run: Path, name: str, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}" / f"{name}.safetensors")


@pytest.mark.parametrize("method", ["dmd", "consistency"])
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(
    "network", ["dit", pytest.param("adm-unet", marks=pytest.mark.slow)]
)  # test_matrix trains both
def test_any_teacher(
    vgm: Vgm, teachers: Callable[[str, str], Path], tmp_path: Path, network: str, training: str, method: str
) -> None:
    """The student starts as the teacher, is a run of its own, samples in one step, and is a teacher itself."""
    teacher, run = teachers(network, training), tmp_path / "student"
    distill(vgm, method, "--teacher", teacher, "--out", run, *SHORT, "optimizer.warmup=0", "optimizer.lr=1e-3")
    before, after = tensors(teacher, "ema-0.5", 2), tensors(run, "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before), "nothing was learned"
    assert all((before[k] - after[k]).abs().max() < 0.05 for k in before), "the student did not start as the teacher"
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(abs(v) < 1e6 for row in losses for v in row.values())
    loaded = ckpt.load(run)
    assert loaded.header.recipe["roles"]["teacher"]["sha256"] == ckpt.file_hash(ckpt.resolve(teacher))
    assert "objective.guidance_scale" in json.loads((run / "origins.json").read_text())
    code, out, err = vgm("sample", run, "-n", 4, "--out", tmp_path / "grid.png", "--json")
    assert code == 0, err
    assert json.loads(out)["nfe"] == 1 and (tmp_path / "grid.png").is_file()
    code, _, err = vgm("sample", run, "-n", 2, "--steps", 2, "--out", tmp_path / "two.png")
    assert code == 0, err
    if (network, training) == ("dit", "flow"):
        distill(vgm, "dmd", "--teacher", run, "--out", tmp_path / "next", *SHORT, "train.steps=1")


METHODS = {
    "dmd2": ("dmd", "objective.update_ratio=2"),
    "dmd2, three steps": ("dmd", "objective.denoising_steps=3", "objective.update_ratio=1", "train.accumulate=2"),
    "dmd with pairs": ("dmd", "--recipe", "mnist-regression", "pairs.count=10", "pairs.steps=3"),
    "cd": ("consistency",),
    "cd, U-Net": ("consistency",),
    "cd, bf16": ("consistency", "train.precision=bf16", "objective.solver=euler"),
    "progdist": (
        "consistency",
        "objective.mode=progdist",
        "objective.scale_mode=progdist",
        "objective.steps_per_stage=1",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if ", " in n else n for n in METHODS])
def test_resume_is_bit_exact(
    vgm: Vgm, teachers: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """2 + 2 steps with a resume in between leave, bit for bit, what 4 steps leave; the teacher is not named again."""
    monkeypatch.setenv("VGM_CACHE", str(tmp_path / "cache"))
    method, *more = METHODS[name]
    teacher = teachers("adm-unet" if "U-Net" in name else "dit", "flow")
    common = (*SHORT, *more)
    distill(vgm, method, "--teacher", teacher, "--out", tmp_path / "whole", *common)
    distill(vgm, method, "--teacher", teacher, "--out", tmp_path / "parts", *common, "--stop-after", 2)
    distill(vgm, method, "--out", tmp_path / "parts", *common, "--resume")
    files = sorted(p.stem for p in (tmp_path / "whole/checkpoints/step-00000004").glob("*.safetensors"))
    assert {"model", "trainer"} < set(files) and (method != "dmd" or "fake_score" in files)
    for file in files:
        a, b = (tensors(tmp_path / run, file) for run in ("whole", "parts"))
        assert a.keys() == b.keys()
        assert not [k for k in a if not torch.equal(a[k], b[k])], file


def test_pairs_are_cached_and_completed(
    vgm: Vgm, teachers: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise gives the images again; a second run makes none, a larger count adds, another teacher makes its own."""
    monkeypatch.setenv("VGM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(made, "SHARD", 8)
    teacher = teachers("dit", "flow")

    def pairs(count: int, teacher: Path = teacher, *more: str) -> dict[str, torch.Tensor]:
        words = [f"pairs.count={count}", "pairs.steps=3", "pairs.batch_size=5", *more]
        recipe = engine.load("dmd", "mnist-regression", words, str(teacher))
        return made.pairs_of(recipe, recipe.roles()["pairs"])

    first = pairs(10)
    assert {k: len(v) for k, v in first.items()} == {"z": 10, "x": 10, "y": 10}
    folders = list((tmp_path / "cache/pairs").iterdir())
    files = {p.name: p.stat().st_mtime_ns for p in folders[0].glob("*.safetensors")}
    assert len(folders) == 1 and len(files) == 2
    begun: list[int] = []
    whole = made.make_pairs
    monkeypatch.setattr(made, "make_pairs", lambda *a: begun.append(a[-1]) or whole(*a))
    again, more = pairs(10), pairs(20)
    assert begun == [16]
    assert all(torch.equal(first[k], again[k]) and torch.equal(first[k], more[k][:10]) for k in first)
    loaded = ckpt.load(teacher)
    from vgm_cli.diffusion.guidance import ClassifierFreeGuidance
    from vgm_cli.diffusion.solvers.ode import ode_heun
    from vgm_cli.diffusion.timesteps import time_grid

    view = ClassifierFreeGuidance(loaded.view, 1.5)  # the teacher's own recipe guides
    cond = {"y": first["y"]}
    with torch.no_grad():
        grid = time_grid(view.path, 3, "uniform", 0.0, 1.0)
        x = ode_heun(lambda x, t: view.predict(x, t, "velocity", **cond), first["z"], grid)
    assert (x - first["x"]).abs().max() < 1e-4
    pairs(8, teachers("dit", "edm"))
    pairs(8, teacher, "pairs.seed=1")
    assert len(list((tmp_path / "cache/pairs").iterdir())) == 3
    (next(iter(folders)) / "00000000.safetensors").unlink()
    begun.clear()
    assert torch.equal(pairs(10)["x"], first["x"]) and begun == [0]


def test_teacher_codec_and_data_come_along(vgm: Vgm, teachers: Callable[[str, str], Path], tmp_path: Path) -> None:
    """A latent teacher's student is latent; what the recipe says of the data goes before what the teacher says."""
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.train.loop import train

    words = ["train.steps=1", "train.preview_n=0", "train.batch_size=8", "model.hidden_size=32", "model.depth=1",
             "model.num_heads=2", "data.cache_latents=false"]  # fmt: skip
    train(recipes.load("dit", None, words), tmp_path / "latent", quiet_end=True)
    latent = engine.load("consistency", None, ["data.hflip=true"], str(tmp_path / "latent"))
    assert latent.config["codec"] == {"name": "autoencoder-kl", "weights": "mnist-codec"}
    assert latent.config["data"]["path"] == "mnist5k" and latent.config["data"]["hflip"] is True
    assert (
        latent.config["roles"]["teacher"]["view"]["learned_sigma"]
        and latent.config["objective"]["guidance_scale"] == 2.0
    )
    assert latent.config["model"]["weights"] == latent.config["roles"]["teacher"]["run"]
    few = (*SHORT, "train.steps=1", "data.cache_latents=false")
    distill(vgm, "consistency", "--teacher", tmp_path / "latent", "--out", tmp_path / "student", *few)
    assert ckpt.load(tmp_path / "student").codec is not None
    pixels = engine.load("consistency", None, ["objective.guidance_scale=null"], str(teachers("dit", "flow")))
    assert "codec" not in pixels.config and pixels.config["objective"]["guidance_scale"] is None


@pytest.mark.parametrize(
    "more",
    [
        ("objective.update_ratio=1",),
        pytest.param(("--recipe", "mnist-regression", "pairs.count=8", "pairs.steps=2"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(
    teachers: Callable[[str, str], Path], tmp_path: Path, vgm: Vgm, forked: Any, more: tuple[str, ...]
) -> None:
    """Pairs too, which the first process makes and all read; each number of processes has a cache of its own here."""
    teacher = teachers("dit", "flow")
    words = ("distill", "dmd", "--teacher", teacher, *SHORT, *more)
    one = vgm(*words, "--out", tmp_path / "1")
    own = {"VGM_CACHE": str(tmp_path / "cache-2")}
    two = forked(*words, "--out", tmp_path / "2", ranks=2, env=own).wait()
    assert one[0] == two[0] == 0, one[2] + two[2]
    for name in ("model", "fake_score"):
        a, b = tensors(tmp_path / "1", name), tensors(tmp_path / "2", name)
        for k in a:
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-5)


def test_plan_needs_no_teacher(vgm: Vgm) -> None:
    small = ("codec=null", "teacher.hidden_size=32", "teacher.depth=1", "teacher.num_heads=2", "teacher.patch_size=7")
    for words in (("dmd",), ("dmd", "--recipe", "mnist-regression"), ("consistency",)):
        code, out, err = vgm("distill", *words, *small, "train.batch_size=8", "--plan", "--json")
        assert code == 0, err
        plan = json.loads(out)
        assert plan["roles"]["teacher"] == plan["parameters"] > 0 and plan["flops_step"] > 0, err
    code, out, _ = vgm("distill", "dmd", "--print-config", "--json")
    assert code == 0 and json.loads(out)["config"]["objective"]["name"] == "dmd"


def fails(vgm: Vgm, *args: object) -> str:
    code, _, err = vgm(*args)
    assert code == USAGE and err.startswith("error: ") and "Traceback" not in err, err
    return err


def test_errors_name_the_way_out(vgm: Vgm, teachers: Callable[[str, str], Path], tmp_path: Path) -> None:
    teacher = teachers("dit", "flow")
    assert "needs a teacher" in fails(vgm, "distill", "dmd")
    assert "vgm distill dmd --teacher RUN" in fails(vgm, "train", "dmd")
    err = fails(vgm, "distill", "dmdd", "--teacher", teacher)
    assert "unknown distillation method 'dmdd'" in err and "dmd" in err.splitlines()[1]
    err = fails(vgm, "distill", "dit", "--teacher", teacher)
    assert "does not distill a teacher" in err and "consistency, dmd" in err
    assert "does not distill a teacher" in fails(
        vgm, "distill", "consistency", "--recipe", "mnist", "--teacher", teacher
    )
    assert engine.locate("consistency")[0] == "consistency/mnist-cd" and engine.locate("dmd")[0] == "dmd/mnist"
    assert "is a codec" in fails(vgm, "distill", "dmd", "--teacher", "mnist-codec")
    assert "no such run or checkpoint" in fails(vgm, "distill", "dmd", "--teacher", tmp_path / "nowhere")
    assert "unknown key 'update_ration'" in fails(
        vgm, "distill", "dmd", "--teacher", teacher, "objective.update_ration=1"
    )
    assert "no weights 'ema-1'" in fails(vgm, "distill", "dmd", "--teacher", teacher, "--weights", "ema-1")
    assert "no distillation to go on with" in fails(vgm, "distill", "dmd", "--out", teacher, "--resume")


def test_a_network_without_a_view_is_no_teacher(teachers: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Unless it is a converted one, and the recipe says how it is to be asked."""
    path = ckpt.resolve(teachers("dit", "flow"))
    state, metadata = ckpt.read_tensors(path)
    header = ckpt.Header.parse(metadata, path)
    header.view = None
    ckpt.save_network(tmp_path / "run.safetensors", state, header)
    with pytest.raises(VgmError, match="no diffusion or flow network"):
        engine.load("dmd", None, [], str(tmp_path / "run.safetensors"))
    header.recipe = {}
    ckpt.save_network(tmp_path / "bare.safetensors", state, header)
    file = tmp_path / "own.yaml"
    file.write_text("base: dmd/mnist\nteacher: {view: null}\n")
    with pytest.raises(VgmError, match="no diffusion or flow network"):
        engine.load(str(file), None, [], str(tmp_path / "bare.safetensors"))
    known = engine.load("dmd", None, [], str(tmp_path / "bare.safetensors"))  # the recipe's own view is a flow's
    assert known.config["roles"]["teacher"]["view"]["prediction"] == "velocity"


def test_the_datas_classes_are_those_of_the_teacher(
    vgm: Vgm, teachers: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Another number of classes is refused, another name told."""
    for folder, names in {"names": [*"012345678", "X"], "number": ["cat", "dog"]}.items():
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new("L", (28, 28)).save(tmp_path / folder / name / "0.png")
    words = ("dmd", "--teacher", teachers("dit", "ddpm"), *SHORT, "train.steps=1")
    code, _, err = vgm("distill", *words, f"data.path={tmp_path / 'number'}", "--out", tmp_path / "a")
    assert code == USAGE and "the data has 2 classes, the teacher was trained on 10" in err
    code, _, err = vgm("distill", *words, f"data.path={tmp_path / 'names'}", "--out", tmp_path / "b")
    assert code == 0 and "the data's class 9 is X, that of the teacher 9" in err


@pytest.mark.parametrize("layout", ["edm", "consistency"])
def test_a_converted_checkpoint_is_a_teacher(vgm: Vgm, tmp_path: Path, layout: str) -> None:
    """Official weights of EDM and of consistency models, which say nothing of themselves, through their converters."""
    from vgm_cli.registry import load_target, registry

    converter = load_target(registry().find("converter", layout).target)
    keywords = {
        "edm": {"img_resolution": 28, "in_channels": 1, "num_classes": 10, "channel_mult": [1, 1]},
        "consistency": {"image_size": 28, "in_channels": 1, "num_classes": 10, "channel_mult": [1, 1],
                        "learn_sigma": False, "use_new_attention_order": True, "attention_resolutions": [2]},
    }[layout]  # fmt: skip
    width = {"edm": {"num_blocks": 1}, "consistency": {"num_res_blocks": 1, "num_head_channels": 64}}[layout]
    network = registry().build("model", {"name": converter.component, "model_channels": 64, **keywords, **width})
    theirs = converter.from_ours(network.state_dict())
    config = {**converter.config(theirs), **({"image_size": 28} if layout == "consistency" else {})}
    header = ckpt.Header(
        {"kind": "model", "name": converter.component, "kwargs": config}, **converter.published.header(config)
    )
    ckpt.save_network(tmp_path / "teacher.safetensors", converter.to_ours(theirs), header)
    method = {"edm": "dmd", "consistency": "consistency"}[layout]
    words = (*SHORT, "train.steps=1", "train.batch_size=2", "data.path=mnist5k")
    distill(vgm, method, "--teacher", tmp_path / "teacher.safetensors", "--out", tmp_path / method, *words)
    code, out, err = vgm("sample", tmp_path / method, "-n", 2, "--out", tmp_path / "x.png", "--json")
    assert code == 0 and json.loads(out)["nfe"] == 1, err


def test_another_teacher_does_not_resume(vgm: Vgm, teachers: Callable[[str, str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill(vgm, "consistency", "--teacher", teachers("dit", "flow"), "--out", run, *SHORT, "--stop-after", 2)
    words = ("--teacher", teachers("dit", "edm"), "--out", run, *SHORT, "--resume")
    assert "another teacher" in fails(vgm, "distill", "consistency", *words)
