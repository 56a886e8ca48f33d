"""VQGAN against CompVis/taming-transformers@3ba01b2 (golden cases), sizes, checkpoints, sampling, training."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vgm_plugins.vqgan import checkpoints as ck
from vgm_plugins.vqgan.model import GPT, Decoder, coordinate_map, coordinate_tokens
from vgm_plugins.vqgan.objective import PriorObjective, corrupt, prior_logits
from vgm_plugins.vqgan.presets import FIRST_STAGE, PRIOR
from vgm_plugins.vqgan.sampler import PriorSampler, local, sample_codes, sliding_window

from vgm_cli.api import Request, Step, Tokenizer, generators
from vgm_cli.ar.orders import Order, inverse, order_of
from vgm_cli.ar.sampling import Decoding, filter_logits
from vgm_cli.convert_api import unwrap
from vgm_cli.engine import checkpoint as files
from vgm_cli.engine.tokens import TokenCodec, as_output
from vgm_cli.engine.train.optim import group
from vgm_cli.errors import VgmError
from vgm_cli.losses import lpips
from vgm_cli.losses.first_stage import (
    AutoencoderObjective,
    discriminator_term,
    generator_term,
    reconstruction_loss,
)
from vgm_cli.losses.lpips import LPIPS
from vgm_cli.nets.discriminators import NLayerDiscriminator
from vgm_cli.nets.first_stage import VQModel
from vgm_cli.nn.gumbel import GumbelQuantizer, warmup_cosine
from vgm_cli.nn.quantize import (
    EMAVectorQuantizer,
    VectorQuantizer,
    code_usage,
    recent_usage,
)
from vgm_cli.registry import registry
from vgm_cli.settings import Optimizer
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("vqgan")

# -- golden cases: first stage -----------------------------------------------------------------------------------------


def keywords(config: dict[str, Any]) -> dict[str, Any]:
    """An official VQModel config -> constructor keywords."""
    dd = dict(config["ddconfig"])
    assert not dd.pop("double_z", False) and not dd.pop("give_pre_end", False), "a VQModel has neither"
    return {**dd, "embed_dim": config["embed_dim"], "n_embed": config["n_embed"]}


def first_stage(case: GoldenCase) -> VQModel:
    assert ck.CONVERTER.recognise(case.state)
    if not case.config["ddconfig"]["attn_resolutions"]:
        case.ignore("ddconfig.resolution", why="it places attention only")
    case.ignore("ddconfig.dropout", why="evaluated without dropout, or trained with 0")
    model = VQModel(**keywords(case.config))
    model.load_state_dict(ck.CONVERTER.to_ours(case.state))
    return model.eval()


@golden.check(lambda c: c.kind == "vqgan_autoencoder")
@torch.no_grad()
def autoencoder(case: GoldenCase) -> None:
    model, x, out = first_stage(case), case.inputs["image"], case.outputs
    assert_close(model.encoder(x), out["encoder_out"], 1e-5, "encoder_out")
    h = model.moments(x)
    assert_close(h, out["pre_quant"], 1e-5, "pre_quant")
    codes, loss, indices = model.quantize(h)
    assert torch.equal(indices.flatten(), out["indices"].flatten())
    assert torch.equal(model.tokens(x), indices)
    assert_close(codes, out["quant"], 1e-5, "quant")
    assert_close(loss, out["emb_loss"], 1e-5, "emb_loss")
    assert_close(model.reconstruct(codes), out["decoded"], 1e-5, "decoded")
    assert_close(model.decode_tokens(indices), out["decoded_from_indices"], 1e-5, "decoded_from_indices")


@golden.check(lambda c: c.kind == "vqgan_quantizer")
def quantizers(case: GoldenCase) -> None:
    config, z0, up = case.config, case.inputs["z"], case.inputs["upstream"]
    for name in sorted({k.split(".")[0] for k in case.outputs}):
        out = {k.removeprefix(name + "."): v for k, v in case.outputs.items() if k.startswith(name + ".")}
        if name.startswith("remap"):
            how = name.removeprefix("remap_")
            quantize = VectorQuantizer(
                config["n_e"],
                config["e_dim"],
                config["beta"],
                remap=case.inputs["used"].tolist(),
                unknown_index=int(how) if how.isdigit() else how,
            )
            quantize.load_state_dict({**case.state, "used": case.inputs["used"]})
            ids = quantize.tokens(z0)
            assert torch.equal(ids.flatten(), out["indices"].flatten()), name
            back = quantize.lookup(ids)
            codes = F.embedding(out["unmapped"], case.state["embedding.weight"]).view(*ids.shape, -1)
            assert_close(back, codes.permute(0, 3, 1, 2), 1e-6, name)
            continue
        quantize = VectorQuantizer(config["n_e"], config["e_dim"], config["beta"], legacy=name != "v2_fixed")
        quantize.load_state_dict(case.state)
        z = z0.clone().requires_grad_()
        zq, loss, indices = quantize(z)
        assert torch.equal(indices.flatten(), out["indices"].flatten()), name
        assert_close(zq, out["zq"], 1e-5, f"{name} zq")
        assert_close(loss, out["loss"], 1e-5, f"{name} loss")
        assert_close(quantize.lookup(indices), out["codebook_entry"], 1e-6, f"{name} entry")
        (only,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert_close(only, out["grad_z_loss_only"], 1e-4, f"{name} grad_z_loss_only")
        (loss + (zq * up).sum()).backward()
        assert_close(z.grad, out["grad_z_total"], 1e-4, f"{name} grad_z_total")
        assert_close(quantize.embedding.weight.grad, out["grad_embedding"], 1e-4, f"{name} grad_embedding")
        if "perplexity" in out:
            assert_close(code_usage(indices, config["n_e"])["perplexity"], out["perplexity"], 1e-5, "perplexity")


@golden.check(lambda c: c.kind == "vqgan_gumbel")
def gumbel(case: GoldenCase) -> None:
    config = case.config
    quantize = GumbelQuantizer(
        config["n_embed"],
        config["embedding_dim"],
        config["num_hiddens"],
        config["straight_through"],
        config["kl_weight"],
        config["temp"],
    )
    quantize.load_state_dict(case.state)
    for mode in ("train", "eval"):
        quantize.train(mode == "train")
        z = case.inputs["z"].clone().requires_grad_()
        codes, kl, indices = quantize(z, case.inputs["exponential"])
        assert torch.equal(indices, case.outputs[f"{mode}.indices"])
        assert_close(codes, case.outputs[f"{mode}.zq"], 1e-5, f"{mode}.zq")
        assert_close(kl, case.outputs[f"{mode}.kl"], 1e-5, f"{mode}.kl")
        (kl + (codes * case.inputs["upstream"]).sum()).backward()
        assert_close(z.grad, case.outputs[f"{mode}.grad_z"], 1e-4, f"{mode}.grad_z")
    want = case.outputs["temperature_schedule"]
    got = torch.tensor([warmup_cosine(n, **config["temp_sched"]) for n in config["sched_steps"]], dtype=torch.float64)
    assert_close(got, want, 1e-12, "temperature_schedule")


@golden.check(lambda c: c.kind == "vqgan_discriminator")
@torch.no_grad()
def discriminators(case: GoldenCase) -> None:
    config, x = case.config, case.inputs["image"]
    net = NLayerDiscriminator(config["input_nc"], config["ndf"], config["n_layers"], config["use_actnorm"])
    net.load_state_dict(case.state)
    assert_close(net.eval()(x), case.outputs["eval_logits"], 1e-5, "eval_logits")
    assert_close(net.train()(x), case.outputs["train_logits"], 1e-5, "train_logits")
    assert_close(net.eval()(x), case.outputs["eval_logits_after"], 1e-5, "eval_logits_after")
    state = net.state_dict()
    for name, want in case.outputs.items():
        if name.startswith("after_train."):
            assert_close(state[name.removeprefix("after_train.")], want, 1e-5, name)


def toy_perceptual(a: Tensor, b: Tensor) -> Tensor:
    weights = 1 + 0.5 * torch.arange(a.shape[1]).view(1, -1, 1, 1)
    return (weights * (a - b).square()).mean(dim=(1, 2, 3), keepdim=True)


@golden.check(lambda c: c.kind == "vqgan_loss")
def losses(case: GoldenCase) -> None:
    """The whole first stage, both optimizers, before and after disc_start."""
    params, x, out = case.config["lossconfig"]["params"], case.inputs["image"], case.outputs
    assert case.config["lossconfig"]["target"].endswith("VQLPIPSWithDiscriminator") and not params["disc_conditional"]
    assert {int(re.match(r"step(\d+)", k)[1]) for k in out if k.startswith("step")} == set(case.config["steps"])  # type: ignore[index]
    case.ignore("lossconfig.params.pixelloss_weight", why="the official loss never uses it")
    prefix = "loss.discriminator."
    own = {k.removeprefix(prefix): v for k, v in case.state.items() if k.startswith(prefix)}
    for step in case.config["steps"]:
        model = first_stage(case).train()
        disc = NLayerDiscriminator(
            params["disc_in_channels"],
            params.get("disc_ndf", 64),
            params.get("disc_num_layers", 3),
            params.get("use_actnorm", False),
        )
        disc.load_state_dict(own)
        disc.train()
        recon, qloss, _ = model(x)
        assert_close(recon, out["xrec"], 1e-5, "xrec")
        assert_close(qloss, out["qloss"], 1e-5, "qloss")
        nll, logs = reconstruction_loss(
            x, recon, toy_perceptual, params.get("perceptual_weight", 1.0), "l1", reduction="mean"
        )
        factor = params.get("disc_factor", 1.0) * (step >= params["disc_start"])
        term, more = generator_term(disc, recon, nll, model.last_layer, params.get("disc_weight", 1.0))
        loss = nll + factor * term + params.get("codebook_weight", 1.0) * qloss
        found = {**logs, **more, "quant_loss": qloss, "disc_factor": torch.tensor(factor)}
        found |= {"loss": loss, "total_loss": loss}
        loss.backward()
        found |= {
            "grad_codebook": model.quantize.embedding.weight.grad,
            "grad_first_layer": model.encoder.conv_in.weight.grad,
            "grad_last_layer": model.last_layer.grad,
        }
        disc.load_state_dict(own)  # the case starts both passes from the same state
        disc.zero_grad()
        recon = recon.detach()
        d_loss, d_logs = discriminator_term(disc, x, recon, params.get("disc_loss", "hinge"))
        logit = float(disc(x).detach().abs().max())
        d_loss = factor * d_loss
        d_loss.backward()
        second = {"loss": d_loss, "disc_loss": d_loss, **d_logs, "grad_disc_first": disc.main[0].weight.grad}
        for number, values in enumerate((found, second)):
            at = f"step{step}.opt{number}."
            for name, want in out.items():
                if name.startswith(at):
                    key = name.removeprefix(at)
                    got = values.get(key, torch.zeros(()))  # p_loss of weight 0 is not computed
                    tolerance = 1e-4 if key.startswith("grad") or key == "d_weight" else 1e-5
                    # a mean of logits that cancel is right to what the logits are
                    floor = tolerance * logit if key.startswith("logits") else 0.0
                    assert_close(torch.as_tensor(got).float().reshape(want.shape), want, tolerance, name, floor)


@golden.check(lambda c: c.kind == "lpips")
@torch.no_grad()
def lpips_case(case: GoldenCase) -> None:
    rng = np.random.RandomState(case.config["seed"])
    shapes = {k: v.shape for k, v in lpips.from_ours(LPIPS().state_dict()).items() if not k.startswith("scaling")}
    state = {}
    for name, shape in sorted(shapes.items(), key=lambda kv: kv[0].startswith("lin")):
        if name.startswith("lin"):
            value = rng.uniform(0, 1, tuple(shape))
        elif name.endswith("weight"):
            value = rng.standard_normal(tuple(shape)) * math.sqrt(2 / (shape[1] * 9))
        else:
            value = rng.standard_normal(tuple(shape)) * 0.05
        state[name] = torch.from_numpy(value.astype(np.float32))
    model = LPIPS()
    model.load_state_dict(lpips.to_ours(state))
    assert_close(model(case.inputs["a"], case.inputs["b"]), case.outputs["lpips"], 1e-5, "lpips")


# -- golden cases: prior -----------------------------------------------------------------------------------------------


ORDERS = {
    "Identity": "raster",
    "Subsample": "subsample",
    "ZCurve": "z-curve",
    "SpiralOut": "spiral-out",
    "SpiralIn": "spiral-in",
    "Random": "random",
    "AlternateParsing": "alternate",
}


def prior(state: dict[str, Tensor], config: dict[str, Any], **more: Any) -> GPT:
    """An official GPT config -> ours, weights through the converter."""
    assert ck.PRIOR_CONVERTER.recognise(state)
    model = GPT(**config, **more)
    model.load_state_dict(ck.PRIOR_CONVERTER.to_ours(state))
    read = ck.PRIOR_CONVERTER.config(state)
    assert {k: read.get(k, 0) for k in ("vocab_size", "block_size", "n_layer", "n_embd")} == {
        k: config[k] for k in ("vocab_size", "block_size", "n_layer", "n_embd")
    }
    assert read.get("n_unmasked", 0) == config.get("n_unmasked", 0)
    return model.eval()


def picker(gumbel: Tensor, decoding: Decoding) -> Any:
    """multinomial as in the cases: the largest log-probability plus stored Gumbel noise."""
    return lambda logits, i: (decoding.probs(logits).log() + gumbel[i]).argmax(-1)


@golden.check(lambda c: c.kind == "vqgan_gpt")
@torch.no_grad()
def gpt(case: GoldenCase) -> None:
    case.ignore("embd_pdrop", "resid_pdrop", "attn_pdrop", why="evaluated without dropout")
    model, ids = prior(case.state, case.config), case.inputs["idx"]
    logits = model(ids)
    assert_close(logits, case.outputs["logits"], 1e-5, "logits")
    loss = F.cross_entropy(logits.flatten(0, 1), case.inputs["targets"].flatten())
    assert_close(loss, case.outputs["loss"], 1e-5, "loss")
    want = case.outputs["cached_logits"]
    start = int(case.config.get("prompt", 3))
    decoder = Decoder(model, ids[:, :start], ids.shape[1] - start + 1)
    got = [decoder.first()] + [decoder.step(ids[:, i]) for i in range(start, ids.shape[1])]
    assert_close(torch.stack(got, 1), want[:, start - 1 :], 1e-5, "cached_logits")


@golden.check(lambda c: c.kind == "vqgan_gpt_sampling")
@torch.no_grad()
def gpt_sampling(case: GoldenCase) -> None:
    model, prefix, n = prior(case.state, case.config["gpt"]), case.inputs["cond"], case.config["n"]
    greedy = sample_codes(model, prefix, n, Decoding(greedy=True).picker(None))
    assert torch.equal(greedy, case.outputs["greedy"])
    for i, setting in enumerate(case.config["settings"]):
        decoding = PriorSampler(**setting).decoding
        if setting["top_k"] is None:
            case.ignore(f"settings[{i}].top_p", why="the official nucleus comes after top-k, or not at all")
        ids = sample_codes(model, prefix, n, picker(case.inputs["gumbel"], decoding))
        assert torch.equal(ids, case.outputs[f"sample_{i}"]), setting
        if f"kept_{i}" in case.outputs:
            kept = filter_logits(case.inputs["logits"], decoding.top_k, decoding.top_p).isfinite()
            assert torch.equal(kept, case.outputs[f"kept_{i}"]), setting


@golden.check(lambda c: c.kind == "vqgan_net2net")
@torch.no_grad()
def net2net(case: GoldenCase) -> None:
    """Both stages of one checkpoint."""
    config, out = case.config, case.outputs
    codec = first_stage(case)
    x, cond = case.inputs["image"], case.inputs.get("cond")
    grid = codec.token_shape(tuple(x.shape[1:]))
    kind: Any = {"class": "class", "coord": "coord"}.get(config["cond"], "none")
    order: Any = ORDERS[config.get("permuter") or "Identity"]
    if kind == "none":
        more = {"sos_token": config.get("sos_token", 0)}
    else:
        more = {}
        case.ignore("sos_token", why="a condition starts the sequence")
    if kind != "coord":
        case.ignore("n_embed_coord", "down", why="there are no coordinates")
    case.ignore("pkeep", why="which codes are kept is stored, or all of them are")
    case.ignore("gpt.embd_pdrop", "gpt.resid_pdrop", "gpt.attn_pdrop", why="evaluated, or trained with 0")
    model = prior(case.state, config["gpt"], grid=grid, condition=kind, order=order, **more)
    permutation = model.permutation(x.device)
    z = codec.tokens(x).flatten(1)[:, permutation]
    assert torch.equal(z, out["z_indices"].view_as(z))
    if kind == "class":
        c = model.prefix({"y": cond}, len(x), x.device)
    elif kind == "coord":
        c = coordinate_tokens(cond[:, 0], config["n_embed_coord"], config["down"]).flatten(1)
    else:
        c = model.prefix({}, len(x), x.device)
    assert torch.equal(c, out["c_indices"].view_as(c))
    logits = prior_logits(model, c, z)
    assert_close(logits, out["logits"], 1e-5, "logits")
    assert_close(F.cross_entropy(logits.flatten(0, 1), z.flatten()), out["loss"], 1e-5, "loss")
    if "keep_mask" in case.inputs:
        given = corrupt(z, case.inputs["keep_mask"], case.inputs["random_indices"])
        logits = prior_logits(model, c, given)
        assert_close(logits, out["train_logits"], 1e-5, "train_logits")
        assert_close(F.cross_entropy(logits.flatten(0, 1), z.flatten()), out["train_loss"], 1e-5, "train_loss")
    half = config["half"]
    decoding = PriorSampler(config["temperature"], config["top_k"]).decoding
    pick = picker(case.inputs["gumbel"], decoding)
    rest = sample_codes(model, torch.cat([c, z[:, :half]], 1), z.shape[1] - half, pick)
    sampled = torch.cat([z[:, :half], rest], dim=1)
    assert torch.equal(sampled, out["sampled"])
    image = codec.decode_tokens(sampled[:, inverse(permutation)].view(-1, *grid))
    assert_close(image, out["sampled_image"], 1e-5, "sampled_image")


@golden.check(lambda c: c.kind == "vqgan_sliding")
def sliding(case: GoldenCase) -> None:
    config, cond = case.config, case.inputs["cond_indices"]
    v = torch.arange(config["V"])
    assert cond.shape[1:] == (config["H"], config["W"])

    def toy(x: Tensor) -> Tensor:
        x = x.float()
        context = (x * (0.37 * torch.arange(x.shape[1])).cos()).cumsum(1)[..., None]
        return 2 * (0.11 * context * (1 + 0.05 * v)).sin() + (0.7 * x[..., None] + 0.3 * v).cos()

    window = (config.get("window", 16),) * 2

    def prefix(top: int, left: int) -> Tensor:
        return cond[:, top : top + window[0], left : left + window[1]].flatten(1)

    decoding = Decoding(config["temperature"], config["top_k"] or 0)
    ids = sliding_window(toy, prefix, torch.zeros_like(cond), window, picker(case.inputs["gumbel"], decoding))
    assert torch.equal(ids, case.outputs["indices"])


@golden.check(lambda c: c.kind == "vqgan_permuters")
def permuters(case: GoldenCase) -> None:
    n = case.config["n"]
    for name, want in case.outputs.items():
        permuter, direction = name.split(".")
        order = order_of(ORDERS[permuter], n, n)
        assert torch.equal(order if direction == "forward" else inverse(order), want), name


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {
    "f16-1024": 72_141_699,
    "f16-8192": 73_976_707,
    "f16-16384": 76_073_859,
    "gumbel-f8": 68_995_971,
    "depth-f16-1024": 72_137_089,
}
PRIORS = {
    "faceshq": 304_932_864,
    "drin": 304_932_864,
    "coco-scene": 975_876_352,
    "open-images-scene": 1_045_638_144,
    "cin": 1_410_642_432,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "kind"), [*((n, "model") for n in SIZES), ("f16-1024", "codec")])
def test_first_stage_size(name: str, kind: str) -> None:
    with torch.device("meta"):
        model = registry().build(kind, {"name": "vqgan", "preset": name})
        x = torch.empty(1, model.encoder.conv_in.in_channels, 256, 256)
    assert count(model) == SIZES[name]
    assert isinstance(model, Tokenizer) and model.codebook_size == FIRST_STAGE[name]["n_embed"]
    grid = model.token_shape(tuple(x.shape[1:]))
    assert model.tokens(x).shape == (1, *grid)
    assert model.decode_tokens(torch.empty(1, *grid, dtype=torch.long, device="meta")).shape == x.shape
    read = ck.CONVERTER.config(model.state_dict())
    assert read == FIRST_STAGE[name]


@pytest.mark.parametrize("name", PRIORS)
def test_prior_size(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "vqgan-prior", "preset": name})
    assert count(model) == PRIORS[name]
    read = ck.PRIOR_CONVERTER.config(model.state_dict())
    assert {k: read[k] for k in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")} == {
        k: PRIOR[name][k] for k in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    }


def test_every_preset_is_counted() -> None:
    assert set(SIZES) == set(FIRST_STAGE) and set(PRIORS) == set(PRIOR)


# -- quantizers --------------------------------------------------------------------------------------------------------


def test_moving_average_codebook_follows_its_latents() -> None:
    """Codes go to the means of what chose them; no gradient reaches them; evaluation changes nothing."""
    torch.manual_seed(0)
    quantize = EMAVectorQuantizer(3, 2, decay=0.5)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    quantize.embedding.weight.copy_(centres + 0.5)
    quantize.embedding.embed_avg.copy_(centres + 0.5)
    quantize.embedding.cluster_size.fill_(1.0)
    z = (centres[torch.arange(60) % 3] + 0.01 * torch.randn(60, 2)).view(1, 60, 1, 2).permute(0, 3, 1, 2)
    z = z.clone().requires_grad_()
    for _ in range(30):
        codes, loss, indices = quantize(z)
    loss.backward()
    assert z.grad.abs().sum() > 0 and not list(quantize.parameters())
    assert (quantize.embedding.weight - centres).abs().max() < 0.02
    assert torch.equal(quantize.tokens(z.detach()), indices) and torch.equal(indices.flatten(), torch.arange(60) % 3)
    torch.testing.assert_close(loss, 0.25 * (codes.detach() - z).square().mean())
    before = quantize.embedding.weight.clone()
    with torch.no_grad():
        quantize(z)  # the discriminator's pass
    quantize.eval()(z)
    assert torch.equal(quantize.embedding.weight, before)


def test_unit_length_codes() -> None:
    quantize = VectorQuantizer(16, 4, legacy=False, l2_norm=True)
    quantize.embedding.weight.data *= 3.0
    z = 5 * torch.randn(2, 4, 3, 3)
    codes, _, indices = quantize(z)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, 3, 3))
    torch.testing.assert_close(codes, quantize.lookup(indices))
    cosine = torch.einsum("bchw,nc->bnhw", F.normalize(z, dim=1), F.normalize(quantize.embedding.weight, dim=1))
    assert torch.equal(indices, cosine.argmax(1))


def test_codes_are_placed_on_data() -> None:
    for quantize in (VectorQuantizer(8, 3), EMAVectorQuantizer(8, 3)):
        z = torch.randn(2, 3, 4, 4) + 10
        quantize.place(z)
        assert len(quantize.tokens(z).unique()) == 8
        assert quantize(z)[1] < 10


def test_usage() -> None:
    even, one = code_usage(torch.arange(8).repeat(5), 16), code_usage(torch.full((3, 4, 4), 5), 16)
    assert math.isclose(even["perplexity"].item(), 8, rel_tol=1e-5) and even["cluster_usage"] == 8
    assert math.isclose(one["perplexity"].item(), 1, rel_tol=1e-5)
    recent = torch.zeros(10)
    assert recent_usage(recent, torch.arange(1, 5), 10) == 0.5  # zeros are left
    assert recent_usage(recent, torch.arange(8), 10) == 0.8
    assert recent.tolist() == [3, 4, 0, 1, 2, 3, 4, 5, 6, 7]
    assert recent_usage(recent, torch.arange(30) % 2, 10) == 0.2


# -- first stage: training ---------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "ch": 8,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "resolution": 16,
    "z_channels": 4,
    "embed_dim": 4,
    "norm_groups": 4,
    "n_embed": 16,
}


def tiny_codec(**more: Any) -> VQModel:
    torch.manual_seed(0)
    return VQModel(**{**TINY, **more})


def blobs(n: int, size: int = 16, channels: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=g) * 2 - 1
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).clamp(-1, 1)


@pytest.mark.parametrize("options", [
    {},
    {"quantizer": "ema"},
    {"quantizer": "gumbel", "kl_weight": 1e-3},
    {"legacy": False, "l2_norm": True, "entropy_weight": 0.05},
])  # fmt: skip
def test_every_quantizer_trains(options: dict[str, Any]) -> None:
    model, x = tiny_codec(**options).train(), blobs(16)
    schedule = {"warm_up_steps": 0, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 1.0, "max_decay_steps": 36}
    gumbel = options.get("quantizer") == "gumbel"
    objective = AutoencoderObjective(model, place_codes=not gumbel, temperature=schedule if gumbel else None)
    objective.prepare({"x": x}, Step(0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for i in range(36):
        loss, logs = objective.loss("autoencoder", {"x": x}, Step(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(logs["rec_loss"].item())
        assert all(torch.as_tensor(v).isfinite().all() for v in logs.values())
    assert losses[-1] < 0.75 * losses[0]
    assert logs["cluster_usage"] > 4 and {"perplexity", "quant_loss", "codebook_usage"} <= logs.keys()
    if gumbel:
        assert math.isclose(model.quantize.temperature, warmup_cosine(35, **schedule))
    state = objective.state_dict()
    again = AutoencoderObjective(model)
    again.load_state_dict(state)
    assert torch.equal(again.recent, objective.recent)


def test_gumbel_noise_is_exponential() -> None:
    model = tiny_codec(quantizer="gumbel")
    noise = AutoencoderObjective(model).noise(torch.zeros(64, 3, 16, 16), Step(0), "noise")
    assert noise.shape == (64, 16, 8, 8) and noise.min() > 0
    assert abs(noise.mean() - 1) < 0.02 and abs(noise.var() - 1) < 0.05
    assert abs((noise > 2).float().mean() - math.exp(-2)) < 0.01


# -- codec of tokens ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_token_codec_is_a_codec_whose_latents_are_ids() -> None:
    model, x = tiny_codec().eval(), blobs(3)
    model.quantize.embedding.weight.data.normal_()
    codec = as_output(model, "tokens")
    assert isinstance(codec, TokenCodec) and codec.vocab_size == 16 and codec.factor == 2
    assert codec.latent_shape((3, 16, 24)) == (8, 12)
    ids = codec.latents(codec.encode(x))
    assert ids.dtype == torch.int64 and torch.equal(ids, model.tokens(x))
    torch.testing.assert_close(codec.decode(ids), model.decode(model.latents(model.encode(x))))
    assert codec.decode(torch.zeros(1, 5, 7, dtype=torch.long)).shape == (1, 3, 10, 14)
    assert as_output(model, None) is model and as_output(model, "latents") is model
    with pytest.raises(VgmError, match="not tokens"):
        as_output(nn.Identity(), "tokens")
    with pytest.raises(VgmError, match="token"):
        as_output(model, "token")


@torch.no_grad()
def test_fewer_ids_than_codes(tmp_path: Path) -> None:
    used = np.array([3, 1, 7, 2])
    np.save(tmp_path / "used.npy", used)
    whole = tiny_codec().eval()
    whole.quantize.embedding.weight.data.normal_()
    x = blobs(3)
    for unknown, size in (("extra", 5), (0, 4), ("random", 4)):
        model = tiny_codec(remap=str(tmp_path / "used.npy"), unknown_index=unknown).eval()
        model.load_state_dict({**whole.state_dict(), "quantize.used": torch.from_numpy(used)})
        ids, codes = model.tokens(x), whole.tokens(x)
        assert model.codebook_size == size and ids.max() < size
        known = (codes[..., None] == torch.from_numpy(used)).any(-1)
        assert torch.equal(torch.from_numpy(used)[ids[known]], codes[known]) and (~known).any()
        assert model.decode_tokens(ids).shape == x.shape


def test_two_stages_on_a_strangers_images(
    tmp_path: Path, tmp_run: Path, vgm: Callable[..., tuple[int, str, str]]
) -> None:
    """The two commands of the README on 32 x 32 colour images, with a token cache, sampling, likelihood; then what must be
    refused."""
    from PIL import Image

    for i, image in enumerate(blobs(24, 32)):
        path = tmp_path / "mine" / ("day", "night")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(path)
    quick = ("train.steps=2", "train.save_every=2", "train.preview_n=4", "train.batch_size=8")
    data, codec, run = f"data.path={tmp_path / 'mine'}", tmp_run / "vqgan", tmp_run / "llamagen"
    code, _, err = vgm("train", "vqgan", data, *quick, "objective.disc_start=1", "--out", codec)
    assert code == 0, err
    small = ("model.dim=32", "model.n_layer=1", "model.n_head=2", f"data.cache_latents={tmp_run / 'cache'}")
    code, _, err = vgm("train", "llamagen", "--codec", codec, data, *quick, *small, "--out", run)
    assert code == 0, err
    path = files.resolve(run)
    header = files.read_header(path)
    assert header.parts["codec"].output == "tokens" and header.data["sample_shape"] == [8, 8]
    assert header.component["kwargs"]["vocab_size"] == 256 and header.component["kwargs"]["grid"] == [8, 8]
    assert header.component["kwargs"]["num_classes"] == 2 and header.data["class_names"] == ["day", "night"]
    index = json.loads((tmp_run / "cache" / "latents.json").read_text())
    assert index["codec"] == header.parts["codec"].cache_key and index["codec"].endswith(":tokens")
    assert index["dtype"] == "int64" and index["shape"] == [8, 8]
    code, _, err = vgm("sample", run, "-n", 4, "--label", "night", "--out", tmp_run / "x.npz")
    assert code == 0, err
    with np.load(tmp_run / "x.npz") as f:
        assert f["arr_0"].shape == (4, 32, 32, 3)
    code, out, err = vgm("evaluate", run, "--metrics", "bits-per-dim", "-n", 8, "--json")
    assert code == 0, err
    assert "codes" in out and 0 < json.loads(out)[0]["value"] < 10

    code, _, err = vgm("train", "llamagen", "--codec", "mnist-codec", "--out", tmp_run / "a")
    assert code == 2 and "not tokens" in err
    code, _, err = vgm("train", "vqgan", "--codec", codec, data, "--out", tmp_run / "b")
    assert code == 2 and "pixels" in err
    code, _, err = vgm("train", "dit", "--codec", codec, data, f"data.cache_latents={tmp_run / 'cache'}", *quick)
    assert code == 2 and "another codec" in err, "a cache of ids is not one of latents"


def test_a_tokenizer_is_trained_first_where_none_fits(
    tmp_path: Path, tmp_run: Path, vgm: Callable[..., tuple[int, str, str]]
) -> None:
    """One command on colour images: the shipped tokenizer is for digits."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.fromarray(np.full((16, 16, 3), (20 * i, 100, 255 - 20 * i), np.uint8)).save(tmp_path / f"images/{i}.png")
    recipe = tmp_path / "quick.yaml"
    recipe.write_text("base: vqgan/small-tokenizer\ntrain: {steps: 2, save_every: 2, batch_size: 4}\n")
    small = (
        "model.dim=32",
        "model.n_layer=1",
        "model.n_head=2",
        "train.steps=1",
        "train.batch_size=4",
        "train.preview_n=2",
    )
    code, _, err = vgm(
        "train",
        "llamagen",
        f"data.path={tmp_path / 'images'}",
        f"codec.fallback={recipe}",
        *small,
        "--out",
        tmp_run / "a",
    )
    assert code == 0 and "training one first" in err, err
    header = files.read_header(files.resolve(tmp_run / "a"))
    assert header.parts["codec"].relative and header.parts["codec"].output == "tokens"
    assert header.component["kwargs"]["vocab_size"] == 512 and header.component["kwargs"]["num_classes"] == 0
    code, _, err = vgm("sample", tmp_run / "a", "-n", 2, "--out", tmp_path / "x.npz")
    assert code == 0, err
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (2, 16, 16, 3)


