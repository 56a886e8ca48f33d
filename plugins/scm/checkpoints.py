"""Published layouts of networks that sCM trains or learns from.

NVlabs/edm2@4bf8162 Precond: our names, the U-Net's below `unet.`. NVlabs/edm@008a4e5 EDMPrecond around SongUNet (DDPM++
of CIFAR-10): our names below `model.`, channels of qkv ordered (channel, q|k|v). A released .pkl of either is a pickled
object: save its state dict first. xandergos/sCM-mnist@2d285393 saves a bare state dict (model.pt,
model_consistency.pt), whose names are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Layout, Published
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.song_unet import SongUNet
from vgm_cli.nn.meta import on_meta

from .edm2 import EDM2UNet
from .unet import ShuffleUNet

State = Mapping[str, Tensor]


def strictly(state: State, wanted: Iterable[str], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors {ours: state[theirs]}. KeyError: one is missing."""
    return {name: state[rename[name]] for name in wanted}


def sides_of(state: State, prefix: str) -> list[int]:
    """Sides of the levels of a U-Net whose encoder blocks are named by them, largest first."""
    found = (re.match(rf"{re.escape(prefix)}enc\.(\d+)x\d+_block0\.", name) for name in state)
    return sorted({int(m[1]) for m in found if m}, reverse=True)


# -- EDM2 ------------------------------------------------------------------------------------------------------------

UNET = "unet."
HEAD = ("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight")


def edm2_name(name: str) -> str:
    return name if name in HEAD else UNET + name


def edm2_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes; heads of 64 channels, as in every published one."""
    sides = sides_of(state, UNET)
    first = state[f"{UNET}enc.{sides[0]}x{sides[0]}_conv.weight"]
    emb, noise = state[f"{UNET}emb_noise.weight"].shape
    base = len(first)
    mults = [len(state[f"{UNET}enc.{s}x{s}_block0.conv_res0.weight"]) // base for s in sides]
    label = state.get(f"{UNET}emb_label.weight")
    return {
        "img_resolution": sides[0],
        "in_channels": first.shape[1] - 1,
        "num_classes": 0 if label is None else label.shape[1],
        "model_channels": base,
        "channel_mult": mults,
        "channel_mult_noise": noise // base,
        "channel_mult_emb": emb // base,
        "num_blocks": sum(f"{UNET}enc.{sides[0]}x{sides[0]}_block{i}.emb_gain" in state for i in range(99)),
        "attn_resolutions": [s for s in sides if f"{UNET}enc.{s}x{s}_block0.attn_qkv.weight" in state],
        "logvar_channels": state["logvar_linear.weight"].shape[1],
    }


def edm2_to_ours(state: State) -> dict[str, Tensor]:
    with on_meta():
        wanted = EDM2UNet(**edm2_config(state)).state_dict()
    return strictly(state, wanted, {name: edm2_name(name) for name in wanted})


def edm2_allows(config: Mapping[str, Any]) -> None:
    """VgmError: sCM's changes, for which there is no official layout."""
    plain = {"time_embedding": "fourier", "modulation": "scale", "second_time": False}
    if any(config.get(k, v) != v for k, v in plain.items()):
        said = "EDM2's layout is of its own network, without sCM's changes"
        raise VgmError(said, "a .safetensors file of ours keeps them", USAGE)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Data facts: pixels, or latents of an autoencoder of factor 8 where there are four channels."""
    side, channels = config["img_resolution"], config["in_channels"]
    image = {"image_size": side, "image_channels": channels}
    if channels == 4:
        image = {"image_size": 8 * side, "image_channels": 3}
    own = {"size": side, "channels": channels, "num_classes": config["num_classes"]}
    return {**image, **own, "sample_shape": [channels, side, side]}


def edm_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """EDM's view of the network, and the sampler it is published with."""
    return {
        "view": {"name": "denoiser", "path": {"name": "edm"}, "prediction": "F", "time": "edm"},
        "recipe": {"paper": "scm", "sampler": {"name": "edm", "steps": 18 if config["img_resolution"] < 64 else 32}},
        "data": facts(config),
    }


def edm2_assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    wide = config["model_channels"] % 64
    heads = "channels_per_head=64, as in every published network (channels_per_head=N tells otherwise)"
    return {"channels_per_head": heads} if wide else {}


EDM2 = Layout(
    name="edm2",
    component="edm2",
    summary="NVlabs/edm2 (Precond's state dict)",
    recognise=lambda keys: {"logvar_linear.weight", f"{UNET}emb_noise.weight", f"{UNET}out_gain"} <= set(keys),
    to_ours=edm2_to_ours,
    from_ours=lambda state: {edm2_name(name): tensor for name, tensor in state.items()},
    config=edm2_config,
    allows=edm2_allows,
    published=Published(header=edm_header, assumes=edm2_assumes),
)


# -- DDPM++ of EDM ---------------------------------------------------------------------------------------------------

INNER = "model."


def ordered(tensor: Tensor, ours: bool) -> Tensor:
    """qkv's rows, (channel, q|k|v) officially and (q|k|v, channel) here."""
    shape = (-1, 3) if ours else (3, -1)
    return tensor.unflatten(0, shape).transpose(0, 1).flatten(0, 1).contiguous()


