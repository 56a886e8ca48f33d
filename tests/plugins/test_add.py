"""ADD against StyleGAN-T's discriminator, Stability's sampler and the paper's equations (golden cases), then what they
do not cover."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vgm_plugins.add import augment as augmentations
from vgm_plugins.add.augment import DiffAugment
from vgm_plugins.add.checkpoints import HEADS
from vgm_plugins.add.condition import HeadCondition
from vgm_plugins.add.discriminator import Heads
from vgm_plugins.add.losses import (
    distance,
    feature_penalty,
    generator_loss,
    hinge_losses,
    nfsd_gradient,
    preserving,
    student_input,
    student_levels,
    surrogate,
    target_weight,
    teacher_target,
)
from vgm_plugins.add.objective import ADD, for_student, student_times
from vgm_plugins.add.sampler import TurboSampler, ancestral, entries

from vgm_cli.api import Request, Step, generators
from vgm_cli.conditioning import ClassLabel, Conditions, Part
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.errors import VgmError
from vgm_cli.nets.foundation import DigitFeatures, ShowsLevels, VisionFeatures
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("add")
SCALED = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000}


def stable(case: GoldenCase) -> dict[str, Any]:
    return SCALED | {"beta_start": case.config["linear_start"], "beta_end": case.config["linear_end"]}


def spread(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


# -- golden cases: the discriminator -----------------------------------------------------------------------------------


def by_formula(keys: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights as the case's notes state them: a hash of the name's rank and of the place."""
    state = {}
    for k, name in enumerate(sorted(keys)):
        shape = tuple(keys[name])
        i = torch.arange(math.prod(shape), dtype=torch.int64)
        mask = 2**32 - 1
        h = (i * 2654435761 + (k + 1) * 97531) & mask
        for shift, factor in ((15, 2246822519), (13, 3266489917)):
            h = times((h ^ (h >> shift)), factor)
        u = (h ^ (h >> 16)).double() / 2**32
        r = ((u - 0.5) * math.sqrt(12)).view(shape)
        if len(shape) >= 2:
            r = 0.8 * r / math.sqrt(math.prod(shape) / shape[0])
        else:
            r = 1 + 0.1 * r if name.endswith("weight") else 0.05 * r
        state[name] = r.float()
    return state


def times(h: Tensor, factor: int) -> Tensor:
    """h factor mod 2^32, without running over 64 bits."""
    low, high = factor & 0xFFFF, factor >> 16
    return (h * low + (((h * high) & 0xFFFF) << 16)) & (2**32 - 1)


def transformer(case: GoldenCase, state: Mapping[str, Tensor], folder: Path) -> VisionFeatures:
    """The case's small ViT, through a file in timm's layout."""
    prefix, vit = "dino.model.model.", case.config["vit"]
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert own["patch_embed.proj.weight"].shape == (vit["d"], 3, case.config["patch"], vit["p"])
    file = folder / "vit.safetensors"
    save_file(own, file)
    made = VisionFeatures(
        str(file),
        size=case.config["img_resolution"],
        normalise=True,
        resize="area",
        heads=vit["h"],
        hooks=tuple(case.config["hooks"]),
        hook_patch=case.config["hook_patch"],
    )
    assert len(made.vit.blocks) == vit["depth"] and made.vit.grid * made.vit.side == vit["r"]
    return made


