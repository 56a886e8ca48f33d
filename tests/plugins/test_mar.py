"""MAR against LTH14/mar (golden cases): transformer, head, process, sampling, training, KL-16; sizes, completion."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from vgm_plugins.mar import checkpoints as ck
from vgm_plugins.mar import sampler as sampling
from vgm_plugins.mar.decoding import by_order, guidance_scales
from vgm_plugins.mar.head import DiffusionHead, TokenDenoiser, guided
from vgm_plugins.mar.model import MAR
from vgm_plugins.mar.objective import MaskedDiffusion
from vgm_plugins.mar.presets import GUIDANCE
from vgm_plugins.mar.presets import MAR as PRESETS
from vgm_plugins.mar.sampler import MARSampler

from vgm_cli import recipe as recipes
from vgm_cli.api import Request, Step, generators
from vgm_cli.ar.masking import kept_codes, truncated_normal_rate
from vgm_cli.diffusion.discrete import space_timesteps
from vgm_cli.engine.checkpoint import load
from vgm_cli.engine.train.ema import EMA
from vgm_cli.engine.train.optim import group, learning_rate, make_optimizer
from vgm_cli.errors import VgmError
from vgm_cli.nets import first_stage_checkpoints as stages
from vgm_cli.nets.autoencoder_kl import AutoencoderKL
from vgm_cli.nets.first_stage import DiagonalGaussian
from vgm_cli.registry import registry
from vgm_cli.settings import Optimizer
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, adam_floor, angle_floor, assert_close

golden = GoldenChecks("mar")
Cli = Callable[..., tuple[int, str, str]]


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- golden cases ------------------------------------------------------------------------------------------------------


def model_of(case: GoldenCase) -> MAR:
    """The network of a case's config, with its state by the layout, which reads the same keywords off the shapes."""
    c = case.config
    case.ignore("num_sampling_steps", why="of sampling, which has its own setting")
    case.ignore("grad_checkpointing", why="it saves memory")
    sizes = {
        "input_size": c["img_size"] // c["vae_stride"],
        "patch_size": c["patch_size"],
        "in_channels": c["vae_embed_dim"],
        "num_classes": c["class_num"],
        "mlp_ratio": c["mlp_ratio"],
        "buffer_size": c["buffer_size"],
        "head_depth": c["diffloss_d"],
        "head_width": c["diffloss_w"],
    }
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_width": c[f"{half}_embed_dim"], f"{half}_depth": c[f"{half}_depth"]}
        sizes |= {f"{half}_heads": c[f"{half}_num_heads"]}
    model = MAR(**sizes, attn_dropout=c["attn_dropout"], proj_dropout=c["proj_dropout"])
    assert ck.CONVERTER.recognise(case.state)
    read = ck.CONVERTER.config(case.state)
    untold = ("encoder_heads", "decoder_heads", "input_size", "patch_size", "in_channels", "mlp_ratio")
    assert {k: v for k, v in read.items() if k not in untold} == {k: v for k, v in sizes.items() if k not in untold}
    assert read["in_channels"] == model.channels and read["input_size"] == model.grid[0]
    for width in (c["encoder_embed_dim"], c["decoder_embed_dim"]):  # a ratio is told as far as widths are whole
        assert int(width * read["mlp_ratio"]) == int(width * c["mlp_ratio"])
    model.load_state_dict(ck.CONVERTER.to_ours(case.state))
    back = ck.CONVERTER.from_ours(model.state_dict())
    assert back.keys() == case.state.keys() and all(torch.equal(v, case.state[k]) for k, v in back.items())
    return model.eval()


def terms_of(case: GoldenCase, model: MAR, k: int | None = None) -> tuple[dict[str, Tensor], Tensor, int]:
    """(terms (B, copies, count) of the objective, orders, count) with the draws of a case, of step k of several."""
    c, own = case.config, (lambda v: v if k is None else v[k])
    orders, rate = own(case.inputs["orders"]), float(own(case.inputs["mask_rate"]))
    assert c["mask_ratio_min"] <= rate <= 1
    b, n, copies = len(orders), model.positions, c["diffusion_batch_mul"]
    objective, count = MaskedDiffusion(model, c["mask_ratio_min"], copies=copies), int(np.ceil(n * rate))
    chosen = orders[:, None, :count].expand(-1, copies, -1)
    t = own(case.inputs["t"]).view(copies, b, n).transpose(0, 1).gather(2, chosen)
    noise = own(case.inputs["noise"]).view(copies, b, n, -1).transpose(0, 1)
    noise = noise.gather(2, chosen[..., None].expand(-1, -1, -1, noise.shape[-1]))
    x = own(case.inputs["imgs"]) if "in/imgs" in case else latents(case, k)
    y = own(case.inputs["labels"])
    if k is not None or c["_run"]["train"]:
        dropped = own(case.inputs["drop_u"]) < c["label_drop_prob"]
        y = torch.where(dropped, model.null_condition({"y": y})["y"], y)
    return objective.terms(model.patchify(x), y, orders, count, t, noise), orders, count


