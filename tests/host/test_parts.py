"""Networks that are given networks, roles that are checkpoints, and files that older versions wrote."""

from __future__ import annotations

import functools
import gzip
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vgm_cli import recipe as recipes
from vgm_cli.engine import build, parts
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import VgmError
from vgm_cli.nn.copying import copy_weights
from vgm_cli.registry import CODE, registry, strings

Vgm = Callable[..., tuple[int, str, str]]

PLUGIN = """
from vgm_cli.hookspecs import Component, hookimpl


@hookimpl
def vgm_components():
    return [Component(kind="model", name="branch", target="branch_net:Branch", denoiser=True)]
"""
NETWORK = '''
from torch import nn

from vgm_cli.nets.dit import DiTBlock
from vgm_cli.nn.copying import copy_weights


class Branch(nn.Module):
    """A frozen SiT and, beside its blocks, a trainable copy of the first of them, which starts without effect."""

    def __init__(self, base: nn.Module, hidden_size: int = 32, num_heads: int = 2, depth: int = 1):
        super().__init__()
        self.base = base
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, 4.0) for _ in range(depth))
        copy_weights(base, self.blocks, "blocks.")
        self.out = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t, y=None):
        tokens, c = self.base.embed(x, t, y)
        side = tokens
        for block in self.blocks:
            side = block(side, c)
        for block in self.base.blocks:
            tokens = block(tokens, c)
        out = self.base.unpatchify(self.base.final_layer(tokens + self.out(side), c))
        return out[:, : self.base.in_channels]
'''
BASE = """
paper: base
model: {name: sit, patch_size: 7, hidden_size: 32, depth: 2, num_heads: 2}
objective: {name: flow-matching}
sampler: {name: sit-ode, method: heun2, steps: 2}
data: {path: mnist5k, labels: false}
optimizer: {lr: 1.0e-2}
train: {steps: 3, batch_size: 8, precision: fp32, save_every: 2, preview_n: 4, preview_every: 2, log_every: 1, ema: [0.5]}
"""
BRANCH = """
base: base.yaml
paper: branch
model: {name: branch}
roles:
  base: {name: sit, patch_size: 7, hidden_size: 32, depth: 2, num_heads: 2}  # what is checked without a checkpoint
train: {steps: 4}
"""


