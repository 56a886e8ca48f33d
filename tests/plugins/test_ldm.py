"""LDM's first stages against CompVis/latent-diffusion@a506df5 (golden cases), sizes, checkpoints, training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.ldm import checkpoints as ck
from vgm_plugins.ldm.conditions import WHOLE, Object, SemanticMap, layout_tokens
from vgm_plugins.ldm.objective import LatentDiffusion, bound_weights
from vgm_plugins.ldm.presets import KL, VQ
from vgm_plugins.ldm.sampler import LDMSampler, official_timesteps

from vgm_cli.api import Codec, Objective, Request, Step, generators
from vgm_cli.convert_api import Layout, unwrap
from vgm_cli.diffusion import solvers
from vgm_cli.diffusion.crops import in_crops
from vgm_cli.diffusion.denoiser import Denoiser, convert
from vgm_cli.diffusion.discrete.betas import betas_for_alpha_bar
from vgm_cli.engine.train.ema import EMA
from vgm_cli.engine.train.optim import learning_rate
from vgm_cli.errors import VgmError
from vgm_cli.losses import lpips
from vgm_cli.losses.adversarial import adaptive_weight
from vgm_cli.losses.first_stage import (
    AutoencoderObjective,
    discriminator_term,
    generator_term,
    reconstruction_loss,
)
from vgm_cli.losses.lpips import LPIPS
from vgm_cli.nets.autoencoder_kl import AutoencoderKL
from vgm_cli.nets.bert_text import BERTText
from vgm_cli.nets.bert_text_checkpoints import BERT_TEXT
from vgm_cli.nets.clip_text import CLIPText
from vgm_cli.nets.clip_text_checkpoints import CLIP_TEXT
from vgm_cli.nets.discriminators import NLayerDiscriminator
from vgm_cli.nets.first_stage import DiagonalGaussian, VQModel, tiled
from vgm_cli.nets.first_stage_checkpoints import PREFIX
from vgm_cli.nets.ldm_unet import LDMUNet
from vgm_cli.nets.ldm_unet_checkpoints import (
    LDM_UNET,
    diffusers_allows,
    from_diffusers,
    header,
    preset_of,
    shapes,
)
from vgm_cli.nets.ldm_unet_presets import PRESETS
from vgm_cli.nets.tokenizers import bert_tokenizer, clip_tokenizer, clip_vocabulary
from vgm_cli.nn.quantize import code_usage
from vgm_cli.operators import bsr
from vgm_cli.operators.kernels import anisotropic_kernel, convolved, gaussian_kernel, shifted_kernel
from vgm_cli.operators.resize import matrix, output_size
from vgm_cli.operators.separable import apply as separable
from vgm_cli.registry import registry
from vgm_cli.settings import Optimizer
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close
from vgm_cli.weights import layout as layouts

golden = GoldenChecks("ldm")


# -- golden cases ----------------------------------------------------------------------------------------------------


def keywords(config: dict[str, Any]) -> dict[str, Any]:
    """An official model config (ddconfig, embed_dim, ...) -> constructor keywords."""
    other = ("double_z", "use_linear_attn", "give_pre_end")
    dd = {k: config["ddconfig"][k] for k in config["ddconfig"] if k not in other}
    if config["ddconfig"].get("use_linear_attn"):
        dd["attn_type"] = "linear"
    return {**dd, **{k: config[k] for k in ("embed_dim", "n_embed") if k in config}}


def load(case: GoldenCase, cls: type, converter: Layout) -> Any:
    assert converter.recognise(case.state)
    assert case.config["ddconfig"].get("double_z", True) == (cls is AutoencoderKL)
    case.ignore("ddconfig.dropout", why="evaluated without dropout")
    if not case.config["ddconfig"]["attn_resolutions"]:
        case.ignore("ddconfig.resolution", why="it places attention only")
    case.ignore("use_ema", "sane_index_shape", "monitor", "image_key", why="no output depends on it")
    assert case.config.get("remap") is None
    model = cls(**keywords(case.config))
    model.load_state_dict(converter.to_ours(case.state))
    if case.config["ddconfig"].get("give_pre_end"):
        model.decoder.forward = model.decoder.features
    return model.eval()


@golden.check(lambda c: "ddconfig" in c.config and "out/moments" in c)
@torch.no_grad()
def kl_autoencoder(case: GoldenCase) -> None:
    model = load(case, AutoencoderKL, ck.CONVERTER_KL)
    moments = model.encode(case.inputs["x"])
    assert_close(moments, case.outputs["moments"], 1e-5, "moments")
    posterior = DiagonalGaussian(moments)
    z = posterior.sample(case.inputs["noise"])
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "z": z, "kl": posterior.kl()}
    found |= {"nll_of_z": posterior.nll(z), "dec_z": model.decode(z), "dec_mode": model.decode(posterior.mean)}
    for name, got in found.items():
        assert_close(got, case.outputs[name], 1e-5, name)
    assert torch.equal(model.latents(moments, case.inputs["noise"]), z)
    assert torch.equal(model(case.inputs["x"], case.inputs["noise"])[0], found["dec_z"])


@golden.check(lambda c: "ddconfig" in c.config and "out/quant" in c)
@torch.no_grad()
def vq_interface(case: GoldenCase) -> None:
    model = load(case, VQModel, ck.CONVERTER_VQ)
    assert_close(model.latents(model.encode(case.inputs["x"])), case.outputs["h"], 1e-5, "h")
    h = case.inputs["h_scaled"]
    quant, loss, indices = model.quantize(h)
    assert torch.equal(indices.flatten(), case.outputs["idx"].flatten())
    assert_close(quant, case.outputs["quant"], 1e-5, "quant")
    assert_close(loss, case.outputs["emb_loss"], 1e-5, "emb_loss")
    assert_close(model.decode(h), case.outputs["dec"], 1e-5, "dec")
    assert_close(model.decode(h, True), case.outputs["dec_force_not_quantize"], 1e-5, "dec_force_not_quantize")
    assert_close(model.decode_tokens(indices), case.outputs["dec"], 1e-5, "decode_tokens")


def toy_perceptual(a: Tensor, b: Tensor) -> Tensor:
    return ((3 * a).sin() - (3 * b).sin()).square().mean(dim=(1, 2, 3), keepdim=True)


@golden.check(lambda c: "out/loss_gen" in c)
def autoencoder_losses(case: GoldenCase) -> None:
    """Both losses at the case's step, put together from the functions that the objective uses."""
    config, x = case.config, case.inputs["x"]
    cond = case.inputs.get("cond")
    assert config.get("disc_conditional", cond is not None) == (cond is not None)
    case.ignore("pixelloss_weight", "perceptual_loss", why="officially read and not used, and the toy of the notes")
    case.ignore("disc_in_channels", why="the discriminator's weights are stored")
    variational = "in/moments" in case
    weights = {k.removeprefix("discriminator."): v for k, v in case.state.items() if k.startswith("discriminator.")}

    def fresh() -> NLayerDiscriminator:
        net = NLayerDiscriminator(
            x.shape[1] + (0 if cond is None else cond.shape[1]),
            config.get("disc_ndf", 64),
            config.get("disc_num_layers", 3),
            config.get("use_actnorm", False),
        )
        net.load_state_dict(weights)
        return net.train()

    last = case.inputs["last_layer_weight"].clone().requires_grad_()
    recon = F.conv2d(case.inputs["h"], last, case.inputs["last_layer_bias"], padding=1)
    if "out/rec" in case:
        assert_close(recon, case.outputs["rec"], 1e-5, "rec")
    logvar = config.get("logvar_init", 0.0)
    if "logvar" in case.state:  # learned from there on; here the loss is a new one
        assert float(case.state["logvar"]) == pytest.approx(logvar, abs=1e-3)
        logvar = float(case.state["logvar"])
    nll, logs = reconstruction_loss(
        x,
        recon,
        toy_perceptual,
        config.get("perceptual_weight", 1.0),
        config.get("pixel_loss", "l1"),
        logvar,
        "sum" if variational else "mean",
    )
    factor = config.get("disc_factor", 1.0) * (config["global_step"] >= config["disc_start"])
    term, own = generator_term(fresh(), recon, nll, last, config.get("disc_weight", 1.0), cond)
    if config.get("disc_factor", 1.0) == 0 and variational:
        term, own["d_weight"] = 0 * term, torch.tensor(0.0)
    loss = nll + factor * term
    if variational:
        kl = DiagonalGaussian(case.inputs["moments"]).kl().mean()
        loss, logs["kl_loss"] = loss + config.get("kl_weight", 1.0) * kl, kl
        logs["logvar"] = torch.tensor(logvar)
    else:
        codebook = case.inputs["codebook_loss"]
        loss, logs["quant_loss"] = loss + config.get("codebook_weight", 1.0) * codebook, codebook
    if "predicted_indices" not in case.inputs:
        case.ignore("n_classes", why="of the codes, which the case has not")
    else:
        logs |= code_usage(case.inputs["predicted_indices"], config["n_classes"])
    (grad,) = torch.autograd.grad(loss, last)
    d_loss, d_logs = discriminator_term(fresh(), x, recon, config.get("disc_loss", "hinge"), cond)

    found = {**logs, **own, **d_logs, "total_loss": loss, "disc_factor": torch.tensor(float(factor))}
    found["disc_loss"] = factor * d_loss
    for name, want in case.outputs.items():
        if name.startswith("log_"):
            got = found.get(name.removeprefix("log_"), torch.tensor(0.0))
            assert_close(got.reshape(want.shape), want, 1e-4 if name == "log_d_weight" else 1e-5, name)
    assert_close(loss, case.outputs["loss_gen"], 1e-5, "loss_gen")
    assert_close(factor * d_loss, case.outputs["loss_disc"], 1e-5, "loss_disc")
    assert_close(grad, case.outputs["grad_last_layer"], 1e-4, "grad_last_layer")
    if "logits_fake_map" in case.outputs:
        assert_close(fresh()(recon), case.outputs["logits_fake_map"], 1e-5, "logits_fake_map")