def latents(case: GoldenCase, k: int | None) -> Tensor:
    """The posterior's sample times 0.2325."""
    posterior = DiagonalGaussian(case.inputs["moments"][k])
    return posterior.sample(case.inputs["posterior_noise"][k]) * 0.2325


@golden.check(lambda c: c.kind == "mar_forward")
def forward(case: GoldenCase) -> None:
    """What the transformer says of every place, the terms of every masked token, the loss and its gradients."""
    model, train = model_of(case), case.config["_run"]["train"]
    model.train(train)
    if not train:
        case.ignore("attn_dropout", "proj_dropout", "label_drop_prob", why="nothing is dropped in evaluation")
    seen: dict[str, Tensor] = {}
    model.encoder_norm.register_forward_hook(lambda m, given, out: seen.update(encoder=out))
    model.diffloss.net.register_forward_hook(lambda m, given, out: seen.update(z=given[2]))
    terms, orders, count = terms_of(case, model)
    out, n = case.outputs, model.positions
    masked = torch.zeros(orders.shape).scatter(1, orders[:, :count], 1.0)
    assert torch.equal(masked, out["mask"])
    assert_close(seen["encoder"], out["encoder"], 1e-5, "encoder", 1e-5)
    chosen = orders[:, None, :count]
    z = out["z"].gather(1, orders[:, :count, None].expand(-1, -1, out["z"].shape[-1]))
    copies = case.config["diffusion_batch_mul"]
    z = z[:, None].expand(-1, copies, -1, -1).flatten(0, 2)
    assert_close(seen["z"], z, 1e-5, "z", 1e-5)
    for name in ("mse", "vb"):
        want = out[f"{name}_per_token"].view(copies, -1, n).transpose(0, 1).gather(2, chosen.expand(-1, copies, -1))
        assert_close(terms[name], want, 2e-5, name)
    loss = terms["loss"].mean()
    assert_close(loss, out["loss"], 1e-5, "loss")
    loss.backward()
    grads = dict(model.named_parameters())
    for name, want in out.items():
        if name.startswith("grad."):
            found = grads[name.removeprefix("grad.")].grad
            assert found is not None
            assert_close(found, want, 1e-4, name)


class ToyHead(nn.Module):
    """The analytic denoiser that the cases state: of a normal of variance 0.25 about tanh(2 z)."""

    def __init__(self, process: Any):
        super().__init__()
        self.alpha_bar = torch.from_numpy(process.tables["alphas_cumprod"]).float()

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        a, mu = self.alpha_bar[t][:, None], torch.tanh(2 * z[:, : x.shape[1]])
        eps = (1 - a).sqrt() * (x - a.sqrt() * mu) / (0.25 * a + 1 - a)
        return torch.cat([eps, 0.2 * torch.tanh(x)], dim=1)


