"""First-stage weights: the CompVis layout, whose names are ours, and diffusers' AutoencoderKL (with its config).

CompVis files (latent-diffusion@a506df5): a Lightning pickle with "state_dict" (see vgm_cli.convert_api.unwrap).
First-stage files hold the names bare beside `loss.*`; diffusion files hold them below `first_stage_model.`. diffusers:
levels are called blocks, the decoder's order is reversed, attention is linear instead of 1x1 convolutions; its plain
blocks have no attention, so the f16 and f32 presets have no diffusers layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Diffusers, Files, Layout, Proof, Published
from vgm_cli.errors import USAGE, VgmError, needs_extra
from vgm_cli.nets.first_stage_checkpoints import (
    PROJECTION,
    SECOND,
    first_stage_config,
    highest,
    is_first_stage,
    own_names,
    to_ours,
)

from .presets import KL

State = Mapping[str, Tensor]


# -- CompVis ---------------------------------------------------------------------------------------------------------


def recognise(names: Iterable[str], quantised: bool) -> bool:
    """A CompVis first stage, bare or inside a diffusion checkpoint; VA-VAE's projection and SUPIR's second encoder make
    it another layout."""
    own = own_names(names)
    plain = is_first_stage(own) and not {PROJECTION, SECOND} & set(own)
    return plain and ("quantize.embedding.weight" in own) == quantised


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes. VgmError: it is VQGAN's."""
    config = first_stage_config(state)
    own = to_ours(state)
    if "quantize.embedding.weight" in own:
        if own["post_quant_conv.weight"].shape[1] > 64:
            raise VgmError("codes of so many dimensions are VQGAN's", "--from vqgan", USAGE)
        config["n_embed"] = own["quantize.embedding.weight"].shape[0]
    for published in KL.values():  # Stable Diffusion's VAE, MAR's
        if "scale_factor" in published and config == {k: v for k, v in published.items() if k != "scale_factor"}:
            config["scale_factor"] = published["scale_factor"]
    return config


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """How latents are scaled is in no tensor, and networks of the same shapes differ in it."""
    if "scale_factor" in state:
        return {}
    factor = config.get("scale_factor", 1.0)
    whose = {0.18215: "Stable Diffusion's; SDXL's is 0.13025", 0.2325: "MAR's"}.get(factor, "unscaled latents")
    found = {"scale_factor": f"scale_factor={factor}, {whose} (scale_factor=X tells otherwise)"}
    if config["attn_resolutions"]:
        found["resolution"] = f"resolution=256, so attention at {', '.join(map(str, config['attn_resolutions']))}"
    return found


def allows(config: Mapping[str, Any]) -> None:
    """VgmError: the autoencoder has VA-VAE's projection, which no file of this layout has."""
    if config.get("feature_dim"):
        hint = "model.name=va-vae has a layout of its own"
        raise VgmError("this layout is of autoencoders without a projection to features", hint, USAGE)


CONVERTER_KL = Layout(
    name="autoencoder-kl",
    component="autoencoder-kl",
    kind="codec",
    recognise=lambda names: recognise(names, quantised=False),
    to_ours=to_ours,
    from_ours=dict,
    config=config_from,
    allows=allows,
    files=Files(wrapper="state_dict", names=own_names),
    published=Published(assumes=assumes),
    summary="CompVis KL first stages, also inside diffusion checkpoints (first_stage_model.*)",
)
CONVERTER_VQ = Layout(
    name="vq-autoencoder",
    component="vq-autoencoder",
    kind="codec",
    recognise=lambda names: recognise(names, quantised=True),
    to_ours=to_ours,
    from_ours=dict,
    config=config_from,
    files=Files(wrapper="state_dict", names=own_names),
    published=Published(assumes=assumes),
    summary="CompVis VQ first stages, also inside diffusion checkpoints (first_stage_model.*)",
)


