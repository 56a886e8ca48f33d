"""`vgm convert`: every registered layout there and back, files of every kind, and what is refused."""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vgm_cli import atomic
from vgm_cli.api import HasExample
from vgm_cli.convert_api import Files, named_shadow
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import VgmError
from vgm_cli.registry import registry
from vgm_cli.testing import suites
from vgm_cli.weights import compare, convert, prove, reading
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import layout as layouts
from vgm_cli.weights.contents import contents
from vgm_cli.weights.pickle.shells import Shell, shell_of

ADM: dict[str, Any] = {"image_size": 16, "model_channels": 64, "num_res_blocks": 1, "channel_mult": (1, 1)}
ADM |= {"attention_resolutions": (2,), "num_head_channels": 64, "num_classes": 5}
DIT = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "num_classes": 5}
EDM = {"img_resolution": 8, "in_channels": 1, "num_classes": 3, "model_channels": 32, "channel_mult": [1, 2]}
EDM |= {"num_blocks": 1, "attn_resolutions": [4]}
SONG = {"img_resolution": 8, "in_channels": 2, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
SONG |= {"attn_resolutions": [4], "augment_dim": 6}
STAGE = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16, "z_channels": 4, "embed_dim": 4}
STAGE |= {"attn_resolutions": ()}
GPT = {"dim": 64, "n_layer": 2, "n_head": 1, "vocab_size": 20, "grid": (16, 16), "num_classes": 5, "multiple_of": 32}
GLOW = {"size": 16, "in_channels": 2, "levels": 2, "depth": 2, "width": 12}
STYLE: dict[str, Any] = {"latent_size": 8, "w_dim": 8, "mapping_layers": 2, "size": 16}
NARROW = {"channel_base": 64, "channel_max": 12}
PRIOR = {"vocab_size": 16, "n_layer": 2, "n_head": 1, "n_embd": 64, "condition": "class", "num_classes": 1000}
FLOW = {"in_channels": 4, "img_size": 4, "channels": 64, "layers_per_block": (1, 2)}
TAR = {"in_channels": 3, "img_size": 6, "patch_size": 2, "channels": 64, "num_blocks": 2, "layers_per_block": 1}
NCSN = {"image_size": 32, "nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1}
PYRAMID = {"nf": 32, "ch_mult": (1, 4), "fir": True, "progressive": "output_skip", "progressive_input": "input_skip",
           "embedding_type": "fourier", "scale_by_sigma": True, "centered": False, "sigma_max": 348.0,
           "num_scales": 2000}  # fmt: skip
WIDTHS = (6, 6, 6, 6, 4, 4, 3, 2, 2)
MASKED = {"vocab_size": 20, "grid": (4, 4), "num_classes": 3}
UNET = {"image_size": 8, "in_channels": 3, "model_channels": 64, "num_res_blocks": 1, "channel_mult": (1, 2)}
UNET |= {"attention_resolutions": (2, 1), "context_dim": 12, "num_heads": 8}
TOWER = {"width": 64, "depth": 2, "heads": 1, "vocabulary": 40, "length": 9}
VQVAE = {"channels": 8, "residual_channels": 4, "embed_dim": 4, "n_embed": 6}

# A small network of every layout, by keywords of its constructor; a new layout adds its own. Trailing KEY=VALUE are
# what its shapes do not tell.
TINY: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "adm-classifier": (ADM | {"pool": "adaptive"}, ()),
    "adm-unet": (ADM, ()),
    "adm-unet-diffusers": (ADM | {"use_new_attention_order": True}, ()),
    "adm-unet-diffusers-legacy": (ADM, ()),
    "autoencoder-kl": (STAGE, ()),
    "autoencoder-kl-diffusers": (STAGE, ()),
    "bert-text": ({"width": 24, "depth": 2, "vocabulary": 40, "length": 9}, ()),
    "class-token": ({"num_classes": 5, "width": 8, "null_class": False}, ()),
    "controlnet": (UNET | {"hint_widths": (4, 6)}, ("image_size=8",)),
    "controlnet-whole": (UNET | {"hint_widths": (4, 6)}, ("image_size=8",)),
    "controlnet-diffusers": (UNET | {"channel_mult": (1, 1), "hint_widths": (4, 6)}, ("image_size=8",)),
    "clip-text": (TOWER | {"head": 16}, ()),
    "consistency": (ADM | {"use_new_attention_order": True}, ()),
    "dit": (DIT, ("num_heads=2",)),
    "dit-diffusers": (DIT | {"input_size": 32, "patch_size": 8}, ("num_heads=2",)),
    "dit-diffusers-512": (DIT | {"input_size": 64, "patch_size": 16}, ("num_heads=2",)),
    "dmd2-discriminator": ({"channels": 64, "side": 8}, ()),
    "dmd2-fake-score": (EDM, ()),
    "edm": (EDM, ()),
    "edm-ddpmpp": (SONG | {"resample_filter": (1, 3, 3, 1)}, ()),
    "edm2": ({"img_resolution": 8, "num_classes": 3, "model_channels": 64, "channel_mult": (1,), "num_blocks": 1,
              "attn_resolutions": (8,)}, ()),
    "glow": (GLOW, ()),
    "glow-average": (GLOW, ()),
    "glow-rosinality": (GLOW | {"style": "rosinality", "permutation": "lu"}, ()),
    "hed": ({"size": 512, "channels": 3, "width": 4}, ()),
    "ldm-unet": (UNET, ("image_size=8",)),
    "ldm-unet-diffusers": (UNET | {"channel_mult": (1, 1), "vector_dim": 1552}, ("image_size=8",)),
    "ldm-unet-turbo": (UNET, ("image_size=8",)),
    "ldm-unet-turbo-diffusers": (UNET | {"channel_mult": (1, 1)}, ("image_size=8",)),
    "lightningdit": (DIT | {"learn_sigma": False, "swiglu": True, "rope": True, "rmsnorm": True}, ()),
    "halton-maskgit": (MASKED | {"hidden_dim": 32, "depth": 2, "heads": 4, "mlp_dim": 96}, ("heads=4", "mlp_dim=96")),
    "llamagen": (GPT, ()),
    "llamagen-384": (GPT | {"grid": (24, 24)}, ()),
    "llamagen-512": (GPT | {"grid": (32, 32)}, ()),
    "llamagen-tokenizer": (STAGE | {"n_embed": 16, "resolution": 256, "attn_resolutions": (128,)}, ()),
    "lpips": ({}, ()),
    "mar": ({"input_size": 4, "in_channels": 4, "num_classes": 3, "buffer_size": 2, "encoder_width": 32, "encoder_depth": 1,
             "encoder_heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "head_depth": 2,
             "head_width": 24}, ("encoder_heads=2", "decoder_heads=2")),
    "maskgit": (MASKED | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
                ("num_classes=3", "vocab_size=20")),
    "maskgit-tokenizer": ({"n_embed": 16, "embed_dim": 12, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1,
                           "norm_groups": 0, "conv_downsample": True}, ()),
    "maskgit-tokenizer-torch": ({"n_embed": 16, "embed_dim": 12, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1}, ()),
    "meanflow": (DIT, ("num_heads=2",)),
    "meanflow-flax": (DIT | {"input_size": 32, "patch_size": 8}, ("num_heads=2",)),
    "meanflow-unet": (SONG, ()),
    "open-clip-text": (TOWER | {"activation": "gelu", "skip": 1, "pad": 0}, ()),
    "randar": (GPT, ()),
    "rectified-flow": (NCSN, ()),
    "scm-mnist": ({"base_dim": 8, "dim_mults": (1, 2), "time_embedding_dim": 16}, ()),
    "score-sde": (NCSN, ()),
    "score-sde-classifier": ({"blocks_per_group": 2, "channel_multiplier": 1, "num_classes": 4}, ()),
    "score-sde-diffusers": (NCSN | PYRAMID, ()),
    "score-sde-subvp": (NCSN, ()),
    "score-sde-vp-discrete": (NCSN, ()),
    "sdxl-text": ({"clip": TOWER | {"skip": 1, "norm": False, "head": 0, "activation": "quick-gelu"},
                   "open_clip": TOWER | {"head": 16, "activation": "gelu", "skip": 1, "norm": False, "pad": 0}}, ()),
    "sit": (DIT, ("num_heads=2",)),
    "stylegan-t-discriminator": ({"channels": (8, 6), "c_dim": 5, "cmap_dim": 4}, ()),
    "starflow": (FLOW | {"num_classes": 4, "denoiser_layers": 1}, ("img_size=4",)),
    "stylegan": (STYLE | {"mapping_width": 8, "fmap_base": 64, "fmap_max": 12}, ()),
    "stylegan-discriminator": ({"size": 16, "fmap_base": 64, "fmap_max": 12}, ()),
    "stylegan-rosinality": ({"w_dim": 6, "mapping_layers": 2, "widths": WIDTHS}, ()),
    "stylegan-rosinality-discriminator": ({"widths": WIDTHS, "from_rgb_activate": True}, ()),
    "stylegan-rosinality-discriminator-plain": ({"widths": WIDTHS}, ()),
    "stylegan2": (STYLE | NARROW | {"num_classes": 3, "embed": 5}, ()),
    "stylegan2-discriminator": ({"size": 16, "architecture": "skip"} | NARROW, ()),
    "stylegan2-tf": (STYLE | NARROW, ()),
    "supir": ({"unet": UNET, "control_depth": (1, 1)}, ()),
    "supir-autoencoder": (STAGE, ()),
    "tarflow": (TAR | {"num_classes": 4}, ()),
    "va-vae": (STAGE | {"feature_dim": 6}, ()),
    "vae-pythae": ({"size": 8, "latent_dim": 3, "hidden": [12], "architecture": "mlp", "activation": "relu"}, ()),
    "var": ({"depth": 2, "embed_dim": 32, "num_heads": 2, "scales": ((1, 1), (3, 3)), "vocab_size": 8, "channels": 4,
             "num_classes": 3, "drop_path": 0.0083333333}, ()),
    "var-tokenizer": (
        {"n_embed": 8, "embed_dim": 4, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "patch_nums": (1, 2, 3)}, ()),
    "vdm": ({"n_embd": 32, "n_layer": 2, "attention": True, "gamma": "learnable_nnet", "pinned": False}, ()),
    "vq-autoencoder": (STAGE | {"n_embed": 16}, ()),
    "vqgan": (STAGE | {"n_embed": 16, "embed_dim": 128}, ()),
    "vqgan-prior": (PRIOR, ()),
    "vqvae-pixelcnn-pythae": ({"vocab_size": 6, "grid": (4, 4), "n_layer": 2, "kernel_size": 3, "channels": 8}, ()),
    "vqvae-pythae": (VQVAE | {"layout": "pythae", "flavour": "pythae", "image_size": 8}, ("image_size=8",)),
    "vqvae-sonnet": (VQVAE, ()),
    "vqvae-zalando": (VQVAE | {"layout": "zalando", "flavour": "zalando"}, ()),
}  # fmt: skip
Call = Callable[..., tuple[int, str, str]]


