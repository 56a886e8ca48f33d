"""Weights of first stages in the CompVis layout, whose names are ours.

CompVis files (latent-diffusion@a506df5): a Lightning pickle with "state_dict" (see vgm_cli.convert_api.unwrap).
First-stage files hold the names bare beside `loss.*`; diffusion files hold them below `first_stage_model.`; VA-VAE's
(hustvl/LightningDiT@2725fed) hold a projection and the foundation model besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]
PREFIX = "first_stage_model."
PROJECTION = "linear_proj.weight"  # VA-VAE's
SECOND = "denoise_encoder.conv_in.weight"  # of SUPIR's second encoder
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "latent_mean", "latent_std",
         "linear_proj.", "denoise_encoder.")  # fmt: skip
NEEDED = ("encoder.conv_in.weight", "decoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.weight")


def own_names(names: Iterable[str]) -> dict[str, str]:
    """{our name: name in the file} of the first stage's tensors; losses, averages and denoisers are left out."""
    names = list(names)
    prefix = PREFIX if any(n.startswith(PREFIX) for n in names) else ""
    found = {n.removeprefix(prefix): n for n in names if n.startswith(prefix)}
    return {ours: theirs for ours, theirs in found.items() if ours.startswith(PARTS)}


def is_first_stage(names: Iterable[str]) -> bool:
    """Whether these are names of a first stage, bare as own_names gives them."""
    common = {"encoder.mid.block_1.conv1.weight", "decoder.up.0.block.0.conv1.weight", "post_quant_conv.weight"}
    return common <= set(names)


def to_ours(state: State) -> dict[str, Tensor]:
    """CompVis -> ours. KeyError when a half is missing."""
    own = {ours: state[theirs] for ours, theirs in own_names(state).items()}
    for name in NEEDED:
        if name not in own:
            raise KeyError(name)
    return own


def first_stage_config(state: State) -> dict[str, Any]:
    """Constructor keywords of encoder, decoder and latents, read off the shapes; resolution 256, as published, is
    assumed to place attention."""
    own = to_ours(state)
    ch, in_channels = own["encoder.conv_in.weight"].shape[:2]
    levels = 1 + highest(own, r"encoder\.down\.(\d+)\.")
    blocks = 1 + highest(own, r"encoder\.down\.0\.block\.(\d+)\.")
    widths = [own[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"].shape[0] for i in range(levels)]
    attended = [i for i in range(levels) if any(n.startswith(f"encoder.down.{i}.attn.") for n in own)]
    config: dict[str, Any] = {
        "ch": ch,
        "ch_mult": tuple(w // ch for w in widths),
        "num_res_blocks": blocks,
        "attn_resolutions": tuple(256 // 2**i for i in attended),
        "resolution": 256,
        "z_channels": own["decoder.conv_in.weight"].shape[1],
        "embed_dim": own["post_quant_conv.weight"].shape[1],
        "in_channels": in_channels,
        "out_ch": own["decoder.conv_out.weight"].shape[0],
    }
    if attended and not any(re.match(r"decoder\.up\.\d+\.attn\.", n) for n in own):
        config["decoder_attn"] = False
    if "encoder.mid.attn_1.to_qkv.weight" in own:
        config["attn_type"] = "linear"
    elif "encoder.mid.attn_1.q.weight" not in own:
        config["attn_type"] = "none"
    if levels > 1 and "encoder.down.0.downsample.conv.weight" not in own:
        config["resamp_with_conv"] = False
    if ch % 32:  # no published model: the largest group count that divides
        config["norm_groups"] = next(g for g in (16, 8, 4, 2, 1) if ch % g == 0)
    if "latent_mean" in own:
        config["latent_stats"] = True
    if "scale_factor" in state:  # a diffusion model that measured it
        config["scale_factor"] = float(state["scale_factor"])
    if PROJECTION in own:
        rows, columns = own[PROJECTION].shape[:2]
        reverse = columns == config["embed_dim"] and "linear_proj.bias" not in own
        config |= {"feature_dim": rows if reverse else columns, "reverse_proj": reverse}
    return config


def highest(names: Iterable[str], pattern: str) -> int:
    """The largest number that the pattern's group finds at the start of any name."""
    return max(int(m[1]) for n in names if (m := re.match(pattern, n)))
