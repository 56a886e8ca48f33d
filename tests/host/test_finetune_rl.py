"""`vgm finetune-rl` from end to end on tiny policies: what it makes of a run, resume, adapters, processes, mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vgm_cli.__main__ import run as command
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.finetune_rl import run as finetune_rl
from vgm_cli.errors import VgmError

NETWORK = "{name: NAME, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2, learn_sigma: SIGMA}"
CODEC = "{name: autoencoder-kl, weights: mnist-codec}"
POLICIES = {
    "flow": ("sit", "false", "{name: flow-matching}", "{name: sit-ode, method: euler, steps: 3}", "null"),
    "ddpm": ("dit", "true", "{name: iddpm}", "{name: ddpm, steps: 3}", CODEC),
    "edm": ("dit", "false", "{name: gaussian, preset: edm}", "{name: edm, steps: 3}", "null"),
}
SMALL = (
    "train.steps=4", "train.batch_size=16", "train.save_every=2", "train.log_every=1", "train.preview_n=0",
    "objective.group_size=4", "objective.steps=4", "objective.window=2", "objective.window_range=[0, 3]",
)  # fmt: skip


def make(folder: Path, name: str, *more: str) -> Path:
    """A policy of two training steps."""
    network, sigma, objective, sampler, codec = POLICIES[name]
    node = NETWORK.replace("NAME", network).replace("SIGMA", sigma)
    recipe = folder / f"{name}.yaml"
    recipe.write_text(
        f"paper: {network}\nmodel: {node}\ncodec: {codec}\nobjective: {objective}\nsampler: {sampler}\n"
        "guidance_scale: 1.5\ndata: {path: mnist5k}\n"
        "train: {steps: 2, batch_size: 16, precision: fp32, preview_n: 0, ema: [0.9]}\n"
    )
    out = folder / name
    assert command(["train", str(recipe), *more, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run per kind of policy, made once."""
    folder = tmp_path_factory.mktemp("policies")
    return lambda name: folder / name if (folder / name).is_dir() else make(folder, name)


def test_a_policy_knows_the_words_of_its_captions(vgm: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Words that were not named in the recipe but found in the data: prompts are read with them, and refused."""
    for name in ("pear", "plum"):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    (tmp_path / "told.yaml").write_text(
        f"model: {NETWORK.replace('NAME', 'sit').replace('SIGMA', 'false, context_dim: 8')}\n"
        "conditions: {text: {name: words, width: 8, train: true}}\nobjective: {name: flow-matching}\n"
        "sampler: {name: sit-ode, method: euler, steps: 3}\n"
        "train: {steps: 1, batch_size: 2, preview_n: 0, ema: [0.9]}\n"
    )
    told = tmp_path / "run"
    assert vgm("train", tmp_path / "told.yaml", f"data.path={tmp_path}", "--out", told)[0] == 0
    words = ("finetune-rl", "flow-grpo", "--model", told, "--reward", "brightness", *SMALL, "train.steps=1")
    code, _, err = vgm(*words, "--prompt", "a pear", "--out", tmp_path / "out")
    assert code == 0, err
    code, _, err = vgm(*words, "--prompt", "a grape", "--out", tmp_path / "other")
    assert code == 2 and "'grape' is a word" in err and "it knows 3 words" in err, err


@pytest.fixture
def flow(policies: Callable[[str], Path]) -> Path:
    return policies("flow")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return ckpt.read_tensors(run / f"checkpoints/step-{step:08d}/{name}.safetensors")[0]


# -- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_any_policy_becomes_a_run(name: str, policies, tmp_path: Path, vgm) -> None:
    """Flow, DDPM behind a codec, EDM: tuned, logged, sampled by the base's own sampler."""
    base, out = policies(name), tmp_path / "out"
    code, stdout, err = vgm("finetune-rl", "flow-grpo", *SMALL, "--model", base, "--reward", "ink=2", "--reward",
                            "confidence", "--out", out)  # fmt: skip
    assert code == 0, err
    assert str(out) in stdout
    logged = rows(out)
    wanted = {"reward", "reward_std", "reward_gain", "reward/ink", "reward/confidence", "kl", "approx_kl", "ratio"}
    wanted |= {"clip_fraction", "diversity", "equal_groups", "kept", "loss", "grad_norm"}
    assert len(logged) == 4 and wanted <= set(logged[0])
    assert logged[0]["reward_gain"] == 0 and logged[0]["clip_fraction"] <= 1 and logged[0]["diversity"] > 0
    assert logged[0]["reward"] == pytest.approx(2 * logged[0]["reward/ink"] + logged[0]["reward/confidence"], rel=1e-4)
    before, after = ckpt.read_header(ckpt.resolve(base)), ckpt.read_header(ckpt.resolve(out))
    for field in ("component", "view", "parts"):
        assert getattr(before, field) == getattr(after, field), field
    assert after.recipe["sampler"] == before.recipe["sampler"] and after.recipe["guidance_scale"] == 1.5
    assert after.data["sample_shape"] == before.data["sample_shape"] and after.data["class_names"]
    assert after.recipe["roles"]["reference"]["run"] == str(ckpt.resolve(base))
    tuned, old = weights(out, 4), ckpt.read_tensors(ckpt.resolve(base))[0]
    assert any(not torch.equal(tuned[k], old[k]) for k in old)
    assert vgm("sample", out, "-n", 4, "--out", tmp_path / "x.png")[0] == 0
    assert (tmp_path / "x.png").stat().st_size > 0


def test_it_starts_from_the_weights_that_are_named(flow: Path, tmp_path: Path, vgm) -> None:
    for given, file in (([], "ema-0.9"), (["--weights", "raw"], "model")):
        out = tmp_path / file
        args = ["finetune-rl", "flow-grpo", *SMALL, "optimizer.lr=0", "train.steps=1", "--model", flow, *given]
        assert vgm(*args, "--reward", "ink", "--out", out)[0] == 0
        start, end = weights(flow, 2, file), weights(out, 1)
        assert all(torch.equal(start[k], end[k]) for k in start)


def test_a_tuned_model_is_a_model_to_tune(flow: Path, tmp_path: Path, vgm) -> None:
    run = ("finetune-rl", "flow-grpo", *SMALL, "train.steps=1", "--reward", "ink")
    assert vgm(*run, "--model", flow, "--out", tmp_path / "one")[0] == 0
    assert vgm(*run, "--model", tmp_path / "one", "--out", tmp_path / "two")[0] == 0


def test_no_training_image_is_needed(tmp_path: Path, vgm) -> None:
    """The model's checkpoint says all there is to know of its data."""
    from PIL import Image

    data = tmp_path / "data"
    for label in ("cats", "dogs"):
        (data / label).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (28, 28), 30 * i).save(data / label / f"{i}.png")
    base = make(tmp_path, "flow", f"data.path={data}")
    shutil.rmtree(data)
    code, _, err = vgm("finetune-rl", "flow-grpo", *SMALL, "--model", base, "--reward", "brightness", "--out",
                       tmp_path / "out")  # fmt: skip
    assert code == 0, err
    assert ckpt.read_header(ckpt.resolve(tmp_path / "out")).data["class_names"] == ["cats", "dogs"]