def formula_weights(names: list[str]) -> dict[str, Tensor]:
    """The LPIPS weights that the golden case defines by formula, under their official names."""
    target = {k: v.shape for k, v in lpips.from_ours(LPIPS().state_dict()).items()}
    weights = {}
    for k, name in enumerate(names):
        shape = target[name]
        i = torch.arange(shape.numel(), dtype=torch.float64)
        if name.startswith("lin"):
            value = 0.1 * (0.7 * i + k).sin().abs()
        elif name.endswith("weight"):
            value = 1.4 * math.sqrt(2 / shape[1:].numel()) * (0.7 * i + k).sin()
        else:
            value = 0.05 * (0.3 * i + k).sin()
        weights[name] = value.float().view(shape)
    return weights


@golden.check(lambda c: "param_order" in c.config and "out/lpips" in c)
@torch.no_grad()
def lpips_formula_weights(case: GoldenCase) -> None:
    state = formula_weights(case.config["param_order"])
    assert lpips.CONVERTER.recognise(state)
    model = LPIPS()
    model.load_state_dict(lpips.to_ours(state))
    assert_close(model(case.inputs["a"], case.inputs["b"]), case.outputs["lpips"], 1e-4, "lpips")
    for i, tap in enumerate(model.features(case.inputs["a"])):
        if f"feat{i}_mean_abs" in case.outputs:
            assert_close(tap.abs().mean(), case.outputs[f"feat{i}_mean_abs"], 1e-4, f"feat{i}")


# -- golden cases of the U-Net and the text encoders ------------------------------------------------------------------


def unet_keywords(config: dict[str, Any]) -> dict[str, Any]:
    """Keywords of the official UNetModel -> ours, whose defaults are Stable Diffusion's."""
    given = {k: v for k, v in config.items() if k not in ("use_checkpoint", "use_fp16", "dims")}
    for name in ("num_heads", "num_head_channels", "num_heads_upsample"):
        given[name] = None if given.get(name, -1) == -1 else given[name]
    if given["num_heads"] is None:
        del given["num_heads"]
    official = {"use_spatial_transformer": False, "context_dim": None, "legacy": True, "channel_mult": (1, 2, 4, 8)}
    return official | given


def unet_of(config: dict[str, Any], state: dict[str, Tensor]) -> LDMUNet:
    network = LDMUNet(**unet_keywords(config)).eval()
    network.load_state_dict(LDM_UNET.to_ours(state))
    return network


@golden.check(lambda c: "UNetModel" in c.source and "out/out" in c)
@torch.no_grad()
def unet(case: GoldenCase) -> None:
    network = unet_of(case.config, case.state)
    assert_close(network(**case.inputs), case.outputs["out"], 1e-5, "out")
    x = case.inputs["x"]
    zero = [torch.zeros(())] * (len(network.skips) + 1)
    assert torch.equal(network(**case.inputs, control=zero), network(**case.inputs, control=[None] * len(zero)))
    assert LDM_UNET.from_ours(network.state_dict()).keys() == {f"model.diffusion_model.{k}" for k in case.state}
    assert network.in_channels == x.shape[1]


@golden.check(lambda c: "TransformerEmbedder" in c.source or "BERTEmbedder" in c.source)
@torch.no_grad()
def bert_text_encoder(case: GoldenCase) -> None:
    config = case.config
    assert BERT_TEXT.recognise(case.state)
    found = BERT_TEXT.config(case.state)
    wanted = {"width": "n_embed", "depth": "n_layer", "vocabulary": "vocab_size", "length": "max_seq_len"}
    wanted |= {"heads": "heads", "head_channels": "dim_head"}
    assert found == {ours: config[theirs] for ours, theirs in wanted.items()}
    encoder = BERTText(**found).eval()
    encoder.load_state_dict(BERT_TEXT.to_ours(case.state))
    assert_close(encoder(case.inputs["tokens"]), case.outputs["z"], 1e-5, "z")


def hashed(keys: dict[str, Any]) -> dict[str, Tensor]:
    """Weights that a golden case defines by a formula of their names' order."""
    weights = {}
    for k, name in enumerate(sorted(keys)):
        shape = tuple(keys[name])
        h = (np.arange(math.prod(shape), dtype=np.uint64) * 2654435761 + (k + 1) * 97531) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 2246822519) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 3266489917) & 0xFFFFFFFF
        r = torch.from_numpy((h ^ (h >> 16)).astype(np.float64) / 2**32 - 0.5) * math.sqrt(12)
        if len(shape) >= 2:
            r = 0.8 * r / math.sqrt(math.prod(shape) / shape[0])
        else:
            r = 1 + 0.1 * r if name.endswith("weight") else 0.05 * r
        weights[name] = r.float().view(shape)
    return weights


@golden.check(lambda c: c.kind == "sd_v1_full")
@torch.no_grad()
def whole_checkpoint(case: GoldenCase) -> None:
    """U-Net, first stage and text tower of one file, each through its own layout, which leaves the others alone."""
    config, state = case.config, hashed(case.config["keys"])
    assert {c.name for c in layouts.recognising(state)} == {"ldm-unet", "autoencoder-kl", "clip-text"}

    text = config["clip_text_config"]
    assert config["ddconfig"]["double_z"]
    case.ignore("clip_text_config.projection_dim", why="the file has no projection of the whole text")
    case.ignore("clip_text_config.eos_token_id", "clip_text_config.bos_token_id", why="the tokens are given")
    sizes = {"width": "hidden_size", "depth": "num_hidden_layers"}
    sizes |= {"vocabulary": "vocab_size", "length": "max_position_embeddings"}
    found = CLIP_TEXT.config(state)
    assert {k: found[k] for k in sizes} == {k: text[v] for k, v in sizes.items()}
    assert found.get("hidden", 4 * found["width"]) == text["intermediate_size"]
    # neither is in the shapes
    found |= {"heads": text["num_attention_heads"], "activation": text["hidden_act"].replace("_", "-")}
    tokens = case.inputs["tokens"]
    for name, options in {
        "context": {},
        "clip_hidden_minus2": {"skip": 1, "norm": False},
        "clip_penultimate_ln": {"skip": 1, "norm": True},
    }.items():
        tower = CLIPText(**{**found, **options}).eval()
        tower.load_state_dict(CLIP_TEXT.to_ours(state))
        context, pooled = tower.both(tokens)
        assert_close(context, case.outputs[name], 1e-5, name)
        assert_close(pooled, case.outputs["pooled"], 1e-5, "pooled")

    network = unet_of(config["unet_config"], state)
    eps = network(case.inputs["x"], case.inputs["t"], case.outputs["context"])
    assert_close(eps, case.outputs["eps"], 1e-5, "eps")

    stage = AutoencoderKL(**keywords({**config, "embed_dim": config["ddconfig"]["z_channels"]}),
                          scale_factor=config["scale_factor"])  # fmt: skip
    stage.load_state_dict(ck.CONVERTER_KL.to_ours(state))
    stage.eval()
    posterior = DiagonalGaussian(stage.encode(case.inputs["image"]))
    assert_close(posterior.mean, case.outputs["posterior_mean"], 1e-5, "posterior_mean")
    assert_close(posterior.logvar, case.outputs["posterior_logvar"], 1e-5, "posterior_logvar")
    assert_close(stage.decode(case.inputs["x"]), case.outputs["decoded"], 1e-5, "decoded")


# -- golden cases of objective and samplers ----------------------------------------------------------------------------


class Given(Request):
    """A request whose draws are those of a case."""

    def __init__(self, x: Tensor, draws: list[Tensor], **given: Any):
        super().__init__(shape=tuple(x.shape[1:]), generators=generators(range(len(x))), **given)
        self.draws = iter(draws)

    def randn(self, shape: tuple[int, ...] | None = None) -> Tensor:
        return next(self.draws)


SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}  # theirs: ours


def noise_levels(case: GoldenCase) -> dict[str, Any]:
    """Our keywords of the schedule that a config of the official make_beta_schedule says."""
    config = case.config
    if config.get("given_betas") is not None:
        return {"betas": list(config["given_betas"])}
    steps, schedule = config.get("timesteps", 1000), config.get("beta_schedule", "linear")
    if schedule == "cosine":
        case.ignore("linear_start", "linear_end", why="of schedules with ends")
        s = config.get("cosine_s", 8e-3)
        betas = betas_for_alpha_bar(steps, lambda t: math.cos((t + s) / (1 + s) * math.pi / 2) ** 2)
        return {"schedule": "cosine", "steps": steps} if s == 8e-3 else {"betas": betas.tolist()}
    case.ignore("cosine_s", why="of the cosine schedule")
    ends = {"beta_start": config.get("linear_start", 0.00085), "beta_end": config.get("linear_end", 0.012)}
    return {"schedule": SCHEDULES[schedule], "steps": steps, **ends}


def denoiser_of(network: Any, case: GoldenCase) -> Denoiser:
    return Denoiser(network, {"name": "vp-discrete", **noise_levels(case)}, "eps", time="index")