@golden.check(lambda c: c.kind == "mar_sample_tokens")
@torch.no_grad()
def sample_tokens(case: GoldenCase) -> None:
    """The sampler with the stored draws: what the head is told at every step, guidance, how many are left, tokens."""
    model, run, out = model_of(case), case.config["_run"], case.outputs
    own = ("attn_dropout", "proj_dropout", "label_drop_prob", "mask_ratio_min", "diffusion_batch_mul")
    case.ignore(*own, why="of training")
    if run["toy_head"]:
        model.diffloss.net = ToyHead(model.diffloss.process)  # type: ignore[assignment]
    orders, y = case.inputs["orders"], case.inputs.get("labels")
    if run["cfg"] == 1:
        case.ignore("_run.cfg_schedule", why="nothing is guided")
    respacing = case.config["num_sampling_steps"]
    assert len(space_timesteps(model.diffloss.process.steps, respacing)) == run["steps"]
    sampler = MARSampler(run["num_iter"], respacing, run["temperature"], run["cfg"], run["cfg_schedule"])
    request = Request(model.sample_shape, generators(range(len(orders))), cond={} if y is None else {"y": y})
    steps = iter(range(sampler.steps))
    seen: list[Tensor] = []

    def stored(request: Request, counts: list[int], length: int, channels: int) -> Iterator[Tensor]:
        k = next(steps)
        first, noise = case.inputs[f"init_noise_{k}"], case.inputs[f"step_noise_{k}"]
        assert len(noise) == length and len(first) >= sum(counts) and first.shape[1] == channels
        return iter([v[: sum(counts)] for v in (first, *noise)])

    def spy(process: Any, z: Tensor, *more: Any) -> Tensor:
        seen.append(z)
        return DiffusionHead.sample(model.diffloss, process, z, *more)

    left: list[int] = []
    scales: list[Tensor] = []

    def watch(k: int, tokens: Tensor, known: Tensor) -> None:
        left.append(int((~known).sum(1)[0]))
        assert bool(((~known).sum(1) == left[-1]).all())

    with patch.object(sampling, "own_noise", stored), patch.object(model.diffloss, "sample", spy):
        drawn = sampler.drawing(model, request)

        def draw(tokens: Tensor, known: Tensor, chosen: Tensor, k: int) -> Tensor:
            scales.append(guidance_scales(run["cfg"], run["cfg_schedule"], known, chosen))
            return drawn(tokens, known, chosen, k)

        tokens, unknown = sampler.given(model, request)
        tokens = by_order(draw, tokens, unknown, orders, sampler.steps, watch)
    assert len(left) == run["num_iter"] and left[-1] == 0
    assert left[:-1] == out["mask_len"][:-1].long().tolist()
    assert_close(torch.stack(scales)[:, 0], out["cfg_iter"], 1e-6, "guidance")
    for k, z in enumerate(seen):
        want = out[f"z_{k}"]
        assert_close(z, want[: len(z)], 1e-5, f"z_{k}", 1e-5)
        assert len(z) == len(want) or (y is None and run["cfg"] != 1)
    floor, rtol = (2e-4, 0.0) if run["toy_head"] else (0.0, 1e-4)
    assert_close(model.unpatchify(tokens), out["tokens"], rtol, "tokens", floor)


@golden.check(lambda c: c.kind == "mar_diffloss_net")
@torch.no_grad()
def diffloss_net(case: GoldenCase) -> None:
    c, x, t = case.config, case.inputs["x"], case.inputs["t"]
    assert c["out_channels"] == 2 * c["in_channels"] and x.shape[1] == c["in_channels"]
    case.ignore("grad_checkpointing", why="it saves memory")
    net = TokenDenoiser(c["in_channels"], c["z_channels"], c["model_channels"], c["num_res_blocks"]).eval()
    net.load_state_dict(case.state)
    waves: list[Tensor] = []
    net.time_embed.mlp.register_forward_pre_hook(lambda m, given: waves.append(given[0]))
    z, other = case.inputs["c"], case.inputs["c_uncond"]
    assert_close(net(x, t, z), case.outputs["eps_and_var"], 1e-5, "eps and variance")
    assert_close(waves[0], case.outputs["t_sinusoid"], 1e-5, "waves", angle_floor(float(t.max())))
    both, scale = torch.cat([z, other]), case.inputs["cfg_scale"].expand(len(x))
    wanted = case.outputs["cfg_eps_and_var"]
    assert_close(guided(net, both, scale)(x, t), wanted[: len(x)], 1e-5, "guided")
    assert_close(wanted[len(x) :, x.shape[1] :], net(x, t, other)[:, x.shape[1] :], 1e-5, "the variance is not guided")


@golden.check(lambda c: c.kind == "mar_diffusion_algo")
@torch.no_grad()
def diffusion_algo(case: GoldenCase) -> None:
    """The head's process: tables, respacing, loss, and the chain."""
    inputs, out, c = case.inputs, case.outputs, case.config
    head = DiffusionHead(inputs["x0"].shape[1], 4, 8, 1, "cosine", len(out["betas"]))
    toy = lambda x, t, z=None: torch.cat([0.3 * x.tanh() + 0.001 * t[:, None], 0.2 * x.tanh()], 1)
    head.net.forward = toy  # type: ignore[method-assign]
    same = lambda found, name: assert_close(torch.from_numpy(np.asarray(found)), out[name], 1e-12, name)
    same(head.process.betas, "betas")
    same(head.process.tables["alphas_cumprod"], "alphas_cumprod")
    for n in c["respacings"]:
        short = head.respaced(n or len(out["betas"]))
        assert short.timestep_map == out[f"timestep_map_{n}"].tolist()
        same(short.betas, f"betas_{n}")
        if short.steps > 1:  # of a single step the official table is empty
            same(short.tables["posterior_log_variance_clipped"], f"posterior_log_variance_clipped_{n}")
    x0, t, noise = inputs["x0"], inputs["t"], inputs["noise"]
    assert_close(head.process.q_sample(x0, t, noise), out["x_t"], 1e-5, "x_t")
    z = torch.zeros(len(x0), 4)
    terms = head.losses(x0, z, t, noise)
    for name in ("loss", "mse", "vb"):
        assert_close(terms[name], out[name], 2e-5, name)
    masked = (terms["loss"] * inputs["mask"]).sum() / inputs["mask"].sum()
    assert_close(masked, out["masked_loss"], 2e-5, "masked loss")
    process, temperature = head.respaced(c["sample_steps"]), c["temperature"]
    draws = iter(inputs["step_noise"])
    loop = process.sample_loop(guided(toy, z, None), inputs["x_T"], lambda: temperature * next(draws))
    assert_close(torch.stack([x for x, _ in loop]), out["trajectory"], 1e-4, "trajectory")
    draws = iter(inputs["step_noise"])
    last = head.sample(process, z[:4], inputs["x_T"], lambda: next(draws), None, temperature)
    assert_close(last, out["trajectory"][-1], 1e-4, "sample")


