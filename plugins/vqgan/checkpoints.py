"""VQGAN weights: CompVis's first stages, whose names are ours, and its priors inside Net2Net checkpoints.

Official files (CompVis/taming-transformers@3ba01b2): Lightning pickles with "state_dict"; vgm_cli.convert_api.unwrap.
First stages: encoder.*, decoder.*, quantize.*, quant_conv.*, post_quant_conv.*, and loss.*, which is left out; inside a
Net2Net file they lie below first_stage_model. Priors: transformer.*, with a stored causal mask per block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError

State = Mapping[str, Tensor]
INSIDE = "first_stage_model."
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.", "latent_mean", "latent_std")

# -- first stage -------------------------------------------------------------------------------------------------------


def bare(names: Iterable[str]) -> dict[str, str]:
    """{our name: name in the file} of the first stage's tensors."""
    names = list(names)
    prefix = INSIDE if any(n.startswith(INSIDE) for n in names) else ""
    return {n.removeprefix(prefix): n for n in names if n.startswith(tuple(prefix + p for p in PARTS))}


def recognise(names: Iterable[str]) -> bool:
    """A quantised CompVis first stage, bare, or inside a Net2Net file; those inside diffusion models are LDM's."""
    names = list(names)
    own = bare(names)
    common = {"encoder.mid.block_1.conv1.weight", "decoder.up.0.block.0.conv1.weight", "post_quant_conv.weight"}
    quantised = {"quantize.embedding.weight", "quantize.embed.weight"} & own.keys()
    return common <= own.keys() and bool(quantised) and not any(n.startswith("model.diffusion_model.") for n in names)


def to_ours(state: State) -> dict[str, Tensor]:
    """CompVis -> ours. KeyError when a half is missing."""
    own = {ours: state[theirs] for ours, theirs in bare(state).items()}
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.weight"):
        if name not in own:
            raise KeyError(name)
    return own