class Scalar(nn.Module):
    """The toy of the ddim and plms cases."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return 0.3 * x.tanh() + 0.001 * t.view(-1, 1, 1, 1).to(x) + c.view(-1, 1, 1, 1) * x.sin()


class Tokens(nn.Module):
    """The toy of the img2img and dpm-solver cases."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        m = c.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return (0.7 * x + m).tanh() * (0.5 + t.view(-1, 1, 1, 1).to(x) / 2000) + 0.1 * x.roll(1, dims=3)


@golden.check(lambda c: c.source.split("/")[-1] in ("ddim.py", "plms.py") and "out/trajectory" in c)
def ddim_and_plms(case: GoldenCase) -> None:
    config, x = case.config, case.inputs["x_T"]
    view = denoiser_of(Scalar(), case)
    noise, seen = list(case.inputs["noise"]), []
    given: dict[str, Any] = {"cond": {"c": case.inputs["c"]}, "null": {"c": case.inputs["uc"]}}
    if masked := "in/mask" in case:
        given |= {"images": case.inputs["x0"], "mask": case.inputs["mask"]}
        kept = list(case.inputs["q_noise"])
        noise = [n for pair in zip(kept, noise) for n in (pair if config["eta"] else pair[:1])]
    solver = "plms" if "plms" in case.source else "ddim"
    sampler = LDMSampler(steps=config["S"], solver=solver, eta=config["eta"], temperature=config["temperature"])
    if not config["eta"]:
        case.ignore("temperature", why="of noise that eta=0 does not add")
    if masked:
        sampler.pasted = lambda request, x: x  # the official samplers end without
    steps = official_timesteps(config["S"], config["timesteps"])
    assert torch.equal(steps, case.outputs["timesteps"])
    given["callback"] = lambda i, total, x, x0: seen.append((x, x0))
    request = Given(x, [x, *noise], guidance_scale=config["scale"], **given)
    got = sampler(view, request)
    at = view.path.t_of_timestep(steps)
    assert_close(view.path.alpha(at) ** 2, case.outputs["alphas"], 1e-5, "alphas")
    assert_close(torch.stack([s[0] for s in seen]), case.outputs["trajectory"][: len(seen)], 1e-5, "trajectory")
    assert_close(got, case.outputs["x"], 1e-5, "x")
    assert len(seen) == len(steps) and request.info["nfe"] == len(steps) * (1 + (config["scale"] != 1)) + (
        (1 + (config["scale"] != 1)) * (solver == "plms")
    )


@golden.check(lambda c: c.kind == "img2img")
def img2img(case: GoldenCase) -> None:
    config, x0 = case.config, case.inputs["x0"]
    view = denoiser_of(Tokens(), case)
    assert torch.equal(official_timesteps(config["ddim_steps"], 1000), case.outputs["timesteps"])
    assert int(config["strength"] * config["ddim_steps"]) == config["t_enc"]
    sampler = LDMSampler(steps=config["ddim_steps"], eta=config["eta"], strength=config["strength"])
    seen: list[Tensor] = []
    request = Given(
        x0,
        [case.inputs["encode_noise"], *case.inputs["step_noise"]],
        cond={"c": case.inputs["c"]},
        null={"c": case.inputs["uc"]},
        images=x0,
        guidance_scale=config["scale"],
        callback=lambda i, total, x, x0: seen.append(x),
    )
    got = sampler(view, request)
    assert_close(seen[0] if config["t_enc"] else got, case.outputs["z_enc"], 1e-5, "z_enc")
    assert_close(got, case.outputs["samples"], 1e-5, "samples")


@golden.check(lambda c: c.kind == "dpm_solver_pp")
def stable_diffusion_dpm_solver(case: GoldenCase) -> None:
    """The solver with the case's options; and the sampler, which has those of the official script."""
    config, x = case.config, case.inputs["x_T"]
    stated = {
        "order": 2,
        "method": "multistep",
        "skip_type": "time_uniform",
        "algorithm": "dpmsolver++ (predict_x0)",
        "lower_order_final": True,
        "thresholding": False,
    }
    asked = {k: config.get(k, v) for k, v in stated.items()}
    assert asked["method"] == "multistep", "officially reached by no script"
    view = denoiser_of(Tokens(), case)
    if asked == stated:
        sampler = LDMSampler(steps=config["steps"], solver="dpm-solver++")
        cond = {"cond": {"c": case.inputs["c"]}, "null": {"c": case.inputs["uc"]}}
        got = sampler(view, Given(x, [x], guidance_scale=config["scale"], **cond))
        assert_close(got, case.outputs["samples"], 1e-5, "samples")
    path, n = view.path, config["steps"] + 1
    if asked["skip_type"] == "logSNR":
        ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))
        times = path.t_of_logsnr(torch.linspace(*ends.tolist(), n, dtype=torch.float64))
    else:
        power = {"time_uniform": 1, "time_quadratic": 2}[asked["skip_type"]]
        times = torch.linspace(1.0, path.t_min ** (1 / power), n, dtype=torch.float64) ** power

    def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        t = times[i].expand(len(x))
        with_it, without = (view.predict(x, t, "eps", c=case.inputs[k]) for k in ("c", "uc"))
        eps = without + config["scale"] * (with_it - without)
        x0 = convert(eps, x, t, path, "eps", "x0")
        return (solvers.dynamic_threshold(x0, max_value=math.inf) if asked["thresholding"] else x0), eps

    got = solvers.dpm_solver(
        predict,
        x,
        path.alpha(times),
        path.sigma(times),
        order=asked["order"],
        algorithm=asked["algorithm"].split()[0],
        lower_order_final=asked["lower_order_final"],
    )
    assert_close(got, case.outputs["samples"], 1e-5, "samples of the solver")


