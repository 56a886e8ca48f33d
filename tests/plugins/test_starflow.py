"""STARFlow and TARFlow: golden cases, counts, checkpoints, invertibility, decoding, samplers, decoder training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from vgm_plugins.starflow import checkpoints as ck
from vgm_plugins.starflow.aspect import RATIOS, sides
from vgm_plugins.starflow.block import Gaussian
from vgm_plugins.starflow.decoder import BlurDiscriminator, DecoderObjective
from vgm_plugins.starflow.decoding import Decoding, decode, ratio_guided
from vgm_plugins.starflow.model import Encoding, Flow, STARFlow, TARFlow, dequantised
from vgm_plugins.starflow.objective import FlowObjective, flow_loss
from vgm_plugins.starflow.presets import STARFLOW, TARFLOW
from vgm_plugins.starflow.rope import angles, positions, rotate
from vgm_plugins.starflow.sampler import FlowSampler, InpaintingSampler, InterpolationSampler, clean
from vgm_plugins.starflow.text import T5Text, decorated

from vgm_cli.api import Request, Step, generators, seed_of
from vgm_cli.conditioning import ClassLabel, Conditions, Part
from vgm_cli.engine.train.optim import learning_rate
from vgm_cli.errors import VgmError
from vgm_cli.metrics.base import Subject
from vgm_cli.metrics.bayes import BayesAccuracy
from vgm_cli.settings import Optimizer
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, assert_close

golden = GoldenChecks("starflow")

# -- golden cases ------------------------------------------------------------------------------------------------------

SAME = {"head_dim", "num_heads", "num_kv_heads", "seq_order", "norm_type", "top_block_channels"}
SWITCHES = {"sos": False, "use_softplus": False, "cond_top_only": False, "use_final_norm": False, "use_bias": True,
            "use_swiglu": False, "use_qk_norm": False, "use_post_norm": False, "hf_style_rope": False}  # fmt: skip
OF_VIDEO_AND_LANGUAGE = ("use_mm_attn", "use_pretrained_lm", "temporal_causal", "shallow_block_local", "denoiser_window",
                         "local_attn_window")  # fmt: skip
UNTOLD = {"use_softplus", "soft_clip", "seq_order", "noise_std", "in_channels", "patch_size", "img_size", "pt_seq_len"}


def keywords(config: Any, noise_std: float, y: Tensor | None) -> dict[str, Any]:
    """Ours for the official constructor's, whose defaults are others. y: its tokens of a condition, where one token with
    a single one in it is a class."""
    assert config["rope"] == 1, "without it the official code does not run"
    assert not any(config.get(k) for k in OF_VIDEO_AND_LANGUAGE)
    layers = list(config["layers_per_block"])
    layers = layers * config["num_blocks"] if len(layers) == 1 else layers
    assert len(layers) == config["num_blocks"]
    found = {
        "channels": config["channels"],
        "head_dim": 64,
        "layers_per_block": tuple(layers),
        "seq_order": "R2L",
        "noise_std": noise_std,
    }
    found |= {k: config[k] for k in ("in_channels", "img_size", "patch_size")} | {
        k: config[k] for k in SAME & set(config)
    }
    found |= {k: bool(config.get(k, default)) for k, default in SWITCHES.items()}
    found["soft_clip"] = float(config.get("soft_clip", 0))
    found["pt_seq_len"] = config.get("pt_seq_len")
    if config.get("learnable_self_denoiser", 0):
        found |= {"denoiser_layers": 8, "conditional_denoiser": bool(config.get("conditional_denoiser", 0))}
    length, width = config.get("txt_size", 0), config.get("txt_dim", 0)
    classes = length == 1 and y is not None and torch.equal(y, torch.zeros_like(y).scatter(-1, y.argmax(-1, True), 1.0))
    return found | ({"num_classes": width - 1} if classes else {"txt_size": length, "txt_dim": width})


def starflow(case: GoldenCase, noise_std: float = 0.3) -> STARFlow:
    """The case's weights through the converter, which reads off them what shapes tell, as the case says it."""
    wanted, layout = keywords(case.config, noise_std, case.inputs.get("y")), ck.STARFLOW
    case.ignore("use_checkpoint", "use_checkpoint_mlp", why="they save memory")
    assert layout.recognise(case.state)
    read = layout.config(case.state)
    if "state/var" in case or "state/feat_rope.freqs_cos" in case:
        untold = UNTOLD | ({"num_classes", "txt_size", "txt_dim"} if wanted.get("txt_size") == 1 else set())
        if not (wanted.get("num_classes") or wanted.get("txt_size")):
            untold = untold | {"cond_top_only"}  # there is no condition
        told = {k: v for k, v in wanted.items() if k in read and k not in untold}
        heads = told.get("num_heads") or wanted["channels"] // wanted["head_dim"]  # None where nothing else is meant
        usual = {"num_heads": wanted["channels"] // wanted["head_dim"], "num_kv_heads": heads}
        told |= {k: None for k, n in usual.items() if told.get(k) == n}
        assert {k: read[k] for k in told} == told
        if "state/var" in case:
            side = wanted["pt_seq_len"] or wanted["img_size"] // wanted["patch_size"]
            assert read["img_size"] // read["patch_size"] == side
    model = STARFlow(**wanted).eval()
    model.load_state_dict(layout.to_ours(case.state))
    again = layout.from_ours(model.state_dict())
    assert all(torch.equal(v, case.state[k]) for k, v in again.items())
    return model


def condition(model: STARFlow, y: Tensor | None) -> dict[str, Tensor]:
    """The official tokens as keywords."""
    if y is None or not model.txt_size:
        return {}
    assert y.shape[1:] == (model.txt_size, model.txt_dim)
    if not model.num_classes:
        return {"context": y}
    return {"y": y[:, 0].argmax(-1)}


@golden.check(lambda c: "out/nll_grad" in c)
def forward(case: GoldenCase) -> None:
    config, out, x = case.config, case.outputs, case.inputs["x"]
    model = starflow(case, config["_noise_std"])
    cond = condition(model, case.inputs.get("y"))
    assert x.shape[1:] == (config["in_channels"], config["img_size"], config["img_size"])
    x = x.requires_grad_()
    encoding = model(x, **cond)
    rows, columns = model.grid(x.shape)
    for i, tokens in enumerate(encoding.outputs):
        assert_close(tokens.unflatten(1, (rows, columns)), out[f"outputs_{i}"], 1e-5, f"outputs_{i}")
    for i, logdet in enumerate(encoding.logdets):
        want = out[f"logdet_{i}"]  # officially one 0 of an image where a block has no layers
        assert_close(logdet if want.ndim > 1 else logdet.mean((1, 2)), want, 1e-5, f"logdet_{i}")
    assert_close(encoding.z, out["z"], 1e-5, "z")
    loss, parts = flow_loss(encoding)
    for name, value in {"loss": loss, **parts}.items():
        assert_close(value, out[name], 1e-5, name)
    total, _ = flow_loss(encoding, config["_latent_norm_regularization"])
    assert_close(total, out["loss_total"], 1e-5, "loss_total")
    (gradient,) = torch.autograd.grad(loss, x)
    assert_close(gradient * x.numel(), out["nll_grad"], 1e-4, "nll_grad")
    assert_close(model.denoised(x, cond, model.noise_std), out["denoised"], 1e-4, "denoised")
    assert (out["denoised"] - x).abs().max() > 1e-3


def decoded(model: Flow, case: GoldenCase, w: float = 0.0, **how: Any) -> tuple[Tensor, list[Tensor]]:
    """From the case's z under the first half of its y, guided away from the second: x, and x after every block."""
    z, seen = case.inputs["z"], list[Tensor]()
    assert isinstance(model, STARFlow)
    both = condition(model, case.inputs.get("y"))
    cond, null = ({k: v.chunk(2)[i] for k, v in both.items()} for i in range(2))
    x, _ = decode(model, z, cond, null, Decoding(w=w, **how), lambda i, x: seen.append(x))
    return x, seen


@golden.check(lambda c: "out/cycle_z" in c)
@torch.no_grad()
def reverse(case: GoldenCase) -> None:
    model, out = starflow(case), case.outputs
    for w in case.config["_guidances"]:
        x, seen = decoded(model, case, w)
        assert_close(x, out[f"cfg{w}/x"], 1e-4, f"w {w}")
        for i, after in enumerate(seen, 1):
            assert_close(after, out[f"cfg{w}/seq_{i}"], 1e-4, f"w {w}, {i} blocks")
    cond = {k: v.chunk(2)[0] for k, v in condition(model, case.inputs.get("y")).items()}
    z = model(out["cfg0/x"], **cond).z
    assert_close(z, out["cycle_z"], 1e-4, "cycle")
    assert_close(z, case.inputs["z"], 1e-4, "cycle")


@golden.check(lambda c: "out/x_jacobi" in c)
@torch.no_grad()
def cache_and_jacobi(case: GoldenCase) -> None:
    model, out, w, options = starflow(case), case.outputs, case.config["_guidance"], case.config["_jacobi"]
    assert_close(decoded(model, case, w)[0], out["x_kv"], 1e-4, "sequential")
    assert_close(decoded(model, case, w)[0], out["x_nocache"], 1e-4, "without a cache")
    how = {"width": options["jacobi_block_size"], "iterations": options["jacobi_max_iter"], "together": True}
    x, _ = decoded(model, case, w, threshold=options["jacobi_th"], **how)
    assert_close(x, out["x_jacobi"], 1e-4, "Jacobi")
    assert_close(decoded(model, case, w, threshold=1e-10, **how)[0], out["x_jacobi_tight"], 1e-4, "Jacobi, tight")


@golden.check(lambda c: "out/cfg_guide_top" in c)
@torch.no_grad()
def reverse_variants(case: GoldenCase) -> None:
    model, out = starflow(case), case.outputs
    (w,) = case.config["_guidances"]
    assert_close(decoded(model, case)[0], out["plain"], 1e-4, "plain")
    assert_close(decoded(model, case, w)[0], out["cfg"], 1e-4, "guided")
    assert_close(decoded(model, case, w, annealed=True)[0], out["cfg_annealed"], 1e-4, "annealing has no effect")
    assert_close(decoded(model, case, w, top_only=True)[0], out["cfg_guide_top"], 1e-4, "the top block only")
    assert_close(decoded(model, case, attn_temp=0.8)[0], out["attn_temp"], 1e-4, "temperature of attention")


@golden.check(lambda c: any(k.startswith("mu_w") for k in c.outputs))
def guidance(case: GoldenCase) -> None:
    (mean, worse_mean), (scale, worse_scale) = (case.inputs[k].chunk(2) for k in ("mu", "sigma"))
    for w in case.config["w"]:
        got = ratio_guided(Gaussian(mean, scale), Gaussian(worse_mean, worse_scale), w)
        assert_close(got.mean, case.outputs[f"mu_w{w}"], 1e-6, f"mean, w {w}")
        assert_close(got.scale, case.outputs[f"sigma_w{w}"], 1e-6, f"sigma, w {w}")
    assert {f"{k}_w{w}" for w in case.config["w"] for k in ("mu", "sigma")} == set(case.outputs)


@golden.check(lambda c: "out/0/rotated_hf" in c)
def rotary(case: GoldenCase) -> None:
    for i, own in enumerate(case.config["cases"]):
        axes, latent = int(own["mode"][0]), own["latent_len"]
        assert own.get("is_1d", False) == (axes == 1)
        assert axes == 1 or (axes == 3) == (latent > 0), "a third coordinate exists where there may be a text"
        if axes == 1:
            keys = (f"cases[{i}].{k}" for k in ("pt_seq_len", "latent_len", "d"))
            case.ignore(*keys, why="a plain count knows neither grid nor frames")
        assert axes != 2 or own["txt"] == own["d"] == 0, "two coordinates are those of one picture"
        places = positions(own["h"], own["w"], own["txt"], own["pt_seq_len"], axes, own["d"])  # type: ignore[arg-type]
        turned = angles(places, own["head_dim"])
        out = {k.partition("/")[2]: v for k, v in case.outputs.items() if k.startswith(f"{i}/")}
        assert_close(places, out["pos"], 1e-6, f"{i}: positions")
        assert_close(turned.repeat_interleave(2, -1), out["freqs"], 1e-6, f"{i}: angles")
        q = case.inputs["q"][..., : len(places), : own["head_dim"]].transpose(1, 2)
        table = torch.stack([turned.cos(), turned.sin()], dim=-1)
        assert_close(rotate(q, table).transpose(1, 2), out["rotated"], 1e-6, f"{i}: neighbours")
        assert_close(rotate(q, table, "halves").transpose(1, 2), out["rotated_hf"], 1e-6, f"{i}: halves")


@golden.check(lambda c: "out/loss_denoiser" in c)
@torch.no_grad()
def learned_denoiser(case: GoldenCase) -> None:
    model, x = starflow(case), case.inputs["x"]
    case.ignore("use_softplus", "soft_clip", why="they are of the blocks, which are only loaded here")
    case.ignore("_sigma", why="the official step is 0.3 (sigma - 0) / sigma, whatever sigma is")
    cond = condition(model, case.inputs.get("y"))
    predicted = model(x, **cond, denoise=True)
    assert_close(predicted, case.outputs["pred"], 1e-5, "pred")
    assert_close((predicted - case.inputs["score"]).square().mean(), case.outputs["loss_denoiser"], 1e-5, "loss")
    assert_close(clean(model, x, cond, "net"), case.outputs["x_denoised"], 1e-5, "x_denoised")


@golden.check(lambda c: c.kind == "tarflow")
def tarflow(case: GoldenCase) -> None:
    config, out, x, layout = case.config, case.outputs, case.inputs["x"], ck.TARFLOW
    assert layout.recognise(case.state)
    read = layout.config(case.state)
    same = ("in_channels", "img_size", "patch_size", "channels", "num_blocks", "layers_per_block", "nvp", "num_classes")
    wanted = {k: config[k] for k in same}
    told = {k: wanted[k] for k in same if k not in ("in_channels", "patch_size", "img_size")}
    assert {k: read[k] for k in told} == told
    assert read["in_channels"] * read["patch_size"] ** 2 == wanted["in_channels"] * wanted["patch_size"] ** 2
    model = TARFlow(**wanted, noise_std=config["_noise_std"])
    model.load_state_dict(layout.to_ours(case.state))
    again = layout.from_ours(model.state_dict())
    assert again.keys() == case.state.keys() and all(torch.equal(v, case.state[k]) for k, v in again.items())
    model.eval()
    # y_dropped is what the forward pass sees, -1 being no class; sampling is given y
    assert config["_cond"] == ("in/y" in case)
    seen = {"y": case.inputs["y_dropped"]} if config["_cond"] else {}
    x = x.requires_grad_()
    encoding = model(x, **seen)
    for i, tokens in enumerate(encoding.outputs[1:]):
        assert_close(tokens, out[f"outputs_{i}"], 2e-5, f"outputs_{i}")
    assert_close(model.patchify(encoding.z), out["z"], 2e-5, "z")
    logdets = torch.stack([d.mean((1, 2)) for d in encoding.logdets]).sum(0)
    # of a network whose scales are 1 it is exactly nothing
    assert_close(logdets, out["logdets"], 2e-5, "logdets")
    loss, _ = flow_loss(encoding)
    assert_close(loss, out["loss"], 2e-5, "loss")
    weights = dict(model.named_parameters())
    names = [k.removeprefix("grad.") for k in out if k.startswith("grad.")]
    grad_x, *grads = torch.autograd.grad(loss, [x, *(weights[n] for n in names)])
    assert_close(grad_x, out["grad_x"], 1e-4, "grad_x")
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, out[f"grad.{name}"], 1e-4, name)
    x = x.detach()
    if "out/var_after_update" in case:
        other = TARFlow(**wanted)
        other.load_state_dict(model.state_dict())
        other.update_prior(out["z"])
        assert_close(other.var, out["var_after_update"], 1e-5, "var")
    # the prior that denoising and bits officially have is the standard one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TARFlow, "variance", lambda self: 1.0)
        assert_close(model.denoised(x, seen, model.noise_std), out["denoised"], 1e-4, "denoised")
        nats = model.log_prob(x, {}).detach()
    dims = x[0].numel()
    assert_close((dims * math.log(128) - nats) / (dims * math.log(2)), out["bpd"], 2e-5, "bpd")
    with torch.no_grad():
        plain = model(x)
        assert_close(model.patchify(plain.z), out["z_uncond"], 2e-5, "z_uncond")
        again_x, _ = decode(model, model.unpatchify(out["z_uncond"] / model.var.sqrt(), x.shape), {})
        # the official inverse of a network with a learned prior multiplies by its deviation as ours does
        assert_close(inverse(model, out["z_uncond"] / model.var.sqrt(), {}), out["cycle"], 1e-4, "cycle")
        assert torch.isfinite(again_x).all()
        given = {"y": case.inputs["y"]} if config["_cond"] else {}
        for i, options in enumerate(config["_reverse"]):
            images: list[Tensor] = []
            got = inverse(model, case.inputs["z"], given, images, **options)
            assert_close(got, out[f"reverse_{i}"], 1e-4, f"reverse_{i}")
            if f"out/reverse_{i}.after_top" in case:
                assert_close(images[0], out[f"reverse_{i}.after_top"], 1e-4, f"reverse_{i}.after_top")


