"""Files from somebody else run nothing: checkpoints, codecs, run folders, pictures and recipes name registered
components, whatever verb reads them; what is typed or trusted runs. A marker file shows what ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from vgm_cli import foreign
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine import processes
from vgm_cli.engine.environment import git_state
from vgm_cli.errors import VgmError
from vgm_cli.images import save_png
from vgm_cli.registry import registry

Vgm = Callable[..., tuple[int, str, str]]
DIT = {"input_size": 28, "in_channels": 1, "num_classes": 10, "patch_size": 7, "hidden_size": 32, "depth": 1,
       "num_heads": 2, "learn_sigma": False}  # fmt: skip
FLOW = {"name": "denoiser", "path": {"name": "linear"}, "prediction": "velocity", "time": "reversed"}
DATA = {
    "sample_shape": [1, 28, 28],
    "num_classes": 10,
    "image_size": 28,
    "image_channels": 1,
    "size": 28,
    "channels": 1,
}
MARK = "ran"


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    return registry().build("model", {"name": "dit", **DIT}).state_dict()


@pytest.fixture(autouse=True)
def evil(tmp_path: Path) -> Iterator[None]:
    """A module of the working folder that leaves a mark when it is imported, and again when it is called."""
    text = f"import pathlib\npathlib.Path({str(tmp_path / MARK)!r}).touch()\ndef f(*args, **kwargs):\n    return 0.5\n"
    (tmp_path / "evil.py").write_text(text)
    yield
    sys.modules.pop("evil", None)
    sys.path[:] = [p for p in sys.path if p != str(tmp_path)]
    registry().begin()


def harmless(tmp_path: Path, err: str = "") -> None:
    assert not (tmp_path / MARK).exists() and "evil" not in sys.modules
    assert "may be a bug" not in err and "Traceback" not in err


def checkpoint(path: Path, state: dict[str, Any], **changes: Any) -> Path:
    """A file that is as it should be but for the header entries that are given."""
    component = {"kind": "model", "name": "dit", "kwargs": DIT}
    recipe = {"paper": "dit", "sampler": {"name": "euler", "steps": 2}, "guidance_scale": None}
    header = ckpt.Header(component=component, view=FLOW, data=dict(DATA), recipe=recipe)
    for key, value in changes.items():
        setattr(header, key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ckpt.save_network(path, state, header)
    return path


def in_a_run(tmp_path: Path, state: dict[str, Any], **changes: Any) -> Path:
    checkpoint(tmp_path / "run/checkpoints/step-00000004/model.safetensors", state, **changes)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"sampler": {"name": "evil:f"}}))
    return tmp_path / "run"


VERBS = {
    "sample": ["sample", "MODEL", "-n", 2, "--out", "x.png", "--overwrite"],
    "evaluate": ["evaluate", "MODEL", "-n", 4, "--metrics", "kid"],
    "restore": ["restore", "--model", "MODEL", "--input", "mnist5k", "-n", 1, "--steps", 1, "--out", "restored"],
    "distill": ["distill", "consistency", "--teacher", "MODEL", "--out", "student", "train.steps=1"],
    "distill --plan": ["distill", "dmd", "--teacher", "MODEL", "--plan"],
    "distill --help-config": ["distill", "dmd", "--teacher", "MODEL", "--help-config"],
    "distill --print-config": ["distill", "dmd", "--teacher", "MODEL", "--print-config"],
    "finetune-rl": ["finetune-rl", "flow-grpo", "--model", "MODEL", "--reward", "ink", "--out", "rl", "train.steps=1"],
    "convert": ["convert", "MODEL", "y.safetensors", "--verify"],
    "train --codec": ["train", "dit", "--codec", "MODEL", "train.steps=1", "--out", "trained"],
    "classifier": ["sample", "GOOD", "-n", 2, "--out", "x.png", "--sampler", "iddpm-ddim", "classifier=MODEL"],
    "inspect": ["inspect", "MODEL"],
    "data encode": ["data", "encode", "mnist5k", "--codec", "MODEL", "--out", "cache"],
}
LOOKS = ("inspect", "distill --print-config")  # exit code 0: nothing is built


def ask(vgm: Vgm, verb: str, model: Path, good: Path | None = None) -> tuple[int, str]:
    code, _, err = vgm(*(str(a).replace("MODEL", str(model)).replace("GOOD", str(good)) for a in VERBS[verb]))
    return code, err


@pytest.mark.parametrize("verb", VERBS)
def test_a_header_runs_no_component(vgm: Vgm, tmp_path: Path, weights: dict[str, Any], verb: str) -> None:
    good = checkpoint(tmp_path / "good.safetensors", weights)
    bad = checkpoint(tmp_path / "bad.safetensors", weights, component={"kind": "model", "name": "evil:f", "kwargs": {}})
    code, err = ask(vgm, verb, bad, good)
    harmless(tmp_path, err)
    assert code in (0, 2) if verb in LOOKS else code == 2 and "evil:f" in err, err


TARGETS: dict[str, dict[str, Any]] = {
    "os:system": {"command": "touch ran"},
    "os:popen": {"cmd": "touch ran"},
    "subprocess:run": {"args": ["touch", "ran"]},
    "subprocess:Popen": {"args": ["touch", "ran"]},
    "runpy:run_path": {"path_name": "evil.py"},
    "timeit:timeit": {"stmt": "open('ran', 'w')", "number": 1},
    "cProfile:run": {"statement": "open('ran', 'w')"},
    "shutil:copyfile": {"src": "evil.py", "dst": "ran"},
    "builtins:open": {"file": "ran", "mode": "w"},
    "vgm_cli.atomic:write_text": {"path": "ran", "text": "x"},
    "vgm_cli.weights.reading:read": {"path": "evil.py"},
    "urllib.request:urlopen": {"url": "http://127.0.0.1:9/"},
    "torch:load": {"f": "evil.py"},
    " evil:f": {},
    "evil:f ": {},
    "evil:": {},
    ":f": {},
    "evil:f:f": {},
    "evil.f": {},
    "evil/f": {},
    "evil": {},
}


@pytest.mark.parametrize(
    ("target", "place"),
    [(t, "component") for t in TARGETS] + [(t, p) for t in list(TARGETS)[::4] for p in ("view", "sampler")],
)
def test_no_name_is_code(vgm: Vgm, tmp_path: Path, weights: dict[str, Any], target: str, place: str) -> None:
    keywords = TARGETS[target]
    changes: dict[str, Any] = {
        "component": {"component": {"kind": "model", "name": target, "kwargs": keywords}},
        "view": {"view": {"name": target, **keywords}},
        "sampler": {"recipe": {"sampler": {"name": target, **keywords}}},
    }[place]
    code, err = ask(vgm, "sample", checkpoint(tmp_path / "bad.safetensors", weights, **changes))
    harmless(tmp_path, err)
    assert code == 2 and target in err, err


@pytest.mark.parametrize("verb", ["sample", "evaluate", "restore", "distill", "distill --plan", "distill --help-config",
                                  "distill --print-config", "finetune-rl"])  # fmt: skip
def test_a_view_runs_no_code(vgm: Vgm, tmp_path: Path, weights: dict[str, Any], verb: str) -> None:
    run = in_a_run(tmp_path, weights, view={"name": "evil:f"})
    code, err = ask(vgm, verb, run)
    harmless(tmp_path, err)
    assert code == 2 and "evil:f" in err and "registered" in err, err


@pytest.mark.parametrize("verb", ["sample", "evaluate", "finetune-rl"])
def test_a_recipe_in_a_header_runs_no_sampler(vgm: Vgm, tmp_path: Path, weights: dict[str, Any], verb: str) -> None:
    run = in_a_run(tmp_path, weights, recipe={"sampler": {"name": "evil:f", "steps": 2}})
    code, err = ask(vgm, verb, run)
    harmless(tmp_path, err)
    assert code == 2 and "evil:f" in err, err
    code, _, err = vgm("sample", run, "-n", 2, "--sampler", "euler", "--steps", 1, "--out", "fine.png")
    assert code == 0, err


@pytest.mark.parametrize(
    ("kind", "name", "kwargs"),
    [("reward", "ocr", {"reader": "evil:f"}), ("reward", "weighted", {"terms": {"evil:f": 1}}),
     ("reward", "function", {"target": "evil:f"}), ("converter", "dit", {}), ("operator", "denoising", {}),
     ("optimizer", "glow-adamax", {}), ("sampler", "euler", {}), ("metric", "fid", {}), ("view", "denoiser", {}),
     ("objective", "gaussian", {}), ("dataset", "x", {}), ("evil:f", "dit", {})],
)  # fmt: skip
def test_a_header_is_of_a_model_or_a_codec(
    vgm: Vgm, tmp_path: Path, weights: dict[str, Any], kind: str, name: str, kwargs: dict[str, Any]
) -> None:
    bad = checkpoint(tmp_path / "x.safetensors", weights, component={"kind": kind, "name": name, "kwargs": kwargs})
    for verb in ("sample", "convert", "inspect"):
        code, err = ask(vgm, verb, bad)
        harmless(tmp_path, err)
        assert code == 1 and "component.kind" in err, err


def test_keywords_of_a_header_do_not_name_its_component(vgm: Vgm, tmp_path: Path, weights: dict[str, Any]) -> None:
    component = {"kind": "model", "name": "dit", "kwargs": {**DIT, "name": "evil:f"}}
    code, err = ask(vgm, "sample", checkpoint(tmp_path / "x.safetensors", weights, component=component))
    harmless(tmp_path, err)
    assert code == 0, err  # the component's name counts


# -- parts and files ---------------------------------------------------------------------------------------------------

CODEC = ckpt.ASSETS / "mnist-codec.safetensors"
LATENT = {"sample_shape": [4, 7, 7], "num_classes": 10, "image_size": 28, "image_channels": 1, "size": 7, "channels": 4}


@pytest.fixture(scope="module")
def latent() -> dict[str, Any]:
    return registry().build("model", {"name": "dit", **DIT, "input_size": 7, "in_channels": 4}).state_dict()


def behind(path: Path, state: dict[str, Any], codec: dict[str, Any]) -> Path:
    component = {"kind": "model", "name": "dit", "kwargs": {**DIT, "input_size": 7, "in_channels": 4}}
    return checkpoint(path, state, component=component, data=dict(LATENT), parts={"codec": ckpt.Reference(**codec)})


def test_a_codec_beside_a_checkpoint_runs_nothing(vgm: Vgm, tmp_path: Path, latent: dict[str, Any]) -> None:
    header = ckpt.Header(component={"kind": "codec", "name": "evil:f", "kwargs": {}})
    ckpt.save_network(tmp_path / "codec.safetensors", load_file(CODEC), header)
    reference = {"path": "codec.safetensors", "relative": True}
    code, err = ask(vgm, "sample", behind(tmp_path / "m.safetensors", latent, reference))
    harmless(tmp_path, err)
    assert code == 2 and "evil:f" in err, err


def test_what_lies_outside_is_told_or_refused(vgm: Vgm, tmp_path: Path, latent: dict[str, Any]) -> None:
    """A codec of another run has the hash of training, and its place is said; beside the file nothing is said."""
    for folder in ("elsewhere", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "codec.safetensors").write_bytes(CODEC.read_bytes())
    sha, far = ckpt.file_hash(CODEC), str(tmp_path / "elsewhere/codec.safetensors")

    def sample(**codec: Any) -> tuple[int, str]:
        return ask(vgm, "sample", behind(tmp_path / "here/m.safetensors", latent, codec))

    code, err = sample(path=far, relative=False, sha256=sha)
    assert code == 0 and f"codec: {far}, as " in err, err
    code, err = sample(path="codec.safetensors", relative=True, sha256=sha)
    assert code == 0 and "codec:" not in err, err
    assert sample(path="/gone/x.safetensors", sha256=sha)[0] == 0  # moved: ROLE.safetensors beside, by its hash
    assert sample(path="/gone/x.safetensors", sha256="0" * 16)[0] == 1
    (tmp_path / "here/codec.safetensors").unlink()
    refused: list[dict[str, Any]] = [
        {"path": far, "relative": False},
        {"path": far, "relative": False, "sha256": "0" * 16},
        {"path": far, "relative": True, "sha256": sha},
        {"path": "../elsewhere/codec.safetensors", "relative": True, "sha256": sha},
        {"path": "/dev/zero", "relative": False, "sha256": sha},
        {"path": "x" * 5000, "relative": False, "sha256": sha},
        {"path": "a\0b", "relative": True, "sha256": sha},
        {"asset": "../../../../../../../../" + far.removesuffix(".safetensors"), "sha256": sha},
        {"sha256": sha},
        {},
    ]
    for reference in refused[:-1]:
        code, err = sample(**reference)
        assert code in (1, 4) and "may be a bug" not in err, (reference, err)
    os.mkfifo(tmp_path / "here/pipe.safetensors")
    assert sample(path="pipe.safetensors", relative=True)[0] == 4


def test_a_network_is_no_codec(vgm: Vgm, tmp_path: Path, weights: dict[str, Any], latent: dict[str, Any]) -> None:
    checkpoint(tmp_path / "codec.safetensors", weights)
    reference = {"path": "codec.safetensors", "relative": True}
    code, err = ask(vgm, "sample", behind(tmp_path / "m.safetensors", latent, reference))
    assert code == 2 and "no codec but dit" in err, err


def test_files_that_keywords_name_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "remap.npy").write_bytes(b"")
    foreign.tell_files({"remap": [str(tmp_path / "remap.npy")], "other": "not there"}, "x.safetensors")
    assert "remap.npy" in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VgmError, match="no file"):
        foreign.tell_files({"remap": "pipe"}, "x.safetensors")


def test_a_teachers_header_names_no_place_to_write(vgm: Vgm, tmp_path: Path, weights: dict[str, Any]) -> None:
    recipe = {"data": {"path": "theirs", "size": 28, "cache_latents": str(tmp_path / "stolen"), "workers": 9}}
    recipe["pairs"] = {"cache": str(tmp_path / "stolen")}
    teacher = checkpoint(tmp_path / "t.safetensors", weights, recipe=recipe)
    code, out, err = vgm("distill", "dmd", "--teacher", teacher, "--print-config")
    assert code == 0 and "stolen" not in out and "workers: 9" not in out, out
    assert "data: theirs, as " in err and "path: theirs" in out


def test_the_default_reference_is_told(vgm: Vgm, tmp_path: Path, weights: dict[str, Any]) -> None:
    model = checkpoint(tmp_path / "m.safetensors", weights, data={**DATA, "root": str(tmp_path / "theirs")})
    code, err = ask(vgm, "evaluate", model)
    assert code == 2 and f"reference: {tmp_path / 'theirs'}, as " in err, err


# -- pictures ----------------------------------------------------------------------------------------------------------


def picture(vgm: Vgm, tmp_path: Path, state: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    from vgm_cli.images import read_png_metadata

    model = checkpoint(tmp_path / "m.safetensors", state)
    assert vgm("sample", model, "-n", 2, "--out", "p.png")[0] == 0
    return tmp_path / "p.png", json.loads(read_png_metadata(tmp_path / "p.png")["vgm"])


def test_a_picture_runs_nothing(vgm: Vgm, tmp_path: Path, weights: dict[str, Any]) -> None:
    path, said = picture(vgm, tmp_path, weights)
    code, _, err = vgm("rerun", path)
    assert code == 0 and "m.safetensors, as " in err, err
    few = ("os:system", "builtins:open", "evil:")
    changes: list[dict[str, Any]] = [{"sampler": {"name": name, **TARGETS[name]}} for name in few]
    changes += [{"model": "evil:f"}, {"weights": 3}, {"sha256": None}, {"sha256": "0" * 16}, {"sampler": ["euler"]},
                {"sampler": {}}, {"sampler": {"name": ["euler"]}}, {"n": 0}, {"n": "2"}, {"labels": [99, 0]}, {"labels": 3},
                {"steps": "many"}, {"input": 7}, {"seed": None}, {"guidance_interval": [1]}, {"batch_size": 0},
                {"precision": "fp64"}, {"guidance_scale": "high"}]  # fmt: skip
    for change in changes:
        save_png(np.zeros((28, 28), np.uint8), tmp_path / "bad.png", {"vgm": json.dumps({**said, **change})})
        code, _, err = vgm("rerun", tmp_path / "bad.png")
        harmless(tmp_path, err)
        assert code in (1, 2, 3), (change, err)  # 3: made, and not the picture that was given
    for text in ("[]", "3", '"sampler"', "null", "{", "[" * 100_000):
        save_png(np.zeros((28, 28), np.uint8), tmp_path / "bad.png", {"vgm": text})
        code, _, err = vgm("rerun", tmp_path / "bad.png")
        assert code in (1, 2) and "may be a bug" not in err, (text[:9], err)


# -- recipes -----------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "paper": "dit",
    "model": {"name": "dit", "patch_size": 7, "hidden_size": 32, "depth": 1, "num_heads": 2, "learn_sigma": False},
    "objective": {"name": "flow-matching"},
    "sampler": {"name": "euler", "steps": 2},
    "data": {"path": "mnist5k", "size": 28, "channels": 1, "num_classes": 10},
    "train": {"steps": 1, "batch_size": 4, "preview_n": 0, "precision": "fp32"},
}
NODES: dict[str, dict[str, Any]] = {
    "model": {"model": {"name": "evil:f"}},
    "objective": {"objective": {"name": "evil:f"}},
    "sampler": {"sampler": {"name": "evil:f"}},
    "role": {"roles": {"critic": {"name": "evil:f"}}},
    "reward": {"roles": {"reward": {"kind": "reward", "name": "weighted", "terms": {"evil:f": 1.0}}}},
    "function": {"roles": {"reward": {"kind": "reward", "name": "function", "target": "evil:f"}}},
    "reader": {"roles": {"reward": {"kind": "reward", "name": "ocr", "reader": "evil:f"}}},
    "reader without attribute": {"roles": {"reward": {"kind": "reward", "name": "ocr", "reader": "evil"}}},
}


def recipe_with(tmp_path: Path, change: dict[str, Any], name: str = "theirs.yaml") -> Path:
    (tmp_path / name).write_text(yaml.safe_dump({**RECIPE, **change}))
    return tmp_path / name


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("command", ["validate R", "train R --plan", "train R --help-config", "train R --print-config",
                                     "cat R", "cat R --resolved", "train R --out run"])  # fmt: skip
def test_looking_at_a_recipe_runs_nothing(vgm: Vgm, tmp_path: Path, node: str, command: str) -> None:
    path = recipe_with(tmp_path, NODES[node])
    code, out, err = vgm(*command.replace("R", str(path)).split())
    harmless(tmp_path, err)
    assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").iterdir())
    if code:
        assert code == 2 and "evil" in err, err
        assert node == "reader without attribute" or ("theirs.yaml" in err and "--trust" in err), err
    else:
        assert command.startswith(("cat", "train R --print", "train R --help")) and (out or err)


def test_a_base_is_not_trusted_either(vgm: Vgm, tmp_path: Path) -> None:
    recipe_with(tmp_path, NODES["objective"], "below.yaml")
    (tmp_path / "above.yaml").write_text("base: below\ntrain: {steps: 1}\n")
    code, _, err = vgm("validate", tmp_path / "above.yaml")
    harmless(tmp_path, err)
    assert code == 2 and "below.yaml wants to run 'evil:f'" in err, err


def test_a_trusted_recipe_runs_and_says_what(vgm: Vgm, tmp_path: Path) -> None:
    path = recipe_with(tmp_path, {"sampler": {"name": "mine:Walk", "pace": 2}})
    (tmp_path / "mine.py").write_text(
        "from vgm_cli.diffusion.samplers import EulerSampler\nclass Walk(EulerSampler):\n"
        "    def __init__(self, pace: int = 1):\n        super().__init__(steps=pace)\n"
    )
    assert vgm("validate", path)[0] == 2
    for words in (["validate", path], ["train", path, "--help-config"], ["train", path, "--plan"]):
        code, _, err = vgm(*words, "--trust")
        assert code == 0 and "theirs.yaml may run mine:Walk" in err, err
    code, _, err = vgm(
        "train", path, "--trust", "train.preview_n=2", "train.preview_every=1", "--out", tmp_path / "run"
    )
    assert code == 0 and list((tmp_path / "run/samples").glob("*.png")), err
    assert vgm("validate", path)[0] == 2  # the next command trusts nothing
    code, _, err = vgm("sample", tmp_path / "run", "-n", 2, "--out", "x.png")
    assert code == 2 and "wants to run 'mine:Walk'" in err, err
    code, _, err = vgm("sample", tmp_path / "run", "-n", 2, "--out", "x.png", "--sampler", "mine:Walk")
    assert code == 0, err
    sys.modules.pop("mine", None)


def test_what_is_typed_runs(vgm: Vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_with(tmp_path, {})
    (tmp_path / "mine.py").write_text("from vgm_cli.diffusion.samplers import EulerSampler as Walk\n")
    for words in (["sampler.name=mine:Walk"], ["sampler={name: mine:Walk, steps: 3}"]):
        assert vgm("validate", path, *words)[0] == 0
    monkeypatch.setenv("VGM_SAMPLER__NAME", "mine:Walk")
    assert vgm("validate", path)[0] == 0
    sys.modules.pop("mine", None)


def test_a_network_that_is_not_registered_is_not_trained(vgm: Vgm, tmp_path: Path) -> None:
    """Its checkpoints could not be read back; a plugin of one file registers it."""
    path = recipe_with(tmp_path, {})
    code, _, err = vgm("train", path, "model={name: 'mine:Net'}", "--out", tmp_path / "run")
    assert code == 2 and "registered models only" in err and "--plugin" in err, err
    assert not (tmp_path / "run").exists()
    code, _, err = vgm("validate", path, "model.name=vgm_cli.nets.dit:DiT")
    assert code == 0, err  # where a registered one lies


# -- headers -----------------------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "component": [[], "dit", 3, None, {}, {"name": 3}, {"name": ["dit"]}, {"name": "dit", "kwargs": "depth"},
                  {"name": "dit", "kwargs": [1]}, {"name": "dit", "kind": ["model"], "kwargs": {}},
                  {"kind": "model", "name": "dit", "kwargs": {**DIT, "depth": "deep"}},
                  {"kind": "model", "name": "dit", "kwargs": {**DIT, "num_heads": 0}},
                  {"kind": "model", "name": "dit", "kwargs": {**DIT, "hidden_size": -4}},
                  {"kind": "model", "name": "dit", "kwargs": {"preset": 3}},
                  {"kind": "model", "name": "nothing", "kwargs": {}}],
    "view": [3, "denoiser", ["denoiser"], {"name": 3}, {"name": "denoiser"}, {"name": "denoiser", "path": 5},
             {**FLOW, "network": "x"}, {**FLOW, "prediction": ["eps"]}, {**FLOW, "sigma_data": "x"}, {**FLOW, "nope": 1}],
    "codec": [3, "x", ["x"], {"path": 3}, {"asset": 3}, {"asset": "nothing"}, {"relative": True}],
    "parts": [3, ["x"], {"base": 3}, {"base": {"path": 3}}, {"base": {"sha256": 3}}, {"base": {"path": "x", "relative": 1}},
              {"a b": {}}, {"kind": {}}, {"../x": {"path": "y"}}, {"base": {"component": ["x"]}}],
    "recipe": [3, "x", [1], {"sampler": 3}, {"sampler": "euler"}, {"sampler": {"name": 3}}, {"sampler": {}},
               {"sampler": {"name": "euler", "steps": "x"}}, {"guidance_scale": "x", "sampler": {"name": "euler"}},
               {"train": 3, "sampler": {"name": "euler"}}, {"train": {"precision": 3}, "sampler": {"name": "euler"}}],
    "data": [3, "x", [1], {"sample_shape": 3}, {"sample_shape": ["x"]}, {"sample_shape": [0, 1]},
             {"num_classes": "ten"}, {"class_names": {"a": 1}}, {"num_classes": -1}, {"image_size": "28"}],
    "step": ["x", None, -1, [1]],
    "images": ["x", 1.5],
    "weights": [3, None, ["raw"]],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_header_entries_of_the_wrong_type_are_one_sentence(
    vgm: Vgm, tmp_path: Path, weights: dict[str, Any], key: str
) -> None:
    for value in WRONG[key]:
        changed = {**DATA, **value} if key == "data" and isinstance(value, dict) else value
        path = tmp_path / "x.safetensors"
        metadata = ckpt.Header({"kind": "model", "name": "dit", "kwargs": DIT}, FLOW, data=dict(DATA)).metadata()
        metadata["vgm.recipe"] = json.dumps({"sampler": {"name": "euler", "steps": 1}})
        metadata[f"vgm.{key}"] = json.dumps(changed)
        ckpt.atomic.save_safetensors(weights, path, metadata)
        for verb in ("sample", "inspect") if key == "component" else ("sample",):
            code, err = ask(vgm, verb, path)
            assert "may be a bug" not in err and "Traceback" not in err, (verb, value, err)
            assert code in (1, 2, 4) if verb == "sample" else code in (0, 1, 2), (verb, value, err)


def test_views_are_named_by_the_registry() -> None:
    """Headers written before views were registered say where they lay, later ones a paper's own name: both are read."""
    boundary = {"denoiser": FLOW, "sigma_min": 0.01}
    old = {
        "vgm_plugins.consistency.function:ConsistencyFunction": boundary,
        "consistency": boundary,
        "vgm_plugins.dmd.generator:Generator": {"denoiser": FLOW, "times": [0.9]},
        "dmd": {"denoiser": FLOW, "times": [0.9]},
    }
    for name, keywords in old.items():
        net = registry().build("model", {"name": "dit", **DIT})
        view = ckpt.build_view(net, {"name": name, **keywords})
        assert type(view).__name__ == "FlowMap" and view.boundary == ("skip" if keywords is boundary else "none")
        assert view.end() == pytest.approx(0.01 / 1.01 if keywords is boundary else 0.0)
        again = ckpt.build_view(net, view.view())
        assert type(again) is type(view) and again.view() == view.view() and ":" not in view.view()["name"]
    with pytest.raises(VgmError, match="wants to run"):
        ckpt.build_view(net, {"name": "vgm_plugins.dmd.generator:GeneratorSampler"})


# -- the world around --------------------------------------------------------------------------------------------------


def test_processes_do_not_look_in_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr("torch.distributed.run.main", lambda args: seen.append(os.environ.get("PYTHONSAFEPATH")))
    assert processes.relaunch(2, 1, None, ["ls"]) == 0
    assert seen == ["1"]


def test_a_strangers_repository_runs_nothing(tmp_path: Path) -> None:
    git: Any = lambda *args: subprocess.run(["git", *args], cwd=tmp_path, capture_output=True, check=True)
    git("init", "-q")
    git("config", "user.email", "a@b")
    git("config", "user.name", "a")
    (tmp_path / ".gitattributes").write_text("*.txt filter=mark\n")
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt", ".gitattributes")
    git("commit", "-qm", "first")
    assert git_state()["dirty"] is False
    (tmp_path / "a.txt").write_text("b")
    git("config", "filter.mark.clean", f"sh -c 'touch {tmp_path / MARK}; cat'")
    git("config", "core.fsmonitor", f"touch {tmp_path / MARK};")
    state = git_state()
    assert state["dirty"] is True and len(state["sha"]) == 40
    harmless(tmp_path)