@golden.check(lambda c: c.source.endswith("LatentDiffusion.p_losses"))
@torch.no_grad()
def denoising_loss(case: GoldenCase) -> None:
    config = case.config

    def toy(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x.tanh() + 0.001 * t.view(-1, 1, 1, 1).to(x)

    objective = LatentDiffusion(
        toy,  # type: ignore[arg-type]
        **noise_levels(case),
        prediction=config.get("parameterization", "eps"),
        error=config.get("loss_type", "l2"),
        simple_weight=config.get("l_simple_weight", 1.0),
        bound_weight=config.get("original_elbo_weight", 0.0),
        learn_logvar=config.get("learn_logvar", False),
        logvar=config.get("logvar_init", 0.0),
        posterior=config.get("v_posterior", 0.0),
    )
    if config.get("parameterization", "eps") != "eps":
        case.ignore("v_posterior", why="of the bound's weights of the noise")
    logvar = case.inputs["logvar"]
    if "logvar_init" in config and (logvar == logvar[0]).all():
        assert_close(objective.logvar.logvar, logvar, 1e-6, "logvar")
    else:
        case.ignore("logvar_init", why="the values that it became are stored")
    objective.logvar.logvar.copy_(logvar)
    path, out = objective.path, case.outputs
    assert_close(path.betas, out["betas"], 1e-5, "betas")
    assert_close(path.alphas_cumprod, out["alphas_cumprod"], 1e-5, "alphas_cumprod")
    assert_close(objective.weights, out["lvlb_weights"], 1e-5, "lvlb_weights")
    t = path.t_of_timestep(case.inputs["t"])
    x_t = path.add_noise(case.inputs["x0"].double(), case.inputs["noise"].double(), t)
    assert_close(x_t, out["x_noisy"], 1e-5, "x_noisy")
    loss, logs = objective.loss_of(case.inputs["x0"], t, case.inputs["noise"], {})
    assert_close(loss, out["loss"], 1e-5, "loss")
    assert_close(logs["simple"], out["loss_simple"], 1e-5, "loss_simple")
    if config.get("original_elbo_weight", 0.0):
        assert_close(logs["bound"], out["loss_vlb"], 1e-5, "loss_vlb")
    assert objective.learns == ("logvar" in objective.networks)


# -- golden cases of averages, schedules and the tasks -----------------------------------------------------------------


@golden.check(lambda c: c.source.endswith("ema.py"))
@torch.no_grad()
def averages(case: GoldenCase) -> None:
    config = case.config
    network = nn.Linear(*case.state["weight"].shape[::-1])
    network.load_state_dict(case.state)
    ema = EMA(network, {"decay": config["decay"], **({"warmup": 1} if config["use_num_updates"] else {})})
    for k, (w, b) in enumerate(zip(case.inputs["w_seq"], case.inputs["b_seq"])):
        network.weight.copy_(w)
        network.bias.copy_(b)
        ema.update()
        assert_close(ema.average["weight"], case.outputs["ema_w"][k], 1e-5, f"ema_w {k}")
        assert_close(ema.average["bias"], case.outputs["ema_b"][k], 1e-5, f"ema_b {k}")
    counted = ema.updates if config["use_num_updates"] else -1
    assert counted == int(case.outputs["num_updates"])


@golden.check(lambda c: c.config.get("cls") == "LambdaWarmUpCosineScheduler")
def cosine_schedule(case: GoldenCase) -> None:
    config = case.config
    setting = Optimizer(lr=config["lr_max"], warmup=config["warm_up_steps"], schedule="cosine",
                        warmup_from=config["lr_start"] / config["lr_max"], final_lr=config["lr_min"])  # fmt: skip
    got = [learning_rate(setting, n, config["max_decay_steps"]) for n in case.inputs["n"].tolist()]
    assert_close(torch.tensor(got, dtype=torch.float64), case.outputs["mult"], 1e-9, "mult")


@golden.check(lambda c: c.config.get("cls") in ("LambdaLinearScheduler", "LambdaWarmUpCosineScheduler2"))
def cycles_of_a_schedule(case: GoldenCase) -> None:
    """A recipe has one cycle; here each is a schedule of its own."""
    config = case.config
    linear = config["cls"] == "LambdaLinearScheduler"
    keys = ("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths")
    cycles = list(zip(*(config[k] for k in keys), strict=True))
    ends = np.cumsum([0, *config["cycle_lengths"]])
    got = []
    for n in case.inputs["n"].tolist():
        at = next(i for i in range(len(cycles)) if n <= ends[i + 1])
        warmup, low, high, start, length = cycles[at]
        setting = Optimizer(lr=high, warmup=warmup, warmup_from=start / high, final_lr=low, decay_in_warmup=linear,
                            schedule="linear" if linear else "cosine")  # fmt: skip
        got.append(learning_rate(setting, n - int(ends[at]), length))
    assert_close(torch.tensor(got, dtype=torch.float64), case.outputs["mult"], 1e-9, "mult")


@golden.check(lambda c: c.kind == "inpaint_condition")
@torch.no_grad()
def inpainting(case: GoldenCase) -> None:
    """What the published inpainting model is told, and how its answer is put into the picture."""
    config = case.config["first_stage"]
    assert not config["ddconfig"]["double_z"]
    case.ignore("first_stage.ddconfig.dropout", why="evaluated without dropout")
    case.ignore("first_stage.ddconfig.resolution", why="it places attention, of which there is none")
    codec = VQModel(**keywords(config)).eval()
    codec.load_state_dict(ck.CONVERTER_VQ.to_ours(hashed(case.config["keys"])))
    image = case.inputs["image"].permute(2, 0, 1)[None].float() / 127.5 - 1
    known = case.inputs["mask"][None, None] < 128
    condition = registry().build("condition", {
        "name": "mask", "size": 32, "image_channels": 3, "keyword": "concat", "picture": "concat", "invert": True,
        "fill": -1.0, "low": -1.0,
    })  # fmt: skip
    item = condition.joined(image, known)
    seen = condition.told(item)["concat"]
    assert_close(seen, torch.cat([case.outputs["masked_image"], case.outputs["mask"]], 1), 1e-6, "masked_image, mask")
    condition.latents, condition.codec = True, codec
    assert_close(condition.told(item)["concat"], case.outputs["condition"], 1e-5, "condition")
    decoded = codec.decode(case.inputs["latent_sample"])
    assert_close(decoded, case.outputs["decoded"], 1e-5, "decoded")
    pasted = torch.where(known, image, decoded.clamp(-1, 1))
    levels = ((pasted[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255)
    assert ((levels - case.outputs["inpainted"]).abs() <= 1.01).all()  # officially truncated


@golden.check(lambda c: c.kind == "spatial_rescaler")
@torch.no_grad()
def label_map(case: GoldenCase) -> None:
    config = case.config
    condition = SemanticMap(
        case.inputs["labels"].shape[-1],
        config["in_channels"],
        config["n_stages"],
        config["out_channels"],
        config["method"],
        multiplier=config.get("multiplier", 0.5),
        bias=config.get("bias", False),
    )
    condition.load_state_dict(hashed(config["keys"]))
    got = condition(case.inputs["labels"])
    assert_close(got, case.outputs["condition"], 1e-5, "condition")
    assert condition.null(1, torch.device("cpu"))["concat"].shape[1::2] == got.shape[1::2]


@golden.check(lambda c: c.kind == "layout_tokens")
def boxes(case: GoldenCase) -> None:
    config, given = case.config, (case.inputs[k].tolist() for k in ("classes", "boxes", "is_group"))
    objects = [Object(number, tuple(box), bool(group)) for number, box, group in zip(*given)]
    got = layout_tokens(
        objects,
        config["no_max_objects"],
        config["no_tokens"],
        config["no_object_classes"],
        crop=tuple(config["crop"]) if config["crop"] else WHOLE,
        flip=config["flip"],
        with_crop=config["encode_crop"],
        groups=config["use_group_parameter"],
    )
    assert got == case.outputs["tokens"].tolist()


@golden.check(lambda c: c.kind == "split_input")
def crops(case: GoldenCase) -> None:
    config = case.config
    clip = (config["clip_min_weight"], config["clip_max_weight"])
    tie = (config["clip_min_tie_weight"], config["clip_max_tie_weight"])
    if not config["tie_braker"]:
        case.ignore("clip_min_tie_weight", "clip_max_tie_weight", why="of a weight that tie_braker=false has not")

    def toy(x: Tensor, t: Tensor, concat: Tensor) -> Tensor:
        h, c = torch.cat([x, concat], 1), x.shape[1]
        mean = h.mean(dim=(1, 2, 3), keepdim=True)
        return (h[:, :c] - 0.5 * h[:, c:]).tanh() + 0.2 * mean + t.view(-1, 1, 1, 1) / 1000

    run = in_crops(toy, config["ks"], config["stride"], clip, tie if config["tie_braker"] else None)
    got, want = run(case.inputs["x"], case.inputs["t"], concat=case.inputs["condition"]), case.outputs["eps"]
    if config["tie_braker"] and want.isnan().all():  # one row or column of crops: officially 0 / 0
        assert got.isfinite().all()
    else:
        assert_close(got, want, 1e-5, "eps")


def channels_first(picture: Tensor) -> Tensor:
    return picture.permute(2, 0, 1)[None]


@golden.check(lambda c: c.kind == "bsr_parts")
def parts_of_a_degradation(case: GoldenCase) -> None:
    x, out, config = channels_first(case.inputs["image"]), case.outputs, case.config
    kernels = [anisotropic_kernel(k["ksize"], k["theta"], k["l1"], k["l2"]) for k in config["aniso"]]
    for i, kernel in enumerate(kernels):
        assert_close(kernel, out[f"aniso_{i}"], 1e-5, f"aniso_{i}")
    round_one = gaussian_kernel(config["fspecial"]["hsize"], config["fspecial"]["sigma"])
    assert_close(shifted_kernel(round_one, (config["shift_sf"] - 1) / 2), out["shift_pixel"], 1e-5, "shift_pixel")
    found = {
        "convolve_mirror": convolved(x, kernels[0]),
        "classical_x4": convolved(x, round_one, "wrap")[..., ::4, ::4],
    }
    for name, scale in (("half", 0.5), ("third", 1 / 3), ("x2", 2.0)):
        axes = [torch.from_numpy(matrix(n, output_size(n, scale), scale, centred=False)) for n in x.shape[2:]]
        found[f"imresize_{name}"] = separable(x, (None, axes[0], axes[1]))
    for name, got in found.items():
        assert_close(got, channels_first(out[name]), 1e-5, name)


class Drawn(bsr.Draws):
    """The draws of a case, in its order."""

    def __init__(self, case: GoldenCase):
        self.all, self.case = iter(case.config["draws"]), case

    def next(self, *kinds: str) -> Any:
        kind, value = next(self.all)
        assert kind in kinds
        return self.case.inputs[value].numpy() if isinstance(value, str) else value

    def share(self) -> float:
        return self.next("random.random", "np.random.rand")

    def between(self, low: float, high: float) -> float:
        value = self.next("random.uniform")
        assert low <= value <= high
        return value

    def whole(self, low: int, high: int) -> int:
        value = self.next("random.randint")
        assert low <= value <= high
        return value

    def one_of(self, options: Any) -> Any:
        return options[self.next("random.choice") - 1]  # OpenCV's numbers of interpolations

    def order(self, n: int) -> list[int]:
        return list(self.next("random.sample"))

    def shares(self, *shape: int) -> Any:
        return self.next("np.random.rand")

    def normal(self, std: float, *shape: int) -> Any:
        return self.next("np.random.normal")

    def correlated(self, covariance: Any, *shape: int) -> Any:
        return self.next("np.random.multivariate_normal")


@golden.check(lambda c: c.kind == "bsr_pipeline")
def degradation(case: GoldenCase) -> None:
    draws = Drawn(case)
    got = bsr.degraded(channels_first(case.inputs["image"])[0].float() / 255, case.config["sf"], draws)
    gap = ((got * 255).round() - channels_first(case.outputs["lr"])[0].float()).abs()
    assert gap.mean() <= 0.5 and not list(draws.all)


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- what the cases at hand do not have ------------------------------------------------------------------------------


def test_weights_of_the_bound_are_rounded_where_the_official_ones_are() -> None:
    path = Denoiser(Scalar(), {"name": "vp-discrete", "schedule": "sqrt", "steps": 50}, "eps", time="index").path
    for kind, posterior in (("eps", 0.0), ("eps", 0.3), ("x0", 0.0), ("v", 0.0)):
        weights = bound_weights(path, kind, posterior)  # type: ignore[arg-type]
        assert weights.dtype == torch.float32 and weights[0] == weights[1] and len(weights) == 50
    bar = path.alphas_cumprod.float()  # type: ignore[attr-defined]
    assert torch.equal(bound_weights(path, "x0")[1:], (0.5 * bar.sqrt() / (2 - bar))[1:])  # type: ignore[arg-type]
    given = LatentDiffusion(nn.Identity(), betas=[0.1, 0.2, 0.4], learn_logvar=True, bound_weight=1.0)
    assert len(given.weights) == len(given.logvar.logvar) == 3
    assert given.path.options() == {"betas": pytest.approx([0.1, 0.2, 0.4])}


def test_plms_keeps_what_a_mask_keeps_once_a_step() -> None:
    """The evaluation more of the first step is of the state as it is, and steps go on from the masked state."""
    path = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 99, "beta_start": 1e-3, "beta_end": 0.02}
    view = Denoiser(Scalar(), path, "eps", time="index")
    x, x0, *kept = torch.randn(5, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = official_timesteps(3, 99).flip(0)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    c = {"c": torch.tensor([0.1, -0.2])}
    sampler = LDMSampler(steps=3, solver="plms")
    sampler.pasted = lambda request, x: x  # type: ignore[method-assign]
    got = sampler(view, Given(x, [x, *kept], cond=c, images=x0, mask=mask))

    alpha = view.path.alpha(view.path.t_of_timestep(torch.cat([steps, torch.zeros(1, dtype=torch.long)])))  # type: ignore[attr-defined]
    sigma, old = (1 - alpha**2).sqrt(), []
    for i, t in enumerate(steps.tolist()):
        x = (alpha[i] * x0 + sigma[i] * kept[i]) * mask + (1 - mask) * x

        def step(eps: Tensor, x: Tensor = x, i: int = i) -> Tensor:
            return alpha[i + 1] * (x - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps

        old.append(Scalar()(x.float(), torch.full((2,), t), **c))
        if i == 0:
            more = Scalar()(step(old[0]).float(), steps[1:2].expand(2), **c)
            x = step((old[0] + more) / 2)
        else:
            x = step((3 * old[1] - old[0]) / 2 if i == 1 else (23 * old[2] - 16 * old[1] + 5 * old[0]) / 12)
    assert_close(got, x, 1e-5, "x")


def test_heads_of_the_decoder_alone_are_of_legacy_attention() -> None:
    own = {"model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (1,),
           "use_spatial_transformer": False, "num_heads": 4, "num_heads_upsample": 2, "image_size": 4}  # fmt: skip
    for legacy in (True, False):
        network = LDMUNet(**own, legacy=legacy)
        assert network.output_blocks[0][1].heads == (2 if legacy else 4) and network.input_blocks[1][1].heads == 4


def test_objects_beyond_the_most_are_left_out_before_those_that_nobody_sees() -> None:
    inside, outside = Object(1, (0.1, 0.1, 0.2, 0.2)), Object(2, (0.8, 0.8, 0.1, 0.1))
    kept = layout_tokens([outside, inside, inside], 2, 64, 5, crop=(0.0, 0.0, 0.5, 0.5))
    assert kept[0] == 1 and kept[3:] == [63] * 3


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {  # encoder, decoder, total: instantiated official code
    "kl-f4": (22_351_238, 32_960_771, 55_312_063),
    "kl-f8": (34_163_592, 49_490_179, 83_653_863),
    "kl-f16": (28_265_760, 41_343_875, 69_610_963),
    "kl-f32": (42_614_656, 61_244_803, 103_880_131),
    "kl-f16-mar": (28_265_760, 38_188_931, 66_456_019),  # of MAR
    "vq-f4": (22_337_411, 32_960_771, 55_322_782),
    "vq-f4-noattn": (21_285_763, 31_909_123, 53_219_486),
    "vq-f8": (27_397_764, 40_253_955, 67_717_295),
    "vq-f8-n256": (27_397_764, 40_253_955, 67_652_783),
    "vq-f16": (28_155_144, 41_307_011, 69_593_371),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", ["model", "codec"])
@pytest.mark.parametrize("name", SIZES)
def test_preset_size(name: str, kind: str) -> None:
    component = "autoencoder-kl" if name in KL else "vq-autoencoder"
    with torch.device("meta"):
        model = registry().build(kind, {"name": component, "preset": name})
        x = torch.empty(1, 3, 256, 256)
    assert (count(model.encoder), count(model.decoder), count(model)) == SIZES[name]
    assert isinstance(model, Codec)
    latent = model.latent_shape((3, 256, 256))
    assert model.latents(model.encode(x)).shape == (1, *latent)
    assert model.decode(torch.empty(1, *latent, device="meta")).shape == x.shape


def test_every_preset_is_counted() -> None:
    assert set(SIZES) == {*KL, *VQ}
    assert set(UNETS) == set(PRESETS)


UNETS = {  # instantiated official code
    "cin256-v2": 400_920_579,
    "cin256": 394_984_196,
    "faces256": 274_056_163,
    "lsun_churches256": 294_966_916,
    "text2img256": 403_623_939,
    "txt2img-1p4B": 872_300_484,
    "sd1": 859_520_964,
    "sd2": 865_910_724,
    "sdxl": 2_567_463_684,
    "bsr_sr": 113_622_563,
    "inpainting_big": 387_245_827,
    "semantic_synthesis256": 215_229_315,
    "layout2img256": 246_277_379,
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_preset(name: str) -> None:
    """Its published size; and its shapes alone say which network it is."""
    with torch.device("meta"):
        network = registry().build("model", {"name": "ldm-unet", "preset": name})
    assert count(network) == UNETS[name]
    assert preset_of(shapes(network.state_dict())) == name
    assert header(PRESETS[name])["data"]["sample_shape"] == list(network.sample_shape)


@pytest.mark.parametrize(
    "options",
    [
        {"num_res_blocks": (1, 3)},
        {"num_res_blocks": (2, 1), "conv_resample": False},
        {"num_res_blocks": (2, 1), "resblock_updown": True},
        {"num_res_blocks": 2, "num_attention_blocks": (1, 2)},
        {"num_res_blocks": 2, "attention_resolutions": (2,), "num_attention_blocks": (0, 1)},
        {"disable_middle_self_attn": True},
    ],
    ids=str,
)
def test_uneven_networks_are_read_off_their_shapes(options: dict[str, Any]) -> None:
    """A network of these keywords is made again from its state alone; diffusers' has no such levels."""
    plain = {"image_size": 8, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": (2, 1)}
    plain |= {"channel_mult": (1, 2), "context_dim": 16}
    with torch.device("meta"):
        state = LDMUNet(**{**plain, **options}).state_dict()
        again = LDMUNet(**shapes(state)).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}
    assert {k: shapes(state)[k] for k in options} == options
    with pytest.raises(VgmError, match="diffusers"):
        diffusers_allows({**plain, **options})


def test_a_config_json_of_another_function_is_refused() -> None:
    assert from_diffusers({"num_attention_heads": 3, "attention_head_dim": 8, "freq_shift": 0})["num_heads"] == 3
    for said in ({"act_fn": "gelu"}, {"freq_shift": 1}, {"center_input_sample": True}):
        with pytest.raises(VgmError, match="no counterpart"):
            from_diffusers(said)


@pytest.mark.parametrize("options", [{}, {"out_channels": None}, {"multiplier": 0.25, "bias": True}], ids=str)
def test_maps_of_labels_as_the_network_expects_them(options: dict[str, Any]) -> None:
    condition = SemanticMap(18, classes=5, stages=2, **options)
    got = condition(torch.randint(0, 5, (2, 18, 18)))
    assert got.shape[1:] == condition.null(1, got.device)["concat"].shape[1:]
    with pytest.raises(VgmError, match="nothing is left"):
        SemanticMap(18, stages=5, **options)


TOWERS = {"sd1": 123_060_480, "sdxl-l": 123_060_480, "sd2": 354_032_640, "sdxl-g": 694_659_840}


@pytest.mark.parametrize("name", TOWERS)
def test_text_tower_preset(name: str) -> None:
    with torch.device("meta"):
        assert count(registry().build("condition", {"name": "clip-text", "preset": name})) == TOWERS[name]


def test_published_discriminator_and_lpips_sizes() -> None:
    with torch.device("meta"):
        assert count(registry().build("model", {"name": "patchgan"})) == 2_765_633
        assert count(registry().build("model", {"name": "lpips"})) == 14_714_688 + 64 + 128 + 256 + 512 + 512


# -- codecs ----------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "ch": 8,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "resolution": 16,
    "z_channels": 4,
    "embed_dim": 3,
    "norm_groups": 4,
}


def tiny(cls: Any = AutoencoderKL, **more: Any) -> Any:
    torch.manual_seed(0)
    return cls(**{**TINY, **({"n_embed": 16} if cls is VQModel else {}), **more}).eval()


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModel])
@torch.no_grad()
def test_scaling_is_undone_by_decode(cls: type) -> None:
    x, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 4, 4)
    plain, scaled = tiny(cls), tiny(cls, scale_factor=0.3, shift_factor=0.5, latent_stats=True)
    scaled.load_state_dict({**plain.state_dict(), "latent_mean": torch.arange(3.0), "latent_std": torch.ones(3) * 2})
    z, z_scaled = plain.latents(plain.encode(x), noise), scaled.latents(scaled.encode(x), noise)
    want = ((z - torch.arange(3.0)[:, None, None]) / 2 - 0.5) * 0.3
    torch.testing.assert_close(z_scaled, want)
    torch.testing.assert_close(scaled.decode(z_scaled), plain.decode(z))


def test_latent_statistics_follow_training() -> None:
    model = tiny(latent_stats=True)
    x, noise = 3 * torch.randn(4, 3, 16, 16), torch.randn(4, 3, 4, 4)
    model.train()
    for _ in range(300):
        model(x, noise)
    with torch.no_grad():
        model(5 * x, noise)  # no gradients, no measurement: the discriminator's pass
        model.eval()
        z = model.latents(model.encode(x), noise)
    assert z.mean(dim=(0, 2, 3)).abs().max() < 0.02 and (z.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    model.measure(torch.randn(64, 3, 8, 8) * 4 + 1)
    assert (model.latent_std - 4).abs().max() < 0.3 and (model.latent_mean - 1).abs().max() < 0.3


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModel])
@torch.no_grad()
def test_tiles(cls: type) -> None:
    whole, tiles = tiny(cls), tiny(cls, tile=32, tile_overlap=0.25)
    small, large = torch.randn(1, 3, 32, 24), torch.randn(1, 3, 72, 100)
    assert torch.equal(tiles.encode(small), whole.encode(small))
    z = whole.latents(whole.encode(small))
    assert torch.equal(tiles.decode(z), whole.decode(z))
    moments = tiles.encode(large)
    assert moments.shape == whole.encode(large).shape
    assert tiles.decode(tiles.latents(moments)).shape == large.shape
    with pytest.raises(VgmError, match="multiple"):
        tiny(cls, tile=30)


def test_tiles_blend_without_seams() -> None:
    """A function of single pixels is the same in tiles, at any factor; memory stays at one tile."""
    x, seen = torch.randn(2, 3, 50, 37), []

    def double(part: Tensor) -> Tensor:
        seen.append(part.shape[2:])
        return F.interpolate(part * 2, scale_factor=2.0)

    torch.testing.assert_close(tiled(double, x, 16, 0.5), double(x))
    assert len(seen) > 10 and all(max(s) <= 16 for s in seen[:-1])
    torch.testing.assert_close(tiled(lambda p: F.avg_pool2d(p, 2), x[..., :36], 16, 0.0), F.avg_pool2d(x[..., :36], 2))


def test_codecs_refuse_what_does_not_fit() -> None:
    with pytest.raises(VgmError, match="channels"):
        tiny().latent_shape((1, 16, 16))
    with pytest.raises(VgmError, match="divide"):
        tiny().latent_shape((3, 18, 16))
    with pytest.raises(VgmError, match="norm_groups"):
        tiny(norm_groups=3)
    with pytest.raises(VgmError, match="tile_overlap"):
        tiny(tile_overlap=1.0)
    assert tiny().latent_shape((3, 16, 32)) == (3, 4, 8)


def test_vq_tokens_and_gradients() -> None:
    model = tiny(VQModel)
    model.quantize.embedding.weight.data.normal_()
    x = torch.randn(2, 3, 16, 16)
    tokens = model.tokens(x)
    assert tokens.shape == (2, 4, 4) and tokens.dtype == torch.int64
    with torch.no_grad():
        torch.testing.assert_close(model.decode_tokens(tokens), model.decode(model.latents(model.encode(x))))
    losses = {}
    for legacy in (True, False):
        quantize = tiny(VQModel, legacy=legacy, beta=0.1).quantize
        z = torch.randn(2, 3, 4, 4, requires_grad=True)
        out, loss, _ = quantize(z)
        (out.sum() + loss).backward()
        losses[legacy] = z.grad - 1  # straight-through gradient is 1
    torch.manual_seed(1)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    for legacy, weight in ((True, 1.0), (False, 0.1)):
        z.grad = None
        quantize = tiny(VQModel, legacy=legacy, beta=0.1).quantize
        out, loss, _ = quantize(z)
        loss.backward()
        torch.testing.assert_close(z.grad, weight * 2 * (z - out).detach() / z.numel(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [
    {"attn_type": "linear", "attn_resolutions": (8,)},
    {"attn_type": "none", "attn_resolutions": (16,)},
    {"resamp_with_conv": False, "tanh_out": True},
    {"ch_mult": (1, 2), "in_channels": 1, "out_ch": 2, "dropout": 0.5, "attn_resolutions": (16, 8)},
])  # fmt: skip
@torch.no_grad()
def test_other_options_run(options: dict[str, Any]) -> None:
    model = tiny(**options)
    x = torch.randn(1, model.encoder.conv_in.in_channels, 16, 16)
    out = model.decode(model.latents(model.encode(x)))
    assert out.shape == (1, model.decoder.conv_out.out_channels, 16, 16) and out.isfinite().all()
    if model.decoder.tanh_out:
        assert out.abs().max() <= 1
    state = {f"first_stage_model.{k}": v for k, v in model.state_dict().items()}
    read = ck.CONVERTER_KL.config({**state, "model.diffusion_model.x": x})
    again = AutoencoderKL(**{**read, "resolution": 16, "attn_resolutions": options.get("attn_resolutions", ()),
                             "norm_groups": 4, "tanh_out": model.decoder.tanh_out})  # fmt: skip
    again.load_state_dict(ck.CONVERTER_KL.to_ours(state))
    assert torch.equal(again.eval().decode(again.latents(again.encode(x))), out)


def test_linear_attention_by_hand() -> None:
    model = tiny(attn_type="linear").encoder.mid.attn_1
    x = torch.randn(2, 16, 3, 5)
    q, k, v = model.to_qkv(x).view(2, 3, 16, 15).unbind(1)
    context = torch.einsum("bdn,ben->bde", k.softmax(-1), v)
    want = model.to_out(torch.einsum("bde,bdn->ben", context, q).reshape(2, 16, 3, 5))
    torch.testing.assert_close(model(x), want)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        model = tiny(attn_resolutions=(16,))
        model.checkpointing = on
        assert model.checkpointing is on
        model(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 4, 4))[0].square().sum().backward()
        gradients.append(model.encoder.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "converter"), [(AutoencoderKL, ck.CONVERTER_KL), (VQModel, ck.CONVERTER_VQ)])