def inverse(
    model: TARFlow, z: Tensor, given: Mapping[str, Tensor], images: list[Tensor] | None = None, **options: Any
) -> Tensor:
    """The official reverse by ours: z (B, T, D) times the prior's deviation, which a learned prior has alone."""
    scale = model.var.sqrt() if model.nvp else 1.0
    z = model.unpatchify(z * scale, (len(z), *model.sample_shape))
    how = Decoding(
        w=options.get("guidance", 0.0), what=options.get("guide_what", "ab"),
        annealed=options.get("annealed_guidance", False), attn_temp=options.get("attn_temp", 1.0),
    )  # fmt: skip
    null = model.null_condition(dict(given)) if given else {}
    watch = None if images is None else lambda i, x: images.append(x)
    return decode(model, z, given, null, how, watch)[0]


@golden.check(lambda c: c.kind == "starflow_train_steps")
def train_steps(case: GoldenCase) -> None:
    run, out = case.config["_run"], case.outputs
    model = starflow(case, run["noise_std"]).train()
    if run["noise_std"] == 0.3:
        case.ignore("_run.cond_noise_level", why="it multiplies the loss by noise_std / 0.3")
    objective = FlowObjective(model, latent_norm=run["latent_norm_regularization"], weigh_noise=run["cond_noise_level"])
    start = min(run["min_lr"], 1e-6) / run["lr"]
    setting = Optimizer(lr=run["lr"], warmup=run["warmup_steps"], warmup_from=start, schedule="cosine",
                        final_lr=run["min_lr"])  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=1e-4)
    assert len(case.inputs["x"]) == run["steps"] and case.inputs["x"].shape[1] == run["batch"]
    for k in range(run["steps"]):
        # published runs begin at min_lr 1e-6 and never come below it; where min_lr is larger, its warm-up waits there
        rate = max(learning_rate(setting, k, run["total_steps"]), run["min_lr"])
        assert rate == pytest.approx(out[f"step{k}.lr"].item(), rel=1e-9)
        x, noise = case.inputs["x"][k], case.inputs["noise"][k]
        cond = condition(model, case.inputs["y"][k] if "in/y" in case else None)
        encoding = model(x + model.noise_std * noise, **cond)
        loss, parts = flow_loss(encoding, objective.latent_norm, objective.weight)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        for name, value in {"loss": loss, **parts}.items():
            assert_close(value, out[f"step{k}.{name}"], 1e-4, f"step {k}: {name}")
        if run["grad_clip"]:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run["grad_clip"])
            assert_close(norm, out[f"step{k}.grad_norm"], 1e-4, f"step {k}: norm")
        optimizer.step()
    final = model.state_dict()
    for name, want in ((k.removeprefix("final."), v) for k, v in out.items() if k.startswith("final.")):
        assert_close(final[name], want, 1e-4, name, floor=adam_floor(run["lr"], run["steps"]))


