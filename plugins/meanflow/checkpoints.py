"""MeanFlow's published layouts: the transformer's in PyTorch and in Flax, the CIFAR-10 U-Net's.

zhuyu-cs/MeanFlow@04d183c train.py saves {model, ema, opt, args, steps}, whose names are ours.
Gsunshine/meanflow@d70cb55 saves a flax TrainState {step, params: {net}, ema_params: {net}, opt_state}: kernels are (in,
out), convolutions HWIO; positions are computed and not stored, so that no tensor tells the size: 32, of 256 pixels.
Gsunshine/py-meanflow@1f6d72d saves {model: {net.*, net_ema.*, net_ema1.*, net_ema2.*, num_updates}}, averages of decay
0.9999, 0.99995 (sampled from, `--weights net_ema1`) and 0.9996.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Layout, Published
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.dit import sincos_2d
from vgm_cli.nets.dit_checkpoints import assumes, config_from, latents, official

State = Mapping[str, Tensor]
NORMED = "blocks.0.attn.q_norm.weight"
SHARED = {"learn_sigma", "class_dropout_prob"}  # keywords of DiT that MeanFlow's network has not


def view(guided: bool) -> dict[str, Any]:
    denoiser = {"name": "denoiser", "path": {"name": "linear"}, "prediction": "velocity", "time": "unit"}
    found = {"name": "flow-map", "denoiser": denoiser, "boundary": "none", "second_time": "difference"}
    return {**found, "guided": True} if guided else found


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released networks: guided in training, one step; recipes/meanflow/imagenet256.yaml."""
    recipe = {"paper": "meanflow", "sampler": {"name": "meanflow", "steps": 1}}
    return {"view": view(True), "recipe": recipe, "data": latents(config)}


# -- transformer, PyTorch --------------------------------------------------------------------------------------------


def recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    own = {"pos_embed", "t_embedder.mlp.2.weight", "r_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"}
    rest = {k for k in keys if not k.startswith("blocks.") or k.split(".")[3:4] not in (["q_norm"], ["k_norm"])}
    return own | {"x_embedder.proj.weight", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.bias"} <= keys and not any(
        "norm" in k or "rope" in k for k in rest
    )


def ours(state: State) -> dict[str, Tensor]:
    """Names are ours, both ways; KeyError: a tensor is missing."""
    for part in ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"):
        state[f"r_embedder.{part}"]
    return official(state)


