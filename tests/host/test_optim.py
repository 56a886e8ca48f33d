"""Optimizers: groups by pattern, parts of networks, schedules as official code has them, skipped updates, averages."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vgm_cli import recipe as recipes
from vgm_cli.api import Batch, ObjectiveBase, Phase, Step
from vgm_cli.engine.train import optim
from vgm_cli.engine.train.ema import EMA
from vgm_cli.engine.train.loop import train
from vgm_cli.errors import VgmError
from vgm_cli.hookspecs import Component
from vgm_cli.registry import registry
from vgm_cli.settings import Optimizer, Skip


def weights(run: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


# -- schedules ---------------------------------------------------------------------------------------------------------

W, K, LR = 40, 2000, 3e-4  # warm-up, steps, peak


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def var_lin0(k: int) -> float:
    """VAR utils/lr_control.py lr_wd_annealing, sche=lin0, wp0=0.005, wpe=0.01: the last step is at the end."""
    if k < W:
        return 0.005 + 0.995 * k / W
    passed = (k - W) / (K - 1 - W)
    return 1.0 if passed < 0.05 else 0.01 + 0.99 * (1 - passed) / 0.95


def mar_cosine(k: int) -> float:
    """MAR util/lr_sched.py with min_lr 0.1 of lr, epochs told in steps: the first step has no rate at all."""
    return k / W if k < W else 0.1 + 0.9 * cosine((k - W) / (K - W))


def randar(k: int) -> float:
    r = cosine((k - W) / (K - W))
    return k / W if k < W else 0.05 * (1 - r) + r


def halton(k: int) -> float:
    """Halton-MaskGIT Trainer/abstract_trainer.py: constant, then the last tenth of a cosine with a floor of 1 %."""
    if k < W:
        return k / W
    return max(cosine((k - 0.9 * K) / (0.1 * K)), 0.01) if k > 0.9 * K else 1.0


START = (W + 0.05 * (K - 1 - W)) / (K - 1)  # VAR's 5 % count from the end of the warm-up
SCHEDULES: dict[str, tuple[Callable[[int], float], dict[str, Any]]] = {
    "var": (
        var_lin0,
        {"schedule": "linear", "warmup_from": 0.005, "decay_from": START, "final_lr": 0.01 * LR, "reach_final": True},
    ),
    "mar": (mar_cosine, {"schedule": "cosine", "warmup_from": 0, "final_lr": 0.1 * LR}),
    "randar": (randar, {"schedule": "cosine", "warmup_from": 0, "final_lr": 0.05 * LR}),
    "halton": (halton, {"schedule": "cosine", "warmup_from": 0, "decay_from": 0.9, "least_lr": 0.01 * LR}),
    "plateaus": (
        lambda k: (k + 1) / W if k < W else 1.0 if k < 500 else 0.1 if k < 900 else 0.01,
        {"schedule": "steps", "milestones": {500: 0.1, 900: 0.01}},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_the_official_ones(name: str) -> None:
    """Every step of a run against the official formula."""
    official, keys = SCHEDULES[name]
    setting = Optimizer(lr=LR, warmup=W, **keys)
    ours = [optim.learning_rate(setting, k, K) for k in range(K)]
    assert ours == pytest.approx([LR * official(k) for k in range(K)], rel=1e-9, abs=1e-18)


def test_weight_decay_follows_half_a_cosine() -> None:
    """VAR's: from wd at the first step to wd_end at the last one."""
    setting = Optimizer(weight_decay=0.05, final_weight_decay=0.08, reach_final=True)
    want = [0.08 - 0.03 * cosine(k / (K - 1)) for k in range(K)]
    assert [optim.weight_decay(setting, k, K) for k in range(K)] == pytest.approx(want, rel=1e-12)
    assert optim.weight_decay(Optimizer(weight_decay=0.1), 7, K) == 0.1


# -- groups ------------------------------------------------------------------------------------------------------------


def parameters(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"model.{name.replace('__', '.')}": torch.zeros(shape) for name, shape in shapes.items()}


def decayed(params: dict[str, torch.Tensor], **keys: Any) -> set[str]:
    groups = optim.group(params, Optimizer(weight_decay=0.1, **keys))
    assert sorted(n for g in groups for n in g.names) == sorted(params), "each parameter is in one group"
    return {n.removeprefix("model.") for g in groups if g.weight_decay is None for n in g.names}


