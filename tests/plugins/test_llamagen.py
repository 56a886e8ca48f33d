"""LlamaGen against FoundationVision/LlamaGen@ce98ec4 (golden cases), sizes, checkpoints, sampling, training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from naive_decoding import decode_naively
from torch import Tensor, nn
from vgm_plugins.llamagen import checkpoints as ck
from vgm_plugins.llamagen.objective import LlamaGenObjective, next_token_loss
from vgm_plugins.llamagen.presets import GPT, TOKENIZER
from vgm_plugins.llamagen.sampler import LlamaGenSampler, decode
from vgm_plugins.llamagen.text import FlanT5, clean, left_pad

from vgm_cli.api import Request, Step, Tokenizer, generators
from vgm_cli.ar.sampling import Decoding, draw, filter_logits, in_one_dtype
from vgm_cli.conditioning import Conditions, Part
from vgm_cli.convert_api import unwrap
from vgm_cli.errors import VgmError
from vgm_cli.losses.adversarial import discriminator_loss, generator_loss
from vgm_cli.losses.first_stage import AutoencoderObjective, discriminator_term, generator_term, reconstruction_loss
from vgm_cli.nets.discriminators import NLayerDiscriminator
from vgm_cli.nets.first_stage import VQModel
from vgm_cli.nets.llama import Decoder, LlamaGen, padded_causal
from vgm_cli.nn.attention import causal_attention
from vgm_cli.nn.embed import apply_rope, rope_angles_2d, rope_table
from vgm_cli.nn.kv_cache import KVCache
from vgm_cli.nn.quantize import recent_usage
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.testing.golden import GoldenCase, GoldenChecks, assert_close

golden = GoldenChecks("llamagen")

# -- golden cases ----------------------------------------------------------------------------------------------------

RENAMED = {
    "token_dropout_p": "token_dropout",
    "attn_dropout_p": "attn_dropout",
    "resid_dropout_p": "resid_dropout",
    "ffn_dropout_p": "ffn_dropout",
    "drop_path_rate": "drop_path",
}
ELSEWHERE = ("block_size", "class_dropout_prob", "max_batch_size", "max_seq_len")


def keywords(args: dict[str, Any]) -> dict[str, Any]:
    """Official ModelArgs of the GPT -> constructor keywords."""
    side = round(args.get("block_size", 256) ** 0.5)
    own = {RENAMED.get(k, k): args[k] for k in args if k not in ELSEWHERE}
    return {**own, "grid": (side, side), "null_class": args.get("class_dropout_prob", 0.1) > 0}


def load(case: GoldenCase) -> LlamaGen:
    assert ck.CONVERTER.recognise(case.state)
    case.ignore("seed", "gain", "output_gain", why="of weights that are stored")
    case.ignore("ModelArgs.max_batch_size", "ModelArgs.max_seq_len", why="of the cache: values are the same")
    case.ignore("ModelArgs.initializer_range", why="of weights that are stored")
    if "in/idx" not in case:
        case.ignore(*(f"ModelArgs.{k}" for k in RENAMED), why="evaluated without dropout")
    if case.config["ModelArgs"].get("model_type") == "t2i":
        case.ignore("ModelArgs.num_classes", why="captions have no classes")
    model = LlamaGen(**keywords(case.config["ModelArgs"]))
    model.load_state_dict(ck.CONVERTER.to_ours(case.state))
    return model


def is_gpt(case: GoldenCase) -> bool:
    return "n_layer" in case.config.get("ModelArgs", {})


def check_gradients(case: GoldenCase, model: nn.Module, loss: Tensor, prefix: str = "grad/") -> None:
    loss.backward()
    own = ck.CONVERTER.from_ours({k: p.grad for k, p in model.named_parameters()})
    for name, want in case.outputs.items():
        if name.startswith(prefix):
            assert_close(own[name.removeprefix(prefix)], want, 1e-4, name)


@golden.check(lambda c: is_gpt(c) and "in/idx" in c)
def gpt_training(case: GoldenCase) -> None:
    model = load(case).train()
    ids, valid, mask = case.inputs["idx"], case.inputs.get("valid"), case.inputs.get("mask")
    cond = {"y": case.inputs["cond"]} if "in/cond" in case else {"text": case.inputs["caption"]}
    if "emb_masks" in case.inputs:
        assert torch.equal(padded_causal(case.inputs["emb_masks"], ids.shape[1] - 1), mask)
    null = model.null_condition(cond)
    for which, given in (("", cond), ("_dropped", null)):
        if f"out/logits{which}" not in case:
            continue
        (full,) = cond.values()
        (other,) = given.values()
        drop = case.inputs["force_drop_ids"].bool().view(-1, *(1,) * (full.ndim - 1)) if which else torch.tensor(False)
        logits = model(ids[:, :-1], torch.where(drop, other, full), mask)
        assert_close(logits, case.outputs[f"logits{which}"], 5e-5, f"logits{which}")
        loss = next_token_loss(logits, ids, valid)
        assert_close(loss, case.outputs[f"loss{which}"], 1e-5, f"loss{which}")
        if not which:
            check_gradients(case, model, loss)
            if "grad_norm" in case.outputs:
                norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                assert_close(norm, case.outputs["grad_norm"], 1e-4, "grad_norm")
    if "freqs_cis" in case.outputs:
        assert_close(model.table(torch.device("cpu")), case.outputs["freqs_cis"], 1e-6, "freqs_cis")
    if "eval_logits_full" in case.outputs:
        with torch.no_grad():
            full = model.eval()(ids, cond["y"])
        n = full.shape[1]
        assert_close(full, case.outputs["eval_logits_full"][:, -n:], 5e-5, "eval_logits_full")


@golden.check(lambda c: is_gpt(c) and "calls" in c.config)
def gpt_generation(case: GoldenCase) -> None:
    """Greedy ids exactly, and the logits that every one of them was taken from."""
    model = load(case).eval()
    cond = {"y": case.inputs["cond"]} if "in/cond" in case else {"text": case.inputs["caption"]}
    if "emb_masks" in case.inputs:
        cond["pad"] = case.inputs["emb_masks"]
    for call, options in case.config["calls"].items():
        scale, interval = options.get("cfg_scale", 1.0), options.get("cfg_interval", -1)
        pick = Decoding(greedy=True).picker(None)
        seen: list[Tensor] = []
        ids = decode(model, cond, pick, scale, interval, lambda logits, i, seen=seen: seen.append(logits))
        assert torch.equal(ids, case.outputs[f"{call}/tokens"].long()), call
        assert_close(torch.stack(seen, 1), case.outputs[f"{call}/logits"], 5e-5, call)
        if interval < 0 and "y" in cond:
            naive = decode_naively(model, cond["y"], pick, scale)
            assert torch.equal(naive, ids), f"{call}: without a cache"


def orderly(values: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
    """values (B, V), the kept ones first among equal logits at the threshold, where the reference has no order."""
    values, logits = values.cpu().clone(), logits.cpu()
    for row, of, keep in zip(values, logits, kept.cpu()):
        tied = of == of[keep].min()
        row[tied] = row[tied].sort(descending=True).values
    return values


@golden.check(lambda c: "settings" in c.config and "in/logits" in c)
def sampling_filter(case: GoldenCase) -> None:
    logits = case.inputs["logits"]
    for name, (top_k, top_p, keep) in case.config["settings"].items():
        if top_k >= logits.shape[-1]:
            case.ignore(f"settings.{name}", why="so many logits are never left out")
        if f"filtered/{name}" in case.outputs:
            want, got = case.outputs[f"filtered/{name}"], filter_logits(logits, top_k, top_p, keep)
            kept = want.isfinite()
            assert torch.equal(orderly(got, logits, kept), orderly(want, logits, kept)), name
        if f"probs/{name}" in case.outputs:
            want = case.outputs[f"probs/{name}"]
            got = Decoding(case.config.get("temperature", 1.0), top_k, top_p).probs(logits)
            assert_close(orderly(got, logits, want > 0), orderly(want, logits, want > 0), 1e-6, name)


def tokenizer_keywords(config: dict[str, Any]) -> dict[str, Any]:
    args = config["ModelArgs"]
    encoder = tuple(args.get("encoder_ch_mult", (1, 1, 2, 2, 4)))
    return {
        "n_embed": args.get("codebook_size", 16384),
        "embed_dim": args.get("codebook_embed_dim", 8),
        "l2_norm": args.get("codebook_l2_norm", True),
        "beta": args.get("commit_loss_beta", 0.25),
        "entropy_weight": args.get("entropy_loss_ratio", 0.0),
        "ch_mult": encoder,
        "decoder_ch_mult": tuple(args.get("decoder_ch_mult", (1, 1, 2, 2, 4))),
        "z_channels": args.get("z_channels", 256),
        "dropout": args.get("dropout_p", 0.0),
        "ch": config.get("ch", 128),
        "num_res_blocks": config.get("num_res_blocks", 2),
        "attn_resolutions": (256 // 2 ** (len(encoder) - 1),),
        "legacy": False,
    }


@golden.check(lambda c: "codebook_size" in c.config.get("ModelArgs", {}))
def tokenizer(case: GoldenCase) -> None:
    converter = ck.TOKENIZER_CONVERTER
    assert converter.recognise(case.state)
    case.ignore("seed", why="of weights that are stored")
    shown = case.config["ModelArgs"].get("codebook_show_usage", "quantize.codebook_used" in case.state)
    assert shown == ("quantize.codebook_used" in case.state)
    config = tokenizer_keywords(case.config)
    model = VQModel(**config)
    model.load_state_dict(converter.to_ours(case.state))
    read = converter.config(case.state)
    assert all(read[k] == config[k] for k in ("ch", "ch_mult", "n_embed", "embed_dim", "z_channels", "num_res_blocks"))
    x, out = case.inputs["x"], case.outputs
    with torch.no_grad():
        model.eval()
        h = model.moments(x)
        assert_close(h, out["h"], 1e-5, "h")
        ids = model.tokens(x)
        assert torch.equal(ids.flatten(), out["indices"].flatten())
        quant = model.quantize(h)[0]
        assert_close(quant, out["quant"], 1e-5, "quant")
        assert_close(model.reconstruct(quant), out["dec"], 1e-5, "dec")
        assert_close(model.decode_tokens(ids), out["decode_code"], 1e-5, "decode_code")
        if "code" in case.inputs:
            given = case.inputs["code"].view(len(x), *ids.shape[1:])
            assert_close(model.decode_tokens(given), out["decode_code_given"], 1e-5, "decode_code_given")
    if not any(k.startswith("train/") for k in out):
        return
    model.train()
    args = case.config["ModelArgs"]
    z, codes, indices, terms = model.quantize.terms(model.moments(x))
    recon = model.reconstruct(z + (codes - z).detach())
    assert_close(recon, out["train/rec"], 1e-5, "train/rec")
    assert_close(terms["codebook"], out["train/vq_loss"], 1e-5, "vq_loss")
    commitment = args.get("commit_loss_beta", 0.25) * terms["commitment"]
    assert_close(commitment, out["train/commit_loss"], 1e-5, "commit_loss")
    weight = args.get("entropy_loss_ratio", 0.0)
    entropy = weight * terms["entropy"] if weight else torch.zeros(())
    assert_close(entropy, out["train/entropy_loss"], 1e-5, "entropy_loss")
    if "train/usage" in out:
        usage = recent_usage(torch.zeros(AutoencoderObjective.RECENT), indices, model.codebook_size)
        assert_close(torch.tensor(usage if shown else 0.0), out["train/usage"], 1e-6, "usage")
    _, loss, _ = model(x)
    assert_close(loss, terms["codebook"] + commitment + entropy, 1e-6, "the quantizer's loss is the sum of its parts")
    (F.mse_loss(recon, x) + loss).backward()
    gradients = converter.from_ours({k: p.grad for k, p in model.named_parameters()})
    for name, want in out.items():
        if name.startswith("train/grad/"):
            assert_close(gradients[name.removeprefix("train/grad/")], want, 1e-4, name)


@golden.check(lambda c: "VQLoss" in c.config)
def tokenizer_losses(case: GoldenCase) -> None:
    config, x = case.config["VQLoss"], case.inputs["x"]
    case.ignore("seed", why="of weights that are stored")
    assert {int(k.partition("/")[2]) for k in case.outputs if k.startswith("gen_loss/")} == set(case.config["steps"])
    weights = {k.removeprefix("discriminator."): v for k, v in case.state.items() if k.startswith("discriminator.")}

    def fresh() -> NLayerDiscriminator:
        net = NLayerDiscriminator(x.shape[1], config.get("disc_dim", 64), config.get("disc_num_layers", 3))
        net.load_state_dict(weights)
        return net.train()

    def distance(a: Tensor, b: Tensor) -> Tensor:  # what stands in for LPIPS in the case
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    rec_weight = config.get("reconstruction_weight", 1.0)
    for step in case.config["steps"]:
        last = case.inputs["last_w"].clone().requires_grad_()
        recon = F.conv2d(case.inputs["feat"], last, padding=1).tanh()
        nll, _ = reconstruction_loss(
            x,
            recon,
            distance,
            config.get("perceptual_weight", 1.0) / rec_weight,
            config.get("reconstruction_loss", "l2"),
            reduction="mean",
        )
        nll = rec_weight * nll
        factor = config.get("disc_weight", 1.0) * (step >= config["disc_start"])
        adaptive, gen = config.get("disc_adaptive_weight", False), config.get("gen_adv_loss", "hinge")
        term, _ = generator_term(fresh(), recon, nll, last, 1.0, adaptive=adaptive, gen_loss=gen)
        loss = nll + factor * term + case.inputs["codebook_loss"].sum()
        assert_close(loss, case.outputs[f"gen_loss/{step}"], 1e-5, f"gen_loss/{step}")
        (grad,) = torch.autograd.grad(loss, last)
        assert_close(grad, case.outputs[f"grad_last/{step}"], 1e-4, f"grad_last/{step}")
        net = fresh()
        d_loss = factor * discriminator_term(net, x, recon, config.get("disc_loss", "hinge"))[0]
        assert_close(d_loss, case.outputs[f"disc_loss/{step}"], 1e-5, f"disc_loss/{step}")
        d_loss.backward()
        assert_close(net.main[0].weight.grad, case.outputs[f"disc_grad_first/{step}"], 1e-4, "disc_grad_first")
    with torch.no_grad():
        assert_close(fresh().eval()(x), case.outputs["disc_logits_eval"], 1e-5, "disc_logits_eval")
    real, fake = case.inputs["logits_real"], case.inputs["logits_fake"]
    for name, kind in (("hinge", "hinge"), ("vanilla", "vanilla"), ("ns", "non-saturating")):
        if f"{name}_d" in case.outputs:
            assert_close(discriminator_loss(kind, real, fake), case.outputs[f"{name}_d"], 1e-5, f"{name}_d")
        if f"{name}_g" in case.outputs:
            assert_close(generator_loss(fake, kind), case.outputs[f"{name}_g"], 1e-5, f"{name}_g")


def test_golden(golden_case: GoldenCase) -> None:
    golden.run(golden_case)


# -- sizes -----------------------------------------------------------------------------------------------------------

SIZES = {
    "GPT-B": 110_888_448,
    "GPT-L": 342_910_976,
    "GPT-XL": 774_699_520,
    "GPT-XXL": 1_410_972_672,
    "GPT-XXXL": 3_893_027_840,
    "GPT-1B": 1_199_616_000,
    "GPT-3B": 3_096_659_200,
    "GPT-7B": 6_614_589_440,
    "GPT-XL-t2i": 777_678_080,
}
TOKENIZERS = {  # encoder, decoder, total
    "VQ-16": (29_298_176, 42_449_795, 71_883_403),
    "VQ-8": (28_559_232, 41_415_171, 70_109_835),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_preset_size(name: str) -> None:
    with torch.device("meta"):
        model = registry().build("model", {"name": "llamagen", "preset": name})
    assert count(model) == SIZES[name]
    state = model.state_dict()
    read = LlamaGenKeywords(ck.CONVERTER.config(state))
    assert read == LlamaGenKeywords(GPT[name])


class LlamaGenKeywords(dict[str, Any]):
    """Keywords with what they leave open filled in, to compare configurations."""

    def __init__(self, own: dict[str, Any]):
        common = {"vocab_size": 16384, "grid": (16, 16), "num_classes": 1000, "model_type": "c2i", "cls_token_num": 1}
        super().__init__({**common, **own})


@pytest.mark.parametrize(("name", "kind"), [("VQ-16", "model"), ("VQ-8", "codec")])
def test_tokenizer_size(name: str, kind: str) -> None:
    with torch.device("meta"):
        model = registry().build(kind, {"name": "llamagen-tokenizer", "preset": name})
        x = torch.empty(1, 3, 256, 256)
    assert (count(model.encoder), count(model.decoder), count(model)) == TOKENIZERS[name]
    assert isinstance(model, Tokenizer) and model.codebook_size == 16384
    shape = model.token_shape((3, 256, 256))
    assert model.tokens(x).shape == (1, *shape)
    assert model.decode_tokens(torch.empty(1, *shape, dtype=torch.long, device="meta")).shape == x.shape


def test_every_preset_is_counted() -> None:
    assert set(SIZES) == set(GPT) and set(TOKENIZERS) == set(TOKENIZER)


# -- checkpoints -----------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "dim": 64,
    "n_layer": 2,
    "n_head": 1,
    "vocab_size": 20,
    "grid": (3, 4),
    "num_classes": 5,
    "multiple_of": 32,
}


def tiny(**more: Any) -> LlamaGen:
    """A small network whose output is not zero."""
    torch.manual_seed(0)
    model = LlamaGen(**{**TINY, **more})
    suites.randomise(model, scale=0.3)
    return model.eval()


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_official_checkpoint(wrapper: str | None) -> None:
    """Every published wrapping; tables and caches dropped; configuration read off the shapes; strict and round."""
    model = tiny(grid=(16, 16))
    state = dict(model.state_dict())
    checkpoint = {**state, "layers.0.attention.kv_cache.k_cache": torch.zeros(2), "causal_mask": torch.zeros(1)}
    found = unwrap({wrapper: checkpoint, "steps": 3} if wrapper else checkpoint)
    own = {k: v for k, v in found.items() if "kv_cache" not in k}
    assert ck.CONVERTER.recognise(own)
    again = LlamaGen(**ck.CONVERTER.config(found))
    again.load_state_dict(ck.CONVERTER.to_ours(found))
    ids, y = torch.randint(20, (2, 9)), torch.tensor([1, 5])
    assert torch.equal(again.eval()(ids, y), model(ids, y))
    assert all(torch.equal(v, state[k]) for k, v in ck.CONVERTER.to_ours(ck.CONVERTER.from_ours(state)).items())
    with pytest.raises(KeyError):
        ck.CONVERTER.to_ours({k: v for k, v in state.items() if k != "layers.1.ffn_norm.weight"})
    assert not ck.CONVERTER.recognise([*state, "pos_instruct_embeddings"])  # RandAR


def test_the_grid_comes_from_an_old_table_or_the_layouts_name() -> None:
    state = dict(tiny(grid=(24, 24)).state_dict())
    assert ck.CONVERTER.config(state)["grid"] == (16, 16)
    assert ck.CONVERTER_384.config(state)["grid"] == (24, 24)
    assert ck.CONVERTER_512.config(state)["grid"] == (32, 32)
    table = {"freqs_cis": torch.zeros(1 + 24 * 24, 32, 2)}
    assert ck.CONVERTER.config({**state, **table})["grid"] == (24, 24)
    assert "freqs_cis" not in ck.CONVERTER.to_ours({**state, **table})


@pytest.mark.parametrize("name", TOKENIZERS)
def test_official_tokenizer(name: str) -> None:
    from vgm_plugins.vqgan import checkpoints as vqgan

    converter = ck.TOKENIZER_CONVERTER
    with torch.device("meta"):
        ours = VQModel(**TOKENIZER[name]).state_dict()
        theirs = converter.from_ours(ours)
    assert converter.recognise(theirs) and not vqgan.CONVERTER.recognise(theirs)
    assert not converter.recognise(ours)
    assert theirs["quantize.codebook_used"].shape == (65536,)
    assert "decoder.conv_blocks.0.attn.2.q.weight" in theirs and "encoder.mid.1.norm.bias" in theirs
    back = converter.to_ours(theirs)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}
    assert converter.config(theirs) == TOKENIZER[name]
    hidden = {k: v for k, v in theirs.items() if k != "quantize.codebook_used"}  # codebook_show_usage: false
    assert converter.recognise(hidden) and converter.config(hidden) == TOKENIZER[name]
    assert converter.to_ours(hidden).keys() == ours.keys()


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n_head": 4, "n_kv_head": 2}, {"n_head": 2, "grid": (1, 5)}])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_cached_and_naive_draw_the_same_codes(options: dict[str, Any], scale: float) -> None:
    model, y = tiny(**options), torch.tensor([0, 3, 4])
    u = torch.rand(3, model.block_size, generator=torch.Generator().manual_seed(0))
    pick = Decoding(temperature=0.8, top_k=15, top_p=0.95).picker(u)
    cached = decode(model, {"y": y}, pick, scale)
    assert torch.equal(cached, decode_naively(model, y, pick, scale))
    assert len(cached.unique()) > 3


def test_guidance_is_off_at_one_and_after_the_interval() -> None:
    model, y = tiny(), torch.tensor([1, 2])
    seen: dict[str, list[Tensor]] = {"plain": [], "guided": [], "short": []}
    pick = Decoding(greedy=True).picker(None)
    for name, scale, interval in (("plain", 1.0, -1), ("guided", 4.0, -1), ("short", 4.0, 2)):
        decode(model, {"y": y}, pick, scale, interval, lambda logits, i, name=name: seen[name].append(logits))
    plain, guided, short = (torch.stack(v) for v in seen.values())
    assert torch.equal(short[:4], guided[:4]) and not torch.equal(plain[0], guided[0])
    ids = decode(model, {"y": y}, pick, 4.0, 2)
    with torch.no_grad():
        torch.testing.assert_close(short[4], model(ids[:, :4], y)[:, -1])


def test_condition_keys_vanish() -> None:
    """A token sees the condition at logit 0: the class moves values, never attention."""
    model = tiny()
    table = model.table(torch.device("cpu"))
    assert table[0].abs().max() == 0 and torch.allclose(table[1, :, 0], torch.ones(()))
    assert torch.allclose(table.square().sum(-1)[1:], torch.ones(()))


def test_rotations_without_complex_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that compiled networks use."""
    x, table = torch.randn(2, 6, 3, 8), rope_table(rope_angles_2d(2, 2, 8), prefix=2)
    want = apply_rope(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, table), want)
    assert want[:, :2].abs().max() == 0 and torch.equal(want[:, 2], x[:, 2]), "zeros, then the unturned first place"