@golden.check(lambda c: c.kind == "mar_mask_ratio")
def mask_ratio(case: GoldenCase) -> None:
    """One rate for a batch, a truncated normal; as many tokens, rounded up."""
    minimum, total = case.config["mask_ratio_min"], case.config["seq_len"]
    rate = truncated_normal_rate(case.inputs["u"], minimum)
    assert_close(rate, case.outputs["mask_rate"], 1e-9, "rate")
    objective = MaskedDiffusion(cast(MAR, SimpleNamespace(positions=total)), minimum)
    wanted = case.outputs["num_masked"].clamp(min=1)  # officially the mean of no losses where none is masked
    assert [objective.masked(u) for u in case.inputs["u"]] == wanted.tolist()
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    assert_close(truncated_normal_rate(u, minimum).mean()[None], case.outputs["mean"], 1e-6, "mean")


@golden.check(lambda c: c.kind == "mar_vae")
@torch.no_grad()
def kl_vae(case: GoldenCase) -> None:
    """KL-16, the host's first stage: its decoder has attention in the middle alone."""
    c, out = case.config, case.outputs
    sizes = {"ch": c["ch"], "ch_mult": tuple(c["ch_mult"]), "num_res_blocks": c["num_res_blocks"]}
    sizes |= {"embed_dim": c["embed_dim"], "z_channels": c["embed_dim"]}
    where = {"attn_resolutions": tuple(c["attn_resolutions"]), "resolution": c["resolution"]}
    model = AutoencoderKL(**sizes, **where, decoder_attn=False, scale_factor=0.2325).eval()  # type: ignore[arg-type]
    assert stages.is_first_stage(stages.own_names(case.state))
    read = stages.first_stage_config(case.state)
    assert {k: read[k] for k in sizes} == sizes
    if any(c["resolution"] >> level in c["attn_resolutions"] for level in range(len(c["ch_mult"]))):
        assert read["decoder_attn"] is False
    assert AutoencoderKL(**read).state_dict().keys() == case.state.keys()
    model.load_state_dict(stages.to_ours(case.state))
    moments = model.encode(case.inputs["image"])
    posterior = DiagonalGaussian(moments)
    z = posterior.sample(case.inputs["noise"])
    found = {"moments": moments, "mean": posterior.mean, "sample": z, "kl": posterior.kl()}
    scaled = model.latents(moments, case.inputs["noise"])
    found |= {"latent_for_mar": scaled, "decoded_from_sample": model.decode(scaled)}
    found |= {"decoded_from_mean": model.decode(model.latents(moments))}
    for name, value in found.items():
        assert_close(value, out[name], 2e-5, name)