def test_official_checkpoint(cls: Any, converter: Layout) -> None:
    """Lightning's file, bare names or inside a diffusion model; losses dropped; configuration read off the shapes."""
    model = tiny(cls, resolution=256, ch=32, norm_groups=32, attn_resolutions=(128,))
    weights = model.state_dict()
    noise = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(1), "betas": torch.ones(9)}
    inside = {**{PREFIX + k: v for k, v in weights.items()}, "model.diffusion_model.out.weight": torch.zeros(2)}
    measured = {**inside, "scale_factor": torch.tensor(0.7)}
    assert "scale_factor" not in converter.config(inside)
    assert math.isclose(converter.config(measured)["scale_factor"], 0.7, rel_tol=1e-6)
    for state in (unwrap({"state_dict": {**weights, **noise}, "epoch": 3}), inside):
        assert converter.recognise(state)
        other = ck.CONVERTER_VQ if cls is AutoencoderKL else ck.CONVERTER_KL
        assert not other.recognise(state)
        again = cls(**converter.config(state))
        again.load_state_dict(converter.to_ours(state))
    assert all(torch.equal(v, weights[k]) for k, v in converter.to_ours(converter.from_ours(weights)).items())
    with pytest.raises(KeyError):
        converter.to_ours({k: v for k, v in weights.items() if k != "quant_conv.weight"})


