"""The toolkit from Python: what docs/python.md says, and that it is the command line's results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vgm_cli
from vgm_cli import VgmError
from vgm_cli.images import to_uint8

PAGE = (Path(__file__).parents[2] / "docs/python.md").read_text(encoding="utf-8")
FEW = {"train.steps": 4, "train.batch_size": 8, "model.hidden_size": 16, "train.ema": [0.9]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> vgm_cli.Model:
    from conftest import TINY

    folder = tmp_path_factory.mktemp("python")
    (folder / "tiny.yaml").write_text(TINY)
    return vgm_cli.train(folder / "tiny.yaml", overrides=FEW, out=folder / "r")


def test_a_sample_is_the_command_lines(vgm, run: vgm_cli.Model) -> None:
    x = run.sample(5, label=[3, "7"], steps=3, sampler="euler", guidance_scale=2.0, seed=4)
    assert x.shape == (5, 1, 28, 28) and x.dtype == torch.float32 and run.info["nfe"] == 6
    folder = run.path.parents[2]
    args = ("-n", 5, "--label", "3,7", "--steps", 3, "--guidance-scale", 2, "--seed", 4, "--out", "x.npz")
    assert vgm("sample", folder, *args)[0] == 0
    with np.load("x.npz") as f:
        assert np.array_equal(f["arr_0"], to_uint8(x).permute(0, 2, 3, 1).numpy())
    assert not torch.equal(run.sample(5, label=3), x)
    assert torch.equal(run.sample(2, label=np.int64(3), steps=1), run.sample(2, label=torch.tensor([3]), steps=1))


def test_what_was_trained_is_what_is_loaded(run: vgm_cli.Model) -> None:
    again = vgm_cli.load(run.path.parents[2], weights="raw")
    assert run.header.weights == "ema-0.9" and again.header.weights == "raw" and again.header.step == 4
    assert run.header.recipe["model"]["hidden_size"] == 16 and run.codec is None
    values = run.evaluate("straightness:steps=2", n=4)
    assert [v["metric"] for v in values] == ["straightness"] and values[0]["n"] == 4


def test_a_codec_reconstructs() -> None:
    codec = vgm_cli.load("mnist-codec")
    x = torch.zeros(2, 1, 28, 28)
    assert codec.reconstruct(x).shape == x.shape
    for wrong, told in (((2, 3, 28, 28), "takes 1 channels"), ((2, 1, 30, 30), "do not divide")):
        with pytest.raises(VgmError, match=told):
            codec.reconstruct(torch.zeros(wrong))
    with pytest.raises(VgmError, match="it reconstructs, it does not generate"):
        codec.sample()


@pytest.mark.parametrize(("ask", "message"), [
    (lambda run: run.sample(2, sampler="nosuch"), "nosuch"),
    (lambda run: run.sample(2, options={"eta": 1}), "eta"),
    (lambda run: run.sample(2, prompt="a dog"), "takes no --prompt"),
    (lambda run: run.sample(2, guidance_interval=(0.9, 0.1)), "interval"),
    (lambda run: run.sample(2, batch_size=0), "--batch-size=0"),
    (lambda run: run.evaluate("fid", nn=3), "unknown option 'nn'"),
    (lambda run: run.reconstruct(torch.zeros(1, 1, 28, 28)), "no codec"),
    (lambda run: vgm_cli.load("nosuch"), "no such run"),
])  # fmt: skip
def test_mistakes_are_one_sentence(run: vgm_cli.Model, ask, message: str) -> None:
    with pytest.raises(VgmError, match=message):
        ask(run)


def test_the_package_itself_imports_no_torch() -> None:
    code = "import sys, vgm_cli; assert 'torch' not in sys.modules; vgm_cli.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = vgm_cli.nosuch  # type: ignore[attr-defined]


def test_the_page_runs(run: vgm_cli.Model) -> None:
    """docs/python.md as it stands, of the tiny run in place of its runs."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S))
    folder = run.path.parents[2]
    names: dict = {}
    exec(re.sub(r'"runs/\w+"', repr(str(folder)), code), names)
    assert names["images"].shape == (4, 1, 28, 28) and names["images"].isfinite().all()
