"""Every verb on a run of any paper's network and training: 2 networks × 3 trainings × sample, evaluate, distill, restore,
finetune-rl, convert, inspect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NETWORKS = {
    "dit": "{name: dit, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2, learn_sigma: %s}",
    "adm-unet": "{name: adm-unet, model_channels: 32, num_res_blocks: 1, channel_mult: [1, 1], attention_resolutions: [], "
    "patch_size: 2, null_class: true, out_channels: %s}",
}
TRAININGS = {
    "ddpm": ("{name: iddpm, schedule: cosine, steps: 100}", "{name: ddpm, steps: 3, clip_denoised: true}"),
    "flow": ("{name: flow-matching}", "{name: euler, steps: 3}"),
    "edm": ("{name: gaussian, preset: edm}", "{name: edm, steps: 3}"),
}
SMALL = ["train.steps=2", "train.batch_size=8", "train.preview_n=0", "train.precision=fp32", "train.save_every=2"]


@pytest.fixture(scope="module", params=[f"{n} {t}" for n in NETWORKS for t in TRAININGS])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one network by one training."""
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.trainer import train

    network, training = request.param.split()
    objective, sampler = TRAININGS[training]
    learned = training == "ddpm"
    model = NETWORKS[network] % (("true" if learned else "false") if network == "dit" else (2 if learned else 1))
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "recipe.yaml").write_text(
        f"paper: {network}\nmodel: {model}\nobjective: {objective}\nsampler: {sampler}\nguidance_scale: 1.5\n"
        "data: {path: mnist5k}\noptimizer: {lr: 1.0e-3}\ntrain: {ema: [0.9]}\n"
    )
    train(recipes.load(str(folder / "recipe.yaml"), None, SMALL), folder / "run", quiet_end=True)
    return folder / "run"


def ok(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


def test_sample_and_evaluate(run: Path, vgm, tmp_path: Path) -> None:
    ok(vgm("sample", run, "-n", 4, "--steps", 2, "--out", "own.npz"))
    ok(vgm("sample", run, "-n", 4, "--sampler", "heun", "--steps", 2, "--out", "heun.npz"))
    results = json.loads(
        ok(vgm("evaluate", run, "-n", 80, "--steps", 2, "--metrics", "fid,kid:subset_size=40", "--json"))
    )
    assert {r["metric"] for r in results} >= {"fid", "kid"} and all(r["value"] == r["value"] for r in results)


@pytest.mark.parametrize("method", ["dmd", "consistency", "rectified-flow"])
def test_distill(run: Path, vgm, tmp_path: Path, method: str) -> None:
    pairs = [] if method == "consistency" else ["pairs.count=8", "pairs.steps=2"]
    ok(vgm("distill", method, "--teacher", run, *SMALL, *pairs, "--out", "student"))
    ok(vgm("sample", "student", "-n", 2, "--out", "student.npz"))


def test_restore(run: Path, vgm, tmp_path: Path) -> None:
    ok(vgm("restore", "--method", "dps", "--model", run, "--task", "inpainting", "--input", "mnist5k", "-n", 2, "--steps", 3,
           "--out", "restored"))  # fmt: skip
    assert (tmp_path / "restored").is_dir() and list((tmp_path / "restored").rglob("*.png"))


def test_finetune(run: Path, vgm, tmp_path: Path) -> None:
    own = ["objective.group_size=4", "objective.steps=4", "objective.window=1", "objective.window_range=[0,2]"]
    ok(vgm("finetune-rl", "flow-grpo", "--model", run, "--reward", "brightness", *SMALL, *own, "--out", "tuned"))
    ok(vgm("sample", "tuned", "-n", 2, "--steps", 2, "--out", "tuned.npz"))


def test_inspect_and_convert(run: Path, vgm, tmp_path: Path) -> None:
    assert "component" in ok(vgm("inspect", run))
    ok(vgm("convert", run, "official.safetensors"))
    ok(vgm("convert", "official.safetensors", "ours.safetensors"))
    assert "component" in ok(vgm("inspect", "ours.safetensors"))
