"""Flow maps: jumps of one- and two-time networks, their boundaries, and the few-step sampler."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vgm_cli.api import Request, generators
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FewStepSampler, FlowMap, few_step
from vgm_cli.engine.checkpoint import build_view
from vgm_cli.errors import VgmError
from vgm_cli.nn.shapes import expand

FLOW = {"path": "linear", "prediction": "velocity"}
TRIG = {"path": {"name": "trig", "sigma_data": 0.5}, "prediction": "trig"}
EDM = {"path": "edm", "prediction": "F", "time": "edm"}
VIEWS = {
    "mean-flow": {"denoiser": FLOW, "second_time": "difference", "guided": True},
    "scm": {"denoiser": TRIG, "boundary": "trig"},
    "consistency": {"denoiser": EDM, "boundary": "skip"},
    "consistency-flow": {"denoiser": FLOW, "boundary": "skip"},
    "dmd": {"denoiser": EDM, "times": [80.0, 2.0, 0.5]},
    "ddpm": {"denoiser": {"path": "vp-discrete", "prediction": "eps", "time": "index"}},
}


def network(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
    """Easy to write down; depends on everything that it is told."""
    return 0.3 * torch.tanh(x) + 0.1 * torch.sin(expand(t if s is None else t + 2 * s, x))


def flow_map(name: str) -> FlowMap:
    return FlowMap(network, **VIEWS[name])


def request(n: int = 3, **keywords) -> Request:
    return Request((1, 2, 2), generators(range(n)), **keywords)


X = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.9, 0.4], dtype=torch.float64)


def test_mean_flow_jumps_by_the_average_velocity():
    s = torch.tensor([0.5, 0.1], dtype=torch.float64)
    got = flow_map("mean-flow").jump(X, T, s)
    u = network(X, T.float(), (T - s).float())
    torch.testing.assert_close(got, X - expand((T - s).float(), X) * u, rtol=1e-5, atol=1e-6)
    one = flow_map("mean-flow").jump(X, 1.0)  # z - u(z, 0, 1)
    torch.testing.assert_close(one, X - network(X, torch.ones(2), torch.ones(2)), rtol=1e-5, atol=1e-6)


def test_average_velocities_jump_alike_on_a_curved_path():
    view = FlowMap(network, {"path": "cosine", "prediction": "velocity"}, second_time="end")
    got = view.jump(X, 0.9, 0.2)
    u = network(X, torch.full((2,), 0.9), torch.full((2,), 0.2))
    torch.testing.assert_close(got, X - 0.7 * u, rtol=1e-5, atol=1e-6)
    assert "guided" not in view.view()


def test_a_two_time_network_is_a_denoiser_where_both_are_the_same():
    view = flow_map("mean-flow")
    torch.testing.assert_close(view.predict(X, T, "velocity"), network(X, T.float(), torch.zeros(2)))
    told = FlowMap(lambda x, t, s: seen.append((t, s)) or x, FLOW, second_time="end")
    seen: list[tuple[Tensor, Tensor]] = []
    told.jump(X, T, 0.3)
    assert torch.equal(seen[0][0], T.float()) and torch.equal(seen[0][1], torch.full((2,), 0.3))


def test_trigflow_jumps_are_its_ddim_steps():
    s = 0.2
    F = network(X / 0.5, T.float())
    d = expand((T - s).float(), X)
    want = torch.cos(d) * X - torch.sin(d) * 0.5 * F
    torch.testing.assert_close(flow_map("scm").jump(X, T, s), want, rtol=1e-5, atol=1e-6)
    c = expand(T.float(), X)
    torch.testing.assert_close(
        flow_map("scm").jump(X, T), torch.cos(c) * X - torch.sin(c) * 0.5 * F, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(flow_map("scm").jump(X, 1e-9), X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["consistency", "consistency-flow"])
def test_skip_is_the_identity_at_the_smallest_level(name):
    view = flow_map(name)
    t = view.path.t_of_ve_sigma(0.002)
    torch.testing.assert_close(view.jump(X, t), X / float(view.path.alpha(t)), rtol=1e-4, atol=1e-5)
    assert view.end() == pytest.approx(float(t))


@pytest.mark.parametrize("name", VIEWS)
def test_jumps_compose_with_the_estimate(name):
    """A jump to data is x0; halfway is on the line between x and x0; from t to t is nothing."""
    view, t = flow_map(name), 0.6
    if view.second_time is not None:
        return  # another network for another end
    x0 = view.predict(X, t)
    torch.testing.assert_close(view.jump(X, t), x0)
    torch.testing.assert_close(view.jump(X, t, t), X, rtol=1e-5, atol=1e-5)
    alpha, sigma = (f(torch.tensor([0.3, t], dtype=torch.float64)).tolist() for f in (view.path.alpha, view.path.sigma))
    eps = (X - alpha[1] * x0) / sigma[1]
    torch.testing.assert_close(view.jump(X, t, 0.3), alpha[0] * x0 + sigma[0] * eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VIEWS)
def test_a_checkpoint_describes_it(name):
    view = flow_map(name)
    again = build_view(network, json.loads(json.dumps(view.view())))
    assert isinstance(again, FlowMap) and again.view() == view.view()
    assert torch.equal(again.jump(X, 0.6, 0.3), view.jump(X, 0.6, 0.3))


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"boundary": "wall"}, "boundary"),
        ({"second_time": "sum"}, "second time"),
        ({"boundary": "trig", "denoiser": {"path": "linear", "prediction": "x0"}}, "not the identity"),
    ],
)
def test_what_does_not_go_together(keywords, match):
    with pytest.raises(VgmError, match=match):
        FlowMap(network, **{"denoiser": FLOW, **keywords})


def test_few_step_with_functions_alone():
    """Jumps to data and new noise in between, or jumps from time to time."""
    calls, seen = [], []

    def jump(x: Tensor, t: float, s: float) -> Tensor:
        calls.append((t, s))
        return x / 2

    x = torch.full((1,), 16.0)
    got = few_step(jump, x, [3.0, 2.0, 1.0, 0.0], callback=lambda i, x, x0: seen.append(x0))
    assert got == 2.0 and calls == [(3.0, 2.0), (2.0, 1.0), (1.0, 0.0)] and seen[:2] == [None, None] and seen[2] == 2
    calls.clear()
    got = few_step(jump, x, [3.0, 1.0, 0.0], renoise=lambda x0, s: x0 + 10 * s, change=lambda x0: x0 + 1)
    assert calls == [(3.0, 0.0), (1.0, 0.0)] and got == ((16 / 2 + 1 + 10) / 2 + 1)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("renoise", ["fresh", "none"])
def test_sampler(name, renoise):
    """As many evaluations as asked, the same image alone and in a batch, whatever the network."""
    view = flow_map(name)
    sampler = FewStepSampler(renoise=renoise)
    for steps in (1, 3):
        asked = request(steps=steps)
        x = sampler(view, asked)
        assert x.shape == (3, 1, 2, 2) and torch.isfinite(x).all() and asked.info["nfe"] == steps
        torch.testing.assert_close(sampler(view, request(1, steps=steps)), x[:1])


def test_sampler_of_two_steps_is_the_papers():
    """sCM: from pure noise at pi / 2, then again from 1.1."""
    view = flow_map("scm")
    x = FewStepSampler(times=(math.pi / 2, 1.1))(view, request())
    asked = request()
    z, again = asked.randn() * 0.5, asked.randn() * 0.5
    x0 = view.jump(z, math.pi / 2)
    torch.testing.assert_close(x, view.jump(math.cos(1.1) * x0 + math.sin(1.1) * again, 1.1), rtol=1e-5, atol=1e-5)


def test_sampler_of_any_denoiser_is_ddim():
    from vgm_cli.diffusion.samplers import DDIMSampler

    view = Denoiser.from_config(network, FLOW)
    times = view.t_range()[1] * (1 - np.arange(4) / 4)
    x = FewStepSampler(times=tuple(times), renoise="none")(view, request())
    torch.testing.assert_close(x, DDIMSampler(steps=4)(view, request()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "keywords", "match"),
    [
        ("mean-flow", {"times": (0.5, 0.9)}, "do not descend"),
        ("mean-flow", {"times": (1.5,)}, "do not descend"),
        ("dmd", {"steps": 4}, "trained for 3"),
    ],
)
def test_sampler_refuses(name, keywords, match):
    with pytest.raises(VgmError, match=match):
        FewStepSampler(**keywords)(flow_map(name), request())


def test_from_the_command_line(vgm, tiny: Path, tmp_path: Path) -> None:
    """Any run can be sampled in a few jumps; guidance has no effect, and is told to have none."""
    assert vgm("train", tiny, "train.steps=2", "--out", "run")[0] == 0
    for name, own in (("fresh", []), ("jumps", ["renoise=none"])):
        code, _, err = vgm("sample", "run", "--sampler", "few-step", *own, "--steps", 3, "-n", 2, "--guidance-scale", 3,
                           "--out", f"{name}.npz")  # fmt: skip
        assert code == 0 and "--guidance-scale has no effect" in err, err
    with np.load("fresh.npz") as a, np.load("jumps.npz") as b:
        assert a["arr_0"].shape == (2, 28, 28, 1) and (a["arr_0"] != b["arr_0"]).any()
    code, _, err = vgm("sample", "run", "--sampler", "few-step", "times=[0.2, 0.9]", "-n", 1, "--out", "x.npz")
    assert code == 2 and "do not descend" in err