def test_patterns_of_published_recipes() -> None:
    """MAR: no decay in the head and of 1-D tensors, but of embeddings; VAR: none of what its code lists by name."""
    mar = parameters(mask_token=(1, 1, 8), diffloss__net__weight=(8, 8), decoder__weight=(8, 8), norm__weight=(8,))
    keys = {"decay": "matrices", "groups": [{"match": r"^model\.diffloss\.", "weight_decay": 0}]}
    assert decayed(mar, **keys) == {"mask_token", "decoder.weight"}
    var = parameters(pos_1LC=(1, 9, 8), class_emb__weight=(5, 8), lvl_embed__weight=(3, 8), ffn__bias=(8,))
    var |= parameters(blocks__0__ada_gss=(1, 6, 8), attn__scale_mul_1H11=(1, 2, 1, 1), pos_start=(1, 1, 8))
    names = "pos_1LC|pos_start|lvl_embed|ada_gss|scale_mul|gamma|beta"
    keys = {"decay": "matrices", "groups": [{"match": names, "weight_decay": 0}]}
    # VAR's list has names (gamma) that a network need not have: a pattern as a whole has to match
    assert decayed(var, **keys) == {"class_emb.weight"}


def test_the_first_group_that_matches_has_a_parameter() -> None:
    params = parameters(head__weight=(2, 2), head__bias=(2,), body__weight=(2, 2), body__bias=(2,))
    setting = Optimizer(
        lr=1.0,
        weight_decay=0.1,
        decay="matrices",
        groups=[{"match": "head", "lr": 10}, {"match": "bias$", "lr": 2, "weight_decay": 0.3}],
    )
    found = {n.removeprefix("model."): (g.lr, g.weight_decay) for g in optim.group(params, setting) for n in g.names}
    assert found == {"head.weight": (10, None), "head.bias": (10, 0.0), "body.weight": (1, None), "body.bias": (2, 0.3)}
    groups = optim.group(params, setting)
    made = optim.make_optimizer(
        [{"params": [params[n] for n in g.names]} for g in groups], setting, torch.device("cpu")
    )
    optim.Optimizing(None, made, groups, setting, 10).begin(0, {"lr": 0.5, "weight_decay": 0.7})
    assert [(g["lr"], g["weight_decay"]) for g in made.param_groups] == [(5, 0.7), (5, 0.0), (1, 0.3), (0.5, 0.7)]


def test_a_group_is_left_out_of_training(tiny: Path, tmp_path: Path, vgm: Any) -> None:
    """lr: 0 for the first block: it stays, the others move."""
    own = ("train.steps=2", "train.save_every=1", "optimizer.groups=[{match: 'model.blocks.0', lr: 0}]")
    code, _, err = vgm("train", tiny, *own, "--out", tmp_path / "run")
    assert code == 0, err
    one, two = (weights(tmp_path / "run", step) for step in (1, 2))
    moved = {k for k in one if not torch.equal(one[k], two[k])}
    assert moved and not [k for k in moved if k.startswith("blocks.0.")]


WRONG = {
    "optimizer.groups=[{match: nothing}]": "matches no trained parameter",
    "optimizer.groups=[{match: '('}]": "no regular expression",
    "optimizer.groups=[{match: head, rate: 2}]": "unknown key 'rate'",
    "optimizer.groups=[{lr: 2}]": "match",
    "optimizer.schedule=steps": "belong together",
    "optimizer.milestones={10: 0.1}": "belong together",
    "optimizer.warmup_from=2": "warmup_from",
    "train.skip={over: 3}": "unknown key 'over'",
    "train.skip={after: 3}": "above",
    "train.skip={above: 3, norm: largest}": "norm",
}


@pytest.mark.parametrize("assignment", WRONG)
def test_mistakes_are_told_before_the_first_step(assignment: str, tiny: Path, tmp_path: Path, vgm: Any) -> None:
    for verb in ("validate", "train"):
        code, _, err = vgm(verb, tiny, assignment, *(("--out", tmp_path / "run") if verb == "train" else ()))
        assert code == 2 and WRONG[assignment] in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


