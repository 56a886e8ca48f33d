"""ADM against openai/guided-diffusion@22e0df8 (golden cases), published sizes, both checkpoint layouts, training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vgm_plugins.adm_unet.checkpoints import CLASSIFIER, CONVERTER, recognise, recognise_classifier
from vgm_plugins.adm_unet.diffusers_checkpoints import DIFFUSERS, DIFFUSERS_LEGACY
from vgm_plugins.adm_unet.model import EncoderUNetModel, UNetModel
from vgm_plugins.adm_unet.objective import NoisyClassifier, Upsampling
from vgm_plugins.adm_unet.presets import CLASSIFIERS, PRESETS

from vgm_cli.api import Request, Step
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.discrete import (
    DiscreteDiffusion,
    discretized_gaussian_log_likelihood,
    named_betas,
    normal_kl,
    space_timesteps,
)
from vgm_cli.diffusion.guidance import classifier_gradient
from vgm_cli.diffusion.iddpm import IDDPM, DDPMSampler
from vgm_cli.diffusion.resample import LossSecondMomentResampler
from vgm_cli.errors import VgmError
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("adm-unet")

OPTIONS = {"timestep_respacing": "respacing", "noise_schedule": "schedule", "diffusion_steps": "steps"}
MEANS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "x_prev"}


def process(case: GoldenCase) -> DiscreteDiffusion:
    """create_gaussian_diffusion's options and defaults -> ours."""
    config = case.config["diffusion"]
    made = DiscreteDiffusion.create(**{"learn_sigma": False, **{OPTIONS.get(k, k): v for k, v in config.items()}})
    if len(made.timestep_map) == 1000 or config.get("steps", config.get("diffusion_steps", 1000)) == 1000:
        same = ("diffusion.rescale_learned_sigmas", "diffusion.rescale_timesteps")
        case.ignore(*same, why="both multiply by steps / 1000, which is 1 here")
    return made


OFFICIAL = {  # defaults of the official constructors where ours follow the published models
    "num_classes": None,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "channel_mult": (1, 2, 4, 8),
    "num_heads": 1,
    "num_head_channels": -1,
}
OURS = ("use_checkpoint", "use_fp16")  # what has no effect on values here


def without_effect(case: GoldenCase, name: str) -> None:
    """Say which keys of the network at config[name] nothing here depends on."""
    config = case.config[name]
    case.ignore(*(f"{name}.{k}" for k in OURS), why="they spend memory otherwise; values are the same")
    case.ignore(f"{name}.dropout", why="evaluated without dropout")
    if config.get("pool") != "attention":
        case.ignore(f"{name}.image_size", why="no layer depends on it: attention is placed by factors of it")
    levels = {2**i for i in range(len(config["channel_mult"]))}
    if len(levels) == 1:
        case.ignore(f"{name}.resblock_updown", f"{name}.conv_resample", why="one level: nothing is resampled")
    if not levels & set(config["attention_resolutions"]):
        case.ignore(f"{name}.attention_resolutions", why="no level is so small: only the middle has attention")


def unet(config: dict[str, Any], **own: Any) -> UNetModel:
    assert config.get("dims", 2) == 2, "images"
    kept = {k: config[k] for k in config if k not in (*OURS, "dims")}
    return UNetModel(**{**OFFICIAL, **kept, **own})


def classifier(config: dict[str, Any]) -> EncoderUNetModel:
    kept = {k: config[k] for k in config if k not in (*OURS, "out_channels", "num_heads_upsample")}
    base = {k: v for k, v in OFFICIAL.items() if k != "num_classes"}
    return EncoderUNetModel(**{**base, "pool": "adaptive", **kept, "num_classes": config["out_channels"]})


def load(case: GoldenCase) -> UNetModel:
    """The case's network, its weights through the shipped converter."""
    without_effect(case, "model")
    model = unet(case.config["model"], super_res={"unet": False, "sr": True}[case.config.get("cls", "unet")])
    model.load_state_dict(CONVERTER.to_ours(case.state))
    return model.eval()