def song_to_ours(state: State) -> dict[str, Tensor]:
    with on_meta():
        wanted = SongUNet(**song_config(state)).state_dict()
    found = strictly(state, wanted, {name: INNER + name for name in wanted})
    return {k: ordered(v, True) if ".qkv." in k else v for k, v in found.items()}


def song_from_ours(state: State) -> dict[str, Tensor]:
    return {INNER + k: ordered(v, False) if ".qkv." in k else v for k, v in state.items()}


def song_config(state: State) -> dict[str, Any]:
    """Constructor keywords of a state; the filter is read where it is stored."""
    sides = sides_of(state, INNER)
    first = state[f"{INNER}enc.{sides[0]}x{sides[0]}_conv.weight"]
    base, channels = first.shape[:2]
    emb, waves = state[f"{INNER}map_layer0.weight"].shape
    label, augment = (state.get(f"{INNER}map_{what}.weight") for what in ("label", "augment"))
    found = {
        "img_resolution": sides[0],
        "in_channels": channels,
        "out_channels": len(state[f"{INNER}dec.{sides[0]}x{sides[0]}_aux_conv.weight"]),
        "augment_dim": 0 if augment is None else augment.shape[1],
        "num_classes": 0 if label is None else label.shape[1],
        "model_channels": base,
        "channel_mult": [len(state[f"{INNER}enc.{s}x{s}_block0.conv1.weight"]) // base for s in sides],
        "channel_mult_emb": emb // base,
        "channel_mult_noise": waves // base,
        "num_blocks": sum(f"{INNER}enc.{sides[0]}x{sides[0]}_block{i}.conv1.weight" in state for i in range(99)),
        "attn_resolutions": [s for s in sides if f"{INNER}enc.{s}x{s}_block0.qkv.weight" in state],
    }
    taps = next((v for k, v in state.items() if k.endswith("resample_filter")), None)
    if taps is not None and not taps.is_meta:
        row = taps[0, 0].float().sum(1)
        found["resample_filter"] = [round(v) for v in (row / row.min()).tolist()]
    return found


def song_allows(config: Mapping[str, Any]) -> None:
    """VgmError: a network that EDM has not."""
    if config.get("second_time") or config.get("modulation", "add") != "add":
        said = "EDM's layout is of a network that is told one time, by addition"
        raise VgmError(said, "a .safetensors file of ours keeps the rest", USAGE)


def song_recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return {f"{INNER}map_layer0.weight", f"{INNER}map_layer1.bias"} <= keys and any(
        re.fullmatch(rf"{INNER}dec\.\d+x\d+_aux_norm\.weight", k) for k in keys
    )


DDPMPP = Layout(
    name="edm-ddpmpp",
    component="song-unet",
    summary="NVlabs/edm SongUNet, DDPM++ (EDMPrecond's state dict)",
    recognise=song_recognise,
    to_ours=song_to_ours,
    from_ours=song_from_ours,
    config=song_config,
    allows=song_allows,
    published=Published(header=edm_header),
)


# -- MNIST -----------------------------------------------------------------------------------------------------------


def shuffle_config(state: State) -> dict[str, Any]:
    base, channels = state["init_conv.conv.weight"].shape[:2]
    depth = sum(f"encoder_blocks.{i}.conv1.branch1.0.weight" in state for i in range(99))
    widths = [2 * len(state[f"encoder_blocks.{i}.conv1.branch1.2.conv.weight"]) for i in range(depth)]
    return {
        "time_embedding_dim": state["logvar_linear.weight"].shape[1],
        "in_channels": channels,
        "out_channels": len(state["final_conv.bias"]),
        "base_dim": base,
        "dim_mults": [w // base for w in widths],
    }


def shuffle_ours(state: State) -> dict[str, Tensor]:
    """Names are ours, both ways; KeyError: a tensor is missing."""
    with on_meta():
        wanted = ShuffleUNet(**shuffle_config(state)).state_dict()
    return {name: state[name] for name in wanted}


def shuffle_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """A consistency model on digits in [-0.5, 0.5], which are half of what images are here."""
    path = {"name": "trig", "sigma_data": 1.0}
    denoiser = {"name": "denoiser", "path": path, "prediction": "trig", "time": "unit"}
    own = {"size": 28, "channels": config["in_channels"], "num_classes": 0}
    return {
        "view": {"name": "flow-map", "denoiser": denoiser, "boundary": "trig"},
        "recipe": {"paper": "scm", "sampler": {"name": "scm", "steps": 2}},
        "data": {**own, "image_size": 28, "image_channels": 1, "sample_shape": [config["in_channels"], 28, 28]},
    }


SHUFFLE = Layout(
    name="scm-mnist",
    component="scm-unet",
    summary="xandergos/sCM-mnist (model.pt, model_consistency.pt)",
    recognise=lambda keys: {"logvar_linear.bias", "encoder_blocks.0.time_mlp.mlp.0.weight"} <= set(keys),
    to_ours=shuffle_ours,
    from_ours=shuffle_ours,
    config=shuffle_config,
    published=Published(header=shuffle_header),
)
