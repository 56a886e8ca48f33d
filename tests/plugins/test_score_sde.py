"""Score-based models against yang-song/score_sde_pytorch@cb1f359 (golden cases): SDEs, losses, samplers, networks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.score_sde.checkpoints import CLASSIFIER, DISCRETE, PLAIN, SUBVP
from vgm_plugins.score_sde.classifier import NoisyWideResNet
from vgm_plugins.score_sde.diffusers_checkpoints import DIFFUSERS
from vgm_plugins.score_sde.objective import ScoreMatching, continuous_losses, ddpm_losses, smld_losses, view_of
from vgm_plugins.score_sde.predictors import correct, predict
from vgm_plugins.score_sde.process import Process
from vgm_plugins.score_sde.sampler import ScoreSDEFlowSampler, ScoreSDERestorer, ScoreSDESampler
from vgm_plugins.score_sde.sde import SDE

from vgm_cli.api import Request, Step, generators
from vgm_cli.convert_api import unwrap
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.likelihood import bits_per_dim, log_likelihood
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.train import optim
from vgm_cli.engine.train.ema import EMA
from vgm_cli.errors import VgmError
from vgm_cli.nets.ncsnpp import NCSNpp
from vgm_cli.nn.fir import conv_downsample_fir, downsample_fir, upsample_fir
from vgm_cli.nn.shapes import expand
from vgm_cli.operators.inpainting import Inpainting
from vgm_cli.operators.separable import Colorization
from vgm_cli.settings import Optimizer
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, assert_close

golden = GoldenChecks("score-sde")

NO_EFFECT = ("normalization", "attention_type", "conv_size", "beta_min", "beta_max")  # of the networks, officially
PREDICTORS = {
    "reverse_diffusion": "reverse-diffusion",
    "euler_maruyama": "euler-maruyama",
    "ancestral_sampling": "ancestral",
    "none": "none",
}


def formula(name: str, rank: int, shape: tuple[int, ...], last: bool = False) -> Tensor:
    """The weights that the cases without weights state in their notes. last: fan in along flax's last axis."""
    count = torch.Size(shape).numel()
    h = (torch.arange(count, dtype=torch.int64) * 2654435761 + (rank + 1) * 97531) & 0xFFFFFFFF
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    r = (h.double() / 2**32 - 0.5) * 12**0.5
    if len(shape) >= 2:
        r = 0.8 * r / (count / shape[-1 if last else 0]) ** 0.5
    elif name.endswith("/W"):
        r = 16 * r
    elif name.endswith(("weight", "scale")):
        r = 1 + 0.1 * r
    else:
        r = 0.05 * r
    return r.float().reshape(shape)


def weights_of(keys: dict[str, list[int]], last: bool = False) -> dict[str, Tensor]:
    return {k: formula(k, rank, tuple(keys[k]), last) for rank, k in enumerate(sorted(keys))}


def network(case: GoldenCase) -> NCSNpp:
    """The official config's network."""
    given, data = case.config["model"], case.config["data"]
    kind = given["name"]
    assert kind in ("ncsnpp", "ddpm")
    own = {k: given[k] for k in given if k not in (*NO_EFFECT, "name")}

    def without_effect(*keys: str, why: str) -> None:
        case.ignore(*(f"model.{k}" for k in keys if k in given), why=why)

    without_effect(*NO_EFFECT, why="the official network reads it and does nothing with it")
    without_effect("init_scale", "fourier_scale", why="of weights that are stored")
    without_effect("dropout", why="evaluated without dropout")
    case.ignore("training.continuous", why="the labels are stored")
    if kind == "ddpm":
        own |= {"resblock_type": "ddpm", "skip_rescale": False, "norm_groups": 32}
    elif own["resblock_type"] == "biggan":
        without_effect("resamp_with_conv", why="of blocks that do not change the size themselves")
    if not own.get("fir"):
        without_effect("fir_kernel", why="nothing is filtered")
    if own.get("progressive_input", "none") == "none":
        without_effect("progressive_combine", why="no image joins the encoder")
    if own.get("embedding_type") == "fourier" or not own["scale_by_sigma"]:
        without_effect("sigma_min", "sigma_max", "num_scales", why="of the ladder, which nothing is divided by")
    size = {"image_size": data["image_size"], "in_channels": data["num_channels"], "centered": data["centered"]}
    return NCSNpp(**own, **size).eval()


def toy(x: Tensor, labels: Tensor) -> Tensor:
    """The network that the cases without weights state in their notes."""
    return 0.3 * torch.tanh(x) + 0.001 * labels.view(-1, *[1] * (x.ndim - 1)).to(x)


class Drawn(Request):
    """A request whose standard normal draws are given."""

    def __init__(self, draws: Iterator[Tensor], like: Tensor, **more: Any):
        super().__init__(shape=tuple(like.shape[1:]), generators=generators(range(len(like))), **more)
        self.draws = draws

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


def ends_of(case: GoldenCase) -> dict[str, float]:
    """The noise at both ends, where the case does not leave it at the official defaults."""
    return {k: case.config[k] for k in ("sigma_min", "sigma_max", "beta_min", "beta_max") if k in case.config}


def sde_of(case: GoldenCase, steps: int = 1000) -> SDE:
    """The case's SDE."""
    return SDE(kind=case.config["sde"], steps=case.config.get("N", steps), **ends_of(case))


def view(net: Callable[..., Tensor], sde: SDE, unit: bool = False, continuous: bool = True) -> Denoiser:
    return Denoiser.from_config(net, view_of(sde, continuous, unit))


# -- golden cases: networks --------------------------------------------------------------------------------------------