@golden.check(lambda c: c.kind == "mar_train_steps")
def train_steps(case: GoldenCase) -> None:
    """The loss by the objective; groups, warm-up, clipping and the average by the host's optimizer."""
    run, out, model = case.config["_run"], case.outputs, model_of(case).train()
    assert case.inputs["labels"].shape == (run["steps"], run["batch"])
    cosine, each = run["lr_schedule"] == "cosine", run["steps_per_epoch"]
    if not cosine:
        case.ignore("_run.min_lr", "_run.epochs", why="the rate is constant after the warm-up")
    setting = Optimizer(name="adamw", lr=run["lr"], betas=(0.9, 0.95), weight_decay=run["weight_decay"],
                        decay="matrices", groups=[{"match": "diffloss", "weight_decay": 0.0}], warmup_from=0,
                        warmup=run["warmup_epochs"] * each, schedule=run["lr_schedule"],
                        final_lr=run["min_lr"])  # fmt: skip
    params = {f"model.{n}": p for n, p in model.named_parameters()}
    groups = group(params, setting, [model])
    decayed = {n for g in groups if g.weight_decay is None for n in g.names}
    assert decayed == {f"model.{n}" for n in run["decayed_parameters"]}
    nodes = [{"params": [params[n] for n in g.names]} for g in groups]
    optimizer, average = make_optimizer(nodes, setting, torch.device("cpu")), EMA(model, run["ema_rate"])
    for node, g in zip(optimizer.param_groups, groups, strict=True):
        node["weight_decay"] = setting.weight_decay if g.weight_decay is None else g.weight_decay
    assert_close(latents(case, 0), out["step0.x"], 1e-6, "latents")
    for k in range(run["steps"]):
        rate = learning_rate(setting, k, run["epochs"] * each)
        assert_close(torch.tensor(rate).double(), out[f"step{k}.lr"], 1e-6, f"step{k}.lr", 1e-12)
        for node in optimizer.param_groups:
            node["lr"] = rate
        loss = terms_of(case, model, k)[0]["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), run["grad_clip"])
        assert_close(loss, out[f"step{k}.loss"], 1e-4, f"step{k}.loss")
        assert_close(norm, out[f"step{k}.grad_norm"], 1e-4, f"step{k}.grad_norm")
        optimizer.step()
        average.update()
    floor, state = adam_floor(run["lr"], 2), model.state_dict()
    for name, want in out.items():
        kind, _, key = name.partition(".")
        if kind in ("final", "ema"):
            found = state[key] if kind == "final" else average.average[key]
            if key.endswith("qkv.bias"):  # softmax takes a key's bias out: its gradient is rounding, of any sign
                found, want = (torch.cat([q, v]) for q, _, v in (found.chunk(3), want.chunk(3)))
            assert_close(found, want, 1e-5, name, floor)


# -- sizes -------------------------------------------------------------------------------------------------------------

COUNTS = {
    "mar-base": (207_924_768, 35_749_920),
    "mar-large": (478_326_304, 72_230_432),
    "mar-huge": (942_403_104, 151_206_944),
    "mar-large-3x1024": (426_357_792, 20_261_920),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_preset_size(preset: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "mar", "preset": preset})
        read = ck.CONVERTER.config(ck.CONVERTER.from_ours(model.state_dict()))
    numbers = [sum(p.numel() for p in part.parameters()) for part in (model, model.diffloss)]
    assert tuple(numbers) == COUNTS[preset]
    assert {k: read[k] for k in PRESETS[preset]} == PRESETS[preset] and PRESETS[preset]["encoder_width"] in GUIDANCE
    assert not ck.CONVERTER.published.assumes(model.state_dict(), read)


# -- network -----------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"input_size": 4, "patch_size": 1, "in_channels": 3, "num_classes": 4, "buffer_size": 2,
                        "head_depth": 1, "head_width": 24}  # fmt: skip
TINY |= {f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in (("width", 16), ("depth", 1), ("heads", 2))}


def tiny(**more: Any) -> MAR:
    torch.manual_seed(0)
    model: MAR = registry().build("model", {"name": "mar", **TINY, **more})
    suites.randomise(model, scale=0.2)
    return model.eval()


def test_a_file_tells_a_ratio_that_fits_both_halves() -> None:
    """Hidden widths are rounded down, in each half by another share."""
    model = tiny(decoder_width=20, mlp_ratio=2.7)
    read = ck.CONVERTER.config(ck.CONVERTER.from_ours(model.state_dict()))
    again = MAR(**read | {"encoder_heads": 2, "decoder_heads": 2})
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_tokens_are_patches_with_channels_first() -> None:
    model = tiny(input_size=6, patch_size=2)
    x = torch.arange(2 * 3 * 36).float().view(2, 3, 6, 6)
    tokens = model.patchify(x)
    assert tokens.shape == (2, 9, 12) and torch.equal(model.unpatchify(tokens), x)
    assert torch.equal(tokens[1, 5], x[1, :, 2:4, 4:6].flatten())
    with pytest.raises(VgmError, match="built for"):
        model.patchify(x[:, :2])
    for wrong in ({"patch_size": 3}, {"encoder_heads": 3}):
        with pytest.raises(VgmError, match="does not divide"):
            tiny(**wrong)


def test_the_head_may_say_the_token_and_listen_from_the_beginning() -> None:
    """As published the network says nothing at first, whatever z is, and z has no gradient; with a gain what is known
    reaches the loss. A head that says the token ends its chain on what it says."""
    g = torch.Generator().manual_seed(0)
    x, t, noise = torch.randn(64, 3, generator=g), torch.full((64,), 700), torch.randn(64, 3, generator=g)
    for gain, reached in ((0.0, False), (1.0, True)):
        torch.manual_seed(0)
        model: MAR = registry().build("model", {"name": "mar", **TINY, "head_gain": gain, "prediction": "x0"})
        z = torch.randn(64, 16, generator=g, requires_grad=True)
        terms = model.diffloss.losses(x, z, t, noise)
        terms["loss"].mean().backward()
        assert z.grad is not None and bool(z.grad.abs().max() > 1e-6) is reached
        if not gain:
            assert_close(terms["mse"], x.square().mean(1), 1e-5, "the token's own square")
            chain = (model.diffloss.respaced(4), z.detach(), noise, lambda: torch.zeros_like(noise))
            assert model.diffloss.sample(*chain).abs().max() < 1e-5


