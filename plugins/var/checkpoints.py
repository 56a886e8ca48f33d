"""VAR weights: the official transformers and the official tokenizer.

Official files (FoundationVision/VAR@78b9539): var_d16.pth to var_d36.pth and vae_ch160v4096z32.pth are bare states; a
training checkpoint has them as trainer.var_wo_ddp and trainer.vae_local. A transformer's file also holds its mask and
its keys' biases, all zero. The tokenizer's attentions have one convolution for queries, keys and values, ours three.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError

from .presets import LADDERS, drop_path_of, squares

State = Mapping[str, Tensor]

# -- the transformer ---------------------------------------------------------------------------------------------------

UNUSED = (r"^attn_bias_for_masking$", r"^blocks\.\d+\.attn\.zero_k_bias$")
IMPLIED = re.compile("|".join(UNUSED))
BLOCK = ("attn.mat_qkv.weight", "attn.q_bias", "attn.v_bias", "attn.proj.weight", "attn.proj.bias",
         "ffn.fc1.weight", "ffn.fc1.bias", "ffn.fc2.weight", "ffn.fc2.bias")  # fmt: skip
ENDS = ("word_embed.weight", "word_embed.bias", "class_emb.weight", "pos_start", "pos_1LC", "lvl_embed.weight",
        "lvl_1L", "head_nm.ada_lin.1.weight", "head_nm.ada_lin.1.bias", "head.weight", "head.bias")  # fmt: skip


def recognise(names: Iterable[str]) -> bool:
    return {"pos_1LC", "pos_start", "lvl_embed.weight", "lvl_1L", "blocks.0.attn.mat_qkv.weight"} <= set(names)


def layers_of(state: Iterable[str]) -> int:
    return 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))


def to_ours(state: State) -> dict[str, Tensor]:
    """Official names are ours; the mask and the keys' biases are left out. KeyError: a tensor is missing."""
    shared = "shared_ada_lin.1.weight" in state
    own = BLOCK + (("ada_gss",) if shared else ("ada_lin.1.weight", "ada_lin.1.bias"))
    ends = ENDS + (("shared_ada_lin.1.bias",) if shared else ())
    for name in (*ends, *(f"blocks.{i}.{part}" for i in range(layers_of(state)) for part in own)):
        if name not in state:
            raise KeyError(name)
    return {k: v for k, v in state.items() if not IMPLIED.search(k)}