# -- prior -----------------------------------------------------------------------------------------------------------

PRIOR_TINY: dict[str, Any] = {"vocab_size": 12, "grid": (4, 4), "n_layer": 2, "n_head": 2, "n_embd": 16}


def tiny_prior(**more: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(**{**PRIOR_TINY, **more})
    suites.randomise(model, scale=0.4)
    return model.eval()


def test_conditions_share_the_codes_table() -> None:
    classes = tiny_prior(num_classes=30)
    assert classes.condition == "class" and classes.tok_emb.num_embeddings == 30 and classes.codes == 12
    assert classes.block_size == 17
    request = Request((4, 4), generators(range(40)), cond={"y": torch.full((40,), 29)})
    assert PriorSampler()(classes, request).max() < 12, "a class is never drawn as a code"
    alone = tiny_prior()
    assert alone.condition == "none" and torch.equal(alone.prefix({}, 2, torch.device("cpu")), torch.zeros(2, 1).long())
    started = tiny_prior(sos_token=7)
    assert started.prefix({}, 2, torch.device("cpu")).tolist() == [[7], [7]]
    assert tiny_prior(sos_token=12).tok_emb.num_embeddings == 13, "a start token beyond the codes has a row of its own"
    coord = tiny_prior(condition="coord")
    assert coord.block_size == 32 and coord.n_coord == 11
    assert coord.tok_emb.num_embeddings == 12


def test_coordinates() -> None:
    whole = coordinate_map(4, 6)
    assert whole.min() == 0 and whole.max() < 1 and (whole.flatten().diff() > 0).all()
    ids = coordinate_tokens(whole[None], 10)
    assert torch.equal(ids[0], (10 * whole).round().long())
    pooled = coordinate_tokens(torch.tensor([[[0.0, 0.2], [0.4, 1.0]]]), 10, down=2)
    assert pooled.tolist() == [[[4]]]
    assert coordinate_tokens(torch.ones(1, 2, 2), 10).max() == 10  # one more than n_coord ids
    small = tiny_prior(condition="coord")  # the ids that a far larger grid would need and the table has not
    assert small.prefix({"coord": torch.ones(1, 4, 4)}, 1, torch.device("cpu")).max() == 11


def test_coordinates_of_released_face_priors() -> None:
    """Of pixels, averaged over each code's 16 x 16, into 1024 ids of which the published table has all."""
    pixels = torch.arange(256 * 256).view(1, 256, 256) / 256**2
    want = coordinate_tokens(pixels, 1024, down=16)
    torch.testing.assert_close(coordinate_map(16, 16, factor=16), F.avg_pool2d(pixels, 16)[0])
    with torch.device("meta"):
        assert GPT(**PRIOR["faceshq"]).tok_emb.num_embeddings == 1024
    published = tiny_prior(vocab_size=1024, grid=(16, 16), n_embd=64, condition="coord", n_coord=1024, coord_factor=16)
    read = GPT(**ck.PRIOR_CONVERTER.config(published.state_dict()))
    read.load_state_dict(ck.PRIOR_CONVERTER.to_ours(published.state_dict()))
    ids = read.prefix({"coord": read.coordinates(16, 16, torch.device("cpu"))[None]}, 1, torch.device("cpu"))
    assert torch.equal(ids, want.flatten(1))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"condition": "coord"}, {"order": "z-curve"}])
