"""Published layouts of TARFlow and STARFlow: bare state dicts, whose names are ours.

apple/ml-tarflow@313120e train.py saves model.state_dict(); its one public file is afhq_model_8_768_8_8_0.07.pth.
apple/ml-starflow@e565a46 saves the same without FSDP (with it, a folder of torch.distributed.checkpoint, which is not
read); its sample.py names ckpts/starflow_3B_t2i_256x256.pth. Causal masks, and STARFlow's deprecated buffers
(feat_rope, var), say nothing: their shapes tell the grid, the text's length and the width of a head, and they are left
out. The official code loads files without them (strict=False); TARFlow's masks are made anew.
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

State = Mapping[str, Tensor]
MASK = r"\.attn_mask$"
DEPRECATED = (MASK, r"^feat_rope\.", r"^var$")
LAYER = ("attention.qkv", "attention.proj", "mlp.norm", "attention.norm")
NOISE = {(768, 2): 0.05, (1024, 4): 0.15, (768, 8): 0.07, (128, 4): 0.1}  # of published TARFlows, by width and patch


def count(state: State, pattern: str) -> int:
    """One more than the largest number in names of a pattern with one group; 0 where there is none."""
    found = [int(m[1]) for k in state if (m := re.match(pattern, k))]
    return max(found, default=-1) + 1


def numbers_of(names: Iterable[str]) -> list[int]:
    """The flow blocks that have tensors: of a STARFlow those of no layers have none."""
    return sorted({int(m[1]) for k in names if (m := re.match(r"blocks\.(\d+)\.", k))})


def require(state: State, names: Iterable[str]) -> None:
    for name in names:
        if name not in state:
            raise KeyError(name)


def kept(state: State, dropped: Iterable[str]) -> dict[str, Tensor]:
    """What means something, of a state whose blocks are whole. KeyError: a tensor is missing."""
    for i in numbers_of(state):
        require(state, (f"blocks.{i}.{part}.{kind}" for part in ("proj_in", "proj_out") for kind in ("weight", "bias")))
        for j in range(count(state, rf"blocks\.{i}\.attn_blocks\.(\d+)\.")):
            require(state, (f"blocks.{i}.attn_blocks.{j}.{part}.weight" for part in LAYER))
    return {k: v for k, v in state.items() if not any(re.search(p, k) for p in dropped)}


def patches(numbers: int, channels: Iterable[int]) -> tuple[int, int]:
    """(channels of x, side of a patch) of tokens of so many numbers: the first of the channels that leaves a square."""
    for c in channels:
        if numbers % c == 0 and math.isqrt(numbers // c) ** 2 == numbers // c:
            return c, math.isqrt(numbers // c)
    return numbers, 1


# -- TARFlow -----------------------------------------------------------------------------------------------------------


def tarflow_recognise(names: Iterable[str]) -> bool:
    names = set(names)
    own = {"var", "blocks.0.pos_embed", "blocks.0.proj_in.weight", "blocks.0.attn_blocks.0.attention.qkv.weight"}
    return own <= names and all(n.startswith("blocks.") or n == "var" for n in names)


def tarflow_ours(state: State) -> dict[str, Tensor]:
    ours = kept(state, [MASK])
    require(state, ["var", *(f"blocks.{i}.pos_embed" for i in range(count(state, r"blocks\.(\d+)\.")))])
    return ours


def tarflow_theirs(state: State) -> dict[str, Tensor]:
    tokens = len(state["var"])
    mask = torch.ones(tokens, tokens).tril()
    masks = {f"blocks.{i}.attn_mask": mask.clone() for i in range(count(state, r"blocks\.(\d+)\."))}
    return {**state, **masks}


def tarflow_config(state: State) -> dict[str, Any]:
    """Constructor keywords from shapes: three channels where that leaves square patches, heads of 64."""
    tokens, numbers = state["var"].shape
    channels = state["blocks.0.proj_in.weight"].shape[0]
    in_channels, patch = patches(numbers, (3, 1, 4, 2))
    classes = state.get("blocks.0.class_embed")
    return {
        "in_channels": in_channels,
        "img_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "channels": channels,
        "num_blocks": count(state, r"blocks\.(\d+)\."),
        "layers_per_block": count(state, r"blocks\.0\.attn_blocks\.(\d+)\."),
        "head_dim": 64,
        "nvp": state["blocks.0.proj_out.weight"].shape[0] == 2 * numbers,
        "num_classes": 0 if classes is None else classes.shape[0],
        "noise_std": NOISE.get((channels, patch), 0.05),
    }


def tarflow_assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    said = {
        "in_channels": f"{config['in_channels']} channels and patches of {config['patch_size']} (in_channels=N "
        "patch_size=N tell otherwise)",
        "noise_std": f"noise of {config['noise_std']:g} in the data (noise_std=S; the official file names end in it)",
    }
    return said


def tarflow_header(config: Mapping[str, Any]) -> dict[str, Any]:
    size, channels = config["img_size"], config["in_channels"]
    guidance = {"guidance_scale": 3.3} if config.get("num_classes") else {}
    return {
        "recipe": {"paper": "starflow", "sampler": {"name": "starflow"}, **guidance},
        "data": {
            "sample_shape": [channels, size, size],
            "num_classes": config.get("num_classes", 0),
            "image_size": size,
            "image_channels": channels,
        },
    }


TARFLOW = Layout(
    name="tarflow",
    component="tarflow",
    recognise=tarflow_recognise,
    to_ours=tarflow_ours,
    from_ours=tarflow_theirs,
    config=tarflow_config,
    summary="apple/ml-tarflow state dicts (afhq_model_8_768_8_8_0.07.pth)",
    files=Files(unused=(MASK,)),
    published=Published(header=tarflow_header, assumes=tarflow_assumes),
)


# -- STARFlow ----------------------------------------------------------------------------------------------------------


def recognise(names: Iterable[str]) -> bool:
    names = set(names)
    first = f"blocks.{min(numbers_of(names), default=0)}"
    own = {f"{first}.{part}.weight" for part in ("proj_in", "proj_out", "attn_blocks.0.attention.qkv")}
    parts = ("blocks.", "feat_rope.", "learnable_self_denoiser.", "var")
    return own <= names and f"{first}.pos_embed" not in names and all(n.startswith(parts) for n in names)


def to_ours(state: State) -> dict[str, Tensor]:
    ours = kept(state, DEPRECATED)
    numbers = numbers_of(state)
    if f"blocks.{numbers[0]}.sos_embed" in state:
        require(state, (f"blocks.{i}.sos_embed" for i in numbers))
    return ours


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords from shapes, the deprecated buffers' included. What these do not tell is as published: with
    a start token softplus, soft clip and L2R, without one TARFlow's choices; heads of 64, a grid of 32x32."""
    *lower, top_number = numbers_of(state)
    lowest, blocks = f"blocks.{lower[0] if lower else top_number}", top_number + 1
    first, sos = f"{lowest}.attn_blocks.0", f"{lowest}.sos_embed" in state
    channels, numbers = state[f"{lowest}.proj_in.weight"].shape
    in_channels, patch = patches(numbers, (4, 3, 1, 2))
    side = math.isqrt(len(state["var"])) if "var" in state else 32
    rope = state.get("feat_rope.freqs_cos")
    rows, width = state[f"{first}.attention.qkv.weight"].shape[0], state[f"{first}.attention.proj.weight"].shape[1]
    head_dim = rope.shape[1] if rope is not None else 64 if width % 64 == 0 else width
    heads, kv_heads = width // head_dim, (rows - width) // 2 // head_dim
    swiglu = f"{first}.mlp.gate_proj.weight" in state
    hidden = state[f"{first}.mlp.{'gate_proj' if swiglu else 'main.0'}.weight"].shape[0]
    top = state[f"blocks.{blocks - 1}.proj_in.weight"].shape[0]
    layers = tuple(count(state, rf"blocks\.{i}\.attn_blocks\.(\d+)\.") for i in range(blocks))
    denoiser = count(state, r"learnable_self_denoiser\.attn_blocks\.(\d+)\.")
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "img_size": side * patch,
        "patch_size": patch,
        "channels": channels,
        "layers_per_block": layers,
        "head_dim": head_dim,
        "num_heads": None if heads * head_dim == channels else heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "top_block_channels": None if top == channels else top,
        "expansion": hidden / channels,
        "cond_top_only": not lower or f"{lowest}.proj_txt.weight" not in state,
        "seq_order": "L2R" if sos else "R2L",
        "sos": sos,
        "use_softplus": sos,
        "soft_clip": 4.0 if sos else 0.0,
        "use_final_norm": f"{lowest}.final_norm.weight" in state,
        "norm_type": "layer_norm" if f"{first}.mlp.norm.bias" in state else "rms_norm",
        "use_bias": f"{first}.attention.qkv.bias" in state,
        "use_swiglu": swiglu,
        "use_qk_norm": f"{first}.attention.query_norm.weight" in state,
        "use_post_norm": f"{first}.attention.post_norm.weight" in state,
        "denoiser_layers": denoiser,
        "conditional_denoiser": not denoiser or "learnable_self_denoiser.proj_txt.weight" in state,
        "num_classes": 0,
        "noise_std": 0.3,
    }
    condition = state.get(f"blocks.{blocks - 1}.proj_txt.weight")
    if condition is not None:
        width = condition.shape[1]
        length = None if rope is None or "var" not in state else rope.shape[0] - len(state["var"])
        if length == 1 or (length is None and width != 2048):
            config["num_classes"] = width - 1
        else:
            config |= {"txt_size": length or 128, "txt_dim": width}
    return config


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    scale = "softplus scales, clipped at 4, L2R" if config["sos"] else "exp scales, not clipped, R2L"
    said = {"use_softplus": f"{scale} (use_softplus, soft_clip, seq_order tell otherwise)"}
    if "feat_rope.freqs_cos" not in state:
        said["head_dim"] = f"heads of {config['head_dim']} channels (head_dim=N tells otherwise)"
    if 0 in config["layers_per_block"]:
        said["layers_per_block"] = f"blocks without tensors have no layers: {list(config['layers_per_block'])}"
    if "var" not in state:
        said["img_size"] = f"a grid of {config['img_size'] // config['patch_size']} a side (img_size=N tells otherwise)"
    return said


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """Behind Stable Diffusion's VAE, with the guidance of the official configuration (cfg 2.5); texts by T5."""
    size, channels = config["img_size"], config["in_channels"]
    guided = config.get("num_classes") or config.get("txt_size")
    text = {"name": "starflow-t5", "tokens": config.get("txt_size"), "width": config.get("txt_dim")}
    return {
        **({"conditions": {"text": text}} if config.get("txt_size") else {}),
        "recipe": {
            "paper": "starflow",
            "sampler": {"name": "starflow"},
            **({"guidance_scale": 3.5} if guided else {}),
        },
        "data": {
            "sample_shape": [channels, size, size],
            "num_classes": config.get("num_classes", 0),
            "image_size": 8 * size,
            "image_channels": 3,
        },
    }


def allows(config: Mapping[str, Any]) -> None:
    if config.get("hf_style_rope"):
        raise VgmError("no published STARFlow rotates halves of a head", "model.hf_style_rope=false", USAGE)


STARFLOW = Layout(
    name="starflow",
    component="starflow",
    recognise=recognise,
    to_ours=to_ours,
    from_ours=dict,
    config=config_from,
    allows=allows,
    summary="apple/ml-starflow state dicts (starflow_3B_t2i_256x256.pth)",
    files=Files(unused=DEPRECATED),
    published=Published(header=header, assumes=assumes),
)