def test_drawing_follows_the_probabilities() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    u = torch.linspace(0, 1, 1001)[:-1]
    ids = draw(probs.expand(len(u), -1), u)
    share = torch.bincount(ids, minlength=6) / len(u)
    assert (share - probs[0]).abs().max() < 0.002 and set(ids.tolist()) == {1, 3, 4}
    assert draw(probs, torch.tensor([1.0 - 2**-24])).item() == 4


@torch.no_grad()
def test_autocast_casts_once_and_changes_little() -> None:
    model, y = tiny(), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        with in_one_dtype(model, torch.device("cpu")) as network:
            assert network is not model and not torch.is_autocast_enabled("cpu")
            assert next(network.parameters()).dtype == torch.bfloat16
            first = Decoder(network, y).first()
        assert torch.is_autocast_enabled("cpu")
    assert next(model.parameters()).dtype == torch.float32
    assert_close(first, Decoder(model, y).first(), 0.05, "bf16 logits")
    with in_one_dtype(model, torch.device("cpu")) as network:
        assert network is model


@torch.no_grad()
def test_cache_positions_and_masks() -> None:
    """Any split of a sequence over a cache gives what one pass gives, grouped heads and padding included."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=g) for heads in (4, 2, 2))
    whole = causal_attention(q, k, v)
    for parts in ([9], [1] * 9, [4, 1, 3, 1]):
        cache, found = KVCache(1, 2, 2, 9, 8), []
        for rows in torch.arange(9).split(parts):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            found.append(causal_attention(q[:, :, part], k[:, :, part], v[:, :, part], cache=cache))
            cache.advance(len(rows))
        torch.testing.assert_close(torch.cat(found, 2), whole)
    pad = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    mask = padded_causal(pad, 5)
    assert mask.shape == (2, 1, 9, 9) and mask[0, 0, 1].tolist() == [False, True] + [False] * 7
    assert torch.equal(mask[1, 0], torch.ones(9, 9, dtype=torch.bool).tril())
    assert mask[0, 0, 5].tolist() == [False, False, True, True, True, True] + [False] * 3


@torch.no_grad()
@pytest.mark.parametrize("positions", [[2, 5], [0], [8], [3, 4, 5, 6, 7, 8], list(range(9))])
def test_overwritten_positions_attend_as_in_one_pass(positions: list[int]) -> None:
    """Keys and values that are replaced in a cache are those of a sequence that had them from the start."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=g) for heads in (4, 2, 2))
    other_k, other_v = torch.randn(2, 2, 9, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g)
    cache, at = KVCache(1, 2, 2, 12, 8), torch.tensor(positions)
    causal_attention(q, other_k, other_v, cache=cache)
    cache.advance(9)
    with cache.overwriting(at):
        found = causal_attention(q[:, :, at], k[:, :, at], v[:, :, at], cache=cache)
        cache.advance(len(at))
    assert cache.filled == 9 and cache.positions is None
    other_k[:, :, at], other_v[:, :, at] = k[:, :, at], v[:, :, at]
    torch.testing.assert_close(found, causal_attention(q, other_k, other_v)[:, :, at])
    torch.testing.assert_close(cache.keys[0, :, :, :9], other_k)
    for wrong in ([], [-1], [9]):
        with pytest.raises(ValueError), cache.overwriting(torch.tensor(wrong, dtype=torch.int64)):
            pass
    with pytest.raises(ValueError):
        cache.truncate(10)


