"""sCM against its paper's formulas, NVlabs/FastGen@34f30e8f, xandergos/sCM-mnist@2d285393, diffusers' SCMScheduler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.meanflow.losses import adaptive, average_velocity, summed, target_of
from vgm_plugins.scm.checkpoints import DDPMPP, EDM2, SHUFFLE
from vgm_plugins.scm.ect import ECT, distances, nearer, ratio_at, weight_of
from vgm_plugins.scm.edm2 import EDM2UNet, normalize
from vgm_plugins.scm.losses import bounded, moved, norms, times_of
from vgm_plugins.scm.objective import SCM, TrigFlow
from vgm_plugins.scm.presets import EDM2 as PRESETS
from vgm_plugins.scm.sampler import SCMSampler, consistency_steps, schedule_of
from vgm_plugins.scm.unet import ShuffleUNet
from vgm_plugins.scm.view import last_time, own_time

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.diffusion.jvp import total_derivative
from vgm_cli.diffusion.path import EDMPath, TrigPath
from vgm_cli.errors import VgmError
from vgm_cli.nets.dit import SiT
from vgm_cli.nets.song_unet import SongUNet
from vgm_cli.nn.norm import double_norm, pixel_norm
from vgm_cli.nn.sdpa import sdpa
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("scm")
TRIG = {"path": {"name": "trig", "sigma_data": 0.5}, "prediction": "trig"}


def column(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


# -- the golden cases' networks, as their notes state them -----------------------------------------------------------


class Small(nn.Module):
    """F(x, t) = a tanh(x) (1 + sin(t) / 5) + b t, of log-variance c + d t."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.tensor(v)) for v in (0.5, 0.1, -0.2, 0.1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = column(t.to(x.dtype))
        return self.a * x.tanh() * (1 + 0.2 * t.sin()) + self.b * t

    def log_variance(self, t: Tensor) -> Tensor:
        return self.c + self.d * t

    def reset_log_variance(self) -> None:
        pass


class SmallTeacher(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.4 * x.tanh() - 0.1 * column(t)


class Convolutions(nn.Module):
    """F(x, t) = c2(tanh(c1(x) + t1(e) + g(s))), w(e), with e = (t, sin t, cos t, t^2)."""

    def __init__(self, state: dict[str, Tensor], prefix: str):
        super().__init__()
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        hidden, channels = own["c1.weight"].shape[:2]
        self.c1, self.c2 = nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(hidden, channels, 3, padding=1)
        self.t1, self.w = nn.Linear(4, hidden), nn.Linear(4, 1)
        self.second_time = "g.weight" in own
        if self.second_time:
            self.g = nn.Linear(1, hidden)
        self.double().load_state_dict(own)

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        told = self.t1(self.waves(t))
        if s is not None:
            told = told + self.g(s.double()[:, None])
        found = self.c2(torch.tanh(self.c1(x) + told[:, :, None, None]))
        return found if y is None else torch.where(column(y) == 0, 0.5 * found - 0.1, found)  # 0: no condition

    @staticmethod
    def waves(t: Tensor) -> Tensor:
        t = t.double()
        return torch.stack([t, t.sin(), t.cos(), t**2], dim=1)

    def log_variance(self, t: Tensor) -> Tensor:
        return -self.w(self.waves(t))[:, 0]

    def reset_log_variance(self) -> None:
        pass


class ByX0(nn.Module):
    """D(x, sigma, c) = x sd^2 / (sigma^2 + sd^2) + p tanh(x) sigma / (sigma + 1) + q c, of log-variance ln(sigma)/20 -
    0.1."""

    def __init__(self, p: float, q: float):
        super().__init__()
        self.p, self.q = p, q

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        t = column(t.to(x.dtype))
        found = x * 0.25 / (t**2 + 0.25) + self.p * x.tanh() * t / (t + 1)
        return found if c is None else found + self.q * column(c)

    def log_variance(self, t: Tensor) -> Tensor:
        return 0.05 * t.log() - 0.1

    def reset_log_variance(self) -> None:
        pass


def x0_view(network: nn.Module) -> Denoiser:
    path = EDMPath(sigma_max=800.0)
    return Denoiser(network, path, "x0", time="sigma", input_scale="none")


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: c.kind == "paper_loss")
def papers_loss(case: GoldenCase) -> None:
    said, given, want = case.config, case.inputs, case.outputs
    net, teacher = Convolutions(case.state, "net/"), None
    path = {"name": "trig", "sigma_data": said["sigma_data"]}
    if not said["consistency_training"]:
        teacher = Denoiser(Convolutions(case.state, "teacher/"), path, "trig")
    if said["tangent"] == "clip":
        case.ignore("c", why="nothing is divided where values are cut off")
    options: dict[str, Any] = {"guidance_range": (1.0, 2.0)} if said["guided"] else {}
    if teacher is None:
        options["view"] = {"path": path, "prediction": "trig"}
    own = {k: v.clone() for k, v in net.state_dict().items()}
    keys = ("P_mean", "P_std", "warmup", "c", "tangent")
    objective = SCM(net, teacher, **{k: said[k] for k in keys}, **options)
    net.load_state_dict(own)  # a guided student starts as its teacher
    t = objective.times(given["normal"])
    assert_close(t, want["t"], 1e-6, "t")
    ones = torch.ones_like(t)
    cond, null = ({"y": ones}, {"y": torch.zeros(1)}) if said["guided"] else ({}, None)
    for derivative in ("joint", "alone"):
        net.zero_grad()
        objective.derivative = derivative
        rate = objective.rate(said["iteration"])
        made = objective.terms(given["x0"], given["z_unit"], t, rate, cond, null, given.get("guidance"))
        for name, key in (("x", "x_t"), ("slope", "dxdt"), ("F", "F"), ("g", "g_raw")):
            assert_close(made[name], want[key], 1e-6, key)
        assert_close(said["sigma_data"] * made["derivative"], want["jvp"], 1e-6, "jvp")
        assert_close(bounded(made["g"], objective.tangent, objective.c), want["g"], 1e-6, "g")
        assert_close(objective.log_weight(t), want["w"], 1e-6, "w")
        losses, _ = objective.losses(made["F"], made["g"], t)
        assert_close(losses, want["per_sample"], 1e-6, "per_sample")
        assert_close(losses.mean(), want["loss"], 1e-6, "loss")
        losses.mean().backward()
        for name, p in net.named_parameters():
            assert_close(p.grad, want[f"grad/{name}"], 1e-6, name)