@golden.check(lambda c: "time_cond" in c.inputs)
@torch.no_grad()
def forward(case: GoldenCase) -> None:
    model = network(case)
    model.load_state_dict(PLAIN.to_ours(case.state))
    want = case.outputs["y"]
    assert_close(model(case.inputs["x"], case.inputs["time_cond"]).to(want.dtype), want, 1e-5, "output")
    told = PLAIN.config(case.state)
    for key in ("nf", "ch_mult", "num_res_blocks", "embedding_type", "resblock_type", "progressive_input"):
        assert told[key] == case.config["model"][key], key


@golden.check(lambda c: c.kind == "ddpm_network")
@torch.no_grad()
def ddpm(case: GoldenCase) -> None:
    model, keys = network(case), dict(case.config["keys"])
    state = weights_of(keys)
    model.load_state_dict({**PLAIN.to_ours({**state, "sigmas": model.sigmas.double()})})
    want = case.outputs["y"]
    assert_close(model(case.inputs["x"], case.inputs["labels"]).to(want.dtype), want, 1e-5, "output")
    told = PLAIN.config({**state, "sigmas": model.sigmas})
    assert (told["resblock_type"], told["skip_rescale"], told["norm_groups"]) == ("ddpm", False, 32)


@golden.check(lambda c: c.kind == "checkpoint_layout")
@torch.no_grad()
def checkpoint(case: GoldenCase) -> None:
    """The official file through the shipped reader: averages without names, fixed frequencies not among them."""
    config, state = case.config, case.state
    first = [k for k in state if k.startswith("model/") and k[6:] not in config["shadow_order"]]  # as torch.save has it
    model = {k.removeprefix("model/"): state[k] for k in (*first, *(f"model/{n}" for n in config["shadow_order"]))}
    shadow = [state[k] for k in sorted(state) if k.startswith("ema/shadow_params/")]
    assert len(shadow) == len(config["shadow_order"])
    saved = {"optimizer": {}, "model": model, "step": config["step"]}
    saved["ema"] = {k: config["ema"][k] for k in ("decay", "num_updates")} | {"shadow_params": shadow}
    averaged = unwrap(saved)
    for name, value in zip(config["shadow_order"], shadow):
        assert torch.equal(averaged[name.removeprefix("module.")], value), name
    for name in config["not_in_ema"]:
        assert torch.equal(averaged[name.removeprefix("module.")], model[name]), name
    case.ignore("ema", "step", why="numbers of the training, which weights do not depend on")
    net = network(case)
    raw = unwrap(saved, "model")
    found = {}
    for name, weights in (("y_ema", averaged), ("y_model", raw)):
        net.load_state_dict(PLAIN.to_ours(weights))
        found[name] = net(case.inputs["x"], case.inputs["labels"])
    assert_close(found["y_ema"], case.outputs["y_ema"], 1e-5, "of averages")
    if all(torch.equal(raw[k], averaged[k]) for k in raw):  # the file was written with the averages copied in
        assert torch.equal(found["y_ema"], found["y_model"])
    else:
        assert_close(found["y_model"], case.outputs["y_model"], 1e-5, "of weights")


@golden.check(lambda c: "factor" in c.config and "conv_downsample_2d" in c.outputs)
def filters(case: GoldenCase) -> None:
    x, taps, factor, out = case.inputs["x"], case.config["k"], case.config["factor"], case.outputs
    pairs = {
        "upsample_2d": upsample_fir(x, taps, factor),
        "upsample_2d_gain3": upsample_fir(x, taps, factor, gain=3.0),
        "downsample_2d": downsample_fir(x, taps, factor),
        "conv_downsample_2d": conv_downsample_fir(x, case.inputs["w"], taps, factor),
        "naive_up": F.interpolate(x, scale_factor=factor, mode="nearest"),
        "naive_down": F.avg_pool2d(x, factor),
    }
    for name, got in pairs.items():
        assert_close(got, out[name], 1e-6, name)


