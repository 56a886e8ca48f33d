"""Consistency models against openai/consistency_models@e32b69e (golden cases), then what they do not cover."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.adm_unet.checkpoints import CONSISTENCY
from vgm_plugins.consistency.editing import coarse, edit, grey, keep
from vgm_plugins.consistency.function import edm_view, level_of
from vgm_plugins.consistency.losses import consistency_loss, distance, progressive_loss, weight_of
from vgm_plugins.consistency.objective import Consistency
from vgm_plugins.consistency.sampling import dpm_2_karras, multistep, progressive, spread
from vgm_plugins.consistency.schedules import draw_pairs, lognormal_probabilities, scales, target_ema

from vgm_cli.api import Request, Step, generators
from vgm_cli.diffusion import timesteps
from vgm_cli.diffusion.denoiser import Denoiser, x0_from
from vgm_cli.diffusion.flow_map import FlowMap, skip_scales
from vgm_cli.diffusion.objectives import gaussian_losses
from vgm_cli.diffusion.solvers import k_diffusion
from vgm_cli.diffusion.solvers.common import estimate
from vgm_cli.errors import VgmError
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, assert_close

golden = GoldenChecks("consistency")


class Made:
    """What the case was made with: the inner networks F(x_in, rescaled_t) that its notes state, and the arguments of
    KarrasDenoiser that its config gives, with the official values where it says nothing."""

    def __init__(self, case: GoldenCase):
        self.notes, config = case.notes, case.config
        self.sigma_min = config.get("sigma_min", config.get("t_min", 0.002))
        self.sigma_max = config.get("sigma_max", config.get("t_max", 80.0))
        self.sigma_data, self.rho = config.get("sigma_data", 0.5), config.get("rho", 7.0)
        self.levels = (self.sigma_min, self.sigma_max, self.rho)

    def toys(self) -> dict[str, tuple[float, float]]:
        found = re.findall(r"(\w+) ([-+.\de]+)\*tanh\(x_in\)([-+][.\de]+)\*rescaled_t", self.notes)
        return {role: (float(a), float(b)) for role, a, b in found}

    def toy(self, role: str) -> Callable[[Tensor, Tensor], Tensor]:
        a, b = self.toys()[role]
        return lambda x, t: a * torch.tanh(x) + b * t.view(-1, *[1] * (x.ndim - 1))

    def edm(self) -> dict[str, Any]:
        view = edm_view(self.sigma_data)
        return view | {"path": view["path"] | {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}}

    def function(self, role: str) -> FlowMap:
        return FlowMap(self.toy(role), self.edm(), "skip", self.sigma_min, self.sigma_max)

    def plain(self, role: str) -> Denoiser:
        """The same network in EDM's own preconditioner."""
        return Denoiser.from_config(self.toy(role), self.edm())

    def level(self, index: Tensor, count: int) -> Tensor:
        return level_of(index, count, *self.levels)


def function() -> FlowMap:
    """A consistency function on a network that is easy to write down, for the tests below."""
    return FlowMap(lambda x, t: 0.3 * torch.tanh(x) + 0.001 * t.view(-1, *[1] * (x.ndim - 1)), edm_view(), "skip")


def toy_lpips(a: Tensor, b: Tensor) -> Tensor:
    """The stand-in for piq's LPIPS that the notes state."""
    d = a - b
    across = (d[..., 1:] - d[..., :-1]).square().flatten(1).mean(1)
    return d.abs().flatten(1).mean(1) + 0.1 * across


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: "cm/unet.py" in c.source)
def unet(case: GoldenCase) -> None:
    """ADM's U-Net with the new order of attention, through the converter, back and forth."""
    theirs = case.config
    case.ignore("image_size", why="no layer depends on it: attention is placed by factors of it")
    case.ignore("dropout", why="evaluated without dropout")
    keys = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions",
            "channel_mult", "use_scale_shift_norm", "resblock_updown", "conv_resample", "dropout")  # fmt: skip
    own = {k: theirs[k] for k in keys if k in theirs}
    own |= {"num_classes": theirs.get("num_classes") or 0, "num_heads": max(theirs.get("num_heads", 1), 1)}
    width = theirs.get("num_head_channels", -1)
    own["num_head_channels"] = width if width > 0 else None
    read = CONSISTENCY.config(case.state)
    for key in ("model_channels", "num_res_blocks", "channel_mult", "num_classes", "use_scale_shift_norm"):
        assert read[key] == own[key], key
    assert read["use_new_attention_order"]
    state = CONSISTENCY.to_ours(case.state)
    net = registry().build("model", {"name": "adm-unet", **own, "use_new_attention_order": True, "learn_sigma": False})
    net.load_state_dict(state)
    back = CONSISTENCY.from_ours(state)
    assert back.keys() == case.state.keys() and all(torch.equal(back[k], v) for k, v in case.state.items())
    cond = {"y": case.inputs["y"]} if "in/y" in case else {}
    with torch.no_grad():
        got = net.eval()(case.inputs["x"], case.inputs["rescaled_t"], **cond)
    assert_close(got, case.outputs["F"], 1e-5, "F")


