"""Every verb on a run of any paper's network and training: 2 networks × 3 trainings × sample, evaluate, distill, restore,
finetune-rl, convert, inspect."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from feature_weights import clip_weights

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

COMBINATIONS = [f"{n} {t}" for n in NETWORKS for t in TRAININGS]
SLOW = ("adm-unet ddpm", "adm-unet edm")


@pytest.fixture(
    scope="module", params=[pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in COMBINATIONS]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one network by one training."""
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.train.loop import train

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


DISTILLED = [(c, method) for c in COMBINATIONS for method in ("dmd", "consistency", "rectified-flow", "scm")]
QUICK = [("adm-unet flow", m) for m in ("dmd", "consistency")]  # test_distill has those of DiT
QUICK += [(c, "rectified-flow") for c in ("adm-unet flow", "dit flow", "dit ddpm")]


@pytest.mark.parametrize(
    ("run", "method"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in DISTILLED],
    indirect=["run"],
)
def test_distill(run: Path, vgm, tmp_path: Path, method: str) -> None:
    pairs = [] if method in ("consistency", "scm") else ["pairs.count=8", "pairs.steps=2"]
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
    """ours -> the paper's official layout -> ours: with the words that convert asks for, the same network."""
    assert "component" in ok(vgm("inspect", run))
    done = json.loads(ok(vgm("convert", run, "official.pt", "--verify", "--json")))
    network = done["component"]["name"]
    told = [re.findall(r"does not tell (.*): `vgm convert`", remark) for remark in done["remarks"]]
    words = [word for found in told if found for word in found[0].split()]
    ok(vgm("convert", "official.pt", "ours.safetensors", *words, "--from", network, "--verify"))
    before = done["component"]["kwargs"]
    after = json.loads(ok(vgm("inspect", "ours.safetensors", "--json")))["component"]["kwargs"]
    assert {k: after.get(k) for k in before if k in after} == {k: v for k, v in before.items() if k in after}