@torch.no_grad()
def test_decoding_goes_on_from_a_rewound_or_overwritten_cache() -> None:
    """The next logits are those of a fresh forward on the codes that stand there now."""
    model = tiny()
    g, n = torch.Generator().manual_seed(0), model.block_size
    old, new = torch.randint(11, (2, 3, n), generator=g)
    y = torch.tensor([0, 4, 2])
    decoder = Decoder(model, y)
    decoder.first()
    for i in range(n - 1):
        decoder.step(old[:, i])
    decoder.cache.truncate(decoder.prefix + 3)
    ids = torch.cat([old[:, :3], new[:, 3:]], dim=1)
    for i in range(3, 6):
        torch.testing.assert_close(decoder.step(ids[:, i]), model(ids[:, : i + 1], y)[:, -1])
    at = torch.arange(2, 6)  # codes: again others, several in one pass, everything behind them included
    ids[:, 2:6] = old[:, 2:6] + 1
    rows = at + decoder.prefix
    with decoder.cache.overwriting(rows):
        table = model.table(ids.device)[rows]
        logits = model.run(model.tok_embeddings(ids[:, at]), table, None, decoder.cache, last=3)
    assert_close(logits, model(ids[:, :6], y)[:, -3:], 1e-5, "three at once")
    torch.testing.assert_close(logits[:, -1], model(ids[:, :6], y)[:, -1])
    torch.testing.assert_close(decoder.step(ids[:, 6]), model(ids[:, :7], y)[:, -1])


