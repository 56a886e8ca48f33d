"""ADM weights: the official layout, which is ours, and that of consistency models.

Official files (openai/guided-diffusion@22e0df8) are bare state dicts: 256x256_diffusion.pt, 64x64_classifier.pt, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Layout, Published
from vgm_cli.nets.unet_checkpoints import blocks_of_levels, indices
from vgm_cli.nn.meta import on_meta

from .model import EncoderUNetModel, UNetModel

State = Mapping[str, Tensor]

# -- official --------------------------------------------------------------------------------------------------------


def recognise(keys: Iterable[str]) -> bool:
    """The U-Net's names, with ADM's attention in the middle (latent diffusion has transformers there)."""
    keys = set(keys)
    middle = {"middle_block.1.qkv.weight", "middle_block.2.out_layers.3.weight"}
    return middle | {"time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"} <= keys


def recognise_classifier(keys: Iterable[str]) -> bool:
    keys = set(keys)
    wanted = {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.0.weight"}
    return wanted <= keys and not any(k.startswith("output_blocks.") for k in keys)


def trunk_config(state: State, num_res_blocks: int) -> dict[str, Any]:
    """Keywords that the encoder's shapes tell, given the residual blocks of a level."""
    blocks = indices(state, "input_blocks.")
    levels = (max(blocks) + 1) // (num_res_blocks + 1)
    gaps, convolutions = len(blocks) <= max(blocks), any(".op." in k for k in state)
    channels = state["time_embed.0.weight"].shape[1]
    first = [f"input_blocks.{1 + i * (num_res_blocks + 1)}" for i in range(levels)]
    widths = [len(state[f"{b}.0.out_layers.3.bias"]) for b in first]
    mult = [w / channels for w in widths]
    return {
        "model_channels": channels,
        "num_res_blocks": num_res_blocks,
        "channel_mult": [int(m) if m == int(m) else m for m in mult],
        "attention_resolutions": [2**i for i, b in enumerate(first) if f"{b}.1.qkv.weight" in state],
        "conv_resample": not gaps,
        "resblock_updown": not gaps and not convolutions,
        "use_scale_shift_norm": len(state[f"{first[0]}.0.emb_layers.1.bias"]) == 2 * widths[0],
        # as published: 64 pixels have 4 levels, 128 have 5, 256 have 6, 512 have 7
        "image_size": 2 ** (levels + 2),
    }


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords of a U-Net. Heads and the order of attention are not in the shapes: the published models
    have 64 channels a head, but 4 heads at 128 pixels and in the 64->256 upsampler; the new order at 64 pixels."""
    config = trunk_config(state, blocks_of_levels(state)[0])
    inputs, outputs = state["input_blocks.0.0.weight"].shape[1], len(state["out.2.bias"])
    super_res = inputs == 6  # an RGB image and the small one
    channels = inputs // 2 if super_res else inputs
    large = config["attention_resolutions"] == [16, 32]
    four = config["channel_mult"] == [1, 1, 2, 3, 4] or (super_res and not large)
    fits = all(int(m * config["model_channels"]) % 64 == 0 for m in config["channel_mult"])
    return config | {
        "image_size": 512 if super_res and large else config["image_size"],
        "in_channels": channels,
        "out_channels": outputs,
        "learn_sigma": outputs == 2 * channels,
        "num_classes": len(state["label_emb.weight"]) if "label_emb.weight" in state else 0,
        "super_res": super_res,
        "num_heads": 4 if four else 1,
        "num_head_channels": None if four or not fits else 64,
        "use_new_attention_order": config["model_channels"] == 192 and not super_res,
    }


def classifier_config_from(state: State) -> dict[str, Any]:
    """Constructor keywords of a classifier; 64 channels a head, as in the published ones."""
    blocks = sorted(indices(state, "input_blocks."))
    convolutions = [i for i in blocks if f"input_blocks.{i}.0.op.weight" in state]
    missing = sorted(set(range(max(blocks) + 1)) - set(blocks))
    if missing or convolutions:
        depth = (missing or convolutions)[0] - 1
    else:  # the lowest level ends the list; attention is on its blocks and not on the one that led there
        with_attention = [f"input_blocks.{i}.1.qkv.weight" in state for i in reversed(blocks)]
        depth = with_attention.index(False) or len(blocks) - 1
    config = trunk_config(state, depth)
    if "out.2.positional_embedding" in state:
        pool, classes = "attention", len(state["out.2.c_proj.bias"])
        side = round((state["out.2.positional_embedding"].shape[1] - 1) ** 0.5)
        config["image_size"] = side * 2 ** (len(config["channel_mult"]) - 1)
    elif "out.2.weight" in state:
        pool, classes = "spatial", len(state["out.2.bias"])
    else:
        pool, classes = "spatial_v2" if "out.1.weight" in state else "adaptive", len(state["out.3.bias"])
    channels = state["input_blocks.0.0.weight"].shape[1]
    return config | {"in_channels": channels, "num_classes": classes, "num_head_channels": 64, "pool": pool}


def checked(state: State, network: type[torch.nn.Module], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state, whose names are ours; a missing tensor is a KeyError."""
    with on_meta():
        names = network(**config).state_dict()
    for name in names:
        if name not in state:
            raise KeyError(name)
    return dict(state)