def toy(diffusion: DiscreteDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """The denoiser that the toy cases state in their notes."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        t = t.float().view(-1, *[1] * (x.ndim - 1))
        eps = 0.3 * torch.tanh(x) + 0.001 * t
        return torch.cat([eps, 0.5 * torch.cos(x) - 0.0004 * t], dim=1) if diffusion.learned else eps

    return model


def is_toy(case: GoldenCase) -> bool:
    return not case.state and "diffusion" in case.config


# -- golden cases: networks ------------------------------------------------------------------------------------------


@golden.check(lambda c: c.config.get("cls") in ("unet", "sr") and "out/out" in c)
@torch.no_grad()
def forward(case: GoldenCase) -> None:
    model, i = load(case), case.inputs
    low_res = {"low_res": i["low_res"]} if "low_res" in i else {}
    out = model(i["x"], i["t"], i.get("y"), **low_res)
    assert_close(out, case.outputs["out"], 1e-5, "out")
    assert_close(model.to(memory_format=torch.channels_last)(i["x"], i["t"], i.get("y"), **low_res), out, 1e-5, "nhwc")


@golden.check(lambda c: c.config.get("cls") == "enc")
def classify(case: GoldenCase) -> None:
    without_effect(case, "model")
    case.ignore("model.num_heads_upsample", why="an encoder has no way up")
    model = classifier(case.config["model"])
    model.load_state_dict(CLASSIFIER.to_ours(case.state))
    model.eval()
    x, t, y = (case.inputs[k] for k in "xty")
    assert_close(model(x, t), case.outputs["logits"], 1e-5, "logits")
    if "cond_fn_grad" in case.outputs:
        gradient = classifier_gradient(model, y, case.config["classifier_scale"])(x, t)
        assert_close(gradient, case.outputs["cond_fn_grad"], 1e-4, "gradient")


@golden.check(lambda c: "out/grad_norm_all" in c)
def loss_and_gradients(case: GoldenCase) -> None:
    model, diffusion = load(case), process(case)
    y = case.inputs.get("y")
    terms = diffusion.losses(lambda x, t: model(x, t, y), *(case.inputs[k] for k in ("x0", "t", "noise")))
    for name in ("loss", "mse", "vb"):
        if name in case.outputs:
            assert_close(terms[name], case.outputs[name], 1e-5, name)
    terms["loss"].mean().backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    for name, want in case.outputs.items():
        if name.startswith("grad."):
            assert_close(gradients[name.removeprefix("grad.")], want, 1e-4, name)
    assert set(case.config["gradkeys"]) == {k.removeprefix("grad.") for k in case.outputs if k.startswith("grad.")}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert_close(norm, case.outputs["grad_norm_all"], 1e-4, "gradient norm")


class Drawn:
    """A request whose standard normal draws are given."""

    guidance_scale, guidance_interval, steps, callback, images = None, None, None, None, None
    asked: dict[str, Any] = {}
    device = torch.device("cpu")
    classes = Request.classes

    def __init__(self, draws: list[Tensor], cond: dict[str, Tensor]):
        self.draws, self.cond, self.info = iter(draws), cond, {}

    def randn(self) -> Tensor:
        return next(self.draws)


@golden.check(lambda c: "classifier" in c.config)
def guided_by_a_classifier(case: GoldenCase) -> None:
    """The whole of classifier_sample.py, with the shipped sampler."""
    config, own = case.config, {}
    for name, build, converter in (("model", unet, CONVERTER), ("classifier", classifier, CLASSIFIER)):
        state = {k.removeprefix(f"{name}."): v for k, v in case.state.items() if k.startswith(f"{name}.")}
        without_effect(case, name)
        own[name] = build(config[name]).eval()
        own[name].load_state_dict(converter.to_ours(state))
    options = {"learn_sigma": False} | {OPTIONS.get(k, k): v for k, v in config["diffusion"].items()}
    if options.pop("predict_xstart", False):
        options["prediction"] = "x0"
    if options.pop("sigma_small", False) and not options["learn_sigma"]:
        options["variance"] = "fixed_small"
    for key in ("use_kl", "rescale_learned_sigmas"):
        options.pop(key, None)
        case.ignore(f"diffusion.{key}", why="nothing is trained")
    respacing = options.pop("respacing", options.get("steps", 1000))
    objective = IDDPM(own["model"], options.pop("schedule", "linear"), options.pop("steps", 1000), **options)
    view = Denoiser.from_config(own["model"], objective.view())
    sampler = DDPMSampler(
        steps=respacing,
        clip_denoised=config.get("clip_denoised", True),
        sampler={"p": "ddpm", "ddim": "ddim"}[config["loop"]],
        eta=config.get("eta", 0.0),
        classifier=own["classifier"],
        classifier_scale=config["classifier_scale"],
    )
    # the official loop draws at every step, the last draw is never used; DDIM without eta uses none
    request = Drawn([case.inputs["xT"], *case.inputs["step_noise"]], {"y": case.inputs["y"]})
    request.asked = {"label": case.inputs["y"]}
    with torch.no_grad():
        samples = sampler(view, request)
    assert_close(samples, case.outputs["samples"], 1e-4, "samples")
    if "uint8" in case.outputs:
        pixels = ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        assert int((pixels.int() - case.outputs["uint8"].int()).abs().max()) <= 1  # truncation at a pixel's edge


# -- golden cases: the process ---------------------------------------------------------------------------------------


@golden.check(lambda c: is_toy(c) and "out/loss" in c)
def toy_losses(case: GoldenCase) -> None:
    diffusion = process(case)
    terms = diffusion.losses(toy(diffusion), *(case.inputs[k] for k in ("x0", "t", "noise")))
    assert set(terms) == set(case.outputs)
    for name, got in terms.items():
        assert_close(got, case.outputs[name], 1e-5, name)


@golden.check(lambda c: any(k.startswith(("EPSILON.", "START_X.", "PREVIOUS_X.")) for k in c.outputs))
def every_loss_type(case: GoldenCase) -> None:
    betas = named_betas(case.config["schedule"], case.config["steps"])
    for name, want in case.outputs.items():
        mean, variance, loss, term = name.split(".")
        diffusion = DiscreteDiffusion(betas, MEANS[mean], variance.lower(), loss.lower())
        terms = diffusion.losses(toy(diffusion), *(case.inputs[k] for k in ("x0", "t", "noise")))
        assert_close(terms[term], want, 1e-5, name)


@golden.check(lambda c: is_toy(c) and "in/xT" in c)
def toy_sampling(case: GoldenCase) -> None:
    config, inputs = case.config, case.inputs
    diffusion = process(case)
    assert diffusion.timestep_map == case.outputs["timestep_map"].tolist()
    eta, ddim = config.get("eta", 0.0), {"p": False, "ddim": True}[config["loop"]]
    if ddim:
        case.ignore("diffusion.learn_sigma", "diffusion.sigma_small", why="DDIM's variance is its own")
    else:
        case.ignore("eta", why="ancestral steps have no eta")
    draws = iter(inputs["step_noise"])
    y = inputs["y"].view(-1, *[1] * (inputs["xT"].ndim - 1))

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * torch.sin(x + 0.3 * y) - 0.0002 * t.float().view_as(y)

    steps = diffusion.sample_loop(
        toy(diffusion),
        inputs["xT"],
        lambda: next(draws),
        "ddim" if ddim else "ddpm",
        eta=eta,
        clip_denoised=config["clip_denoised"],
        cond_fn=cond_fn if config["cond"] else None,
    )
    x, x0 = zip(*steps)
    assert_close(torch.stack(x), case.outputs["trajectory"], 1e-4, "trajectory")
    assert_close(torch.stack(x0), case.outputs["pred_xstart"], 1e-4, "pred_xstart")


@golden.check(lambda c: is_toy(c) and "in/x0" in c and "out/trajectory" in c)
def toy_encoding(case: GoldenCase) -> None:
    diffusion = process(case)
    case.ignore("diffusion.learn_sigma", "diffusion.sigma_small", why="DDIM's variance is its own")
    clip = case.config.get("clip_denoised", False)  # the stored encodings are unclipped
    steps = diffusion.ddim_reverse_loop(toy(diffusion), case.inputs["x0"], clip_denoised=clip)
    assert_close(torch.stack([x for x, _ in steps]), case.outputs["trajectory"], 1e-4, "trajectory")


@golden.check(lambda c: "out/total_bpd" in c)
def bits_per_dimension(case: GoldenCase) -> None:
    diffusion, draws = process(case), iter(case.inputs["noises"])
    out = diffusion.bpd_loop(toy(diffusion), case.inputs["x0"], lambda: next(draws), case.config["clip"])
    for name, want in case.outputs.items():
        assert_close(out[name], want, 1e-4, name)


@golden.check(lambda c: "spaces" in c.config)
def schedules_and_spacings(case: GoldenCase) -> None:
    spaces = {f"space_{n}_{sections}" for n, sections in case.config["spaces"]}
    tables = {f"betas_{kind}_{n}" for kind in ("linear", "cosine") for n in case.config["steps"]}
    assert set(case.outputs) == spaces | tables
    for name, want in case.outputs.items():
        kind, *rest = name.split("_")
        if kind == "betas":
            assert_close(torch.from_numpy(named_betas(rest[0], int(rest[1]))), want, 1e-12, name)
        else:
            assert space_timesteps(int(rest[0]), rest[1]) == want.tolist(), name


@golden.check(lambda c: "uniform_prob" in c.config)
def second_moment_resampler(case: GoldenCase) -> None:
    resampler = LossSecondMomentResampler(case.config["T"], case.config["history"], case.config["uniform_prob"])
    for t, loss, want in zip(case.inputs["ts"], case.inputs["losses"], case.outputs["weights_after_each_update"]):
        resampler.update(t, loss)
        assert_close(resampler.weights(), want, 1e-12, "weights")
    assert resampler.warmed_up == bool(case.outputs["warmed_up"])
    p = resampler.weights() / resampler.weights().sum()
    assert_close(1 / (len(p) * p), case.outputs["importance_weights"], 1e-12, "importance")


@golden.check(lambda c: "out/kl" in c and "out/dll" in c)
def likelihood_terms(case: GoldenCase) -> None:
    i = case.inputs
    assert_close(normal_kl(i["m1"], i["lv1"], i["m2"], i["lv2"]), case.outputs["kl"], 1e-5, "kl")
    got = discretized_gaussian_log_likelihood(i["x"], i["m1"], i["ls"])
    assert_close(got, case.outputs["dll"], 1e-5, "decoder")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {  # the official code's
    "64": 295_904_454,
    "128": 421_529_606,
    "256": 553_838_086,
    "256-uncond": 552_814_086,
    "512": 558_997_638,
    "512-uncond": 557_973_638,
    "64-256-upsampler": 311_795_910,
    "128-512-upsampler": 308_835_270,
    "lsun256": 552_814_086,
    "lsun256-nodropout": 552_814_086,
}
CLASSIFIER_SIZES = {"64": 65_438_568, "128": 42_568_040, "256": 54_096_360, "512": 54_448_360}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_size_and_configuration_from_shapes(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "adm-unet", "preset": name})
        assert count(model) == SIZES[name]
        state = model.state_dict()
        assert recognise(state) and not recognise_classifier(state)
        config = CONVERTER.config(state)
    drawn = {"dropout": 0.0} if "dropout" in PRESETS[name] else {}  # not in the shapes
    want = {**PRESETS[name], **drawn}
    assert {k: config.get(k, 0.0) for k in want} == want
    assert CONVERTER.to_ours(state).keys() == state.keys()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_size_and_configuration_from_shapes(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "adm-classifier", "preset": name})
        assert count(model) == CLASSIFIER_SIZES[name]
        state = model.state_dict()
        assert recognise_classifier(state) and not recognise(state)
        config = CLASSIFIER.config(state)
    assert {k: config[k] for k in CLASSIFIERS[name]} == CLASSIFIERS[name]


SMALL = {"image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "num_classes": 5}
SMALL |= {"attention_resolutions": (2,), "num_head_channels": 32}
VARIANTS = [
    {},
    {"resblock_updown": False},
    {"resblock_updown": False, "conv_resample": False, "use_scale_shift_norm": False},
    {"num_res_blocks": 2, "channel_mult": (1, 1, 2), "attention_resolutions": (1, 4), "num_classes": 0},
    {"channel_mult": (1,), "attention_resolutions": (), "learn_sigma": False},
    {"in_channels": 3, "super_res": True},
]


@pytest.mark.parametrize("own", VARIANTS)
def test_configuration_from_shapes(own: dict[str, Any]) -> None:
    with torch.device("meta"):
        state = UNetModel(**SMALL | own).state_dict()
        again = UNetModel(**CONVERTER.config(state)).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in again.items()}
    with pytest.raises(KeyError):
        CONVERTER.to_ours({k: v for k, v in state.items() if k != "middle_block.0.out_layers.3.bias"})


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize("updown", [True, False])
def test_classifier_round_trip(pool: Any, updown: bool) -> None:
    with torch.device("meta"):
        state = EncoderUNetModel(**SMALL, resblock_updown=updown, pool=pool).state_dict()
        again = EncoderUNetModel(**CLASSIFIER.config(state)).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in again.items()}
    assert CLASSIFIER.from_ours(CLASSIFIER.to_ours(state)).keys() == state.keys()


# -- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_order", [True, False])
@pytest.mark.parametrize("updown", [True, False])
def test_diffusers_runs_the_same_network(new_order: bool, updown: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    own = {"channel_mult": (1, 2, 2), "attention_resolutions": (2, 4), "model_channels": 64, "num_head_channels": 64}
    config = SMALL | own | {"use_new_attention_order": new_order, "resblock_updown": updown}
    torch.manual_seed(0)
    model = UNetModel(**config).eval()
    suites.randomise(model)
    converter = DIFFUSERS if new_order else DIFFUSERS_LEGACY
    kind = "resnet" if updown else "conv"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if updown else ("DownBlock2D", "UpBlock2D")
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        num_class_embeds=5,
        attention_head_dim=64,
        attn_norm_num_groups=32,
        down_block_types=(plain[0], "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", plain[1]),
        resnet_time_scale_shift="scale_shift",
        downsample_type=kind,
        upsample_type=kind,
    ).eval()
    state = model.state_dict()
    renamed = converter.from_ours(state)
    theirs.load_state_dict(renamed)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 4])
    with torch.no_grad():
        assert_close(model(x, t, y), theirs(x, t, class_labels=y).sample, 1e-5, "forward")
    assert converter.recognise(renamed)
    again = converter.to_ours(renamed)
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())
    rebuilt = UNetModel(**converter.config(renamed))
    rebuilt.load_state_dict(again)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x, t, y), model(x, t, y))


def test_diffusers_says_what_it_cannot_express() -> None:
    half = UNetModel(**SMALL | {"channel_mult": (0.5, 1), "model_channels": 64})
    with pytest.raises(VgmError, match="cannot express"):
        DIFFUSERS.from_ours(half.state_dict())


# -- behaviour -------------------------------------------------------------------------------------------------------


class TestConditionalModel(suites.ModelSuite):
    model = {"name": "adm-unet", **SMALL, "in_channels": 3, "null_class": True}
    shape = (3, 16, 16)


class TestUnconditionalPatchedModel(suites.ModelSuite):
    model = {"name": "adm-unet", **SMALL, "in_channels": 1, "num_classes": 0, "patch_size": 2, "learn_sigma": False}
    shape = (1, 16, 16)


def test_attention_orders_differ() -> None:
    torch.manual_seed(0)
    model = UNetModel(**SMALL | {"num_head_channels": 16}).eval()
    suites.randomise(model)
    x, t, y = torch.randn(1, 3, 16, 16), torch.tensor([5]), torch.tensor([1])
    with torch.no_grad():
        legacy = model(x, t, y)
        for block in model.modules():
            if hasattr(block, "new_order") and hasattr(block, "qkv"):
                block.new_order = True
        assert (model(x, t, y) - legacy).abs().max() > 1e-3 * legacy.abs().max()


def test_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = UNetModel(**SMALL).train()
    suites.randomise(model)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([5, 9]), torch.tensor([1, 2])
    grads = []
    for flag in (False, True):
        model.checkpointing = flag
        model.zero_grad()
        model(x, t, y).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*grads))


def test_errors_are_told() -> None:
    with pytest.raises(VgmError, match="32 groups"):
        UNetModel(**SMALL | {"model_channels": 48})
    with pytest.raises(VgmError, match="heads"):
        UNetModel(**SMALL | {"num_head_channels": 48})
    model, x, t = UNetModel(**SMALL), torch.randn(1, 3, 16, 16), torch.tensor([1])
    with pytest.raises(VgmError, match="needs labels"):
        model(x, t)
    with pytest.raises(VgmError, match="small image"):
        UNetModel(**SMALL, super_res=True)(x, t, torch.tensor([1]))
    assert not hasattr(model, "null_condition")


def test_classifier_learns_a_brightness() -> None:
    """Two classes, dark and bright: the loss falls and the guiding gradient points to the wanted one."""
    torch.manual_seed(0)
    model = EncoderUNetModel(**SMALL | {"image_size": 8, "in_channels": 1, "num_classes": 2, "channel_mult": (1,)})
    objective = NoisyClassifier(model, schedule="cosine", steps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    y = torch.arange(32) % 2
    x = (y * 2.0 - 1)[:, None, None, None].expand(-1, 1, 8, 8)
    losses = []
    for index in range(30):
        loss, logs = objective.loss("main", {"x": x, "label": y}, Step(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]) and 0 <= logs["accuracy"] <= 1
    grey, t = torch.zeros(2, 1, 8, 8), torch.tensor([10, 10])
    gradient = classifier_gradient(model.eval(), torch.tensor([0, 1]))(grey, t).mean(dim=(1, 2, 3))
    assert gradient[0] < 0 < gradient[1]
    with pytest.raises(VgmError, match="labelled"):
        objective.loss("main", {"x": x}, Step(0))


def test_upsampler_sees_the_small_image() -> None:
    torch.manual_seed(0)
    model = UNetModel(**SMALL, super_res=True)
    suites.randomise(model)
    objective = Upsampling(model, small_size=8)
    batch = {"x": torch.rand(2, 3, 16, 16), "cond": {"y": torch.tensor([0, 1])}}
    cond = objective.keywords_of(batch)
    assert cond["low_res"].shape == (2, 3, 8, 8)
    assert_close(cond["low_res"], torch.nn.functional.avg_pool2d(batch["x"], 2), 1e-6, "area means")
    loss, _ = objective.loss("main", batch, Step(0))
    loss.backward()
    first = model.input_blocks[0][0].weight.grad
    assert torch.isfinite(loss) and first[:, 3:].abs().max() > 0, "the small image gets no gradient"


# -- recipes -----------------------------------------------------------------------------------------------------------

SHRUNK = ("model.num_res_blocks=1", "model.channel_mult=[1,1]")


class TestTraining(suites.ObjectiveSuite):
    recipe = "adm-unet/mnist"
    overrides = SHRUNK


class TestClassifierTraining(suites.ObjectiveSuite):
    recipe = "adm-unet/mnist-classifier"
    overrides = SHRUNK


class TestSampling(suites.SamplerSuite):
    recipe = "adm-unet/mnist"
    overrides = SHRUNK
    steps = 3


def test_guided_by_a_trained_classifier_from_the_command_line(tmp_path: Path, vgm: Any) -> None:
    short = ["train.steps=2", "train.batch_size=8", "train.preview_n=0", "train.precision=fp32", *SHRUNK]
    for recipe in ("mnist", "mnist-classifier"):
        code, _, err = vgm("train", "adm-unet", "--recipe", recipe, *short, "--out", tmp_path / recipe)
        assert code == 0, err
    images = {}
    for name, own in (
        ("plain", []),
        ("guided", [f"classifier={tmp_path / 'mnist-classifier'}", "classifier_scale=50"]),
    ):
        out = tmp_path / f"{name}.npz"
        code, _, err = vgm("sample", tmp_path / "mnist", *own, "steps=2", "-n", 3, "--guidance-scale", 1, "--out", out)
        assert code == 0, err
        images[name] = np.load(out)["arr_0"]
    assert images["plain"].shape == images["guided"].shape and (images["plain"] != images["guided"]).any()
    own = ["--sampler", "ddim", "--steps", 2, "-n", 3, "--guidance-scale", 1, "--out", "ddim.npz"]
    guide = f"classifier={tmp_path / 'mnist-classifier'}"
    pictures = []
    for words in ([], [guide, "classifier_scale=0"], [guide, "classifier_scale=50"]):  # any Gaussian sampler
        code, _, err = vgm("sample", tmp_path / "mnist", *own, *words, "--overwrite")
        assert code == 0, err
        pictures.append(np.load("ddim.npz")["arr_0"].astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1 < abs(pictures[0] - pictures[2]).max()
