"""SUPIR against its official code and Real-ESRGAN's (golden cases), sizes, checkpoints, training, restoring."""

from __future__ import annotations

import ast
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_ldm import hashed, unet_keywords
from torch import Tensor, nn
from vgm_plugins.supir import checkpoints as ck
from vgm_plugins.supir.codec import RobustAutoencoderKL
from vgm_plugins.supir.colour import adain_fix, wavelet_fix, wavelets
from vgm_plugins.supir.layers import ZeroCrossAttn, ZeroSFT
from vgm_plugins.supir.model import SUPIRUNet
from vgm_plugins.supir.sampler import (
    SIGMA_MAX,
    SUPIRSampler,
    levels,
    linear,
    nearest,
    restore_dpmpp_2m,
    restore_edm,
    sigmas,
)
from vgm_plugins.supir.tiles import PADS, Tiles, in_tiles, split, weights

from vgm_cli.api import Request, generators
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.guidance import extrapolate
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import VgmError
from vgm_cli.images import enlarged, returned
from vgm_cli.nets.clip_text import SDXLText
from vgm_cli.nets.first_stage import DiagonalGaussian
from vgm_cli.nets.ldm_unet import LDMUNet
from vgm_cli.nets.ldm_unet_checkpoints import LDM_UNET
from vgm_cli.nets.ldm_unet_presets import PRESETS
from vgm_cli.operators import kernels as blur
from vgm_cli.operators.jpeg import soft_jpeg
from vgm_cli.operators.realistic import MODES, Course, Round, gaussian_noise
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, angle_floor, assert_close
from vgm_cli.weights import layout as layouts

golden = GoldenChecks("supir")
PATH = DiscreteVPPath("scaled_linear", 1000, 0.00085, 0.012)


# -- golden cases: degradations --------------------------------------------------------------------------------------


@golden.check(lambda c: c.source.endswith("basicsr/data/degradations.py"))
def kernels(case: GoldenCase) -> None:
    forms = {"gen": blur.generalised_kernel, "plateau": blur.plateau_kernel}
    for i, (size, sigma_x, sigma_y, theta) in enumerate(case.config["params"]):
        for name, want in case.outputs.items():
            first, *rest = name.split("_")
            own = (0.0, sigma_x**2, sigma_x**2) if "iso" in name.split("_") else (theta, sigma_x**2, sigma_y**2)
            if name == f"sinc_{i}":
                found = blur.with_zeros(blur.lowpass_kernel(size, 1.1 + 0.5 * i), 21)
            elif name in (f"iso_{i}", f"aniso_{i}"):
                found = blur.anisotropic_kernel(size, *own)
            elif first in forms and rest[1] == str(i):
                found = forms[first](size, *own, float(rest[2]))
            else:
                continue
            assert_close(found, want, 1e-6, name)


@golden.check(lambda c: "out/usm" in c and "out/filter2D" in c)
def parts_of_a_degradation(case: GoldenCase) -> None:
    x, given, out = case.inputs["x"], case.inputs, case.outputs
    assert_close(blur.filtered(x, given["kernels"]), out["filter2D"], 1e-6, "filter2D")
    assert_close(blur.sharpened(x), out["usm"], 1e-6, "usm")
    names = [n for n in out if n.startswith("jpeg_")]
    assert len(names) == 2
    for name in names:  # jpeg_30_80: a quality of each image; jpeg_diff_60: of all, with a rounding that has a slope
        _, *words = name.split("_")
        rounded = [torch.round, lambda v: v.round() + (v - v.round()) ** 3][words[0] == "diff"]
        qualities = torch.tensor([float(w) for w in words if w != "diff"]).expand(len(x))
        assert_close(soft_jpeg(x, qualities, rounded), out[name], 1e-5, name)
    draws = iter([given["noise_gray"], given["noise"]])
    noisy = gaussian_noise(x, given["sigma"], given["gray"].bool(), lambda shape: next(draws))
    assert_close(noisy, out["gauss"], 1e-6, "gauss")
    for mode in MODES:
        assert_close(F.interpolate(x, scale_factor=0.61, mode=mode), out[f"resize_{mode}"], 1e-6, mode)