# -- skipped updates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "clip", "index", "taken"),
    [
        (Skip(above=6.0), None, 0, True),  # two tensors of norms 3 and 4: 5 in all, a sum of 7
        (Skip(above=5.0), None, 0, False),
        (Skip(above=6.0, norm="sum"), None, 0, False),
        (Skip(above=6.0, norm="sum", after=3), None, 2, True),
        (Skip(above=6.0, norm="sum", after=3), None, 3, False),
        (Skip(above=1.5, norm="sum"), 1.0, 0, True),  # after clipping: 0.6 + 0.8
    ],
)
def test_an_outlying_update_is_left_out(skip: Skip, clip: float | None, index: int, taken: bool) -> None:
    root = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))})
    root["a"].grad, root["b"].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    accelerator = SimpleNamespace(
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_, unscale_gradients=lambda optimizer: None
    )
    made = torch.optim.SGD(root.parameters(), lr=1.0)
    logs = optim.Optimizing(root, made, [], Optimizer(), 10).step(accelerator, index, clip, skip)
    assert bool(root["b"].item()) == taken and logs["skipped"].item() == (not taken)
    assert root["a"].grad is None, "gradients are forgotten either way"


def test_a_run_tells_what_it_skipped(tiny: Path, tmp_path: Path) -> None:
    r = recipes.load(str(tiny), None, ["train.skip={above: 1e-9, after: 2}", "train.save_every=2"])
    train(r, tmp_path / "run")
    two, eight = weights(tmp_path / "run", 2), weights(tmp_path / "run", 8)
    assert all(torch.equal(two[k], eight[k]) for k in two)
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in rows] == [0, 0] + [1] * 6
    assert not torch.equal(*(weights(tmp_path / "run", s, "ema-0.9")["final_layer.linear.weight"] for s in (2, 8)))


# -- parts of a network ------------------------------------------------------------------------------------------------


class Parts(ObjectiveBase):
    """Trains a part of the network, whose rate is nought after two steps."""

    def __init__(self, model: nn.Module, trains: str = "model.final_layer"):
        self.networks, self.trains = {"model": model}, trains

    def phases(self) -> list[Phase]:
        return [Phase("main", (self.trains,))]

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        network = self.networks["model"]
        assert not network.training and network.final_layer.training
        t = step.rand(len(batch["x"]), "t")
        return (network(batch["x"], t, **batch["cond"]) - step.randn(batch["x"].shape, "noise")).square().mean(), {}

    def schedule(self, step: Step) -> dict[str, dict[str, float]]:
        return {"main": {"lr": 0.0}} if step.index >= 2 else {}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    component = Component(kind="objective", name="parts", target=f"{__name__}:Parts", verbs=("train",))
    monkeypatch.setitem(registry().components, ("objective", "parts"), component)
    monkeypatch.setitem(registry().owners, ("objective", "parts"), "vgm")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Parts.__module__])


def test_a_part_of_a_network_trains_alone(tiny: Path, tmp_path: Path, parts: None) -> None:
    """Phase.trains with a dotted name; weight decay does not touch the rest; an objective's schedule ends it."""
    own = ["objective=parts", "train.steps=3", "train.save_every=1", "optimizer.weight_decay=0.1"]
    train(recipes.load(str(tiny), None, own), tmp_path / "run")
    one, two, three = (weights(tmp_path / "run", s) for s in (1, 2, 3))
    moved = {k for k in one if not torch.equal(one[k], two[k])}
    assert moved and all(k.startswith("final_layer.") for k in moved)
    assert all(torch.equal(two[k], three[k]) for k in two)
    train(recipes.load(str(tiny), None, own), tmp_path / "parts", stop_after=1)
    train(recipes.load(str(tiny), None, own), tmp_path / "parts", resume=True)
    again = weights(tmp_path / "parts", 3)
    assert all(torch.equal(again[k], three[k]) for k in three)


def test_a_part_that_is_not_there_is_told(tiny: Path, parts: None) -> None:
    for trains, words in (("model.final", "final_layer"), ("student", "unknown role 'student'")):
        r = recipes.load(str(tiny), None, [f"objective={{name: parts, trains: {trains}}}"])
        with pytest.raises(VgmError) as e:
            train(r)
        assert e.value.code == 2 and words in f"{e.value.message} {e.value.hint}"


# -- averages at every k-th step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        ({"decay": 0.9, "every": 4}, 0.9),
        ({"half_life": 100, "every": 4}, 0.5**0.4),
        ({"sigma_rel": 0.1, "every": 4}, (1 - 4 / 8) ** (6.94 + 1)),  # EDM2: gamma 6.94 for a width of 10 %
    ],
)
def test_averages_at_every_kth_step(config: dict[str, float], decay: float) -> None:
    network = nn.Linear(1, 1)
    average = EMA(network, config, batch_size=10)
    for step in range(1, 8):
        before = average.average["weight"].clone()
        average.update()
        nn.init.constant_(network.weight, float(step))
        assert step == 4 or torch.equal(before, average.average["weight"])
    assert average.decay() == pytest.approx(decay, rel=2e-2)