@golden.check(lambda c: c.kind == "classifier_wideresnet")
def classifier(case: GoldenCase) -> None:
    config = case.config
    state = {k.replace("/", "."): v for k, v in weights_of(dict(config["keys"]), last=True).items()}
    told = CLASSIFIER.config(state)
    assert told["num_classes"] == config["num_outputs"]
    assert (told["blocks_per_group"], told["channel_multiplier"]) == (
        config["blocks_per_group"],
        config["channel_multiplier"],
    )
    model = NoisyWideResNet(16, **told).eval()
    model.load_state_dict(CLASSIFIER.to_ours(state))
    back = CLASSIFIER.from_ours(model.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    x = case.inputs["x"].permute(0, 3, 1, 2).clone().requires_grad_(True)
    logits = model(x, case.inputs["ve_noise_scale"])
    assert_close(logits, case.outputs["logits"], 1e-4, "logits")
    labels = case.inputs["labels"].long()
    gradient = torch.autograd.grad(logits.log_softmax(1).gather(1, labels[:, None]).sum(), x)[0]
    assert_close(gradient.permute(0, 2, 3, 1), case.outputs["grad_log_p"], 1e-4, "gradient")


# -- golden cases: SDEs and losses -------------------------------------------------------------------------------------


@golden.check(lambda c: "disc_G" in c.outputs)
def sdes(case: GoldenCase) -> None:
    sde, out = sde_of(case), case.outputs
    x, t = case.inputs["x"], case.inputs["t"]
    f, g = sde.coefficients(t)
    mean, std = sde.marginal(x, t)
    step_f, step_g = sde.step(t)
    pairs = {
        "drift": expand(f, x) * x,
        "diffusion": g,
        "mean": mean,
        "std": std,
        "disc_f": expand(step_f, x) * x,
        "disc_G": step_g,
        "prior_sample": case.inputs["prior_noise"] * sde.prior_std,
        "prior_logp": sde.prior_nats(x),
    }
    score = out["score"]
    for flow in (False, True):
        drift, diffusion = sde.reverse_drift(x, t, score, flow)
        back, noise = sde.reverse_step(x, t, score, flow)
        pairs |= {f"rev_drift_pf{flow:d}": drift, f"rev_disc_f_pf{flow:d}": back, f"rev_disc_G_pf{flow:d}": noise}
        if not flow:
            pairs["rev_diffusion"] = diffusion
    # officially 1 - exp(2 c) is rounded in float32, a few percent at t = 1e-5: of sub-VP's g^2, and of deviations, which
    # are multiplied out below
    beta = sde.beta_min + t * (sde.beta_max - sde.beta_min)
    rounding = float((2**-23 * expand(beta, score) * score).abs().max()) if sde.kind == "subvp" else 0.0
    for name, got in pairs.items():
        assert_close(got.float(), out[name].float(), 1e-5, name, rounding if name.startswith("rev_d") else 0.0)
    own = sde.score(toy(x, sde.labels(t, True)), t, True)
    if sde.kind == "ve":
        assert_close(own, score, 1e-5, "score")
    else:
        assert_close(own * expand(std, x), score * expand(out["std"], x), 1e-5, "score")
    if "score_discrete" in out:
        own = sde.score(toy(x, sde.labels(t, False)), t, False)
        assert_close(own, out["score_discrete"], 1e-4 if sde.kind == "vp" else 1e-5, "discrete score")
        ours = Process(view(toy, sde, continuous=False), sde, {}).score(x, t)
        assert_close(ours, own, 1e-5, "through the view")
    ours = Process(view(toy, sde), sde, {}).score(x, t)
    assert_close(ours * expand(std, x), score * expand(out["std"], x), 1e-5, "score through the view")


@golden.check(lambda c: set(c.outputs) == {"loss"} and "x0" in c.inputs)
def losses(case: GoldenCase) -> None:
    config, i = case.config, case.inputs
    if "labels" in i:
        found, kinds = {}, {"ve": smld_losses, "vp": ddpm_losses}
        for kind, loss in kinds.items() if "sde" not in config else [(config["sde"], kinds[config["sde"]])]:
            sde = SDE(kind=kind, steps=config["N"], **ends_of(case))
            found[kind] = loss(sde, toy, i["x0"], i["labels"], i["noise"], config["reduce_mean"]).mean()
        # no key says which of the two it is: the loss does
        near = min(found, key=lambda k: abs(float(found[k] - case.outputs["loss"])))
        assert_close(found[near], case.outputs["loss"], 1e-5, near)
        return
    sde, eps = sde_of(case), config["eps"]
    t = i["u"] * (1 - eps) + eps
    rule = config["reduce_mean"], config["likelihood_weighting"]
    got = continuous_losses(sde, toy, i["x0"], t, i["noise"], *rule)
    assert_close(got.mean(), case.outputs["loss"], 1e-5, "loss")


class Small(nn.Module):
    """The network of the training cases, as their notes state it."""

    def __init__(self, log: bool):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.e, self.log = nn.Linear(1, 8), log

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        told = labels.log() if self.log else labels / 999
        return self.c2(F.silu(self.c1(x) + self.e(told[:, None].float())[:, :, None, None]))


@golden.check(lambda c: "batches" in c.inputs)
def training(case: GoldenCase) -> None:
    config, i = case.config, case.inputs
    continuous = config.get("continuous", True)
    model = Small(log=config["sde"] == "ve" and continuous)
    model.load_state_dict(case.state)
    weighting = {"likelihood_weighting": config.get("likelihood_weighting", False)}
    objective = ScoreMatching(
        model,
        config["sde"],
        continuous,
        reduce_mean=config["reduce_mean"],
        num_scales=config.get("num_scales", 1000),
        **weighting,
        **ends_of(case),
    )
    betas = [config["beta1"], config.get("beta2", 0.999)]
    decay = config.get("wd", config.get("weight_decay", 0.0))
    common = {"betas": betas, "eps": config["eps"], "weight_decay": decay, "warmup_from": 0.0}
    setting = Optimizer(name=config["optimizer"].lower(), lr=config["lr"], warmup=config["warmup"], **common)
    optimizer = optim.make_optimizer(list(model.parameters()), setting, torch.device("cpu"))
    average = EMA(model, {"decay": config["ema_rate"], "warmup": 1})
    if continuous:
        case.ignore("num_scales", why="of levels, which continuous time has none of")
    found, clipped = [], True
    for n in range(config["steps"]):
        if "draws_rand" in i:
            draw, noise = i["draws_rand"][n], i["draws_randn_like"][n]
        else:
            draw = i[f"draw_{n}_0_rand"] if continuous else i[f"draw_{n}_0_randint"]
            noise = i[f"draw_{n}_1_randn_like"]
        loss = objective.losses(i["batches"][n], draw, noise).mean()
        found.append(loss.detach())
        loss.backward()
        limit = config["grad_clip"] if config["grad_clip"] >= 0 else float("inf")  # below 0 nothing is clipped
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        clipped = clipped and bool(norm > 2 * limit)
        optimizer.param_groups[0]["lr"] = optim.learning_rate(setting, n, config["steps"])
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    if clipped:
        case.ignore("grad_clip", why="Adam does not see to how much gradients are cut that always are")
    assert_close(torch.stack(found), case.outputs["losses"], 1e-5, "losses")
    floor = adam_floor(config["lr"], config["steps"])
    for name, value in model.state_dict().items():
        assert_close(value, case.outputs[f"model/{name}"], 1e-5, name, floor)
        assert_close(average.state_dict()[name], case.outputs[f"ema/{name}"], 1e-5, f"average of {name}", floor)


# -- golden cases: samplers --------------------------------------------------------------------------------------------


@golden.check(lambda c: "predictor" in c.config and "z" in c.inputs)
def predictors(case: GoldenCase) -> None:
    config, sde = case.config, sde_of(case)
    x, t = case.inputs["x"], case.inputs["t"]
    process = Process(view(toy, sde, continuous=config["continuous"]), sde, {})
    pair = predict(
        sde, PREDICTORS[config["predictor"]], x, t, process.score(x, t), case.inputs["z"], config["probability_flow"]
    )
    other = Process(view(toy, sde, continuous=not config["continuous"] or sde.kind == "subvp"), sde, {})
    change = (other.score(x, t) - process.score(x, t)) * expand(sde.step(t)[1] ** 2, x)
    if float(change.abs().max()) < 1e-6 * float(case.outputs["x"].abs().max()):
        case.ignore("continuous", why="at these times both kinds of network say the same within the tolerance")
    for name, got in zip(("x", "x_mean"), pair):
        assert_close(got, case.outputs[name], 1e-6, name)


@golden.check(lambda c: "n_steps" in c.config and "t" in c.inputs)
def correctors(case: GoldenCase) -> None:
    config, sde, draws = case.config, sde_of(case), iter(case.inputs["draws_randn_like"])
    if sde.kind == "ve":
        case.ignore("N", why="the step size follows from the levels at t alone")
    process = Process(view(toy, sde, continuous=config.get("continuous", True)), sde, {})
    pair = correct(
        sde,
        config["corrector"],
        case.inputs["x"],
        case.inputs["t"],
        process.score,
        lambda: next(draws),
        config["snr"],
        config["n_steps"],
        "batch",
    )
    for name, got in zip(("x", "x_mean"), pair):
        assert_close(got, case.outputs[name], 1e-5, name)


def settings_of(case: GoldenCase) -> dict[str, Any]:
    config = case.config
    own = {"steps": config["N"], "snr": config["snr"], "eps": config["eps"], "norm": "batch"}
    own |= {"corrector": config["corrector"], "predictor": PREDICTORS[config.get("predictor", "reverse_diffusion")]}
    own |= {"corrector_steps": config.get("n_steps", 1)}
    own |= {k: config[k] for k in ("denoise", "probability_flow") if k in config}
    if own["corrector"] == "none":
        case.ignore("snr", "n_steps", why="no corrector has a step size")
    if own["predictor"] == "none":
        case.ignore("denoise", "probability_flow", why="of a predictor, which there is none")
    return own


def draws_of(case: GoldenCase) -> Iterator[Tensor]:
    return iter([case.inputs["draws_randn"][0], *case.inputs["draws_randn_like"]])


@golden.check(lambda c: "denoise" in c.config and "n_steps" in c.config and "draws_randn" in c.inputs)
def walking(case: GoldenCase) -> None:
    """The shipped sampler on the shipped view."""
    config, sde = case.config, sde_of(case)
    unit = not config["centered"] and sde.kind == "ve"
    sampler = ScoreSDESampler(**settings_of(case))
    request = Drawn(draws_of(case), case.inputs["draws_randn"][0])
    got = sampler(view(toy, sde, unit, config["continuous"]), request)
    assert_close((got + 1) / 2 if unit or config["centered"] else got, case.outputs["x"], 1e-5, "samples")
    evaluations = config["N"] * ((config["corrector"] != "none") * config["n_steps"] + (config["predictor"] != "none"))
    assert request.info["nfe"] == evaluations


@golden.check(lambda c: "in/W" in c and "corrector" in c.config)
def class_conditional(case: GoldenCase) -> None:
    """Through the host's guidance by a classifier, on a network without classes."""
    sde, weight = sde_of(case), case.inputs["W"]

    def told(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.1 * (x.flatten(1) @ weight.T) / (1 + sigma[:, None])

    sampler = ScoreSDESampler(**settings_of(case), classifier=told, classifier_scale=1.0)
    request = Drawn(draws_of(case), case.inputs["draws_randn"][0], asked={"label": case.inputs["labels"].tolist()})
    got = sampler(view(Unconditional(), sde, True, case.config.get("continuous", True)), request)
    assert_close((got + 1) / 2, case.outputs["x"], 1e-5, "samples")


class Unconditional(nn.Module):
    num_classes = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return toy(x, t)


@golden.check(lambda c: "in/data" in c and "predictor" in c.config)
def restoring(case: GoldenCase) -> None:
    """Inpainting and colorization through the shipped operators."""
    sde, data = sde_of(case), case.inputs["data"]
    draws, shape = list(draws_of(case)), tuple(data.shape[1:])
    if "mask" in case.inputs:
        operator = Inpainting("left").bind(shape, generators(range(len(data))))
        operator.masks = case.inputs["mask"]
    else:
        operator = Colorization().bind(shape, generators(range(len(data))))
        # a singular vector has no sign of its own: the official draws are of positive grey
        sign = operator.svd.Vt(torch.ones(1, *shape))[0, 0, 0, 0].sign()
        own = [case.config[k] != "none" for k in ("corrector", "predictor")]  # draws of each, before the mask does
        own = [own[0] * case.config.get("n_steps", 1), own[1]]
        places = [known for drawn in own for known in (*[False] * drawn, True)] * case.config["N"]
        for draw, known in zip(draws[1:], places, strict=True):
            if known:
                draw[:, 0] *= sign
    unit = sde.kind == "ve"  # inverse_scaler is the identity
    y = operator(2 * data - 1 if unit else data)
    own = settings_of(case)
    request = Drawn(iter(draws), data, operator=operator, measurement=y)
    got = ScoreSDERestorer(**own)(view(toy, sde, unit, case.config.get("continuous", True)), request)
    assert_close((got + 1) / 2 if unit else got, case.outputs["x"], 1e-5, "restored")


@golden.check(lambda c: "z" in c.inputs and "rtol" in c.config)
def flowing(case: GoldenCase) -> None:
    config = case.config
    sde, z = sde_of(case), case.inputs["z"]
    process = Process(view(toy, sde), sde, {})
    x = process.decode(z, eps=config["eps"], rtol=config["rtol"], atol=config["atol"])
    if config["denoise"]:
        x = process.denoised(x, config["eps"])
    want = case.outputs["x"]
    if float((process.denoised(x, config["eps"]) - x).abs().max()) < 1e-3 * float(want.abs().max()):
        case.ignore("denoise", why="that step is smaller than the tolerance here, see test_last_step_of_the_ode")
    assert_close(x, want, 1e-3, "images")


def coded(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The network of the cases of latent codes, as their notes state it."""
    if kind == "ve":
        return lambda x, sigma: -0.8 * x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
    return lambda x, labels: 0.8 * x + 0.05 * torch.sin(3 * x)


@golden.check(lambda c: c.kind == "ode_encode_decode")
def coding(case: GoldenCase) -> None:
    config, x, sde = case.config, case.inputs["x"], sde_of(case)
    accuracy = {"rtol": config["rtol"], "atol": config["atol"]}
    network = view(coded(sde.kind), sde)
    process = Process(network, sde, {})
    z = process.encode(x, eps=config["eps_encode"], **accuracy)
    assert_close(z, case.outputs["z"], 1e-3, "code")
    for name, code in (("reconstruction", z), ("reconstruction_of_z_plus_0p3", z + 0.3)):
        again = process.decode(code, eps=config["eps_decode"], **accuracy)
        if config["denoise"]:
            again = process.denoised(again, config["eps_decode"])
        again = again if config["data_range"] == "[0,1]" else (again + 1) / 2
        assert_close(again, case.outputs[name], 1e-3, name)
    network.path.t_min = config["eps_encode"]
    probe = case.inputs["rademacher01"] * 2 - 1
    found = log_likelihood(network, x, probe, **accuracy)
    width = 1.0 if config["data_range"] == "[0,1]" else 2.0
    assert_close(bits_per_dim(found.log_prob, x[0].numel(), width=width), case.outputs["bpd"], 1e-3, "bits per dim")
    case.ignore("N", "denoise", why="of discrete steps, of which an ODE has none but a last one below the tolerance")
    case.ignore(*(("beta_min", "beta_max") if sde.kind == "ve" else ("sigma_min", "sigma_max")), why="of other SDEs")


@golden.check(lambda c: "analytic_bpd" in c.outputs)
def likelihood(case: GoldenCase) -> None:
    config, x, sde = case.config, case.inputs["x"], sde_of(case)
    data_std = config["s"]

    def exact(x: Tensor, labels: Tensor) -> Tensor:
        if sde.kind == "ve":
            return -x / (data_std**2 + labels.view(-1, 1, 1, 1) ** 2)
        t = labels.double() / 999
        alpha, sigma = sde.path.alpha(t), sde.path.sigma(t)
        return expand(sigma / (alpha**2 * data_std**2 + sigma**2), x).to(x.dtype) * x

    signs = config["hutchinson"] == "Rademacher"
    assert signs or config["hutchinson"] == "Gaussian"
    network = view(exact, sde)
    network.path.t_min = config["eps"]
    probe = case.inputs["draws_randint_like"][0] * 2 - 1 if signs else case.inputs["draws_randn_like"][0]
    found = log_likelihood(network, x, probe, rtol=config["rtol"], atol=config["atol"])
    bits = bits_per_dim(found.log_prob, x[0].numel())
    assert_close(bits, case.outputs["bpd"], 1e-3, "bits per dim")
    if signs:  # whose estimate of a linear score's divergence is exact
        assert_close(bits, case.outputs["analytic_bpd"], 1e-3, "analytic bits per dim")
    assert_close(found.z, case.outputs["z"], 1e-3, "code")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- objective -------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"image_size": 8, "in_channels": 1, "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1}
SMALL |= {"attn_resolutions": (4,), "dropout": 0.0}
VE = {"embedding_type": "fourier", "scale_by_sigma": True, "centered": False}


def tiny(**own: Any) -> NCSNpp:
    torch.manual_seed(0)
    model = NCSNpp(**{**SMALL, **own})
    suites.randomise(model)
    return model.eval()


def test_networks_without_time_or_filter_are_read_off_their_tensors() -> None:
    """Official blocks keep a layer for the time where it is not told; an image pyramid may be of plain convolutions."""
    untold = tiny(conditional=False)
    state = PLAIN.from_ours(untold.state_dict())
    idle = {k.replace("Conv_0", "Dense_0"): torch.ones(8, 32) for k in state if k.endswith("Conv_0.weight")}
    assert idle and PLAIN.to_ours(state | idle).keys() == untold.state_dict().keys()
    assert not PLAIN.config(state | idle)["conditional"] and PLAIN.config(tiny().state_dict())["conditional"]
    for resblock_type in ("biggan", "ddpm"):
        plain = tiny(progressive_input="residual", resblock_type=resblock_type, num_res_blocks=2)
        read = PLAIN.config(PLAIN.from_ours(plain.state_dict()))
        found = tuple(read[k] for k in ("progressive_input", "fir", "ch_mult", "num_res_blocks", "resblock_type"))
        assert found == ("residual", False, [1, 2], 2, resblock_type)
        for given in (
            {"progressive": "residual"},
            {"progressive": "residual", "fir": True},
            {"progressive": "output_skip"},
        ):
            read = PLAIN.config(PLAIN.from_ours(tiny(**given, resblock_type=resblock_type).state_dict()))
            assert read["progressive"] == given["progressive"] and read["fir"] == given.get("fir", False)


@pytest.mark.parametrize(
    ("network", "objective", "says"),
    [
        ({}, {"sde": "ve"}, "networks of VE divide by sigma"),
        (VE, {"sde": "vp"}, "networks of vp do not divide by sigma"),
        ({"scale_by_sigma": True}, {"sde": "ve"}, "told levels of noise in continuous time"),
        ({"embedding_type": "fourier"}, {"sde": "subvp"}, "told times or numbers of levels"),
        ({"centered": False}, {"sde": "vp"}, r"see images in \[-1, 1\]"),
        ({"scale_by_sigma": True}, {"sde": "ve", "continuous": False, "sigma_max": 9.0}, "another ladder"),
        ({}, {"sde": "subvp", "continuous": False}, "continuous time"),
        ({}, {"continuous": False, "likelihood_weighting": True}, "continuous time"),
    ],
)
def test_impossible_pairs_are_refused(network: dict[str, Any], objective: dict[str, Any], says: str) -> None:
    with pytest.raises(VgmError, match=says):
        ScoreMatching(tiny(**network), **objective)


@pytest.mark.parametrize("kind", ["ve", "vp", "subvp", "ve-discrete", "vp-discrete"])
def test_the_view_sees_what_training_sees(kind: str) -> None:
    """The host's score of a network at a noisy image is the one whose error the loss measures, in the host's range."""
    sde, _, discrete = kind.partition("-")
    own = {} if sde != "ve" else {**VE, **({"embedding_type": "positional"} if discrete else {})}
    model = tiny(**own)
    objective = ScoreMatching(model, sde, not discrete)
    seen = Denoiser.from_config(model, json.loads(json.dumps(objective.view())))
    g = torch.Generator().manual_seed(0)
    x, z = torch.rand(3, 1, 8, 8, generator=g) * 2 - 1, torch.randn(3, 1, 8, 8, generator=g)
    step = 400
    t = torch.tensor([step / 999] * 3)
    noisy = seen.path.add_noise(x, z, seen.path.t_of_timestep(step).expand(3) if kind == "vp-discrete" else t.double())
    told = objective.sde.labels(t, not discrete)
    given = (noisy + 1) / 2 if sde == "ve" else noisy
    output = model(given, told)
    want = objective.sde.score(output, t, not discrete) / (2 if sde == "ve" else 1)
    host_time = seen.path.t_of_timestep(step) if kind == "vp-discrete" else t.double()
    assert_close(seen.predict(noisy, host_time, "score"), want, 1e-5, "score")
    x0 = seen.predict(noisy, host_time, "x0")
    alpha, sigma = (
        float(v) for v in (seen.path.alpha(host_time).flatten()[0], seen.path.sigma(host_time).flatten()[0])
    )
    assert_close(x0, (noisy + sigma**2 * want) / alpha, 1e-4, "x0")


def test_losses_of_levels_and_of_time_reach_the_batch() -> None:
    """The sum is half the number of values times the mean; levels and times are functions of (seed, step, row)."""
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    for own in ({"sde": "vp"}, {"sde": "vp", "continuous": False}):
        mean = ScoreMatching(tiny(), **own).loss("main", {"x": x}, Step(3))[0]
        total = ScoreMatching(tiny(), **own, reduce_mean=False).loss("main", {"x": x}, Step(3))[0]
        assert_close(total, 32 * mean, 1e-5, "sum")
        assert mean != ScoreMatching(tiny(), **own).loss("main", {"x": x}, Step(4))[0]


# -- samplers --------------------------------------------------------------------------------------------------------


def gaussian(sde: SDE, std: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """What a perfect network gives for data N(0, std^2)."""

    def net(x: Tensor, labels: Tensor) -> Tensor:
        if sde.kind == "ve":
            return -x / (std**2 + labels.view(-1, 1, 1, 1) ** 2)
        t = labels.double() / 999
        alpha, sigma = sde.path.alpha(t), sde.path.sigma(t)
        return expand(sigma / (alpha**2 * std**2 + sigma**2), x).to(x.dtype) * x

    return net


PAIRS = [
    (p, c) for p in ("reverse-diffusion", "euler-maruyama", "ancestral", "none") for c in ("langevin", "ald", "none")
]


@pytest.mark.parametrize(
    ("kind", "predictor", "corrector"),
    [(("ve", "vp", "subvp")[(i + i // 3) % 3], *pair) for i, pair in enumerate(PAIRS[:-1])]
    + [("ve", "reverse-diffusion", "langevin"), ("subvp", "ancestral", "none"), ("vp", "ancestral", "none")],
)
def test_every_pair_reaches_the_data(kind: Any, predictor: Any, corrector: Any) -> None:
    """Samples of a perfect network have the deviation of the data, whatever the pair; without a predictor Langevin
    alone follows the times. The kinds of SDE take turns."""
    sde = SDE(kind=kind, sigma_max=10.0)
    steps, each = (100, 5) if predictor == "none" else (60, 1)
    sampler = ScoreSDESampler(steps=steps, predictor=predictor, corrector=corrector, corrector_steps=each, snr=0.16)
    request = Request(shape=(1, 8, 8), generators=generators(range(4)))
    if kind == "subvp" and predictor == "ancestral":
        with pytest.raises(VgmError, match="no ancestral steps"):
            sampler(view(gaussian(sde), sde), request)
        return
    x = sampler(view(gaussian(sde), sde), request)
    assert float(x.std()) == pytest.approx(0.5, abs=0.15)


def test_few_steps_and_foreign_paths_are_refused() -> None:
    sde, request = SDE(), Request(shape=(1, 4, 4), generators=generators([0]))
    with pytest.raises(VgmError, match="too few"):
        ScoreSDESampler(steps=15, corrector="none")(view(toy, sde), request)
    few = ScoreSDESampler(steps=15, predictor="euler-maruyama", corrector="none")
    assert torch.isfinite(few(view(toy, sde), request)).all()
    with pytest.raises(VgmError, match="the network is on the path linear"):
        few(Denoiser(toy, "linear"), request)


@pytest.mark.parametrize("norm", ["image", "batch"])
def test_norms_of_a_batch_are_an_option(norm: Any) -> None:
    """By default an image does not depend on its batch; with the official norms it does."""
    sde = SDE(kind="ve", sigma_max=5.0)
    sampler = ScoreSDESampler(steps=10, norm=norm)

    def sample(seeds: list[int]) -> Tensor:
        return sampler(view(toy, sde), Request(shape=(1, 4, 4), generators=generators(seeds)))

    alone, together = sample([1]), sample([1, 2, 3])
    assert torch.allclose(alone[0], together[0], atol=1e-4) == (norm == "image")


def test_latent_codes_of_images() -> None:
    """Images come back from their codes, and interpolation starts at each of them."""
    sde = SDE(kind="vp")
    network = view(gaussian(sde), sde)
    images = 0.5 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    again = ScoreSDEFlowSampler(eps=1e-5)(
        network, Request(shape=(1, 4, 4), generators=generators(range(2)), images=images)
    )
    assert_close(again, images, 1e-2, "reconstruction")
    between = ScoreSDEFlowSampler(eps=1e-5, interpolate=3)(
        network, Request(shape=(1, 4, 4), generators=generators(range(6)), images=images)
    )
    assert_close(between[::3], images, 1e-2, "ends")
    assert (between[1] - images[0]).norm() < (between[2] - images[0]).norm()
    with pytest.raises(VgmError, match="needs images"):
        ScoreSDEFlowSampler(interpolate=3)(network, Request(shape=(1, 4, 4), generators=generators(range(2))))
    cool = ScoreSDEFlowSampler(temperature=0.5)(network, Request(shape=(1, 8, 8), generators=generators(range(8))))
    assert float(cool.std()) == pytest.approx(0.25, rel=0.15)


def test_last_step_of_the_ode() -> None:
    """denoise is the mean of one step of reverse diffusion at the last time."""
    sde = SDE(kind="ve", sigma_max=5.0)
    network, request = view(toy, sde), lambda: Request(shape=(1, 4, 4), generators=generators([0]))
    plain, touched = (ScoreSDEFlowSampler(denoise=flag)(network, request()) for flag in (False, True))
    t = torch.tensor([1e-5])
    want = plain + 0.01**2 * toy(plain, sde.labels(t, True))
    assert torch.allclose(touched, want, atol=1e-6) and not torch.equal(touched, plain)


@pytest.mark.parametrize("init", ["official", "noised"])
@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_known_pixels_are_kept(kind: Any, init: Any) -> None:
    sde = SDE(kind=kind, sigma_max=5.0)
    operator = Inpainting("left").bind((1, 8, 8), generators(range(3)))
    truth = torch.rand(3, 1, 8, 8) * 2 - 1
    request = Request(shape=(1, 8, 8), generators=generators(range(3)), operator=operator, measurement=operator(truth))
    method = ScoreSDERestorer(steps=40, init=init, probability_flow=init == "noised")
    found = method(view(gaussian(sde), sde, unit=kind == "ve"), request)
    assert_close(operator(found), operator(truth), 2e-3, "kept")
    assert len(request.info["residual"]) == 40
    noisy = Inpainting("left").bind((1, 8, 8), generators([0]))
    noisy.noise = type("Noise", (), {"sigma": 0.1, "name": "gaussian"})()
    request.operator = noisy
    with pytest.raises(VgmError, match="removes no noise"):
        method(view(gaussian(sde), sde), request)


# -- checkpoints and the whole from the command line -------------------------------------------------------------------


def test_layouts_say_how_a_network_is_looked_at(tmp_path: Path, vgm: Any) -> None:
    """The same tensors as VP, sub-VP or discrete VP by the layout's name, as VE by a word; nothing is guessed."""
    model = tiny(image_size=32, nf=16, ch_mult=(1, 2), attn_resolutions=(16,), in_channels=3)
    torch.save({"model": PLAIN.from_ours(model.state_dict())}, tmp_path / "checkpoint_8.pth")
    code, _, err = vgm("convert", tmp_path / "checkpoint_8.pth", tmp_path / "a.safetensors")
    assert code == 2 and "its tensors do not say" in err and "score-sde-subvp" in err
    words = ["--from", "score-sde", "scale_by_sigma=true", "centered=false"]
    code, _, err = vgm("convert", tmp_path / "checkpoint_8.pth", tmp_path / "b.safetensors", *words)
    assert code == 0, err
    header = ckpt.read_header(tmp_path / "b.safetensors")
    assert (header.view["path"]["name"], header.view["time"], header.view["data_range"]) == ("ve", "ladder", "unit")
    assert header.recipe["sampler"]["corrector"] == "langevin" and header.data["sample_shape"] == [3, 32, 32]
    told = PLAIN.config(PLAIN.from_ours(model.state_dict()))
    for layout, path, predictor in (
        (PLAIN, "vp", "euler-maruyama"),
        (SUBVP, "subvp", "euler-maruyama"),
        (DISCRETE, "vp-discrete", "ancestral"),
    ):
        said = layout.published.header(told)
        assert (said["view"]["path"]["name"], said["recipe"]["sampler"]["predictor"]) == (path, predictor)
    fourier = PLAIN.from_ours(tiny(**VE).state_dict())
    assert PLAIN.recognise(fourier) and not SUBVP.recognise(fourier) and not DISCRETE.recognise(fourier)
    assert PLAIN.published.header({**told, **VE})["view"]["time"] == "sigma"
    own = tiny(**VE, image_size=32, nf=16, attn_resolutions=(16,), in_channels=3, fir=True)
    state = PLAIN.from_ours(own.state_dict())
    again = NCSNpp(**PLAIN.config(state))
    again.load_state_dict(PLAIN.to_ours(state))
    assert not again.centered and again.scale_by_sigma


def test_folders_of_diffusers_of_any_age() -> None:
    """Attention by its old names, Fourier features twice; what diffusers has no blocks for is refused."""
    own = VE | {"nf": 32, "ch_mult": (1, 4), "progressive": "output_skip", "progressive_input": "input_skip"}
    model = tiny(**own, image_size=32, attn_resolutions=(16,), in_channels=3, fir=True)
    state = model.state_dict()
    theirs = DIFFUSERS.from_ours(state)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in theirs.items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor
    old["time_proj.W"] = old["time_proj.weight"]
    assert DIFFUSERS.recognise(old) and DIFFUSERS.own(old).keys() == theirs.keys()
    again = DIFFUSERS.to_ours(old)
    assert all(torch.equal(again[k], v) for k, v in state.items() if k != "sigmas") and again.keys() == state.keys()
    assert len(again["sigmas"]) == 2000 and again["sigmas"][0] == pytest.approx(348)
    said = DIFFUSERS.published.header(DIFFUSERS.config(old))
    assert said["view"]["path"]["name"] == "ve" and said["view"]["time"] == "sigma"
    with pytest.raises(VgmError, match="cannot express"):
        DIFFUSERS.from_ours(
            tiny(image_size=32, nf=16, ch_mult=(1, 2), attn_resolutions=(16,), in_channels=3).state_dict()
        )
    whole = own | {"image_size": 32, "in_channels": 3, "fir": True, "num_scales": 2000, "sigma_max": 348.0}
    for wrong, says in (({"ch_mult": (1, 2)}, "too few"), ({"norm_groups": 4}, "groups"), ({"fir": False}, "fir is False"),
                        ({"sigma_max": 50.0}, "0.01 to 50 in 2000")):  # fmt: skip
        with pytest.raises(VgmError, match=says):
            DIFFUSERS.allows({**whole, **wrong})


SHRUNK = ("model.nf=8", "model.ch_mult=[1, 1]", "model.attn_resolutions=[]")


class TestTraining(suites.ObjectiveSuite):
    recipe = "score-sde/mnist"
    overrides = SHRUNK


class TestVarianceExploding(suites.SamplerSuite):
    recipe = "score-sde/mnist-ve"
    overrides = SHRUNK
    steps = 3


class TestClassifierTraining(suites.ObjectiveSuite):
    recipe = "score-sde/mnist-classifier"
    test_resume_is_bit_exact = None  # it keeps no state of its own


def test_from_the_command_line(tmp_path: Path, vgm: Any) -> None:
    """Train a network without classes and a classifier; sample a class; complete halves; measure bits per dim."""
    short = ["train.steps=2", "train.batch_size=8", "train.preview_n=0", "train.precision=fp32"]
    for recipe, own in (("mnist-ve", SHRUNK), ("mnist-classifier", ("objective.sde=ve", "objective.sigma_max=15"))):
        code, _, err = vgm("train", "score-sde", "--recipe", recipe, *short, *own, "--out", tmp_path / recipe)
        assert code == 0, err
    run, guide = tmp_path / "mnist-ve", f"classifier={tmp_path / 'mnist-classifier'}"
    code, _, err = vgm("sample", run, "--label", 3, "-n", 2, "steps=2", "--out", tmp_path / "no.png")
    assert code == 2 and "unconditional" in err
    images = []
    for scale in (0, 100):
        out = tmp_path / f"{scale}.png"
        own = [guide, f"classifier_scale={scale}", "steps=2", "--label", "3,7", "-n", 2, "--out", out]
        code, _, err = vgm("sample", run, *own)
        assert code == 0, err
        images.append(out.read_bytes())
    assert images[0] != images[1]
    code, _, err = vgm("rerun", tmp_path / "100.png", "--out", tmp_path / "again.png")
    assert code == 0 and "identical" in err, err
    more = ["--method", "score-sde-restore", "--mask", "lower", "--input", "mnist5k", "-n", 2, "--steps", 2]
    code, _, err = vgm("restore", "--model", run, *more, "--out", tmp_path / "whole")
    assert code == 0, err
    bits = "bits-per-dim:n=2:method=euler:steps=2"
    code, text, err = vgm("evaluate", run, "--metrics", f"{bits}:passes=2,{bits}:dequantised=false", "--json")
    assert code == 0 and "no figure to compare" in err, err
    assert "NOT dequantised" in text
    code, _, err = vgm("sample", run, "--sampler", "score-sde", "steps=2", "denoise=false", "-n", 1, "--out", "d.png")
    assert code == 0 and "FID does" in err


def test_distances_of_a_set(vgm: Any, tiny_dataset: Path) -> None:
    code, text, err = vgm("data", "info", tiny_dataset, "--distances", "--json")
    found = json.loads(text)["distances"]
    assert code == 0 and 0 < found["median"] <= found["largest"], err