class Draws:
    """The random numbers of a stored degradation: choices in their order, tensors in theirs."""

    def __init__(self, case: GoldenCase):
        self.scalars = iter(case.config["scalar_draws"])
        named = sorted(k for k in case.inputs if k.startswith("draw_"))
        self.tensors = [(k.split("_")[-1], case.inputs[k]) for k in named]

    def scalar(self) -> Any:
        return next(self.scalars)[1]

    def tensor(self, kind: str) -> Tensor:
        at = next(i for i, (name, _) in enumerate(self.tensors) if name == kind)
        return self.tensors.pop(at)[1]

    def round(self, opt: dict[str, Any], kernel: Tensor, twin: str) -> Round:
        kept = not twin or self.scalar() < opt["second_blur_prob"]
        kind = ast.literal_eval(self.scalar())[0]
        assert opt[f"resize_prob{twin}"][("up", "down", "keep").index(kind)] > 0
        scale = 1.0 if kind == "keep" else self.scalar()
        low, high = opt[f"resize_range{twin}"]
        assert kind == "keep" or (low <= scale <= 1 if kind == "down" else 1 <= scale <= high)
        mode = self.scalar()
        gaussian = self.scalar() < opt[f"gaussian_noise_prob{twin}"]
        low, high = opt[f"{'noise_range' if gaussian else 'poisson_scale_range'}{twin}"]
        strength = self.tensor("rand") * (high - low) + low
        grey = self.tensor("rand") < opt[f"gray_noise_prob{twin}"]
        return Round(kernel if kept else None, scale, mode, not gaussian, strength, grey, self.tensor("jpegq"))


@golden.check(lambda c: "realesrgan_model.py feed_data" in c.source)
def degradation(case: GoldenCase) -> None:
    opt, draws = case.config["opt"], Draws(case)
    first, second = (draws.round(opt, case.inputs[f"kernel{i + 1}"], t) for i, t in enumerate(("", "2")))
    course = Course(first, second, case.inputs["sinc_kernel"], jpeg_last=draws.scalar() < 0.5, back=draws.scalar())
    x = case.inputs["gt"]
    sharp = blur.sharpened(x)
    assert_close(sharp, case.outputs["gt_usm"], 1e-5, "gt_usm")
    found = course(sharp, case.config["scale"], lambda shape: draws.tensor("randn"), lambda r: draws.tensor("poisson"))
    gap = (found - case.outputs["lq"]).abs()  # a rounding of JPEG's that falls to the other side is a jump
    assert found.shape == case.outputs["lq"].shape and float((gap < 1e-4).float().mean()) >= 0.999
    assert not draws.tensors and next(draws.scalars, None) is None
    why = "the draws are given; they lie within it"
    for twin in ("", "2"):
        case.ignore(*(f"opt.{k}{twin}" for k in ("jpeg_range", "resize_prob", "resize_range")), why=why)
        case.ignore(*(f"opt.{k}{twin}" for k in ("noise_range", "poisson_scale_range", "gray_noise_prob")),
                    why="of noise of the other kind, or of a share that both values allow")  # fmt: skip
        case.ignore(f"opt.gaussian_noise_prob{twin}", why="the draw lies on the same side of other values, too")
    case.ignore("opt.second_blur_prob", why="the draw lies on the same side of other values, too")


# -- golden cases: networks ------------------------------------------------------------------------------------------


@golden.check(lambda c: c.source.endswith("SUPIR_v0.py ZeroSFT"))
@torch.no_grad()
def zero_sft(case: GoldenCase) -> None:
    config, given = case.config, case.inputs
    layer = ZeroSFT(config["label_nc"], config["norm_nc"], config["concat_channels"], norm=config["norm"])
    layer.load_state_dict(case.state)
    before = given["h_ori"] if config["concat_channels"] else None
    for name, want in case.outputs.items():
        scale = 1.0 if name.endswith("scale1") else float(name.partition("scale")[2] or config["control_scale"])
        assert_close(layer(given["c"], given["h"], before, scale), want, 1e-5, name)
    if "out/out_no_ori" not in case:
        case.ignore("control_scale", why="the name of the output says it")


@golden.check(lambda c: c.source.endswith("ZeroCrossAttn"))
@torch.no_grad()
def zero_cross_attention(case: GoldenCase) -> None:
    config, given = case.config, case.inputs
    layer = ZeroCrossAttn(config["context_dim"], config["query_dim"])
    layer.load_state_dict(case.state)
    assert_close(layer(given["context"], given["x"]), case.outputs["out"], 1e-5, "out")
    scaled = layer(given["context"], given["x"], config["control_scale"])
    assert_close(scaled, case.outputs["out_scaled"], 1e-5, "out_scaled")


def base_keywords(config: dict[str, Any]) -> dict[str, Any]:
    """Keywords of the official U-Net -> ours."""
    own = {k: config[k] for k in config if k not in ("spatial_transformer_attn_type", "num_classes")}
    assert config["num_classes"] == "sequential"
    keywords = unet_keywords({k: v for k, v in own.items() if k not in CONNECTED and k != "adm_in_channels"})
    return {**keywords, "vector_dim": own["adm_in_channels"]}