def test_likelihoods_of_all_images_sum_to_one(options: dict[str, Any]) -> None:
    model = tiny_prior(vocab_size=3, grid=(2, 2), n_coord=2, **options)
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    y = torch.full((81,), 1) if options.get("num_classes") else None
    nats, kind = model.log_likelihood(every, generators(range(81)), y)
    assert math.isclose(nats.double().exp().sum().item(), 1.0, rel_tol=1e-5) and "codes" in kind


@torch.no_grad()
@pytest.mark.parametrize("condition", ["class", "coord"])
def test_a_window_of_the_whole_image_is_plain_sampling(condition: str) -> None:
    """Sliding or cached: the same codes, when the window is the image."""
    model = tiny_prior(condition=condition, num_classes=5 if condition == "class" else 0)
    cond = {"y": torch.tensor([1, 4])} if condition == "class" else {}
    coord = coordinate_map(4, 4).expand(2, -1, -1)
    u = torch.rand(2, 16)
    pick = Decoding(top_k=5).picker(u)
    prefix = model.prefix({**cond, "coord": coord}, 2, torch.device("cpu"))
    want = sample_codes(model, prefix, 16, pick).view(2, 4, 4)
    got = sliding_window(model, lambda top, left: prefix, torch.zeros(2, 4, 4).long(), (4, 4), pick)
    assert torch.equal(got, want) and len(want.unique()) > 3


