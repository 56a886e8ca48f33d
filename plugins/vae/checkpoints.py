"""pythae's VAE (clementchadebec/benchmark_VAE@6419e21): `model.pt` with {"model_state_dict": ...}; our names are its.

Its default networks are perceptrons with ReLU and a sigmoid output. The state tells neither the likelihood ("bce" or
"mse", the latter a Gaussian of unit variance) nor channels and size: a Bernoulli over square grey images is assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError

State = Mapping[str, Tensor]
HEADS = ("encoder.embedding", "encoder.log_var")


def depth_of(state: State) -> int:
    """Hidden layers of the encoder."""
    return 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.layers\.(\d+)\.0\.weight", k)))


def names(depth: int) -> list[str]:
    layers = [f"encoder.layers.{i}.0" for i in range(depth)] + [f"decoder.layers.{i}.0" for i in range(depth + 1)]
    return [f"{layer}.{kind}" for layer in (*layers, *HEADS) for kind in ("weight", "bias")]


def same(state: State) -> dict[str, Tensor]:
    """The names are the same both ways; KeyError when one is missing."""
    return {k: state[k] for k in names(depth_of(state))}


def recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return {"encoder.embedding.weight", "encoder.log_var.weight", "decoder.layers.1.0.weight"} <= keys


def config_from(state: State) -> dict[str, Any]:
    """VgmError: the number of pixels is no square."""
    depth = depth_of(state)
    pixels = state["encoder.layers.0.0.weight"].shape[1]
    if math.isqrt(pixels) ** 2 != pixels:
        raise VgmError(f"{pixels} pixels are no square grey image", "give size and channels yourself", USAGE)
    return {
        "size": math.isqrt(pixels),
        "channels": 1,
        "latent_dim": state["encoder.embedding.weight"].shape[0],
        "architecture": "mlp",
        "hidden": [state[f"encoder.layers.{i}.0.weight"].shape[0] for i in range(depth)],
        "activation": "relu",
        "likelihood": "bernoulli",
    }


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a converted network is sampled."""
    size, channels = config["size"], config["channels"]
    facts = {"image_size": size, "image_channels": channels, "num_classes": 0, "size": size, "channels": channels}
    recipe = {"paper": "vae", "sampler": {"name": "vae"}}
    return {"recipe": recipe, "data": {**facts, "sample_shape": [channels, size, size]}}


def allows(config: Mapping[str, Any]) -> None:
    """VgmError: not pythae's default networks."""
    if config.get("architecture", "mlp") != "mlp" or config.get("activation", "tanh") != "relu":
        raise VgmError("pythae's default networks are perceptrons with ReLU", code=USAGE)


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """Neither the likelihood nor the images' form is in a tensor."""
    size, channels = config["size"], config["channels"]
    return {
        "likelihood": f"likelihood={config['likelihood']} (likelihood=gaussian tells otherwise)",
        "size": f"{channels}x{size}x{size} images (size=N channels=N tell otherwise)",
    }


CONVERTER = Layout(
    name="vae-pythae",
    component="vae",
    recognise=recognise,
    to_ours=same,
    from_ours=same,
    config=config_from,
    allows=allows,
    files=Files(wrapper="model_state_dict"),
    published=Published(header=header, assumes=assumes),
    summary="pythae's VAE with its default perceptrons",
)