@torch.no_grad()
def test_positions_of_their_own() -> None:
    """A rotation table per item gives each item what its table alone gives."""
    model = tiny()
    table, g = model.table(torch.device("cpu")), torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(len(table), generator=g) for _ in range(3)])
    x = torch.randn(3, len(table), 2, model.head_dim, generator=g)
    each = torch.cat([apply_rope(x[i : i + 1], table[orders[i]]) for i in range(3)])
    assert torch.equal(apply_rope(x, table[orders]), each)
    assert not torch.allclose(apply_rope(x, table), each)
    h = torch.randn(3, len(table), model.tok_embeddings.embedding_dim, generator=g)
    alone = torch.cat([model.run(h[i : i + 1], table[orders[i]]) for i in range(3)])
    torch.testing.assert_close(model.run(h, table[orders]), alone)


def test_attention_is_the_same_with_and_without_gradients() -> None:
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    mask = padded_causal(torch.ones(2, 7))
    for options in ({}, {"mask": mask}, {"mask": torch.randn(7, 7)}):
        with torch.no_grad():
            want = causal_attention(q, k, v, **options)
        torch.testing.assert_close(causal_attention(q, k, v, **options), want)


# -- likelihood --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("y", [torch.tensor([2]), None])
def test_likelihoods_of_all_images_sum_to_one(y: Tensor | None) -> None:
    model = tiny(vocab_size=3, grid=(2, 2))
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 2, 2)
    labels = None if y is None else y.expand(len(every))
    nats, kind = model.log_likelihood(every, generators(range(len(every))), labels)
    assert nats.shape == (81,) and math.isclose(nats.double().exp().sum().item(), 1.0, rel_tol=1e-5)
    assert "codes" in kind and ("null" in kind) == (y is None)
    text = tiny(vocab_size=3, grid=(2, 2), model_type="t2i", cls_token_num=6, caption_dim=8, num_classes=0)
    nats, kind = text.log_likelihood(every, generators(range(len(every))))
    assert math.isclose(nats.double().exp().sum().item(), 1.0, rel_tol=1e-5) and "null caption" in kind