@pytest.mark.parametrize("name", SIZES)
def test_published_configuration_is_read_off_the_shapes(name: str) -> None:
    cls, presets = (AutoencoderKL, KL) if name in KL else (VQModel, VQ)
    with torch.device("meta"):
        state = cls(**presets[name]).state_dict()
    want = {k: sorted(v) if k == "attn_resolutions" else v for k, v in presets[name].items()}
    read = ck.config_from(state)
    assert {**read, "attn_resolutions": sorted(read["attn_resolutions"])} == want


def test_diffusers_forward_parity_and_round_trip() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {**TINY, "embed_dim": 4, "ch_mult": (1, 2, 2), "in_channels": 3, "scale_factor": 0.5, "shift_factor": 0.25}
    model = AutoencoderKL(**config).eval()
    theirs_config = ck.diffusers_config(config)
    theirs = diffusers.AutoencoderKL.from_config(theirs_config).eval()
    state = ck.DIFFUSERS.from_ours(model.state_dict())
    assert ck.DIFFUSERS.recognise(state) and not ck.CONVERTER_KL.recognise(state)
    theirs.load_state_dict(state)  # strict
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        moments = model.encode(x)
        assert_close(moments, theirs.encode(x).latent_dist.parameters, 1e-5, "moments")
        z = torch.randn(2, 4, 4, 6)
        assert_close(model.decode(z), theirs.decode(z / 0.5 + 0.25).sample, 1e-5, "decoded")
    back = ck.DIFFUSERS.to_ours(theirs.state_dict())
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.items())
    again = AutoencoderKL(**ck.config_from_diffusers(dict(theirs.config)))
    again.load_state_dict(back)
    assert (again.scale_factor, again.shift_factor) == (0.5, 0.25)
    assert ck.DIFFUSERS.config(state)["ch_mult"] == (1, 2, 2)
    old = dict(state)
    for before, now in ck.OLD_ATTENTION.items():
        old = {k.replace(now, before): v for k, v in old.items()}
    assert all(torch.equal(v, back[k]) for k, v in ck.DIFFUSERS.to_ours(old).items())


def test_diffusers_without_the_small_convolutions() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = {**TINY, "embed_dim": 4, "in_channels": 3}
    theirs = diffusers.AutoencoderKL.from_config(
        {**ck.diffusers_config(config), "use_quant_conv": False, "use_post_quant_conv": False}
    ).eval()
    model = AutoencoderKL(**config).eval()
    model.load_state_dict(ck.DIFFUSERS.to_ours(theirs.state_dict()))
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert_close(model.encode(x), theirs.encode(x).latent_dist.parameters, 1e-5, "moments")


def test_diffusers_refuses_what_it_cannot_hold() -> None:
    for more in ({"attn_resolutions": (16,)}, {"latent_stats": True}):
        with pytest.raises(VgmError, match="no place"):
            ck.DIFFUSERS.from_ours(tiny(**more).state_dict())
    config = {**ck.diffusers_config({**TINY, "in_channels": 3}), "down_block_types": ["AttnDownEncoderBlock2D"]}
    with pytest.raises(VgmError, match="no counterpart"):
        ck.config_from_diffusers(config)


