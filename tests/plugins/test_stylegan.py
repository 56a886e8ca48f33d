"""StyleGAN against NVlabs/stylegan@1e0d5c7, NVlabs/stylegan2-ada-pytorch@d72cc7d and rosinality's port@07fa60b (golden
cases), published sizes, training phases, truncation, style mixing, path lengths, foreign pickles."""

from __future__ import annotations

import math
import pickle
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
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
from vgm_cli.convert_api import Layout, unwrap
from vgm_cli.engine.train.ema import EMA
from vgm_cli.errors import VgmError
from vgm_cli.nn.fir import upfirdn2d
from vgm_cli.recipe import load
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("stylegan")


def part(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in case.state.items() if k.startswith(prefix)}


def restore(converter: Layout, cls: Any, state: dict[str, Tensor], **known: Any) -> Any:
    """A network through the shipped converter, whose layout survives the round trip. known: what no tensor tells."""
    assert converter.recognise(state)
    network = cls(**{**converter.config(state), **known})
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
    tf_widths(case, {f"G/G_synthesis/{s}x{s}/{'Conv' if s == 4 else 'Conv1'}/bias": s for s in tf_sides(case)})
    stated(
        {"size": c["resolution"], "in_channels": c["num_channels"], "num_classes": c["label_size"],
         "latent_size": g.get("latent_size"), "w_dim": g.get("dlatent_size"), "mapping_layers": g.get("mapping_layers"),
         "mapping_width": g.get("mapping_fmaps"), "fmap_max": c.get("fmap_max")},
        checkpoints.GENERATOR.config(state),
    )  # fmt: skip
    options = {"lr_multiplier": g.get("mapping_lrmul", 0.01), "blur_filter": blur_filter(case, "G")}
    return restore(checkpoints.GENERATOR, model.Generator, state, **options)


def blur_filter(case: GoldenCase, network: str) -> list[float]:
    return case.config[network].get("blur_filter", case.config["common"].get("blur_filter", [1, 2, 1]))


def tf_sides(case: GoldenCase) -> list[int]:
    return [4 << i for i in range(int(math.log2(case.config["common"]["resolution"])) - 1)]


def tf_widths(case: GoldenCase, biases: dict[str, int]) -> None:
    """The layers are as wide as fmap_base, fmap_decay and fmap_max say."""
    c = case.config["common"]
    base, decay, limit = c.get("fmap_base", 8192), c.get("fmap_decay", 1.0), c.get("fmap_max", 512)
    for key, side in biases.items():
        assert len(case.state[key]) == min(int(base / 2 ** ((math.log2(side) - 1) * decay)), limit), key


def tf_discriminator(case: GoldenCase) -> model.Discriminator:
    tf_widths(case, {f"D/{s}x{s}/{'Conv' if s == 4 else 'Conv0'}/bias": s for s in tf_sides(case)})
    options = {"group_size": case.config["D"].get("mbstd_group_size", 4), "blur_filter": blur_filter(case, "D")}
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
    assert {float(k.removeprefix("img_lod")) for k in out if k.startswith("img_lod")} == set(case.config["lods"])
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
    gamma = case.config["D"].get("r1_gamma", 10.0)
    loss = (discriminator_loss(scores_real, scores_fake) + gamma / 2 * penalty[:, None]).mean()
    assert_close(loss.reshape(out["D_loss_total_mean"].shape), out["D_loss_total_mean"], 1e-4, "discriminator with R1")
    loss.backward()
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in d.named_parameters()}
    gradients = checkpoints.DISCRIMINATOR.from_ours({"lod": d.lod, **grads})
    assert {f"grad_D/{k}" for k in case.config["watch_D"]} == {k for k in out if k.startswith("grad_D/")}
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
    assert_close(model.blur(x, blur_filter(case, "G")), out["op/blur"], 1e-5, "blur")
    assert_close(model.enlarge(x), out["op/up"], 0.0, "doubling")
    assert_close(model.shrink(x), out["op/down"], 1e-5, "halving")
    assert_close(pixel_norm(x), out["op/pixel_norm"], 1e-5, "pixel norm")
    assert_close(
        minibatch_stddev(x, case.config["D"].get("mbstd_group_size", 4)),
        out["op/mbstd"],
        1e-5,
        "minibatch standard deviation",
    )
    layer = model.Layer(x.shape[1], x.shape[1], 8, 4, conv=False).eval()
    with torch.no_grad():  # noise, bias and style neutral, activation undone: the instance norm is left
        layer.style.weight.zero_()
        undone = torch.where(x < 0, x / 0.2, x)
        assert_close(layer(undone, torch.zeros(len(x), 4), None), out["op/instance_norm"], 1e-5, "instance norm")


# -- golden: rosinality's port ---------------------------------------------------------------------------------------


def ported(case: GoldenCase) -> bool:
    return "rosinality/style-based-gan-pytorch" in case.source