@golden.check(lambda c: "consistency_training" in c.config and c.kind != "paper_loss")
def mnist_loss(case: GoldenCase) -> None:
    said, given, want = case.config, case.inputs, case.outputs
    assert said["weight"] == 1, "the reimplementation's weight of all times"
    path, net = {"name": "trig", "sigma_data": said["sigma_data"]}, Small()
    options: dict[str, Any] = {
        "P_mean": said["P_mean"],
        "P_std": said["P_std"],
        "warmup": said["warmup"],
        "c": said["c"],
    }
    if said["consistency_training"]:
        objective = SCM(net, view={"path": path, "prediction": "trig"}, tangent="rms", derivative="joint", **options)
    else:
        teacher = Denoiser(SmallTeacher(), path, "trig")
        objective = SCM(net, teacher, tangent="rms", derivative="joint", **options)
    t = objective.times(given["rnd_sigma"])
    assert_close(t, want["t"].flatten(), 1e-6, "t")
    made = objective.terms(given["x0"], given["z_unit"], t, objective.rate(said["step"]), {})
    for name, key in (("x", "x_t"), ("slope", "dxt_dt"), ("F", "F"), ("derivative", "F_jvp")):
        assert_close(made[name], want[key], 1e-5, key)
    assert_close(norms(made["g"], "rms"), want["g_norm"].flatten(), 1e-5, "g_norm")
    assert_close(bounded(made["g"], "rms", objective.c), want["g_normalised"], 1e-5, "g")
    loss = objective.losses(made["F"], made["g"], t)[0].mean()
    assert_close(loss, want["loss"], 1e-5, "loss")
    loss.backward()
    for name, p in net.named_parameters():
        assert_close(p.grad, want[f"grad_{name}"], 1e-5, name)


@golden.check(lambda c: "out/v_t" in c)
def diffusion_loss(case: GoldenCase) -> None:
    said, given, want, net = case.config, case.inputs, case.outputs, Small()
    objective = TrigFlow(net, said["sigma_data"], said["P_mean"], said["P_std"])
    t = objective.times(given["rnd_sigma"])
    assert_close(t, want["t"].flatten(), 1e-6, "t")
    x, slope = objective.noised(given["images"], given["z_unit"], t)
    assert_close(x, want["x_t"], 1e-6, "x_t")
    assert_close(slope, want["v_t"], 1e-6, "v_t")
    loss = objective.losses(given["images"], given["z_unit"], t)[0].mean()
    assert_close(loss, want["loss"], 1e-6, "loss")
    loss.backward()
    for name, p in net.named_parameters():
        assert_close(p.grad, want[f"grad_{name}"], 1e-5, name)


@golden.check(lambda c: "use_jvp_finite_diff" in c.config)
def fastgens_loss(case: GoldenCase) -> None:
    said, given, want = case.config, case.inputs, case.outputs
    teacher, net = x0_view(ByX0(0.2, 0.08)), ByX0(0.3, 0.05)
    differences, guidance = said["use_jvp_finite_diff"], said["guidance_scale"]
    if not differences:
        case.ignore("jvp_finite_diff_eps", why="the derivative is exact")
    objective = SCM(
        net,
        teacher,
        mode="scd" if said["use_cd"] else "sct",
        sigma_data=0.5,
        warmup=said["tangent_warmup_steps"],
        c=said["tangent_warmup_const"],
        tangent="rms" if said["g_norm_spatial_invariance"] else "normalise",
        prior=said["prior_weighting_enabled"],
        divide=said["divide_x_0_spatial_dim"],
        derivative="differences" if differences else "joint",
        difference=said["jvp_finite_diff_eps"] if differences else 1e-3,
        boundary="none",
        guidance_scale=guidance,
    )
    cond, null = ({"c": given["cond"]}, {"c": given["neg"][:1]}) if "in/cond" in case else ({}, None)
    t = torch.atan2(given["t"], torch.full_like(given["t"], 0.5))
    assert_close(t, want["t_hat"], 1e-6, "t_hat")
    r = objective.rate(said["iteration"])
    assert_close(torch.tensor(r), want["r"], 1e-6, "r")
    scale = None if guidance is None or not cond else torch.full_like(t, guidance)
    made = objective.terms(given["x0"], given["z_unit"], t, r, cond, null, scale)
    assert_close(made["x"], want["x_t_hat"], 1e-5, "x_t_hat")
    assert_close(made["slope"], want["dxt_dt"], 1e-5, "dxt_dt")
    assert_close(made["F"], want["F"], 1e-5, "F")
    x0 = objective.student.predict_beside(objective.trig, made["x"], t, "x0", **cond)
    assert_close(x0, want["x0_pred"], 1e-5, "x0")
    assert_close(made["derivative"], want["F_jvp"], 1e-3 if differences else 1e-5, "F_jvp")
    assert_close(-objective.log_weight(t), want["logvar"].flatten(), 1e-5, "logvar")
    tolerance = 1e-3 if differences else 1e-5
    losses, error = objective.losses(made["F"], made["g"], t)
    assert_close(error, want["unweighted"], tolerance, "unweighted")
    assert_close(losses, want["loss"], tolerance, "loss")