@torch.no_grad()
def test_larger_images_slide() -> None:
    model = tiny_prior(condition="coord")
    seen: list[tuple[int, int]] = []
    prefix = model.prefix({"coord": torch.zeros(1, 4, 4)}, 1, torch.device("cpu"))

    def prefix_of(top: int, left: int) -> Tensor:
        seen.append((top, left))
        return prefix

    sliding_window(model, prefix_of, torch.zeros(1, 6, 7).long(), (4, 4), Decoding(greedy=True).picker(None))
    assert len(seen) == 42 and {t for t, _ in seen} == {0, 1, 2} and {c for _, c in seen} == {0, 1, 2, 3}
    assert [local(i, 20, 16) for i in range(20)] == [*range(9), 8, 8, 8, 8, 9, 10, 11, 12, 13, 14, 15]
    request = Request((4, 4), generators([1, 2]))
    ids = PriorSampler(grid=(6, 7))(model, request)
    assert ids.shape == (2, 6, 7) and request.info["nfe"] == 42
    again = PriorSampler(grid=(6, 7))(model, Request((4, 4), generators([2])))
    assert torch.equal(again[0], ids[1])
    with pytest.raises(VgmError, match="smaller"):
        PriorSampler(grid=(3, 7))(model, Request((4, 4), generators([1])))
    with pytest.raises(VgmError, match="raster"):
        PriorSampler(grid=(6, 7))(tiny_prior(order="alternate"), Request((4, 4), generators([1])))