@torch.no_grad()
def test_a_fixed_variance_is_the_bound_whatever_the_head_says() -> None:
    """One ancestral step moves by the fixed deviation; the learned one follows the head's second half."""
    g = torch.Generator().manual_seed(0)
    head = tiny().diffloss
    z, x, noise = torch.randn(32, 16, generator=g), torch.randn(32, 3, generator=g), torch.randn(32, 3, generator=g)
    found = {}
    for variance in ("learned_range", "fixed_small", "fixed_large"):
        process = head.respaced(2, variance)
        drawn, still = (head.sample(process, z, x, lambda s=s: s * noise) for s in (1.0, 0.0))
        assert torch.equal(head.sample(process, z, x, lambda: 0 * noise), still)
        found[variance] = (drawn - still).abs().mean()
        head.net.final_layer.linear.bias[3:] += 3.0  # what it says of the variance
        follows = not torch.equal(head.sample(process, z, x, lambda: noise), drawn)
        assert follows is (variance == "learned_range")
        head.net.final_layer.linear.bias[3:] -= 3.0
    assert len({round(float(v), 6) for v in found.values()}) == 3


@torch.no_grad()
def test_items_may_know_different_numbers_of_tokens() -> None:
    """Together as alone; what is unknown says nothing, what is known does; a count that is given saves a look."""
    model, g = tiny(), torch.Generator().manual_seed(0)
    tokens, y = torch.randn(4, 16, 3, generator=g), torch.arange(4)
    known = torch.rand(4, 16, generator=g) < torch.tensor([0.0, 0.3, 0.7, 1.0])[:, None]
    z = model(tokens, known, y)
    alone = torch.cat([model(tokens[i : i + 1], known[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert_close(alone, z, 1e-5, "alone")
    assert torch.equal(model(torch.where(known[..., None], tokens, 7.0), known, y), z)
    moved = model(tokens + 1.0 * known[..., None], known, y)
    assert torch.equal(moved[0], z[0]) and (moved[1:] - z[1:]).abs().flatten(1).amax(1).min() > 1e-3
    one = known[2:3]
    assert torch.equal(model(tokens[2:3], one, y[2:3], int(one.sum())), model(tokens[2:3], one, y[2:3]))
    null = model.null_condition({"y": y})["y"]
    assert torch.equal(model(tokens, known, null), model(tokens, known))
    assert tiny(num_classes=0)(tokens, known).shape == z.shape


def test_checkpointing_changes_no_gradient() -> None:
    model = tiny(attn_dropout=0.2, proj_dropout=0.2).train()
    objective, found = MaskedDiffusion(model, copies=2), []
    batch = {"x": torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)), "cond": {"y": torch.arange(3)}}
    for on in (False, True):
        model.checkpointing = on
        assert model.diffloss.net.checkpointing is on
        model.zero_grad()
        torch.manual_seed(0)
        objective.loss("main", batch, Step(0))[0].backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    for n, v in found[0].items():
        torch.testing.assert_close(found[1][n], v)


# -- sampling ----------------------------------------------------------------------------------------------------------

SAMPLERS = {
    "guided": MARSampler(5, 6, guidance_scale=2.0),
    "constant": MARSampler(3, 4, 0.9, 3.0, "constant"),
    "plain": MARSampler(20, 3),
    "raster": MARSampler(4, 3, order="raster"),
    "ddim": MARSampler(2, "ddim5", chain="ddim", eta=0.5),
}


def request(n: int, seed: int = 0, **more: Any) -> Request:
    return Request((3, 4, 4), generators(range(seed, seed + n)), cond={"y": torch.arange(seed, seed + n) % 4}, **more)


@pytest.mark.parametrize("which", SAMPLERS)
@torch.no_grad()
def test_samplers_keep_what_is_given_and_mind_their_own_noise(which: str) -> None:
    """Items do not depend on their batch, even where they know different numbers of tokens; tokens that are kept come
    back bit for bit, the others differ between seeds."""
    model, sampler = tiny(), SAMPLERS[which]
    x = sampler(model, whole := request(4))
    assert x.shape == (4, 3, 4, 4) and torch.isfinite(x).all()
    apart = torch.cat([sampler(model, request(1)), sampler(model, request(3, 1))])
    assert_close(apart, x, 1e-4, "1 + 3")
    # 20 steps of 16 tokens: one step has nothing to do after the other
    assert whole.info["nfe"] == {"guided": 10, "constant": 6, "plain": 16, "raster": 4, "ddim": 2}[which]
    mask = torch.ones(4, 1, 8, 8, dtype=torch.bool)
    mask[:2, :, :, 4:] = False
    mask[2, :, 3, 3] = False
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    kept = kept_codes(mask, (4, 4))[:, None].expand_as(images)
    runs = [sampler(model, request(4, seed, images=images, mask=mask)) for seed in (0, 4)]
    for found in runs:
        assert torch.equal(found[kept], images[kept]) and torch.equal(found[3], images[3])
    assert not torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][2], runs[1][2])
    one = sampler(model, request(1, 2, images=images[2:3], mask=mask[2:3]))
    assert_close(one[0], runs[0][2], 1e-4, "alone, and with others that know more")
    assert sampler.accepts(model, None) is None and sampler.accepts(nn.Identity(), None) is not None