# -- training ----------------------------------------------------------------------------------------------------------


def test_unlabelled_data_are_the_null_class() -> None:
    batch = {"tokens": torch.randint(20, (400, 3, 4))}
    unlabelled = tiny(num_classes=0)
    assert unlabelled.cls_embedding.embedding_table.num_embeddings == 1
    loss, logs = LlamaGenObjective(unlabelled).loss("main", batch, Step(0))
    assert loss.isfinite() and 0 <= logs["accuracy"] <= 1


def test_initial_loss_is_that_of_guessing() -> None:
    """The output head starts at zero."""
    loss, _ = LlamaGenObjective(LlamaGen(**TINY)).loss("main", {"tokens": torch.randint(20, (4, 3, 4))}, Step(0))
    assert math.isclose(loss.item(), math.log(20), rel_tol=1e-6)


def test_drop_path_and_checkpointing() -> None:
    model = tiny(drop_path=0.5, checkpointing=True).train()
    ids, y = torch.randint(20, (64, 11)), torch.arange(64) % 5
    torch.manual_seed(0)
    first = model(ids, y)
    first.square().mean().backward()
    grad = model.tok_embeddings.weight.grad.clone()
    model.checkpointing = False
    model.zero_grad()
    torch.manual_seed(0)
    second = model(ids, y)
    second.square().mean().backward()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(grad, model.tok_embeddings.weight.grad)
    assert not torch.allclose(model(ids, y), second), "layers are left out at random"