CONNECTED = ("mode", "project_type", "project_channel_scale", "input_upscale")


@golden.check(lambda c: "GLVControl + LightGLVUNet" in c.source)
@torch.no_grad()
def control_and_unet(case: GoldenCase) -> None:
    config, given, out = case.config, case.inputs, case.outputs
    unet, steer = config["network_config"], config["control_stage_config"]
    keywords = base_keywords(unet)
    assert unet["project_type"] == "ZeroSFT" and base_keywords(steer) | {"transformer_depth": 0} == keywords | {
        "transformer_depth": 0
    }
    state = {f"model.{k}": v for k, v in hashed(config["keys"]).items()}
    assert {c.name for c in layouts.recognising(n for n in state if not n.startswith(ck.PROJECT))} == {"ldm-unet"}
    base = LDMUNet(**keywords).eval()
    base.load_state_dict(
        LDM_UNET.to_ours({k: v for k, v in state.items() if not k.startswith((ck.PROJECT, ck.CONTROL))})
    )
    found = ck.control_config(state)
    assert found["unet"]["vector_dim"] == keywords["vector_dim"]
    depth = steer["transformer_depth"]
    depth = [depth] * len(keywords["channel_mult"]) if isinstance(depth, int) else depth
    network = SUPIRUNet(base, control_depth=depth, input_upscale=steer["input_upscale"]).eval()
    own = ck.control_to_ours({k: state[k] for k in ck.names_of(state)})
    missing, unexpected = network.load_state_dict(own, strict=False)
    assert not unexpected and not [n for n in missing if not n.startswith("base.")]
    for i, layer in enumerate(network.project_modules):  # as wide as half of the control's maps times the scale
        if isinstance(layer, ZeroSFT):
            label = layer.mlp_shared[0].in_channels
            assert label == layer.zero_conv.out_channels // 2 * unet["project_channel_scale"], i
    told = {"context": given["context"], "vector": given["y"]}
    maps = network.control(given["control"], given["t"], given["x"], **told)
    for i, found_map in enumerate(maps):
        assert_close(found_map, out[f"control_{i:02d}"], 1e-5, f"control_{i:02d}")
    for name in [n for n in out if n.startswith("eps_scale")]:
        scale = float(name.removeprefix("eps_scale"))
        eps = network(given["x"], given["t"], **told, control=given["control"], control_scale=scale)
        assert_close(eps, out[name], 1e-5, name)
    named = network.features(given["x"], given["t"], ["middle", "output.1"], **told, control=given["control"])
    assert [m.ndim for m in named] == [4, 4]
    attention = [f"{k}.spatial_transformer_attn_type" for k in ("network_config", "control_stage_config")]
    case.ignore(*attention, why="the same function by another kernel")
    case.ignore("network_config.mode", why="the lists of channels follow from the U-Net")


@golden.check(lambda c: "out/enc_tiled" in c)
@torch.no_grad()
def tiled_first_stage(case: GoldenCase) -> None:
    config = case.config
    keywords = {k: config["ddconfig"][k] for k in config["ddconfig"] if k != "double_z"}
    assert config["ddconfig"]["double_z"]
    stage = RobustAutoencoderKL(**keywords, embed_dim=keywords["z_channels"]).eval()
    stage.load_state_dict(hashed(config["keys"]), strict=False)
    statistics = "estimated" if config["fast"] else "pooled"
    for short, net, name in (("enc", stage.encoder, "x"), ("dec", stage.decoder, "z")):
        x, up = case.inputs[name], short == "dec"
        size = config["decoder_tile_size" if up else "encoder_tile_size"]
        found = split(*x.shape[2:], size, PADS[up], up)
        for side in ("in", "out"):  # columns before rows there
            boxes = [
                [*(t.read if side == "in" else t.made)[1], *(t.read if side == "in" else t.made)[0]] for t in found
            ]
            assert torch.equal(torch.tensor(boxes), case.outputs[f"bboxes_{short}_{side}"])
        made = in_tiles(net, x, size, statistics)  # type: ignore[arg-type]
        assert_close(made, case.outputs[f"{short}_tiled"], 1e-5, f"{short}_tiled")
    case.ignore("ddconfig.resolution", "ddconfig.dropout", why="no layer of this network depends on it")