TOLD = """
paper: sit
model: {name: sit, patch_size: 8, hidden_size: 16, depth: 1, num_heads: 2, context_dim: 8}
conditions: {text: {name: words, words: [a, red, circle], width: 8, train: true, dropout: 0.1}}
objective: {name: flow-matching}
sampler: {name: euler, steps: 3}
guidance_scale: 1.5
data: {path: shapes}
train: {ema: [0.9]}
"""


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network that reads texts, with the encoder that was trained beside it."""
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.train.loop import train

    folder = tmp_path_factory.mktemp("texts")
    (folder / "recipe.yaml").write_text(TOLD)
    train(recipes.load(str(folder / "recipe.yaml"), None, SMALL), folder / "run", quiet_end=True)
    return folder / "run"


def test_a_text_model_is_sampled_measured_and_restores(text_run: Path, vgm, tmp_path: Path) -> None:
    ok(vgm("sample", text_run, "-n", 2, "--prompt", "a red circle", "--out", "x.npz"))
    measured = json.loads(ok(vgm("evaluate", text_run, "-n", 6, "--metrics", "straightness:steps=2", "--json")))
    assert measured[0]["n"] == 6 and measured[0]["conditions"] == "shapes"
    file, tokenizer = clip_weights(tmp_path)
    score = f"clip-score:text={file}:tokenizer={tokenizer}"
    scored = json.loads(ok(vgm("evaluate", text_run, "-n", 6, "--metrics", score, "--features", file, "--json")))[0]
    assert -1 <= scored["value"] <= 1 and scored["texts"] == 4
    words = ("--model", text_run, "--input", "shapes", "-n", 2, "--steps", 3)
    images = []
    for k, prompt in enumerate(("a red circle", "a red")):
        ok(vgm("restore", *words, "--prompt", prompt, "--out", f"restored{k}"))
        record = json.loads((tmp_path / f"restored{k}/results.json").read_text())
        assert record["prompts"] == [prompt]
        images.append(sorted((tmp_path / f"restored{k}/restored").glob("*.png"))[0].read_bytes())
    assert images[0] != images[1]
    ok(vgm("restore", *words, "--out", "none"))
    code, _, err = vgm("restore", *words, "--label", "3", "--out", "never")
    assert code == 2 and "--prompt" in err


@pytest.mark.parametrize("method", ["dmd", "rectified-flow"])
def test_a_text_model_is_distilled(text_run: Path, vgm, tmp_path: Path, method: str) -> None:
    """The student keeps the teacher's encoder as it was, and needs the teacher's run no more."""
    from safetensors.torch import load_file

    ok(vgm("distill", method, "--teacher", text_run, *SMALL, "pairs.count=8", "pairs.steps=2", "--out", "student"))
    encoders = [load_file(r / "checkpoints/step-00000002/text.safetensors") for r in (text_run, Path("student"))]
    assert encoders[0].keys() == encoders[1].keys()
    assert all((encoders[0][k] == encoders[1][k]).all() for k in encoders[0])
    ok(vgm("sample", "student", "-n", 2, "--prompt", "a red circle", "--out", "x.npz"))
    ok(vgm("distill", "--resume", "--out", "student"))


def test_a_text_model_is_tuned(text_run: Path, vgm, tmp_path: Path) -> None:
    own = ["objective.group_size=4", "objective.steps=4", "objective.window=1", "objective.window_range=[0,2]"]
    tune = ("finetune-rl", "flow-grpo", "--model", text_run, "--reward", "brightness", *SMALL, *own)
    ok(vgm(*tune, "--prompt", "a red circle", "--prompt", "a circle", "--out", "tuned"))
    ok(vgm("sample", "tuned", "-n", 2, "--prompt", "a red circle", "--out", "x.npz"))
    code, _, err = vgm(*tune, "--prompt", "a mauve circle", "--out", "never")
    assert code == 2 and "mauve" in err
    assert "12 captions of shapes" in vgm(*tune, "--out", "captions")[2]


def listed(vgm) -> dict[tuple[str, str], dict]:
    return {(r["network"], r["training"]): r for r in json.loads(ok(vgm("matrix", "--json")))}


def test_the_matrix_is_listed(vgm) -> None:
    rows = listed(vgm)
    for network in NETWORKS:
        for training in ("iddpm", "flow-matching", "gaussian"):  # those of this file's runs
            assert {"dmd", "consistency"} <= set(rows[network, training]["distill"])
            assert "dps" in rows[network, training]["restore"] and rows[network, training]["finetune-rl"] == [
                "flow-grpo"
            ]
    assert rows["dit", "iddpm"]["recipes"] and rows["dit", "rectified-flow"]["recipes"] == []
    glow = rows["glow", "glow"]
    assert glow["restore"] == glow["distill"] == [] and "no denoiser" in glow["reason"]
    assert rows["llamagen", "llamagen"]["restore"] == ["llamagen"] and "llamagen" not in rows["dit", "iddpm"]["restore"]
    assert rows["maskgit", "masked-codes"]["restore"] == ["halton", "halton-confidence", "maskgit"]
    assert ("dit", "meanflow") in rows and ("adm-unet", "meanflow") not in rows  # which is told one time
    assert "adm-upsampler trains no denoiser" in rows["adm-unet", "adm-upsampler"]["reason"]
    out = ok(vgm("matrix", "sit"))
    assert all(line.startswith("sit") for line in out.splitlines()[1:]) and len(out.splitlines()) > 3
    code, _, err = vgm("matrix", "sti")
    assert code == 2 and "did you mean sit" in err


TINY = NETWORKS | {
    "sit": "{name: sit, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2, learn_sigma: %s}",
    "ncsnpp": "{name: ncsnpp, nf: 16, ch_mult: [1], num_res_blocks: 1, attn_resolutions: []}",
    "edm-unet": "{name: edm-unet, model_channels: 16, channel_mult: [1], num_blocks: 1}",
    "lightningdit": "{name: lightningdit, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2, learn_sigma: %s}",
    "meanflow": "{name: meanflow, patch_size: 7, hidden_size: 32, depth: 1, num_heads: 2}",
    "meanflow-unet": "{name: meanflow-unet, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: []}",
    "song-unet": "{name: song-unet, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: []}",
    "edm2": "{name: edm2, model_channels: 64, channel_mult: [1], num_blocks: 1, attn_resolutions: []}",
    "scm-unet": "{name: scm-unet, base_dim: 8, dim_mults: [1, 2], time_embedding_dim: 16}",
    "vdm": "{name: vdm, n_embd: 32, n_layer: 1}",
}
OPTIONS = {"iddpm": ", learn_sigma: false", "gaussian": ", preset: edm", "consistency": ", preset: ict"}


@pytest.mark.slow
def test_what_the_matrix_promises_trains_and_is_a_denoiser(vgm, tmp_path: Path) -> None:
    from vgm_cli import recipe as recipes
    from vgm_cli.engine import checkpoint
    from vgm_cli.engine.distill import run as distill
    from vgm_cli.engine.train.loop import train
    from vgm_cli.errors import VgmError

    broken: dict[tuple[str, str], str] = {}
    promised = {pair for pair, row in listed(vgm).items() if row["distill"]}
    # sCM reads a second time as the guidance scale, and asks for teachers of several
    for network, training in sorted(promised - {("meanflow", "scm"), ("meanflow-unet", "scm")}):
        own = TINY[network].replace("%s", "1" if network == "adm-unet" else "false")
        if training == "meanflow" and not network.startswith("meanflow"):
            own = own.replace("}", ", second_time: true}")
        sampler = "consistency" if training == "consistency" else "euler"
        file = tmp_path / f"{network}-{training}.yaml"
        file.write_text(
            f"paper: dit\nmodel: {own}\nobjective: {{name: {training}{OPTIONS.get(training, '')}}}\n"
            f"sampler: {{name: {sampler}}}\ndata: {{path: mnist5k}}\n"
        )
        try:
            train(recipes.load(str(file), None, [*SMALL, "train.steps=1"]), tmp_path / file.stem, quiet_end=True)
        except VgmError as e:
            broken[network, training] = e.message
            continue
        header = checkpoint.read_header(checkpoint.resolve(str(tmp_path / file.stem), None))
        if not distill.is_denoiser(header.view):
            broken[network, training] = "is no denoiser"
    assert not broken, json.dumps({" ".join(k): v for k, v in broken.items()}, indent=1)