def state_of(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours, the same in the layout `name`) of its small network, with random weights; the caller's to change."""
    ours, theirs = made(name)
    return {k: v.clone() for k, v in ours.items()}, {k: v.clone() for k, v in theirs.items()}


@functools.cache
def made(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    c = layouts.find(name)
    torch.manual_seed(0)
    network = registry().build(c.kind, {"name": c.component, **TINY[name][0]})
    fixed = {k: p.clone() for k, p in network.named_parameters() if not p.requires_grad}  # tables of positions
    with torch.no_grad():
        suites.randomise(network)
    ours = {k: fixed.get(k, v) for k, v in network.state_dict().items()}
    if "initialised" in ours:  # Glow's actnorm: a published file is of a network that has been trained
        ours["initialised"].fill_(1)
    return ours, {k: v.contiguous() for k, v in c.from_ours(ours).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return not compare.differing(a, b)


def check(result: tuple[int, str, str], code: int, *words: str) -> None:
    got, _, err = result
    assert got == code, err
    for word in words:
        assert word in err, err
    assert "Traceback" not in err


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    """A training checkpoint of facebookresearch/DiT: raw and averaged weights, optimizer, arguments."""
    ours, _ = state_of("dit")
    half = {k: v * 0.5 for k, v in ours.items()}
    more = {"opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}, "args": argparse.Namespace(lr=1e-4)}
    torch.save({"model": ours, "ema": half, **more}, tmp_path / "DiT-tiny.pt")
    return tmp_path / "DiT-tiny.pt"


# -- every layout ------------------------------------------------------------------------------------------------------


def test_every_layout_has_a_small_network() -> None:
    assert set(TINY) == set(registry().names("converter")), "a new layout adds its network to TINY"


@pytest.mark.parametrize("name", sorted(TINY))
def test_there_and_back(name: str, vgm: Call) -> None:
    """Official file -> ours, proved -> official file, strictly and bit for bit."""
    c, own = layouts.find(name), TINY[name][1]
    ours, theirs = state_of(name)
    weight_files.write(Path("theirs.pt"), theirs, {}, c.files.wrapper)
    code, out, err = vgm("convert", "theirs.pt", "ours.safetensors", *own, "--from", name, "--verify", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["component"]["name"] == c.component and result["from"] == name and result["to"] == "vgm"
    checks = {check["what"]: check for check in result["verified"]}
    assert all(check["passed"] for check in checks.values())
    assert "not made" not in checks["forward pass before and after"]["outcome"], checks
    assert f"ours -> {name} -> ours" in checks and f"{name} -> ours -> {name}" in checks
    assert same(load_file("ours.safetensors"), ours)
    header = ckpt.read_header(Path("ours.safetensors"))
    network = ckpt.build_with_weights(header.component, ours, Path("ours.safetensors"))
    assert same(network.state_dict(), ours)
    code, _, err = vgm("convert", "ours.safetensors", "back.pt", "--to", name)
    assert code == 0, err
    again = torch.load("back.pt", weights_only=True)
    assert same(again[c.files.wrapper] if c.files.wrapper else again, theirs)


# Layouts whose files are the same, tensor for tensor: what tells them apart is said by the user, a config.json or the
# name of the file, and `vgm convert` never chooses between them in silence.
TWINS = [
    {"dit", "sit"},
    {"llamagen", "llamagen-384", "llamagen-512"},
    {"dit-diffusers", "dit-diffusers-512"},
    {"adm-unet-diffusers", "adm-unet-diffusers-legacy"},
    {"rectified-flow", "score-sde", "score-sde-subvp", "score-sde-vp-discrete"},
]
BY_NAME = {  # never recognised: raw weights and their averages lie in one file; turbo files are their base network's
    "controlnet-whole": "controlnet",  # without the base that makes it whole
    "glow-average": "glow",
    "ldm-unet-turbo": "ldm-unet",
    "ldm-unet-turbo-diffusers": "ldm-unet-diffusers",
}


@pytest.mark.parametrize("name", sorted(TINY))
def test_no_other_layout_takes_a_state(name: str) -> None:
    """Of all layouts that recognise the names of a state, only its own and its twins have all its shapes."""
    _, theirs = state_of(name)
    taken = {c.name for c in layouts.recognising(theirs) if layouts.fit(c, theirs).exact}
    twins = next((t for t in TWINS if name in t), {name})
    assert taken == (twins if name not in BY_NAME else {BY_NAME[name]})
    try:
        chosen, remark = layouts.choose(theirs, Path("x.safetensors"))
    except VgmError as e:
        assert twins in ({"dit", "sit"}, TWINS[-1]) and "its tensors do not say" in e.message
    else:
        assert chosen.name in taken and bool(remark) == (len(taken) > 1)


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_state_without_one_tensor_is_not_taken(name: str) -> None:
    """Strictness: every tensor of a layout is asked for, but those that it calls unused."""
    c = layouts.find(name)
    _, theirs = state_of(name)
    unused = [re.compile(p) for p in c.files.unused]
    wanted = [k for k in theirs if not any(p.search(k) for p in unused)]
    network = layouts.on_meta(c.kind, c.component, TINY[name][0])
    for lost in wanted[:: max(1, len(wanted) // 8)]:
        try:
            ours = c.to_ours({k: v for k, v in theirs.items() if k != lost})
        except KeyError:
            continue
        except layouts.UNFIT:
            continue
        again = c.from_ours(ours) if ours.keys() == network.keys() else None
        assert again is None or same({lost: again[lost]}, {lost: theirs[lost]}), f"{lost} is not missed"


NETWORKS = {layouts.find(n).component: config for n, (config, _) in TINY.items()} | {"patchgan": {"ndf": 4}}
NETWORKS |= {
    "digit-features": {},
    "colour-features": {},
    "vision-features": {"width": 64, "depth": 1, "patch": 8, "grid": 4, "size": 32},
}
NETWORKS |= {"blur-discriminator": {"hidden_channels": 32, "num_stages": 1}}
NETWORKS |= {"vqvae-prior": {"vocab_size": 6, "grid": (4, 4), "num_classes": 3, "channels": 8, "n_layer": 2}}
VARIANTS = [
    ("model", "adm-unet", ADM | {"super_res": True}),
    ("model", "llamagen", GPT | {"model_type": "t2i", "cls_token_num": 4, "caption_dim": 6, "num_classes": 0}),
    ("model", "glow", GLOW | {"num_classes": 3, "pad": True, "size": 15}),
    ("model", "starflow", FLOW | {"txt_size": 3, "txt_dim": 5, "cond_top_only": False, "use_swiglu": True}),
    ("model", "tarflow", TAR | {"nvp": False}),
    ("model", "vae", {"size": (6, 10), "channels": 3}),
    ("model", "vqgan-prior", PRIOR | {"grid": (2, 2), "window": 2}),
    ("model", "edm-unet", EDM | {"num_classes": None}),
]
WORDS = {"flan-t5", "controlnet", "supir"}  # networks whose forward takes no tensors, or wants another network


@pytest.mark.parametrize(
    ("kind", "name", "config"),
    [(k, n, NETWORKS.get(n)) for k, n in sorted(registry().components) if k in ("model", "codec") and n not in WORDS]
    + VARIANTS,
)
def test_every_network_says_what_it_takes(kind: str, name: str, config: dict[str, Any] | None) -> None:
    """`example(config)` fits forward (of a codec: encode), is the same at every call, and is small."""
    assert config is not None, "a new network adds a small configuration to NETWORKS"
    network = registry().build(kind, {"name": name, **config}).eval()
    assert isinstance(network, HasExample)
    if name in ("lpips", "vision-features"):
        network.loaded = True  # forward refuses to run on weights that were never read
    full = prove.full_config({"kind": kind, "name": name, "kwargs": config})
    given = network.example(full)
    assert all(compare.same(v, given[k]) for k, v in network.example(full).items())
    assert all(1 <= len(v) <= 2 for v in given.values())
    with torch.no_grad():
        out = prove.reconstruct(network, **given) if kind == "codec" else network(**given)
    found = list(prove.tensors_in(out))
    assert found and all(t.isfinite().all() for t in found)


def test_a_network_without_an_example() -> None:
    """Of others: images, times and labels are guessed from its data facts; what takes anything else is told of it."""

    class Denoiser(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            return x * t[:, None, None, None] + (0 if y is None else y)

    class Other(nn.Module):
        def forward(self, x: Tensor, t: Tensor, hint: Tensor) -> Tensor:
            return x + hint

    component = {"kind": "model", "name": "dit", "kwargs": DIT}
    config = prove.full_config(component)
    given = prove.example_of(Denoiser(), config, component, {"sample_shape": [2, 6, 6]})
    assert given["x"].shape == (1, 2, 6, 6) and set(given) == {"x", "t", "y"} and Denoiser()(**given).isfinite().all()
    assert prove.example_of(Denoiser(), config, component, {})["x"].shape == (1, 4, 8, 8)  # as dit's facts say
    with pytest.raises(VgmError, match=r"dit has no `example\(config\)` that says what its forward takes"):
        prove.example_of(Other(), config, component, {"sample_shape": [2, 6, 6]})


@pytest.mark.parametrize("name", [n for n in sorted(TINY) if layouts.find(n).proof.reference is not None])
def test_the_other_library_computes_the_same(name: str, vgm: Call) -> None:
    pytest.importorskip("diffusers")
    _, theirs = state_of(name)
    save_file(theirs, "theirs.safetensors")
    code, out, err = vgm(
        "convert", "theirs.safetensors", "o.safetensors", *TINY[name][1], "--from", name, "--verify", "--json"
    )
    assert code == 0, err
    (found,) = [c["outcome"] for c in json.loads(out)["verified"] if "own code" in c["what"]]
    assert "differs from ours by" in found


def test_another_library_that_computes_something_else_is_noticed(vgm: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import vgm_plugins.dit.checkpoints as checkpoints

    _, theirs = state_of("dit-diffusers")
    torch.save(theirs, "t.pt")
    proof = replace(checkpoints.DIFFUSERS.proof, reference=lambda state, config: torch.ones(8 * 32 * 32))
    wrong = replace(checkpoints.DIFFUSERS, proof=proof)
    monkeypatch.setattr(checkpoints, "DIFFUSERS", wrong)
    args = ("convert", "t.pt", "o.safetensors", "num_heads=2", "--from", "dit-diffusers")
    check(vgm(*args, "--verify"), 3, "not proved", "own code", "nothing was written")
    assert not Path("o.safetensors").exists()
    check(vgm(*args), 0)  # nobody asked for a proof


@pytest.mark.parametrize("damage", ["swapped", "rounded", "lost bit"])
def test_a_converter_that_errs_is_noticed(damage: str, dit: Path, vgm: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import vgm_plugins.dit.checkpoints as checkpoints

    def wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(checkpoints.CONVERTER.to_ours(state))
        a, b = "blocks.0.mlp.fc2.bias", "blocks.1.mlp.fc2.bias"
        if damage == "swapped":
            out[a], out[b] = out[b], out[a]
        elif damage == "rounded":
            out[a] = out[a].half().float()
        else:
            out[a] = out[a].clone()
            out[a].view(torch.int32)[0] ^= 1
        return out

    monkeypatch.setattr(checkpoints, "CONVERTER", replace(checkpoints.CONVERTER, from_ours=wrong))
    result = vgm("convert", dit, "o.safetensors", "num_heads=2", "--verify")
    check(result, 3, "not proved", "tensors differ", "blocks.0.mlp.fc2.bias", "nothing was written")
    assert not Path("o.safetensors").exists()


def test_negative_zero_and_nan_are_bits() -> None:
    zero, minus, nan = torch.tensor([0.0]), torch.tensor([-0.0]), torch.tensor([float("nan")])
    assert not compare.same(zero, minus) and compare.same(nan, nan.clone())
    assert not compare.same(zero, zero.double()) and compare.same(torch.zeros(0, 3), torch.zeros(0, 3))


# -- choosing weights, precision, layout -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "factor", "kind"), [(None, 0.5, "ema"), ("ema", 0.5, "ema"), ("model", 1.0, "raw"), ("raw", 1.0, "raw")]
)
def test_average_or_raw(wanted: str | None, factor: float, kind: str, dit: Path, vgm: Call) -> None:
    ours, _ = state_of("dit")
    option = () if wanted is None else ("--weights", wanted)
    code, out, err = vgm("convert", dit, "o.safetensors", *option)
    assert code == 0 and f"{kind} weights" in out and "taken for dit, by the name of the file" in err
    assert same(load_file("o.safetensors"), {k: v * factor for k, v in ours.items()})
    assert ckpt.read_header(Path("o.safetensors")).weights == kind


def test_weights_that_are_not_there(dit: Path, vgm: Call) -> None:
    check(vgm("convert", dit, "o.safetensors", "--weights", "swa"), 2, "holds no 'swa' weights", "it holds model, ema")
    torch.save(state_of("dit")[0], "dit.pt")
    check(vgm("convert", "dit.pt", "o.safetensors", "--weights", "ema"), 2, "no 'ema' weights", "a bare state")


def test_averages_without_names(vgm: Call) -> None:
    """score_sde and its forks keep the average as a list in the order of the parameters."""
    ours, theirs = state_of("rectified-flow")
    buffers = {k for k in theirs if k.endswith(("sigmas", ".W")) and "NIN" not in k}
    shadow = [v * 0.5 for k, v in theirs.items() if k not in buffers]
    saved = {"model": {f"module.{k}": v for k, v in theirs.items()}, "ema": {"decay": 0.999, "shadow_params": shadow}}
    torch.save({**saved, "step": 3}, "rf.pth")
    code, _, err = vgm("convert", "rf.pth", "o.safetensors")
    assert code == 2 and "--from rectified-flow" in err  # score-sde's tensors have the same names and shapes
    assert vgm("convert", "rf.pth", "o.safetensors", "--from", "rectified-flow")[0] == 0
    got = load_file("o.safetensors")
    assert all(torch.equal(v, ours[k] if k in buffers else ours[k] * 0.5) for k, v in got.items())
    code, out, _ = vgm("convert", "o.safetensors", "again.pth")  # of two layouts, the one that it came in
    assert code == 0 and "vgm -> rectified-flow" in out


def test_a_network_inside_another_module(vgm: Call) -> None:
    ours, _ = state_of("vae-pythae")
    inside = {f"net.{k}": v for k, v in ours.items()} | {f"ema_net.{k}": v * 2 for k, v in ours.items()}
    torch.save({"state_dict": inside, "epoch": 3}, "wrapped.ckpt")
    assert vgm("convert", "wrapped.ckpt", "o.safetensors")[0] == 0
    assert same(load_file("o.safetensors"), {k: v * 2 for k, v in ours.items()})


def renamed(state: dict[str, Tensor], how: str) -> dict[str, Any]:
    """A checkpoint as some trainer saves it: a prefix of every name, words in the middle of names, or dictionaries."""
    if how == "by block":
        return {re.sub(r"^(encoder\.layers\.\d+|decoder)\.", r"\1._orig_mod.", k): v for k, v in state.items()}
    if how == "checkpointed":
        return {k.replace("layers.0.0.", "layers.0.0._checkpoint_wrapped_module."): v for k, v in state.items()}
    if how == "half wrapped":
        return {re.sub(r"^decoder\.", "decoder.module._orig_mod.", k): v for k, v in state.items()}
    if how == "one in a list":
        return {"nets": [{"params": state}]}
    if how == "deep":
        return {"checkpoint": {"state": {"model": state}}, "optimizer": {"state": {0: {}}, "param_groups": []}}
    if how.startswith("state_dict:"):
        return {"state_dict": {how.partition(":")[2] + k: v for k, v in state.items()}, "epoch": 3}
    return {how + k: v for k, v in state.items()}


@pytest.mark.parametrize(
    "how",
    [
        *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.", "net.module."),
        *("_forward_module.model._orig_mod.", "by block", "checkpointed", "half wrapped", "one in a list", "deep"),
        *("state_dict:model._orig_mod.", "state_dict:net.module.", "state_dict:module.net._fsdp_wrapped_module."),
    ],
)
def test_wrappers_of_networks(how: str, vgm: Call) -> None:
    """DDP, compiled networks and blocks, FSDP, activation checkpointing, Lightning, dictionaries in dictionaries."""
    ours, _ = state_of("vae-pythae")
    torch.save(renamed(ours, how), "wrapped.pt")
    code, out, err = vgm("convert", "wrapped.pt", "o.safetensors", "--json")
    assert code == 0 and json.loads(out)["left_out"] == [], err
    assert same(load_file("o.safetensors"), ours)
    assert facts_of(vgm, "wrapped.pt")["fit"]["unexpected"] == []


def facts_of(vgm: Call, file: object) -> dict[str, Any]:
    code, out, err = vgm("inspect", file, "--json")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def test_parameters_that_were_run_together_are_refused(vgm: Call) -> None:
    torch.save({"_fsdp_wrapped_module._flat_param": torch.zeros(9)}, "flat.pt")
    check(vgm("convert", "flat.pt", "o.safetensors"), 1, "FSDP has flattened", "full state dict")


def averaged(raw: dict[str, Tensor], how: str) -> dict[str, Any]:
    """A checkpoint with raw weights and, as some trainer keeps it, an average that is twice as large."""
    twice = {k: v * 2 for k, v in raw.items()}
    inside = {f"model.{k}": v for k, v in raw.items()}
    if how == "lucidrains":
        own = {f"ema.ema_model.{k}": v for k, v in twice.items()} | {f"ema.online_model.{k}": v for k, v in raw.items()}
        return {"state_dict": inside | own | {"ema.initted": torch.ones(()), "ema.step": torch.ones(())}}
    if how == "lightning":
        own = {f"model_ema.module.{k}": v for k, v in twice.items()}
        return {"state_dict": inside | own | {"model_ema.n_averaged": torch.ones(())}}
    if how.startswith("LitEma"):
        own = {"model_ema." + k.replace(".", ""): v for k, v in twice.items()}
        own |= {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
        return {"state_dict": (raw if how == "LitEma of itself" else inside) | own}
    if how == "AveragedModel":
        own = {f"averaged_model.module.{k}": v for k, v in twice.items()}
        return inside | own | {"averaged_model.n_averaged": torch.ones(())}
    if how == "shadow list":
        return {"model": raw, "ema": {"shadow_params": list(twice.values()), "decay": 0.9}}
    if how == "shadow list at the top":
        return {"state": {"model": raw}, "shadow_params": list(twice.values())}
    return {"params": raw, "step": 3} | {how: twice}


@pytest.mark.parametrize(
    "how",
    [
        *("lucidrains", "lightning", "LitEma", "LitEma of itself", "AveragedModel", "shadow list"),
        *("shadow list at the top", "params_ema", "ema_state_dict", "model_ema", "ema", "state_dict_ema"),
    ],
)
def test_averages_inside_the_file(how: str, vgm: Call) -> None:
    """They are taken unless raw weights are asked for, and it is said what else there is."""
    ours, _ = state_of("vae-pythae")
    torch.save(averaged(ours, how), "x.pt")
    for option, factor, kind in (((), 2, "ema"), (("--weights", "ema"), 2, "ema"), (("--weights", "raw"), 1, "raw")):
        code, out, err = vgm("convert", "x.pt", "o.safetensors", "--overwrite", *option, "--json")
        assert code == 0, err
        assert same(load_file("o.safetensors"), {k: v * factor for k, v in ours.items()}), option
        result = json.loads(out)
        assert result["weights"] == kind and any("also there: " in r for r in result["remarks"])
    assert facts_of(vgm, "x.pt")["weights"] == "ema"


def test_an_average_that_cannot_be_named_is_told(vgm: Call) -> None:
    ours, _ = state_of("vae-pythae")
    torch.save({"model": ours, "ema": {"shadow_params": [torch.zeros(2), torch.zeros(5)]}}, "x.pt")
    code, _, err = vgm("convert", "x.pt", "o.safetensors")
    assert code == 0 and "average 'ema' is left out" in err
    check(vgm("convert", "x.pt", "p.safetensors", "--weights", "ema"), 2, "holds no 'ema' weights", "model")
    torch.save({"shadow_params": list(ours.values())}, "y.pt")
    check(vgm("convert", "y.pt", "p.safetensors"), 1, "an average without names")


def test_the_order_of_an_average_has_to_be_certain() -> None:
    """Tensors of one shape, of which some are not trained: no guess is made; normalisation's buffers are known."""
    a, b = torch.zeros(3), torch.ones(3)
    with pytest.raises(VgmError, match="several ways"):
        named_shadow({"a": a, "b": a, "c": a}, [b, b])
    got = named_shadow({"n.weight": a, "n.running_mean": a, "n.running_var": a, "m.weight": a}, [b, b])
    assert [float(v.sum()) for v in got.values()] == [3, 0, 0, 3]


def test_several_networks_are_told(vgm: Call) -> None:
    ours, _ = state_of("vae-pythae")
    _, edm = state_of("edm")
    torch.save({"vae": ours, "denoiser": edm, "args": {"lr": 1}}, "x.pt")
    code, _, err = vgm("convert", "x.pt", "o.safetensors")
    assert code == 0 and "taken: 'vae'; also there: 'denoiser'" in err
    assert vgm("convert", "x.pt", "p.safetensors", "--weights", "denoiser")[0] == 0
    assert ckpt.read_header(Path("p.safetensors")).component["name"] == "edm-unet"
    out = vgm("inspect", "x.pt")[1]
    assert "also        'denoiser'" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_casts(dtype: str, vgm: Call) -> None:
    ours, theirs = state_of("glow")
    save_file(theirs, "g.safetensors")
    args = ("convert", "g.safetensors", "o.safetensors", "--dtype", dtype)
    code, out, err = vgm(*args, "--verify")
    assert code == 0 and "verified" in out, err
    got = load_file("o.safetensors")
    assert {v.dtype for v in got.values()} == {convert.DTYPES[dtype], torch.uint8}  # a flag stays one
    assert all(torch.equal(v, ours[k].to(v.dtype)) for k, v in got.items())
    assert vgm("convert", "o.safetensors", "back.pt", "--to", "glow", "--dtype", "fp32")[0] == 0
    assert all(v.dtype == torch.float32 for v in torch.load("back.pt", weights_only=True).values())


def test_a_cast_that_overflows_is_refused(vgm: Call) -> None:
    ours, _ = state_of("vae-pythae")
    ours["encoder.embedding.bias"][0] = 1e5
    torch.save(ours, "v.pt")
    check(vgm("convert", "v.pt", "o.safetensors", "--dtype", "fp16"), 2, "encoder.embedding.bias", "65504", "bf16")
    check(vgm("convert", "v.pt", "o.safetensors", "--dtype", "fp8"), 2, "unknown dtype 'fp8'")
    assert vgm("convert", "v.pt", "o.safetensors", "--dtype", "bf16")[0] == 0
    check(vgm("convert", "o.safetensors", "o.npz"), 2, ".npz has no bfloat16")


def test_the_layout_of_the_file_to_write(dit: Path, vgm: Call) -> None:
    vgm("convert", dit, "o.safetensors", "num_heads=2")
    code, out, _ = vgm("convert", "o.safetensors", "official.pth")
    assert code == 0 and "vgm -> dit" in out
    check(vgm("convert", "o.safetensors", "x.pt", "--to", "glow"), 2, "is a layout of glow", "its layouts: vgm, dit")
    check(vgm("convert", "o.safetensors", "x.pt", "--to", "vgm"), 2, "cannot say what network it holds")
    check(vgm("convert", "o.safetensors", "x.pt", "--to", "dti"), 2, "unknown layout 'dti'", "dit")
    check(vgm("convert", "o.safetensors", "x", "--to", "dit"), 2, "has no suffix")
    check(vgm("convert", "o.safetensors", "x.gguf"), 2, "not a kind of file that is written", ".safetensors")
    check(vgm("convert", "o.safetensors", "y.safetensors", "--from", "dit"), 2, "is a file of ours")
    check(vgm("convert", "o.safetensors", "y.safetensors", "num_heads=4"), 2, "says what network it holds")


def test_between_layouts_in_one_go(vgm: Call) -> None:
    """diffusers -> official without a file of ours between them."""
    ours, theirs = state_of("dit-diffusers")
    save_file(theirs, "d.safetensors")
    assert vgm("convert", "d.safetensors", "o.pt", "--from", "dit-diffusers", "--verify", "num_heads=2")[0] == 0
    assert same(torch.load("o.pt", weights_only=True), ours)


def test_a_folder_of_diffusers(vgm: Call) -> None:
    """Weights and config.json; its config tells the size and the heads when it is read back."""
    for name, size in (("dit-diffusers", 32), ("dit-diffusers-512", 64)):
        ours, _ = state_of(name)
        torch.save(ours, f"DiT-{size}.pt")
        assert vgm("convert", f"DiT-{size}.pt", f"{size}.safetensors", "--from", "dit", "num_heads=2")[0] == 0
        assert vgm("convert", f"{size}.safetensors", f"folder{size}", "--to", name, "--verify")[0] == 0
        assert json.loads(Path(f"folder{size}/config.json").read_text())["sample_size"] == size
        code, out, _ = vgm("convert", f"folder{size}", f"again{size}.safetensors", "--json")
        assert code == 0 and json.loads(out)["from"] == name
        assert same(load_file(f"again{size}.safetensors"), ours)
        assert ckpt.read_header(Path(f"again{size}.safetensors")).component["kwargs"]["num_heads"] == 2
    other = "dit-diffusers"
    check(vgm("convert", "64.safetensors", "x.pt", "--to", other), 2, "32x32", "dit-diffusers-512 of 64")


def ours_of(component: str, config: dict[str, Any], view: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """o.safetensors: a network of ours that nobody published."""
    torch.manual_seed(0)
    network = registry().build("model", {"name": component, **config})
    fixed = {k: p.clone() for k, p in network.named_parameters() if not p.requires_grad}
    suites.randomise(network)
    state = {k: fixed.get(k, v).contiguous() for k, v in network.state_dict().items()}
    save_file(
        state,
        "o.safetensors",
        ckpt.Header({"kind": "model", "name": component, "kwargs": config}, view=view).metadata(),
    )
    return state


SMALL_DIT = {**DIT, "input_size": 7, "patch_size": 1, "num_heads": 2}
SMALL_UNET = {**ADM, "image_size": 28, "in_channels": 1, "model_channels": 16, "channel_mult": [1, 2], "num_classes": 10,
              "attention_resolutions": [2], "num_head_channels": 16, "norm_groups": 8, "null_class": True}  # fmt: skip
SMALL_PYRAMID = {**NCSN, **PYRAMID, "ch_mult": [1, 4, 4], "attn_resolutions": [8], "sigma_max": 380.0, "num_scales": 1000,
                 "centered": True, "dropout": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("component", "config", "layout", "words"),
    [
        ("dit", SMALL_DIT, "dit-diffusers", []),
        ("adm-unet", SMALL_UNET, "adm-unet-diffusers-legacy", ["num_classes=10", "null_class=true"]),
        ("ncsnpp", SMALL_PYRAMID, "score-sde-diffusers", []),
    ],
)
def test_our_own_sizes_go_to_a_folder_of_diffusers(
    component: str, config: dict[str, Any], layout: str, words: list[str], vgm: Call
) -> None:
    """The sizes of digits are in config.json: diffusers' own code computes the same, and it is read back."""
    pytest.importorskip("diffusers")
    state = ours_of(component, config)
    code, out, err = vgm("convert", "o.safetensors", "folder", "--to", layout, "--verify")
    assert code == 0 and f"forward pass of {layout}'s own code: differs from ours by" in out, err
    assert all(word in err for word in words), err
    assert vgm("convert", "folder", "again.safetensors", "--from", layout, *words)[0] == 0
    assert same(load_file("again.safetensors"), state)
    kwargs = ckpt.read_header(Path("again.safetensors")).component["kwargs"]
    assert {k: kwargs[k] for k in config if k in kwargs} == {k: v for k, v in config.items() if k in kwargs}
    if component != "dit":  # the group's and the head's width, and noise levels, are told by config.json alone
        check(vgm("convert", "o.safetensors", "x.pt", "--to", layout), 2, "a folder, with its config.json")


def test_what_diffusers_cannot_express_is_refused(vgm: Call) -> None:
    ours_of("adm-unet", {**SMALL_UNET, "patch_size": 2})
    check(vgm("convert", "o.safetensors", "x", "--to", "adm-unet-diffusers-legacy"), 2, "no patches", "patch_size is 2")


def test_what_a_layout_does_not_tell_is_said(vgm: Call) -> None:
    """Weights alone do not tell heads or how a network was trained: the words that reading back needs are named."""
    config = {**SMALL_DIT, "hidden_size": 128, "num_heads": 4}
    view = {"name": "denoiser", "path": {"name": "linear"}, "prediction": "velocity", "time": "reversed"}
    ours_of("dit", config, view)
    code, _, err = vgm("convert", "o.safetensors", "o.pt")
    assert code == 0 and "does not tell num_heads=4" in err and "trained as published" in err
    needed = re.findall(r"does not tell (.*): `vgm convert`", err)[0].split()
    assert vgm("convert", "o.pt", "again.safetensors", *needed)[0] == 0
    assert ckpt.read_header(Path("again.safetensors")).component["kwargs"]["num_heads"] == 4
    ours, _ = state_of("adm-unet")  # as published: nothing to say
    torch.save(ours, "adm.pt")
    assert vgm("convert", "adm.pt", "adm.safetensors")[0] == 0
    assert "tell" not in vgm("convert", "adm.safetensors", "adm2.pt")[2]


def test_the_config_tells_how_latents_are_scaled(vgm: Call) -> None:
    ours, _ = state_of("autoencoder-kl-diffusers")
    torch.save({"state_dict": ours}, "kl.ckpt")
    scaling = ("scale_factor=0.7", "shift_factor=0.1", "resolution=16")
    assert vgm("convert", "kl.ckpt", "kl.safetensors", *scaling)[0] == 0
    assert vgm("convert", "kl.safetensors", "folder", "--to", "autoencoder-kl-diffusers", "--verify")[0] == 0
    assert vgm("convert", "folder", "again.safetensors")[0] == 0
    got = ckpt.read_header(Path("again.safetensors")).component["kwargs"]
    assert (got["scale_factor"], got["shift_factor"]) == (0.7, 0.1)
    assert same(load_file("again.safetensors"), ours)


def test_a_pipeline_is_several_networks(vgm: Call) -> None:
    for part in ("transformer", "vae"):
        Path("pipe", part).mkdir(parents=True)
        Path("pipe", part, "config.json").write_text("{}")
    Path("pipe/model_index.json").write_text("{}")
    check(vgm("convert", "pipe", "o.safetensors"), 2, "pipeline of several networks", "transformer, vae")


def test_the_order_of_attention_is_not_mixed_up(vgm: Call) -> None:
    """diffusers' weights would be cut out of ours wrongly: refused, with the right layout named."""
    ours, _ = state_of("adm-unet")
    torch.save(ours, "64x64.pt")
    assert vgm("convert", "64x64.pt", "o.safetensors")[0] == 0
    check(vgm("convert", "o.safetensors", "x", "--to", "adm-unet-diffusers"), 2, "other order", "diffusers-legacy")
    assert vgm("convert", "o.safetensors", "x", "--to", "adm-unet-diffusers-legacy", "--verify")[0] == 0


def test_shapes_tell_layouts_of_equal_names_apart(vgm: Call) -> None:
    """ADM's and the consistency models' networks have the same names; their attention is stored differently."""
    for name in ("adm-unet", "consistency"):
        torch.save(state_of(name)[1], "unet.pt")
        code, out, err = vgm("convert", "unet.pt", "o.safetensors", "--force", "--json")
        assert code == 0 and json.loads(out)["from"] == name, err


# -- ours --------------------------------------------------------------------------------------------------------------


def test_a_run_becomes_one_file(tmp_path: Path, vgm: Call) -> None:
    ours, _ = state_of("dit")
    header = convert.Header({"kind": "model", "name": "dit", "kwargs": DIT}, recipe={"paper": "dit"}, step=8, images=64)
    folder = tmp_path / "run/checkpoints/step-00000008"
    folder.mkdir(parents=True)
    ckpt.save_network(folder / "model.safetensors", ours, header)
    header.weights = "ema-0.9"
    ckpt.save_network(folder / "ema-0.9.safetensors", {k: v * 0.5 for k, v in ours.items()}, header)
    for option, factor in (
        ((), 0.5),
        (("--weights", "ema"), 0.5),
        (("--weights", "model"), 1),
        (("--weights", "ema-0.9"), 0.5),
    ):
        assert vgm("convert", "run", "o.safetensors", *option, "--force")[0] == 0
        assert same(load_file("o.safetensors"), {k: v * factor for k, v in ours.items()})
    got = ckpt.read_header(Path("o.safetensors"))
    assert (got.weights, got.step, got.images, got.recipe) == ("ema-0.9", 8, 64, {"paper": "dit"})
    check(vgm("convert", "o.safetensors", "x.safetensors", "--weights", "model"), 2, "holds ema-0.9 weights")
    check(vgm("convert", "run", "x.safetensors", "--weights", "ema-0.8"), 2, "has no weights 'ema-0.8'")


def test_the_source_is_remembered(dit: Path, vgm: Call) -> None:
    assert vgm("convert", dit, "a.safetensors")[0] == vgm("convert", "a.safetensors", "b.safetensors")[0] == 0
    for file in ("a.safetensors", "b.safetensors"):
        source = json.loads(ckpt.read_tensors(Path(file))[1]["vgm.source"])
        assert source == {"file": dit.name, "sha256": ckpt.file_hash(dit), "layout": "dit"}


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("dit", {"name": "iddpm", "schedule": "linear", "steps": 1000, "learn_sigma": True}),
        ("sit", {"name": "flow-matching", "path": "linear", "prediction": "velocity"}),
        ("adm-unet", {"name": "iddpm", "schedule": "linear", "steps": 1000, "learn_sigma": True}),
    ],
)
def test_a_published_network_is_sampled_as_it_is(name: str, objective: dict[str, Any], vgm: Call) -> None:
    """The view is that of the paper's objective; sampler, guidance and shape need no recipe."""
    _, theirs = state_of(name)
    torch.save(theirs, "net.pt")
    assert vgm("convert", "net.pt", "o.safetensors", *TINY[name][1], "--from", name)[0] == 0
    header = ckpt.read_header(Path("o.safetensors"))
    network = registry().build("model", {"name": name, **TINY[name][0]})
    assert registry().build("objective", objective, model=network).view() == header.view
    code, out, err = vgm("sample", "o.safetensors", "-n", 2, "--steps", 2, "--out", "x.npz", "--json")
    assert code == 0 and json.loads(out)["sampler"]["name"] == header.recipe["sampler"]["name"], err
    assert np.load("x.npz")["arr_0"].shape == (2, *header.data["sample_shape"][1:], header.data["sample_shape"][0])


def test_a_codec_goes_with_a_network_of_latents(vgm: Call) -> None:
    torch.save({"state_dict": state_of("autoencoder-kl")[0]}, "kl.ckpt")
    torch.save(state_of("sit")[1], "SiT.pt")
    assert vgm("convert", "kl.ckpt", "vae.safetensors", "resolution=16")[0] == 0
    code, _, err = vgm("convert", "SiT.pt", "plain.safetensors", "num_heads=2")
    assert code == 0 and "its samples are latents" in err
    code, _, err = vgm("convert", "SiT.pt", "sit.safetensors", "num_heads=2", "--codec", "vae.safetensors")
    assert code == 0 and "latents" not in err
    assert vgm("sample", "sit.safetensors", "-n", 1, "--steps", 2, "--out", "x.npz")[0] == 0
    assert np.load("x.npz")["arr_0"].shape == (1, 16, 16, 3)
    check(vgm("convert", "SiT.pt", "x.safetensors", "--codec", "plain.safetensors"), 2, "is no codec but 'sit'")
    check(vgm("convert", "SiT.pt", "x.pt", "--to", "sit", "--codec", "vae.safetensors"), 2, "names no codec")


# -- shards ------------------------------------------------------------------------------------------------------------


def test_shards_out_and_in(dit: Path, vgm: Call) -> None:
    code, out, err = vgm(
        "convert", dit, "big.safetensors", "num_heads=2", "--max-shard-size", "60KB", "--verify", "--json"
    )
    assert code == 0, err
    files = [Path(f) for f in json.loads(out)["files"]]
    index = json.loads(files[0].read_text())
    assert files[0].name == "big.safetensors.index.json" and len(files) > 3
    assert files[1].name == f"big-00001-of-{len(files) - 1:05d}.safetensors"
    assert all(f.stat().st_size < 66_000 for f in files[1:])
    assert index["metadata"]["total_size"] == sum(4 * v.numel() for v in state_of("dit")[0].values())
    assert set(index["weight_map"].values()) == {f.name for f in files[1:]}
    whole = {k: v * 0.5 for k, v in state_of("dit")[0].items()}
    for source in (files[0], files[2]):  # the index, or any shard of it
        assert vgm("convert", source, "one.safetensors", "--force")[0] == 0
        assert same(load_file("one.safetensors"), whole)
    code, out, _ = vgm("inspect", files[0])
    assert code == 0 and "component   model dit" in out
    assert vgm("sample", files[0], "-n", 1, "--steps", 1, "--out", "x.npz")[0] == 0


def test_shards_of_a_published_network(tmp_path: Path, vgm: Call) -> None:
    """A folder with an index, as hubs keep it."""
    _, theirs = state_of("dit-diffusers")
    folder = tmp_path / "transformer"
    folder.mkdir()
    limit = 100_000
    weight_files.write(folder / "diffusion_pytorch_model.safetensors", theirs, {}, limit=limit)
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    (folder / "config.json").write_text(json.dumps({"sample_size": 32}))
    code, out, err = vgm("convert", "transformer", "o.safetensors", "num_heads=2", "--json")
    assert code == 0 and json.loads(out)["from"] == "dit-diffusers", err
    next(folder.glob("*-00002-of-*.safetensors")).unlink()
    check(vgm("convert", "transformer", "p.safetensors"), 1, "names files that are not there")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    check(vgm("convert", "transformer", "p.safetensors"), 1, "is not an index of shards")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../secret.safetensors"}}'
    )
    check(vgm("convert", "transformer", "p.safetensors"), 1, "names files that are not there")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("700", 700), ("2GiB", 2 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert weight_files.bytes_in(text) == size


def test_sizes_that_are_none(dit: Path, vgm: Call) -> None:
    for text in ("five", "0", "-1GB", "5XB"):
        check(vgm("convert", dit, "o.safetensors", f"--max-shard-size={text}"), 2, f"'{text}' is not a size")


# -- pickles -----------------------------------------------------------------------------------------------------------


class Payload:
    """What an attacker stores: a program that runs when the file is opened."""

    def __init__(self, how: str = "system"):
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "system":
            return os.system, ("touch pwned",)
        if self.how == "eval":
            return eval, ("open('pwned', 'w')",)
        return pickle.loads, (b"cos\nsystem\n(S'touch pwned'\ntR.",)


def hostile(path: Path, how: str) -> None:
    state = {"a.weight": torch.zeros(2), "extra": Payload(how)}
    if path.suffix == ".npz":
        np.savez(path, x=np.array([Payload(how)], dtype=object))
    elif path.suffix == ".pkl" or path.stem == "plain":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.stem != "legacy")


@pytest.mark.parametrize("how", ["system", "eval", "loads"])
@pytest.mark.parametrize("file", ["new.pt", "legacy.pth", "plain.ckpt", "x.bin", "x.pkl", "x.npz"])
def test_a_hostile_pickle_is_refused(file: str, how: str, vgm: Call) -> None:
    """Nothing is executed: not by convert, not by inspect."""
    hostile(Path(file), how)
    for args in (("convert", file, "o.safetensors"), ("inspect", file)):
        code, _, err = vgm(*args)
        assert code == 1 and "Traceback" not in err, err
        assert not Path("pwned").exists() and not Path("o.safetensors").exists()
    if file != "x.npz":
        assert "refused: nothing was executed" in err and "--trust-pickle" in err


def test_trust_is_explicit_and_does_run_the_file(vgm: Call) -> None:
    """The payload is real: it runs when asked for, with a warning."""
    hostile(Path("new.pt"), "system")
    code, _, err = vgm("convert", "new.pt", "o.safetensors", "--trust-pickle")
    assert "warning: --trust-pickle lets new.pt run any program" in err
    assert Path("pwned").exists() and code == 2  # its one tensor is no network


@pytest.mark.parametrize("gadget", [
    b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'touch pwned'\ntR.",
    b"ctorch.hub\nload\n(S'x'\ntR.",
    b"cnumpy\nload\n(S'x'\ntR.",
    b"cpathlib\nPath\n(S'pwned'\ntR(S'x'\nb.",
    b"cargparse\nNamespace.__init__.__globals__\n.",
    b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__class__\x93.",
    b"ctorch.serialization\nload\n(S'x'\ntR.",
    b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
])  # fmt: skip
def test_gadgets_find_nothing(gadget: bytes) -> None:
    """Neither functions that act nor attributes of what is allowed; pathlib's and argparse's classes are shells."""
    Path("g.pkl").write_bytes(gadget)
    try:
        found = reading.read(Path("g.pkl"))
    except VgmError as e:
        assert e.code == 1
    else:
        assert isinstance(found, Shell) or issubclass(found, Shell)
    assert not Path("pwned").exists()


def test_bytes_that_lie_about_an_array() -> None:
    """Arrays are made of their bytes; dtypes of objects, which would be read as pointers, are refused."""
    Path("o.pkl").write_bytes(pickle.dumps({"a": np.array([None, 1], dtype=object)}))
    with pytest.raises(VgmError, match="an array of 'O8'"):
        reading.read(Path("o.pkl"))
    good = {"f": np.arange(6, dtype=">f4").reshape(2, 3), "i": np.arange(3), "t": np.asfortranarray(np.eye(2, 3)),
            "s": np.float64(2.5), "b": np.array([True, False])}  # fmt: skip
    for protocol in (2, 4, 5):
        Path("a.pkl").write_bytes(pickle.dumps(good, protocol))
        got = contents(reading.read(Path("a.pkl")))
        assert all(np.array_equal(got[k].numpy(), good[k]) for k in "fitb") and got["s"] == 2.5


def test_what_checkpoints_carry_beside_weights(monkeypatch: pytest.MonkeyPatch, vgm: Call) -> None:
    """Arguments, callbacks, configurations and numpy values become inert: their classes are not even imported."""
    import sys
    import types

    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__, "__setstate__": lambda self, s: 1 / 0})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kept = callback()
    kept.best = 1.0  # type: ignore[attr-defined]
    ours, _ = state_of("vae-pythae")
    content = {
        "model_state_dict": OrderedDict(ours),
        "callbacks": {callback: {"best": np.float32(0.5)}, "own": kept},
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.99), out=Path("x")),
        "rng": np.random.RandomState(0).get_state(),
    }
    for zipped in (True, False):
        torch.save(content, "lit.ckpt", _use_new_zipfile_serialization=zipped)
        assert vgm("convert", "lit.ckpt", "o.safetensors", "--force")[0] == 0
        assert same(load_file("o.safetensors"), ours)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("temporary", torch.ones(2), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_whole_networks_in_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NVIDIA's pickles hold objects with their source code, which is neither imported nor run."""
    import sys
    import types

    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = lambda meta: 1 / 0  # type: ignore[attr-defined]
    module._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    module._reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    class Persistent(Branch):
        def __reduce__(self) -> tuple[Any, ...]:
            state = {k: v for k, v in vars(self).items() if k != "training"}
            meta = {
                "type": "class",
                "class_name": "G",
                "module_src": "import os; os.system('touch pwned')",
                "state": state,
            }
            return module._reconstruct_persistent_obj, (meta,)

    network = Persistent()
    for protocol in (2, 4):
        Path("n.pkl").write_bytes(pickle.dumps({"G_ema": network, "training_set_kwargs": {"path": "x"}}, protocol))
        found = weight_files.read(Path("n.pkl"))
        assert list(found.entries) == ["G_ema"] and same(found.entries["G_ema"], dict(network.state_dict()))
        assert found.pick(None) == found.pick("ema") == ["G_ema"]
    assert not Path("pwned").exists()
    monkeypatch.undo()  # the working directory, too
    torch.save(nn.Sequential(nn.Linear(2, 3)), tmp_path / "module.pt")  # torch's own layers
    assert set(weight_files.read(tmp_path / "module.pt").entries[""]) == {"0.weight", "0.bias"}


def test_variables_of_another_framework() -> None:
    """A pickled dnnlib.tflib Network: variables by name, sub-networks below theirs."""
    part = shell_of("dnnlib.tflib.network.Network")()
    part.state = {"name": "mapping", "variables": [("Dense0/weight", np.ones((2, 2), np.float32))], "components": {}}
    whole = shell_of("dnnlib.tflib.network.Network")()
    whole.state = {"name": "Gs", "variables": [("lod", np.zeros((), np.float32))], "components": {"mapping": part}}
    got = contents((part, whole))
    assert {k: sorted(v) for k, v in got.items()} == {
        "mapping": ["Dense0/weight"],
        "Gs": ["lod", "mapping/Dense0/weight"],
    }


def test_arrays(vgm: Call) -> None:
    """.npz both ways: what a TensorFlow checkpoint's variables are exported to."""
    ours, theirs = state_of("glow")
    np.savez("glow.npz", **{k: v.numpy() for k, v in theirs.items()})
    assert vgm("convert", "glow.npz", "o.safetensors", "--verify")[0] == 0
    assert same(load_file("o.safetensors"), ours)
    assert vgm("convert", "o.safetensors", "back.npz", "--to", "glow", "--verify")[0] == 0
    again = np.load("back.npz")
    assert set(again.files) == set(theirs) and all(np.array_equal(again[k], theirs[k]) for k in theirs)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_wrong_layouts(dit: Path, vgm: Call) -> None:
    check(vgm("convert", dit, "o.safetensors", "--from", "ditt"), 2, "unknown layout 'ditt'", "dit")
    check(
        vgm("convert", dit, "o.safetensors", "--from", "glow"),
        2,
        "does not have the layout 'glow'",
        "looks like dit, sit",
    )
    check(vgm("convert", dit, "o.safetensors", "--from", "vgm"), 2, "does not say what network it holds")
    check(vgm("convert", dit, "o.safetensors", "num_head=2"), 2, "unknown key 'num_head'", "num_heads")
    check(vgm("convert", dit, "o.safetensors", "num_heads"), 2, "not KEY=VALUE")
    check(vgm("convert", dit, "o.safetensors", "hidden_size=64"), 2, "does not have the layout 'dit'", "wants")
    assert not Path("o.safetensors").exists()


def test_ambiguous_layouts(vgm: Call) -> None:
    torch.save(state_of("sit")[1], "weights.pt")
    check(vgm("convert", "weights.pt", "o.safetensors"), 2, "may be dit or sit", "--from dit")
    Path("SiT-XL").mkdir()
    Path("weights.pt").rename("SiT-XL/weights.pt")
    code, out, _ = vgm("convert", "SiT-XL/weights.pt", "o.safetensors", "--json")
    assert code == 0 and json.loads(out)["from"] == "sit"


def test_unknown_layouts(vgm: Call) -> None:
    torch.save({"a.weight": torch.zeros(2), "b": torch.zeros(3)}, "x.pt")
    check(vgm("convert", "x.pt", "o.safetensors"), 2, "no published layout", "'a.weight'", "vgm ls converters")
    ours, _ = state_of("dit")
    del ours["blocks.1.mlp.fc2.bias"]
    torch.save(ours, "DiT.pt")
    check(vgm("convert", "DiT.pt", "o.safetensors"), 1, "'dit'", "blocks.1.mlp.fc2.bias is missing")
    ours["x_embed.proj.weight"] = ours.pop("x_embedder.proj.weight")
    torch.save(ours, "DiT.pt")
    check(vgm("convert", "DiT.pt", "o.safetensors"), 2, "almost 'dit'", "missing", "vgm inspect")


def test_files_that_are_not_there_or_cut_off(dit: Path, vgm: Call) -> None:
    check(vgm("convert", "nowhere.pt", "o.safetensors"), 2, "nowhere.pt")
    Path("x.txt").write_text("hello")
    check(vgm("convert", "x.txt", "o.safetensors"), 2, "not a kind of file that holds weights")
    whole = dit.read_bytes()
    torch.save(state_of("dit")[0], "legacy.pt", _use_new_zipfile_serialization=False)
    old = Path("legacy.pt").read_bytes()
    save_file(state_of("dit")[0], "f.safetensors")
    safe = Path("f.safetensors").read_bytes()
    cuts = [("cut.pt", whole), ("cut.pth", old), ("cut.safetensors", safe), ("cut.pkl", pickle.dumps({"a": 1}))]
    for name, data in cuts:
        for n in (0, 3, len(data) // 2, len(data) - 5):
            Path(name).write_bytes(data[:n])
            code, _, err = vgm("convert", name, "o.safetensors")
            assert code == 1 and name in err and "Traceback" not in err, (name, n, err)
    torch.save([1, 2], "list.pt")
    check(vgm("convert", "list.pt", "o.safetensors"), 1, "no tensors")
    with zipfile.ZipFile("zip.pt", "w") as archive:
        archive.writestr("code/constants.pkl", b"")
    check(vgm("convert", "zip.pt", "o.safetensors"), 1, "not a file of torch.save's")
    assert not Path("o.safetensors").exists()


def test_nothing_is_overwritten_unasked(dit: Path, vgm: Call) -> None:
    Path("o.safetensors").write_text("mine")
    check(vgm("convert", dit, "o.safetensors"), 2, "o.safetensors exists", "--overwrite")
    assert Path("o.safetensors").read_text() == "mine"
    assert vgm("convert", dit, "o.safetensors", "--force")[0] == 0
    check(vgm("convert", "o.safetensors", "o.safetensors", "--force"), 2, "is the source itself")


@pytest.mark.parametrize("target", ["o.safetensors", "o.pt", "o.npz", "sharded.safetensors"])
def test_a_full_disk_leaves_what_was_there(target: str, dit: Path, vgm: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli import atomic

    old = Path("o.pt" if target.startswith("sharded") else target)
    old.write_text("old")
    made: list[Path] = []
    real = atomic.sync_folder

    def full(folder: Any) -> None:
        made.append(Path(folder))
        if len(made) > 1 or not target.startswith("sharded"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder)

    def replace_(a: Any, b: Any) -> None:
        full(Path(b).parent)
        os.rename(a, b)

    monkeypatch.setattr(atomic.os, "replace", replace_)
    to = ("--to", "dit") if not target.endswith(".safetensors") else ()
    small = ("--max-shard-size", "60KB") if target.startswith("sharded") else ()
    check(vgm("convert", dit, target, *to, *small, "--force"), 1, "no space left", target.split(".")[0])
    assert old.read_text() == "old"
    assert not [p for p in Path().iterdir() if p.suffix == ".tmp" or "-of-" in p.name or "index" in p.name]


def test_a_folder_that_cannot_be_written(dit: Path, vgm: Call) -> None:
    Path("file").write_text("")
    check(vgm("convert", dit, "file/o.safetensors"), 2, "cannot write", "file is no folder")


# -- the proof's own parts ---------------------------------------------------------------------------------------------


def test_distance() -> None:
    a = torch.tensor([1.0, -2.0, float("nan")])
    assert compare.distance(a, a.clone()) == 0.0
    assert compare.distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert compare.distance(torch.tensor([1.0]), torch.tensor([float("inf")])) == float("inf")
    assert compare.distance(torch.zeros(2), torch.zeros(3)) == float("inf")


# -- values that are none ----------------------------------------------------------------------------------------------


def test_all_finite() -> None:
    """A sum that overflows is no NaN; every type of float is looked at."""
    assert ckpt.all_finite(torch.full((8,), 60000.0, dtype=torch.float16))
    assert ckpt.all_finite(torch.full((8,), 3e38)) and ckpt.all_finite(torch.ones(3, dtype=torch.int64))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert ckpt.all_finite(torch.zeros(4).to(dtype))
        assert not ckpt.all_finite(torch.tensor([0.0, float("nan")]).to(dtype))
    assert not ckpt.all_finite(torch.tensor([float("inf"), float("-inf")]))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("verb", ["sample", "evaluate", "restore", "train"])
def test_weights_without_values_are_not_used(verb: str, value: str, vgm: Call) -> None:
    config = {**SMALL_DIT, "num_classes": 10}
    state = ours_of("dit", config, {"name": "denoiser", "path": {"name": "linear"}, "prediction": "velocity"})
    header = ckpt.read_tensors(Path("o.safetensors"))[1]
    state["blocks.1.mlp.fc2.bias"][3] = float(value)
    save_file(state, "o.safetensors", header)
    model = [f"model.{k}={v}" for k, v in SMALL_DIT.items() if k in ("patch_size", "hidden_size", "depth", "num_heads")]
    args = {
        "sample": ("sample", "o.safetensors", "-n", 1, "--out", "x.npz"),
        "evaluate": ("evaluate", "o.safetensors", "-n", 2, "--reference", "mnist5k", "--metrics", "kid"),
        "restore": ("restore", "--model", "o.safetensors", "--task", "inpainting", "--input", "mnist5k", "-n", 1),
        "train": ("train", "dit", "model.weights=o.safetensors", *model, "data.cache_latents=false", "--out", "r"),
    }[verb]
    check(vgm(*args), 1, "o.safetensors holds", "NaN" if value == "nan" else "infinite", "blocks.1.mlp.fc2.bias")
    assert not Path("x.npz").exists()


def test_weights_of_another_component_are_named(vgm: Call) -> None:
    ours_of("dit", SMALL_DIT)
    check(vgm("train", "adm-unet", "model.weights=o.safetensors", "--out", "r"), 2, "holds a dit, not an adm-unet")


def test_weights_without_values_are_told(vgm: Call) -> None:
    ours, _ = state_of("vae-pythae")
    ours["encoder.embedding.bias"][0] = float("nan")
    torch.save(ours, "x.pt")
    save_file(ours, "x.safetensors")
    said = f"1 of {len(ours)} tensors hold NaN or infinities"
    check(vgm("convert", "x.pt", "o.safetensors"), 0, said, "encoder.embedding.bias")
    check(vgm("convert", "x.pt", "p.safetensors", "--verify"), 3, said, "nothing was written")
    for file in ("x.pt", "x.safetensors", "o.safetensors"):
        assert facts_of(vgm, file)["non_finite"] == ["encoder.embedding.bias"]
        assert said in vgm("inspect", file)[1]


# -- files and folders as people have them -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.pth.tar", "x.th", "x", "x.PT", "x.model", "X.SAFETENSORS", "x.safetensors.part", "x.NPZ"]
)
def test_files_are_told_by_their_content(name: str, vgm: Call) -> None:
    ours, _ = state_of("vae-pythae")
    if "safetensors" in name.lower():
        save_file(ours, name)
    elif name.endswith("NPZ"):
        with open(name, "wb") as f:
            np.savez(f, **{k: v.numpy() for k, v in ours.items()})
    else:
        torch.save(ours, name)
    assert vgm("convert", name, "o.safetensors")[0] == 0
    assert same(load_file("o.safetensors"), ours)
    assert facts_of(vgm, name)["looks_like"][0]["converter"] == "vae-pythae"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.pt", b"garbage that is no file of weights", "neither an archive nor a pickle"),
        ("x.ckpt", b"<!DOCTYPE html><html>Please log in</html>", "is a web page"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        ("x.pkl", b"garbage", "not readable"),
        ("x.npz", b"PK\x03\x04garbage", "is damaged"),
        ("x.pt", b"", "is empty"),
    ],
)
def test_what_is_no_file_of_weights(name: str, content: bytes, words: str, vgm: Call) -> None:
    Path(name).write_bytes(content)
    for args in (("convert", name, "o.safetensors"), ("inspect", name)):
        check(vgm(*args), 1, name, words)


FOLDERS = {
    "variant": ["diffusion_pytorch_model.fp16.safetensors"],
    "variant in shards": ["diffusion_pytorch_model.safetensors.fp16.index.json"],
    "variant in shards, older names": ["diffusion_pytorch_model.safetensors.index.fp16.json"],
    "variant of another library": ["model.fp16.safetensors"],
    "bin": ["diffusion_pytorch_model.bin"],
    "variant bin": ["diffusion_pytorch_model.fp16.bin"],
    "both": ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
    "bin and safetensors": ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"],
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_variants(kind: str, vgm: Call) -> None:
    """The plain file where there is one, else the variant, whole or in shards."""
    ours, theirs = state_of("dit-diffusers")
    Path("t").mkdir()
    Path("t/config.json").write_text(json.dumps({"sample_size": 32, "num_attention_heads": 2}))
    for i, name in enumerate(FOLDERS[kind]):
        state = theirs if not i else {k: v * 0 for k, v in theirs.items()}  # the second is not taken
        if name.endswith(".json"):
            form = "m.fp16-{}-of-00002.safetensors" if "fp16.index" in name else "m-{}-of-00002.fp16.safetensors"
            files = [form.format(n) for n in ("00001", "00002")]
            halves = (list(state)[::2], list(state)[1::2])
            for file, names in zip(files, halves):
                save_file({k: state[k] for k in names}, f"t/{file}")
            where = {k: file for file, names in zip(files, halves) for k in names}
            Path("t", name).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        elif name.endswith(".bin"):
            torch.save(state, f"t/{name}")
        else:
            save_file(state, f"t/{name}")
    code, _, err = vgm("convert", "t", "o.safetensors", "--from", "dit-diffusers")
    assert code == 0 and ("several files" in err) == (len(FOLDERS[kind]) > 1), err
    assert same(load_file("o.safetensors"), ours)
    assert facts_of(vgm, "t")["looks_like"][0]["converter"] == "dit-diffusers"
    for shard in Path("t").glob("*-of-*"):
        assert facts_of(vgm, shard)["tensors"] == len(theirs)


def test_a_folder_with_one_file_and_its_configuration(vgm: Call) -> None:
    """As CompVis publishes first stages: config.yaml and model.ckpt."""
    ours, _ = state_of("autoencoder-kl")
    Path("kl-f8").mkdir()
    Path("kl-f8/config.yaml").write_text("model: {target: ldm.models.autoencoder.AutoencoderKL}")
    torch.save({"state_dict": ours}, "kl-f8/model.ckpt")
    assert vgm("convert", "kl-f8", "o.safetensors", "resolution=16")[0] == 0
    assert same(load_file("o.safetensors"), ours)


def test_the_first_stage_inside_a_diffusion_checkpoint(vgm: Call) -> None:
    """What is left out, unexpected and compared is counted by the first stage's own tensors."""
    ours, _ = state_of("autoencoder-kl")
    inside = {f"first_stage_model.{k}": v for k, v in ours.items()}
    rest = {"betas": torch.zeros(5), "model.diffusion_model.x.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": inside | rest}, "ldm.ckpt")
    code, out, err = vgm("convert", "ldm.ckpt", "o.safetensors", "resolution=16", "--verify", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["left_out"] == sorted(rest)
    checks = {c["what"]: c["outcome"] for c in result["verified"]}
    assert checks["autoencoder-kl -> ours -> autoencoder-kl"] == f"{len(ours)} tensors bit for bit"
    found = facts_of(vgm, "ldm.ckpt")
    assert sorted(found["fit"]["unexpected"]) == sorted(rest) and found["fit"]["missing"] == {}
    assert same(load_file("o.safetensors"), ours)


def test_older_names_are_compared_too(vgm: Call) -> None:
    _, theirs = state_of("autoencoder-kl-diffusers")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    torch.save({functools.reduce(lambda n, o: n.replace(*o), old.items(), k): v for k, v in theirs.items()}, "old.bin")
    code, out, err = vgm("convert", "old.bin", "o.safetensors", "--verify", "--json")
    assert code == 0, err
    result = json.loads(out)
    checks = {c["what"]: c["outcome"] for c in result["verified"]}
    assert result["left_out"] == [] and facts_of(vgm, "old.bin")["fit"]["unexpected"] == []
    name = "autoencoder-kl-diffusers"
    assert checks[f"{name} -> ours -> {name}"] == f"{len(theirs)} tensors bit for bit"


def test_a_proof_of_nothing_is_none(dit: Path, vgm: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import vgm_plugins.dit.checkpoints as checkpoints

    monkeypatch.setattr(checkpoints, "CONVERTER", replace(checkpoints.CONVERTER, files=Files(names=lambda names: {})))
    check(vgm("convert", dit, "o.safetensors", "num_heads=2", "--from", "dit", "--verify"), 3, "0 tensors")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("stylegan2", "synthesis.b16.conv0.resample_filter"),
        ("stylegan-rosinality", "generator.progression.3.conv1.2.weight_flip"),
        ("glow-rosinality", "blocks.1.flows.0.invconv.u_mask"),
        ("dit-diffusers", "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"),
    ],
)
def test_what_is_read_once_must_be_the_same_everywhere(name: str, tensor: str, vgm: Call) -> None:
    """Filters, masks and copies that ours does not keep are compared, also without --verify."""
    _, theirs = state_of(name)
    assert tensor in theirs
    theirs[tensor] = theirs[tensor] + 0.25
    torch.save(theirs, "x.pt")
    code, _, err = vgm("convert", "x.pt", "o.safetensors", *TINY[name][1], "--from", name)
    said = (
        f"{tensor} is not what the layout's other tensors say",
        "resample with different filters",
        "is another blur",
    )
    assert code in (1, 2) and any(s in err for s in said), err


# -- what no tensor tells ----------------------------------------------------------------------------------------------


def test_what_is_assumed_is_said(vgm: Call) -> None:
    ours, _ = state_of("dit")
    torch.save(ours, "DiT.pt")
    words = ("num_heads=1", "6 rows of the label table are 5 classes and a null class", "schedule=linear")
    check(vgm("convert", "DiT.pt", "o.safetensors"), 0, *words)
    err = vgm("convert", "DiT.pt", "o.safetensors", "num_heads=2", "schedule=linear", "--overwrite")[2]
    assert "num_heads" not in err and "schedule" not in err and "null class" in err
    code, _, err = vgm("convert", "DiT.pt", "o.safetensors", "num_classes=6", "class_dropout_prob=0", "--overwrite")
    assert code == 0 and "null class" not in err
    assert ckpt.read_header(Path("o.safetensors")).component["kwargs"]["num_classes"] == 6
    torch.save({"state_dict": state_of("autoencoder-kl")[0]}, "kl.ckpt")
    check(vgm("convert", "kl.ckpt", "kl.safetensors"), 0, "scale_factor=1.0")
    assert "scale_factor" not in vgm("convert", "kl.ckpt", "kl2.safetensors", "scale_factor=0.13025")[2]


def test_how_a_network_was_trained_and_its_codec_can_be_told(vgm: Call) -> None:
    """Official weights of a small network come back as it was: the words are those that writing them names."""
    config = {**SMALL_DIT, "hidden_size": 128, "num_heads": 4}
    view = {"name": "denoiser", "path": {"name": "vp-discrete", "schedule": "cosine", "steps": 1000}, "time": "index"}
    view |= {"prediction": "eps", "learned_sigma": True, "variance": "learned_range"}
    state = ours_of("dit", config, view)
    recipe = {"paper": "dit", "guidance_scale": 2.0, "sampler": {"name": "ddpm", "steps": 50, "clip_denoised": 3.0}}
    header = ckpt.Header({"kind": "model", "name": "dit", "kwargs": config}, view=view, recipe=recipe)
    save_file(state, "o.safetensors", header.metadata())
    code, _, err = vgm("convert", "o.safetensors", "dit.pt")
    words = ("num_heads=4", "schedule=cosine", "sampler.steps=50", "sampler.clip_denoised=3.0")
    words += ("sampler.cfg_channels=null", "guidance_scale=2.0")
    assert code == 0 and all(word in err for word in words), err
    args = (*words, "codec=mnist-codec", "--from", "dit")
    code, _, err = vgm("convert", "dit.pt", "again.safetensors", *args)
    assert code == 0 and "its samples are latents" not in err
    header = ckpt.read_header(Path("again.safetensors"))
    assert header.view == view and header.recipe == recipe and header.parts["codec"].asset == "mnist-codec"
    assert (header.data["image_size"], header.data["image_channels"]) == (28, 1)
    assert vgm("sample", "again.safetensors", "-n", 1, "--steps", 2, "--out", "x.png")[0] == 0
    check(vgm("convert", "dit.pt", "x.safetensors", "--from", "dit", "schedule=cosin"), 2, "cosin")
    check(vgm("convert", "dit.pt", "x.safetensors", "--from", "dit", "shedule=cosine"), 2, "unknown key", "schedule")
    check(vgm("convert", "dit.pt", "x.safetensors", "--from", "dit", "sampler.stesp=5"), 2, "stesp")


# -- a broken end ------------------------------------------------------------------------------------------------------


def opened(*names: str) -> dict[str, Tensor] | None:
    """The tensors under the first name that is there."""
    for name in names:
        if Path(name).exists():
            return next(iter(weight_files.read(Path(name)).entries.values()))
    return None


@pytest.mark.parametrize("before", ["shards", "fewer shards", "one file"])
@pytest.mark.parametrize("after", ["shards", "one file"])
@pytest.mark.parametrize("signal", [KeyboardInterrupt, OSError])
def test_old_or_new_at_every_step(
    before: str, after: str, signal: type[BaseException], vgm: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever operation on files is the last: the old set opens, or the new one, and never a mixture."""
    old = state_of("dit")[0]
    new = {k: v + 1 for k, v in old.items()}
    sizes = {"shards": 60_000, "fewer shards": 120_000, "one file": 10**9}
    real = {name: getattr(os, name) for name in ("replace", "unlink")}

    def act(name: str, calls: list[str], last: int, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) > last:
            raise signal(errno.ENOSPC, "No space left on device")
        return real[name](*args, **kwargs)

    for last in range(40):
        for p in Path().iterdir():
            p.unlink()
        weight_files.write(Path("x.safetensors"), old, {}, limit=sizes[before])
        calls: list[str] = []
        for name in real:
            monkeypatch.setattr(os, name, functools.partial(act, name, calls, last))
        ended = False
        try:
            files = weight_files.write(Path("x.safetensors"), new, {}, limit=sizes[after])
            weight_files.remove_older(Path("x.safetensors"), files)
            ended = len(calls) <= last
        except (VgmError, signal):
            pass
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        for found in (opened("x.safetensors"), opened("x.safetensors.index.json")):
            assert found is None or same(found, old) or same(found, new)
        assert opened("x.safetensors", "x.safetensors.index.json") is not None
        if ended:
            break
    assert ended and last > 0
    assert same(opened("x.safetensors", "x.safetensors.index.json") or {}, new)
    assert {p.name for p in Path().iterdir()} == {f.name for f in files}


def test_a_folder_is_exchanged_as_a_whole(vgm: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    ours_of("dit", {**DIT, "input_size": 32, "patch_size": 8})
    args = ("convert", "o.safetensors", "folder", "--to", "dit-diffusers")
    assert vgm(*args)[0] == 0
    check(vgm(*args), 2, "folder exists", "--overwrite")
    Path("folder/config.json").write_text("{}")
    assert vgm(*args, "--overwrite", "--max-shard-size", "60KB")[0] == 0
    names = {p.name for p in Path("folder").iterdir()}
    assert (
        "diffusion_pytorch_model.safetensors" not in names and "diffusion_pytorch_model.safetensors.index.json" in names
    )
    assert json.loads(Path("folder/config.json").read_text())["sample_size"] == 32
    before = {p.name: p.read_bytes() for p in Path("folder").iterdir()}
    monkeypatch.setattr(atomic, "exchange", lambda a, b: 1 / 0)
    assert vgm(*args, "--overwrite")[0] == 1
    assert {p.name: p.read_bytes() for p in Path("folder").iterdir()} == before
    assert not list(Path().glob(".folder*"))
    monkeypatch.undo()


def test_a_folder_with_other_files_is_not_replaced(vgm: Call) -> None:
    ours_of("dit", {**DIT, "input_size": 32, "patch_size": 8})
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("mine")
    args = ("convert", "o.safetensors", "folder", "--to", "dit-diffusers", "--overwrite")
    check(vgm(*args), 2, "holds more than a network", "notes.txt")
    assert Path("folder/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["x.pt", "x.npz", "x.safetensors"])
def test_the_system_says_why_a_file_cannot_be_written(name: str) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(VgmError, match="File too large"):
            weight_files.write(Path(name), {"a": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path().iterdir())