def test_images_larger_than_the_window_from_the_command_line(
    tmp_run: Path, vgm: Callable[..., tuple[int, str, str]]
) -> None:
    small = ("model.n_embd=32", "model.n_layer=1", "model.n_head=2", "train.steps=1", "train.batch_size=8",
             "train.preview_n=0")  # fmt: skip
    code, _, err = vgm(
        "train", "vqgan", "--recipe", "mnist-prior", "model.condition=coord", *small, "--out", tmp_run / "a"
    )
    assert code == 0, err
    code, _, err = vgm("sample", tmp_run / "a", "-n", 1, "grid=[8,9]", "--out", tmp_run / "x.npz")
    assert code == 0, err
    with np.load(tmp_run / "x.npz") as f:
        assert f["arr_0"].shape == (1, 32, 36, 1)


def test_training_windows_come_with_their_coordinates() -> None:
    model = tiny_prior(condition="coord", grid=(6, 8), window=4)
    assert model.window == (4, 4) and model.block_size == 32
    tokens = torch.arange(48).view(1, 6, 8).expand(50, -1, -1)
    windows, coord = PriorObjective(model).windows(tokens, Step(0))
    assert windows.shape == coord.shape == (50, 4, 4)
    torch.testing.assert_close(coord, windows / 48)  # what stands there says where it stands
    assert len({int(w[0, 0]) for w in windows}) > 5
    assert all(torch.equal(w - w[0, 0], torch.arange(4)[:, None] * 8 + torch.arange(4)) for w in windows)
    with pytest.raises(VgmError, match="sliding"):
        model.log_likelihood(tokens, [])