# -- perceptual and adversarial losses ---------------------------------------------------------------------------------


def test_lpips_files(tmp_path: Path) -> None:
    """torchvision's VGG16 and the package's heads from two pickles; no distance to itself; gradients flow."""
    order = [k for k in lpips.from_ours(LPIPS().state_dict()) if not k.startswith("scaling")]
    order.sort(key=lambda k: k.startswith("lin"))
    official = formula_weights(order)
    heads = {k: v for k, v in official.items() if k.startswith("lin")}
    vgg = {"features." + k.split(".", 2)[2]: v for k, v in official.items() if k.startswith("net")}
    vgg["classifier.0.weight"] = torch.zeros(3)
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "heads.pth")
    model = LPIPS(str(tmp_path / "vgg16.pth"), str(tmp_path / "heads.pth"))
    model.train()
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    d = model(a, b)
    assert d.shape == (2, 1, 1, 1) and (d > 0).all() and torch.equal(d, model(a, b))
    assert model(a, a).abs().max() == 0
    d.sum().backward()
    assert b.grad.abs().sum() > 0 and not any(p.requires_grad for p in model.parameters())
    grey = a[:, :1]
    torch.testing.assert_close(model(grey, b[:, :1]), model(grey.repeat(1, 3, 1, 1), b[:, :1].repeat(1, 3, 1, 1)))
    again = lpips.to_ours(lpips.from_ours(model.state_dict()))
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())
    with pytest.raises(VgmError, match="16 pixels"):
        model(a[..., :8, :8], b[..., :8, :8])


def test_lpips_without_weights_says_where_they_are(tmp_path: Path) -> None:
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(VgmError, match="no weights") as e:
        LPIPS()(x, x)
    assert e.value.code == 4 and "vgg16" in e.value.hint
    with pytest.raises(VgmError, match="both"):
        LPIPS(vgg="a.pth")
    with pytest.raises(VgmError, match="no such file"):
        LPIPS(str(tmp_path / "a.pth"), str(tmp_path / "b.pth"))
    (tmp_path / "a.pth").write_bytes(b"junk")
    with pytest.raises(VgmError, match="neither an archive nor a pickle"):
        LPIPS(str(tmp_path / "a.pth"), str(tmp_path / "a.pth"))


def test_actnorm_discriminator_initialises_once() -> None:
    net = NLayerDiscriminator(3, ndf=4, n_layers=2, use_actnorm=True)
    x = torch.randn(4, 3, 32, 32)
    net.eval()(x)
    assert not net.main[3].initialized
    net.train()(x)
    assert net.main[3].initialized
    before = net.main[3].loc.clone()
    net(5 * x)
    assert torch.equal(net.main[3].loc, before)
    again = NLayerDiscriminator(3, ndf=4, n_layers=2, use_actnorm=True)
    again.load_state_dict(net.state_dict())
    again.train()(9 * x)
    assert torch.equal(again.main[3].loc, before)


def test_adaptive_weight_balances_gradients() -> None:
    layer = torch.ones(4, requires_grad=True)
    rec, adv = (3 * layer).sum(), -(0.5 * layer).sum()
    weight = adaptive_weight(rec, adv, layer, 0.8)
    assert math.isclose(weight.item(), 0.8 * 6 / (1 + 1e-4), rel_tol=1e-5)
    assert adaptive_weight(1e9 * rec, adv * 0, layer).item() == 1e4


# -- training ----------------------------------------------------------------------------------------------------------


def train(objective: AutoencoderObjective, x: Tensor, steps: int, lr: float = 3e-3) -> dict[str, list[float]]:
    """The trainer's loop in small: one optimizer per phase, every other network frozen."""
    assert isinstance(objective, Objective)
    phases = objective.phases()
    optimizers = {
        p.name: torch.optim.Adam([q for r in p.trains for q in objective.networks[r].parameters()], lr) for p in phases
    }
    history: dict[str, list[float]] = {}
    for network in objective.networks.values():
        network.train()
    for i in range(steps):
        for phase in phases:
            for role, network in objective.networks.items():
                network.requires_grad_(role in phase.trains)
            loss, logs = objective.loss(phase.name, {"x": x}, Step(index=i))
            loss.backward()
            optimizers[phase.name].step()
            optimizers[phase.name].zero_grad()
            for k, v in {f"{phase.name}/loss": loss, **logs}.items():
                assert v.isfinite().all()
                history.setdefault(k, []).append(v.item())
    return history


def blobs(n: int, size: int = 16, channels: int = 3) -> Tensor:
    """Smooth colourful images in [-1, 1]: (n, channels, size, size)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).clamp(-1, 1)


class Toy(nn.Module):
    """A perceptual distance without weights."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return toy_perceptual(a, b)


@pytest.mark.parametrize(("cls", "share"), [(AutoencoderKL, 0.4), (VQModel, 0.8)])
def test_training_lowers_the_loss(cls: type, share: float) -> None:
    history = train(AutoencoderObjective(tiny(cls), reduction="mean"), blobs(8), 100)
    assert history["rec_loss"][-1] < share * history["rec_loss"][0]
    assert "d_weight" not in history and ("perplexity" in history) == (cls is VQModel)


def test_two_phases_start_the_discriminator_late() -> None:
    model, disc = tiny(), NLayerDiscriminator(3, ndf=4, n_layers=1)
    before = {k: v.clone() for k, v in disc.state_dict().items()}
    objective = AutoencoderObjective(model, disc, Toy(), disc_start=2, kl_weight=1e-3)
    assert [(p.trains, p.optimizer) for p in objective.phases()] == [
        (("model",), "main"),
        (("discriminator",), "discriminator"),
    ]
    history = train(objective, blobs(4), 2)
    assert "g_loss" not in history and history["discriminator/loss"] == [0.0, 0.0]
    assert all(torch.equal(v, before[k]) for k, v in disc.state_dict().items())
    objective.disc_start = 0
    weights = model.state_dict()["encoder.conv_in.weight"].clone()
    history = train(objective, blobs(4), 2)
    assert {"g_loss", "d_weight", "kl_loss", "p_loss", "logits_real"} <= history.keys()
    assert history["discriminator/loss"][0] > 0
    assert not torch.equal(disc.state_dict()["main.0.weight"], before["main.0.weight"])
    assert not torch.equal(model.state_dict()["encoder.conv_in.weight"], weights)
    assert objective.view() == {"name": "codec"}


def test_code_usage() -> None:
    even, one = code_usage(torch.arange(8).repeat(5), 16), code_usage(torch.full((3, 4, 4), 5), 16)
    assert math.isclose(even["perplexity"].item(), 8, rel_tol=1e-5) and even["cluster_usage"] == 8
    assert math.isclose(one["perplexity"].item(), 1, rel_tol=1e-5) and one["cluster_usage"] == 1


def test_mean_and_sum_are_the_same_objective() -> None:
    model, x = tiny(), blobs(4)
    values = [
        AutoencoderObjective(model, kl_weight=0.1, reduction=r).loss("autoencoder", {"x": x}, Step(0))[0].item()
        for r in ("sum", "mean")
    ]
    assert math.isclose(values[0] / x[0].numel(), values[1], rel_tol=1e-5)


# -- shipped codec and recipes -----------------------------------------------------------------------------------------