@golden.check(lambda c: c.kind == "sdxl_vector")
def vector(case: GoldenCase) -> None:
    given, width = case.inputs, case.config["outdim"]
    assert given["pooled"].shape[1] == case.config["pooled"]
    for i in range(len(given["pooled"])):
        encoder = object.__new__(SDXLText)
        pair = lambda name, i=i: tuple(given[name][i].tolist())
        encoder.sizes = (*pair("original_size"), *pair("crop_top_left"), *pair("target_size"))  # type: ignore[assignment]
        encoder.sinusoids = width
        found = SDXLText.vector(encoder, given["pooled"][i : i + 1])
        assert_close(found[0], case.outputs["vector"][i], 1e-5, "vector", angle_floor(max(encoder.sizes)))
    sizes = case.outputs["size_embedding"]
    assert_close(case.outputs["vector"][:, case.config["pooled"] :][:, : sizes.shape[1]], sizes, 1e-6, "order")


# -- golden cases: samplers ------------------------------------------------------------------------------------------


@golden.check(lambda c: c.source.endswith("DiscreteDenoiserWithControl"))
def discrete_denoiser(case: GoldenCase) -> None:
    config, x = case.config, case.inputs["x"]
    table = levels(PATH) if config["num_idx"] == PATH.steps else sigmas(PATH, config["num_idx"]).flip(0)[1:]
    bar = 1 / (1 + table**2)
    path = DiscreteVPPath(betas=(1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])).tolist())
    table = levels(path)
    assert_close(table, case.outputs["sigmas"], 1e-5, "sigmas")
    index = nearest(case.inputs["sigma"], table)
    assert torch.equal(index, case.outputs["idx"])
    assert_close(table[index], case.outputs["sigma_q"], 1e-5, "sigma_q")
    assert_close(case.inputs["sigma"] ** -2, case.outputs["w"], 1e-5, "w")

    def toy(z: Tensor, t: Tensor, control_scale: float) -> Tensor:
        return 0.3 * z.tanh() + 0.001 * t.view(-1, 1, 1, 1) * control_scale

    view = Denoiser(toy, path, "eps", time="index")
    rows = [SUPIRSampler().estimate(view, x[i : i + 1], float(s), {}, config["control_scale"])
            for i, s in enumerate(case.inputs["sigma"])]  # fmt: skip
    assert_close(torch.cat(rows), case.outputs["denoised"], 1e-5, "denoised")


def toy_denoiser(x: Tensor, sigma: float, control: Tensor, vector: Tensor, scale: float) -> Tensor:
    shared = x / (1 + sigma**2) + 0.2 * x.tanh() * scale + 0.3 * control * x.cos()
    return shared + 0.1 * vector.view(-1, 1, 1, 1)


@golden.check(lambda c: "sampler" in c.config)
def restoration_sampler(case: GoldenCase) -> None:
    config, given = case.config, case.inputs
    own, call = config["sampler_kwargs"], config["call_kwargs"]
    grid = sigmas(PATH, config["num_steps"])
    assert_close(grid, case.outputs["sigmas"], 1e-5, "sigmas")
    x = given["x"] * math.sqrt(1 + float(grid[0]) ** 2)
    scale, start = config["scale"], config.get("scale_min", config["scale"])
    assert config["guider"] in ("LinearCFG", "VanillaCFG")
    start, scale = (start, scale) if config["guider"] == "LinearCFG" else (scale, scale)
    name = config["sampler"]
    tiles = Tiles(own["tile_size"], own["tile_stride"]) if name.startswith("Tiled") else None

    def estimate(x: Tensor, sigma: float, control: float) -> Tensor:
        def on(box: Any) -> Tensor:
            rows, columns = box
            z, lq = x[:, :, rows, columns], given["lq"][:, :, rows, columns]
            both = [toy_denoiser(z, sigma, lq, given[v], control) for v in ("uvec", "vec")]
            return extrapolate(both, (linear(start, scale, sigma),))

        whole = (slice(None), slice(None))
        return on(whole) if tiles is None else tiles.blend(lambda i, box: on(box), x)

    states, draws = [], iter(given["noise"])
    common: dict[str, Any] = {
        "control": call.get("control_scale", 1.0),
        "noise": lambda: next(draws),
        "callback": lambda i, x, x0: states.append(x),
        "s_noise": own.get("s_noise", 1.0),
    }
    if "DPMPP2M" in name:
        got = restore_dpmpp_2m(estimate, x, grid, eta=own.get("eta", 1.0), **common)
        case.ignore("sampler_kwargs.restore_cfg", why="this sampler accepts it and has no use for it")
    else:
        linear_control = call.get("use_linear_control_scale", False)
        got = restore_edm(
            estimate,
            x,
            grid,
            given["x_center"],
            restore=own.get("restore_cfg", 4.0),
            restore_min=own.get("restore_cfg_s_tmin", 0.05),
            s_churn=own.get("s_churn", 0.0),
            s_tmin=own.get("s_tmin", 0.0),
            s_tmax=own.get("s_tmax", math.inf),
            control_start=call.get("control_scale_start", 0.0) if linear_control else None,
            always_draws=tiles is not None,
            **common,
        )
        if not own.get("s_churn"):
            case.ignore("sampler_kwargs.s_noise", why="of noise that s_churn=0 does not add")
    assert_close(got, case.outputs["x"], 1e-5, "x")
    if "out/trajectory" in case and "DPMPP2M" not in name and not own.get("s_churn"):
        assert_close(torch.stack(states[1:]), case.outputs["trajectory"][:-1], 1e-5, "trajectory")
    if tiles is not None:
        size = own["tile_size"]
        assert_close(weights(size, size).expand_as(case.outputs["tile_weights"]), case.outputs["tile_weights"], 1e-12)