@golden.check(lambda c: "huber_const" in c.config)
def ects_loss(case: GoldenCase) -> None:
    said, given, want = case.config, case.inputs, case.outputs
    student, teacher = x0_view(ByX0(0.3, 0.05)), x0_view(ByX0(0.2, 0.08))
    t = given["t"]
    r = nearer(t, said["ratio"])
    assert_close(r, want["r"], 1e-6, "r")
    far, got = distances(
        student.denoise_ve,
        given["x0"],
        given["eps"],
        t,
        r,
        teacher.denoise_ve if said["use_cd"] else None,
        said["huber_const"],
        said.get("use_squared_l2", False),
    )
    assert_close(got, want["D_yt"], 1e-5, "D_yt")
    assert_close(far, want["unweighted"], 1e-5, "unweighted")
    assert_close(far * weight_of(said["weighting"], t, r), want["loss"], 1e-5, "loss")


@golden.check(lambda c: "norm_method" in c.config)
def fastgens_meanflow(case: GoldenCase) -> None:
    """MeanFlow's own functions give FastGen's loss."""
    said, given, want = case.config, case.inputs, case.outputs
    kind, power, *more = said["norm_method"].split("_")
    assert said["loss_type"] == "l2" and kind in ("poly", "exp")

    def u(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = column(t).to(z.dtype), column(r).to(z.dtype)
        return 0.3 * z.tanh() * (1 + 0.1 * t) + 0.2 * (t - r)

    x, z, t, r = given["x0"], given["z"], given["t"].float(), given["r"].float()
    at, v = (1 - column(t)) * x + column(t) * z, z - x
    apart = r < t
    value, derivative = average_velocity(u, at, t, r, v, apart, {})
    assert_close(v, want["dxt_dt"], 1e-5, "dxt_dt")
    assert_close(derivative[apart], want["jvp"][apart], 1e-5, "jvp")
    target = target_of(v, derivative, t, r)
    assert_close(target, want["tangent"], 1e-5, "tangent")
    raw = summed(value - target)
    if kind == "poly":
        loss = adaptive(raw, float(power), said["norm_const"])
    else:  # FastGen's own: const exp(scale loss + norm_const)
        loss = raw * float(power) * torch.exp(float(more[0]) * raw + said["norm_const"]).detach()
    assert_close(loss, want["loss"], 1e-5, "loss")
    assert_close(loss / raw, want["weight"], 1e-5, "weight")
    assert_close((value - v).square().flatten(1).mean(1), want["v_loss"], 1e-5, "v_loss")


@golden.check(lambda c: "dim_mults" in c.config)
def mnist_network(case: GoldenCase) -> None:
    model, given = ShuffleUNet(**case.config), case.inputs
    assert SHUFFLE.recognise(case.state) and SHUFFLE.config(case.state) == dict(case.config)
    model.load_state_dict(SHUFFLE.to_ours(case.state))
    with torch.no_grad():
        value, derivative = total_derivative(model.eval(), (given["x"], given["t"]), (given["tx"], given["tt"]))
        assert_close(value, case.outputs["F"], 1e-5, "F")
        assert_close(derivative, case.outputs["jvp"], 1e-5, "jvp")
        assert_close(model.log_variance(given["t"]), case.outputs["logvar"][:, 0], 1e-5, "logvar")


def drawn(draws: Tensor) -> Callable[[], Tensor]:
    """The draws, one after the other."""
    numbers = count()
    return lambda: draws[next(numbers)]


def states() -> tuple[list[Tensor], Callable[[int, Tensor, Tensor | None], None]]:
    found: list[Tensor] = []
    return found, lambda i, x, x0: found.append(torch.stack([x, x0]))  # type: ignore[list-item]


@golden.check(lambda c: "t0" in c.config)
def mnist_samples(case: GoldenCase) -> None:
    said, (found, note) = case.config, states()
    flow = FlowMap(Small(), {"path": {"name": "trig", "sigma_data": said["sigma_data"]}, "prediction": "trig"}, "trig")
    draws, times = drawn(case.inputs["draws_randn"]), [said["t0"], said["t1"]]
    with torch.no_grad():
        x2 = consistency_steps(flow, draws, times, True, lambda x0: x0.clamp(-0.5, 0.5), note)
    assert_close(found[0][1], case.outputs["x1"], 1e-5, "x1")
    assert_close(x2, case.outputs["x2"], 1e-5, "x2")


@golden.check(lambda c: "n" in c.config)
def sanas_scheduler(case: GoldenCase) -> None:
    said, (found, note), n = case.config, states(), case.config["n"]
    usual = {"max_timesteps": 1.5708, "intermediate_timesteps": 1.3 if n == 2 else None}
    own = {k: said.get(k, v) for k, v in usual.items()}
    if own == usual:
        times = schedule_of("sana", n, math.nan)
    else:  # other times are the sampler's keyword `times`
        first, second = own["max_timesteps"], own["intermediate_timesteps"]
        times = [first * (1 - i / n) for i in range(n)] if second is None else [first, second]
    assert_close(torch.tensor([*times, 0.0]), case.outputs["timesteps"], 1e-6, "times")
    path = {"name": "trig", "sigma_data": said.get("sigma_data", 0.5)}
    flow = FlowMap(Small(), {**TRIG, "path": path}, "trig")
    with torch.no_grad():
        consistency_steps(flow, drawn(case.inputs["draws_randn"]), times, callback=note)
    assert_close(torch.stack([x0 for _, x0 in found]), case.outputs["x0"], 1e-6, "x0")
    after = torch.stack([*(x for x, _ in found[1:]), found[-1][1]])
    assert_close(after, case.outputs["trajectory"], 1e-6, "trajectory")


@golden.check(lambda c: c.kind == "multistep_sampling")
def papers_samples(case: GoldenCase) -> None:
    said, (found, note) = case.config, states()
    net = Convolutions(case.state, "net/")
    flow = FlowMap(net, {"path": {"name": "trig", "sigma_data": said["sigma_data"]}, "prediction": "trig"}, "trig")
    times = [said["t_max"], *said["intermediate"]]
    with torch.no_grad():
        x = consistency_steps(flow, drawn(case.inputs["z_unit"]), times, callback=note)
    assert_close(torch.stack([x0 for _, x0 in found]), case.outputs["trajectory"], 1e-6, "trajectory")
    assert_close(x, case.outputs["x"], 1e-6, "x")


@golden.check(lambda c: "out/pnorm_s" in c)
def double_normalisation(case: GoldenCase) -> None:
    said, given = case.config, case.inputs
    norm = nn.GroupNorm(said["groups"], said["C"], eps=said["gn_eps"], affine=False).double()
    assert_close(pixel_norm(given["s"], said["pixel_norm_eps"]), case.outputs["pnorm_s"], 1e-8, "pnorm_s")
    assert_close(double_norm(norm(given["x"]), given["s"], given["b"]), case.outputs["y"], 1e-8, "y")


@golden.check(lambda c: c.kind == "rf_trigflow_wrapper")
def flow_as_trigflow(case: GoldenCase) -> None:
    said, given, want = case.config, case.inputs, case.outputs
    factor, asked = said["t_scaling_factor"], []

    def network(x: Tensor, c: Tensor) -> Tensor:
        asked.append((x, c))
        return torch.tanh(1.3 * x) + 0.4 * x + column(c.double()) * 0.2 / factor

    view, t, x = Denoiser(network, "linear", time_scale=factor), given["t"], given["x_t"]
    path = TrigPath(said["sigma_data"])
    assert_close(view.predict_beside(path, x, t, "trig"), want["F"], 1e-6, "F")
    assert_close(view.predict_beside(path, x, t, "x0"), want["x0"], 1e-6, "x0")
    own = own_time(view, t, said["sigma_data"])
    assert_close(own, want["rf_time"], 1e-6, "rf_time")
    assert_close(asked[0][0], column(want["c_in"]) * x, 1e-6, "c_in")
    assert_close(asked[0][1].double(), want["c_noise"], 1e-6, "c_noise")
    assert_close(view.predict(column(want["c_in"]) * x, own, "velocity"), want["velocity"], 1e-6, "velocity")
    assert_close(column(want["c_skip"]) * x + column(want["c_out"]) * want["velocity"], want["x0"], 1e-6, "c_skip")


@golden.check(lambda c: c.kind == "attention_jvp")
def attentions_derivative(case: GoldenCase) -> None:
    given = case.inputs
    factor = case.config["scale"] * given["q"].shape[-1] ** 0.5  # ours divides by sqrt(d)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        q, k, v, dq, dk, dv = (given[name].to(dtype) for name in ("q", "k", "v", "dq", "dk", "dv"))
        value, derivative = total_derivative(sdpa, (factor * q, k, v), (factor * dq, dk, dv))
        assert_close(value, case.outputs["o"], tolerance, "o")
        assert_close(derivative, case.outputs["do"], tolerance, "do")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- networks, presets, checkpoints ----------------------------------------------------------------------------------

COUNTS = {"XS": 124_713_253, "S": 280_212_837, "M": 497_807_781, "L": 777_498_085, "XL": 1_119_283_749,
          "XXL": 1_523_164_773}  # fmt: skip


@pytest.mark.parametrize("size", COUNTS)
def test_presets_have_the_published_counts(size: str) -> None:
    """EDM2's of ImageNet 512: 124.7, 280.2, 497.8, 777.5, 1119.3 and 1523.2 million."""
    with torch.device("meta"):
        node = {"name": "edm2", "preset": f"EDM2-{size}", "in_channels": 4, "num_classes": 1000}
        model = registry().build("model", node)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]
    assert len(PRESETS) == len(COUNTS)