# -- the laws --------------------------------------------------------------------------------------------------------


VARIANTS = {
    "whole network": [],
    "adapters": ["objective.lora={rank: 2}", "train.ema=[0.5, {decay: 0.9, warmup: 0, every: 2}]"],
    "bf16": ["train.precision=bf16"],
    "cps": ["objective.sde=cps", "objective.epochs=2"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_bit_exact(name: str, flow: Path, tmp_path: Path, vgm) -> None:
    args = ("finetune-rl", "flow-grpo", *SMALL, *VARIANTS[name], "--model", flow, "--reward", "ink")
    assert vgm(*args, "--out", tmp_path / "whole")[0] == 0
    assert vgm(*args, "--out", tmp_path / "parts", "--stop-after", 2)[0] == 0
    assert vgm(*args, "--out", tmp_path / "parts", "--resume")[0] == 0
    files = [p.stem for p in (tmp_path / "whole/checkpoints/step-00000004").glob("*.safetensors")]
    assert {"model", "trainer"} < set(files)
    for file in files:
        a, b = weights(tmp_path / "whole", 4, file), weights(tmp_path / "parts", 4, file)
        assert a.keys() == b.keys() and not [k for k in a if not torch.equal(a[k], b[k])], file
    assert [r["reward_gain"] for r in rows(tmp_path / "whole")] == [r["reward_gain"] for r in rows(tmp_path / "parts")]


@pytest.mark.slow
def test_two_processes_equal_one(flow: Path, tmp_path: Path, process: type) -> None:
    args = ("finetune-rl", "flow-grpo", *SMALL, "objective.updates=1", "train.precision=fp32", "--model", flow)
    for nproc in (1, 2):
        code, _, err = process(*args, "--reward", "brightness", "--out", tmp_path / str(nproc), "--nproc", nproc).wait()
        assert code == 0, err
    one, two = weights(tmp_path / "1", 4), weights(tmp_path / "2", 4)
    for k in one:
        torch.testing.assert_close(one[k], two[k], rtol=1e-3, atol=1e-5)
    first, second = rows(tmp_path / "1"), rows(tmp_path / "2")
    for key in ("reward", "reward_std", "diversity", "reward_gain"):
        assert [r[key] for r in first] == pytest.approx([r[key] for r in second], rel=1e-3, abs=1e-5), key


def test_adapters_are_merged_in_what_is_saved(flow: Path, tmp_path: Path, vgm) -> None:
    """Any reader sees a plain network; the adapters lie beside it, by PEFT's names."""
    out = tmp_path / "out"
    lora = "objective.lora={rank: 2, alpha: 4, targets: [attn.qkv]}"
    assert vgm("finetune-rl", "flow-grpo", *SMALL, lora, "optimizer.lr=0.05", "--model", flow, "--reward", "ink",
               "--out", out)[0] == 0  # fmt: skip
    base, tuned, trainer = weights(flow, 2, "ema-0.9"), weights(out, 4), weights(out, 4, "trainer")
    assert base.keys() == tuned.keys()
    changed = {k for k in base if not torch.equal(base[k], tuned[k])}
    assert changed == {"blocks.0.attn.qkv.weight"}
    a, b = (trainer[f"kept.model.blocks.0.attn.qkv.lora_{x}"] for x in "AB")
    torch.testing.assert_close(tuned["blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"] + 2 * b @ a)
    adapter = ckpt.read_tensors(out / "adapter/adapter_model.safetensors")[0]
    assert torch.equal(adapter["base_model.model.blocks.0.attn.qkv.lora_A.weight"], a)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4 and config["target_modules"] == ["blocks.0.attn.qkv"]


def vanishing(images: torch.Tensor, batch: Any) -> torch.Tensor:
    vanishing.calls = getattr(vanishing, "calls", 0) + 1
    return torch.zeros(len(images))


def test_collapse_ends_the_run_and_keeps_the_last_checkpoint(flow: Path, tmp_path: Path, vgm) -> None:
    code, _, err = vgm("finetune-rl", "flow-grpo", *SMALL, "train.steps=40", "train.save_every=6", "--model", flow,
                       "--reward", f"{__name__}:vanishing", "--out", tmp_path / "out")  # fmt: skip
    assert code == 5 and "no images of a class apart" in err and "Traceback" not in err
    assert vanishing.calls == 20
    state = json.loads((tmp_path / "out/checkpoints/last/state.json").read_text())
    assert state["step"] == 18
    assert vgm("sample", tmp_path / "out", "-n", 2, "--out", tmp_path / "x.png")[0] == 0


# -- options and mistakes --------------------------------------------------------------------------------------------


def test_rewards_on_the_command_line() -> None:
    terms, rest = finetune_rl.split_rewards(
        ["ink", "confidence=0.5", "mine:f=2"],
        ["train.steps=3", "reward.confidence.log=true", "reward.ink.threshold=0.3"],
    )
    assert terms == {"ink": {"weight": 1.0, "threshold": 0.3}, "confidence": {"weight": 0.5, "log": True}, "mine:f": 2}
    assert rest == ["train.steps=3"]
    terms, _ = finetune_rl.split_rewards([], ["reward={ink: 1.0, brightness: 2}"])
    assert terms == {"ink": 1.0, "brightness": 2}
    assert finetune_rl.split_rewards([], ["reward=ink"])[0] == {"ink": 1.0}
    resolved = finetune_rl.load("flow-grpo", None, [], rewards=["brightness"])
    assert resolved.config["roles"]["reward"]["terms"] == {"brightness": 1.0}
    assert resolved.origins["roles.reward.terms.brightness"] == "command line"


def test_a_function_of_the_working_folder_is_a_reward(flow: Path, tmp_path: Path, vgm, monkeypatch) -> None:
    """As the help's example has it, where the installed command does not look by itself."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "my_rewards.py").write_text("def score(images, batch):\n    return images.mean((1, 2, 3)) + 7\n")
    args = ("finetune-rl", "flow-grpo", *SMALL, "train.steps=1", "--model", flow, "--out", tmp_path / "out")
    code, _, err = vgm(*args, "--reward", "my_rewards:score=2")
    assert code == 0, err
    (logged,) = rows(tmp_path / "out")
    assert 12 <= logged["reward"] <= 16
    code, _, err = vgm(*args, "--reward", "my_rewards:scores", "--overwrite")
    assert code == 2 and "has no 'scores'" in err


def test_the_models_own_settings_are_taken_over(flow: Path) -> None:
    resolved = finetune_rl.load("flow-grpo", None, [], model=str(flow))
    assert resolved.config["objective"]["guidance_scale"] == resolved.config["guidance_scale"] == 1.5
    assert resolved.config["model"]["patch_size"] == 7 and "codec" not in resolved.config
    assert resolved.config["sampler"]["name"] == "sit-ode"
    chosen = finetune_rl.load("flow-grpo", None, ["objective.guidance_scale=1"], model=str(flow))
    assert chosen.config["objective"]["guidance_scale"] == chosen.config["guidance_scale"] == 1
    apart = finetune_rl.load("flow-grpo", None, ["guidance_scale=3"], model=str(flow))
    assert (apart.config["objective"]["guidance_scale"], apart.config["guidance_scale"]) == (1.5, 3)


MISTAKES: dict[str, tuple[list[str], str, int]] = {
    "no model": (["flow-grpo", "--reward", "ink"], "needs a model", 2),
    "unknown method": (["flow-grop", "--model", "RUN", "--reward", "ink"], "unknown reinforcement", 2),
    "a method that trains": (["sit", "--model", "RUN", "--reward", "ink"], "does not learn from a reward", 2),
    "unknown reward": (["flow-grpo", "--model", "RUN", "--reward", "inck"], "unknown reward 'inck'", 2),
    "weight": (["flow-grpo", "--model", "RUN", "--reward", "ink=much"], "NAME=WEIGHT", 2),
    "option without reward": (["flow-grpo", "reward.ink.threshold=1", "--model", "RUN"], "no such reward", 2),
    "reward option": (["flow-grpo", "reward.ink.thresh=1", "--model", "RUN", "--reward", "ink"], "thresh", 2),
    "no such run": (["flow-grpo", "--model", "nowhere", "--reward", "ink"], "no such run", 2),
    "a codec": (["flow-grpo", "--model", "mnist-codec", "--reward", "ink"], "codec", 2),
    "unknown key": (["flow-grpo", "objective.betta=1", "--model", "RUN", "--reward", "ink"], "betta", 2),
    "groups": (["flow-grpo", "objective.group_size=7", "--model", "RUN", "--reward", "ink"], "do not divide", 2),
    "missing function": (["flow-grpo", "--model", "RUN", "--reward", "nomodule:f"], "nomodule", 2),
    "tracker": (["flow-grpo", "--model", "RUN", "--track", "nowhere"], "unknown tracker", 2),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_a_sentence(name: str, flow: Path, tmp_path: Path, vgm) -> None:
    args, message, wanted = MISTAKES[name]
    args = [str(flow) if a == "RUN" else a for a in args]
    code, _, err = vgm("finetune-rl", *args, "--out", tmp_path / "out")
    assert code == wanted and message in err and "Traceback" not in err, err


def test_another_model_cannot_be_resumed_with(flow: Path, tmp_path: Path, vgm) -> None:
    args = ("finetune-rl", "flow-grpo", *SMALL, "--reward", "ink", "--out", tmp_path / "out")
    assert vgm(*args, "--model", flow, "--stop-after", 2)[0] == 0
    code, _, err = vgm(*args, "--model", flow, "--weights", "raw", "--resume")
    assert code == 2 and "another reference" in err
    code, _, err = vgm(*args, "--model", flow, "optimizer.lr=1", "--resume")
    assert code == 2 and "optimizer.lr" in err
    assert vgm(*args, "--model", flow, "--resume")[0] == 0


def test_a_checkpoint_without_facts_is_refused(flow: Path, tmp_path: Path) -> None:
    path = ckpt.resolve(flow)
    header = ckpt.read_header(path)
    del header.data["num_classes"]
    with pytest.raises(VgmError, match="num_classes"):
        finetune_rl.facts_of(header, path)


def test_print_config_shows_where_values_come_from(flow: Path, vgm) -> None:
    code, out, _ = vgm("finetune-rl", "flow-grpo", "--model", flow, "--reward", "ink=2", "--print-config")
    assert code == 0 and "roles.reward.terms.ink: 2" in out and "# reference" in out and "# command line" in out


# -- a figure --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ink_rises_by_two_deviations_and_digits_stay_digits(tmp_path: Path, vgm) -> None:
    """The shipped recipe on a flow model of handwritten digits: reward of the model as it is sampled, before and after."""
    from vgm_cli.engine.sample import loop as generate
    from vgm_cli.engine.sample.setup import open_model, plan_for
    from vgm_cli.metrics.class_accuracy import accuracy_of
    from vgm_cli.registry import registry
    from vgm_cli.rewards.classifier import digit_network

    base, out = tmp_path / "base", tmp_path / "out"
    assert vgm("train", "rectified-flow", "train.steps=1200", "--out", base)[0] == 0
    assert vgm("finetune-rl", "flow-grpo", "--model", base, "--out", out)[0] == 0
    ink, accuracy = [], []
    for run in (base, out):
        loaded, device = open_model(str(run))
        x, y = generate.sample(loaded, plan_for(loaded, n=400, batch_size=100), device)
        ink.append(registry().build("reward", {"name": "ink"})(x, {}))
        accuracy.append(accuracy_of(digit_network(x.device)(x.clamp(-1, 1))[1], np.asarray(y)))
    assert ink[1].mean() - ink[0].mean() >= 2 * ink[0].std(), (ink[0].mean(), ink[0].std(), ink[1].mean())
    assert accuracy[1] >= 0.9, accuracy