def highest(names: Iterable[str], pattern: str) -> int:
    return max(int(m[1]) for n in names if (m := re.match(pattern, n)))


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes; resolution 256, as published, is assumed to place attention. VgmError:
    codes of less than 16 dimensions, which is how LDM's VQ autoencoders differ from these."""
    own = to_ours(state)
    if own["post_quant_conv.weight"].shape[1] < 16:
        raise VgmError("codes of so few dimensions are latent diffusion's", "--from vq-autoencoder", USAGE)
    ch, in_channels = own["encoder.conv_in.weight"].shape[:2]
    levels = 1 + highest(own, r"encoder\.down\.(\d+)\.")
    blocks = 1 + highest(own, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [own[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"].shape[0] for i in range(levels)]
    attended = [i for i in range(levels) if any(n.startswith(f"encoder.down.{i}.attn.") for n in own)]
    gumbel = "quantize.embed.weight" in own
    codebook = own["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    config: dict[str, Any] = {
        "n_embed": codebook.shape[0],
        "ch": ch,
        "ch_mult": tuple(w // ch for w in widths),
        "num_res_blocks": blocks,
        "attn_resolutions": tuple(256 // 2**i for i in attended),
        "resolution": 256,
        "z_channels": own["decoder.conv_in.weight"].shape[1],
        "embed_dim": codebook.shape[1],
        "in_channels": in_channels,
        "out_ch": own["decoder.conv_out.weight"].shape[0],
    }
    if gumbel:
        config |= {"quantizer": "gumbel", "kl_weight": 1e-8}
    elif "quantize.embedding.embed_avg" in own:
        config["quantizer"] = "ema"
    if "encoder.mid.attn_1.q.weight" not in own:
        config["attn_type"] = "none"
    if ch % 32:  # no published model: the largest group count that divides
        config["norm_groups"] = next(g for g in (16, 8, 4, 2, 1) if ch % g == 0)
    return config


CONVERTER = Layout(
    name="vqgan",
    component="vqgan",
    kind="codec",
    recognise=recognise,
    to_ours=to_ours,
    from_ours=dict,
    config=config_from,
    summary="CompVis VQGAN first stages, also inside Net2Net checkpoints (first_stage_model.*)",
    files=Files(wrapper="state_dict", names=bare),
)

# -- prior -------------------------------------------------------------------------------------------------------------

BODY = "transformer."
MASK = re.compile(r"blocks\.\d+\.attn\.mask")
HEADS = {(1536, 48): 24}  # 16 in the other published ones of this kind, which 64 channels each do not give
PUBLISHED = {1024: 16, 1408: 16, 1536: 16}


def body(state: State) -> dict[str, Tensor]:
    """The GPT's tensors without the prefix of a Net2Net file."""
    return {ours: state[theirs] for ours, theirs in body_pairs(state).items()}


def body_pairs(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    prefix = BODY if any(k.startswith(BODY) for k in names) else ""
    return {k.removeprefix(prefix): k for k in names if k.startswith(prefix)}


def prior_assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells of a prior."""
    what = "coordinates" if config.get("condition") == "coord" else "one of 1000 classes"
    found = {"condition": f"condition={config.get('condition')}: {what} before the codes, on a grid of 16x16"}
    width = config["n_embd"]
    if width not in PUBLISHED:
        found["n_head"] = f"n_head={config['n_head']}, heads of 64 channels (n_head=N tells otherwise)"
    return found


def prior_recognise(names: Iterable[str]) -> bool:
    names = {n.removeprefix(BODY) for n in names}
    return {"tok_emb.weight", "pos_emb", "blocks.0.attn.query.weight", "blocks.0.mlp.2.weight", "head.weight"} <= names


def prior_to_ours(state: State) -> dict[str, Tensor]:
    """CompVis -> ours: without the stored masks. KeyError when a tensor is missing."""
    own = {k: v for k, v in body(state).items() if not MASK.fullmatch(k)}
    for name in ("tok_emb.weight", "pos_emb", "ln_f.weight", "head.weight"):
        if name not in own:
            raise KeyError(name)
    return own


def prior_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> CompVis's GPT, causal masks included (a checkpoint does not say n_unmasked: none)."""
    size = state["pos_emb"].shape[1]
    mask = torch.ones(size, size).tril().view(1, 1, size, size)
    layers = 1 + highest(state, r"blocks\.(\d+)\.")
    return {**state, **{f"blocks.{i}.attn.mask": mask.clone() for i in range(layers)}}


def prior_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes. What precedes the codes is in no shape: at least two grids of 16x16 is
    taken for coordinates, less for ImageNet's classes; override where it is otherwise."""
    own = body(state)
    vocab, width = own["tok_emb.weight"].shape
    layers = 1 + highest(own, r"blocks\.(\d+)\.")
    block = own["pos_emb"].shape[1]
    heads = HEADS.get((width, layers)) or PUBLISHED.get(width) or max(1, width // 64)
    config: dict[str, Any] = {
        "vocab_size": vocab,
        "grid": (16, 16),
        "block_size": block,
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        **(
            {"condition": "coord", "window": 16, "n_coord": vocab, "coord_factor": 16}
            if block >= 512
            else {"condition": "class", "num_classes": 1000}
        ),
    }
    mask = own.get("blocks.0.attn.mask")
    if mask is not None and (unmasked := int(mask[0, 0, 0].sum())) > 1:
        config["n_unmasked"] = unmasked
    return config


def prior_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a released prior is sampled from: k = 250, as for the published FID."""
    grid = list(config["grid"])
    return {
        "recipe": {"paper": "vqgan", "sampler": {"name": "vqgan-prior", "top_k": 250}},
        "data": {
            "sample_shape": grid,
            "grid": grid,
            "vocab_size": config["vocab_size"],
            "num_classes": config.get("num_classes", 0),
            "image_size": 16 * grid[0],
            "image_channels": 3,
        },
    }


PRIOR_CONVERTER = Layout(
    name="vqgan-prior",
    component="vqgan-prior",
    recognise=prior_recognise,
    to_ours=prior_to_ours,
    from_ours=prior_from_ours,
    config=prior_config,
    summary="CompVis Net2Net priors (transformer.*), their GPT",
    files=Files(wrapper="state_dict", names=body_pairs, unused=(MASK.pattern,)),
    published=Published(header=prior_header, assumes=prior_assumes),
)