def test_the_small_networks_have_the_published_counts() -> None:
    with torch.device("meta"):
        for node, want in (
            ({"name": "song-unet", "preset": "cifar10", "augment_dim": 9}, 55_733_891),  # EDM's released one
            ({"name": "scm-unet", "preset": "mnist"}, 829_154),
        ):
            assert sum(p.numel() for p in registry().build("model", node).parameters()) == want


class TestEDM2(suites.ModelSuite):
    model = {
        "name": "edm2", "img_resolution": 8, "in_channels": 2, "num_classes": 3, "model_channels": 16,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8,
        "time_embedding": "positional", "modulation": "double-norm", "second_time": True,
    }  # fmt: skip
    shape = (2, 8, 8)


class TestShuffleUNet(suites.ModelSuite):
    model = {"name": "scm-unet", "in_channels": 2, "base_dim": 8, "dim_mults": [1, 2], "time_embedding_dim": 16}
    shape = (2, 8, 8)


class TestSongUNet(suites.ModelSuite):
    model = {
        "name": "song-unet", "img_resolution": 8, "in_channels": 2, "model_channels": 16, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [4], "num_classes": 3, "modulation": "double-norm",
    }  # fmt: skip
    shape = (2, 8, 8)


def test_weights_are_forced_to_unit_length_while_training() -> None:
    """In forward, and by the objective, which may not change them inside a derivative."""
    suite = TestEDM2()
    for by_objective in (False, True):
        model = suite.build().train()
        x, t, cond = suite.inputs(model)
        if by_objective:
            config = {"path": {"name": "trig", "sigma_data": 0.5}, "prediction": "trig"}
            objective = SCM(model, view=config, guidance_range=None) if not model.second_time else TrigFlow(model)
            objective.loss("main", {"x": x, "cond": cond}, Step(0))
        else:
            model(x, t, **cond)
        weight = model.enc["8x8_block0"].conv_res0.weight
        torch.testing.assert_close(normalize(weight), weight, rtol=1e-3, atol=1e-3)