def official(state: State) -> dict[str, Tensor]:
    """Official names are ours, both ways; a missing tensor is a KeyError."""
    one_head = {"num_heads": 1, "num_head_channels": None}  # names do not depend on heads
    return checked(state, UNetModel, config_from(state) | one_head)


def official_classifier(state: State) -> dict[str, Tensor]:
    """Official names are ours, both ways; a missing tensor is a KeyError."""
    return checked(state, EncoderUNetModel, classifier_config_from(state) | {"num_head_channels": 1})


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the published networks were trained on and are sampled by: cosine at 64 pixels, linear elsewhere. An
    upsampler also needs the small image, which no sampler here gives it: it names none."""
    size, channels = config["image_size"], config.get("in_channels", 3)
    learned = config.get("learn_sigma", True)
    view: dict[str, Any] = {
        "name": "denoiser",
        "path": {"name": "vp-discrete", "schedule": "cosine" if size == 64 else "linear", "steps": 1000},
        "prediction": "eps",
        "time": "index",
        "learned_sigma": learned,
        "variance": "learned_range" if learned else "fixed_large",
    }
    facts = {"image_size": size, "image_channels": channels, "size": size, "channels": channels}
    sampler = {"name": "ddpm", "steps": 250, "clip_denoised": True}
    recipe = {"paper": "adm-unet"} | ({} if config.get("super_res") else {"sampler": sampler})
    data = {**facts, "num_classes": config.get("num_classes", 0), "sample_shape": [channels, size, size]}
    return {"view": view, "recipe": recipe, "data": data}


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells, where the network is none of the published widths."""
    if config["model_channels"] in PUBLISHED:
        return {}
    heads = "num_heads" if not config.get("num_head_channels") else "num_head_channels"
    schedule = "cosine" if config["image_size"] == 64 else "linear"
    order = "new" if config.get("use_new_attention_order") else "old"
    return {
        "image_size": f"image_size={config['image_size']}, as published networks of so many levels have it",
        heads: f"{heads}={config[heads]} in every attention, in the {order} order",
        "schedule": f"schedule={schedule} over 1000 steps, as published (schedule=NAME tells otherwise)",
    }


PUBLISHED = (128, 192, 256)  # model_channels

CONVERTER = Layout(
    name="adm-unet",
    component="adm-unet",
    recognise=recognise,
    to_ours=official,
    from_ours=official,
    config=config_from,
    published=Published(header=header, assumes=assumes),
    summary="openai/guided-diffusion diffusion models and upsamplers",
)
CLASSIFIER = Layout(
    name="adm-classifier",
    component="adm-classifier",
    recognise=recognise_classifier,
    to_ours=official_classifier,
    from_ours=official_classifier,
    config=classifier_config_from,
    summary="openai/guided-diffusion classifiers",
)

# -- consistency models ----------------------------------------------------------------------------------------------

POINTWISE = (".qkv.weight", ".proj_out.weight")  # convolutions over the image there, over its positions here


def consistency_to_ours(state: State) -> dict[str, Tensor]:
    """openai/consistency_models -> ours. KeyError: a tensor is missing."""
    return official({k: v.flatten(2) if k.endswith(POINTWISE) else v for k, v in state.items()})


def consistency_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> openai/consistency_models."""
    return {k: v[..., None] if k.endswith(POINTWISE) else v for k, v in official(state).items()}


def consistency_config_from(state: State) -> dict[str, Any]:
    """The same network, always in the new order of attention and with 64 channels a head; it predicts EDM's F."""
    return config_from(state) | {"use_new_attention_order": True, "num_heads": 1, "num_head_channels": 64}


def consistency_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """EDM's F, told 250 ln(sigma); a student is sampled by `--sampler consistency`."""
    side, channels = config["image_size"], config["in_channels"]
    view = {"name": "denoiser", "path": {"name": "edm"}, "prediction": "F", "time": "edm", "time_scale": 1000.0}
    return {
        "view": view,
        "recipe": {"paper": "consistency", "sampler": {"name": "edm", "steps": 40}},
        "data": {"sample_shape": [channels, side, side], "num_classes": config["num_classes"]},
    }


CONSISTENCY = Layout(
    name="consistency",
    component="adm-unet",
    recognise=recognise,
    to_ours=consistency_to_ours,
    from_ours=consistency_from_ours,
    config=consistency_config_from,
    summary="openai/consistency_models (EDM teachers, CD and CT students)",
    published=Published(header=consistency_header),
)
