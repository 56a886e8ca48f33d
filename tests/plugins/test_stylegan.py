"""StyleGAN against NVlabs/stylegan@1e0d5c7, NVlabs/stylegan2-ada-pytorch@d72cc7d and rosinality's port@07fa60b (golden
cases), published sizes, training phases, truncation, style mixing, path lengths, foreign pickles."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.stylegan import checkpoints, model, port, presets, stylegan2
from vgm_plugins.stylegan.augment import DRAWS, PIPES, AugmentPipe, filter_bank, next_probability
from vgm_plugins.stylegan.layers import StyleGenerator, bias_act, minibatch_stddev, pixel_norm, sides
from vgm_plugins.stylegan.losses import (
    discriminator_loss,
    fade_reals,
    generator_loss,
    gradient_penalty,
    level_of_detail,
    path_lengths,
    path_penalty,
    r1_penalty,
)
from vgm_plugins.stylegan.objective import StyleGANObjective
from vgm_plugins.stylegan.sampler import StyleGANSampler, StyleMixingSampler, layer_range

from vgm_cli.api import Request, Step, generators
from vgm_cli.convert_api import Converter, unwrap
from vgm_cli.engine.ema import EMA
from vgm_cli.errors import VgmError
from vgm_cli.nn.fir import upfirdn2d
from vgm_cli.recipe import load
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("stylegan")


def part(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in case.state.items() if k.startswith(prefix)}


def restore(converter: Converter, cls: Any, state: dict[str, Tensor], **known: Any) -> Any:
    """A network through the shipped converter, whose layout survives the round trip. known: what no tensor tells."""
    assert converter.recognise(state)
    network = cls(**{**converter.config_from(state), **known})
    network.load_state_dict(converter.to_ours(state))
    again = converter.from_ours(network.state_dict())
    assert set(again) == set(state), set(again) ^ set(state)
    assert all(torch.equal(again[k].reshape(v.shape), v) for k, v in state.items())
    return network.eval()


def stated(cls_kwargs: dict[str, Any], given: dict[str, Any]) -> None:
    """What a converter read off the tensors is what the case states."""
    wrong = {k: (given[k], v) for k, v in cls_kwargs.items() if k in given and v is not None and given[k] != v}
    assert not wrong, wrong


# -- golden: StyleGAN in TensorFlow ----------------------------------------------------------------------------------


def tf(case: GoldenCase) -> bool:
    return "NVlabs/stylegan@" in case.source


def tf_generator(case: GoldenCase) -> model.Generator:
    state = {re.sub("^G_(synthesis|mapping)/", r"\1/", k): v for k, v in part(case, "G/").items()}
    c, g = case.config["common"], case.config["G"]
    stated(
        {"size": c["resolution"], "in_channels": c["num_channels"], "num_classes": c["label_size"],
         "latent_size": g.get("latent_size"), "w_dim": g.get("dlatent_size"), "mapping_layers": g.get("mapping_layers"),
         "mapping_width": g.get("mapping_fmaps"), "fmap_max": c.get("fmap_max")},
        checkpoints.GENERATOR.config_from(state),
    )  # fmt: skip
    return restore(checkpoints.GENERATOR, model.Generator, state)


def tf_discriminator(case: GoldenCase) -> model.Discriminator:
    options = {"group_size": case.config["D"].get("mbstd_group_size", 4)}
    if "mbstd_num_features" in case.config["D"]:
        options["group_features"] = case.config["D"]["mbstd_num_features"]
    return restore(checkpoints.DISCRIMINATOR, model.Discriminator, part(case, "D/"), **options)


def labels_of(case: GoldenCase) -> Tensor | None:
    for key in ("labels", "label", "c", "y"):
        if key in case.inputs:
            return case.inputs[key]
    return None


def const_noise(g: StyleGenerator) -> list[Tensor] | None:
    return g.fixed_noise()


@golden.check(lambda c: tf(c) and "state/G/lod" in c)
@torch.no_grad()
def tf_images(case: GoldenCase) -> None:
    g, out, y = tf_generator(case), case.outputs, labels_of(case)
    w = g.map(case.inputs["z"], y)
    noise = const_noise(g)
    if "dlatents" in out:
        assert_close(w, out["dlatents"] if out["dlatents"].ndim == 2 else out["dlatents"][:, 0], 1e-5, "dlatents")
    if "img_from_dlatents" in out:
        assert_close(g.synthesis(case.inputs["dlatents"], noise, 0.0), out["img_from_dlatents"], 1e-4, "from dlatents")
    if "img_trunc1_const" in out:
        assert_close(g.synthesis(g.styles(w), noise, 0.0), out["img_trunc1_const"], 1e-4, "without truncation")
    given = case.inputs["dlatents"]  # the levels of detail are of these styles
    seen = 0
    for name, want in out.items():
        if m := re.fullmatch(r"img_lod([\d.]+)", name):
            got = g.synthesis(given, noise, float(m[1]))
        elif m := re.fullmatch(r"img_psi([\d.]+)_cut(\d+)", name):
            got = g.synthesis(g.styles(w, float(m[1]), int(m[2])), noise, 0.0)
        else:
            continue
        assert_close(got, want, 1e-4, name)
        seen += 1
    assert seen >= 2
    if "img_fused_fixed" in out:  # fused at every side: kernels turned round
        for layer in g.layers:
            if layer.up:
                layer.conv.weight.copy_(layer.conv.weight.flip(2, 3))
        assert_close(g.synthesis(given, noise, 0.0), out["img_fused_fixed"], 1e-4, "fused")


@golden.check(lambda c: tf(c) and "state/D/lod" in c)
def tf_scores(case: GoldenCase) -> None:
    d, out, y = tf_discriminator(case), case.outputs, labels_of(case)
    fake, real = case.inputs["fake"], case.inputs["real"]
    with torch.no_grad():
        for name, want in out.items():
            if m := re.fullmatch(r"scores_lod([\d.]+)", name):
                close = [assert_matches(d(x, y, float(m[1])), want) for x in (real, fake)]
                assert any(close), name
        if "scores_fused_fixed" in out:
            assert any(assert_matches(d(x, y, 0.0), out["scores_fused_fixed"]) for x in (real, fake))
    scores_fake = d(fake, y, 0.0)
    scores_real, penalty = r1_penalty(lambda x: d(x, y, 0.0), real)
    assert_close(scores_fake, out["scores_fake"], 1e-4, "scores of generated images")
    assert_close(scores_real, out["scores_real"], 1e-4, "scores of real images")
    assert_close(generator_loss(scores_fake), out["G_loss"], 1e-4, "generator's loss")
    assert_close(discriminator_loss(scores_real, scores_fake), out["D_loss_no_reg"], 1e-4, "discriminator's loss")
    assert_close(penalty, out["r1_penalty"], 1e-4, "R1")
    loss = (discriminator_loss(scores_real, scores_fake) + 5 * penalty[:, None]).mean()
    assert_close(loss.reshape(out["D_loss_total_mean"].shape), out["D_loss_total_mean"], 1e-4, "discriminator with R1")
    loss.backward()
    gradients = checkpoints.DISCRIMINATOR.from_ours({"lod": d.lod, **{k: p.grad for k, p in d.named_parameters()}})
    for name in (k for k in out if k.startswith("grad_D/")):
        assert_close(gradients[name.removeprefix("grad_D/")], out[name], 1e-4, name)


def assert_matches(got: Tensor, want: Tensor) -> bool:
    try:
        assert_close(got, want, 1e-4)
    except AssertionError:
        return False
    return True


@golden.check(lambda c: tf(c) and "in/blur_in" in c)
def tf_ops(case: GoldenCase) -> None:
    x, out = case.inputs["blur_in"], case.outputs
    assert_close(model.blur(x), out["op/blur"], 1e-5, "blur")
    assert_close(model.enlarge(x), out["op/up"], 0.0, "doubling")
    assert_close(model.shrink(x), out["op/down"], 1e-5, "halving")
    assert_close(pixel_norm(x), out["op/pixel_norm"], 1e-5, "pixel norm")
    assert_close(minibatch_stddev(x, 2), out["op/mbstd"], 1e-5, "minibatch standard deviation")
    layer = model.Layer(x.shape[1], x.shape[1], 4, 8, conv=False).eval()
    with torch.no_grad():  # noise, bias and style neutral, activation undone: its instance norm
        layer.style.weight.zero_()
        undone = torch.where(x < 0, x / 0.2, x)
        assert_close(layer(undone, torch.zeros(len(x), 4), None), out["op/instance_norm"], 1e-5, "instance norm")


# -- golden: rosinality's port ---------------------------------------------------------------------------------------


def ported(case: GoldenCase) -> bool:
    return "rosinality/style-based-gan-pytorch" in case.source


def port_networks(case: GoldenCase) -> tuple[port.Generator, port.Discriminator]:
    size = 4 << case.config["step"]
    g = restore(checkpoints.PORT, port.Generator, part(case, "G."), size=size)
    activated = case.config["from_rgb_activate"]
    which = checkpoints.PORT_DISCRIMINATOR if activated else checkpoints.PORT_DISCRIMINATOR_PLAIN
    d = restore(which, port.Discriminator, part(case, "D."), size=size)
    assert d.from_rgb_activate == activated
    return g, d


def port_noise(case: GoldenCase) -> list[Tensor]:
    return [case.inputs[f"noise_{i}"] for i in range(case.config["step"] + 1)]


@golden.check(ported)
@torch.no_grad()
def port_images(case: GoldenCase) -> None:
    (g, _), out, noise = port_networks(case), case.outputs, port_noise(case)
    w, w2 = g.map(case.inputs["z"]), g.map(case.inputs["z2"])
    assert_close(w, out["w"], 1e-5, "w")
    ws = g.styles(w)
    assert_close(g.synthesis(ws, noise, 0.0), out["img"], 1e-4, "image")
    assert_close(g.synthesis(ws, noise, 1 - case.config["alpha"]), out["img_alpha"], 1e-4, "fading in")
    assert_close(g.synthesis(ws, noise, 1.0)[:, :, ::2, ::2], out["img_low"], 1e-4, "the level before")
    mean = g.map(case.inputs["z_mean"]).mean(0)
    assert_close(mean[None], out["mean_style"], 1e-5, "mean style")
    mixed = ws.clone()
    mixed[:, 0:2] = g.styles(w2)[:, 0:2]
    assert_close(g.synthesis(mixed, noise, 0.0), out["img_mix"], 1e-4, "mixed")
    g.w_avg.copy_(mean)
    assert_close(g.synthesis(g.styles(w, 0.7), noise, 0.0), out["img_trunc"], 1e-4, "truncated")


@golden.check(ported)
def port_losses(case: GoldenCase) -> None:
    (_, d), out = port_networks(case), case.outputs
    real, fake = case.inputs["real"], out["img"]
    scores_fake = d(fake)
    scores_real, penalty = r1_penalty(d, real)
    for got, name in (
        (scores_fake, "scores_fake"), (scores_real, "scores_real"),
        (d(real, None, 1 - case.config["alpha"]), "scores_real_alpha"),
        (generator_loss(scores_fake).mean(), "loss_G"), (F.softplus(scores_fake).mean(), "loss_D_fake"),
        (F.softplus(-scores_real).mean(), "loss_D_real"), (5 * penalty.mean(), "loss_r1"),
        (10 * gradient_penalty(d, real, fake, case.inputs["gp_eps"]).mean(), "loss_wgan_gp"),
    ):  # fmt: skip
        assert_close(got, out[name], 1e-4, name)
    x = real.clone().requires_grad_(True)
    assert_close(torch.autograd.grad(d(x).sum(), x)[0], out["r1_grads"], 1e-4, "gradient at real images")


# -- golden: StyleGAN2-ADA -------------------------------------------------------------------------------------------


def ada(case: GoldenCase) -> bool:
    return "NVlabs/stylegan2-ada-pytorch" in case.source


def sg2_generator(case: GoldenCase) -> stylegan2.Generator:
    c = dict(case.config["G"])
    mapping, synthesis = c.get("mapping_kwargs", {}), c.get("synthesis_kwargs", {})
    state = part(case, "G.")
    read = checkpoints.GENERATOR2.config_from(state)
    stated(
        {"size": c["img_resolution"], "in_channels": c["img_channels"], "num_classes": c["c_dim"],
         "latent_size": c["z_dim"], "w_dim": c["w_dim"], "mapping_layers": mapping.get("num_layers", 8),
         "architecture": synthesis.get("architecture", "skip"), "use_noise": synthesis.get("use_noise", True)},
        read,
    )  # fmt: skip
    return restore(
        checkpoints.GENERATOR2, stylegan2.Generator, state,
        clamp=synthesis.get("conv_clamp"), activation=synthesis.get("activation", "lrelu"),
        mapping_activation=mapping.get("activation", "lrelu"), lr_multiplier=mapping.get("lr_multiplier", 0.01),
    )  # fmt: skip


def sg2_discriminator(case: GoldenCase) -> stylegan2.Discriminator:
    c = case.config["D"]
    block, mapping, end = (c.get(k, {}) for k in ("block_kwargs", "mapping_kwargs", "epilogue_kwargs"))
    return restore(
        checkpoints.DISCRIMINATOR2, stylegan2.Discriminator, part(case, "D."), clamp=c.get("conv_clamp"),
        activation=block.get("activation", "lrelu"), mapping_activation=mapping.get("activation", "lrelu"),
        lr_multiplier=mapping.get("lr_multiplier", 0.01), group_size=end.get("mbstd_group_size", 4),
    )  # fmt: skip


@golden.check(lambda c: ada(c) and "in/z" in c and "out/img_const" in c)
@torch.no_grad()
def sg2_images(case: GoldenCase) -> None:
    g, out, y = sg2_generator(case), case.outputs, case.inputs.get("c")
    w, noise = g.map(case.inputs["z"], y), g.fixed_noise()
    assert_close(w, out["ws"], 1e-5, "w")
    for name in (k for k in out if k.startswith("ws_psi")):
        m = re.fullmatch(r"ws_psi([\d.]+)(?:_cut(\d+))?", name)
        assert m
        got = g.styles(w, float(m[1]), int(m[2]) if m[2] else None)
        assert_close(got if out[name].ndim == 3 else got[:, 0], out[name], 1e-5, name)
    for name in ("img_const", "img_const_unfused"):
        assert_close(g.synthesis(g.styles(w), noise), out[name], 1e-4, name)
    assert_close(g.synthesis(g.styles(w), None), out["img_none"], 1e-4, "without noise")
    assert_close(g.synthesis(case.inputs["ws"], noise), out["img_from_ws"], 1e-4, "from given styles")
    cutoff, second = case.config["_mix_cutoff"], g.styles(g.map(case.inputs["z2"], y))
    mixed = torch.cat([g.styles(w)[:, :cutoff], second[:, cutoff:]], dim=1)
    assert_close(g.synthesis(mixed, noise), out["img_mixed"], 1e-4, "mixed")
    if "w_avg_after_train_step" in out:
        objective = StyleGANObjective(g, nn.Identity())
        objective.seen = {"generator": [w.mean(0)]}
        objective.after_step(Step(0))
        assert_close(g.w_avg, out["w_avg_after_train_step"], 1e-5, "mean of w")


@golden.check(lambda c: ada(c) and "in/real" in c and "out/logits_real" in c)
def sg2_scores(case: GoldenCase) -> None:
    d, out, y = sg2_discriminator(case), case.outputs, case.inputs.get("c")
    fake = d(case.inputs["fake"], y)
    real, penalty = r1_penalty(lambda x: d(x, y), case.inputs["real"])
    loss = penalty.mean() * (case.config["_r1_gamma"] / 2)
    for got, name in (
        (fake, "logits_fake"), (real, "logits_real"), (penalty, "r1_penalty"), (loss, "loss_Dr1"),
        (generator_loss(fake).mean(), "loss_Gmain"), (F.softplus(fake).mean(), "loss_Dgen"),
        (F.softplus(-real).mean(), "loss_Dreal"),
    ):  # fmt: skip
        assert_close(got, out[name], 1e-4, name)
    assert_close(discriminator_loss(real, fake).mean(), out["loss_Dgen"] + out["loss_Dreal"], 1e-4, "both")
    x = case.inputs["real"].clone().requires_grad_(True)
    assert_close(torch.autograd.grad(d(x, y).sum(), x)[0], out["r1_grads"], 1e-4, "gradient at real images")
    loss.backward()
    parameters = dict(d.named_parameters())
    watched = [k for k in out if k.startswith("grad_r1/")]
    for name in watched:
        assert_close(parameters[name.removeprefix("grad_r1/")].grad, out[name], 1e-4, name)
    assert watched
    if "mbstd_in" in case.inputs:
        end = d.get_submodule("b4")
        assert_close(minibatch_stddev(case.inputs["mbstd_in"], end.group_size, end.features), out["mbstd"], 1e-5, "mbstd")


@golden.check(lambda c: ada(c) and "in/pl_mean" in c)
def sg2_path_length(case: GoldenCase) -> None:
    g, out = sg2_generator(case), case.outputs
    ws = case.inputs["ws"].clone().requires_grad_(True)
    images = g.synthesis(ws, g.fixed_noise())
    lengths = path_lengths(images, ws, case.inputs["pl_noise_unit"])
    penalty, mean = path_penalty(lengths, case.inputs["pl_mean"], case.config["_pl_decay"])
    loss = penalty.mean() * case.config["_pl_weight"]
    for got, name in ((lengths, "pl_lengths"), (mean, "pl_mean_new"), (penalty, "pl_penalty"), (loss, "loss_Gpl")):
        assert_close(got, out[name], 1e-4, name)
    h, w = images.shape[2:]
    y = case.inputs["pl_noise_unit"] / math.sqrt(h * w)
    assert_close(torch.autograd.grad((images * y).sum(), ws, retain_graph=True)[0], out["pl_grads"], 1e-4, "J^T y")
    loss.backward()
    state = {k: torch.zeros(()) for k in ("w_avg", "resample_filter")}
    gradients = checkpoints.stylegan2_from_ours({**state, **{k: p.grad for k, p in g.named_parameters() if p.grad is not None}})
    watched = [k for k in out if k.startswith("grad/")]
    for name in watched:
        assert_close(gradients[name.removeprefix("grad/")], out[name], 1e-4, name)
    assert watched


@golden.check(lambda c: ada(c) and "out/filter_1331" in c)
def sg2_ops(case: GoldenCase) -> None:
    i, out = case.inputs, case.outputs
    x, w, w1 = i["x"], i["w"], i["w1"]
    f, pipe = stylegan2.setup_filter((1, 3, 3, 1)), AugmentPipe("geom")
    sym6 = pipe.lowpass
    assert_close(f, out["filter_1331"], 1e-6, "filter")
    assert_close(sym6, out["filter_sym6"], 1e-6, "sym6")
    n = len(sym6)
    turned = f.flip(0, 1)
    checks = {
        "bias_act_linear": bias_act(x, i["b"]), "bias_act_relu": bias_act(x, i["b"], "relu"),
        "bias_act_lrelu": bias_act(x, i["b"], "lrelu"), "bias_act_swish": bias_act(x, i["b"], "swish"),
        "bias_act_clamp": bias_act(x, i["b"], "lrelu", 2.0, 0.8),
        "upsample2d": stylegan2.upsample(x, f), "downsample2d": stylegan2.downsample(x, f),
        "upsample_sym6": stylegan2.upsample(x, sym6),
        "downsample_sym6": upfirdn2d(x, sym6.flip(0), down=2, pad=((n - 1) // 2 - 2, (n - 2) // 2 - 2)),
        "filter2d": upfirdn2d(x, f, pad=(2, 1)),
        "upfirdn_asym": upfirdn2d(x, turned * 1.7, up=2, down=3, pad=(2, -1, 0, 3)),
        "conv_up": stylegan2.conv(x, w, f, up=True), "conv_down": stylegan2.conv(x, w, f, down=True),
        "conv_skip_up": stylegan2.conv(x, w1, f, up=True), "conv_skip_down": stylegan2.conv(x, w1, f, down=True),
        "modconv_up": stylegan2.modulated_conv(x, w, i["styles"], f=f, up=True),
        **{f"modconv_demod{d}_fused{k}": stylegan2.modulated_conv(x, w, i["styles"], i["noise"], bool(d))
           for d in (0, 1) for k in (0, 1)},
    }  # fmt: skip
    for name, got in checks.items():
        if name in out:
            assert_close(got, out[name], 1e-5, name)
    assert set(out) - {"filter_1331", "filter_sym6"} <= set(checks)


# values of each kind's draws: is a draw mapped through the normal quantile?
NORMAL = {"scale", "aniso", "xfrac", "brightness", "contrast", "saturation", "imgfilter"}


def quantile_draws(pipe: AugmentPipe, q: float, n: int) -> Tensor:
    """Uniform draws that make every augmentation fire at what the official code calls the quantile q: of normal draws
    it takes erfinv(2q - 1), without the factor sqrt(2); the second rotation is left out."""
    as_normal = 0.5 * (1 + math.erf(float(torch.erfinv(torch.tensor(2 * q - 1))) / math.sqrt(2)))
    columns: list[float] = []
    for kind in pipe.kinds:
        value = as_normal if kind in NORMAL else q
        gates = {"rotate": 2, "imgfilter": 4}.get(kind, 1)
        values = [value] * (DRAWS[kind] - gates)
        columns += [0.0] * gates + ([q, 0.5] if kind == "rotate" else values)
    return torch.tensor(columns, dtype=torch.float64).expand(n, -1).float()


@golden.check(lambda c: ada(c) and "in/img" in c and "pipes" in c.config)
@torch.no_grad()
def sg2_augment(case: GoldenCase) -> None:
    x, out = case.inputs["img"], case.outputs
    assert_close(AugmentPipe("geom").lowpass, out["Hz_geom"], 1e-6, "low-pass filter")
    assert_close(filter_bank(), out["Hz_fbank"], 1e-6, "filter bank")
    ranges = set(AugmentPipe.__init__.__code__.co_varnames)
    for name, options in case.config["pipes"].items():
        strengths = {k: v for k, v in options.items() if k in DRAWS}
        pipe = AugmentPipe((), strengths, **{k: v for k, v in options.items() if k not in DRAWS and k in ranges})
        for q in case.config["_percentiles"]:
            got = pipe(x, case.config["_p"], quantile_draws(pipe, q, len(x)))
            assert_close(got, out[f"{name}_{q}"], 1e-4, f"{name} at {q}")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)