@golden.check(lambda c: "distillation" in c.config)
def denoise(case: GoldenCase) -> None:
    i, o, boundary, made = case.inputs, case.outputs, case.config["distillation"], Made(case)
    scales = skip_scales(i["sigma"], made.sigma_data, made.sigma_min)
    if not boundary:  # EDM's own, as every Denoiser has them
        edm, sigma = Denoiser.from_config(torch.add, made.edm()), i["sigma"].double()
        fed = edm.input_of(torch.ones_like(i["x"]), sigma).flatten(1)[:, 0]
        scales = (*x0_from("F", edm.path, sigma, made.sigma_data), fed)
    for got, name in zip(scales, ("c_skip", "c_out", "c_in")):
        assert_close(got, o[name], 1e-6, name)
    # which of the toy networks it was, the output says
    role = min(made.toys(), key=lambda r: float((made.plain(r).raw(i["x"], i["sigma"]) - o["F"]).abs().max()))
    view = made.function(role) if boundary else made.plain(role)
    assert_close(view.raw(i["x"], i["sigma"]), o["F"], 1e-6, "F")
    assert_close(view.denoise_ve(i["x"], i["sigma"]), o["denoised"], 1e-6, "denoised")


@golden.check(lambda c: c.config.get("mode") in ("ct", "cd") and "loss_norm" in c.config)
def losses(case: GoldenCase) -> None:
    i, config, made = case.inputs, case.config, Made(case)
    n = config["num_scales"]
    t, t2 = (made.level(i["indices"] + k, n) for k in (0, 1))
    got = consistency_loss(
        made.function("student").denoise_ve,
        made.function("target").denoise_ve,
        i["x0"],
        i["noise"],
        t,
        t2,
        made.plain("teacher").denoise_ve if config["mode"] == "cd" else None,
        measure=lambda a, b: distance(config["loss_norm"], a, b, toy_lpips),
    )
    weight = weight_of(config["weight_schedule"], t, t2, made.sigma_data)
    assert_close(got * weight, case.outputs["loss"], 1e-5, "loss")


@golden.check(lambda c: c.config.get("mode") == "progdist")
def progressive_distillation(case: GoldenCase) -> None:
    i, config, made = case.inputs, case.config, Made(case)
    n = config["num_scales"]
    levels = tuple(made.level(i["indices"] + k, n + 1) for k in (0, 0.5, 1))
    far = progressive_loss(
        made.plain("student").denoise_ve,
        made.plain("teacher").denoise_ve,
        i["x0"],
        i["noise"],
        levels,
        lambda a, b: distance(config["loss_norm"], a, b, toy_lpips),
    )
    weight = weight_of(config["weight_schedule"], levels[0], levels[2], made.sigma_data)
    assert_close(far * weight, case.outputs["loss"], 1e-5, "loss")


@golden.check(lambda c: c.config.get("mode") == "edm")
def edm_training(case: GoldenCase) -> None:
    """The teacher's own loss is the host's: means of squares, at levels that the case gives."""
    i, o, config, made = case.inputs, case.outputs, case.config, Made(case)
    assert config["loss_norm"] == "l2", "the host's denoising loss has squares only"
    case.ignore("num_scales", why="the levels are stored: training_losses draws none from a grid")
    weight = weight_of(config["weight_schedule"], i["sigmas"], i["sigmas"], made.sigma_data)
    t, plain = i["sigmas"].double(), made.plain("student")
    got = gaussian_losses(plain, i["x0"], t, i["noise"], "x0")[0]
    for key, w in (("mse", weight), ("xs_mse", torch.ones_like(weight))):
        assert_close(got * w, o[key], 1e-5, key)
    assert_close(o["loss"], o["mse"], 0, "loss")


