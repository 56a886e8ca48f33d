"""DMD and DMD2 against tianweiy/DMD2@8d8fa55 and NVlabs/FastGen@34f30e8 (golden cases), then what they do not cover."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.dmd.checkpoints import EDM, HEAD
from vgm_plugins.dmd.discriminator import Features, Head, head_for
from vgm_plugins.dmd.generator import denoising_times, level_times
from vgm_plugins.dmd.losses import (
    discriminator_loss,
    dm_gradient,
    dm_loss,
    dmd_weight,
    fake_loss,
    generator_gan_loss,
    score,
)
from vgm_plugins.dmd.objective import DMD

from vgm_cli.api import Request, Step, generators
from vgm_cli.conditioning import ClassLabel, Conditions, Part
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance
from vgm_cli.errors import VgmError
from vgm_cli.nets.edm import DhariwalUNet
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("dmd")

EDM_PATH = {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0}
SD_PATH = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


def given(path: dict[str, Any], config: Any) -> dict[str, Any]:
    """The path with what the case's config says of it; the official values elsewhere."""
    theirs = {"steps": "num_train_timesteps", "sigma_data": "sigma_data"}
    keys = {k: theirs.get(k, k) for k in (*path, "sigma_data") if k != "name"}
    if path["name"] != "edm":
        del keys["sigma_data"]
    return path | {ours: config[k] for ours, k in keys.items() if k in config}


def toys(case: GoldenCase) -> dict[str, float]:
    """The number p of each toy network, as the case's notes state them."""
    return {role: float(p) for p, role in re.findall(r"(?:p=)?([\d.]+) (real|fake|generator)", case.notes)}


def spread(t: Tensor, x: Tensor) -> Tensor:
    return t.float().view(-1, *[1] * (x.ndim - 1))


class EDMToy(nn.Module):
    """The denoiser that the EDM cases state in their notes: D(x, sigma, y), and its bottleneck."""

    def __init__(self, p: float, channels: int = 32):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self.channels = channels
        self.sample_shape = (3, 16, 16)

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Tensor:
        s = spread(sigma, x)
        out = x * 0.25 / (s**2 + 0.25) + self.p * torch.tanh(x) * s / (s + 1)
        return out if y is None else out + spread(0.01 * (y * torch.arange(y.shape[1])).sum(1), x)

    middle = "h"

    def features(self, x: Tensor, sigma: Tensor, layers: Sequence[str], y: Tensor | None = None) -> list[Tensor]:
        assert layers == ["h"]
        h = F.adaptive_avg_pool2d(torch.tanh(x * (1 + self.p) / (1 + spread(sigma, x))), 8)
        return [h.repeat(1, 11, 1, 1)[:, : self.channels]]


def edm(case: GoldenCase, role: str, channels: int = 32) -> Denoiser:
    path = given(EDM_PATH, case.config)
    return Denoiser(EDMToy(toys(case)[role], channels), path, "x0", time="sigma")


class SDToy(nn.Module):
    """The eps-network of the Stable Diffusion cases; condition c, unconditional 0."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.p * torch.tanh(x) + 0.0005 * spread(t, x) + 0.1 * spread(c, x)

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {k: torch.zeros_like(v) for k, v in cond.items()}


def sd(case: GoldenCase, role: str) -> Denoiser:
    return Denoiser(SDToy(toys(case)[role]), given(SD_PATH, case.config), "eps", time="index")


def edm_times(case: GoldenCase, view: Denoiser, level: Tensor) -> Tensor:
    return level_times(view, case.config.get("num_train_timesteps", 1000), case.config.get("rho", 7.0))[level.flatten()]


def times(view: Denoiser, level: Tensor) -> Tensor:
    return level_times(view)[level.flatten()]


# -- golden cases ----------------------------------------------------------------------------------------------------


@golden.check(lambda c: c.config.get("model_type") == "DhariwalUNet")
def network(case: GoldenCase) -> None:
    """Output and bottleneck of the ADM U-Net inside EDM's preconditioner, through the converter, back and forth."""
    state = EDM.to_ours(case.state)
    net = DhariwalUNet(**EDM.config(case.state), dropout=0.0).eval()
    net.load_state_dict(state)
    back = EDM.from_ours(state)
    assert back.keys() == case.state.keys() and all(torch.equal(back[k], v) for k, v in case.state.items())
    config, read, names = case.config, EDM.config(case.state), {"label_dim": "num_classes"}
    levels = enumerate(config["channel_mult"])
    widths = {config["img_resolution"] >> i: m * config["model_channels"] for i, m in levels}
    for key in config:
        if key not in (
            "model_type",
            "attn_resolutions",
            "sigma_data",
            "sigma_min",
            "sigma_max",
            "use_fp16",
            "dropout",
            "augment_dim",
        ):
            assert read[names.get(key, key)] == config[key], key
    heads = [s for s in config["attn_resolutions"] if widths[s] >= 64]  # of 64 channels each: none below that
    assert sorted(read["attn_resolutions"]) == sorted(heads)
    if max(widths.values()) < 64:
        case.ignore("attn_resolutions", why="no level has the 64 channels of one head")
    case.ignore("dropout", "augment_dim", why="evaluated, without augmentation labels")
    case.ignore("sigma_min", "sigma_max", "use_fp16", why="the levels are given, and everything is fp32")
    view = Denoiser(net, {"name": "edm", "sigma_data": config["sigma_data"]}, "F", time="edm")
    x, sigma = case.inputs["x"], case.inputs["sigma"].flatten()
    y = case.inputs.get("labels")
    cond = {} if y is None else {"y": y}
    with torch.no_grad():
        assert_close(view.predict(x, sigma, "x0", **cond), case.outputs["D"], 1e-5, "D")
        if "out/bottleneck" in case:
            got = Features(net)(view, x, sigma, **cond)
            assert_close(got, case.outputs["bottleneck"], 1e-5, "bottleneck")
            if y is not None and ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all():
                numbers = {"y": y.argmax(1)}
                assert_close(view.predict(x, sigma, "x0", **numbers), case.outputs["D"], 1e-5, "labels as numbers")