@golden.check(lambda c: c.kind == "projected_discriminator")
def projected_discriminator(case: GoldenCase) -> None:
    """Features, heads, and gradients to the image and to weights, from one official state."""
    import tempfile

    state = {**by_formula(case.config["keys"]), **case.state}
    with tempfile.TemporaryDirectory() as folder:
        features = transformer(case, state, Path(folder))
    assert isinstance(features, ShowsLevels)
    config, heads = HEADS.config(state), HEADS.to_ours(state)
    assert config.get("c_dim", 0) == case.config["c_dim"] and len(config["channels"]) == len(features.channels)
    assert config["channels"] == tuple(features.channels)
    net = Heads(**config)
    net.load_state_dict(heads)
    back = HEADS.from_ours(net.state_dict())
    assert back.keys() == {k for k in state if k.startswith("heads.")}
    assert all(torch.equal(v, state[k]) for k, v in back.items())
    if case.config["train_mode"]:
        net.iterate()
    x = case.inputs["x"].clone().requires_grad_()
    logits = torch.cat(net.logits(features.levels(x), case.inputs.get("c")), dim=1)
    assert_close(logits, case.outputs["logits"], 1e-5, "logits")
    (-logits.mean()).backward()
    assert_close(x.grad, case.outputs["grad_x"], 1e-5, "gradient to the image")
    ours = dict(net.named_parameters())
    for name, want in case.outputs.items():
        if name.startswith("grad."):
            assert_close(ours[name.removeprefix("grad.")].grad, want, 1e-4, name)


@golden.check(lambda c: "DiscHead" in c.source)
def head(case: GoldenCase) -> None:
    """One head, evaluated, then twice in training, where each forward makes a power iteration first."""
    state = {f"heads.0.{k}": v for k, v in case.state.items()}
    config = HEADS.config(state)
    assert config["channels"] == (case.config["channels"],)
    assert (config.get("c_dim", 0), config.get("cmap_dim", case.config["cmap_dim"])) == (
        case.config["c_dim"],
        case.config["cmap_dim"],
    )
    net = Heads(**config)
    assert {k.removeprefix("heads.0.") for k in net.state_dict()} == set(case.config["keys"])
    net.load_state_dict(HEADS.to_ours(state))
    x, c = case.inputs["x"], case.inputs.get("c")
    with torch.no_grad():
        for name in ("eval", "train_1st", "train_2nd"):
            if name != "eval":
                net.iterate()
            assert_close(net.logits([x], c)[0][:, None], case.outputs[f"logits_{name}"], 1e-5, name)


@golden.check(lambda c: c.kind == "diffaugment")
def diffaugment(case: GoldenCase) -> None:
    """Every kind of the policy, by its draws in official order; integers are those of the official randint."""
    draws = iter(case.inputs[name].flatten() for name in case.draw_order)
    x = case.inputs["x"]
    pipe = DiffAugment(case.config["policy"])
    for kind in pipe.kinds:
        if kind == "color":
            for change in (augmentations.brightness, augmentations.saturation, augmentations.contrast):
                x = change(x, next(draws))
        elif kind == "translation":
            x = augmentations.translate(x, next(draws), next(draws))
        else:
            size = augmentations.portion(x, augmentations.CUTOUT)
            x = augmentations.cut_out(x, next(draws), next(draws), size)
    assert next(draws, None) is None
    assert_close(x, case.outputs["y"], 1e-6, "augmented")


# -- golden cases: losses ----------------------------------------------------------------------------------------------


@golden.check(lambda c: "n_heads" in c.config)
def adversarial_losses(case: GoldenCase) -> None:
    """The toy heads of the notes, 1.7 tanh(sum_c F w), token by token."""
    i, o, n = case.inputs, case.outputs, case.config["n_heads"]
    assert n == sum(k.startswith("w_") for k in i)

    def logits(features: list[Tensor]) -> list[Tensor]:
        return [1.7 * torch.tanh((f * i[f"w_{k}"][:, None]).sum(1)) for k, f in enumerate(features)]

    real_features = [i[f"real_feat_{k}"].clone().requires_grad_() for k in range(n)]
    real, fake = logits(real_features), logits([i[f"fake_feat_{k}"] for k in range(n)])
    assert_close(real[0], o["logits_real_0"], 1e-5, "real")
    assert_close(fake[0], o["logits_fake_0"], 1e-5, "fake")
    of_real, of_fake = hinge_losses(real, fake)
    penalty = feature_penalty(real, real_features)
    assert_close(of_real, o["hinge_real"], 1e-5, "hinge of real")
    assert_close(of_fake, o["hinge_fake"], 1e-5, "hinge of fake")
    assert_close(penalty, o["R1"], 1e-5, "penalty")
    assert_close(of_real + of_fake + case.config["gamma"] * penalty, o["loss_D"], 1e-5, "discriminator")
    assert_close(generator_loss(fake), o["loss_G_adv"], 1e-5, "generator")