@golden.check(lambda c: "start_scales" in c.config and "in/steps" in c)
def curricula(case: GoldenCase) -> None:
    config = case.config
    total, start, end = config["total_steps"], config["start_scales"], config["end_scales"]
    seen = 0
    for key, want in case.outputs.items():
        target, mode, what = key.split("_")
        for step, value in zip(case.inputs["steps"].tolist(), want.tolist()):
            if what == "scales":
                got: float = scales(mode, step, total, start, end, config["dspi"])
            else:
                got = target_ema(target, mode, step, total, config["start_ema"], start, end)
            assert got == pytest.approx(value, rel=1e-12), (key, step)
            seen += 1
    assert seen


@golden.check(lambda c: "P_mean" in c.config)
def improved(case: GoldenCase) -> None:
    """iCT's formulas; float64."""
    c, i, o = case.config, case.inputs, case.outputs
    counts = [scales("doubling", k, c["K"], c["s0"], c["s1"]) for k in i["k"].tolist()]
    assert counts == o["N_of_k"].tolist()
    ends = (c["sigma_min"], c["sigma_max"], c["rho"])
    sigmas = level_of(torch.arange(c["N"] - 1, -1, -1), c["N"], *ends)
    assert_close(sigmas, o["sigmas"], 1e-12, "sigmas")
    assert_close(lognormal_probabilities(sigmas, c["P_mean"], c["P_std"]), o["probs"], 1e-12, "probabilities")
    assert_close(weight_of("ict", sigmas[1:], sigmas[:-1]), o["weights"], 1e-12, "weights")
    assert 0.00054 * math.sqrt(c["d"]) == pytest.approx(float(o["c"]), rel=1e-12)
    far = distance("pseudo-huber", i["a"].double(), i["b"].double())
    assert_close(far, o["pseudo_huber"], 1e-6 if o["pseudo_huber"].dtype == torch.float32 else 1e-12, "pseudo-Huber")


@golden.check(lambda c: "sampler" in c.config)
def sampling(case: GoldenCase) -> None:
    """Consistency functions one and several steps; the official samplers of its EDM teachers are the host's."""
    config, kind, steps, made = case.config, case.config["sampler"], case.config["steps"], Made(case)
    x = case.inputs["draws_randn"][0] * made.sigma_max
    if kind == "onestep":
        case.ignore("steps", why="one step knows no grid")
    student = made.function("student") if kind in ("onestep", "multistep") else made.plain("student")
    sigmas = timesteps.karras(steps, *made.levels)
    churned = kind in ("heun", "dpm")
    churn = {k: config[k] for k in ("s_churn", "s_tmin", "s_tmax", "s_noise") if k in config} if churned else {}

    def sample(clip: bool) -> Tensor:
        draws = iter(case.inputs.get("draws_randn_like", ()))

        def f(x: Tensor, sigma: Tensor) -> Tensor:
            x0 = student.denoise_ve(x, sigma)
            return x0.clamp(-1, 1) if clip else x0

        def noise() -> Tensor:
            return next(draws)

        samplers: dict[str, Callable[[], Tensor]] = {
            "onestep": lambda: estimate(f, x, torch.tensor(made.sigma_max)),
            "multistep": lambda: multistep(f, x, config["ts"], noise, steps, made.levels),
            "progdist": lambda: progressive(f, x, steps, made.levels),
            "heun": lambda: k_diffusion.heun(f, x, sigmas, noise=noise, **churn),
            "dpm": lambda: dpm_2_karras(f, x, sigmas, noise=noise, **churn),
            "ancestral": lambda: k_diffusion.euler_ancestral(f, x, sigmas, noise=noise),
            "euler": lambda: k_diffusion.euler(f, x, sigmas),
        }
        return samplers[kind]().clamp(-1, 1)

    clip = config.get("clip_denoised", True)
    assert_close(sample(clip), case.outputs["x"], 1e-5, kind)
    if (sample(True) - sample(False)).abs().max() < 1e-4:
        case.ignore("clip_denoised", why="the end is clipped anyhow, and here nothing before it matters")


