"""ControlNet weights: the official layout, whose names are ours below `control_model.`, and diffusers' ControlNetModel.

Official files (lllyasviel/ControlNet@ed85cd1) hold a whole Stable Diffusion beside it, or `control_model.*` alone, as
later ones do; files of the bare names are read as well. A trained decoder stands under `model.diffusion_model.`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Diffusers, Files, Layout, Proof, Published
from vgm_cli.errors import USAGE, VgmError, needs_extra
from vgm_cli.nets.ldm_unet_checkpoints import (
    BESIDE,
    KINDS,
    RES,
    diffusers_config,
    from_diffusers,
    outer,
    transformer_tensors,
    unet_config,
)
from vgm_cli.nets.ldm_unet_checkpoints import plan as unet_plan
from vgm_cli.nets.unet_checkpoints import indices, layers
from vgm_cli.nn.meta import on_meta

from .model import ControlNet, factor_of

State = Mapping[str, Tensor]
CONTROL, UNET = "control_model.", "model.diffusion_model."
OWN = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.", "middle_block_out.", "input_hint_block.",
       "zero_convs.")  # fmt: skip
DECODER = ("output_blocks.", "out.")
FIRST = "input_hint_block.0.weight"
HINTS = (16, 32, 96, 256)

# -- official ----------------------------------------------------------------------------------------------------------


def names_of(names: Iterable[str]) -> dict[str, str]:
    """{layout's name: name in the file} of the ControlNet's tensors, with its decoder where no whole U-Net is there."""
    found = list(names)
    pairs = {n: n for n in found if n.startswith(CONTROL)} or {CONTROL + n: n for n in found if n.startswith(OWN)}
    if not any(n.startswith(f"{UNET}input_blocks.") for n in found):
        pairs |= {n: n for n in found if n.startswith(tuple(UNET + d for d in DECODER))}
    return pairs


def bare(state: State) -> dict[str, Tensor]:
    """The ControlNet's own tensors of a file, under our names."""
    own = {ours: state[theirs] for ours, theirs in names_of(state).items()}
    return {k.removeprefix(CONTROL).removeprefix(UNET): v for k, v in own.items()}


def holds_control(names: Iterable[str]) -> bool:
    return {CONTROL + FIRST, f"{CONTROL}zero_convs.0.0.weight"} <= names_of(names).keys()


def is_whole(names: Iterable[str]) -> bool:
    """Whether the U-Net that is steered stands beside the control."""
    found = set(names)
    return holds_control(found) and f"{UNET}input_blocks.0.0.weight" in found


def recognise(names: Iterable[str]) -> bool:
    found = set(names)
    return holds_control(found) and not is_whole(found)


def hint_widths(own: State) -> tuple[int, ...]:
    last = max(indices(own, "input_hint_block."))
    return tuple(len(own[f"input_hint_block.{i}.bias"]) for i in range(0, last, 4))


def control_config(own: State) -> dict[str, Any]:
    """Constructor keywords. Heads are those of the published U-Net of these shapes; a hint is as much larger than the
    latents as its block can make it smaller."""
    unet = unet_config({**own, "out.2.bias": own["input_blocks.0.0.weight"][0, :, 0, 0]})
    config = {**unet, "hint_widths": hint_widths(own), "hint_channels": own[FIRST].shape[1]}
    return {**config, "unlocked": True} if "out.2.weight" in own else config


def complete(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same. KeyError: a tensor of the network is missing."""
    config = {**control_config(own), "num_heads": 1, "num_head_channels": None}
    with on_meta():
        names = ControlNet(**config, norm_groups=1).state_dict()
    for name in names:
        if name not in own:
            raise KeyError(name)
    return own


def official(own: State) -> dict[str, Tensor]:
    return {(UNET if k.startswith(DECODER) else CONTROL) + k: v for k, v in own.items()}


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the published networks were trained and are sampled."""
    side, channels = config.get("image_size", 64), config.get("in_channels", 4)
    ends = {"beta_start": 0.00085, "beta_end": 0.012}
    path = {"name": "vp-discrete", "schedule": "scaled_linear", "steps": 1000, **ends}
    pixels = {"image_size": factor_of(full(config)) * side, "image_channels": 3}
    hint = {"name": "annotated", "annotator": None, "hint_channels": config.get("hint_channels", 3)}
    return {
        "view": {"name": "denoiser", "path": path, "prediction": "eps", "time": "index"},
        "recipe": {
            "paper": "controlnet",
            "sampler": {"name": "controlnet", "solver": {"name": "ldm"}, "steps": 20},
            "guidance_scale": 9.0,
        },
        "data": {"sample_shape": [channels, side, side], "num_classes": 0, **pixels},
        "conditions": {"hint": hint},
    }


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells."""
    key = "num_head_channels" if config.get("num_head_channels") else "num_heads"
    return {
        "hint_size": f"hints {factor_of(full(config))} times as large as the latents (hint_size=X tells otherwise)",
        key: f"{key}={config.get(key)} in every attention",
    }


def transfer(control: State, base: State, other: State) -> dict[str, Tensor]:
    """A file trained on the file `base`, moved to the file `other` (tool_transfer_control.py), all in the official
    layout.

    Every tensor keeps its distance from the base's: control + other - base, the copy being compared with the U-Net.
    What `other` has no counterpart of is taken as it is; its first stage and text encoder take the place of the old,
    tensor by tensor where the control's file has them.
    """
    swapped = ("first_stage_model.", "cond_stage_model.")
    whole = any(k.startswith(swapped) for k in control)
    out = {k: v for k, v in other.items() if k.startswith(swapped) and (k in control or not whole)}
    for name, value in control.items():
        if name.startswith(swapped):
            continue
        pair = UNET + name.removeprefix(CONTROL) if name.startswith(CONTROL) else name
        if pair in other:
            if pair not in base or not value.shape == base[pair].shape == other[pair].shape:
                message = f"{name} has no counterpart of its shape in both bases"
                raise VgmError(message, "bases of one kind: Stable Diffusion 1 to another 1", USAGE)
            value = (value.float() + other[pair].float() - base[pair].float()).to(value.dtype)
        out[name] = value
    return out


CONTROLNET = Layout(
    name="controlnet",
    component="controlnet",
    recognise=recognise,
    to_ours=lambda state: complete(bare(state)),
    from_ours=lambda state: official(complete(dict(state))),
    config=lambda state: control_config(bare(state)),
    files=Files(wrapper="state_dict", names=names_of),
    published=Published(header=header, assumes=assumes),
    proof=Proof(forward=lambda network, config: maps_of(network, config)),
    transfer=transfer,
    summary="ControlNet's files of control_model.* alone",
)
WHOLE = replace(
    CONTROLNET,
    name="controlnet-whole",
    recognise=is_whole,
    beside={"base": {"ldm-unet": ""}, **{role: BESIDE[role] for role in ("codec", "text")}},
    summary="ControlNet's files with the base, its first stage and its text encoder",
)


def maps_of(network: Any, config: Mapping[str, Any]) -> Tensor:
    """All that a ControlNet adds to its base, one after the other."""
    given = ControlNet.example(full(config))
    return torch.cat([m.flatten() for m in network.control(**given) or []])


def full(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with the defaults that an example looks at."""
    plain = {"num_classes": 0, "vector_dim": None, "concat_channels": 0, "image_size": 64, "in_channels": 4}
    hint = {"hint_size": None, "hint_channels": 3, "hint_widths": HINTS}
    return {**plain, **hint, "channel_mult": (1, 2, 4, 4), "context_dim": 768, **config}


# -- diffusers ---------------------------------------------------------------------------------------------------------


def hint_pairs(count: int) -> dict[str, str]:
    """{ours: theirs} of the hint block's convolutions, of which there are `count`."""
    names = ["conv_in", *(f"blocks.{i}" for i in range(count - 2)), "conv_out"]
    return {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{n}" for i, n in enumerate(names)}


def zero_pairs(count: int) -> dict[str, str]:
    """{ours: theirs} of the zero convolutions, of which there are `count` beside the middle's."""
    pairs = {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(count)}
    return pairs | {"middle_block_out.0": "controlnet_mid_block"}


def renamed(state: State, blocks: Iterable[tuple[str, str, str]], hints: int, zeros: int, ours: bool) -> dict[str, Any]:
    """A state under the other names. KeyError: a tensor is missing."""
    pairs = outer(state, ours=ours)
    for a, b, kind in blocks:
        if b.startswith("up_blocks."):
            continue
        if kind == "attn":
            have = a if ours else b
            pairs |= {f"{a}.{k}": f"{b}.{k}" for k in transformer_tensors(state, have)}
        elif kind == "conv":
            pairs |= {f"{a}.{k}": f"{b}.{k}" for k in KINDS}
        else:
            both = {f"{a}.{x}.{k}": f"{b}.{y}.{k}" for x, y in RES.items() for k in KINDS}
            pairs |= {x: y for x, y in both.items() if (x if ours else y) in state}
    plain = hint_pairs(hints) | zero_pairs(zeros)
    pairs |= {f"{a}.{k}": f"{b}.{k}" for a, b in plain.items() for k in KINDS}
    return {b: state[a] for a, b in pairs.items()} if ours else {a: state[b] for a, b in pairs.items()}


def diffusers_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> ControlNetModel. VgmError: it cannot express this network."""
    own = complete(dict(state))
    config = control_config(own)
    allows(config)
    hints = len(indices(own, "input_hint_block."))
    return renamed(own, unet_plan(config), hints, len(indices(own, "zero_convs.")), ours=True)


def diffusers_to_ours(state: State) -> dict[str, Tensor]:
    """ControlNetModel -> ours. KeyError: a tensor is missing."""
    levels, depth = len(indices(state, "down_blocks.")), len(indices(state, "down_blocks.0.resnets."))
    attended = [i for i in range(levels) if f"down_blocks.{i}.attentions.0.proj_in.weight" in state]
    hints = len(indices(state, "controlnet_cond_embedding.blocks.")) + 2
    zeros = len(indices(state, "controlnet_down_blocks."))
    return complete(renamed(state, layers(levels, depth, attended, updown=False), hints, zeros, ours=False))


def allows(config: Mapping[str, Any]) -> None:
    """VgmError: diffusers has no such ControlNet."""
    unet_plan({"use_spatial_transformer": True, **config})
    if config.get("unlocked"):
        raise VgmError("diffusers' ControlNetModel has no decoder", "--to controlnet holds one", USAGE)
    own = full(config)
    if factor_of(own) != factor_of({**own, "hint_size": None}):
        message = f"diffusers' ControlNetModel makes hints {factor_of({**own, 'hint_size': None})} times smaller"
        raise VgmError(message, "--to controlnet holds every ControlNet", USAGE)


def control_config_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor keywords -> config.json of diffusers' ControlNetModel."""
    unet = diffusers_config({"out_channels": None, **config})
    left = ("_class_name", "sample_size", "out_channels", "up_block_types", "mid_block_type")
    own = {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.get("hint_channels", 3),
        "conditioning_embedding_out_channels": list(config.get("hint_widths", HINTS)),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
    }
    return own | {k: v for k, v in unet.items() if k not in left}


def from_control_json(json: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> keywords that shapes do not tell. VgmError: hints in another order of colours."""
    if json.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise VgmError("hints of this ControlNet are BGR", "only those of RGB convert", USAGE)
    return from_diffusers(json)


def diffusers_forward(state: State, config: Mapping[str, Any]) -> Tensor:
    """The maps by diffusers' own ControlNetModel. VgmError: not installed."""
    try:
        from diffusers import ControlNetModel
    except ImportError as e:
        raise needs_extra("this proof", "diffusers", "hf") from e
    network = ControlNetModel.from_config(control_config_json(config)).eval()
    network.load_state_dict({k: v.float() for k, v in state.items()})
    own = ControlNet.example(full(config))
    with torch.no_grad():
        down, middle = network(own["x"], own["t"], own["context"], own["hint"], return_dict=False)
    return torch.cat([m.flatten() for m in (*down, middle)])


def diffusers_recognise(names: Iterable[str]) -> bool:
    return {"controlnet_cond_embedding.conv_in.weight", "controlnet_mid_block.weight"} <= set(names)


CONTROLNET_DIFFUSERS = Layout(
    name="controlnet-diffusers",
    component="controlnet",
    recognise=diffusers_recognise,
    to_ours=diffusers_to_ours,
    from_ours=diffusers_from_ours,
    config=lambda state: control_config(diffusers_to_ours(state)),
    allows=allows,
    published=Published(header=header, assumes=assumes),
    diffusers=Diffusers(
        config_json=control_config_json,
        from_json=lambda json: from_control_json(json) if "block_out_channels" in json else {},
        matches=lambda json: json.get("_class_name") == "ControlNetModel",
    ),
    proof=Proof(reference=diffusers_forward, forward=maps_of),
    summary="diffusers ControlNetModel",
)