def test_corruption_changes_inputs_and_not_targets() -> None:
    model = tiny_prior()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 1:]))
    tokens = torch.randint(12, (100, 4, 4))
    for pkeep in (1.0, 0.6):
        loss, _ = PriorObjective(model, pkeep).loss("main", {"tokens": tokens}, Step(0))
        assert loss.isfinite()
    codes = tokens.flatten(1)[:, :-1]
    assert torch.equal(seen[0], codes)
    same = (seen[1] == codes).float().mean().item()
    assert abs(same - (0.6 + 0.4 / 12)) < 0.05
    assert torch.equal(corrupt(codes, torch.zeros(1), seen[1]), seen[1])


@pytest.mark.parametrize("kind", get_args(Order))
def test_orders_visit_every_code_once(kind: Order) -> None:
    order = order_of(kind, 4, 4)
    assert torch.equal(order.sort().values, torch.arange(16))
    assert torch.equal(order[inverse(order)], torch.arange(16))
    model = tiny_prior(order=kind)
    loss, _ = PriorObjective(model).loss("main", {"tokens": torch.randint(12, (2, 4, 4))}, Step(0))
    ids = PriorSampler(greedy=True)(model, Request((4, 4), generators([0])))
    assert loss.isfinite() and ids.shape == (1, 4, 4)
    nats, _ = model.log_likelihood(ids, [])
    other = ids.clone()
    other[0, order[0] // 4, order[0] % 4] += 1 - 2 * (ids.max() == 11)
    assert nats > model.log_likelihood(other, [])[0], "greedy codes come back in raster order"


def test_orders_refuse_grids_they_do_not_know() -> None:
    for kind, grid in (("subsample", (6, 6)), ("spiral-out", (4, 6)), ("spiral-in", (5, 5)), ("zigzag", (4, 4))):
        with pytest.raises(VgmError):
            order_of(kind, *grid)
    assert order_of("alternate", 2, 3).tolist() == [0, 1, 2, 5, 4, 3]


def test_weight_decay_touches_what_the_paper_says() -> None:
    """VQGAN's prior: weights of linear layers alone; LlamaGen: everything with two dimensions."""
    model = tiny_prior()
    names = dict(model.named_parameters())
    for kind in ("linear", "matrices"):
        yes, no = group(names, Optimizer(decay=kind), [model])
        decayed, free = set(yes.names), set(no.names)
        assert yes.weight_decay is None and no.weight_decay == 0.0
        assert decayed | free == names.keys() and not decayed & free
        assert {"head.weight", "blocks.0.attn.key.weight", "blocks.1.mlp.2.weight"} <= decayed
        assert {"ln_f.weight", "blocks.0.attn.key.bias"} <= free
        assert ("tok_emb.weight" in decayed) == ("pos_emb" in decayed) == (kind == "matrices")


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"quantizer": "gumbel"}, {"quantizer": "ema"}])
def test_official_first_stage(options: dict[str, Any]) -> None:
    """Lightning's file or the inside of a Net2Net one; losses dropped; configuration read off the shapes."""
    model = tiny_codec(ch=32, norm_groups=32, resolution=256, attn_resolutions=(128,), embed_dim=16, **options)
    weights = model.state_dict()
    noise = {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1),
    }
    inside = {f"first_stage_model.{k}": v for k, v in weights.items()} | {"transformer.pos_emb": torch.zeros(1)}
    for state in (unwrap({"state_dict": {**weights, **noise}, "global_step": 3}), inside):
        assert ck.CONVERTER.recognise(state)
        again = VQModel(**ck.CONVERTER.config(state))
        again.load_state_dict(ck.CONVERTER.to_ours(state))
    assert all(torch.equal(v, weights[k]) for k, v in ck.CONVERTER.to_ours(ck.CONVERTER.from_ours(weights)).items())
    assert not ck.CONVERTER.recognise([*inside, "model.diffusion_model.out.0.weight"]), "LDM's"
    with pytest.raises(VgmError, match="latent diffusion"):
        ck.CONVERTER.config(tiny_codec().state_dict())
    with pytest.raises(KeyError):
        ck.CONVERTER.to_ours({k: v for k, v in weights.items() if k != "quant_conv.weight"})