@golden.check(lambda c: c.kind == "starflow_decoder_losses")
def decoder_losses(case: GoldenCase) -> None:
    config, out, inputs = case.config, case.outputs, case.inputs
    network = BlurDiscriminator(inputs["x"].shape[2], config["hidden_channels"], config["num_stages"],
                                config["blur_resample"], config["blur_kernel_size"])  # fmt: skip
    network.load_state_dict(case.state)
    objective = DecoderObjective(
        torch.nn.Module(), network, pixel_loss=config["reconstruction"], perceptual_weight=config["perceptual_weight"],
        disc_weight=config["discriminator_weight"], lecam_weight=config["lecam_weight"],
        lecam_decay=config["lecam_decay"],
    )  # fmt: skip
    objective.load_state_dict({"mean_real": inputs["ema_real"], "mean_fake": inputs["ema_fake"]})
    assert_close(network(inputs["x"][0]), out["logits"], 1e-5, "logits")
    for k, (x, recon) in enumerate(zip(inputs["x"], inputs["recon"])):
        recon = recon.requires_grad_()
        loss, logs = objective.decoder_loss(x, recon, (x - recon).abs().mean())
        found = {"g_total": loss, "g_recon": logs["rec_loss"]}
        # the official numbers are the weighted ones
        found["g_gan"] = config["discriminator_weight"] * logs.get("g_loss", torch.zeros(()))
        found["g_perceptual"] = config["perceptual_weight"] * logs["p_loss"]
        if k == 0:
            (gradient,) = torch.autograd.grad(loss, recon)
            assert_close(gradient, out["step0.g_grad"], 1e-4, "gradient of the reconstruction")
        network.zero_grad()
        loss, logs = objective.discriminate(x, recon)
        loss.backward()
        weights = dict(network.named_parameters())
        for name in (n for n in out if n.startswith(f"step{k}.d_grad.")):
            assert_close(weights[name.removeprefix(f"step{k}.d_grad.")].grad, out[name], 1e-4, name)
        found |= {"d_loss": loss, "d_real": logs["logits_real"], "d_fake": logs["logits_fake"]}
        # weighted, too
        found["d_lecam"] = config["lecam_weight"] * logs["lecam"] if "lecam" in logs else torch.zeros(())
        objective.after_step(Step(k))
        found |= {f"ema_{k}": v for k, v in objective.means.items()}
        for name, value in found.items():
            if f"out/step{k}.{name}" in case:
                assert_close(value, out[f"step{k}.{name}"], 1e-5, f"step {k}: {name}")