@pytest.fixture
def branch(tmp_path: Path, vgm: Vgm, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """vgm with the plugin, in a folder that has the recipes and the run `base`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in (("plugin.py", PLUGIN), ("branch_net.py", NETWORK), ("base.yaml", BASE), ("b.yaml", BRANCH)):
        (tmp_path / name).write_text(textwrap.dedent(text))
    code, _, err = vgm("train", "base.yaml", "--out", "base")
    assert code == 0, err

    def call(*words: object) -> tuple[int, str, str]:
        return vgm("--plugin", "plugin.py", *words)

    return call


def weights_of(run: Path | str, name: str = "model", step: int = 4) -> dict[str, torch.Tensor]:
    return ckpt.read_tensors(Path(run) / f"checkpoints/step-{step:08d}/{name}.safetensors")[0]


def test_a_network_receives_a_network(branch: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Trained beside its frozen base, which its checkpoints name and do not hold; resumed bit for bit, sampled,
    converted, inspected; a base that moved or changed is one sentence."""
    numbers = branch("validate", "b.yaml", "--json")
    assert numbers[0] == 0, numbers[2]
    code, _, err = branch("train", "b.yaml", "--out", "stand-in")
    assert code == 2 and "'base', which is no checkpoint" in err and "roles.base={run: RUN}" in err
    words = ("train", "b.yaml", "roles.base.run=base")
    code, _, err = branch(*words, "roles.base.depth=3", "--out", "x")
    assert code == 2 and "it takes no 'depth'" in err
    for out, stop in (("whole", 4), ("parts", 2)):
        code, _, err = branch(*words, "--out", out, "--stop-after", stop)
        assert code == 0, err
    assert (tmp_path / "whole/samples/step-000004.png").is_file()
    code, _, err = branch("train", "--out", "parts", "--resume")
    assert code == 0, err
    for name in ("model", "ema-0.5", "trainer"):
        a, b = weights_of("whole", name), weights_of("parts", name)
        assert a.keys() == b.keys() and not [k for k in a if not torch.equal(a[k], b[k])], name
        assert not [k for k in a if "base." in k], name
    base = ckpt.resolve("base").resolve()
    before, after = ckpt.read_tensors(base)[0], weights_of("whole")
    assert not torch.equal(after["out.weight"], torch.zeros(32, 32)), "nothing was learned"
    assert after["blocks.0.mlp.fc1.weight"].sub(before["blocks.0.mlp.fc1.weight"]).abs().max() < 0.1
    reference = ckpt.read_header(ckpt.resolve("whole")).parts["base"]
    assert reference == parts.Reference(path=str(base), sha256=ckpt.file_hash(base), component="sit")

    # without a step the branch has no effect: what it samples is what its base samples
    code, _, err = branch(*words, "--out", "still", "optimizer.lr=0", "train.steps=1")
    assert code == 0, err
    for run in ("still", "base"):
        code, _, err = branch("sample", run, "-n", 2, "--out", f"{run}.npz")
        assert code == 0, err
        assert run == "base" or f"base: {base}, as " in err
    assert (tmp_path / "still.npz").stat().st_size == (tmp_path / "base.npz").stat().st_size
    import numpy as np

    assert np.array_equal(np.load("still.npz")["arr_0"], np.load("base.npz")["arr_0"])
    code, out, err = branch("convert", "whole", "elsewhere/converted.safetensors")
    assert code == 0, err
    code, out, _ = branch("inspect", "elsewhere/converted.safetensors", "--json")
    assert code == 0 and json.loads(out)["parts"]["base"]["sha256"] == reference.sha256
    assert branch("sample", "elsewhere/converted.safetensors", "-n", 1, "--out", "c.png")[0] == 0

    moved = tmp_path / "moved.safetensors"
    base.rename(moved)
    code, _, err = branch("sample", "whole", "-n", 1, "--out", "m.png")
    assert code == 4 and f"the base of ema-0.5.safetensors is missing: {base}" in err
    assert f"copy it to {tmp_path / 'whole/base.safetensors'}" in err
    code, _, err = branch("train", "--out", "parts", "--resume", "train.steps=5")
    assert code == 2 and "the base is missing" in err and "roles.base.run=" in err
    code, _, err = branch("train", "--out", "parts", "--resume", "train.steps=5", f"roles.base.run={moved}")
    assert code == 0, err
    (tmp_path / "whole/base.safetensors").write_bytes(moved.read_bytes())
    assert branch("sample", "whole", "-n", 1, "--out", "m.png")[0] == 0
    ckpt.save_network(base, {k: v + 1 for k, v in before.items()}, ckpt.read_header(moved))
    code, _, err = branch("sample", "whole", "-n", 1, "--out", "m.png", "--overwrite")
    assert code == 1 and "is not the one" in err
    code, _, err = branch("train", "--out", "parts", "--resume", "train.steps=6", f"roles.base.run={base}")
    assert code == 2 and "has other bytes" in err


def test_parts_stay_out_of_a_state_and_in_evaluation() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    holder = torch.nn.ModuleDict({"base": parts.freeze(base), "own": torch.nn.Linear(3, 2)})
    parts.leave_out(holder, {"base": base})
    state = holder.state_dict()
    assert set(state) == {"own.weight", "own.bias"}
    holder.train()
    assert holder.training and not base.training and not base[1].training
    assert not any(p.requires_grad for p in base.parameters())
    kept = base[0].weight.clone()
    holder.load_state_dict({k: torch.ones_like(v) for k, v in state.items()})
    assert torch.equal(base[0].weight, kept) and holder["own"].weight.eq(1).all()
    with pytest.raises(RuntimeError, match=r"own\.bias"):
        holder.load_state_dict({"own.weight": state["own.weight"]})
    around = torch.nn.ModuleDict({"model": holder})
    assert set(around.state_dict()) == {"model.own.weight", "model.own.bias"}


def test_a_copy_starts_as_its_source() -> None:
    source = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 1)})
    target = torch.nn.Linear(3, 3)
    copy_weights(source, target, "body.")
    assert (
        torch.equal(target.weight, source["body"].weight)
        and target.weight.data_ptr() != source["body"].weight.data_ptr()
    )
    with pytest.raises(VgmError, match=r"head\.weight is .*not"):
        copy_weights(source, target, "head.")
    with pytest.raises(VgmError, match="no such tensor"):
        copy_weights(source, target)


def test_roles_do_not_need_each_other(tmp_path: Path) -> None:
    class Needy(torch.nn.Module):
        def __init__(self, one: Any, two: Any) -> None:
            super().__init__()

    r = registry()
    from vgm_cli.hookspecs import Component

    r.components["model", "needy"] = Component(kind="model", name="needy", target="dit")
    try:
        file = tmp_path / "x.yaml"
        node = {"name": "needy"}
        file.write_text(yaml.safe_dump({"base": "sit/mnist", "codec": None, "roles": {"one": node, "two": node}}))
        import vgm_cli.engine.build as module

        patch = pytest.MonkeyPatch()
        real = module.load_target
        patch.setattr(module, "load_target", lambda t, n="": Needy if t == "dit" else real(t, n))
        recipe = recipes.load(str(file))
        with pytest.raises(VgmError, match="need each other: one, two"):
            build.build_objective(recipe, build.declared_facts(recipe.node("data")))
        patch.undo()
    finally:
        del r.components["model", "needy"]


# -- what every paper writes, and what it wrote --------------------------------------------------------------------------


@functools.cache
def first_recipes() -> dict[str, str]:
    """{objective: the first shipped recipe with it}, small ones before published ones."""
    found: dict[str, str] = {}
    for name in sorted(recipes.shipped(), key=lambda n: (not recipes.starter(n), n)):
        config = recipes.load_file(recipes.shipped()[name], name)[0]
        found.setdefault(config["objective"]["name"], name)
    return found