@golden.check(lambda c: "out/loss_dm" in c and "edm_guidance" in c.source)
def edm_distribution_matching(case: GoldenCase) -> None:
    real, fake = edm(case, "real"), edm(case, "fake")
    i, o, config = case.inputs, case.outputs, case.config
    x, cond = i["latents"].clone().requires_grad_(), {"y": i["labels"]}
    n = config["num_train_timesteps"]
    assert int(config["min_step_percent"] * n) <= i["timesteps"].min() <= int(config["max_step_percent"] * n)
    case.ignore("min_step_percent", "max_step_percent", why="the levels are stored: nothing is drawn from this range")
    t = edm_times(case, real, i["timesteps"])
    with torch.no_grad():
        x_t = real.path.add_noise(x, i["noise"], t)
        a, b = (v.predict(x_t, t, "x0", **cond) for v in (real, fake))
    assert_close(a, o["pred_real"], 1e-5, "real")
    assert_close(b, o["pred_fake"], 1e-5, "fake")
    gradient = dm_gradient(x.detach(), a, b)
    # a difference of two close estimates over a small number: 1e-7 in each is 1e-5 of it
    assert_close(gradient, o["grad"], 1e-4, "gradient")
    assert_close(
        dm_gradient(x.detach(), o["pred_real"], o["pred_fake"]), o["grad"], 1e-5, "gradient of their estimates"
    )
    loss = dm_loss(x, dm_gradient(x.detach(), o["pred_real"], o["pred_fake"]))
    loss.backward()
    assert_close(loss, o["loss_dm"], 1e-5, "loss")
    assert_close(x.grad, o["dloss_dlatents"], 1e-5, "dloss / dx")


@golden.check(lambda c: "out/loss_fake" in c and "out/dloss_dp" in c)
def edm_fake(case: GoldenCase) -> None:
    view, i = edm(case, "fake"), case.inputs
    t = edm_times(case, view, i["timesteps"])
    loss = fake_loss(view, i["latents"], t, i["noise"], "edm", y=i["labels"])
    loss.backward()
    assert_close(loss, case.outputs["loss_fake"], 1e-5, "loss")
    assert_close(view.network.p.grad, case.outputs["dloss_dp"], 1e-5, "gradient")


@golden.check(lambda c: "diffusion_gan" in c.config)
def edm_gan(case: GoldenCase) -> None:
    """Logits, both losses, and the gradient that reaches the generator through the fake score."""
    state, i, o = HEAD.to_ours(case.state), case.inputs, case.outputs
    config = HEAD.config(case.state)
    fake, head = edm(case, "fake", config["channels"]), Head(**config)
    head.load_state_dict(state)
    classes = getattr(fake.network, "num_classes", 0)
    told = Conditions([Part("class", ClassLabel(classes), "label")] if classes else [], fake.network)
    made = head_for(fake.network, Features(fake.network), fake, told)
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in state.items()}

    last = case.config["diffusion_gan_max_timestep"]
    if config["channels"] == 32:
        case.ignore("diffusion_gan", why="the head's last norm has groups of one pixel: no logit depends on the image")
    case.ignore("diffusion_gan_max_timestep", why="the levels are stored, or no noise is added")

    def logits(x: Tensor, y: Tensor, name: str) -> Tensor:
        level = i[f"t_{name}"] if case.config["diffusion_gan"] else torch.zeros(len(x), dtype=torch.long)
        t = edm_times(case, fake, level)
        if case.config["diffusion_gan"]:
            assert level.max() < last
            x = fake.path.add_noise(x, i[f"n_{name}"], t)
        return head(Features(fake.network)(fake, x, t, y=y))

    x = i["latents"].clone().requires_grad_()
    gan = generator_gan_loss(logits(x, i["labels"], "gen"))
    (gradient,) = torch.autograd.grad(gan, x)
    assert_close(gan, o["gen_cls_loss"], 1e-5, "generator")
    # 32 channels in 32 groups of one pixel: the last norm gives its bias, and what is left of the gradient is rounding
    error = (gradient - o["dgen_dimage"]).abs().max()
    assert error <= 1e-4 * o["dgen_dimage"].abs().max() + (1e-6 if config["channels"] == 32 else 0.0)
    real = logits(i["real"], i["real_labels"], "real")
    made_up = logits(i["latents"], i["labels"], "fake")
    assert_close(discriminator_loss(real, made_up), o["guidance_cls_loss"], 1e-5, "discriminator")
    assert_close(real.sigmoid().flatten(), o["p_real"], 1e-5, "p(real)")
    assert_close(made_up.sigmoid().flatten(), o["p_fake"], 1e-5, "p(fake)")