@golden.check(lambda c: c.kind == "starflow_aspect")
def aspect_sizes(case: GoldenCase) -> None:
    for size in case.config["sizes"]:
        found = [sides(size, ratio, case.config["multiple"]) for ratio in case.config["ratios"]]
        assert torch.equal(torch.tensor(found), case.outputs[f"size_{size}"])


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes and layouts -------------------------------------------------------------------------------------------------

COUNTS = {"XL/1": 1_412_255_816, "XL/2": 1_412_698_400, "XLv2/1": 1_412_255_816, "XXL/1": 3_855_065_160,
          "XXLv2/1": 3_855_065_160, "3B-text": 3_858_281_544, "img64": 460_142_784, "img64-likelihood": 460_142_784,
          "img128": 823_927_552, "afhq256": 463_481_856, "digits": 3_227_776}  # fmt: skip


@pytest.mark.parametrize("name", [*STARFLOW, *TARFLOW])
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = STARFlow(**STARFLOW[name]) if name in STARFLOW else TARFlow(**TARFLOW[name])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def twin(name: str, **more: Any) -> Flow:
    """A preset's network, tiny and random."""
    small: dict[str, Any] = {"channels": 40, "head_dim": 20}
    torch.manual_seed(0)
    if name in STARFLOW:
        preset = STARFLOW[name]
        layers = (1, 2) if preset["layers_per_block"][-2] == 2 else (1, 2, 2)
        small |= {"layers_per_block": layers, "in_channels": 2, "img_size": 3 * preset.get("patch_size", 1)}
        small |= {"num_classes": 3} if "num_classes" in preset else {"txt_size": 3, "txt_dim": 6}
        model: Flow = STARFlow(**{**preset, **small, **more})
    else:
        preset, p = TARFLOW[name], TARFLOW[name]["patch_size"]
        small |= {"num_blocks": 2, "layers_per_block": 1, "img_size": 3 * p, "in_channels": 1}
        small |= {"num_classes": 3} if "num_classes" in preset else {}
        model = TARFlow(**{**preset, **small, **more})
    suites.randomise(model, scale=0.05 if name in STARFLOW else 0.02)  # exp scales blow up
    return model.eval()