# -- golden cases: the whole -----------------------------------------------------------------------------------------


@golden.check(lambda c: "out/wavelet" in c)
def colour_fixes(case: GoldenCase) -> None:
    x, like, n = case.inputs["content"], case.inputs["style"], case.config["levels"]
    details, rest = wavelets(x, n)
    assert_close(details, case.outputs["high"], 1e-5, "high")
    assert_close(rest, case.outputs["low"], 1e-5, "low")
    assert_close(wavelet_fix(x, like, n), case.outputs["wavelet"], 1e-5, "wavelet")
    assert_close(adain_fix(x, like), case.outputs["adain"], 1e-5, "adain")


@golden.check(lambda c: c.kind == "pil_io")
def sizes_of_pictures(case: GoldenCase) -> None:
    config, image = case.config, case.inputs["image"].numpy()
    sampler = SUPIRSampler(upscale=config["upscale"], min_side=config["min_size"], multiple=64)
    size, back = sampler.sizes(image.shape[:2], 1024, 64, config["fix_resize"])
    assert_close(enlarged(image, size), case.outputs["tensor"], 1e-6, "tensor")
    assert list(back) == case.outputs["size_to_return_to"].tolist()
    assert np.array_equal(returned(case.inputs["result"], back), case.outputs["output"].numpy())


class ToyCodec(nn.Module):
    """The codec of the pipeline cases: one convolution for each part."""

    factor = 8

    def __init__(self, state: dict[str, Tensor], scale: float):
        super().__init__()
        self.encoder, self.denoise_encoder = (nn.Conv2d(3, 8, 8, stride=8) for _ in range(2))
        self.decoder = nn.ConvTranspose2d(4, 3, 8, stride=8)
        self.load_state_dict(state)
        self.scale = scale

    def degraded_latents(self, x: Tensor) -> Tensor:
        return self.scale * DiagonalGaussian(self.denoise_encoder(x)).mean

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        return self.scale * DiagonalGaussian(moments).sample(noise)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z / self.scale).tanh()


class ToySampler(SUPIRSampler):
    """The denoiser of the pipeline cases, which is asked at the noise level itself."""

    def estimate(self, view: Any, x: Tensor, sigma: float, cond: dict[str, Tensor], control: float) -> Tensor:
        text = cond["text"].view(-1, 1, 1, 1) * sigma / (10 + sigma)
        steered = 0.1 * control * cond["control"]
        return x / (1 + sigma**2) + 0.2 * (x / (1 + sigma)).tanh() * sigma / (1 + sigma) + steered + text


class Given(Request):
    """A request whose draws are those of a case."""

    draws: Iterator[Tensor]

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