def original_attention(h: Tensor, qkv: nn.Conv2d, proj: nn.Conv2d) -> Tensor:
    """EDM's, whose channels of qkv are ordered (channel, q|k|v)."""
    n, c, height, width = h.shape
    q, k, v = qkv(h).reshape(n, c, 3, height * width).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q, k / c**0.5).softmax(2)
    return proj(torch.einsum("nqk,nck->ncq", weights, v).reshape(h.shape))


@torch.no_grad()
def test_edms_attention_is_reordered() -> None:
    torch.manual_seed(0)
    model = SongUNet(8, 2, None, 0, 16, (1, 2), num_blocks=1, attn_resolutions=(4,))
    suites.randomise(model)
    theirs = DDPMPP.from_ours(model.state_dict())
    block, h = model.enc["4x4_block0"], torch.randn(2, 32, 4, 4)
    qkv, proj = nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1)
    qkv.load_state_dict({k: theirs[f"model.enc.4x4_block0.qkv.{k}"] for k in ("weight", "bias")})
    proj.load_state_dict({k: theirs[f"model.enc.4x4_block0.proj.{k}"] for k in ("weight", "bias")})
    torch.testing.assert_close(block.attend(h), original_attention(h, qkv, proj))
    assert DDPMPP.config(theirs)["channel_mult"] == [1, 2] and DDPMPP.config(theirs)["resample_filter"] == [1, 1]
    x = torch.randn(1, 2, 4, 4)
    down, up = model.enc["4x4_down"].conv0, model.dec["8x8_up"].conv0
    want = F.conv2d(F.avg_pool2d(torch.ones(1, 16, 8, 8), 2), down.weight, down.bias, padding=1)
    torch.testing.assert_close(down(torch.ones(1, 16, 8, 8)), want)
    wide = x.repeat(1, 16, 1, 1)
    want = F.conv2d(F.interpolate(wide, scale_factor=2, mode="nearest"), up.weight, up.bias, padding=1)
    torch.testing.assert_close(up(wide), want)


def test_checkpoints_are_converted_both_ways(vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as its training saves it, and back; sCM's own changes have no official layout."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    nets = {
        "edm2": (EDM2, EDM2UNet(8, 3, 4, 64, (1,), num_blocks=1, attn_resolutions=(8,))),
        "edm-ddpmpp": (DDPMPP, SongUNet(8, 3, None, 0, 16, (1, 2), num_blocks=1, attn_resolutions=(4,))),
        "scm-mnist": (SHUFFLE, ShuffleUNet(16, 1, None, 8, (2,))),
    }
    from vgm_cli.engine import checkpoint as ckpt

    for name, (layout, net) in nets.items():
        own = net.state_dict()
        torch.save(layout.from_ours(own), "theirs.pt")
        code, _, err = vgm("convert", "theirs.pt", "ours.safetensors", "--overwrite")
        assert code == 0, (name, err)
        got, _ = ckpt.read_tensors(Path("ours.safetensors"))
        assert got.keys() == own.keys() and all(torch.equal(got[k], own[k]) for k in own), name
        code, _, err = vgm("sample", "ours.safetensors", "--steps", 2, "-n", 1, "--out", "x.npz", "--overwrite")
        assert code == 0, (name, err)
        code, _, err = vgm("convert", "ours.safetensors", "again.safetensors", "--to", name, "--overwrite")
        assert code == 0, (name, err)
    for layout, changed in (
        (EDM2, {"time_embedding": "positional", "modulation": "scale", "second_time": False}),
        (DDPMPP, {"second_time": False, "modulation": "double-norm"}),
    ):
        with pytest.raises(VgmError, match="layout is of"):
            layout.allows(changed)


# -- the loss --------------------------------------------------------------------------------------------------------

EXACT = 0.7  # deviation of normal data