def port_networks(case: GoldenCase) -> tuple[port.Generator, port.Discriminator]:
    size = 4 << case.config["step"]
    g = restore(checkpoints.PORT, port.Generator, part(case, "G."), size=size)
    width, read = case.config["_width"], checkpoints.PORT.config(part(case, "G."))
    assert read["w_dim"] == width and read["mapping_layers"] == case.config["n_mlp"]
    assert read["widths"] == [max(c * width // 512, 2) for c in port.WIDTHS]
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
    read = checkpoints.GENERATOR2.config(state)
    stated(
        {"size": c["img_resolution"], "in_channels": c["img_channels"], "num_classes": c["c_dim"],
         "latent_size": c["z_dim"], "w_dim": c["w_dim"], "mapping_layers": mapping.get("num_layers", 8),
         "mapping_width": mapping.get("layer_features"), "embed": mapping.get("embed_features"),
         "architecture": synthesis.get("architecture", "skip"), "use_noise": synthesis.get("use_noise", True)},
        read,
    )  # fmt: skip
    sg2_widths(case.config["G"]["synthesis_kwargs"], {s: state[f"synthesis.b{s}.conv1.bias"] for s in sg2_sides(c)})
    own = stylegan2.setup_filter(synthesis.get("resample_filter", [1, 3, 3, 1]))
    assert_close(checkpoints.resampling(state), own, 1e-6, "filter")
    case.ignore("G.mapping_kwargs.w_avg_beta", why="only the mean of w moves by it: see sg2_images")
    case.ignore("G.synthesis_kwargs.num_fp16_res", "G.synthesis_kwargs.fp16_channels_last", why="all is fp32 on a CPU")
    return restore(
        checkpoints.GENERATOR2, stylegan2.Generator, state,
        clamp=synthesis.get("conv_clamp"), activation=synthesis.get("activation", "lrelu"),
        mapping_activation=mapping.get("activation", "lrelu"), lr_multiplier=mapping.get("lr_multiplier", 0.01),
    )  # fmt: skip


def sg2_sides(config: Any) -> list[int]:
    return [4 << i for i in range(int(math.log2(config["img_resolution"])) - 1)]


def sg2_widths(config: Any, biases: dict[int, Tensor]) -> None:
    for side, bias in biases.items():
        assert len(bias) == min(config.get("channel_base", 32768) // side, config.get("channel_max", 512)), side


def sg2_discriminator(case: GoldenCase) -> stylegan2.Discriminator:
    c = case.config["D"]
    block, mapping, end = (c.get(k, {}) for k in ("block_kwargs", "mapping_kwargs", "epilogue_kwargs"))
    state = part(case, "D.")
    stated(
        {"size": c["img_resolution"], "in_channels": c["img_channels"], "num_classes": c["c_dim"],
         "architecture": c.get("architecture", "resnet"), "cmap_dim": c.get("cmap_dim"),
         "mapping_width": mapping.get("layer_features"), "embed": mapping.get("embed_features"),
         "mapping_layers": mapping.get("num_layers", 8) if c["c_dim"] else None,
         "group_features": end.get("mbstd_num_channels", 1)},
        checkpoints.DISCRIMINATOR2.config(state),
    )  # fmt: skip
    sg2_widths(c, {s: state[f"b{s}.conv.bias" if s == 4 else f"b{s}.conv0.bias"] for s in sg2_sides(c)})
    own = stylegan2.setup_filter(block.get("resample_filter", [1, 3, 3, 1]))
    assert_close(checkpoints.resampling(state), own, 1e-6, "filter")
    if not c["c_dim"]:
        case.ignore("D.mapping_kwargs", "D.cmap_dim", why="there is no label to map")
    case.ignore("D.num_fp16_res", "D.block_kwargs.fp16_channels_last", why="all is fp32 on a CPU")
    case.ignore("D.block_kwargs.freeze_layers", why="evaluated, with every gradient")
    return restore(
        checkpoints.DISCRIMINATOR2, stylegan2.Discriminator, state, clamp=c.get("conv_clamp"),
        activation=block.get("activation", "lrelu"), mapping_activation=mapping.get("activation", "lrelu"),
        lr_multiplier=mapping.get("lr_multiplier", 0.01), group_size=end.get("mbstd_group_size", 4),
    )  # fmt: skip


@golden.check(lambda c: ada(c) and "in/z" in c and "out/img_const" in c)
@torch.no_grad()
def sg2_images(case: GoldenCase) -> None:
    g, out, y = sg2_generator(case), case.outputs, case.inputs.get("c")
    w, noise = g.map(case.inputs["z"], y), g.fixed_noise()
    free = sg2_generator(case)
    free.clamp = None
    if torch.equal(free.synthesis(g.styles(w), noise), g.synthesis(g.styles(w), noise)):
        case.ignore("G.synthesis_kwargs.conv_clamp", why="no value is so large")
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
        beta = case.config["G"].get("mapping_kwargs", {}).get("w_avg_beta", 0.995)
        objective = StyleGANObjective(g, nn.Identity(), w_decay=beta)
        objective.seen = {"generator": [w.mean(0)]}
        objective.after_step(Step(0))
        assert_close(g.w_avg, out["w_avg_after_train_step"], 1e-5, "mean of w")


@golden.check(lambda c: ada(c) and "in/real" in c and "out/logits_real" in c)
def sg2_scores(case: GoldenCase) -> None:
    d, out, y = sg2_discriminator(case), case.outputs, case.inputs.get("c")
    fake = d(case.inputs["fake"], y)
    free = sg2_discriminator(case)
    free.clamp = None
    if torch.equal(free(case.inputs["fake"], y), fake):
        case.ignore("D.conv_clamp", why="no value is so large")
    group = case.config["D"].get("epilogue_kwargs", {}).get("mbstd_group_size", 4)
    if all(len(case.inputs[k]) <= group for k in ("fake", "real", "mbstd_in") if k in case.inputs):
        case.ignore("D.epilogue_kwargs.mbstd_group_size", why="a group is the whole batch")
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
    assert set(watched) == {f"grad_r1/{k}" for k in case.config["_watch"]}
    for name in watched:
        assert_close(parameters[name.removeprefix("grad_r1/")].grad, out[name], 1e-4, name)
    assert watched
    if "mbstd_in" in case.inputs:
        end = d.get_submodule("b4")
        assert_close(
            minibatch_stddev(case.inputs["mbstd_in"], end.group_size, end.features), out["mbstd"], 1e-5, "mbstd"
        )


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
    gradients = checkpoints.stylegan2_from_ours(
        {**state, **{k: p.grad for k, p in g.named_parameters() if p.grad is not None}}
    )
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
    case.ignore("_p", why="draws at a quantile fire whatever the probability is")
    ranges = set(AugmentPipe.__init__.__code__.co_varnames)
    for name, options in case.config["pipes"].items():
        strengths = {k: v for k, v in options.items() if k in DRAWS}
        pipe = AugmentPipe((), strengths, **{k: v for k, v in options.items() if k not in DRAWS and k in ranges})
        for q in case.config["_percentiles"]:
            got = pipe(x, case.config["_p"], quantile_draws(pipe, q, len(x)))
            assert_close(got, out[f"{name}_{q}"], 1e-4, f"{name} at {q}")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- published sizes -------------------------------------------------------------------------------------------------

# NVlabs/stylegan (README and print-outs), NVlabs/stylegan2-ada-pytorch (print-outs of its configurations)
COUNTS = {
    ("stylegan", "ffhq1024"): 26_219_627, ("stylegan", "ffhq512"): 26_179_768, ("stylegan", "ffhq256"): 26_086_229,
    ("stylegan-discriminator", "ffhq1024"): 23_087_249, ("stylegan-discriminator", "ffhq512"): 23_080_225,
    ("stylegan-discriminator", "ffhq256"): 23_052_353,
    ("stylegan2", "stylegan2"): 30_370_060, ("stylegan2", "paper1024"): 30_370_060,
    ("stylegan2", "paper512"): 30_276_583, ("stylegan2", "paper256"): 24_767_458, ("stylegan2", "cifar"): 19_947_539,
    ("stylegan2-discriminator", "stylegan2"): 29_012_513, ("stylegan2-discriminator", "paper512"): 28_982_849,
    ("stylegan2-discriminator", "paper256"): 24_001_089, ("stylegan2-discriminator", "cifar"): 20_720_641,
}  # fmt: skip


def count(kind: str, node: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in registry().build("model", {"name": kind, **node}).parameters())


@pytest.mark.parametrize(("name", "preset"), COUNTS, ids=str)
def test_published_parameter_counts(name: str, preset: str) -> None:
    assert count(name, {"preset": preset}) == COUNTS[name, preset]


def test_other_published_counts() -> None:
    assert count("stylegan2", {"preset": "cifar", "num_classes": 10}) == 20_215_315
    assert count("stylegan2-discriminator", {"preset": "cifar", "num_classes": 10}) == 23_089_664
    assert count("stylegan", {"size": 128}) == 25_843_858 and count("stylegan", {"size": 32}) == 22_841_356
    assert count("stylegan-rosinality", {}) == 26_219_115
    assert count("stylegan-rosinality-discriminator", {}) == 25_444_737
    assert {*presets.GENERATOR2} == {*presets.DISCRIMINATOR2}


# -- networks --------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"latent_size": 8, "w_dim": 8, "mapping_layers": 2}
FIRST: dict[str, Any] = {"size": 28, "in_channels": 1, "fmap_base": 32, "fmap_max": 16}
SECOND: dict[str, Any] = {"size": 28, "in_channels": 1, "channel_base": 64, "channel_max": 16}


def generator(kind: int = 1, **kwargs: Any) -> StyleGenerator:
    torch.manual_seed(0)
    if kind == 1:
        g: StyleGenerator = model.Generator(**{**TINY, "mapping_width": 8, **FIRST, **kwargs})
    else:
        g = stylegan2.Generator(**{**TINY, **SECOND, **kwargs})
    suites.randomise(g, scale=0.2)
    return g.eval()


def discriminator(kind: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    d = model.Discriminator(**{**FIRST, **kwargs}) if kind == 1 else stylegan2.Discriminator(**{**SECOND, **kwargs})
    suites.randomise(d, scale=0.2)
    return d.eval()


def test_sides() -> None:
    assert sides(1024) == [4 << i for i in range(9)]
    assert sides(28) == [7, 14, 28] and sides(48) == [6, 12, 24, 48] and sides(32, 8) == [8, 16, 32]
    for size, base in ((30, 4), (17, None), (26, None)):
        with pytest.raises(VgmError, match="doubling"):
            sides(size, base)


def test_fused_convolutions_are_the_separate_ones() -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 6, 6, generator=g), torch.randn(4, 3, 3, 3, generator=g)
    assert_close(model.enlarge_conv(x, w), F.conv2d(model.enlarge(x), w, padding=1), 1e-5)
    assert_close(model.conv_shrink(x, w), model.shrink(F.conv2d(x, w, padding=1)), 1e-5)


def test_styles_on_activations_are_grouped_convolutions() -> None:
    """Against the formula: one weight per image, modulated and normalised."""
    g = torch.Generator().manual_seed(0)
    x, w, s = torch.randn(3, 4, 5, 5, generator=g), torch.randn(6, 4, 3, 3, generator=g), torch.randn(3, 4, generator=g)
    own = w * s[:, None, :, None, None]
    own = own / (own.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    want = F.conv2d(x.reshape(1, 12, 5, 5), own.reshape(18, 4, 3, 3), padding=1, groups=3).view(3, 6, 5, 5)
    assert_close(stylegan2.modulated_conv(x, w, s), want, 1e-5)
    assert_close(stylegan2.modulated_conv(x[:1], w, s[:1], gain=2.0), 2 * want[:1], 1e-5, "a single image")
    noise = torch.randn(3, 1, 5, 5, generator=g)
    for n in (1, 3):
        got = stylegan2.modulated_conv(x[:n], w, s[:n], noise[:n], demodulate=False, gain=0.5)
        plain = torch.stack([F.conv2d(x[i], w * s[i, :, None, None], padding=1) for i in range(n)]) + noise[:n]
        assert_close(got, 0.5 * plain, 1e-5, "without demodulation")


@torch.no_grad()
def test_growing_is_continuous_and_ends_at_the_whole_network() -> None:
    g, d = generator(), discriminator(group_size=1)
    ws = g.styles(g.map(torch.randn(2, 8, generator=torch.Generator().manual_seed(0))))
    images = [g.synthesis(ws, g.fixed_noise(), lod) for lod in (0.0, 1e-6, 1 - 1e-6, 1.0, 2.0, 9.0)]
    assert_close(images[1], images[0], 1e-4)
    assert_close(images[2], images[3], 1e-4)
    assert torch.equal(images[4], images[5]) and images[3].shape == (2, 1, 28, 28)
    low = images[3]
    assert torch.equal(low[:, :, ::2, ::2], low[:, :, 1::2, 1::2]), "a lower level is shown in larger pixels"
    for a, b in ((0.0, 1e-6), (1 - 1e-6, 1.0)):
        assert_close(d(low, None, a), d(low, None, b), 1e-4)
    torch.testing.assert_close(d(images[0], None, 1.0), d(fade_reals(images[0], 1.0), None, 1.0))
    x = images[0]
    assert_close(fade_reals(x, 0.5), torch.lerp(x, fade_reals(x, 1.0), 0.5), 1e-6)
    g.lod.fill_(1.0)
    assert torch.equal(g.synthesis(ws, g.fixed_noise()), low), "weights carry the level that they were trained to"


def test_schedule_of_growing() -> None:
    lods = [level_of_detail(k * 1000, 7, 600, 600) for k in (0, 600, 900, 1200, 1500, 8400, 25000)]
    assert lods == [7, 7, 6.5, 6, 6, 0, 0]


@pytest.mark.parametrize("kind", [1, 2])
@torch.no_grad()
def test_conditions_noise_and_truncation_reach_the_image(kind: int) -> None:
    g = generator(kind, num_classes=3)
    z = torch.randn(3, g.latent_size, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2])
    noise = g.random_noise([1, 2, 3], torch.device("cpu"))
    image = g(z, y, noise)
    assert not torch.allclose(image, g(z, y.flip(0), noise)) and not torch.allclose(image, g(z, y, None))
    assert torch.equal(
        g(z[1:2], y[1:2], g.random_noise([2], torch.device("cpu"))), g(z, y, noise)[1:2]
    ) or torch.allclose(g(z[1:2], y[1:2], g.random_noise([2], torch.device("cpu"))), image[1:2], atol=1e-4)
    g.w_avg.copy_(torch.linspace(-1, 1, g.w_dim))
    assert torch.equal(g.styles(g.map(z, y), 0.0)[0], g.w_avg.expand(g.num_layers, -1))
    partly = g.styles(g.map(z, y), 0.0, 2)
    assert torch.equal(partly[:, 2:], g.styles(g.map(z, y))[:, 2:]) and torch.equal(partly[0, 1], g.w_avg)
    with pytest.raises(VgmError, match="labels"):
        g(z)


def test_minibatch_statistics_group_across_the_batch() -> None:
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    got = minibatch_stddev(x, 4)[:, 4, 0, 0]
    want = (x[0::2].var(0, correction=0) + 1e-8).sqrt().mean()
    torch.testing.assert_close(got[0::2], want.expand(4))
    assert not torch.isclose(got[0], got[1])
    assert minibatch_stddev(x[:7], 4).shape == (7, 5, 3, 3), "a batch that does not divide"
    assert minibatch_stddev(x, None, 2).shape == (8, 6, 3, 3)


@pytest.mark.parametrize("kind", [1, 2])
@torch.no_grad()
def test_paths(kind: int) -> None:
    """Pairs have one noise and move in proportion to epsilon, from an end when asked to."""
    g = generator(kind, num_classes=2)
    for space in ("z", "w"):
        for sampling in ("full", "end"):
            a, b = g.path_samples(generators([1, 2]), 0.0, space, sampling)
            assert torch.equal(a, b) and a.shape == (2, 1, 28, 28)
            steps = [g.path_samples(generators([1, 2]), e, space, sampling) for e in (1e-2, 2e-2)]
            near, far = ((y - x).norm() for x, y in steps)
            assert 1.6 < far / near < 2.4, (space, sampling)
    alone, _ = g.path_samples(generators([2]), 1e-4, "w", "full")
    both, _ = g.path_samples(generators([1, 2]), 1e-4, "w", "full")
    assert_close(alone[0], both[1], 1e-4)


# -- augmentation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_geometric_augmentations_go_where_they_say() -> None:
    """Shifts by whole pixels are exact; the filter is not quite symmetric, so flips and quarter turns nearly are."""
    nearly = 0.06
    x = F.avg_pool2d(torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), 3, 1, 1)
    moved = AugmentPipe(["xint"])(x, 1.0, torch.tensor([[0.0, 1.0, 0.5], [0.9999, 0.5, 0.5]]))
    assert_close(moved[0, :, :, 4:], x[0, :, :, :-4], 1e-5)
    assert_close(moved[1], x[1], 1e-5)
    flip = AugmentPipe(["xflip"])
    assert_close(flip(x, 1.0, torch.tensor([[0.0, 0.9], [0.0, 0.1]])), torch.stack([x[0].flip(2), x[1]]), nearly)
    turn = AugmentPipe(["rotate90"])
    got = turn(x, 1.0, torch.tensor([[0.0, 0.3], [0.9999, 0.6]]))
    assert_close(got, torch.stack([torch.rot90(x[0], 1, (1, 2)), torch.rot90(x[1], 2, (1, 2))]), nearly)
    assert torch.equal(AugmentPipe("bgc")(x, 0.0, torch.rand(2, AugmentPipe("bgc").draws)), x)


def test_augmentation_fires_with_its_probability_and_passes_gradients() -> None:
    x = torch.rand(400, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    pipe = AugmentPipe(["brightness"])
    u = torch.rand(400, pipe.draws, generator=torch.Generator().manual_seed(1))
    moved = (pipe(x, 0.3, u) - x).abs().amax((1, 2, 3)) > 1e-6
    assert 0.2 < moved.float().mean() < 0.4
    everything = AugmentPipe(PIPES["bgc"] + ("noise", "cutout"))
    image = torch.rand(4, 3, 28, 28, requires_grad=True)
    u = torch.rand(4, everything.draws, generator=torch.Generator().manual_seed(2))
    out = everything(image, 0.8, u, torch.randn(4, 3, 28, 28))
    (gradient,) = torch.autograd.grad(out.square().sum(), image, create_graph=True)
    gradient.square().sum().backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().sum() > 0
    assert AugmentPipe(PIPES["bgcfnc"]).draws == sum(DRAWS.values())
    with pytest.raises(VgmError, match="augmentation"):
        AugmentPipe(["mirror"])


def test_controller_follows_the_sign() -> None:
    assert next_probability(0.0, 0.9, 0.6, 256, 500) == pytest.approx(256 / 500_000)
    assert next_probability(0.2, 0.1, 0.6, 256, 500) == pytest.approx(0.2 - 256 / 500_000)
    assert next_probability(0.0, 0.1, 0.6, 256, 500) == 0.0


# -- training --------------------------------------------------------------------------------------------------------


def objective(kind: int = 1, **kwargs: Any) -> StyleGANObjective:
    return StyleGANObjective(generator(kind), discriminator(kind), **kwargs)


def batch(n: int = 8) -> dict[str, Tensor]:
    return {"x": torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1}


def test_phases() -> None:
    lazy = objective(2, r1_every=16, path_weight=2.0, path_every=4)
    assert [(p.name, p.optimizer, p.every, p.gain, p.trains) for p in lazy.phases()] == [
        ("generator", "main", 1, 1.0, ("model",)), ("path", "main", 4, 4, ("model",)),
        ("discriminator", "discriminator", 1, 1.0, ("discriminator",)),
        ("r1", "discriminator", 16, 16, ("discriminator",)),
    ]  # fmt: skip
    assert [p.name for p in objective().phases()] == ["generator", "discriminator"]
    with pytest.raises(VgmError, match="grows"):
        objective(2, grow={})


def test_r1_in_the_loss_and_as_a_phase() -> None:
    x, step = batch(), Step(3)
    together = objective(r1_gamma=4.0).loss("discriminator", x, step)[0]
    apart = objective(r1_gamma=4.0, r1_every=8)
    assert_close(apart.loss("discriminator", x, step)[0] + apart.loss("r1", x, step)[0], together, 1e-5)


def test_mixing_stays_within_the_layers_in_use() -> None:
    o = objective(mixing=1.0)
    o.batch_size = 8
    for lod, active in ((0.0, 6), (1.4, 4), (2.0, 2)):
        drawn = {o.crossover("generator", Step(i), lod) for i in range(200)}
        assert drawn == set(range(1, active)), lod
    assert {objective(mixing=0.0).crossover("generator", Step(i), 0.0) for i in range(9)} == {6}
    some = [objective(mixing=0.5).crossover("generator", Step(i), 0.0) == 6 for i in range(200)]
    assert 70 < sum(some) < 130


def test_growth_sets_rates_restarts_and_levels() -> None:
    o = objective(grow={"start": 7, "train_kimg": 0.08, "fade_kimg": 0.08, "rates": {14: 2.0}})
    o.prepare(batch(), Step(0))
    lods = [o.lod(i) for i in range(0, 60, 4)]
    assert (
        lods[0] == 2.0 and lods[-1] == 0.0 and lods == sorted(lods, reverse=True) and 1.8 in [round(v, 3) for v in lods]
    )
    assert o.schedule(Step(0)) == {"main": {"lr": 1.0}, "discriminator": {"lr": 1.0}}
    assert o.schedule(Step(59))["main"] == {"lr": 2.0}
    o.grow.start = 8
    assert o.lod(0) == 1.0, "from 14, the next side there is"
    o.grow.start = 7
    starts = [i for i in range(60) if o.restarts(Step(i))]
    assert len(starts) == 4, "two levels, each entering and in full"
    o.loss("discriminator", batch(), Step(16))
    o.after_step(Step(16))
    assert float(o.model.lod) == pytest.approx(o.lod(16)) == float(o.discriminator.lod)


def test_path_mean_and_signs_survive_a_checkpoint() -> None:
    o = objective(2, path_weight=2.0, augment={"kinds": ["xint"], "kimg": 0.1})
    for i in range(4):
        for phase in ("path", "discriminator"):
            o.loss(phase, batch(), Step(i))
        o.after_step(Step(i))
    assert o.path_mean > 0 and (o.p > 0 or o.signs.abs().sum() == 0)
    other = objective(2, path_weight=2.0, augment={"kinds": ["xint"]})
    other.load_state_dict(o.state_dict())
    assert other.p == o.p and torch.equal(other.path_mean, o.path_mean)


def test_half_life_of_the_average() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = EMA(net, {"half_life": 64}, batch_size=16)
    nn.init.ones_(net.weight)
    for _ in range(4):
        average.update()
    torch.testing.assert_close(average.state_dict()["weight"], torch.full((1, 1), 0.5))
    assert average.name == "ema-half-64"
    ramp = EMA(net, {"half_life": 500_000, "ramp": 0.05}, batch_size=64)
    assert ramp.decay() == 0.0
    ramp.updates = 1000
    assert ramp.decay() == pytest.approx(0.5 ** (64 / 3200))
    with pytest.raises(VgmError, match="half_life"):
        EMA(net, {"half_life": 10, "decay": 0.9})


SMALL = ("model.latent_size=8", "model.w_dim=8", "model.mapping_layers=2", "train.channels_last=false")
SMALL1: tuple[str, ...] = (*SMALL, "model.mapping_width=8", "model.fmap_max=8", "roles.discriminator.fmap_max=8")
SMALL2 = (*SMALL, "model.channel_max=8", "roles.discriminator.channel_max=8")


class _Levels(suites.ObjectiveSuite):
    """The first generation: a step looks at one level and the one before, so that steps go through all of them."""

    recipe = "stylegan/mnist"
    rtol = None  # statistics over the batch

    def built(self, *more: str) -> Any:
        recipe, made, facts = super().built(*more)
        made.objective.lod = lambda index: (0.0, 0.5, 1.0, 1.5, 2.0)[index % 5]
        return recipe, made, facts


class TestTraining(_Levels):
    overrides = (*SMALL1, "objective.grow=null")


class TestGrowing(_Levels):
    growth = "objective.grow={start: 7, train_kimg: 0.008, fade_kimg: 0.008, rates: {14: 2.0}}"
    overrides = (*SMALL1, growth)


class TestAdaptive(suites.ObjectiveSuite):
    recipe = "stylegan/mnist-ada"
    overrides = (*SMALL2, "objective.path_every=2", "objective.r1_every=2", "objective.augment.kimg=0.05")
    rtol = None


class TestWasserstein(_Levels):
    overrides = (*SMALL1, "objective.grow=null", "objective.loss=wgan-gp")


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted((Path(__file__).parents[2] / "recipes" / "stylegan").glob("*.yaml"))]
)
def test_recipes(name: str) -> None:
    suite = suites.RecipeSuite()
    suite.recipe = f"stylegan/{name}"
    suite.test_validates_and_builds()
    suite.test_opens_with_what_it_is()
    assert load("stylegan", name).paper == "stylegan"


# -- samplers --------------------------------------------------------------------------------------------------------


class TestSampling(suites.SamplerSuite):
    recipe = "stylegan/mnist"
    overrides = SMALL1


class TestSampling2(suites.SamplerSuite):
    recipe = "stylegan/mnist-ada"
    overrides = SMALL2
    sampler = {"name": "stylegan", "truncation_psi": 0.5, "truncation_cutoff": 3, "noise": "const"}


def request(items: Sequence[int]) -> Request:
    return Request(shape=(1, 28, 28), generators=generators(items), index=list(items))


@torch.no_grad()
def test_truncation_pulls_to_the_mean_image() -> None:
    g = generator(2)
    spread = [StyleGANSampler(psi, noise="const")(g, request(range(8))).std(0).mean() for psi in (0.0, 0.5, 1.0)]
    assert spread[0] < 1e-5 < spread[1] < spread[2]
    mean = StyleGANSampler(0.0, noise="const")(g, request([5]))
    assert_close(mean, g.synthesis(g.styles(g.w_avg[None]), g.fixed_noise()), 1e-5)


@torch.no_grad()
def test_a_table_of_mixed_styles() -> None:
    g, sampler = generator(2), StyleMixingSampler(columns=3, layers="0-1", truncation_psi=1.0)
    table = sampler(g, request(range(12)))
    assert not table[0].any()
    assert_close(sampler(g, request([6, 7])), table[6:8], 1e-4)
    rows = sampler.styles(g, request([0]), "row", [1], None)
    columns = sampler.styles(g, request([0]), "column", [2], None)
    assert_close(table[4:5], g.synthesis(rows, g.fixed_noise()), 1e-4, "left column: the row's own image")
    assert_close(table[2:3], g.synthesis(columns, g.fixed_noise()), 1e-4, "top row: the column's own image")
    mixed = torch.cat([columns[:, :2], rows[:, 2:]], dim=1)
    assert_close(table[6:7], g.synthesis(mixed, g.fixed_noise()), 1e-4, "a crossing")
    whole = StyleMixingSampler(columns=3, layers="0-99", truncation_psi=1.0)(g, request(range(12)))
    assert_close(whole[6], whole[2], 1e-4, "all layers: the column's image")
    assert layer_range("middle", 6) == [4, 5] and layer_range("1,3-4", 6) == [1, 3, 4] and layer_range("fine", 6) == []
    with pytest.raises(VgmError, match="layers"):
        layer_range("thin", 6)


# -- checkpoints -----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Layout, Any, Any]] = {
    "sg1": (
        checkpoints.GENERATOR,
        model.Generator,
        {**TINY, "mapping_width": 8, "size": 128, "fmap_base": 64, "fmap_max": 12, "num_classes": 3},
    ),
    "sg1-d": (
        checkpoints.DISCRIMINATOR,
        model.Discriminator,
        {"size": 32, "fmap_base": 64, "fmap_max": 12, "num_classes": 3},
    ),
    "sg2": (
        checkpoints.GENERATOR2,
        stylegan2.Generator,
        {**TINY, "size": 32, "channel_base": 64, "channel_max": 12, "num_classes": 3, "embed": 5},
    ),
    "sg2-resnet": (
        checkpoints.GENERATOR2,
        stylegan2.Generator,
        {**TINY, "size": 16, "channel_base": 64, "channel_max": 12, "architecture": "resnet", "use_noise": False},
    ),
    "sg2-d": (
        checkpoints.DISCRIMINATOR2,
        stylegan2.Discriminator,
        {"size": 16, "channel_base": 64, "channel_max": 12, "architecture": "skip", "num_classes": 3},
    ),
    "sg2-tf": (
        checkpoints.GENERATOR2_TF,
        stylegan2.Generator,
        {**TINY, "size": 16, "channel_base": 64, "channel_max": 12},
    ),
    "port": (
        checkpoints.PORT,
        port.Generator,
        {"w_dim": 6, "mapping_layers": 2, "widths": (6, 6, 6, 6, 4, 4, 3, 2, 2)},
    ),
    "port-d": (
        checkpoints.PORT_DISCRIMINATOR,
        port.Discriminator,
        {"widths": (6, 6, 6, 6, 4, 4, 3, 2, 2), "from_rgb_activate": True},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_round_trip(layout: str) -> None:
    converter, cls, kwargs = LAYOUTS[layout]
    torch.manual_seed(0)
    network = cls(**kwargs)
    suites.randomise(network, scale=0.3)
    theirs = converter.from_ours(network.state_dict())
    found = [c for c in (v[0] for v in LAYOUTS.values()) if c.recognise(theirs)]
    assert set(found) == {converter}
    other = cls(**converter.config(theirs))
    other.load_state_dict(converter.to_ours(theirs))
    state, again = network.state_dict(), other.state_dict()
    assert set(state) == set(again) and all(torch.allclose(v, again[k], atol=1e-6) for k, v in state.items())
    with pytest.raises((KeyError, IndexError, RuntimeError)):
        half = {k: v for i, (k, v) in enumerate(theirs.items()) if i > len(theirs) // 2}
        other.load_state_dict(converter.to_ours(half))


class Network:
    """What a pickle of dnnlib.tflib holds of a network."""

    __module__, __qualname__ = "dnnlib.tflib.network", "Network"

    def __init__(self, name: str, variables: dict[str, Tensor]):
        own = [(k, v.numpy() if v.ndim else v.numpy()[()]) for k, v in variables.items()]
        parts = {
            p: [(k.removeprefix(f"{p}/"), v) for k, v in own if k.startswith(f"{p}/")] for p in ("synthesis", "mapping")
        }
        parts = {p: v for p, v in parts.items() if v}
        self.state = {
            "version": 3, "name": name, "build_module_src": "raise SystemExit", "static_kwargs": {},
            "components": {p: Network(p, {k: torch.as_tensor(x) for k, x in v}) for p, v in parts.items()},
            "variables": [(k, v) for k, v in own if not k.startswith(tuple(f"{p}/" for p in parts))] if parts else own,
        }  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return self.state


@pytest.mark.parametrize("layout", ["sg1", "sg2-tf"])
def test_official_pickles_convert_and_are_sampled(layout: str, vgm: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """(G, D, Gs) as TensorFlow's code pickles it: the average is taken, no code of the file is run."""
    converter, cls, kwargs = LAYOUTS[layout]
    live, average = (cls(**kwargs) for _ in (0, 1))
    module = types.ModuleType("dnnlib.tflib.network")
    module.Network = Network  # type: ignore[attr-defined]
    for name in ("dnnlib", "dnnlib.tflib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "dnnlib.tflib.network", module)
    networks = [Network(name, converter.from_ours(net.state_dict())) for name, net in (("G", live), ("Gs", average))]
    (tmp_path / "net.pkl").write_bytes(pickle.dumps((networks[0], Network("D", {"lod": torch.zeros(())}), networks[1])))
    monkeypatch.undo()
    code, _, err = vgm("convert", tmp_path / "net.pkl", tmp_path / "net.safetensors", "--verify")
    assert code == 0, err
    state = load_file(tmp_path / "net.safetensors")
    key = "layers.3.conv.weight" if layout == "sg1" else "b8.conv0.weight"
    assert torch.equal(state[key], average.state_dict()[key])
    code, _, err = vgm(
        "sample", tmp_path / "net.safetensors", "-n", 2, "--out", tmp_path / "a.png", "truncation_psi=0.7"
    )
    assert code == 0, err


def run_source(meta: dict[str, Any]) -> Any:
    """What the official module does when it is unpickled."""
    exec(meta["module_src"])


run_source.__module__, run_source.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"


class Persistent:
    """A module as NVlabs/stylegan2-ada-pytorch pickles it: its source to be executed, then its tensors."""

    def __init__(self, state: dict[str, Tensor], source: str):
        parts = {k.partition(".")[0] for k in state if "." in k}
        inner = {
            p: {k.removeprefix(f"{p}."): v for k, v in state.items() if k.startswith(f"{p}.")} for p in sorted(parts)
        }
        own = {k: v for k, v in state.items() if "." not in k}
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": "Part", "state": {
            "_parameters": {k: nn.Parameter(v) for k, v in own.items() if k in ("weight", "bias", "const")},
            "_buffers": {k: v for k, v in own.items() if k not in ("weight", "bias", "const")},
            "_modules": {p: Persistent(s, source) for p, s in inner.items()},
        }}  # fmt: skip

    def __reduce__(self) -> Any:
        return run_source, (self.meta,)


def test_adaptive_pickles_convert_without_running_their_source(vgm: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """{G, D, G_ema, augment_pipe}: G_ema is taken; the source in the file, a real payload, stays unread."""
    converter, cls, kwargs = LAYOUTS["sg2"]
    live, average = (cls(**kwargs) for _ in (0, 1))
    persistence = types.ModuleType("torch_utils.persistence")
    persistence._reconstruct_persistent_obj = run_source  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)
    source = f"open({str(tmp_path / 'ran')!r}, 'w')"
    nets = {n: Persistent(converter.from_ours(g.state_dict()), source) for n, g in (("G", live), ("G_ema", average))}
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({**nets, "D": None, "augment_pipe": None}))
    code, _, err = vgm("convert", tmp_path / "net.pkl", tmp_path / "net.safetensors", "--verify")
    assert code == 0, err
    assert not (tmp_path / "ran").exists()
    got, want = load_file(tmp_path / "net.safetensors"), average.state_dict()
    assert all(torch.equal(got[k], v) for k, v in want.items())
    code, _, err = vgm("sample", tmp_path / "net.safetensors", "-n", 2, "--out", tmp_path / "a.png")
    assert code == 0, err
    pickle.loads((tmp_path / "net.pkl").read_bytes())
    assert (tmp_path / "ran").exists(), "the payload is harmless: this test proves nothing"


def test_layouts_start_at_four_pixels() -> None:
    with pytest.raises(VgmError, match="4x4"):
        checkpoints.allows({"size": 28})


def test_average_of_the_port_is_found() -> None:
    theirs = checkpoints.PORT.from_ours(port.Generator(**LAYOUTS["port"][2]).state_dict())
    checkpoint = {"generator": theirs, "g_running": {f"module.{k}": v for k, v in theirs.items()}, "d_optimizer": {}}
    assert checkpoints.PORT.recognise(unwrap(checkpoint, "g_running"))


# -- through the command line ----------------------------------------------------------------------------------------


def test_train_sample_and_mix(vgm: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, err = vgm("train", "stylegan", "--recipe", "mnist-ada", "--out", run, f"data.path={tiny_dataset}", *SMALL2,
                       "train.steps=2", "train.batch_size=4", "train.preview_n=4", "train.save_every=2",
                       "train.compile=off", "train.precision=fp32")  # fmt: skip
    assert code == 0, err
    assert (run / "checkpoints" / "step-00000002" / "discriminator.safetensors").is_file()
    code, _, err = vgm("sample", run, "-n", 4, "--out", tmp_path / "a.png", "truncation_psi=0.7", "truncation_cutoff=4")
    assert code == 0, err
    code, _, err = vgm("sample", run, "-n", 6, "--sampler", "stylegan-mix", "columns=2", "layers=coarse",
                       "--label", "disc", "--out", tmp_path / "b.png")  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()


# -- filters in checkpoints ------------------------------------------------------------------------------------------


def official_state(taps: list[float], generator: bool = True) -> dict[str, Tensor]:
    """An official state of a network with another resampling filter; what neither doubles nor halves has (1, 3, 3, 1)
    all the same."""
    torch.manual_seed(0)
    size = {"size": 16, "channel_base": 64, "channel_max": 8, "mapping_layers": 1, "taps": taps}
    net: nn.Module = stylegan2.Discriminator(**size)
    if generator:
        net = stylegan2.Generator(**size, latent_size=8, w_dim=8)
    return checkpoints.stylegan2_from_ours(net.state_dict())


@pytest.mark.parametrize(
    "taps", [[1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 4.0, 6.0, 4.0, 1.0], [float(i) for i in range(1, 9)]]
)
@pytest.mark.parametrize("generator", [True, False])
def test_the_stored_resampling_filter_is_the_networks(taps: list[float], generator: bool) -> None:
    """Read where the network resamples: the plain convolutions' own, always (1, 3, 3, 1), says nothing."""
    state = official_state(taps, generator)
    plain = "synthesis.b8.conv1" if generator else "b8.conv0"
    assert_close(state[f"{plain}.resample_filter"], stylegan2.setup_filter((1, 3, 3, 1)), 0)
    converter, cls = checkpoints.DISCRIMINATOR2, stylegan2.Discriminator
    if generator:
        converter, cls = checkpoints.GENERATOR2, stylegan2.Generator
    again = restore(converter, cls, state)
    assert_close(again.resample_filter, stylegan2.setup_filter(taps), 1e-6)
    resized = {False: stylegan2.downsample, True: stylegan2.upsample}[generator](
        torch.ones(1, 1, 8, 8), again.resample_filter
    )
    assert resized.shape[-1] == (16 if generator else 4)


@pytest.mark.parametrize("generator", [True, False])
def test_different_resampling_filters_in_one_checkpoint_are_refused(generator: bool) -> None:
    state = official_state([1.0, 3.0, 3.0, 1.0], generator)
    state[f"synthesis.b8.conv0.{checkpoints.FILTER}" if generator else f"b8.conv1.{checkpoints.FILTER}"] = torch.ones(
        4, 4
    )
    with pytest.raises(VgmError, match="different filters"):
        checkpoints.stylegan2_to_ours(state)


def test_another_blur_in_a_port_is_refused() -> None:
    g = port.Generator(size=8, w_dim=8, mapping_layers=1, widths=[8] * 9)
    state = checkpoints.PORT.from_ours(g.state_dict())
    checkpoints.PORT.to_ours(state)
    key = next(k for k in state if k.endswith("weight_flip"))
    with pytest.raises(VgmError, match="another blur"):
        checkpoints.PORT.to_ours({**state, key: torch.ones_like(state[key]) / 9})


def test_blur_filter_is_the_networks() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for taps in ((1.0, 1.0), (1.0, 3.0, 3.0, 1.0), (1.0, 2.0, 3.0)):
        f = torch.outer(torch.tensor(taps), torch.tensor(taps))
        n = len(taps)
        wide = F.pad(x, ((n - 1) // 2, n // 2, (n - 1) // 2, n // 2))  # TensorFlow's "SAME"
        want = F.conv2d(wide, (f / f.sum()).flip(0, 1).expand(3, 1, n, n), groups=3)
        assert_close(model.blur(x, taps), want, 1e-5)
    torch.manual_seed(0)
    g = model.Generator(size=8, latent_size=4, w_dim=4, mapping_layers=1, mapping_width=4, fmap_base=16, fmap_max=8)
    other = model.Generator(
        size=8,
        latent_size=4,
        w_dim=4,
        mapping_layers=1,
        mapping_width=4,
        fmap_base=16,
        fmap_max=8,
        blur_filter=(1, 1, 1),
    )
    other.load_state_dict(g.state_dict())
    ws = torch.randn(2, g.num_layers, 4)
    assert not torch.allclose(g.synthesis(ws), other.synthesis(ws))