@golden.check(lambda c: "iterative_" in c.source)
def editing(case: GoldenCase) -> None:
    i, o, config, made = case.inputs, case.outputs, case.config, Made(case)
    task = case.source.rpartition("iterative_")[2].split()[0]
    projections: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "inpainting": lambda: keep(i["mask"]),
        "colorization": lambda: grey,
        "superres": lambda: coarse(config.get("patch_size", 8)),
    }
    project = projections[task]()
    known = project(i["images"])
    if task == "inpainting":  # officially black where nothing is known
        known = known - (1 - project(torch.ones_like(known)))
    assert_close(known, o["known"], 1e-5, "known")
    draws = iter(i["draws_randn_like"])
    f = made.function("student").denoise_ve
    x = edit(f, known, project, i["x"], config["ts"], lambda: next(draws), config["steps"], made.levels)
    assert_close(x, o["x"], 1e-5, task)


class TinyNet(nn.Module):
    """The network of the training cases: c2(silu(c1(x) + e(rescaled_t / 1000)))."""

    def __init__(self, channels: int = 8, in_channels: int = 3):
        super().__init__()
        self.c1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.e = nn.Linear(1, channels)
        self.c2 = nn.Conv2d(channels, in_channels, 3, padding=1)
        self.num_classes = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.c2(F.silu(self.c1(x) + self.e(t[:, None] / 1000)[:, :, None, None]))


class Given(Step):
    """A step whose noise and (descending) index are given."""

    def __init__(self, index: int, total: int, noise: Tensor, chosen: Tensor, count: int):
        super().__init__(index, total=total)
        self.__dict__.update(noise=noise, chosen=chosen, count=count)

    def randn(self, shape: Any, name: str) -> Tensor:
        return self.noise

    def rand(self, n: int, name: str) -> Tensor:
        return (self.chosen.double() + 0.5) / (self.count - 1)


