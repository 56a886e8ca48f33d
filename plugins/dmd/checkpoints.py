"""Weights of EDM and DMD2 on ImageNet 64.

Official layouts: EDMPrecond's state dict (NVlabs/edm; DMD2's generator, pytorch_model.bin), our names below `model.`;
DMD2's guidance model (pytorch_model_1.bin) with real_unet., fake_unet., cls_pred_branch. and karras_sigmas, of which
the fake score and the discriminator are read. A released EDM .pkl is a pickled object: save its state dict first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Layout, Published
from vgm_cli.nets.edm import DhariwalUNet
from vgm_cli.nn.meta import on_meta

from .discriminator import Head

State = Mapping[str, Tensor]
BUFFERS = ("sigma_min", "sigma_max", "sigma_data", "sigma", "karras_sigmas")


def config_from(state: State, prefix: str = "model.") -> dict[str, Any]:
    """Constructor keywords read off the shapes; heads of 64 channels, as in every published one."""
    blocks = [k.removeprefix(prefix).split(".") for k in state if k.startswith(prefix + "enc.")]
    names = list(dict.fromkeys(b[1] for b in blocks))
    sides = sorted({int(n.split("x")[0]) for n in names}, reverse=True)
    first = f"{prefix}enc.{sides[0]}x{sides[0]}_conv.weight"
    emb, channels = state[f"{prefix}map_layer0.weight"].shape
    widths = [len(state[f"{prefix}enc.{s}x{s}_block0.conv0.bias"]) for s in sides]
    label = state.get(f"{prefix}map_label.weight")
    return {
        "img_resolution": sides[0],
        "in_channels": state[first].shape[1],
        "out_channels": len(state[f"{prefix}out_conv.bias"]),
        "num_classes": 0 if label is None else label.shape[1],
        "model_channels": channels,
        "channel_mult": [w // channels for w in widths],
        "channel_mult_emb": emb // channels,
        "num_blocks": sum(n.startswith(f"{sides[0]}x{sides[0]}_block") for n in names),
        "attn_resolutions": [s for s in sides if f"{prefix}enc.{s}x{s}_block0.qkv.weight" in state],
    }


def renamed(state: State, old: str, new: str) -> dict[str, Tensor]:
    """The tensors below `old`, moved below `new`; a missing tensor of the network is a KeyError."""
    config = config_from(state, old)
    with on_meta():
        wanted = DhariwalUNet(**config).state_dict()
    return {new + name: state[old + name] for name in wanted}


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """EDM's view of the network; a DMD2 generator is asked by `--sampler dmd`."""
    side, channels = config["img_resolution"], config["in_channels"]
    return {
        "view": {"name": "denoiser", "path": {"name": "edm"}, "prediction": "F", "time": "edm"},
        "recipe": {"paper": "dmd", "sampler": {"name": "edm", "steps": 18}},
        "data": {"sample_shape": [channels, side, side], "num_classes": config["num_classes"]},
    }


def network(name: str, prefix: str, summary: str) -> Layout:
    return Layout(
        name=name,
        component="edm-unet",
        recognise=lambda keys: has(keys, prefix),
        to_ours=lambda state: renamed(state, prefix, ""),
        from_ours=lambda state: renamed(state, "", prefix),
        config=lambda state: config_from(state, prefix),
        summary=summary,
        published=Published(header=header),
    )


def has(keys: Iterable[str], prefix: str) -> bool:
    return {f"{prefix}map_layer0.weight", f"{prefix}out_norm.weight", f"{prefix}out_conv.weight"} <= set(keys)


EDM = network("edm", "model.", "NVlabs/edm DhariwalUNet; tianweiy/DMD2 generators")
FAKE = network("dmd2-fake-score", "fake_unet.model.", "fake score in tianweiy/DMD2's guidance model")

BRANCH = "cls_pred_branch."


def head_to_ours(state: State) -> dict[str, Tensor]:
    head = {k.removeprefix(BRANCH): v for k, v in state.items() if k.startswith(BRANCH)}
    return {k: head[k] for k in Head(**head_config(state)).state_dict()}


def head_config(state: State) -> dict[str, Any]:
    """Channels and side: every layer but the last two convolutions halves it, the last but one ends it."""
    convs = [k for k, v in state.items() if k.startswith(BRANCH) and v.ndim == 4]
    convs.sort(key=lambda k: int(k.removeprefix(BRANCH).split(".")[0]))
    last = state[convs[-2]].shape[-1]
    return {"channels": state[convs[-1]].shape[1], "side": last * 2 ** (len(convs) - 2)}


HEAD = Layout(
    name="dmd2-discriminator",
    component="dmd-discriminator",
    recognise=lambda keys: any(k.startswith(BRANCH) for k in keys),
    to_ours=head_to_ours,
    from_ours=lambda state: {BRANCH + k: v for k, v in state.items()},
    config=head_config,
    summary="classification branch in tianweiy/DMD2's guidance model",
)