@torch.no_grad()
def test_a_fixed_order_is_made_from_its_beginning() -> None:
    """Every step is shown; what a step has made is not changed by later ones; grow makes the border anew, too."""
    seen: list[Tensor] = []
    r = request(2, callback=lambda i, total, x, x0: seen.append(x.clone()))
    x = SAMPLERS["raster"](tiny(), r)
    made = [(s != 0).any(1).flatten(1) for s in seen]
    counts = [int(m.sum(1)[0]) for m in made]
    assert len(seen) == 4 and counts == sorted(counts) and counts[-1] == 16 and torch.equal(seen[-1], x)
    for n, m, s in zip(counts, made, seen):
        assert bool(m[:, :n].all()) and torch.equal(s.flatten(2)[..., :n], x.flatten(2)[..., :n])
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 0, 0] = False
    images = torch.ones(1, 3, 4, 4)
    grown = MARSampler(2, 2, grow=1)(tiny(), request(1, images=images, mask=mask))
    assert int((grown == 1).all(1).sum()) == 12


@torch.no_grad()
def test_no_noise_at_temperature_nought() -> None:
    """Then the order and the beginning of the chains are all that differ; without a class nothing is guided."""
    model = tiny(num_classes=0)
    sampler = MARSampler(2, 3, temperature=0.0, guidance_scale=3.0)
    r = Request((3, 4, 4), generators([0, 1]))
    x = sampler(model, r)
    assert r.info["nfe"] == 2 and not torch.equal(x[0], x[1])
    hot = MARSampler(2, 3)(model, Request((3, 4, 4), generators([0, 1])))
    assert not torch.equal(hot, x)
    held = MARSampler(2, 3, clip_denoised=0.25)(model, Request((3, 4, 4), generators([0, 1])))
    assert held.abs().max() <= 0.25 < hot.abs().max()


SMALL = ("model.encoder_width=32", "model.encoder_depth=1", "model.decoder_width=32", "model.decoder_depth=1",
         "model.head_width=32", "model.head_depth=1")  # fmt: skip


class TestTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "mar/mnist"
    overrides: ClassVar[tuple[str, ...]] = (
        *(*SMALL, "model.attn_dropout=0", "model.proj_dropout=0", "objective.copies=2"),
        "conditions.class.dropout=0.5",  # so that the vector of no class has a gradient
    )


class TestSampling(suites.SamplerSuite):
    recipe: ClassVar[str] = "mar/mnist"
    overrides: ClassVar[tuple[str, ...]] = (*SMALL, "sampler.diffusion_steps=5")
    steps: ClassVar[int] = 4


def test_recipes_decay_what_the_paper_decays() -> None:
    """Matrices outside of the head, embeddings and positions with them."""
    for name in ("mar/mnist", "mar/imagenet256-sdvae"):
        setting = recipes.load(name).optimizer("main")
        params = {f"model.{n}": p for n, p in tiny().named_parameters()}
        decayed = {n for g in group(params, setting) if g.weight_decay is None for n in g.names}
        assert decayed == {n for n, p in params.items() if p.ndim > 1 and "diffloss" not in n} and len(decayed) > 8


# -- through the commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network on latents of the shipped codec, trained for a few steps on twenty digits."""
    from vgm_cli.data import open_dataset
    from vgm_cli.engine.train.loop import train
    from vgm_cli.images import to_uint8

    digits, data = open_dataset("mnist5k"), tmp_path_factory.mktemp("digits")
    labels = digits.labels()
    for y in range(10):
        (data / str(y)).mkdir()
        for i in np.flatnonzero(labels == y)[:2]:
            x = to_uint8(digits.pixels([int(i)]))[0, 0].numpy()
            Image.fromarray(x).save(data / str(y) / f"{i}.png")
    small = (*SMALL, f"data.path={data}", "train.steps=3", "train.batch_size=16", "train.preview_n=0",
             "train.save_every=0", "train.precision=fp32", "sampler.steps=3", "sampler.diffusion_steps=4")  # fmt: skip
    folder = tmp_path_factory.mktemp("mar") / "run"
    train(recipes.load("mar/mnist", None, list(small)), folder, quiet_end=True)
    return folder