@golden.check(lambda c: "zero_terminal_snr_for_student" in c.config)
def distillation_loss(case: GoldenCase) -> None:
    """The student's input, the teacher's target and both weightings, with gradients to the toy student's numbers."""
    i, o, pure = case.inputs, case.outputs, case.config["zero_terminal_snr_for_student"]

    def eps(x: Tensor, index: Tensor) -> Tensor:
        return 0.3 * torch.tanh(x) + 0.6 * x * spread(teacher.path.sigma(teacher.path.t_of_timestep(index)), x)

    teacher = Denoiser(eps, stable(case), "eps", time="index")
    view = Denoiser(eps, stable(case), "v", time="index")  # a student that zero terminal noise means something to
    known = case.config["student_timesteps"]
    assert set(i["s"].tolist()) <= set(known)
    config = for_student(view, pure)
    times_ = student_times(Denoiser.from_config(eps, config), sorted(known, reverse=True))
    student = FlowMap(eps, config, times=times_)
    assert sorted(known) == sorted(round(float(student.path.timestep(s))) for s in times_)
    s, t = student.path.t_of_timestep(i["s"]), teacher.path.t_of_timestep(i["t"])
    alpha, sigma = student_levels(student, s, pure)
    assert_close(alpha, o["alpha_s"], 1e-5, "alpha")
    assert_close(sigma, o["sigma_s"], 1e-5, "sigma")
    x_s = student_input(student, i["x0"], i["eps"], s, pure)
    assert_close(x_s, o["x_s"], 1e-5, "input")
    alpha, sigma = preserving(teacher.path, t)
    assert_close(alpha, o["alpha_t"], 1e-5, "teacher's alpha")
    assert_close(sigma, o["sigma_t"], 1e-5, "teacher's sigma")
    numel = i["x0"][0].numel()
    for weighting in ("exponential", "sds"):
        theta = i["theta"].clone().requires_grad_()
        x = theta[0] * torch.tanh(x_s) + theta[1] * x_s * torch.cos(spread(i["s"], x_s) / 1000)
        assert_close(x, o["x_student"], 1e-5, "student")
        x_t = teacher.path.add_noise(x.detach(), i["eps_t"], t)
        assert_close(teacher.predict(x_t, t, "eps"), o["eps_teacher"], 1e-5, "eps")
        target = teacher_target(teacher, x_t, t)
        assert_close(target, o["x_teacher"], 1e-5, "target")
        c = target_weight(weighting, alpha, sigma)  # type: ignore[arg-type]
        assert_close(c, o[f"c_{weighting}"], 1e-5, "weight")
        loss = (c.float() * distance(x, target, "sum")).mean()
        assert_close(loss, o[f"loss_{weighting}"], 1e-5, weighting)
        mean = (c.float() * distance(x, target)).mean()
        assert_close(mean, o[f"loss_{weighting}_mean_reduction"], 1e-5, "mean")
        assert_close(mean * numel, loss, 1e-5, "the two reductions")
        (gradient,) = torch.autograd.grad(loss, theta)
        assert_close(gradient, o[f"grad_theta_{weighting}"], 1e-5, f"gradient of {weighting}")
        if weighting == "exponential":
            assert_close(case.config["lam"] * loss, o["total_with_lambda"], 1e-5, "with lambda")
        else:
            assert_close(gradient, o["grad_theta_sds_direct"], 1e-5, "score distillation itself")