class NormalFlow(nn.Module):
    """F of the flow of normal data with deviation `sd`: the velocity of x_t over 0.5, of which the consistency function
    is sd x / sqrt(cos^2 sd^2 + sin^2 / 4)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = 0.5 * x, column(t.to(x.dtype))
        variance = t.cos() ** 2 * EXACT**2 + t.sin() ** 2 * 0.25
        return x * t.sin() * t.cos() * (0.25 - EXACT**2) / variance / 0.5


class NormalMap(nn.Module):
    """F of that consistency function f = cos x - sin F / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones([]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = 0.5 * x, column(t.to(x.dtype))
        f = EXACT * x / (t.cos() ** 2 * EXACT**2 + t.sin() ** 2 * 0.25).sqrt()
        return self.one * (t.cos() * x - f) / (0.5 * t.sin())


def test_the_tangent_of_the_true_consistency_model_is_zero() -> None:
    """And of the flow that is distilled it is not; the whole tangent is needed, its first part alone is not zero."""
    teacher = Denoiser(NormalFlow(), TRIG["path"], "trig")
    x0, noise = torch.randn(2, 6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.1, 1.5, 6, dtype=torch.float64)
    true = SCM(NormalMap().double(), teacher)
    g = true.terms(EXACT * x0, noise, t, 1.0, {})["g"]
    assert g.abs().max() < 1e-5
    assert true.terms(EXACT * x0, noise, t, 0.0, {})["g"].abs().max() > 0.01
    start = NormalFlow()
    assert SCM(start, teacher).terms(EXACT * x0, noise, t, 1.0, {})["g"].abs().max() > 0.01


@pytest.mark.parametrize("kind", ["normalise", "rms", "clip"])
def test_tangents_are_bounded(kind: Any) -> None:
    g = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * column(torch.tensor([1e-3, 1.0, 1e6]))
    found = bounded(g, kind, 0.1)
    limit = {"normalise": 1.0, "rms": 32**0.5, "clip": 32**0.5}[kind]
    assert found.flatten(1).norm(dim=1).max() <= limit * 1.0001
    assert torch.equal(found.sign(), g.sign())


def test_derivatives_three_ways() -> None:
    """In one pass, alone, and by differences along the straight way, which is the flow of training from data."""
    torch.manual_seed(0)
    model = TestShuffleUNet().build()
    view = {"path": TRIG["path"], "prediction": "trig"}
    x0, noise = torch.randn(2, 3, 2, 8, 8)
    t = torch.tensor([0.3, 0.9, 1.4], dtype=torch.float64)
    made = {
        kind: SCM(model, view=view, derivative=kind).terms(x0, noise, t, 1.0, {})  # type: ignore[arg-type]
        for kind in ("joint", "alone", "differences")
    }
    for name in ("F", "derivative", "g"):
        torch.testing.assert_close(made["joint"][name], made["alone"][name], rtol=1e-4, atol=1e-5)
    exact, rough = (made[kind]["derivative"].double() for kind in ("joint", "differences"))
    assert (exact - rough).norm() < 0.02 * exact.norm()


def test_dropout_is_the_same_in_value_and_derivative() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    x, slope, t = torch.ones(1, 1, 40, 40), torch.ones(1, 1, 40, 40), torch.tensor([0.7])
    for joint in (True, False):
        value, derivative = moved(lambda x, t: model(2 * x), x, t, slope, joint)
        torch.testing.assert_close(derivative, value * t.cos() * t.sin())


VIEWS = {
    "flow": {"path": "linear", "prediction": "velocity", "time": "reversed"},
    "edm": {"path": "edm", "prediction": "F", "time": "edm"},
    "ddpm": {"path": "vp-discrete", "prediction": "eps", "time": "index"},
    "v": {"path": "cosine", "prediction": "v"},
    "x0": {"path": "linear", "prediction": "x0"},
    "trigflow": TRIG,
}


@pytest.mark.parametrize("name", VIEWS)
def test_any_teacher_is_distilled(name: str) -> None:
    """At first the student is the teacher, seen as TrigFlow's network; gradients flow; it jumps from noise to data."""
    torch.manual_seed(0)
    config = {"input_size": 8, "patch_size": 4, "in_channels": 2, "hidden_size": 32, "depth": 1, "num_heads": 2,
              "num_classes": 3}  # fmt: skip
    network = SiT(**config)
    suites.randomise(network)
    teacher, student = Denoiser.from_config(network, VIEWS[name]), SiT(**config)
    student.load_state_dict(network.state_dict())
    objective = SCM(student, teacher, guidance_scale=1.5)
    x, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 0])
    t = torch.linspace(0.2, min(1.5, objective.last), 4, dtype=torch.float64)
    with torch.no_grad():
        want = teacher.predict_beside(objective.trig, x, t, "trig", y=y)
        if name != "x0":  # made the identity without noise
            torch.testing.assert_close(objective.F(x, t, y=y), want, rtol=1e-3, atol=1e-3)
        view = objective.student
        own = own_time(view, t, objective.sigma_data)
        torch.testing.assert_close(view.path.ve_sigma(own), objective.sigma_data * t.tan())
    loss, logs = objective.loss("main", {"x": 0.5 * x, "cond": {"y": y}}, Step(20_000))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(v) for v in logs.values())
    assert student.final_layer.linear.weight.grad.abs().sum() > 0
    assert {"tangent", "tangent_max", "derivative", "w_low", "w_mid", "w_high"} <= logs.keys()
    request = Request((2, 8, 8), generators(range(2)), cond={"y": y[:2]}, steps=2)
    with torch.no_grad():
        made = SCMSampler()(objective.student, request)
    assert made.shape == (2, 2, 8, 8) and torch.isfinite(made).all() and request.info["nfe"] == 2