class Words(FlanT5):
    """A text encoder without weights: a feature of the caption's length, right-padded, then left-padded."""

    def encode(self, items: Any, device: torch.device) -> dict[str, Tensor]:
        lengths = torch.tensor([len(c) for c in items])
        mask = (torch.arange(6) < lengths[:, None].clamp(max=6)).long()
        text, pad = left_pad(lengths[:, None, None].expand(-1, 6, 8).float() * mask[..., None], mask)
        return {"text": text, "pad": pad}


TEXT: dict[str, Any] = {"model_type": "t2i", "cls_token_num": 6, "caption_dim": 8, "num_classes": 0}


def told(model: LlamaGen, condition: Any, dropout: float = 0.0) -> Conditions:
    return Conditions([Part("text", condition, "text", dropout)], model)


def test_text_to_image_trains_and_samples() -> None:
    model = tiny(**TEXT)
    conditions = told(model, Words(), 0.5)
    batch = {"tokens": torch.randint(20, (8, 3, 4)), "text": ["a", "bb", "ccc", "dddd"] * 2}
    seen = conditions.apply(batch, Step(0))["cond"]
    dropped = (seen["text"] == model.null_caption).flatten(1).all(1)
    assert torch.equal(dropped, Step(0).rand(8, "text dropout") < 0.5) and dropped.any() and not dropped.all()
    loss, _ = LlamaGenObjective(model).loss("main", {**batch, "cond": seen}, Step(0))
    loss.backward()
    assert loss.isfinite() and model.cls_embedding.cap_proj.fc1.weight.grad.abs().sum() > 0
    assert "cls_embedding.uncond_embedding" not in dict(model.named_parameters())
    cond = conditions.encode({"text": ["a", "dddd"]}, torch.device("cpu"))
    features, pad = cond["text"], cond["pad"]
    assert pad.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1]] and features[0, :5].abs().max() == 0
    request = Request((3, 4), generators([1, 2]), cond=cond, guidance_scale=2.0)
    ids = LlamaGenSampler()(model, request)
    assert ids.shape == (2, 3, 4) and request.info["nfe"] == 12
    garbage = features.masked_fill(pad[..., None] == 0, 1e3)  # padding is never looked at
    request = Request((3, 4), generators([1, 2]), cond={"text": garbage, "pad": pad}, guidance_scale=2.0)
    assert torch.equal(LlamaGenSampler()(model, request), ids)
    null = told(model, Words()).null(torch.device("cpu"), {"text": ["dddd"]})  # guided away from a text
    away = Request((3, 4), generators([1, 2]), cond=cond, null=null, guidance_scale=5.0)
    assert not torch.equal(LlamaGenSampler()(model, away), ids)


