"""DiT weights in the official layout (facebookresearch/DiT@ed81ce2, and willisma/SiT@947f95b with the same tensors).

The layout's names are ours. What a paper says beside the tensors (the process, the sampler) is its plugin's: `header`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Layout, Published
from vgm_cli.errors import USAGE, VgmError

State = Mapping[str, Tensor]
Header = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Assumes = Callable[[State, Mapping[str, Any]], dict[str, str]]


def recognise(keys: Iterable[str]) -> bool:
    """DiT's names and nothing that only a descendant (LightningDiT, MAR, ...) has."""
    keys = set(keys)
    own = {"pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"}
    return own | {"blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.bias", "t_embedder.mlp.2.weight"} <= keys and not any(
        "norm" in k or "rope" in k or k.startswith("r_embedder") for k in keys
    )


def official(state: State) -> dict[str, Tensor]:
    """Official names are ours, both ways; a missing tensor is a KeyError."""
    for name in names(depth_of(state)):
        if name not in state:
            raise KeyError(name)
    return dict(state)


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords of an official state. A null class is assumed; heads follow the published widths."""
    hidden, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    out_channels = state["final_layer.linear.weight"].shape[0] // patch**2
    return {
        "input_size": round(state["pos_embed"].shape[1] ** 0.5) * patch,
        "patch_size": patch,
        "in_channels": in_channels,
        "hidden_size": hidden,
        "depth": depth_of(state),
        "num_heads": heads_of(hidden),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }


def depth_of(state: State, prefix: str = "blocks.") -> int:
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


PUBLISHED = {384: 6, 768: 12, 1024: 16, 1152: 16}  # heads by width


def heads_of(hidden: int) -> int:
    """64 channels per head as in S, B and L; 72 in XL; else the largest head size up to 64 that divides the width."""
    return PUBLISHED.get(hidden) or next(hidden // d for d in range(min(64, hidden), 0, -1) if hidden % d == 0)


def names(depth: int) -> list[str]:
    """Every tensor of a DiT, in the official layout."""
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    for i in range(depth):
        parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        layers += [f"blocks.{i}.{p}" for p in parts]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    tensors = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return ["pos_embed", "y_embedder.embedding_table.weight", *tensors]


def latents(config: Mapping[str, Any]) -> dict[str, Any]:
    """Data facts of the published networks: latents of an autoencoder of factor 8, ImageNet's classes."""
    size, channels, classes = config["input_size"], config.get("in_channels", 4), config.get("num_classes", 1000)
    image = {"image_size": 8 * size, "image_channels": 3}
    if channels in (1, 3):  # pixels
        image = {"image_size": size, "image_channels": channels}
    facts = {**image, "num_classes": classes, "size": size, "channels": channels}
    return {**facts, "sample_shape": [channels, size, size]}


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells, where the network is not of a published width with ImageNet's classes."""
    hidden, classes = config["hidden_size"], config["num_classes"]
    rows, found = classes + 1, {}
    if hidden not in PUBLISHED:
        width = hidden // heads_of(hidden)
        found["num_heads"] = f"num_heads={heads_of(hidden)}, heads of {width} channels (num_heads=N tells otherwise)"
    if rows != 1001:
        found["class_dropout_prob"] = (
            f"the {rows} rows of the label table are {classes} class{'' if classes == 1 else 'es'} and a null class "
            f"(num_classes={rows} class_dropout_prob=0: {rows} classes and none)"
        )
    return found


def plain(config: Mapping[str, Any]) -> None:
    """VgmError: the network is told two times or has LightningDiT's options, as none of this layout does."""
    if config.get("second_time"):
        raise VgmError("this layout is of networks that are told one time", "a .safetensors file keeps both", USAGE)
    if more := [k for k in ("swiglu", "rope", "rmsnorm", "qknorm", "wo_shift") if config.get(k)]:
        hint = "a .safetensors file keeps them"
        raise VgmError(f"this layout is of networks without {', '.join(more)}", hint, USAGE)


def converter(name: str, header: Header, summary: str, assumes: Assumes = assumes) -> Layout:
    """The converter of the official layout for the component `name`; header and assumes as in convert_api."""
    return Layout(
        name=name,
        component=name,
        summary=summary,
        recognise=recognise,
        to_ours=official,
        from_ours=official,
        config=config_from,
        allows=plain,
        published=Published(header=header, assumes=assumes),
    )