def test_official_prior() -> None:
    model = tiny_prior(n_embd=128, n_unmasked=3, num_classes=1000, vocab_size=1000, grid=(16, 16))
    state = model.state_dict()
    theirs = {f"transformer.{k}": v for k, v in ck.PRIOR_CONVERTER.from_ours(state).items()}
    assert theirs["transformer.blocks.1.attn.mask"].shape == (1, 1, 257, 257)
    assert ck.PRIOR_CONVERTER.recognise(theirs) and not ck.CONVERTER.recognise(theirs)
    theirs["transformer.blocks.0.attn.mask"][..., :3, :3] = 1
    read = ck.PRIOR_CONVERTER.config(theirs)
    again = GPT(**read)
    again.load_state_dict(ck.PRIOR_CONVERTER.to_ours(theirs))
    ids = torch.randint(1000, (2, 20))
    assert torch.equal(again.eval()(ids), model(ids)) and again.condition == "class"
    assert all(torch.equal(v, state[k]) for k, v in ck.PRIOR_CONVERTER.to_ours(theirs).items())
    with pytest.raises(KeyError):
        ck.PRIOR_CONVERTER.to_ours({k: v for k, v in theirs.items() if "pos_emb" not in k})
    with pytest.raises(VgmError, match="block_size"):
        model(torch.zeros(1, 300, dtype=torch.long))