def test_text_without_an_encoder_says_what_is_missing() -> None:
    with pytest.raises(VgmError, match="no text encoder"):
        FlanT5("/nowhere").encode(["a red car"], torch.device("cpu"))
    with pytest.raises(VgmError, match="text encoder") as e:
        FlanT5().encode(["a"], torch.device("cpu"))
    assert e.value.code == 4 and "flan-t5" in e.value.hint
    with pytest.raises(VgmError, match="a class is 1 token"):
        tiny(cls_token_num=6)


@pytest.fixture
def tiny_t5(tmp_path: Path) -> Path:
    """A folder in transformers' layout: a random encoder of 8 channels and a tokenizer of ten words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "car", "cat", "on", "grass"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_captions_become_left_padded_features(tiny_t5: Path) -> None:
    encoder = FlanT5(str(tiny_t5), tokens=6)
    features, pad = encoder.encode(["a red car", "a blue cat on a grass"], torch.device("cpu")).values()
    assert features.shape == (2, 6, 8) and features.dtype == torch.float32
    assert pad.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6] and features[0, :3].abs().max() == 0
    alone = encoder.encode(["a red car"], torch.device("cpu"))["text"]
    torch.testing.assert_close(alone[0], features[0])
    assert not list(encoder.parameters()), "its weights are not this model's"


def test_each_distinct_caption_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = Words.encode
    monkeypatch.setattr(
        Words, "encode", lambda self, items, device: (seen.extend(items), encode(self, items, device))[1]
    )
    conditions = told(tiny(**TEXT), Words())
    first = conditions.encode({"text": ["a", "bb", "a"]}, torch.device("cpu"))
    again = conditions.encode({"text": ["bb", "ccc"]}, torch.device("cpu"))
    assert seen == ["a", "bb", "ccc"]
    assert torch.equal(first["text"][0], first["text"][2]) and torch.equal(first["text"][1], again["text"][0])


def test_text_to_image_from_the_command_line(
    tiny_t5: Path, tiny_dataset: Path, tmp_run: Path, vgm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions beside the images, T5 from a folder; prompts in turn, whatever the batch; guidance; a negative prompt."""
    for image in tiny_dataset.rglob("*.png"):
        image.with_suffix(".txt").write_text("a red car" if image.parent.name == "disc" else "a blue cat")
    role = f"roles.text={{kind: model, name: flan-t5, path: {tiny_t5}, tokens: 6}}"  # as earlier versions said it
    text = ("model.model_type=t2i", "model.cls_token_num=6", "model.caption_dim=8", "data.labels=false", role)
    quick = ("train.steps=6", "optimizer.lr=0.03", "train.batch_size=8", "train.preview_n=2", "train.precision=fp32")
    run, seen, encode = tmp_run / "text", [], FlanT5.encode
    monkeypatch.setattr(
        FlanT5, "encode", lambda self, words, device: (seen.extend(words), encode(self, words, device))[1]
    )
    code, _, err = vgm("train", "llamagen", f"data.path={tiny_dataset}", *SMALL, *text, *quick, "--out", run)
    assert code == 0, err
    assert sorted(seen) == ["a blue cat", "a red car"], "each of them once, for steps and previews"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["conditions"]["text"]["name"] == "flan-t5" and "label_dropout" not in config["objective"]

    def drawn(*words: Any) -> np.ndarray:
        code, _, err = vgm("sample", run, "-n", 5, *words, "--out", tmp_run / "x.npz", "--overwrite")
        assert code == 0, err
        return np.load(tmp_run / "x.npz")["arr_0"]

    both = ("--prompt", "a red car", "--prompt", "a blue cat")
    for guided in ((), ("--guidance-scale", 100)):
        images = drawn(*both, *guided, "--batch-size", 64)
        assert (images == drawn(*both, *guided, "--batch-size", 2)).all()
        assert (images[::2] == drawn("--prompt", "a red car", *guided)[::2]).all()
        assert (images[1::2] == drawn("prompt=a blue cat", f"text_encoder={tiny_t5}", *guided)[1::2]).all()
    assert (images != drawn(*both)).any(), "the scale has an effect"
    assert (images != drawn(*both, *guided, "--negative", "on grass")).any()
    listed = tmp_run / "prompts.txt"
    listed.write_text("a red car\n\na blue cat\n")
    assert (images == drawn("--prompts", listed, *guided)).all()
    code, _, err = vgm("sample", run, "-n", 2, *both, "conditions.text.path=null", "--out", tmp_run / "y.png")
    assert code == 4 and "text encoder" in err
    code, _, err = vgm("sample", run, "-n", 2, "--out", tmp_run / "y.png")
    assert code == 2 and "--prompt" in err
    code, _, err = vgm("sample", run, "-n", 2, "--label", 1, "--out", tmp_run / "y.png")
    assert code == 2 and "takes no --label" in err
    code, out, err = vgm("evaluate", run, "--metrics", "bits-per-dim", "-n", 4, "--json")
    assert code == 0 and "given the caption" in out, err