@golden.check(lambda c: c.kind == "pipeline")
@torch.no_grad()
def pipeline(case: GoldenCase) -> None:
    config, n = case.config, case.config.get("num_samples", 1)
    codec = ToyCodec(case.state, config["scale_factor"])
    fix = {"Wavelet": "wavelet", "AdaIn": "adain", "None": "none"}[config["color_fix_type"]]
    linear_control = config.get("use_linear_control_scale", False)
    assert config["sigma_max"] == SIGMA_MAX
    sampler = ToySampler(
        steps=config["num_steps"],
        guidance_scale=config["cfg_scale"],
        guidance_start=config.get("cfg_scale_start", 1.0) if config.get("use_linear_CFG") else None,
        restore=config["restoration_scale"],
        s_churn=config["s_churn"],
        s_noise=config["s_noise"],
        control_scale=config.get("control_scale", 1.0),
        control_start=config.get("control_scale_start", 0.0) if linear_control else None,
        colour_fix=fix,  # type: ignore[arg-type]
    )
    x = case.inputs["x"].repeat(n // len(case.inputs["x"]) or 1, 1, 1, 1)
    rows = len(x)
    request = Given(
        shape=(4, 1, 1),
        generators=generators(range(rows)),
        cond={"control": codec.degraded_latents(x), "text": case.inputs["cond"].expand(rows, 1)},
        null={"text": case.inputs["uncond"].expand(rows, 1)},
    )
    assert sorted(k for k in case.inputs if k.startswith("draw_")) == case.draw_order
    request.draws = iter([case.inputs[k] for k in case.draw_order])
    view = Denoiser(nn.Identity(), PATH, "eps", time="index")
    z = sampler.solve(view, request, codec)
    first = request.info["stage1"]
    assert_close(first[: len(case.outputs["stage1"])], case.outputs["stage1"], 1e-5, "stage1")
    assert_close(sampler.finish(codec.decode(z), request), case.outputs["samples"], 1e-5, "samples")
    assert next(request.draws, None) is None
    if not config["s_churn"]:
        case.ignore("s_noise", why="of noise that s_churn=0 does not add")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes and layouts -----------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    count = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device("meta"):
        base = LDMUNet(**PRESETS["sdxl"])
        whole, trimmed = (SUPIRUNet(base, control_depth=d) for d in ((1, 2, 10), (1, 1, 4)))
        codec = RobustAutoencoderKL()
    assert count(base) + count(whole.project_modules) == 2_622_261_124
    assert count(whole.project_modules) == 54_797_440
    assert count(whole.control) == 1_243_378_880 and count(trimmed.control) < 0.5 * count(whole.control)
    assert count(codec) - count(codec.denoise_encoder) == 83_653_863


def test_the_start_is_the_bases_encoder() -> None:
    """The control begins as a copy, or as the first blocks of one; a network that is steered otherwise is refused."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 8, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
    own: dict[str, Any] = {"attention_resolutions": (2,), "num_heads": 2, "context_dim": 8, "transformer_depth": (1, 2)}
    base = LDMUNet(**sizes, **own).requires_grad_(False)
    for depth, blocks in ((None, 2), ((1, 1), 1)):
        network = SUPIRUNet(base, control_depth=depth)
        theirs, ours = base.state_dict(), network.control.state_dict()
        copied = [k for k in ours if k in theirs]
        assert len(copied) == len(ours) - 2 and all(torch.equal(ours[k], theirs[k]) for k in copied)
        assert len(network.control.middle_block[1].transformer_blocks) == blocks
        x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 8)
        out = network(x, t, context, control=x, control_scale=0.0)
        assert torch.allclose(out, base(x, t, context), atol=1e-6)
        network(x, t, context, control=x).square().sum().backward()
        assert all(p.grad is None for p in base.parameters())
        assert network.project_modules[0].zero_mul.weight.grad is not None
    for wrong in ((1,), (2, 2), (1, 3), (1, 0)):
        with pytest.raises(VgmError, match="control_depth"):
            SUPIRUNet(base, control_depth=wrong)
    for wrong_base in (None, nn.Identity(), LDMUNet(**sizes, **own, concat_channels=1)):
        with pytest.raises(VgmError, match="SUPIR steers"):
            SUPIRUNet(wrong_base)


def test_sizes_of_a_small_network() -> None:
    sampler = SUPIRSampler(upscale=2)
    assert sampler.sizes((20, 33), 32, 8) == ((40, 64), (40, 66))
    assert sampler.sizes((8, 8), 32, 8) == ((32, 32), (16, 16))


def test_tiles_cover_and_a_whole_is_undivided() -> None:
    x = torch.randn(1, 4, 9, 14)
    for tiles in (Tiles(4, 2), Tiles(4, 3), Tiles(20, 7)):
        assert torch.allclose(tiles.blend(lambda i, box: x[:, :, box[0], box[1]], x), x, atol=1e-6)
    assert len(Tiles(4, 2).boxes(9, 14)) == 4 * 6 and len(Tiles(20, 7).boxes(9, 14)) == 1


# -- training and restoring, through the commands ----------------------------------------------------------------------

WORDS = "[a, red, blue, green, yellow, circle, square, triangle, bad]"
CODEC = "ch: 8, ch_mult: [1, 2], num_res_blocks: 1, attn_type: none, norm_groups: 4, latent_stats: true"
RECIPES = {
    "codec": f"""
model: {{name: autoencoder-kl, {CODEC}}}
objective: {{name: autoencoder, pixel_loss: l2, kl_weight: 1.0e-2, reduction: mean}}""",
    "prior": f"""
model: {{name: ldm-unet, model_channels: 32, num_res_blocks: 1, channel_mult: [1, 2], attention_resolutions: [2],
        num_heads: 8, context_dim: 16}}
codec: {{name: autoencoder-kl, weights: codec}}
conditions: {{text: {{name: words, words: {WORDS}, width: 16, length: 4, train: true, dropout: 0.1}}}}
objective: {{name: ldm}}""",
    "encoder": f"""
model: {{name: supir-autoencoder, {CODEC}, scale_factor: 1.0, weights: codec, partial: true}}
conditions: {{degraded: {{name: hint, keyword: degraded, low: -1.0, operator: {{name: classical}}}}}}
objective: {{name: supir-encoder}}""",
    "supir": f"""
model: {{name: supir, control_depth: [1, 1]}}
roles: {{base: {{run: prior}}}}
codec: {{name: supir-autoencoder, weights: encoder}}
conditions:
  text: {{name: words, words: {WORDS}, width: 16, length: 4, weights: prior}}
  control: {{name: degraded, operator: {{name: real-esrgan, sharpen: false}}}}
objective: {{name: supir, negative_share: 0.5, negative_prompt: bad, negative_degradation: {{sharpen: false}}}}
sampler: {{name: supir, steps: 2, added: "", negative: bad}}""",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four small runs of four steps each: codec, prior, encoder, supir."""
    from vgm_cli.__main__ import run

    folder = tmp_path_factory.mktemp("supir")
    back = Path.cwd()
    os.chdir(folder)
    try:
        rng = np.random.RandomState(0)
        pictures = rng.randint(0, 255, (12, 16, 16, 3), dtype=np.uint8)
        np.savez("data.npz", images=pictures, captions=np.array(["a red circle", "a blue square"] * 6))
        for name, text in RECIPES.items():
            more = "\ndata: {path: data.npz, labels: false}\noptimizer: {name: adamw, lr: 1.0e-3}"
            more += "\ntrain: {steps: 3, batch_size: 4, ema: [], save_every: 3, preview_n: 0, precision: fp32}\n"
            Path(f"{name}.yaml").write_text(f"paper: supir{text}{more}")
            assert run(["train", f"{name}.yaml", "--out", name, "--track", "none"]) == 0, name
    finally:
        os.chdir(back)
    return folder


Call = Callable[..., tuple[int, str, str]]


def test_a_checkpoint_holds_what_was_trained(trained: Path) -> None:
    loaded = ckpt.load(trained / "supir")
    state = load_file(ckpt.resolve(trained / "supir"))
    assert {n.split(".")[0] for n in state} == {"control", "project_modules"}
    base, encoder = (load_file(ckpt.resolve(trained / n)) for n in ("prior", "encoder"))
    assert torch.equal(loaded.model.base.state_dict()["out.2.weight"], base["out.2.weight"])
    first, codec = ckpt.load_codec(loaded.header, loaded.path), load_file(ckpt.resolve(trained / "codec"))
    assert all(torch.equal(encoder[k], v) for k, v in codec.items())  # the rest of the codec is fixed
    assert not torch.equal(encoder["denoise_encoder.conv_in.weight"], encoder["encoder.conv_in.weight"])
    assert isinstance(first, RobustAutoencoderKL)


def test_pictures_of_any_size_are_restored(trained: Path, vgm: Call) -> None:
    rng = np.random.RandomState(0)
    Path("in").mkdir()
    for name, size in (("a.png", (20, 30)), ("b.png", (40, 33))):
        Image.fromarray(rng.randint(0, 255, (*size, 3), dtype=np.uint8)).save(f"in/{name}")
    Path("in/a.txt").write_text("a mauve circle")  # captions may have words that a prompt may not
    own = ["restore", "--method", "supir", "--model", str(trained / "supir"), "--input"]
    Path("in/0.png").write_bytes(b"no picture")
    code, out, err = vgm(*own, "in", "--upscale", "2", "--out", "out", "--json")
    assert code == 0 and "1 picture left out: 0.png" in err, err
    found = json.loads(out)
    assert [(r["text"], r["size"]) for r in found["images"]] == [("a mauve circle", [40, 60]), ("", [80, 66])]
    assert Image.open("out/restored/a.png").size == (60, 40) and Image.open("out/stage1/b.png").size == (66, 80)
    code, _, err = vgm(*own, "in/b.png", "--tile", "24", "--steps", "1", "--color-fix", "adain", "--prompt", "a blue square",
                       "--precision", "bf16", "--offload", "restore=4", "s_churn=0", "--out", "tiled")  # fmt: skip
    assert code == 0 and "of memory (network" in err, err
    Path("texts.txt").write_text("a red circle\n" * 6)
    code, _, err = vgm(*own, "in/b.png", "--tile", "24", "--tile-prompts", "texts.txt", "--out", "local", "stage=1")
    assert code == 0, err
    code, _, err = vgm(*own, "in/b.png", "--prompt", "a mauve circle", "--out", "refused")
    assert code == 2 and "mauve" in err
    small = rng.randint(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    np.savez("held.npz", images=small, captions=np.array(["a mauve circle", "a red square"]))
    task = ["--task", "classical", "task.scale=2", "--steps", "1"]
    code, _, err = vgm(*own, "held.npz", *task, "--out", "held")
    assert code == 0, err
    code, _, err = vgm(*own, "in", "--truth", "in", "--out", "no")
    assert code == 2 and "any size" in err
    code, _, err = vgm("restore", "--method", "supir", "--model", str(trained / "prior"), "--input", "in")
    assert code == 2 and "no SUPIR network" in err
    code, _, err = vgm("restore", "--method", "dps", "--model", str(trained / "prior"), "--input", "in", "--tile", "8")
    assert code == 2 and "tile" in err


def test_degraded_images_are_measured_with_their_first_stage(trained: Path, vgm: Call) -> None:
    args = [
        "restore",
        "--method",
        "supir",
        "--model",
        str(trained / "supir"),
        "--input",
        str(trained / "data.npz"),
        "-n",
        "3",
    ]
    code, out, err = vgm(*args, "--task", "classical", "task.noise=5", "--out", "a", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"baseline", "stage1", "restored"} <= found.keys() and found["noise"] == {"name": "none"}
    assert {p.name for p in Path("a").iterdir()} >= {"restored", "stage1", "degraded", "grid.png"}
    code, out, err = vgm(*args, "--task", "classical", "task.noise=5", "--out", "b", "--batch-size", "2", "--json")
    assert code == 0 and json.loads(out)["restored"]["psnr"] == pytest.approx(found["restored"]["psnr"], abs=1e-3)
    code, _, err = vgm("sample", str(trained / "supir"), "--hint", "a/degraded/000000.png", "-n", "1", "--prompt", "a")
    assert code == 0, err
    code, out, err = vgm("evaluate", str(trained / "supir"), "--metrics", "edge-f1,retrieval", "-n", "6", "--json")
    assert code == 0 and {r["metric"] for r in json.loads(out)} >= {"edge-f1", "edge-f1-other", "retrieval-top1"}, err


def test_published_files_convert_upon_sdxls(trained: Path, vgm: Call) -> None:
    """A file of the control, the connectors and the second encoder, upon one of the rest."""
    code, _, err = vgm("convert", str(trained / "supir"), "control.pt", "--to", "supir")
    assert code == 0, err
    code, _, err = vgm("convert", str(trained / "encoder"), "stage.pt", "--to", "supir-autoencoder")
    assert code == 0, err
    control, stage = (torch.load(n, weights_only=True) for n in ("control.pt", "stage.pt"))
    control, stage = control.get("state_dict", control), stage.get("state_dict", stage)
    stage = {f"first_stage_model.{k}": v for k, v in stage.items()}
    second = {k: v for k, v in stage.items() if "denoise_encoder" in k}
    torch.save({**control, **second}, "SUPIR-v0Q.ckpt")
    torch.save({"state_dict": {k: v for k, v in stage.items() if k not in second}}, "sdxl.ckpt")
    code, _, err = vgm(
        "convert", "SUPIR-v0Q.ckpt", "codec.safetensors", "--from", "supir-autoencoder", "--on", "sdxl.ckpt"
    )
    assert code == 0 and "tensors are sdxl.ckpt's" in err, err
    assert load_file("codec.safetensors").keys() == load_file(ckpt.resolve(trained / "encoder")).keys()
    base = ckpt.resolve(trained / "prior")
    own = [f"base={base}", "--codec", "codec.safetensors"]
    code, _, err = vgm("convert", "SUPIR-v0Q.ckpt", "supir.safetensors", "--from", "supir", *own)
    assert code == 0, err
    header = ckpt.read_header(Path("supir.safetensors"))
    assert header.parts["base"].component == "ldm-unet" and header.view["prediction"] == "eps"


def test_resuming_is_bit_exact(trained: Path, vgm: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative samples, degradations and the copied start are functions of the step."""
    monkeypatch.chdir(trained)
    for name in ("supir",):
        for out, more in (("whole", []), ("parts", ["--stop-after", "1"])):
            code, _, err = vgm("train", f"{name}.yaml", "--out", f"{name}-{out}", "train.steps=2", *more)
            assert code == 0, err
        code, _, err = vgm("train", "--resume", "--out", f"{name}-parts")
        assert code == 0, err
        whole, parts = (load_file(ckpt.resolve(f"{name}-{o}")) for o in ("whole", "parts"))
        assert all(torch.equal(parts[k], v) for k, v in whole.items()), name