# -- shipped tokenizer and recipes -----------------------------------------------------------------------------------


def test_shipped_mnist_tokenizer() -> None:
    """Digits that come back crisp, and a codebook that is used."""
    from vgm_cli.data import open_dataset

    codec = files.read_codec(files.resolve("mnist-tokenizer"), output="tokens")
    assert codec.latent_shape((1, 28, 28)) == (7, 7)
    assert (resources.files("vgm_cli") / "assets/mnist-tokenizer.safetensors").stat().st_size < 700_000
    x = open_dataset("mnist5k").pixels(range(0, 5000, 10))  # (500, 1, 28, 28)
    with torch.no_grad():
        ids = codec.encode(x)
        mse = (codec.decode(ids).clamp(-1, 1) - x).square().mean() / 4
    assert -10 * mse.log10() > 20
    assert len(ids.unique()) > 0.9 * codec.vocab_size
    assert code_usage(ids, codec.vocab_size)["perplexity"] > 0.25 * codec.vocab_size


SMALL = (
    "model.n_embd=32",
    "model.n_layer=1",
    "model.n_head=2",
    "model.embd_pdrop=0",
    "model.resid_pdrop=0",
    "model.attn_pdrop=0",
    "codec.fallback=null",
)


class TestPriorTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "vqgan/mnist-prior"
    overrides: ClassVar[tuple[str, ...]] = SMALL


class TestPriorSampling(suites.SamplerSuite):
    recipe: ClassVar[str] = "vqgan/mnist-prior"
    overrides: ClassVar[tuple[str, ...]] = SMALL


class TestMovingAverageTraining(suites.ObjectiveSuite):
    """The codebook moves by itself, without gradients: it must come back with a resumed run, too."""

    recipe: ClassVar[str] = "vqgan/mnist"
    overrides: ClassVar[tuple[str, ...]] = ("roles.discriminator=null", "model.ch=8", "model.quantizer=ema")
    rtol: ClassVar[float | None] = None  # every pass moves the codebook

    def test_loss_is_finite_and_a_function_of_the_step(self) -> None:
        """And of the codebook, which the first call moved (test_moving_average_codebook_follows_its_latents)."""


class TestFirstStageTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "vqgan/mnist"
    overrides: ClassVar[tuple[str, ...]] = ("objective.disc_start=0", "model.ch=8")
    rtol: ClassVar[float | None] = None  # the discriminator takes statistics over its batch


@pytest.mark.parametrize("name", [
    "mnist", "mnist-prior", "small-tokenizer", "imagenet256_f16_1024", "imagenet256_f16_16384", "faceshq",
    "openimages_gumbel_f8", "cin_prior", "faceshq_prior",
])  # fmt: skip
def test_recipe(name: str) -> None:
    suite = suites.RecipeSuite()
    suite.recipe = f"vqgan/{name}"
    suite.overrides = ("data.path=mnist5k",) if name == "small-tokenizer" else ()  # it takes the user's images
    suite.test_opens_with_what_it_is()
    suite.test_validates_and_builds()