def test_a_guided_student_is_told_its_scale() -> None:
    """It begins as its teacher whatever it is told; trained, the scale matters; --guidance-scale reaches it."""
    torch.manual_seed(0)
    config = {"input_size": 8, "patch_size": 4, "in_channels": 2, "hidden_size": 32, "depth": 1, "num_heads": 2,
              "num_classes": 3}  # fmt: skip
    network = SiT(**config)
    suites.randomise(network)
    teacher, student = Denoiser.from_config(network, VIEWS["flow"]), SiT(**config, second_time=True)
    objective = SCM(student, teacher, guidance_range=(1.0, 2.0))
    x, y, t = torch.randn(2, 2, 8, 8), torch.tensor([0, 1]), torch.tensor([0.4, 1.2], dtype=torch.float64)
    with torch.no_grad():
        for scale in (1.0, 2.0):
            got = objective.F(x, t, y=y, guidance=torch.full((2,), scale))
            torch.testing.assert_close(got, teacher.predict_beside(objective.trig, x, t, "trig", y=y))
    loss, _ = objective.loss("main", {"x": x, "cond": {"y": y}}, Step(0))
    loss.backward()
    assert student.r_embedder.mlp[2].weight.grad.abs().sum() > 0
    suites.randomise(student)
    view = objective.view()
    assert view["name"] == "scm-guided" and view["scale"] == 1.5 and view["scales"] == [1.0, 2.0]
    from vgm_cli.engine import checkpoint as ckpt

    again = ckpt.build_view(student, view)

    def sample(scale: float | None) -> Tensor:
        with torch.no_grad():
            return SCMSampler()(again, Request((2, 8, 8), generators(range(2)), cond={"y": y}, guidance_scale=scale))

    assert torch.equal(sample(None), sample(1.5)) and not torch.equal(sample(1.0), sample(2.0))


def test_the_learning_rate_falls_as_edm2s() -> None:
    objective = TrigFlow(TestShuffleUNet().build(), decay_after=100)
    assert objective.schedule(Step(100)) == {}
    assert objective.schedule(Step(400)) == {"main": {"lr": 0.5}}


def test_draws_of_times() -> None:
    normal = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = times_of(normal, -1.0, 1.4, 0.5)
    levels = (0.5 * t.tan()).log()
    assert abs(levels.mean() + 1) < 0.1 and abs(levels.std() - 1.4) < 0.1
    ddpm = Denoiser(nn.Identity(), "vp-discrete", "eps", time="index")
    assert abs(0.5 * math.tan(last_time(ddpm, 0.5)) - 20) < 1e-6, "where eps says little about x0"


def test_ects_steps() -> None:
    t = torch.tensor([0.02, 1.0, 80.0], dtype=torch.float64)
    assert [ratio_at(i) for i in (0, 1, 2)] == [0.5, 0.75, 0.875] and ratio_at(40) == 0.999
    assert (nearer(t, 0.999) < t).all() and torch.equal(nearer(t, 0.0), torch.full_like(t, 0.002))
    assert torch.allclose(nearer(t, 1.0), t)
    objective = ECT(TestSongUNet().build(), stages=4)
    ratios = [objective.ratio(Step(i, total=100)) for i in (0, 24, 25, 99)]
    assert ratios == [0.5, 0.5, 0.75, 1 - 2**-4]
    x = torch.randn(3, 2, 8, 8)
    loss, logs = objective.loss("main", {"x": x, "cond": {"y": torch.tensor([0, 1, 2])}}, Step(3, total=100))
    assert torch.isfinite(loss) and 0 < logs["ratio"] < 1


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: SCM(Small(), mode="scd"), "needs a teacher"),
        (lambda: SCM(Small(), guidance_range=(1.0, 2.0)), "not guided"),
        (lambda: SCM(SiT(8, 4, 2, 32, 1, 2, second_time=True)), "told its guidance scale"),
        (lambda: SCM(Small(), Denoiser(Small(), TRIG["path"], "trig"), guidance_range=(2.0, 1.0)), "wrong way round"),
        (lambda: ECT(Small(), distill=True), "needs a teacher"),
    ],
)
def test_what_does_not_go_together(build: Any, match: str) -> None:
    with pytest.raises(VgmError, match=match):
        build()


MODES = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
WIDTH = 0.1  # deviation of every mode; the data's is about 1