@golden.check(lambda c: c.kind == "nfsd")
def noise_free(case: GoldenCase) -> None:
    i, o = case.inputs, case.outputs

    def eps(x: Tensor, index: Tensor, c: Tensor) -> Tensor:
        mean = spread(c.mean(1), x)
        return torch.tanh(0.6 * x) + 0.2 * mean * torch.cos(x) + 0.0003 * spread(index, x)

    teacher = Denoiser(eps, stable(case), "eps", time="index")
    t, x = teacher.path.t_of_timestep(i["t"]), i["x_theta"].clone().requires_grad_()
    x_t = teacher.path.add_noise(x.detach(), i["noise"], t)
    assert_close(x_t, o["x_t"], 1e-6, "x_t")
    conditions = {"cond": i["cond"], "null": torch.zeros_like(i["cond"]), "negative": i["negative"]}
    found = {name: teacher.predict(x_t, t, "eps", c=c) for name, c in conditions.items()}
    for name, value in found.items():
        assert_close(value, o[f"eps_{name}"], 1e-6, name)
    weight = {"sigma2": teacher.path.sigma(t) ** 2, "one": torch.ones_like(t)}[case.config["w"]]
    low = i["t"] < case.config["threshold"]
    gradient, delta_d, delta_c = nfsd_gradient(*found.values(), low, weight, case.config["scale"])
    assert_close(delta_d, o["delta_D"], 1e-6, "delta_D")
    assert_close(delta_c, o["delta_C"], 1e-6, "delta_C")
    assert_close(gradient, o["gradient"], 1e-6, "gradient")
    losses = surrogate(gradient, x, "sum")
    assert_close(losses, o["loss_surrogate"], 1e-6, "surrogate")
    assert_close(torch.autograd.grad(losses.sum(), x)[0], o["gradient"], 1e-6, "gradient of the surrogate")


# -- golden cases: the sampler -----------------------------------------------------------------------------------------


@golden.check(lambda c: "steps_subset" in c.config)
def turbo(case: GoldenCase) -> None:
    """The official trajectory, in variance-exploding coordinates, and the sampler itself from the same noise."""
    i, o, steps = case.inputs, case.outputs, case.config["n_sample_steps"]

    def eps(x: Tensor, index: Tensor) -> Tensor:
        return 0.3 * torch.tanh(x) + 0.0005 * spread(index, x)

    view = Denoiser(eps, SCALED | {"beta_start": 0.00085, "beta_end": 0.012}, "eps", time="index")
    *substeps, last = case.config["steps_subset"]
    table = case.config["num_steps"]
    assert last == table, "the end of the table is data"
    sampler = TurboSampler(steps=steps, substeps=tuple(substeps), table=table, eta=case.config["eta"])
    at = sampler.sampled(view, steps)
    times_ = torch.tensor(at, dtype=torch.float64)
    assert torch.equal(view.path.timestep(times_).round().long(), o["idx"])
    sigmas = torch.cat([view.path.ve_sigma(times_), torch.zeros(1, dtype=torch.float64)])
    assert_close(sigmas, o["sigmas"], 1e-5, "sigmas")
    alphas = torch.cat([view.path.alpha(times_), torch.ones(1, dtype=torch.float64)])
    noise, seen, states = iter(i["noise"]), [], []

    def callback(k: int, x: Tensor, x0: Tensor | None) -> None:
        states.append(x / alphas[k])
        assert x0 is not None
        seen.append(x0)

    keywords: dict[str, Any] = {"eta": sampler.eta, "noise": lambda: next(noise), "callback": callback}
    sigma = torch.cat([view.path.sigma(times_), torch.zeros(1, dtype=torch.float64)])
    x = ancestral(lambda x, k: view.predict(x, at[k]), i["x"], alphas, sigma, **keywords)
    assert_close(x, o["x"], 1e-5, "x")
    assert_close(torch.stack(seen), o["denoised"], 1e-5, "denoised")
    assert_close(torch.stack([*states[1:], x]), o["trajectory"], 1e-5, "trajectory")

    class Given(Request):
        def randn(self, shape: Any = None) -> Tensor:
            return next(draws)

    draws = iter([i["x"], *i["noise"]])
    made = sampler(view, Given(tuple(i["x"].shape[1:]), generators(range(len(i["x"])))))
    assert_close(made, o["x"], 1e-5, "the sampler")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)