def test_captions_are_cleaned() -> None:
    assert clean("A <b>red</b>  Car at https://a.b/c?d=1 by @someone &amp; “friends” – 10.0.0.1") == (
        'a red car at by & "friends" -'
    )


# -- conformance -------------------------------------------------------------------------------------------------------

SMALL = (
    "model.dim=32",
    "model.n_layer=1",
    "model.n_head=2",
    "model.token_dropout=0",
    "model.resid_dropout=0",
    "model.ffn_dropout=0",
    "codec.fallback=null",
)


class TestTraining(suites.ObjectiveSuite):
    recipe: ClassVar[str] = "llamagen/mnist"
    overrides: ClassVar[tuple[str, ...]] = SMALL


class TestSampling(suites.SamplerSuite):
    recipe: ClassVar[str] = "llamagen/mnist"
    overrides: ClassVar[tuple[str, ...]] = SMALL


class TestMnist(suites.RecipeSuite):
    recipe: ClassVar[str] = "llamagen/mnist"


class TestImageNet256(suites.RecipeSuite):
    recipe: ClassVar[str] = "llamagen/imagenet256"


class TestImageNet384(suites.RecipeSuite):
    recipe: ClassVar[str] = "llamagen/imagenet384"


class TestTokenizer(suites.RecipeSuite):
    recipe: ClassVar[str] = "llamagen/tokenizer-vq16"


class TestText(suites.RecipeSuite):
    recipe: ClassVar[str] = "llamagen/text256"