def from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> official, the mask and biases made anew."""
    levels = state["lvl_1L"]  # (1, L)
    mask = torch.where(levels[..., None] >= levels[:, None], 0.0, -torch.inf)[None]
    bias = torch.zeros_like(state["pos_1LC"][0, 0])
    return {**state, "attn_bias_for_masking": mask,
            **{f"blocks.{i}.attn.zero_k_bias": bias.clone() for i in range(layers_of(state))}}  # fmt: skip


def scales_of(levels: Tensor) -> tuple[tuple[int, int], ...]:
    """The grids, squares, from the scale of every position (1, L). ValueError: they are no squares."""
    if levels.is_meta:  # shapes alone: one of the published sets
        found = next((sides for sides in LADDERS.values() if sum(p * p for p in sides) == levels.shape[1]), None)
        if found is None:
            raise ValueError(f"{levels.shape[1]} positions")
        return squares(found)
    sizes = levels.flatten().bincount().tolist()
    sides = [math.isqrt(n) for n in sizes]
    if any(side * side != n for side, n in zip(sides, sizes)):
        raise ValueError(f"grids of {sizes} positions")
    return squares(tuple(sides))


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes; drop path follows the published rule."""
    depth, width = layers_of(state), state["pos_1LC"].shape[2]
    sharpness = state.get("blocks.0.attn.scale_mul_1H11")
    return {
        "scales": scales_of(state["lvl_1L"]),
        "vocab_size": state["head.weight"].shape[0],
        "channels": state["word_embed.weight"].shape[1],
        "num_classes": state["class_emb.weight"].shape[0] - 1,
        "depth": depth,
        "embed_dim": width,
        "num_heads": depth if sharpness is None else sharpness.shape[1],
        "mlp_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        "drop_path": drop_path_of(depth),
        "shared_aln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": sharpness is not None,
    }


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a released model is sampled from: with the settings of its published FID."""
    scales = config["scales"]
    return {
        "recipe": {
            "paper": "var",
            "sampler": {"name": "var", "top_k": 900, "top_p": 0.96},
            "guidance_scale": 2.5,
            "conditions": {"class": {}},
        },
        "data": {
            "sample_shape": [sum(h * w for h, w in scales)],
            "grid": [sum(h * w for h, w in scales)],
            "scales": [list(scale) for scale in scales],
            "vocab_size": config["vocab_size"],
            "num_classes": config["num_classes"],
            "image_size": 16 * scales[-1][0],
            "image_channels": 3,
        },
    }


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    found = {"drop_path": f"drop_path={config['drop_path']:g}, the published rule (it matters for training alone)"}
    if not config["attn_l2_norm"]:
        found["num_heads"] = f"num_heads={config['num_heads']}, one for each block (num_heads=N tells otherwise)"
    return found


CONVERTER = Layout(
    name="var",
    component="var",
    recognise=recognise,
    to_ours=to_ours,
    from_ours=from_ours,
    config=config_from,
    summary="official transformers (var_d16.pth to var_d36.pth, trainer.var_wo_ddp of ar-ckpt-*.pth)",
    files=Files(unused=UNUSED),
    published=Published(header=header, assumes=assumes),
)

# -- the tokenizer -----------------------------------------------------------------------------------------------------

HITS = "quantize.ema_vocab_hit_SV"
FUSED = re.compile(r"(.+\.attn(?:_1|\.\d+))\.qkv\.(weight|bias)")
APART = re.compile(r"(.+\.attn(?:_1|\.\d+))\.q\.(weight|bias)")


def tokenizer_recognise(names: Iterable[str]) -> bool:
    return {HITS, "quantize.embedding.weight", "encoder.mid.attn_1.qkv.weight", "post_quant_conv.weight"} <= set(names)


def tokenizer_to_ours(state: State) -> dict[str, Tensor]:
    """Queries, keys and values apart; all other names are ours. KeyError: a half is missing."""
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.weight"):
        if name not in state:
            raise KeyError(name)
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if m := FUSED.fullmatch(name):
            ours |= {f"{m[1]}.{part}.{m[2]}": t.clone() for part, t in zip("qkv", tensor.chunk(3))}
        else:
            ours[name] = tensor
    return ours


def tokenizer_from_ours(state: State) -> dict[str, Tensor]:
    theirs = {k: v for k, v in state.items() if not re.search(r"\.attn(_1|\.\d+)\.[qkv]\.", k)}
    for name in state:
        if m := APART.fullmatch(name):
            theirs[f"{m[1]}.qkv.{m[2]}"] = torch.cat([state[f"{m[1]}.{part}.{m[2]}"] for part in "qkv"])
    return theirs


def numbered(names: Iterable[str], pattern: str) -> int:
    """How many numbers 0, 1, ... a pattern's group takes."""
    return 1 + max((int(m[1]) for n in names if (m := re.match(pattern, n))), default=-1)


def tokenizer_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes. The sides of the grids are in none: the published ones of 256-pixel
    images where there are ten, else one after the other."""
    ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = numbered(state, r"encoder\.down\.(\d+)\.")
    blocks = numbered(state, r"encoder\.down\.0\.block\.(\d+)\.")
    n_embed, dim = state["quantize.embedding.weight"].shape
    scales = state[HITS].shape[0]
    if "quantize.quant_resi.qresi.weight" in state:
        phis = 1
    else:
        phis = numbered(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")  # 0: one for each scale
    plain = not any(n.startswith("quantize.quant_resi.") for n in state)
    return {
        "n_embed": n_embed,
        "embed_dim": dim,
        "patch_nums": LADDERS[16] if scales == len(LADDERS[16]) else tuple(range(1, scales + 1)),
        "ch": ch,
        "ch_mult": tuple(
            state[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"].shape[0] // ch for i in range(levels)
        ),
        "num_res_blocks": blocks,
        "in_channels": in_channels,
        "share_quant_resi": phis,
        **({"quant_resi": 0.0} if plain else {}),
    }


def tokenizer_allows(config: Mapping[str, Any]) -> None:
    """VgmError: a network without the official one's attention."""
    if (kind := config.get("attn_type", "vanilla")) != "vanilla":
        raise VgmError(f"attn_type={kind} has no file of this layout", "it holds attn_type=vanilla only", USAGE)


def tokenizer_assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    sides = ",".join(map(str, config["patch_nums"]))
    return {
        "patch_nums": f"patch_nums=[{sides}] (512 pixels: patch_nums=[{','.join(map(str, LADDERS[32]))}])",
        "quant_resi": "quant_resi=0.5, the share of phi's convolution, and using_znorm=false",
    }


TOKENIZER_CONVERTER = Layout(
    name="var-tokenizer",
    component="var-tokenizer",
    kind="codec",
    recognise=tokenizer_recognise,
    to_ours=tokenizer_to_ours,
    from_ours=tokenizer_from_ours,
    config=tokenizer_config,
    allows=tokenizer_allows,
    summary="the official tokenizer (vae_ch160v4096z32.pth, trainer.vae_local of ar-ckpt-*.pth)",
    published=Published(assumes=tokenizer_assumes),
)
