"""NCSN++ of 256 and 1024 pixels in the layout of diffusers' UNet2DModel, with its config.json: google/ncsnpp-*.

diffusers (0.35) can express the networks with a pyramid of images on both sides (its Skip blocks) that are told sigma
and divide by it; not those of 32 and 64 pixels, DDPM++ or DDPM, whose blocks it does not have. It keeps no ladder of
noise levels: config.json's sigma_min, sigma_max and num_scales, which diffusers ignores, tell those that are not 0.01
to 348 (of 1024 pixels 1348) in 2000 steps.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgm_cli.convert_api import Diffusers, Files, Layout, Proof, Published
from vgm_cli.errors import USAGE, VgmError, needs_extra
from vgm_cli.nets.ncsnpp import NCSNpp, noise_levels
from vgm_cli.nets.ncsnpp_checkpoints import config_from
from vgm_cli.nets.unet_checkpoints import KINDS, indices
from vgm_cli.nn.meta import on_meta

from .checkpoints import State, header_of

RES = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "time_emb_proj", "GroupNorm_1": "norm2", "Conv_1": "conv2",
       "Conv_2": "conv_shortcut"}  # fmt: skip
NINS = {"NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17
FOURIER = ("time_proj.weight", "time_proj.W")  # one parameter, which older files hold under both names


class Ladder(NamedTuple):
    """Noise levels from the lowest to the highest, and how many."""

    sigma_min: float = 0.01
    sigma_max: float = 348.0
    num_scales: int = 2000


def ladder_of(json: Mapping[str, Any]) -> Ladder:
    """Of a config.json, or of keywords in its place."""
    usual = Ladder(sigma_max=1348.0) if json.get("sample_size") == 1024 else Ladder()
    return Ladder(**{name: json.get(name, value) for name, value in usual._asdict().items()})


def told(ladder: Ladder) -> str:
    return f"{ladder.sigma_min:g} to {ladder.sigma_max:g} in {ladder.num_scales} steps"


# -- names -------------------------------------------------------------------------------------------------------------


def layers(levels: int, depth: int, attention: Iterable[int]) -> Iterator[tuple[str, str]]:
    """(theirs, "res" | "attn" | "combine" | "plain") of every layer of ours behind the first convolution, in order.
    attention: the levels that have it."""
    attention = set(attention)
    for i in range(levels):
        block = f"down_blocks.{i}"
        for j in range(depth):
            yield f"{block}.resnets.{j}", "res"
            if i in attention:
                yield f"{block}.attentions.{j}", "attn"
        if i < levels - 1:
            yield f"{block}.resnet_down", "res"
            yield f"{block}.skip_conv", "combine"
    yield "mid_block.resnets.0", "res"
    yield "mid_block.attentions.0", "attn"
    yield "mid_block.resnets.1", "res"
    for i in range(levels):
        block = f"up_blocks.{i}"
        for j in range(depth + 1):
            yield f"{block}.resnets.{j}", "res"
        if levels - 1 - i in attention:
            yield f"{block}.attentions.0", "attn"
        if i < levels - 1:
            yield f"{block}.skip_norm", "plain"
            yield f"{block}.skip_conv", "plain"
            yield f"{block}.resnet_up", "res"
    yield "conv_norm_out", "plain"
    yield "conv_out", "plain"


def pairs(levels: int, depth: int, attention: Iterable[int]) -> Iterator[tuple[str, str, bool]]:
    """(ours, theirs, whether it is a matrix that lies the other way round) of every tensor that there may be."""
    yield "all_modules.0.W", FOURIER[0], False
    first = ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in")
    walk = [*((name, "plain") for name in first), *layers(levels, depth, attention)]
    for index, (theirs, kind) in enumerate(walk, 1):
        ours = f"all_modules.{index}"
        for part in KINDS:
            if kind == "plain":
                yield f"{ours}.{part}", f"{theirs}.{part}", False
            elif kind == "combine":
                yield f"{ours}.Conv_0.{part}", f"{theirs}.{part}", False
            elif kind == "res":
                for a, b in RES.items():
                    yield f"{ours}.{a}.{part}", f"{theirs}.{b}.{part}", False
            else:
                yield f"{ours}.GroupNorm_0.{part}", f"{theirs}.group_norm.{part}", False
                for a, b in NINS.items():
                    yield f"{ours}.{a}.{'W' if part == 'weight' else 'b'}", f"{theirs}.{b}.{part}", part == "weight"


def modern(name: str) -> str:
    if m := re.fullmatch(r"(.+\.attentions\.\d+\.)(query|key|value|proj_attn)(\..+)", name):
        return f"{m[1]}{OLD[m[2]]}{m[3]}"
    return name


def file_names(names: Iterable[str]) -> dict[str, str]:
    """{present name: name in the file}."""
    names = set(names)
    found = {modern(name): name for name in sorted(names) if name not in FOURIER}
    fourier = [name for name in FOURIER if name in names]
    return found | ({FOURIER[0]: fourier[0]} if fourier else {})


def recognise(names: Iterable[str]) -> bool:
    names = set(names)
    ends = {"conv_norm_out.weight", "down_blocks.0.skip_conv.weight", "up_blocks.0.skip_norm.weight"}
    return ends | {"down_blocks.0.resnet_down.conv1.weight"} <= names and not names.isdisjoint(FOURIER)


# -- tensors -----------------------------------------------------------------------------------------------------------


def to_ours(state: State, ladder: Ladder) -> dict[str, Tensor]:
    """diffusers -> ours. KeyError: a tensor is missing."""
    state = {ours: state[theirs] for ours, theirs in file_names(state).items()}
    levels, depth = len(indices(state, "down_blocks.")), len(indices(state, "down_blocks.0.resnets."))
    attention = [i for i in range(levels) if f"down_blocks.{i}.attentions.0.to_q.weight" in state]
    ours = {"sigmas": noise_levels(*ladder)}
    for a, b, turned in pairs(levels, depth, attention):
        if ".conv_shortcut." in b and b not in state:
            continue  # of blocks that keep their width; others are missed when the network is filled
        ours[a] = state[b].T.contiguous() if turned else state[b]
    return ours


def from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> diffusers. VgmError: it cannot express this network. KeyError: a tensor is missing."""
    config = config_from(state)
    if config["progressive"] != "output_skip" or config["embedding_type"] != "fourier":
        raise cannot("it has neither a pyramid of images nor is it told sigma")
    sides = [config["image_size"] // 2**i for i in range(len(config["ch_mult"]))]
    attention = [i for i, side in enumerate(sides) if side in config["attn_resolutions"]]
    theirs = {}
    for a, b, turned in pairs(len(sides), config["num_res_blocks"], attention):
        if ".conv_shortcut." in b and a not in state:
            continue
        theirs[b] = state[a].T.contiguous() if turned else state[a]
    return theirs


def keywords(state: State, ladder: Ladder) -> dict[str, Any]:
    """Constructor keywords. The published networks see images in [0, 1]."""
    return {**config_from(to_ours(state, ladder)), "centered": False, **ladder._asdict()}


# -- networks ----------------------------------------------------------------------------------------------------------


def full(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's keywords, those that are left out included."""
    parameters = inspect.signature(NCSNpp).parameters.items()
    return {**{name: p.default for name, p in parameters}, **config}


def cannot(why: str) -> VgmError:
    hint = "it has NCSN++ of 256 and 1024 pixels: vgm ls model/ncsnpp; --to score-sde holds all"
    return VgmError(f"diffusers' UNet2DModel cannot express this network: {why}", hint, USAGE)


WANTED = {"resblock_type": "biggan", "fir": True, "fir_kernel": (1, 3, 3, 1), "skip_rescale": True,
          "progressive": "output_skip", "progressive_input": "input_skip", "progressive_combine": "sum",
          "embedding_type": "fourier", "scale_by_sigma": True, "conditional": True, "nonlinearity": "swish",
          "patch_size": 1, "in_channels": 3, "num_classes": 0}  # fmt: skip


def allows(config: Mapping[str, Any], ladder: Ladder) -> None:
    """VgmError: not in this architecture; the layout's noise levels are others."""
    config = full(config)
    own = {**config, "fir_kernel": tuple(config["fir_kernel"]), "num_classes": config["num_classes"] or 0}
    for name, value in WANTED.items():
        if own[name] != value:
            raise cannot(f"{name} is {own[name]}, not {value}")
    sides = [config["image_size"] // 2**i for i in range(len(config["ch_mult"]))]
    narrow = [m * config["nf"] for m, side in zip(config["ch_mult"], sides) if side in config["attn_resolutions"]]
    if narrow and min(narrow) < 128:
        raise cannot(f"its attention is normalised in 32 groups, which {min(narrow)} channels are too few for")
    with on_meta():
        network = NCSNpp(**config)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    if odd := next((m for m in norms if m.num_groups != min(m.num_channels // 4, 32)), None):
        raise cannot(f"{odd.num_channels} channels are normalised in {odd.num_groups} groups")
    levels = Ladder(*(config[name] for name in Ladder._fields))
    if levels != ladder:
        raise VgmError(
            f"this layout is read with noise levels of {told(ladder)}, the network has {told(levels)}",
            "a folder, with its config.json, holds any",
            USAGE,
        )


def config_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor keywords -> config.json of diffusers' UNet2DModel."""
    config = full(config)
    side, depth = config["image_size"], len(config["ch_mult"])
    attends = [side // 2**i in config["attn_resolutions"] for i in range(depth)]
    usual = ladder_of({"sample_size": side})._asdict()
    return {
        "_class_name": "UNet2DModel",
        "sample_size": side,
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "center_input_sample": not config["centered"],
        "time_embedding_type": "fourier",
        "down_block_types": ["AttnSkipDownBlock2D" if a else "SkipDownBlock2D" for a in attends],
        "up_block_types": ["AttnSkipUpBlock2D" if a else "SkipUpBlock2D" for a in reversed(attends)],
        "block_out_channels": [config["nf"] * m for m in config["ch_mult"]],
        "layers_per_block": config["num_res_blocks"],
        "mid_block_scale_factor": math.sqrt(2),
        "dropout": config["dropout"],
        "act_fn": "silu",
        "attention_head_dim": None,
        "norm_num_groups": None,
        "norm_eps": 1e-6,
        **{name: config[name] for name, value in usual.items() if config[name] != value},
    }


def from_json(json: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor keywords that config.json tells and shapes do not."""
    said: dict[str, Any] = {"centered": not json.get("center_input_sample", False)}
    if "dropout" in json:
        said["dropout"] = json["dropout"]
    if side := json.get("sample_size"):
        kinds = enumerate(json.get("down_block_types", ()))
        said |= {"image_size": side, "attn_resolutions": [side // 2**i for i, kind in kinds if kind.startswith("Attn")]}
    return said


def reference(state: State, config: Mapping[str, Any]) -> Tensor:
    """One evaluation by diffusers' own UNet2DModel. VgmError: not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError as e:
        raise needs_extra("this proof", "diffusers", "hf") from e
    json = {k: v for k, v in config_json(config).items() if k not in Ladder._fields}
    network = UNet2DModel.from_config(json).eval()
    network.load_state_dict({modern(k): v.float() for k, v in state.items() if k != FOURIER[1]})
    given = NCSNpp.example(full(config))
    with torch.no_grad():
        return network(given["x"], given["t"]).sample  # type: ignore[no-any-return]


def assumes(state: State, config: Mapping[str, Any], ladder: Ladder) -> dict[str, str]:
    text = (
        f"sigma_max={ladder.sigma_max:g} (348: CelebA-HQ and FFHQ 256; 378 LSUN bedrooms, 380 churches, 1348 FFHQ 1024)"
    )
    return {"sigma_max": text}


def layout(ladder: Ladder) -> Layout:
    def adapt(_: Layout, json: Mapping[str, Any]) -> Layout:
        return layout(ladder_of(json))

    return Layout(
        name="score-sde-diffusers",
        component="ncsnpp",
        summary="diffusers UNet2DModel with Skip blocks: google/ncsnpp-*",
        recognise=recognise,
        to_ours=lambda state: to_ours(state, ladder),
        from_ours=from_ours,
        config=lambda state: keywords(state, ladder),
        allows=lambda config: allows(config, ladder),
        files=Files(names=file_names, unused=(r"time_proj\.W",)),
        published=Published(
            header=lambda config: header_of("ve", True)(full(config)),
            assumes=lambda state, config: assumes(state, config, ladder),
        ),
        diffusers=Diffusers(config_json=config_json, from_json=from_json, adapt=adapt, words=Ladder._fields),
        proof=Proof(reference=reference),
    )


DIFFUSERS = layout(Ladder())