# -- diffusers -------------------------------------------------------------------------------------------------------

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17
RULES = (  # ours -> theirs; {i} stays for the encoder and is counted from the other end in the decoder
    (r"(encoder)\.down\.(\d+)\.block\.(\d+)\.(.+)", "{0}.down_blocks.{1}.resnets.{2}.{3}"),
    (r"(decoder)\.up\.(\d+)\.block\.(\d+)\.(.+)", "{0}.up_blocks.{1}.resnets.{2}.{3}"),
    (r"(encoder)\.down\.(\d+)\.downsample\.(.+)", "{0}.down_blocks.{1}.downsamplers.0.{2}"),
    (r"(decoder)\.up\.(\d+)\.upsample\.(.+)", "{0}.up_blocks.{1}.upsamplers.0.{2}"),
)


def diffusers_name(ours: str, levels: int) -> str:
    """Our name of a tensor -> diffusers'. VgmError for tensors that its AutoencoderKL does not have."""
    for pattern, form in RULES:
        if m := re.fullmatch(pattern, ours):
            parts = list(m.groups())
            if parts[0] == "decoder":
                parts[1] = str(levels - 1 - int(parts[1]))
            return form.format(*parts).replace("nin_shortcut", "conv_shortcut")
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.block_(\d)\.(.+)", ours):
        return f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}.{m[3]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(norm|q|k|v|proj_out)\.(weight|bias)", ours):
        return f"{m[1]}.mid_block.attentions.0.{ATTENTION[m[2]]}.{m[3]}"
    if m := re.fullmatch(r"((?:encoder|decoder)\.)norm_out\.(.+)", ours):
        return f"{m[1]}conv_norm_out.{m[2]}"
    if re.fullmatch(r"((encoder|decoder)\.conv_(in|out)|quant_conv|post_quant_conv)\.(weight|bias)", ours):
        return ours
    raise VgmError(f"diffusers' AutoencoderKL has no place for {ours}", "only plain KL first stages convert", USAGE)


def diffusers_recognise(names: Iterable[str]) -> bool:
    names = set(names)
    own = {f"{half}.resnets.0.conv1.weight" for half in ("encoder.down_blocks.0", "decoder.up_blocks.0")}
    other = any(n.startswith(("quantize.", "decoder.time")) for n in names)  # its VQ and video autoencoders
    return own | {"decoder.conv_norm_out.weight"} <= names and not other


def ours_names(state: State) -> list[str]:
    """Our names of everything in a diffusers state, found by inverting the rules."""
    levels = 1 + highest(state, r"encoder\.down_blocks\.(\d+)\.")
    found = []
    for name in state:
        kind = name.split(".")[0]
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        side, stack = ("down", "down_blocks") if kind == "encoder" else ("up", "up_blocks")
        if m := re.fullmatch(rf"{kind}\.{stack}\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.+)", name):
            i = int(m[1]) if kind == "encoder" else levels - 1 - int(m[1])
            middle = f"block.{m[3]}" if m[2] == "resnets" else f"{side}sample"
            name = f"{kind}.{side}.{i}.{middle}.{m[4]}"
        elif m := re.fullmatch(rf"{kind}\.mid_block\.resnets\.(\d)\.(.+)", name):
            name = f"{kind}.mid.block_{int(m[1]) + 1}.{m[2]}"
        elif m := re.fullmatch(rf"{kind}\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            name = f"{kind}.mid.attn_1.{next(a for a, b in ATTENTION.items() if b == m[1])}.{m[2]}"
        found.append(name)
    return found


def diffusers_to_ours(state: State) -> dict[str, Tensor]:
    """diffusers -> ours, attention names of before 0.17 included; 1x1 convolutions that a model does without (Stable
    Diffusion 3, FLUX) become the identity."""
    state = {modern(k): v for k, v in state.items()}
    bias, z = state["encoder.conv_out.bias"], state["decoder.conv_in.weight"].shape[1]
    for name, n in (("quant_conv", len(bias)), ("post_quant_conv", z)):
        if f"{name}.weight" not in state and f"{name}.bias" not in state:
            state[f"{name}.weight"] = torch.eye(n).to(bias)[:, :, None, None]
            state[f"{name}.bias"] = torch.zeros(n).to(bias)
    levels = 1 + highest(state, r"encoder\.down_blocks\.(\d+)\.")
    ours = {name: state[diffusers_name(name, levels)] for name in ours_names(state)}
    for name, tensor in ours.items():
        if ".attn_1." in name and tensor.ndim == 2:
            ours[name] = tensor[:, :, None, None]
    return to_ours(ours)


def modern(name: str) -> str:
    if ".attentions." in name:
        for old, new in OLD_ATTENTION.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def diffusers_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> diffusers. VgmError for attention outside the middle and for measured latent statistics."""
    levels = 1 + highest(state, r"encoder\.down\.(\d+)\.")
    theirs = {}
    for name, tensor in state.items():
        flat = ".attn_1." in name and tensor.ndim == 4
        theirs[diffusers_name(name, levels)] = tensor[:, :, 0, 0] if flat else tensor
    return theirs


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor keywords -> config.json of diffusers' AutoencoderKL."""
    width, mult = config["ch"], config["ch_mult"]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config["in_channels"],
        "out_channels": config.get("out_ch") or config["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * len(mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(mult),
        "block_out_channels": [width * m for m in mult],
        "layers_per_block": config["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": config["embed_dim"],
        "norm_num_groups": config.get("norm_groups", 32),
        "sample_size": config.get("resolution", 256),
        "scaling_factor": config.get("scale_factor", 1.0),
        "shift_factor": config.get("shift_factor") or None,
        "mid_block_add_attention": config.get("attn_type", "vanilla") == "vanilla",
    }


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKL -> our constructor keywords. VgmError for blocks of another kind."""
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"} or config.get("act_fn", "silu") not in ("silu", "swish"):
        raise VgmError(f"blocks {sorted(kinds)} have no counterpart", "only plain AutoencoderKL converts", USAGE)
    widths = config["block_out_channels"]
    return {
        "ch": widths[0],
        "ch_mult": tuple(w // widths[0] for w in widths),
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": (),
        "resolution": config.get("sample_size", 256),
        "z_channels": config["latent_channels"],
        "embed_dim": config["latent_channels"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "norm_groups": config.get("norm_num_groups", 32),
        "attn_type": "vanilla" if config.get("mid_block_add_attention", True) else "none",
        "scale_factor": config.get("scaling_factor", 0.18215),
        "shift_factor": config.get("shift_factor") or 0.0,
    }


def example(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """An image and a latent before scaling."""
    down = 2 ** (len(config["ch_mult"]) - 1)
    g = torch.Generator().manual_seed(0)
    image = torch.randn((1, config["in_channels"], 8 * down, 8 * down), generator=g)
    return image, torch.randn((1, config["embed_dim"], 8, 8), generator=g)


def forward(network: Any, config: Mapping[str, Any]) -> Tensor:
    """Moments and image, one after the other."""
    image, z = example(config)
    scaled = (z - (config.get("shift_factor") or 0.0)) * config.get("scale_factor", 1.0)
    return torch.cat([network.encode(image).flatten(), network.decode(scaled).flatten()])


def diffusers_forward(state: State, config: Mapping[str, Any]) -> Tensor:
    """The same by diffusers' AutoencoderKL. VgmError: not installed."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as e:
        raise needs_extra("this proof", "diffusers", "hf") from e
    own = {f"use_{name}": f"{name}.weight" in state for name in ("quant_conv", "post_quant_conv")}
    network = AutoencoderKL.from_config({**diffusers_config(config), **own}).eval()
    network.load_state_dict({modern(k): v.float() for k, v in state.items()})
    image, z = example(config)
    with torch.no_grad():
        moments = network.encode(image).latent_dist.parameters
        return torch.cat([moments.flatten(), network.decode(z).sample.flatten()])


DIFFUSERS = Layout(
    name="autoencoder-kl-diffusers",
    component="autoencoder-kl",
    kind="codec",
    recognise=diffusers_recognise,
    to_ours=diffusers_to_ours,
    from_ours=diffusers_from_ours,
    config=lambda state: config_from(diffusers_to_ours(state)),
    summary="diffusers AutoencoderKL (diffusion_pytorch_model.safetensors)",
    files=Files(names=lambda names: {modern(k): k for k in names}),
    published=Published(assumes=assumes),
    diffusers=Diffusers(
        config_json=diffusers_config,
        from_json=lambda json: config_from_diffusers(json) if "block_out_channels" in json else {},
        matches=lambda json: json.get("_class_name") == "AutoencoderKL",
    ),
    proof=Proof(reference=diffusers_forward, forward=forward),
)