@golden.check(lambda c: "real_guidance_scale" in c.config)
def sd_distribution_matching(case: GoldenCase) -> None:
    """Guidance on the teacher alone; x0 in float64; the fake loss is plain eps."""
    i, o = case.inputs, case.outputs
    real = ClassifierFreeGuidance(sd(case, "real"), case.config["real_guidance_scale"])
    fake, cond = sd(case, "fake"), {"c": i["c"]}
    x = i["latents"].clone().requires_grad_()
    t = times(fake, i["timesteps"])
    with torch.no_grad():
        x_t = fake.path.add_noise(x, i["noise"], t)
        a, b = (v.predict(x_t, t, "x0", **cond) for v in (real, fake))
    assert_close(a, o["pred_real"], 1e-5, "real")
    assert_close(b, o["pred_fake"], 1e-5, "fake")
    gradient = dm_gradient(x.detach(), a, b)
    assert_close(gradient, o["grad"], 1e-4, "gradient")
    loss = dm_loss(x, gradient)
    loss.backward()
    assert_close(loss, o["loss_dm"], 1e-4, "loss")
    assert_close(x.grad, o["dloss_dlatents"], 1e-4, "dloss / dx")
    fake_t = times(fake, i["fake_timesteps"])
    assert_close(fake_loss(fake, i["latents"], fake_t, i["fake_noise"], **cond), o["loss_fake"], 1e-5, "fake loss")


@golden.check(lambda c: "num_denoising_step" in c.config)
def backward_simulation(case: GoldenCase) -> None:
    i, o, k = case.inputs, case.outputs, int(case.inputs["draws_randint"])
    view = sd(case, "generator")
    steps, last = case.config["num_denoising_step"], case.config["denoising_timestep"]
    student = FlowMap(view.network, view, times=denoising_times(view, steps, count=last))
    at = torch.tensor([view.path.timestep(t) for t in student.times]).round().long()
    assert torch.equal(at, o["step_list"])
    draws = iter(i.get("draws_randn_like", ()))
    images = student.along(i["noise"], student.times[:k], lambda: next(draws), c=i["c"]) if k else i["noise"]
    assert_close(images, o["clean"], 1e-5, "images")
    assert (at[k] == o["timesteps"]).all()


@golden.check(lambda c: "out/x0_steps" in c and isinstance(c.config.get("steps"), list))
def few_steps(case: GoldenCase) -> None:
    i, o, view = case.inputs, case.outputs, sd(case, "generator")
    at = [float(t) for t in times(view, torch.tensor(case.config["steps"]))]
    student = FlowMap(view.network, view, times=at)
    assert_close(torch.tensor(student.noise_scale()), torch.tensor(1.0), 1e-2, "scale of the noise")
    draws = iter(i.get("draws_randn_like", ()))
    images: list[Tensor] = []
    last = student.along(i["noise"], at, lambda: next(draws), None, lambda i, x, x0: images.append(x0), c=i["c"])
    assert_close(torch.stack(images), o["x0_steps"], 1e-5, "steps")
    assert_close(last, o["x0"], 1e-5, "last")


@golden.check(lambda c: "out/vsd" in c)
def fastgen(case: GoldenCase) -> None:
    i, o = case.inputs, case.outputs
    for key, scale in (("vsd", None), ("vsd_scaled", i["scale"])):
        x = i["gen"].clone().requires_grad_()
        loss = dm_loss(x, dm_gradient(x.detach(), i["teacher_x0"], i["fake_x0"], 1e-6, scale))
        assert_close(loss, o[key], 1e-5, key)
        if key == "vsd":
            assert_close(torch.autograd.grad(loss, x)[0], o["dvsd"], 1e-5, "gradient")
    assert_close(generator_gan_loss(i["fl"]), o["gan_gen"], 1e-5, "generator")
    assert_close(discriminator_loss(i["rl"], i["fl"]), o["gan_disc"], 1e-5, "discriminator")