def asked(model: Flow, n: int) -> dict[str, Tensor]:
    if model.num_classes:
        return {"y": torch.arange(n) % model.num_classes}
    if isinstance(model, STARFlow) and model.txt_size:
        return {"context": torch.randn(n, model.txt_size, model.txt_dim, generator=torch.Generator().manual_seed(3))}
    return {}


def pictures(model: Flow, n: int = 2) -> Tensor:
    side = model.img_size if isinstance(model, TARFlow) else model.side * model.patch_size
    return torch.randn(n, model.in_channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*STARFLOW, *TARFLOW])
@torch.no_grad()
def test_inverting_gives_the_image_back(name: str) -> None:
    """Both ways, token by token and by Jacobi iterations, on every preset's tiny twin; the cached decoder gives what the
    whole pass does."""
    model = twin(name)
    x, cond = pictures(model), asked(model, 2)
    encoding = model(x, **cond)
    assert (encoding.z - x).abs().max() > 0.01
    back, passes = decode(model, encoding.z, cond)
    torch.testing.assert_close(back, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(back, **cond).z, encoding.z, atol=1e-4, rtol=0)
    if isinstance(model, STARFlow):
        how = Decoding(width=5, threshold=1e-12)
        torch.testing.assert_close(decode(model, encoding.z, cond, how=how)[0], x, atol=1e-4, rtol=0)
        loose, fewer = decode(model, encoding.z, cond, how=Decoding(width=9, threshold=1e-2))
        assert fewer < passes and (loose - x).square().mean() < 0.1 * x.square().mean()