@pytest.mark.parametrize("objective", sorted(first_recipes()))
def test_headers_name_registered_components(objective: str) -> None:
    """No path of a Python module stands in what a checkpoint says of itself."""
    recipe = recipes.load(first_recipes()[objective])
    facts = build.declared_facts(recipe.node("data"))
    given: dict[str, Any] = {}
    if recipe.config.get("codec"):
        planned = build.planned_codec(recipe, facts)
        given["codec"], facts = planned.codec, planned.facts
    with torch.device("meta"):
        built = build.build_objective(recipe, facts, {**given, **build.plan_roles(recipe, facts)})
    view = built.objective.view()
    ckpt.check_view(view)
    for role in {"model", *(r for phase in built.objective.phases() for r in phase.trains)} & built.components.keys():
        component = built.components[role]
        assert (component["kind"], component["name"]) in registry().components
        header = ckpt.Header(component, view if role == "model" else None, built.parts.get(role, {}), recipe.config)
        said = ckpt.Header.parse(header.metadata(), Path("x"))
        assert said.component == json.loads(json.dumps(component)) and said.parts == header.parts
        assert not [s for v in (said.component, said.view) for s in strings(v) if CODE.fullmatch(s)]


OLD: dict[str, dict[str, Any]] = json.loads(
    gzip.decompress((Path(__file__).parent / "old_checkpoints.json.gz").read_bytes())
)


@pytest.mark.parametrize("name", sorted(OLD))
def test_checkpoints_of_the_first_version_are_read(name: str, vgm: Vgm, tmp_path: Path) -> None:
    """Headers, names and shapes as version 0.1.0 wrote them before parts and roles; the values are new."""
    metadata, shapes = OLD[name]["metadata"], OLD[name]["shapes"]
    component = json.loads(metadata["vgm.component"])
    torch.manual_seed(0)
    network = registry().build(component["kind"], {"name": component["name"], **component["kwargs"]})
    state = network.state_dict()
    assert {k: "x".join(map(str, v.shape)) for k, v in state.items()} == shapes
    file = tmp_path / "old.safetensors"
    ckpt.atomic.save_safetensors({k: v.contiguous().clone() for k, v in state.items()}, file, metadata)
    header = ckpt.read_header(file)
    old_codec = json.loads(metadata["vgm.codec"])
    assert {k: r.record() for k, r in header.parts.items()} == ({"codec": old_codec} if old_codec else {})
    loaded = ckpt.load(file)
    assert (loaded.codec is not None) == bool(old_codec)
    if header.is_codec:
        assert ckpt.read_codec(file).latent_shape((1, 28, 28))
        return
    code, _, err = vgm("sample", file, "-n", 1, "--out", tmp_path / "x.png", "--json")
    assert code == 0, err


@pytest.mark.parametrize(
    "name, role", [("dmd", "teacher"), ("rectified-flow-2", "teacher"), ("flow-grpo", "reference")]
)
def test_runs_of_the_first_version_go_on(name: str, role: str, tmp_path: Path) -> None:
    """The recipe that such a run holds, under today's names."""
    old = json.loads(OLD[name]["metadata"]["vgm.recipe"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    recipe = recipes.stored(tmp_path)
    assert not {"teacher", "pairs"} & recipe.config.keys()
    node = recipe.config["roles"][role]
    assert node == {
        "run": old["teacher"]["weights"],
        "sha256": old["teacher"]["sha256"],
        "view": old["teacher"]["view"],
    }
    assert recipe.start() == old["teacher"]["weights"] and recipe.config["model"] == old["model"]


def test_old_keys_of_a_recipe_are_understood(tmp_path: Path) -> None:
    """In files and on the command line; today's names say the same."""
    (tmp_path / "mine.yaml").write_text(
        "base: dmd/mnist\nteacher: {name: dit, patch_size: 7, view: {path: linear}}\npairs: {count: 8}\n"
    )
    words = ["teacher.hidden_size=32", "pairs.steps=3", "roles.teacher.depth=2"]
    recipe = recipes.load(str(tmp_path / "mine.yaml"), None, words)
    teacher = {"name": "dit", "patch_size": 7, "hidden_size": 32, "depth": 2}
    assert recipe.config["roles"]["teacher"] == {**teacher, "view": {"path": "linear"}}
    assert recipe.config["model"] == teacher == recipe.config["roles"]["fake_score"]
    pairs = recipe.config["roles"]["pairs"]
    assert (pairs["kind"], pairs["count"], pairs["steps"]) == ("pairs", 8, 3)
    assert recipe.origins["model.hidden_size"] == recipe.origins["roles.teacher.hidden_size"] == "command line"
    none = recipes.load("rectified-flow", "mnist-reflow", ["pairs=null"])
    assert none.config["roles"]["pairs"] is None
    reference = recipes.load("flow-grpo", None, ["teacher.hidden_size=32", "~codec"])
    assert reference.config["roles"]["reference"]["hidden_size"] == reference.config["model"]["hidden_size"] == 32