@golden.check(lambda c: "lambda_reg" in c.config)
def dmd1(case: GoldenCase) -> None:
    """The score form of DMD's gradient is ours with scale = alpha; float64."""
    i, o = case.inputs, case.outputs
    x, alpha, sigma = i["x"], i["alpha"], i["sigma"]
    x_t = spread64(alpha, x) * x
    s_real, s_fake = (score(i[k], x_t, alpha, sigma) for k in ("mu_real", "mu_fake"))
    weight = dmd_weight(x, i["mu_real"], alpha, sigma)
    assert_close(s_real, o["s_real"], 1e-12, "s_real")
    assert_close(s_fake, o["s_fake"], 1e-12, "s_fake")
    assert_close(weight, o["w"], 1e-12, "w")
    assert_close(spread64(weight * alpha, x) * (s_fake - s_real), o["grad"], 1e-12, "gradient")
    ours = dm_gradient(x, i["mu_real"], i["mu_fake"], scale=alpha)
    assert_close(ours, o["grad_x0_form"], 1e-12, "ours")
    assert_close(case.config["lambda_reg"] * F.mse_loss(i["x_ref"], i["y_ref"]), o["l2_reg"], 1e-12, "regression")


def spread64(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


class TinyNet(nn.Module):
    """The network of the training case: D = c_skip x + c_out c2(h), h = silu(c1(c_in x) + e(ln(sigma) / 4))."""

    def __init__(self, channels: int = 32, in_channels: int = 3):
        super().__init__()
        self.c1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.e = nn.Linear(1, channels)
        self.c2 = nn.Conv2d(channels, in_channels, 3, padding=1)
        self.num_classes = 0
        self.sample_shape = (in_channels, 8, 8)

    def hidden(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return F.silu(self.c1(x) + self.e(c_noise[:, None])[:, :, None, None])

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.c2(self.hidden(x, c_noise))

    middle = "hidden"

    def features(self, x: Tensor, c_noise: Tensor, layers: Sequence[str]) -> list[Tensor]:
        assert layers == ["hidden"]
        return [F.adaptive_avg_pool2d(self.hidden(x, c_noise), 8)]


class Given(Step):
    """A step whose draws come from lists, in the official order of what is asked for."""

    def __init__(self, index: int, noises: Iterator[Tensor], given: dict[str, Iterator[Tensor]], low: int):
        super().__init__(index)
        self.__dict__.update(noises=noises, given=given, low=low)

    def randn(self, shape: Any, name: str) -> Tensor:
        source = self.given["z"] if name == "z" else self.given.get(f"{self.index} {name}", self.noises)
        return next(source)

    def randint(self, high: int, n: int, name: str) -> Tensor:
        level = next(self.given["gan" if name.startswith("gan") else "plain"]).flatten()
        return level - self.low if name == "dm level" else level


@golden.check(lambda c: "dfake_gen_update_ratio" in c.config)
def two_time_scales(case: GoldenCase) -> None:
    """The whole alternation, through the objective and its phases: losses of every step, weights at the end."""
    i, o, config = case.inputs, case.outputs, case.config
    shape = case.state["teacher.c1.weight"].shape
    nets = [TinyNet(shape[0], shape[1]) for _ in range(3)]
    start = {k.removeprefix("teacher."): v for k, v in case.state.items() if k.startswith("teacher.")}
    for net in nets:
        net.sample_shape = tuple(i["noise"].shape[2:])
        net.load_state_dict(start)
    teacher, student, fake = nets
    theirs = {
        "diffusion_gan": "diffusion_gan",
        "diffusion_gan_max_timestep": "gan_max_level",
        "min_step_percent": "min_level",
        "max_step_percent": "max_level",
    }
    objective = DMD(
        student,
        Denoiser(teacher.requires_grad_(False), given(EDM_PATH, config), "F", time="edm"),
        fake,
        first_time=config["conditioning_sigma"],
        **{ours: config[k] for k, ours in theirs.items() if k in config},
        update_ratio=config["dfake_gen_update_ratio"],
        gan_weight=config["gen_cls_loss_weight"],
        discriminator_weight=config["cls_loss_weight"],
    )
    objective.head.load_state_dict(HEAD.to_ours(case.state))
    optimizers = {
        phase.optimizer: torch.optim.AdamW(
            [p for role in phase.trains for p in objective.networks[role].parameters()],
            config["lr"],
            weight_decay=config.get("weight_decay", 0.01),
        )
        for phase in objective.phases()
    }
    noises = iter(i["draws_randn_like"])
    levels = {"z": iter(i["noise"]), "plain": iter(i["draws_randint_0"]), "gan": iter(i["draws_randint_2"])}
    seen: dict[str, list[Tensor]] = {"dm": [], "gan": [], "fake": [], "discriminator": []}
    longest = 0.0
    for index in range(config["steps"]):
        step = Given(index, noises, levels, objective.dm_range[0])
        # the official fake loss draws its noise before its level, which is the same order in lists of one kind
        for phase in objective.phases():
            if index % phase.every:
                continue
            trained = [p for role in phase.trains for p in objective.networks[role].parameters()]
            for net in objective.networks.values():
                net.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)
            loss, logs = objective.loss(phase.name, {"x": i["real"][index]}, step)
            loss.backward()
            longest = max(longest, float(torch.nn.utils.clip_grad_norm_(trained, config["max_grad_norm"])))
            optimizers[phase.optimizer].step()
            optimizers[phase.optimizer].zero_grad()
            for k in seen.keys() & logs.keys():
                seen[k].append(logs[k])
    # With 32 channels the head's last norm has groups of one pixel, so that the generator's first gradient (its score
    # difference is still zero) is rounding noise, which Adam makes as large as any other. The official code itself does
    # not repeat these numbers on another machine; test_step_order has no such head.
    noisy = len(case.state["cls_pred_branch.1.bias"]) == 32
    if noisy:
        case.ignore("gen_cls_loss_weight", "cls_loss_weight", why="only test_step_order can tell: see above")
    if longest < config["max_grad_norm"]:
        case.ignore("max_grad_norm", why="no gradient is as long")
    for ours, theirs in zip(seen, ("loss_dm", "gen_cls_loss", "loss_fake", "guidance_cls_loss")):
        got, want = torch.stack(seen[ours]), o[theirs]
        assert_close(got[0], want[0], 1e-5, f"first {theirs}")
        assert_close(got, want, 5e-2 if noisy else 1e-4, theirs)
    for net, prefix in ((student, "generator/"), (fake, "fake/")):
        moved, wanted = (
            torch.cat([(state[k] - start[k]).flatten() for k in start])
            for state in (net.state_dict(), {k: o[prefix + k] for k in start})
        )
        assert F.cosine_similarity(moved, wanted, 0) > (0.95 if noisy else 0.9999), prefix
        for name, value in net.state_dict().items():
            assert_close(value, o[prefix + name], 5e-2 if noisy else 1e-4, prefix + name)


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- the order of a step, written out --------------------------------------------------------------------------------


def noisy_copy(net: TinyNet, seed: int) -> TinyNet:
    other = TinyNet(net.c1.out_channels)
    other.load_state_dict(net.state_dict())
    suites.randomise(other, seed, 0.02)
    return other


def test_step_order() -> None:
    """Seven steps of EDM's DMD2 as the paper's algorithm says, in plain torch, against the objective.

    With SGD: Adam would blow the rounding of small gradients up to full steps."""
    torch.manual_seed(0)
    channels, ratio, batch, lr = 64, 3, 4, 1e-3
    teacher = TinyNet(channels).requires_grad_(False)
    student, fake = noisy_copy(teacher, 1), noisy_copy(teacher, 2)
    view = Denoiser(teacher, EDM_PATH, "F", time="edm")
    objective = DMD(student, view, fake, update_ratio=ratio, gan_weight=0.5, discriminator_weight=1.0)
    gen, critic = noisy_copy(student, 3), noisy_copy(fake, 4)
    gen.load_state_dict(student.state_dict())
    critic.load_state_dict(fake.state_dict())
    head = Head(channels, 8)
    head.load_state_dict(objective.head.state_dict())
    pairs = ((student, gen), (fake, critic), (objective.head, head))
    starts = [[v.clone() for v in a.state_dict().values()] for a, _ in pairs]
    sigmas = ((80 ** (1 / 7) + torch.linspace(0, 1, 1000) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7).flip(0)
    ours = {
        "main": torch.optim.SGD(student.parameters(), lr),
        "fake": torch.optim.SGD([*fake.parameters(), *objective.head.parameters()], lr),
    }
    theirs = [torch.optim.SGD(gen.parameters(), lr), torch.optim.SGD([*critic.parameters(), *head.parameters()], lr)]

    def clip(*nets: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_([p for net in nets for p in net.parameters()], 10.0)

    def precond(net: TinyNet, x: Tensor, s: Tensor) -> Tensor:
        s4 = s.view(-1, 1, 1, 1)
        out = net(x / (s4**2 + 0.25).sqrt(), s.log() / 4)
        return 0.25 / (s4**2 + 0.25) * x + 0.5 * s4 / (s4**2 + 0.25).sqrt() * out

    def logits(x: Tensor, step: Step, name: str) -> Tensor:
        s = sigmas[step.randint(1000, batch, f"gan level {name}")]
        x = x + s.view(-1, 1, 1, 1) * step.randn(x.shape, f"gan noise {name}")
        return head(critic.features(x / (s.view(-1, 1, 1, 1) ** 2 + 0.25).sqrt(), s.log() / 4, ["hidden"])[0])

    for index in range(7):
        real, step = torch.randn(batch, 3, 8, 8), Step(index, seed=5)
        for phase in objective.phases():
            if index % phase.every == 0:
                for role, net in objective.networks.items():
                    net.requires_grad_(role in phase.trains)
                objective.loss(phase.name, {"x": real}, step)[0].backward()
                clip(*(objective.networks[role] for role in phase.trains))
                ours[phase.optimizer].step()
                ours[phase.optimizer].zero_grad()
        x = precond(gen, 80 * step.randn(real.shape, "z"), torch.full((batch,), 80.0))
        if index % ratio == 0:
            s = sigmas[20 + step.randint(961, batch, "dm level")]
            with torch.no_grad():
                x_t = x + s.view(-1, 1, 1, 1) * step.randn(x.shape, "dm noise")
                d_real, d_fake = precond(teacher, x_t, s), precond(critic, x_t, s)
                g = (d_fake - d_real) / (x - d_real).abs().mean((1, 2, 3), keepdim=True)
            loss = 0.5 * ((x - (x - g).detach()) ** 2).mean() + 0.5 * F.softplus(-logits(x, step, "generator")).mean()
            loss.backward()
            clip(gen)
            theirs[0].step()
            theirs[0].zero_grad()
            theirs[1].zero_grad()
        x = x.detach()
        s = sigmas[step.randint(1000, batch, "fake level")]
        x_t = x + s.view(-1, 1, 1, 1) * step.randn(x.shape, "fake noise")
        loss = ((s.view(-1, 1, 1, 1) ** -2 + 4) * (precond(critic, x_t, s) - x) ** 2).mean()
        gan = F.softplus(logits(x, step, "fake")) + F.softplus(-logits(real, step, "real"))
        (loss + gan.mean()).backward()
        clip(critic, head)
        theirs[1].step()
        theirs[1].zero_grad()
    for (a, b), start in zip(pairs, starts):
        moved, wanted = (torch.cat([(v - s).flatten() for v, s in zip(n.state_dict().values(), start)]) for n in (a, b))
        assert (moved - wanted).norm() < 1e-2 * wanted.norm()


# -- what the golden cases do not cover ------------------------------------------------------------------------------


def test_published_network_has_the_published_size() -> None:
    with torch.device("meta"):
        net = registry().build("model", {"name": "edm-unet", "preset": "imagenet64"})
    assert sum(p.numel() for p in net.parameters()) == 295_899_267  # 295.9M, EDM's own count


def test_attention_is_edms() -> None:
    """Channels of qkv are (head, channel, q|k|v), as the official einsum reads them."""
    torch.manual_seed(0)
    block = DhariwalUNet(8, 3, None, 0, 64, (2,), 2, 1, (8,)).enc["8x8_block0"]
    assert block.heads == 2
    h = torch.randn(2, 128, 8, 8)
    q, k, v = block.qkv(h).reshape(4, 64, 3, 64).unbind(2)
    w = torch.einsum("ncq,nck->nqk", q, k / 8).softmax(2)
    assert_close(block.attend(h), torch.einsum("nqk,nck->ncq", w, v).reshape(h.shape), 1e-5, "attention")


class TestEDMUNet(suites.ModelSuite):
    model = {"name": "edm-unet", "img_resolution": 8, "in_channels": 1, "num_classes": 3, "model_channels": 32,
             "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}  # fmt: skip
    shape = (1, 8, 8)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8, 16, 32])
def test_head_ends_in_one_logit(side: int) -> None:
    """At any side; at 8 and 32 with the official layers."""
    head = Head(32, side)
    assert head(torch.randn(2, 32, side, side)).shape == (2, 1)
    convs = [m for m in head if isinstance(m, nn.Conv2d)]
    if side in (8, 32):
        assert [(m.kernel_size[0], m.stride[0]) for m in convs] == [(4, 2)] * (len(convs) - 2) + [(4, 4), (1, 1)]
        assert len(convs) == {8: 3, 32: 5}[side]


def small(name: str, **keywords: Any) -> nn.Module:
    base: dict[str, dict[str, Any]] = {
        "dit": {"input_size": 8, "patch_size": 2, "in_channels": 2, "hidden_size": 32, "depth": 3, "num_heads": 2},
        "adm-unet": {"image_size": 8, "in_channels": 2, "model_channels": 32, "num_res_blocks": 1,
                     "attention_resolutions": [2], "channel_mult": [1, 1], "null_class": True},
        "edm-unet": {"img_resolution": 8, "in_channels": 2, "model_channels": 32, "channel_mult": [1, 1],
                     "num_blocks": 1},
        "ncsnpp": {"image_size": 8, "in_channels": 2, "nf": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
                   "attn_resolutions": [4], "null_class": True},
    }  # fmt: skip
    torch.manual_seed(0)
    net = registry().build("model", {"name": name, "num_classes": 3, **base[name], **keywords})
    suites.randomise(net)
    return net


VIEWS = {
    "dit": {"path": "vp-discrete", "prediction": "eps", "time": "index", "learned_sigma": True},
    "adm-unet": {"path": "linear", "prediction": "velocity", "time": "reversed"},
    "edm-unet": {"path": "edm", "prediction": "F", "time": "edm"},
    "ncsnpp": {"path": "linear", "prediction": "velocity", "time": "reversed"},
}


def teacher_of(name: str) -> Denoiser:
    keywords = {"learn_sigma": False} if name == "adm-unet" else {}
    net = small(name, **keywords).eval().requires_grad_(False)
    return Denoiser.from_config(net, VIEWS[name])


def copied(teacher: Denoiser, name: str) -> nn.Module:
    net = small(name, **({"learn_sigma": False} if name == "adm-unet" else {}))
    net.load_state_dict(teacher.network.state_dict())
    return net


@pytest.mark.parametrize("name", VIEWS)
def test_features_stop_half_way(name: str) -> None:
    """The middle of any network, differentiable to the input, without running what comes after it."""
    view = teacher_of(name)
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    t, y = torch.full((2,), view.path.t_max / 2, dtype=torch.float64), torch.tensor([0, 2])
    got = Features(view.network)(view, x, t, y=y)
    assert got.ndim == 4 and got.shape[1] >= 32
    (gradient,) = torch.autograd.grad(got.square().mean(), x)
    assert gradient.abs().max() > 0
    middle, ran = view.network.middle, []
    hooks = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in view.network.named_modules()]
    assert torch.equal(Features(view.network, middle)(view, x, t, y=y), got)
    assert ran[-1] == LAYERS.get(name, {}).get(middle, middle), "nothing ran behind the middle"
    for hook in hooks:
        hook.remove()
    if name == "dit":  # a compiled network has its graph before anybody looks inside
        view.network.compile(backend="eager")
        view.raw(x, t, y=y)
        assert torch.equal(Features(view.network)(view, x, t, y=y), got)


LAYERS = {  # {network: {layer: the module that computes it}}
    "dit": {name: name for name in ("blocks.0", "blocks.1")},
    "adm-unet": {
        name: name
        for name in ("input_blocks.0", "input_blocks.2", "middle_block", "output_blocks.0", "output_blocks.1")
    },
    "edm-unet": {name: name for name in ("enc.8x8_conv", "enc.8x8_block0", "dec.4x4_in0", "dec.8x8_block1")},
    "ncsnpp": {
        "down.0": "all_modules.2",
        "down.1": "all_modules.3",
        "down.3": "all_modules.6",
        "middle": "all_modules.9",
    },
}


@pytest.mark.parametrize("name", VIEWS)
def test_features_are_what_the_layers_give(name: str) -> None:
    """Every named layer, in any order, gives what it gives inside the whole forward."""
    network, known, whole = teacher_of(name).network, LAYERS[name], {}
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([0, 2])
    for layer, module in known.items():
        network.get_submodule(module).register_forward_hook(lambda _m, _i, out, n=layer: whole.update({n: out}))
    network(x, t, y)
    want = dict(whole)
    for wanted in (list(known), list(known)[::-1], list(known)[1:2]):
        for layer, got in zip(wanted, network.features(x, t, wanted, y=y), strict=True):
            assert torch.equal(got, want[layer]), layer
    assert len(want) == len(known)
    with pytest.raises(VgmError, match="no layer 'nowhere'"):
        network.features(x, t, ["nowhere"], y=y)


def test_features_name_the_alternatives() -> None:
    with pytest.raises(VgmError, match="no features") as e:
        Features(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert "objective.gan_weight=0" in e.value.hint
    teacher = teacher_of("dit")
    with pytest.raises(VgmError, match=r"no layer 'blocks\.9'") as e:
        DMD(copied(teacher, "dit"), teacher, copied(teacher, "dit"), feature_layer="blocks.9")
    assert "blocks.1" in e.value.hint


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("steps", [1, 3])
def test_any_teacher(name: str, steps: int) -> None:
    """Losses are finite and reach the student and the fake score, whatever the teacher predicts on whatever path."""
    teacher = teacher_of(name)
    objective = DMD(
        copied(teacher, name), teacher, copied(teacher, name), denoising_steps=steps, guidance_scale=2.0, update_ratio=1
    )
    batch = {"x": torch.randn(4, 2, 8, 8), "cond": {"y": torch.tensor([0, 1, 2, 0])}}
    for index in range(4):
        for phase in objective.phases():
            for role, net in objective.networks.items():
                net.requires_grad_(role in phase.trains).zero_grad()
            loss, logs = objective.loss(phase.name, batch, Step(index))
            loss.backward()
            assert torch.isfinite(loss) and all(torch.isfinite(v) for v in logs.values())
            for role, net in objective.networks.items():
                moved = any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
                assert moved == (role in phase.trains), (phase.name, role)


def test_dm_gradient_vanishes_where_the_scores_agree() -> None:
    x, real = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert not dm_gradient(x, real, real).any()
    assert not dm_gradient(real, real, real).any()  # 0 / 0


def test_an_eps_network_is_not_asked_at_pure_noise() -> None:
    """There its x0 is eps divided by an alpha of 0.006; few-step students start at pure noise as DMD2's do."""
    one, four = (denoising_times(teacher_of("dit"), n) for n in (1, 4))
    assert 0.2 < one[0] < 0.4
    assert [round(t * 1000) - 1 for t in four] == [999, 749, 499, 249]
    assert denoising_times(teacher_of("adm-unet"), 2) == pytest.approx([1.0, 0.4995], abs=1e-3)
    edm_teacher = teacher_of("edm-unet")
    assert denoising_times(edm_teacher, 1) == pytest.approx([80.0])
    lower = FlowMap(edm_teacher.network, edm_teacher, times=denoising_times(edm_teacher, 1, first=40.0))
    assert lower.noise_scale() == 40.0, "as the official generator, which multiplies its noise by conditioning_sigma"
    levels = level_times(edm_teacher)
    assert denoising_times(edm_teacher, 2, count=500) == levels[[499, 249]].tolist()


def test_sampler_follows_the_student() -> None:
    """NFE and images of one and three steps; the view survives its description; items have their own noise."""
    teacher = teacher_of("adm-unet")
    student = FlowMap(teacher.network, teacher, times=denoising_times(teacher, 3))
    again = FlowMap(teacher.network, **{k: v for k, v in student.view().items() if k != "name"})
    sampler = registry().build("sampler", "dmd")

    def sample(view: Denoiser, items: list[int], steps: int | None = None) -> tuple[Tensor, int]:
        request = Request((2, 8, 8), generators(items), {"y": torch.tensor([i % 3 for i in items])}, steps=steps)
        with torch.no_grad():
            return sampler(view, request), request.info["nfe"]

    x, nfe = sample(student, [0, 1, 2])
    assert nfe == 3 and sample(student, [0], 1)[1] == 1
    assert torch.equal(x, sample(again, [0, 1, 2])[0])
    assert_close(sample(student, [1])[0], x[1:2], 1e-5, "alone")
    z = Request((2, 8, 8), generators([0])).randn()
    assert_close(sample(student, [0], 1)[0], teacher.predict(z, 1.0, "x0", y=torch.tensor([0])), 1e-5, "one step")


def test_regression_pulls_to_the_pairs() -> None:
    """DMD's term is zero on pairs that the student already makes, and needs pairs."""
    teacher = teacher_of("adm-unet")
    student = copied(teacher, "adm-unet")
    made = FlowMap(student, teacher, times=[1.0])
    z = torch.randn(6, 2, 8, 8)
    y = torch.arange(6) % 3
    with torch.no_grad():
        pairs = {"z": z, "x": made.jump(z, 1.0, y=y), "y": y}
    keywords: dict[str, Any] = {"weighting": "dmd", "update_ratio": 1, "gan_weight": 0.0, "regression_weight": 0.25}
    objective = DMD(student, teacher, copied(teacher, "adm-unet"), pairs, **keywords)
    batch = {"x": torch.randn(4, 2, 8, 8), "cond": {"y": torch.tensor([0, 1, 2, 0])}}
    assert objective.loss("generator", batch, Step(0))[1]["regression"] < 1e-9
    objective.pairs = {**pairs, "x": pairs["x"] + 1}
    assert objective.loss("generator", batch, Step(0))[1]["regression"] == pytest.approx(1.0, abs=1e-4)
    objective.pairs = None
    with pytest.raises(VgmError, match="no ODE pairs"):
        objective.loss("generator", batch, Step(0))
    with pytest.raises(VgmError, match="needs the role lpips"):
        DMD(student, teacher, copied(teacher, "adm-unet"), pairs, regression="lpips", **keywords)


SMALL = ("codec=null", "teacher.hidden_size=32", "teacher.depth=2", "teacher.num_heads=2", "teacher.patch_size=7")


class TestObjective(suites.ObjectiveSuite):
    recipe = "dmd/mnist"
    overrides = SMALL


class TestFewSteps(suites.ObjectiveSuite):
    recipe = "dmd/mnist"
    overrides = (*SMALL, "objective.denoising_steps=3", "objective.diffusion_gan=false", "objective.update_ratio=1")


class TestSampler(suites.SamplerSuite):
    recipe = "dmd/mnist"
    overrides = (*SMALL, "objective.denoising_steps=2")


@pytest.mark.parametrize("name", ["mnist"])
class TestRecipes(suites.RecipeSuite):
    @pytest.fixture(autouse=True)
    def _of(self, name: str) -> None:
        type(self).recipe = f"dmd/{name}"