@golden.check(lambda c: "target_ema_mode" in c.config and "in/batches" in c)
def training(case: GoldenCase) -> None:
    """Loss, RAdam, evaluation average, target: losses of every step, all weights at the end, by the objective."""
    i, o, config, made = case.inputs, case.outputs, case.config, Made(case)
    shape = case.state["c1.weight"].shape
    net, teacher = TinyNet(shape[0], shape[1]), TinyNet(shape[0], shape[1]).requires_grad_(False)
    net.load_state_dict(case.state)
    teacher.load_state_dict(case.state)
    total = config["total_steps"]
    case.ignore("distill_steps_per_iter", why="no stage of progressive distillation is run")
    if config["scale_mode"] == "fixed":
        case.ignore("end_scales", "total_steps", why="the number of scales stays at start_scales")
    keys = {"loss_norm": "distance", "weight_schedule": "weighting"}
    chosen = {ours: config[theirs] for theirs, ours in keys.items() if theirs in config}
    objective = Consistency(
        net,
        Denoiser.from_config(teacher, made.edm()) if config["mode"] == "cd" else None,
        view=made.edm() if config["mode"] == "ct" else None,
        sigma_min=made.sigma_min,
        sigma_max=made.sigma_max,
        rho=made.rho,
        scale_mode=config["scale_mode"],
        start_scales=config["start_scales"],
        end_scales=config["end_scales"],
        total_steps=total,
        target=config["target_ema_mode"],
        target_decay=config["start_ema"],
        **chosen,
    )
    name, *numbers = re.fullmatch(r"(\w+) betas\(([\d.]+),([\d.]+)\) eps(\S+)", config["optimizer"]).groups()  # type: ignore[union-attr]
    b1, b2, eps = map(float, numbers)
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=config["lr"], betas=(b1, b2), eps=eps)
    average = {k: v.clone() for k, v in net.state_dict().items()}
    seen = []
    for index in range(len(i["batches"])):
        count = objective.count(index, total)
        step = Given(index, total, i["draws_randn_like"][index], i["draws_randint"][index], count)
        loss, _ = objective.loss("main", {"x": i["batches"][index]}, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for k, v in net.state_dict().items():
            average[k].lerp_(v, 1 - config["ema_rate"])
        objective.after_step(step)
        seen.append(loss.detach())
    assert_close(torch.stack(seen), o["losses"], 1e-5, "losses")
    target = {k.removeprefix("target."): v for k, v in objective.state_dict().items()}
    for prefix, state in (("model/", net.state_dict()), ("ema/", average), ("target/", target)):
        for k, v in state.items():
            assert_close(v, o[prefix + k], 1e-5, prefix + k, adam_floor(config["lr"], len(seen)))


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- what the golden cases do not cover ------------------------------------------------------------------------------


def small(name: str, learn_sigma: bool = False, dropout: float = 0.0) -> nn.Module:
    base: dict[str, dict[str, Any]] = {
        "dit": {"input_size": 8, "patch_size": 2, "in_channels": 2, "hidden_size": 32, "depth": 1, "num_heads": 2},
        "adm-unet": {"image_size": 8, "in_channels": 2, "model_channels": 32, "num_res_blocks": 1, "null_class": True,
                     "attention_resolutions": [2], "channel_mult": [1, 1], "dropout": dropout},
    }  # fmt: skip
    torch.manual_seed(0)
    net = registry().build("model", {"name": name, "num_classes": 3, "learn_sigma": learn_sigma, **base[name]})
    suites.randomise(net)
    return net


VIEWS: dict[str, dict[str, Any]] = {
    "ddpm": {"path": "vp-discrete", "prediction": "eps", "time": "index", "learned_sigma": True},
    "flow": {"path": "linear", "prediction": "velocity", "time": "reversed"},
    "edm": {"path": "edm", "prediction": "F", "time": "edm"},
    "v": {"path": "cosine", "prediction": "v"},
}


def teacher_of(kind: str, name: str = "dit") -> Denoiser:
    net = small(name, VIEWS[kind].get("learned_sigma", False)).eval().requires_grad_(False)
    return Denoiser.from_config(net, VIEWS[kind])


@pytest.mark.parametrize("kind", VIEWS)
def test_boundary_condition_for_any_network(kind: str) -> None:
    """f(x, sigma_min) = x whatever the network predicts on whatever path; elsewhere f is the network's own x0."""
    teacher = teacher_of(kind)
    f = FlowMap(teacher.network, teacher, "skip")
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 2, 8, 8, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    assert_close(f.denoise_ve(x.float(), 0.002, y=y), x.float(), 1e-6, "identity")
    sigma = torch.tensor([0.1, 1.0, 10.0, 70.0])
    x = x.float() * sigma.view(-1, 1, 1, 1)
    assert_close(f.denoise_ve(x, sigma, y=y), teacher.denoise_ve(x, sigma, y=y), 2e-2, "x0")
    again = FlowMap(teacher.network, **{k: v for k, v in f.view().items() if k != "name"})
    assert torch.equal(again.denoise_ve(x, sigma, y=y), f.denoise_ve(x, sigma, y=y))


@pytest.mark.parametrize("kind", VIEWS)
def test_any_teacher_distills(kind: str) -> None:
    """The loss is finite, its gradient reaches the student, and with guidance the teacher's step is another one."""
    teacher = teacher_of(kind)
    student = small("dit", VIEWS[kind].get("learned_sigma", False))
    student.load_state_dict(teacher.network.state_dict())
    batch = {"x": torch.randn(4, 2, 8, 8), "cond": {"y": torch.tensor([0, 1, 2, 0])}}
    losses = []
    for scale in (None, 3.0):
        objective = Consistency(student, teacher, guidance_scale=scale)
        loss, logs = objective.loss("main", batch, Step(0))
        loss.backward()
        losses.append(loss.item())
        assert math.isfinite(loss.item()) and logs["scales"] == 40
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
        assert not any(p.requires_grad for p in objective.copy.parameters())
    assert losses[0] != losses[1]


def test_both_networks_see_the_same_dropout() -> None:
    """With equal weights and neighbours at the same level the loss is zero in spite of dropout."""
    net = small("adm-unet", dropout=0.5).train()
    f = FlowMap(net, edm_view(), "skip").denoise_ve
    x, t = torch.randn(2, 2, 8, 8), torch.full((2,), 5.0)
    y = torch.tensor([0, 1])
    assert consistency_loss(f, f, x, torch.randn_like(x), t, t, y=y).abs().max() < 1e-12
    assert not torch.equal(f(x, t, y=y), f(x, t, y=y))


def test_target_follows_by_the_schedule() -> None:
    """target = mu target + (1 - mu) student, with mu of the same step."""
    net = small("dit")
    objective = Consistency(
        net, scale_mode="progressive", start_scales=2, end_scales=20, target="adaptive", target_decay=0.9
    )
    before = {k: v.clone() for k, v in objective.copy.state_dict().items()}
    suites.randomise(net, 7)
    step = Step(30, total=100)
    mu = target_ema("adaptive", "progressive", 30, 100, 0.9, 2, 20)
    assert 0.9 < mu < 1
    objective.after_step(step)
    for k, v in objective.copy.state_dict().items():
        assert_close(v, mu * before[k] + (1 - mu) * net.state_dict()[k], 1e-5, k)
    restored = Consistency(small("dit"), scale_mode="progressive", start_scales=2, end_scales=20, target="adaptive")
    restored.load_state_dict(objective.state_dict())
    assert all(torch.equal(v, restored.state_dict()[k]) for k, v in objective.state_dict().items())


def test_improved_training_has_no_target_network() -> None:
    objective = Consistency(
        small("dit"), scale_mode="doubling", start_scales=10, end_scales=80, target="none", weighting="ict",
        distance="pseudo-huber", time_sampling="lognormal",
    )  # fmt: skip
    assert objective.copy is None and objective.state_dict() == {}
    assert [objective.count(k, 400) for k in (0, 99, 100, 300, 400)] == [11, 11, 21, 81, 81]
    loss, _ = objective.loss(
        "main", {"x": torch.randn(4, 2, 8, 8), "cond": {"y": torch.tensor([0, 1, 2, 0])}}, Step(0, total=400)
    )
    loss.backward()
    assert math.isfinite(loss.item())


def test_draws_follow_the_lognormal() -> None:
    n = 20
    sigmas = level_of(torch.arange(n - 1, -1, -1), n, 0.002, 80.0)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    index = draw_pairs(u, n, sigmas)
    assert index.min() >= 0 and index.max() <= n - 2
    share = torch.bincount(n - 2 - index, minlength=n - 1) / len(u)
    assert_close(share, lognormal_probabilities(sigmas).float(), 1e-3, "shares")
    assert torch.equal(draw_pairs(torch.tensor([0.0, 0.999999]), n), torch.tensor([0, n - 2]))


def test_progressive_distillation_turns_students_into_teachers() -> None:
    teacher = teacher_of("edm")
    student = small("dit")
    objective = Consistency(student, teacher, mode="progdist", scale_mode="progdist", start_scales=8, steps_per_stage=3)
    assert [objective.count(k, 100) for k in range(0, 12, 3)] == [8, 4, 2, 2]
    suites.randomise(student, 3)
    batch = {"x": torch.randn(2, 2, 8, 8), "cond": {"y": torch.tensor([0, 1])}}
    loss, _ = objective.loss("main", batch, Step(0, total=100))
    assert math.isfinite(loss.item()) and loss.item() > 0

    def same() -> bool:
        return all(
            torch.equal(a, b) for a, b in zip(student.state_dict().values(), teacher.network.state_dict().values())
        )

    objective.after_step(Step(1, total=100))
    assert not same()
    objective.after_step(Step(2, total=100))  # the next step has half the levels
    assert same() and "name" in objective.view() and objective.view()["name"] == "denoiser"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampler(steps: int) -> None:
    """NFE, items of their own, the paper's points, and another network's own view."""
    teacher = teacher_of("flow")
    f = FlowMap(teacher.network, teacher, "skip")
    sampler = registry().build("sampler", {"name": "consistency", "steps": steps})

    def sample(items: list[int], view: Denoiser = f) -> tuple[Tensor, int]:
        request = Request((2, 8, 8), generators(items), {"y": torch.tensor([i % 3 for i in items])})
        with torch.no_grad():
            return sampler(view, request), request.info["nfe"]

    x, nfe = sample([0, 1, 2])
    assert nfe == steps and torch.isfinite(x).all()
    assert_close(sample([1])[0], x[1:2], 1e-4, "alone")
    assert sample([0], teacher)[1] == steps
    points = registry().build("sampler", {"name": "consistency", "ts": [0, 22, 39]})
    request = Request((2, 8, 8), generators([0]), {"y": torch.tensor([0])})
    with torch.no_grad():
        points(f, request)
    assert request.info["nfe"] == 2 and spread(2, 40) == [0, 20, 39]


def test_one_step_is_the_function_at_pure_noise() -> None:
    teacher = teacher_of("edm")
    f = FlowMap(teacher.network, teacher, "skip")
    request = Request((2, 8, 8), generators([5]), {"y": torch.tensor([1])})
    with torch.no_grad():
        x = registry().build("sampler", "consistency")(f, request)
        z = 80 * Request((2, 8, 8), generators([5])).randn()
        assert_close(x, f.denoise_ve(z, 80.0, y=torch.tensor([1])), 1e-5, "f")


class Quarter:
    """2 x 2 means as an operator that remembers what it was shown."""

    name, has_pinv = "quarter", True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return F.avg_pool2d(x, 2)

    def pinv(self, y: Tensor) -> Tensor:
        return F.interpolate(y, scale_factor=2, mode="nearest")


def test_editing_agrees_with_what_is_known() -> None:
    teacher = teacher_of("edm")
    f = FlowMap(teacher.network, teacher, "skip")
    sampler = registry().build("sampler", {"name": "consistency-edit", "steps": 4})
    truth = torch.rand(2, 2, 8, 8) * 2 - 1
    request = Request((2, 8, 8), generators([0, 1]), {"y": torch.tensor([0, 1])}, operator=Quarter())
    request.measurement = F.avg_pool2d(truth, 2)
    with torch.no_grad():
        x = sampler(f, request)
    want = [(request.measurement - F.avg_pool2d(x0, 2)).flatten(1).norm(dim=1) for x0 in request.operator.seen]
    assert_close(torch.stack(request.info["residual"]), torch.stack(want), 1e-5, "residuals")
    assert_close(F.avg_pool2d(x, 2), request.measurement, 1e-5, "known part")
    assert not torch.allclose(x[0], truth[0], atol=1e-2) and request.info["nfe"] == 4
    with pytest.raises(VgmError, match="something to agree with"):
        sampler(f, Request((2, 8, 8), generators([0])))
    for project in (keep(torch.tensor([[[[1.0, 0.0] * 4] * 8]])), coarse(4)):
        assert_close(project(project(truth)), project(truth), 1e-6, "a projection")
    colour = torch.randn(2, 3, 8, 8)
    assert_close(grey(grey(colour)), grey(colour), 1e-6, "a projection")
    with pytest.raises(VgmError, match="do not divide"):
        coarse(3)(truth)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"mode": "cd"}, "needs a teacher"),
        ({"distance": "lpips"}, "role lpips"),
        ({"target": "adaptive"}, "goes with scale_mode=progressive"),
        ({"scale_mode": "progdist"}, "go together"),
        ({"start_scales": 1}, "2 <= start"),
    ],
)
def test_what_does_not_go_together(keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(VgmError, match=match):
        Consistency(small("dit"), **keywords)


DIT = ("codec=null", "model.hidden_size=32", "model.depth=1", "model.num_heads=2", "model.patch_size=7")
TEACHER = tuple(k.replace("model.", "teacher.") for k in DIT)


class TestTraining(suites.ObjectiveSuite):
    recipe = "consistency/mnist"
    overrides = DIT


class TestDistillation(suites.ObjectiveSuite):
    recipe = "consistency/mnist-cd"
    overrides = TEACHER


class TestSampler(suites.SamplerSuite):
    recipe = "consistency/mnist"
    overrides = (*DIT, "sampler.steps=3")


RECIPES = sorted(p.stem for p in (Path(__file__).parents[2] / "recipes/consistency").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
class TestRecipes(suites.RecipeSuite):
    @pytest.fixture(autouse=True)
    def _of(self, name: str) -> None:
        type(self).recipe = f"consistency/{name}"