def config(state: State) -> dict[str, Any]:
    found = {k: v for k, v in config_from(state).items() if k not in SHARED}
    if NORMED in state:  # tells the width of a head as well
        found |= {"qknorm": True, "num_heads": found["hidden_size"] // len(state[NORMED])}
    return found


def remarks(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    return {k: v for k, v in assumes(state, config).items() if k != "num_heads" or NORMED not in state}


TORCH = Layout(
    name="meanflow",
    component="meanflow",
    summary="zhuyu-cs/MeanFlow (train.py's model, ema)",
    recognise=recognise,
    to_ours=ours,
    from_ours=ours,
    config=config,
    published=Published(header=header, assumes=remarks),
)


# -- transformer, Flax -----------------------------------------------------------------------------------------------

RENAMED = (
    ("h_embedder", "r_embedder"),
    ("blocks.layers_", "blocks."),
    ("adaLN_modulation.layers_1", "adaLN_modulation.1"),
)
MLP = (("mlp.layers_0", "mlp.0"), ("mlp.layers_2", "mlp.2"))
TABLE = ("y_embedder.embedding_table._flax_embedding.embedding", "y_embedder.embedding_table.weight")
PATCHES = "x_embedder.proj"


def flax_recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    linear = {f"{k}._flax_linear.kernel" for k in ("h_embedder.mlp.layers_2", "blocks.layers_0.attn.qkv")}
    return linear | {TABLE[0], f"{PATCHES}.kernel"} <= keys


def from_flax(state: State, input_size: int) -> dict[str, Tensor]:
    """Flax names and axes -> ours. input_size: side of x, for the positions."""
    found: dict[str, Tensor] = {TABLE[1]: state[TABLE[0]]}
    found[f"{PATCHES}.weight"] = state[f"{PATCHES}.kernel"].permute(3, 2, 0, 1).contiguous()
    found[f"{PATCHES}.bias"] = state[f"{PATCHES}.bias"]
    for name, tensor in state.items():
        layer, _, kind = name.rpartition("._flax_linear.")
        if not layer:
            continue
        for theirs, own in (*RENAMED, *MLP):
            layer = layer.replace(theirs, own)
        found[f"{layer}.{'weight' if kind == 'kernel' else kind}"] = (
            tensor.T.contiguous() if kind == "kernel" else tensor
        )
    hidden, _, patch, _ = found[f"{PATCHES}.weight"].shape
    grid = input_size // patch
    found["pos_embed"] = torch.from_numpy(sincos_2d(hidden, grid, grid)).float()[None]
    return ours(found)


def to_flax(state: State) -> dict[str, Tensor]:
    """Ours -> Flax names and axes."""
    found: dict[str, Tensor] = {TABLE[0]: state[TABLE[1]]}
    found[f"{PATCHES}.kernel"] = state[f"{PATCHES}.weight"].permute(2, 3, 1, 0).contiguous()
    found[f"{PATCHES}.bias"] = state[f"{PATCHES}.bias"]
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if name in ("pos_embed", TABLE[1]) or layer == PATCHES:
            continue
        for theirs, own in (*RENAMED, *MLP):
            layer = layer.replace(own, theirs)
        matrix = kind == "weight"
        found[f"{layer}._flax_linear.{'kernel' if matrix else kind}"] = tensor.T.contiguous() if matrix else tensor
    return found


def flax(name: str, input_size: int) -> Layout:
    def to_ours(state: State) -> dict[str, Tensor]:
        return from_flax(state, input_size)

    def allows(config: Mapping[str, Any]) -> None:
        if config["input_size"] != input_size:
            said = f"this layout is of {input_size}x{input_size} inputs, the network takes {config['input_size']}"
            raise VgmError(said, "--to meanflow keeps the positions", USAGE)
        if config.get("qknorm"):
            said = "this layout is of networks whose queries and keys are not normalised"
            raise VgmError(said, "--to meanflow keeps them", USAGE)

    return Layout(
        name=name,
        component="meanflow",
        summary=f"Gsunshine/meanflow (params, ema_params), {8 * input_size} pixels",
        recognise=flax_recognise,
        to_ours=to_ours,
        from_ours=to_flax,
        config=lambda state: config(to_ours(state)),
        allows=allows,
        published=Published(header=header, assumes=lambda state, config: assumes(to_ours(state), config)),
    )


FLAX = flax("meanflow-flax", input_size=32)


# -- U-Net -----------------------------------------------------------------------------------------------------------


def unet_recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return {"map_layer0.weight", "map_layer1.bias"} <= keys and bool(
        any(re.fullmatch(r"dec\.\d+x\d+_aux_norm\.weight", k) for k in keys)
        and not keys & {"map_label.weight", "map_noise.freqs"}
    )


def unet_config(state: State) -> dict[str, Any]:
    """Constructor keywords of a state. VgmError: a network that is told one time, as EDM's own."""
    first = next(k for k in state if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", k))
    side = int(first.removeprefix("enc.").partition("x")[0])
    base, in_channels = state[first].shape[:2]
    emb, waves = state["map_layer0.weight"].shape
    if waves % (2 * base):
        raise VgmError("this U-Net is told one time, not two", "it is EDM's, not MeanFlow's", USAGE)
    sides = [side >> i for i in range(16) if f"enc.{side >> i}x{side >> i}_block0.conv1.weight" in state]
    mults = [state[f"enc.{s}x{s}_block0.conv1.weight"].shape[0] // base for s in sides]
    found = {
        "img_resolution": side,
        "in_channels": in_channels,
        "out_channels": state[f"dec.{side}x{side}_aux_conv.weight"].shape[0],
        "augment_dim": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
        "model_channels": base,
        "channel_mult": mults,
        "channel_mult_emb": emb // base,
        "num_blocks": sum(re.fullmatch(rf"enc\.{side}x{side}_block\d+\.conv0\.weight", k) is not None for k in state),
        "attn_resolutions": [s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in state],
        "channel_mult_noise": waves // (2 * base),
    }
    taps = next((v for k, v in state.items() if k.endswith("resample_filter")), None)
    if taps is not None and not taps.is_meta:
        row = taps[0, 0].float().sum(1)
        found["resample_filter"] = [round(v) for v in (row / row.min()).tolist()]
    return found


def unet_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released network: unconditional, unguided, one step; recipes/meanflow/cifar10.yaml."""
    size, channels = config["img_resolution"], config["in_channels"]
    facts = {"image_size": size, "image_channels": channels, "num_classes": 0, "size": size, "channels": channels}
    recipe = {"paper": "meanflow", "sampler": {"name": "meanflow", "steps": 1}}
    return {"view": view(False), "recipe": recipe, "data": {**facts, "sample_shape": [channels, size, size]}}


UNET = Layout(
    name="meanflow-unet",
    component="meanflow-unet",
    summary="Gsunshine/py-meanflow (net, net_ema, net_ema1, net_ema2)",
    recognise=unet_recognise,
    to_ours=dict,
    from_ours=dict,
    config=unet_config,
    published=Published(header=unet_header),
)
