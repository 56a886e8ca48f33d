"""Training, sampling and golden cases on the pretended device of pretend.py. Run by tests/host/test_gpu_script.py in a
process of its own: the device must be known before torch makes its autograd threads."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vgm_cli import recipe as recipes
from vgm_cli.api import Request, generators
from vgm_cli.engine.train import loop as trainers
from vgm_cli.testing.golden import GoldenCase, assert_close

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import pretend

pytestmark = pytest.mark.skipif(not pretend.available(), reason="this torch has no devices written in Python")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[pretend.Pretend]:
    """Inside, whatever asks accelerate for a device gets the pretended one."""
    from accelerate.state import AcceleratorState, PartialState

    with pretend.Pretend() as mode:
        make = trainers.make_accelerator

        def made(*args: Any) -> Any:
            AcceleratorState._reset_state(True)
            accelerator = make(*args)
            for state in (PartialState, AcceleratorState):
                state._shared_state["device"] = mode.device
            return accelerator

        monkeypatch.setattr(trainers, "make_accelerator", made)
        yield mode
    AcceleratorState._reset_state(True)


def test_the_pretended_device_has_a_cards_rules() -> None:
    with pretend.Pretend() as mode:
        layer = torch.nn.Linear(3, 2).to(mode.device)
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(1, 3))
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, generator=torch.Generator(), device=mode.device)
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(layer.weight.detach())
        mode.waits.clear()
        out = layer(torch.ones(1, 3, device=mode.device)).sum()
        out.backward()
        assert not mode.waits
        assert float(out) == float(out.detach().cpu())
        assert sum(mode.waits.values()) == 2  # a value read, a tensor copied back
    assert torch.ones(1).device.type == "cpu"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vgm_cli.data import open_dataset

    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    found = open_dataset("mnist5k").gather(range(0, 5000, 312))
    np.savez(path, images=found["x"].permute(0, 2, 3, 1).numpy(), labels=found["label"].numpy())
    return path


# what a step may wait for: a recipe's name, and where
KNOWN = {
    "flow-grpo/mnist-fast": ("vgm_cli/rewards/", "plugins/flow_grpo/"),  # what is trained on depends on the rewards
    "vqgan/small-tokenizer": ("vgm_cli/losses/first_stage.py",),  # how much of the codebook was used lately
}
EVERY = [n for n in sorted(recipes.shipped()) if n.split("/")[1].startswith(("mnist", "small"))]
ONCE = ["dmd/mnist", "llamagen/mnist", "sit/mnist", "stylegan/mnist-ada", "vae/mnist-bernoulli"]  # the others: -m slow


@pytest.mark.parametrize("name", [n if n in ONCE else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_trains_on_a_device_without_waiting(
    name: str, tmp_path: Path, digits: Path, pretended: pretend.Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing mixes devices, and once under way no step makes the CPU wait but where it has to."""
    steady: Counter[str] = Counter()
    update = trainers.update

    def watched(t: Any, index: int, batches: Any) -> None:
        pretended.waits.clear()
        update(t, index, batches)
        if index == 2:
            steady.update(pretended.waits)

    monkeypatch.setattr(trainers, "update", watched)
    batch = 12 if name.startswith("flow-grpo") else 4
    own = ["train.steps=3", f"train.batch_size={batch}", "train.preview_n=0", "train.log_every=3", "train.ema=[0.9]"]
    recipe = recipes.load(name, None, [*own, "train.precision=fp32", f"data.path={digits}"])
    roles = None
    if "pairs" in recipe.roles():
        roles = {"pairs": {"z": torch.randn(8, 1, 28, 28), "x": torch.randn(8, 1, 28, 28), "y": torch.arange(8)}}
    trainers.train(recipe, tmp_path / "run", quiet_end=True, roles=roles)
    waits = {k: n for k, n in steady.items() if not any(place in k for place in KNOWN.get(name, ()))}
    assert not waits


SAMPLED_SLOWLY = ("sit/mnist", "dit/mnist", "consistency/mnist", "llamagen/mnist")


@pytest.mark.parametrize(
    "name",
    ["stylegan/mnist", *(pytest.param(n, marks=pytest.mark.slow) for n in SAMPLED_SLOWLY)],
)
def test_samples_on_a_device_are_those_of_the_cpu(name: str, pretended: pretend.Pretend) -> None:
    import jobs

    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.registry import registry

    recipe, made, facts = jobs.built(name, "cpu")
    found = []
    for device in (torch.device("cpu"), pretended.device):
        network = made.networks["model"].eval().to(device)
        view = ckpt.build_view(network, made.objective.view())
        request = Request(
            shape=facts.sample_shape,
            generators=generators(range(2)),
            cond={"y": torch.arange(2).to(device)},
            steps=2,
            guidance_scale=recipe.config.get("guidance_scale"),
            device=device,
            codec=made.codec,
        )
        with torch.no_grad():
            x = registry().build(
                "sampler",
                {**recipe.config["sampler"], "steps": 2}
                if "steps" in recipe.config["sampler"]
                else dict(recipe.config["sampler"]),
            )(view, request)
        assert x.device.type == device.type
        found.append(x.cpu())
    assert_close(found[1], found[0], 1e-3)  # attention goes another way there


@pytest.mark.parametrize("paper", ["dit", "adm-unet", "llamagen", "glow"])
def test_golden_cases_compute_where_they_are_told(paper: str) -> None:
    """--golden-device: the check passes there, and the network was there."""
    import importlib

    sys.path.insert(0, str(ROOT / "tests" / "plugins"))
    checks = importlib.import_module(f"test_{paper.replace('-', '_')}").golden
    path = sorted((ROOT / "tests/golden" / paper).glob("*.safetensors"), key=lambda p: p.stat().st_size)[0]
    with pretend.Pretend() as mode:
        case = GoldenCase(path, mode.device)
        assert all(t.device.type == pretend.NAME for t in (*case.inputs.values(), *case.state.values()))
        checks.run(case)