OPTIONS: dict[str, dict[str, Any]] = {
    "start token, softplus": {},
    "exp, no start token, R2L": {"sos": False, "use_softplus": False, "seq_order": "R2L", "soft_clip": 0.0},
    "gated, RMS norms, shared keys": {"use_swiglu": True, "norm_type": "rms_norm", "num_kv_heads": 1, "use_bias": False,
                                      "use_qk_norm": True, "use_post_norm": True, "hf_style_rope": True},
    "a block of no layers": {"layers_per_block": (0, 1, 0, 1)},
    "condition everywhere, a wide top": {"cond_top_only": False, "top_block_channels": 60, "use_final_norm": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_log_determinant_is_autograds(name: str) -> None:
    """The density of one image against the determinant of the whole Jacobian; the inverse is one for other options."""
    model = twin("XLv2/1", img_size=2, pt_seq_len=2, **OPTIONS[name])
    x, cond = pictures(model, 1)[..., :2, :2].double().float(), asked(model, 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v.view_as(x), **cond).z.flatten(), x.flatten())
    z = model(x, **cond).z
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum()
    wanted = normal + torch.linalg.slogdet(jacobian.double())[1]
    torch.testing.assert_close(model.log_prob(x, cond)[0].double(), wanted.double(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(decode(model, z.detach(), cond)[0], x, atol=1e-4, rtol=0)


def test_the_prior_of_a_volume_preserving_flow() -> None:
    """Its determinant is one; the learned variance is that of the density and of the draws."""
    model = twin("digits", nvp=False)
    assert isinstance(model, TARFlow)
    x, cond = pictures(model, 4), asked(model, 4)
    before = model.log_prob(x, cond)
    for _ in range(80):
        model.update_prior(model(x, **cond).outputs[-1])
    tokens = model(x, **cond).outputs[-1]
    torch.testing.assert_close(model.var, tokens.square().mean(0), rtol=1e-2, atol=1e-3)
    assert (model.log_prob(x, cond).mean() > before.mean()) and all(not d.any() for d in model(x, **cond).logdets)
    z = model.unpatchify(tokens / model.var.sqrt(), x.shape)
    torch.testing.assert_close(decode(model, z.detach(), cond)[0], x, atol=1e-4, rtol=0)


def test_other_sides_and_other_texts() -> None:
    """STARFlow's positions span any grid; a text model wants its text, a TARFlow its own size."""
    model = twin("3B-text")
    wide, cond = torch.randn(1, 2, 2, 6), asked(model, 1)
    torch.testing.assert_close(decode(model, model(wide, **cond).z, cond)[0], wide, atol=1e-4, rtol=0)
    with pytest.raises(VgmError, match="what a text says"):
        model(wide)
    with pytest.raises(VgmError, match="does not divide"):
        twin("XL/2")(torch.zeros(1, 2, 3, 8))
    with pytest.raises(VgmError, match="was built for"):
        twin("digits")(torch.zeros(1, 1, 8, 8))
    with pytest.raises(VgmError, match="no learned denoiser"):
        model(wide, **cond, denoise=True)


def test_blocks_of_no_layers_have_no_tensors() -> None:
    """The layout reads them off the gaps, and says so; the top block has layers."""
    for layers in ((0, 2, 0, 1), (0, 1)):
        model = twin("XLv2/1", layers_per_block=layers, soft_clip=4.0)
        state = ck.STARFLOW.from_ours(model.state_dict())
        assert ck.STARFLOW.recognise(state)
        read = ck.STARFLOW.config(state)
        assert read["layers_per_block"] == layers and read["cond_top_only"]
        assert str(list(layers)) in ck.STARFLOW.published.assumes(state, read)["layers_per_block"]
        assert ck.STARFLOW.to_ours(state).keys() == model.state_dict().keys()
    with pytest.raises(VgmError, match="top block needs layers"):
        twin("XLv2/1", layers_per_block=(1, 0))


# -- sampling ----------------------------------------------------------------------------------------------------------


def request(model: Flow, n: int = 2, **more: Any) -> Request:
    return Request(tuple(pictures(model, 1).shape[1:]), generators(range(n)), cond=asked(model, n), **more)


@torch.no_grad()
def test_guidance_and_its_rules() -> None:
    """Weight 0 is no guidance; the rule of the family; a strong weight is told; both halves see the guided tokens."""
    for name in ("XLv2/1", "digits"):
        model = twin(name)
        plain = FlowSampler()(model, request(model, guidance_scale=1.0))
        for rule in ("ratio", "linear"):
            guided = FlowSampler(rule=rule)(model, request(model, guidance_scale=2.0))  # type: ignore[arg-type]
            own = FlowSampler()(model, request(model, guidance_scale=2.0))
            assert (guided - plain).abs().max() > 1e-4
            assert torch.equal(own, guided) == (rule == model.rule)
    strong = request(model, guidance_scale=8.0)
    FlowSampler()(model, strong)
    assert "extra weight of 7" in strong.info["notes"][0]


@torch.no_grad()
def test_denoising_is_tweedies() -> None:
    """One step up the density's gradient, towards the mean of what was there before the noise."""
    model = twin("XLv2/1", noise_std=0.2)
    raw, clean_one = (FlowSampler(denoise=how)(model, request(model)) for how in ("none", "score"))  # type: ignore[arg-type]
    step, cond = clean_one - raw, asked(model, 2)
    higher = model.log_prob(raw + 0.01 * step, cond) - model.log_prob(raw - 0.01 * step, cond)
    torch.testing.assert_close(higher / 0.02, step.square().sum((1, 2, 3)) / 0.04, rtol=2e-2, atol=1e-3)
    with pytest.raises(VgmError, match="no learned denoiser"):
        FlowSampler(denoise="net")(model, request(model))


@torch.no_grad()
def test_pictures_that_are_no_squares() -> None:
    model = twin("XLv2/1")
    wide = FlowSampler(aspect="16:9")(model, request(model))
    assert wide.shape[2:] == sides(3, "16:9", 2) == (2, 4) and wide.shape[2] < wide.shape[3]
    assert all(h * w for h, w in (sides(32, r, 2) for r in RATIOS))
    for wrong in ("wide", "0:3", "1:900"):
        with pytest.raises(VgmError, match="ratio"):
            sides(4, wrong, 2)
    assert decorated("a car", 0.3, "16:9") == "Noise Level 300:\na car\n in a 16:9 aspect ratio.\n"
    with pytest.raises(VgmError, match="text encoder"):
        T5Text().encode(["a car"], torch.device("cpu"))


@torch.no_grad()
def test_arcs_between_images() -> None:
    model = twin("digits", noise_std=0.0)
    images, sampler = pictures(model, 4), InterpolationSampler(points=3)
    strips = sampler(model, request(model, 6, images=images))
    torch.testing.assert_close(strips[[0, 2]], images[:2], atol=1e-3, rtol=0)
    assert (strips[1] - images[0]).abs().max() > 0.1 and (strips[1] - images[1]).abs().max() > 0.1
    alone = Request(images.shape[1:], generators([4]), cond={"y": torch.tensor([1])}, index=[4], images=images)
    torch.testing.assert_close(sampler(model, alone)[0], strips[4], atol=1e-4, rtol=0)
    with pytest.raises(VgmError, match="two images"):
        sampler(model, request(model, 2, images=images[:1]))


@torch.no_grad()
def test_completion_keeps_what_is_kept() -> None:
    """Kept pixels stay, the others are made; proposals are accepted by the ratio of densities, which is told."""
    model = twin("XL/2", noise_std=0.1)
    images = pictures(model)
    mask = torch.ones(2, 1, *images.shape[2:], dtype=torch.bool)
    mask[:, :, 3:] = False  # cuts through a row of patches, which is lost
    for begin in ("noise", "top"):
        asking = request(model, images=images, mask=mask)
        made = InpaintingSampler(iterations=3, begin=begin)(model, asking)  # type: ignore[arg-type]
        assert torch.equal(made[:, :, :2], images[:, :, :2]) and (made[:, :, 2:] != images[:, :, 2:]).any()
        assert 0 <= asking.info["acceptance"] <= 1 and "accepted" in asking.info["notes"][0]
    other = InpaintingSampler(iterations=0)(model, request(model, images=images, mask=mask))
    assert torch.equal(other[:, :, :2], images[:, :, :2])
    assert InpaintingSampler().accepts(torch.nn.Identity(), None) and not InpaintingSampler().accepts(model, None)


@pytest.mark.parametrize(("corrected", "deviation"), [(False, 0.5**0.5), (True, 1.0)])
@torch.no_grad()
def test_what_metropolis_hastings_draws(corrected: bool, deviation: float) -> None:
    """A flow that is a shift, three tokens known. By the paper's ratio the fourth follows the squared density, because
    the proposals follow the density already; divided by theirs it follows the density."""
    model = STARFlow(1, 2, 1, 40, (1,), head_dim=20, soft_clip=0.0, noise_std=0.0).eval()
    model.steps()[0].proj_out.bias.copy_(torch.tensor([0.0, 2.0]))
    images, mask = torch.full((300, 1, 2, 2), 2.0), torch.ones(300, 1, 2, 2, dtype=torch.bool)
    mask[:, :, 1, 1] = False
    asking = Request((1, 2, 2), generators(range(300)), images=images, mask=mask)
    made = InpaintingSampler(iterations=12, begin="noise", corrected=corrected)(model, asking)[:, 0, 1, 1]
    assert abs(float(made.mean()) - 2.0) < 0.2 and abs(float(made.std()) - deviation) < 0.12
    assert (asking.info["acceptance"] == 1) == corrected


# -- training ----------------------------------------------------------------------------------------------------------

SMALL = ("model.channels=40", "model.head_dim=20", "model.layers_per_block=[1,1]", "codec=null")


class TestTraining(suites.ObjectiveSuite):
    recipe = "starflow/mnist"
    overrides = (*SMALL, "model.patch_size=7", "objective.latent_norm=0.01")


class TestPixels(suites.ObjectiveSuite):
    recipe = "starflow/mnist-pixels"
    overrides = ("model.channels=64", "model.num_blocks=2", "model.layers_per_block=1", "model.patch_size=7")

    def test_resume_is_bit_exact(self) -> None:
        """TestTraining's."""


class TestDenoiser(suites.ObjectiveSuite):
    recipe = "starflow/mnist"
    overrides = (*SMALL, "model.patch_size=7", "model.denoiser_layers=1", "optimizers={denoiser: {lr: 1.0e-4}}")
    rtol = 1e-3

    def test_resume_is_bit_exact(self) -> None:
        """TestTraining's."""


class TestSampling(suites.SamplerSuite):
    recipe = "starflow/mnist"
    overrides = (*SMALL, "model.patch_size=7")


class TestJacobi(suites.SamplerSuite):
    recipe = "starflow/mnist"
    overrides = (*SMALL, "model.patch_size=7")
    sampler: ClassVar = {"name": "starflow", "jacobi": 4}


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted((Path(__file__).parents[2] / "recipes/starflow").glob("*.yaml"))]
)
def test_recipes_say_what_they_are(name: str) -> None:
    suite = suites.RecipeSuite()
    suite.recipe = f"starflow/{name}"
    suite.test_opens_with_what_it_is()


def test_the_loss_begins_at_the_identity_and_falls() -> None:
    """A fresh network changes nothing: half the mean square of noisy data. (The published script never steps.)"""
    torch.manual_seed(0)
    model = STARFlow(1, 4, 2, 40, (1, 1), head_dim=20, noise_std=0.3)
    objective = FlowObjective(model)
    x = torch.randn(64, 1, 4, 4).cumsum(3) / 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for i in range(40):
        loss, _ = objective.loss("main", {"x": x}, Step(i))
        if i == 0:
            out = model.steps()[0].proj_out.bias
            with torch.no_grad():
                out.zero_()
                model.steps()[1].proj_out.bias.zero_()
            loss, _ = objective.loss("main", {"x": x}, Step(i))
            noisy = objective.noisy(x, Step(0))
            torch.testing.assert_close(loss, 0.5 * noisy.square().mean())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2


def test_what_goes_together() -> None:
    model = TARFlow(1, 4, 2, 64, 1, 1, noise_std=0.0)
    for noise, own in (("gaussian", model), ("uniform", STARFlow(1, 4, 2, 40, (1,), head_dim=20))):
        with pytest.raises(VgmError, match="noise"):
            FlowObjective(own, noise=noise)  # type: ignore[arg-type]
    with pytest.raises(VgmError, match="whole heads"):
        STARFlow(1, 4, 2, 50, (1,), head_dim=20)
    with pytest.raises(VgmError, match="room for positions"):
        STARFlow(1, 4, 2, 48, (1,), head_dim=16, num_classes=3)
    with pytest.raises(VgmError, match="text features"):
        STARFlow(1, 4, 2, 40, (1,), head_dim=20, txt_size=3)


def encoding_of(model: Flow) -> Encoding:
    return model.encode(pictures(model), asked(model, 2))


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = twin("XLv2/1").train()
    grads = []
    for on in (False, True):
        model.checkpointing = on
        assert model.checkpointing == on
        model.zero_grad()
        flow_loss(encoding_of(model))[0].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_the_class_by_bayes_rule() -> None:
    """The share of images whose label has the largest likelihood, of several batches; what it needs is asked for."""
    model = twin("digits")
    assert isinstance(model, TARFlow)
    pixels = ((pictures(model, 6) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    gens = generators(seed_of("likelihood", 0, i) for i in range(6))
    x = dequantised(pixels, torch.stack([torch.rand(pixels.shape[1:], generator=g) for g in gens]))
    best = torch.stack([model.log_prob(x, {"y": torch.full((6,), y)}) for y in range(3)], dim=1).argmax(1)
    labels = torch.where(torch.arange(6) < 4, best, (best + 1) % 3)

    class Images:
        facts = SimpleNamespace(num_classes=3)

        def __len__(self) -> int:
            return 6

        def gather(self, rows: list[int]) -> dict[str, Tensor]:
            return {"x": pixels[rows], "label": labels[rows]}

    classes = Conditions([Part("class", ClassLabel(3), "label")])
    subject = Subject(model, None, None, Images(), torch.device("cpu"), 4, 6, lambda a, f: [f(i) for i in a], classes)
    (value,) = BayesAccuracy()(subject, 0)
    assert value.value == pytest.approx(4 / 6) and value.n == 6
    with pytest.raises(VgmError, match="a model of classes"):
        BayesAccuracy()(replace(subject, conditions=Conditions()), 0)
    with pytest.raises(VgmError, match="labelled images"):
        BayesAccuracy()(replace(subject, dataset=None), 0)


Vgm = Callable[..., tuple[int, str, str]]


def test_from_training_to_every_use(vgm: Vgm, tiny_dataset: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A tiny run in pixels: samples both ways, arcs, bits, the class by Bayes' rule, completed images."""
    monkeypatch.chdir(tmp_path)
    small = (*SMALL, "model.patch_size=7", "train.steps=2", "train.batch_size=8", "train.preview_n=0")
    code, _, err = vgm("train", "starflow", *small, f"data.path={tiny_dataset}", "--out", "run")
    assert code == 0, err
    for more in ((), ("jacobi=4",), ("--sampler", "starflow-interpolate", "points=2")):
        code, _, err = vgm("sample", "run", "-n", 2, "--out", "x.npz", "--overwrite", *more)
        assert code == 0, err
    code, _, err = vgm("sample", "run", "-n", 1, "--guidance-scale", 9, "--out", "y.npz")
    assert code == 0 and "extra weight of 8" in err, err
    code, out, err = vgm("evaluate", "run", "--metrics", "bits-per-dim,bayes-accuracy", "-n", 6, "--json")
    assert code == 0, err
    values = {row["metric"]: row for row in json.loads(out)}
    assert (
        values["bits-per-dim"]["protocol"]["options"]["likelihood"] == "exact, given the class, uniform dequantisation"
    )
    assert 0 <= values["bayes-accuracy"]["value"] <= 1
    task = ("--task", "inpainting", "mask=box", "box=0.5", "--noise", "none")
    code, _, err = vgm("restore", "--method", "starflow-inpaint", "iterations=1", "--model", "run", *task,
                       "--input", tiny_dataset, "-n", 1, "--out", "done")  # fmt: skip
    assert code == 0 and "of 1 proposals an image accepted" in err, err


@pytest.mark.slow
def test_a_text_is_obeyed_by_its_tokens(vgm: Vgm, tmp_path: Path, monkeypatch: Any) -> None:
    """The small text model trains with its encoder and samples by prompts; other words give another picture."""
    monkeypatch.chdir(tmp_path)
    small = ("model.channels=40", "model.head_dim=20", "model.layers_per_block=[1,1]", "model.patch_size=8")
    code, _, err = vgm("train", "starflow", "--recipe", "text", *small, "train.steps=2", "train.batch_size=4",
                       "train.preview_n=0", "--out", "run")  # fmt: skip
    assert code == 0, err
    ask = ("sample", "run", "-n", 2, "--prompt", "a red circle", "--prompt", "a blue square", "--out", "x.npz")
    code, _, err = vgm(*ask)
    assert code == 0, err


def test_a_published_text_model_is_asked_by_prompts(vgm: Vgm, tmp_path: Path, monkeypatch: Any) -> None:
    """Deprecated buffers tell the grid, the text's length and the heads; they are left out. T5 is the user's."""
    monkeypatch.chdir(tmp_path)
    model = twin("3B-text", in_channels=4)
    theirs = dict(model.state_dict())
    mask, rope = torch.ones(12, 12).tril(), torch.zeros(12, 20)
    theirs |= {f"blocks.{i}.attn_mask": mask.clone() for i in range(2)} | {"var": torch.ones(9, 4)}
    theirs |= {f"feat_rope.freqs_{k}": rope.clone() for k in ("cos", "sin")}
    torch.save(theirs, "official.pth")
    code, _, err = vgm("convert", "official.pth", "ours.safetensors", "--verify")
    assert code == 0 and "softplus scales" in err, err
    code, out, err = vgm("inspect", "ours.safetensors", "--json")
    kwargs = json.loads(out)["component"]["kwargs"]
    assert (kwargs["img_size"], kwargs["txt_size"], kwargs["txt_dim"], kwargs["head_dim"]) == (3, 3, 6, 20)
    code, _, err = vgm("sample", "ours.safetensors", "-n", 1, "--prompt", "a car", "--out", "x.npz")
    assert code == 4 and "conditions.text.path" in err, err


def test_a_decoder_learns_to_see_through_noise(vgm: Vgm, tmp_path: Path, monkeypatch: Any) -> None:
    """Only the decoder's half changes; the running means of the discriminator are kept with the run."""
    from vgm_cli.engine.checkpoint import read_tensors

    monkeypatch.chdir(tmp_path)
    small = (
        "train.steps=2",
        "train.batch_size=4",
        "train.preview_n=0",
        "train.save_every=1",
        "objective.lecam_weight=1.0",
    )
    code, _, err = vgm("train", "starflow", "--recipe", "mnist-decoder", *small, "--out", "run")
    assert code == 0, err
    first, last = (read_tensors(Path(f"run/checkpoints/step-0000000{i}/model.safetensors"))[0] for i in (1, 2))
    changed = {k.split(".")[0] for k in first if not torch.equal(first[k], last[k])}
    assert changed == {"decoder", "post_quant_conv"}
    kept = [t for f in Path("run/checkpoints/step-00000002").glob("*.safetensors") for t in read_tensors(f)[0].items()]
    means = [v for k, v in kept if k.rpartition(".")[2] in ("mean_real", "mean_fake")]
    assert len(means) == 2 and all(v.abs() > 0 for v in means)