def test_images_are_completed(vgm: Cli, run: Path, tmp_path: Path) -> None:
    """By the run's own sampler; latents that are kept are those of the image; blended, its pixels are."""
    given = ("restore", "--model", run, "--input", "mnist5k", "-n", 2, "--mask", "right", "--label", 7)
    code, out, err = vgm(*given, "--method", "mar", "--out", tmp_path / "a", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["labels"] == [7, 7] and result["nfe"] == 6 and result["guidance_scale"] == 2.0
    assert vgm(*given, "--method", "mar", "steps=2", "--blend", "1", "--out", tmp_path / "b")[0] == 0
    from vgm_cli.engine.restore.inputs import open_truth

    truth = open_truth("mnist5k", (1, 28, 28), 2, None).truth
    assert truth is not None
    shown = np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / "b/restored").glob("*.png"))])
    assert np.abs(shown[:, :, :4] / 127.5 - 1 - truth[:, 0, :, :4].numpy()).max() < 0.01
    loaded = load(str(run))
    with torch.no_grad():
        images = loaded.codec.latents(loaded.codec.encode(truth))
        mask = torch.ones(2, 1, 28, 28, dtype=torch.bool)
        mask[..., 14:] = False
        r = Request((4, 7, 7), generators([0, 1]), cond={"y": torch.tensor([7, 7])}, images=images, mask=mask)
        found = MARSampler(3, 4)(loaded.view, r)
    assert torch.equal(found[..., :3], images[..., :3]) and not torch.equal(found[..., 3:], images[..., 3:])
    code, _, err = vgm(*given, "--method", "dps")
    assert code == 2 and "--method mar" in err and "Traceback" not in err


def test_an_official_checkpoint_converts(vgm: Cli, tmp_path: Path) -> None:
    """The average unless the other weights are asked for, the arguments left out; how tokens are cut is told."""
    model = tiny(input_size=8, patch_size=2)
    state = model.state_dict()
    half = {k: v * 0.5 for k, v in state.items()}
    saved = {"model": state, "model_ema": half, "epoch": 3, "args": argparse.Namespace(model="mar_base", cfg=2.9)}
    torch.save(saved, tmp_path / "checkpoint-last.pth")
    told = ("patch_size=2", "in_channels=3", "input_size=8", "encoder_heads=2", "decoder_heads=2")
    for wanted, more in ((half, ()), (state, ("--weights", "model"))):
        out = tmp_path / f"ours{len(more)}.safetensors"
        code, _, err = vgm("convert", tmp_path / "checkpoint-last.pth", out, *told, *more)
        assert code == 0, err
        loaded = load(str(out))
        assert isinstance(loaded.model, MAR) and loaded.model.sample_shape == (3, 8, 8)
        assert all(torch.equal(v, wanted[k]) for k, v in loaded.model.state_dict().items())
        header = loaded.header
        assert header.recipe["sampler"] == {"name": "mar", "preset": "table"} and header.recipe["guidance_scale"] == 3.0


def test_a_run_becomes_an_official_checkpoint(vgm: Cli, run: Path, tmp_path: Path) -> None:
    """Its recipe leaves most keywords at their defaults; what the layout does not tell is told. One whose head says the
    token would be sampled as if it said the noise."""
    code, _, err = vgm("convert", run, tmp_path / "mar.pth", "--to", "mar")
    assert code == 2 and "model.prediction=eps" in err and not (tmp_path / "mar.pth").exists(), err
    noise = tmp_path / "noise"
    words = ("train.steps=1", "train.batch_size=16", "train.preview_n=0", "model.prediction=eps")
    code, _, err = vgm("train", "mar", *SMALL, *words, "--out", noise)
    assert code == 0, err
    code, _, err = vgm("convert", noise, tmp_path / "mar.pth", "--to", "mar")
    assert code == 0 and "codec=mnist-codec" in err, err


def test_steps_become_a_film(vgm: Cli, run: Path, tmp_path: Path) -> None:
    code, _, err = vgm("sample", run, "-n", 2, "--trace", "--out", tmp_path / "s.png")
    assert code == 0, err
    assert (tmp_path / "s-trace.png").is_file()
    code, _, err = vgm("sample", run, "-n", 2, "order=spiral-out", "--out", tmp_path / "x.png")
    assert code == 2 and "even square grid" in err