def test_shipped_mnist_codec() -> None:
    """Crisp reconstructions and latents of unit deviation on the shipped digits."""
    from importlib import resources

    from safetensors import safe_open

    from vgm_cli.data import open_dataset

    path = resources.files("vgm_cli") / "assets" / "mnist-codec.safetensors"
    with safe_open(str(path), framework="pt") as f:
        state = {k: f.get_tensor(k).float() for k in f.keys()}
        component = json.loads(f.metadata()["vgm.component"])
    model = registry().build(component["kind"], {"name": component["name"], **component["kwargs"]})
    model.load_state_dict(state)
    model.eval()
    assert model.latent_shape((1, 28, 28)) == (4, 7, 7)
    x = open_dataset("mnist5k").pixels(range(0, 5000, 50))  # (100, 1, 28, 28)
    with torch.no_grad():
        moments = model.encode(x)
        noise = torch.randn(moments.shape[0], 4, 7, 7, generator=torch.Generator().manual_seed(0))
        z = model.latents(moments, noise)
        mse = (model.decode(z).clamp(-1, 1) - x).square().mean() / 4
    assert -10 * mse.log10() > 27
    assert (z.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1 and z.mean(dim=(0, 2, 3)).abs().max() < 0.1


# -- tokenizers and conditions -----------------------------------------------------------------------------------------

TEXTS = [
    "", "a red apple", "Hello, World!!  it's 2025", "naïve café ½ x² ß ÀÉ", "日本語 and emoji 🍎", "don't we'll I'D",
    "a_b-c_d 'quoted' '' ...", "supercalifragilisticexpialidocious " * 8, "tab\tnewline\nend", "ǅ Ⅷ ½ ٣",
]  # fmt: skip


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary of byte pairs, as OpenAI's text file and as transformers' folder."""
    folder = tmp_path_factory.mktemp("clip")
    merges = [("r", "e"), ("re", "d</w>"), ("a", "p"), ("ap", "p"), ("app", "l"), ("appl", "e</w>"), ("l", "l"),
              ("h", "e"), ("he", "ll"), ("hell", "o</w>"), ("Ã", "©</w>")]  # fmt: skip
    (folder / "bpe.txt").write_text("#version\n" + "\n".join(map(" ".join, merges)))
    (folder / "hf").mkdir()
    (folder / "hf" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
    (folder / "hf" / "vocab.json").write_text(json.dumps(clip_vocabulary(merges)))
    return folder


def test_clip_tokenizer_is_transformers(clip_files: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = {p: str(clip_files / "hf" / p) for p in ("vocab.json", "merges.txt")}
    theirs = transformers.CLIPTokenizerFast(
        json.loads(Path(names["vocab.json"]).read_text()),
        [tuple(line.split()) for line in Path(names["merges.txt"]).read_text().splitlines()[1:]],
    )
    ours = clip_tokenizer(str(clip_files / "hf"))
    for text in TEXTS:
        want = theirs(text, padding="max_length", truncation=True, max_length=20)["input_ids"]
        assert ours(text, 20) == want, text
    assert clip_tokenizer(str(clip_files / "bpe.txt")).ids == ours.ids
    assert clip_tokenizer(str(clip_files / "bpe.txt"), pad=0)("red", 5)[-2:] == [0, 0]


@pytest.fixture(scope="module")
def bert_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "app", "##le", "hello", ",", "!", "it", "'", "s", "cafe",
              "na", "##ive", "20", "##25", "日", "and", "world", "t", "don", "##s", "-", "_", "b", "c", "d"]  # fmt: skip
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(pieces), encoding="utf-8")
    return path


def test_bert_tokenizer_is_transformers(bert_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = {p: i for i, p in enumerate(bert_file.read_text(encoding="utf-8").splitlines())}
    theirs = transformers.BertTokenizerFast(vocabulary)
    ours = bert_tokenizer(str(bert_file))
    for text in TEXTS:
        want = theirs(text, padding="max_length", truncation=True, max_length=20)["input_ids"]
        assert ours(text, 20) == want, text


def test_tokenizers_say_what_they_want(clip_files: Path, bert_file: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\nb")
    for wrong in (None, str(tmp_path / "none"), str(tmp_path)):
        for read in (clip_tokenizer, bert_tokenizer):
            with pytest.raises(VgmError) as e:
                read(wrong)
            assert e.value.code == 4 and e.value.hint
    with pytest.raises(VgmError, match="numbers"):
        CLIPText(width=8, depth=1, heads=1, tokenizer=str(clip_files / "hf")).encode(["a"], torch.device("cpu"))


def test_conditions_of_texts_and_classes(clip_files: Path, bert_file: Path) -> None:
    cpu, words = torch.device("cpu"), ["red apple", "hello"]
    vocabulary = clip_tokenizer(str(clip_files / "hf")).size
    tower = {"width": 8, "depth": 2, "heads": 2, "vocabulary": vocabulary, "length": 6}
    given = {
        "clip-text": {**tower, "tokenizer": str(clip_files / "hf")},
        "sdxl-text": {"clip": tower, "open_clip": {**tower, "head": 5, "pad": 0}, "sinusoids": 4, "size": 64,
                      "tokenizer": str(clip_files / "hf")},
        "bert-text": {"width": 8, "depth": 1, "vocabulary": 30, "length": 6, "tokenizer": str(bert_file)},
        "class-token": {"num_classes": 3, "width": 8},
    }  # fmt: skip
    for name, options in given.items():
        condition = registry().build("condition", {"name": name, **options})
        condition.requires_grad_(False)
        items = condition.parse(["1", "2"] if name == "class-token" else words)
        found, null = condition.encode(items, cpu), condition.null(2, cpu)
        example = condition.example(2, cpu)
        assert found.keys() == null.keys() == example.keys()
        for key, value in found.items():
            assert value.shape == null[key].shape == example[key].shape
            assert not torch.equal(value[0], value[1]) and torch.equal(null[key][0], null[key][1])
    assert set(found) == {"context"} and found["context"].shape == (2, 1, 8)


@pytest.fixture(scope="module")
def whole_file(clip_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small Stable Diffusion 1: U-Net, first stage and text tower in one file, under the official names."""
    torch.manual_seed(0)
    sizes = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (1, 2)}
    unet = LDMUNet(image_size=8, in_channels=4, context_dim=64, num_heads=8, **sizes)
    stage = AutoencoderKL(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, embed_dim=4)
    text = CLIPText(width=64, depth=1, heads=1, vocabulary=clip_tokenizer(str(clip_files / "hf")).size, length=10)
    state = {
        **LDM_UNET.from_ours(unet.state_dict()),
        **{PREFIX + k: v for k, v in stage.state_dict().items()},
        **{"cond_stage_model.transformer." + k: v for k, v in CLIP_TEXT.from_ours(text.state_dict()).items()},
    }
    for value in state.values():
        value.normal_(std=0.2)
    path = tmp_path_factory.mktemp("whole") / "sd.ckpt"
    torch.save({"state_dict": {**state, "betas": torch.linspace(0, 1, 1000)}}, path)
    return path


def test_a_whole_file_becomes_one_that_draws_and_goes_back(
    whole_file: Path, clip_files: Path, tmp_path: Path, vgm: Any
) -> None:
    ours, tokenizer = tmp_path / "sd.safetensors", f"conditions.text.tokenizer={clip_files / 'hf'}"
    code, _, err = vgm("convert", whole_file, ours, "image_size=8", "codec.scale_factor=0.5", "--verify")
    assert code == 0, err
    assert {p.name for p in tmp_path.iterdir()} == {"sd.safetensors", "sd.codec.safetensors", "sd.text.safetensors"}
    pictures = {}
    for words in ("red apple", "hello"):
        args = (
            "--prompt",
            words,
            "-n",
            1,
            "--steps",
            2,
            "--device",
            "cpu",
            tokenizer,
            "--out",
            tmp_path / f"{words}.npz",
        )
        code, _, err = vgm("sample", ours, *args)
        assert code == 0, err
        pictures[words] = np.load(tmp_path / f"{words}.npz")["arr_0"]
    assert pictures["hello"].shape == (1, 16, 16, 3) and (pictures["hello"] != pictures["red apple"]).any()
    code, _, err = vgm("sample", ours, "--prompt", "red", "-n", 1, "--device", "cpu")
    assert code == 4 and "tokenizer" in err
    code, _, err = vgm("convert", ours, tmp_path / "back.ckpt", "--to", "ldm-unet")
    assert code == 0, err
    before, after = (torch.load(p, weights_only=True)["state_dict"] for p in (whole_file, tmp_path / "back.ckpt"))
    assert after.keys() == before.keys() - {"betas"}
    assert all(torch.equal(v, before[k]) for k, v in after.items())


# -- the U-Net's own laws ----------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 2,
    "model_channels": 8,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (2, 1),
    "context_dim": 6,
    "num_heads": 2,
    "norm_groups": 4,
}


def test_unet_conditions() -> None:
    """Each condition is asked for where the network has it, and each changes the output."""
    torch.manual_seed(0)
    network = LDMUNet(**SMALL, num_classes=3, null_class=True, concat_channels=1)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3)
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 700.0])
    given = {"context": torch.randn(2, 5, 6), "y": torch.tensor([0, 2]), "concat": torch.randn(2, 1, 8, 8)}
    out = network(x, t, **given)
    assert out.shape == x.shape
    for name, value in given.items():
        other = torch.tensor([1, 1]) if name == "y" else value + 1
        assert not torch.allclose(network(x, t, **{**given, name: other}), out)
    free = network.null_condition(given)
    assert torch.equal(network(x, t, **free), network(x, t, **{**given, "y": None}))
    control = [torch.zeros(1)] * len(network.skips) + [torch.ones(1)]
    assert not torch.allclose(network(x, t, **given, control=control), out)
    network.checkpointing = True
    torch.testing.assert_close(network(x, t, **given), out)
    for lacking, message in (("context", "context"), ("concat", "stacked")):
        with pytest.raises(VgmError, match=message):
            network(x, t, **{k: v for k, v in given.items() if k != lacking})
    with pytest.raises(VgmError, match="vector"):
        LDMUNet(**SMALL, vector_dim=5)(x, t, given["context"])
    with pytest.raises(VgmError, match="heads"):
        LDMUNet(**{**SMALL, "use_spatial_transformer": False, "num_heads": 3})
    with pytest.raises(VgmError, match="transformer_depth"):
        LDMUNet(**{**SMALL, "transformer_depth": (1, 1, 1)})


def test_averages_of_a_checkpoint_are_taken() -> None:
    network = LDMUNet(**{**SMALL, "model_channels": 32, "norm_groups": 32})
    live = LDM_UNET.from_ours(network.state_dict())
    average = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in live.items()}
    found = LDM_UNET.to_ours({**live, **average, "model_ema.decay": torch.tensor(0.9999), "betas": torch.ones(3)})
    assert all(torch.equal(v, network.state_dict()[k] + 1) for k, v in found.items())
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in LDM_UNET.to_ours(live).items())


def test_official_timesteps() -> None:
    """Every (1000 // S)-th one later by one: 17 are 18, 7 are 8, and 3 leave the table."""
    assert official_timesteps(50, 1000)[[0, 1, -1]].tolist() == [1, 21, 981]
    assert len(official_timesteps(17, 1000)) == 18 and len(official_timesteps(7, 1000)) == 8
    for steps, fewer in ((3, 2), (27, 26), (999, 500)):
        with pytest.raises(VgmError, match="1000") as refused:
            official_timesteps(steps, 1000)
        assert refused.value.hint == f"--steps {fewer}" and official_timesteps(fewer, 1000)[-1] < 1000