class MixtureFlow(nn.Module):
    """F of the exact flow of four narrow modes in the plane, x (B, 2, 1, 1) of unit deviation."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = x.flatten(1).double(), t.double()[:, None]
        alpha, variance = t.cos(), (t.cos() * WIDTH) ** 2 + t.sin() ** 2
        far = (x[:, None] - alpha[:, None] * MODES).square().sum(2) / variance
        share = (-far / 2).softmax(1)
        x0 = (share @ MODES.double()) + (alpha * WIDTH**2 / variance) * (x - alpha * (share @ MODES.double()))
        return ((alpha * x - x0) / t.sin()).float()[:, :, None, None]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        waves = torch.cat([x.flatten(1), t, t.sin(), t.cos(), (3 * t).sin()], dim=1)
        return self.net(waves)[:, :, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["scd", "sct"])
def test_it_learns_to_jump(mode: Any) -> None:
    """Four modes in the plane: after a little training one step from noise ends nearer to one of them, all are reached,
    and tangents stay bounded. The flow itself in one step ends at the middle of them, 1.4 away from every one."""
    torch.manual_seed(0)
    model = Perceptron()
    teacher = Denoiser(MixtureFlow(), {"name": "trig", "sigma_data": 1.0}, "trig")
    objective = SCM(model, teacher, mode, P_mean=0.0, P_std=1.5, warmup=150, derivative="joint")
    pre = TrigFlow(model, 1.0, 0.0, 1.5)
    tangents = []
    for learner, steps in ((pre, 300), (objective, 700)):
        parts = [p for n in learner.networks.values() for p in n.parameters() if n is not teacher.network]
        optimizer = torch.optim.RAdam(parts, lr=3e-3, betas=(0.9, 0.99))
        for i in range(steps):
            step = Step(i, total=steps)
            which = (step.rand(256, "mode") * 4).long()
            x = (MODES[which] + WIDTH * step.randn((256, 2), "x"))[:, :, None, None]
            loss, logs = learner.loss("main", {"x": x}, step)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - i / steps) + 1e-5
            optimizer.step()
            if learner is objective and i >= 150:
                tangents.append(float(logs["tangent"]))

    def apart(steps: int, flow: FlowMap) -> tuple[float, int]:
        with torch.no_grad():
            x = SCMSampler(steps=steps)(flow, Request((2, 1, 1), generators(range(300)))).flatten(1)
        near, which = torch.cdist(x, MODES).min(1)
        return float(near.mean()), min(which.bincount(minlength=4).tolist())

    untrained = apart(1, FlowMap(teacher.network, teacher, "trig"))[0]
    one, fewest = apart(1, objective.student)
    two, _ = apart(2, objective.student)
    assert one < 0.75 * untrained and two < 0.75 * untrained and fewest > 40, (untrained, one, two, fewest)
    assert sum(tangents[-100:]) < 2 * sum(tangents[:100])


# -- sampling, training ----------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert schedule_of("paper", 1, 1.56) == [1.56] and schedule_of("paper", 2, 1.56) == [1.56, 1.1]
    assert schedule_of("sana", 2, 0.0) == [1.5708, 1.3] and schedule_of("sana", 1, 0.0) == [1.5708]
    for name in ("paper", "sana"):
        times = schedule_of(name, 5, 1.56)  # type: ignore[arg-type]
        assert len(times) == 5 and times == sorted(times, reverse=True) and times[-1] > 0


def test_the_sampler_refuses() -> None:
    flow, request = FlowMap(Small(), TRIG, "trig"), Request((1, 5, 5), generators(range(2)))
    for sampler, scale, match in (
        (SCMSampler(times=(1.1, 1.2)), None, "do not descend"),
        (SCMSampler(times=(1.1, 0.0)), None, "do not descend"),
        (SCMSampler(), 2.0, "does not guide"),
    ):
        request.guidance_scale = scale
        with pytest.raises(VgmError, match=match):
            sampler(flow, request)


SMALL = (
    "model={name: sit, patch_size: 7, hidden_size: 16, depth: 1, num_heads: 2, learn_sigma: false}",
    "codec=null",
)


class TestTraining(suites.ObjectiveSuite):
    recipe = "scm/mnist"
    overrides = SMALL


class TestSampling(suites.SamplerSuite):
    recipe = "scm/mnist"
    overrides = SMALL
    steps = 3


def test_from_the_command_line(vgm, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From data by a U-Net, from a trained flow, guided with the scale as an input; one and two steps."""
    monkeypatch.chdir(tmp_path)
    net = "patch_size: 7, hidden_size: 16, depth: 1, num_heads: 2"
    few = (f"data.path={tiny_dataset}", "codec=null", "train.steps=2", "train.batch_size=8", "train.preview_n=0")
    assert vgm("train", "sit", f"model={{name: sit, {net}, learn_sigma: false}}", *few, "--out", "flow")[0] == 0
    unet = "model={name: scm-unet, base_dim: 8, dim_mults: [2], time_embedding_dim: 16}"
    with monkeypatch.context() as patch:
        patch.setattr("vgm_plugins.scm.objective.STEEP", -1.0)
        code, _, err = vgm("train", "scm", unet, *few, "train.precision=bf16", "train.log_every=1", "--out", "scratch")
    assert code == 0 and err.count("about to diverge") == 1 and "derivatives in float32" in err, err
    record = json.loads(Path("scratch/metrics.jsonl").read_text().splitlines()[-1])
    assert {"tangent", "tangent_max", "derivative", "w_low", "w_mid", "w_high", "error"} <= record.keys()
    for out, recipe in (("student", "mnist-scd"), ("guided", "mnist-scd-guided")):
        code, _, err = vgm("distill", "scm", "--recipe", recipe, "--teacher", "flow", *few[2:], "--out", out)
        assert code == 0, err
    for run, words in (
        ("scratch", ["--sampler", "few-step"]),
        ("student", ["--steps", 2]),
        ("guided", ["--guidance-scale", 1.3]),
    ):
        code, _, err = vgm("sample", run, *words, "-n", 2, "--out", "x.npz", "--overwrite")
        assert code == 0, (run, err)
    code, _, err = vgm("sample", "student", "--guidance-scale", 2, "-n", 1, "--out", "y.npz")
    assert code == 2 and "guidance is in a student's weights" in err and not Path("y.npz").exists()
    with np.load("x.npz") as made:
        assert made["arr_0"].shape[0] == 2
