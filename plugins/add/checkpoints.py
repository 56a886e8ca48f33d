"""Weights of StyleGAN-T's discriminator, whose heads ADD takes over. ADD's own discriminator was not released.

Official names are ours, below heads.; dino.* beside them is the frozen vision transformer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Files, Layout

from .discriminator import Heads

State = Mapping[str, Tensor]


def heads_config(state: State) -> dict[str, Any]:
    """Keywords of Heads, read off the shapes."""
    count = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("heads."))
    told = state.get("heads.0.cmapper.weight")
    config: dict[str, Any] = {"channels": tuple(len(state[f"heads.{k}.main.0.0.bias"]) for k in range(count))}
    return config if told is None else {**config, "c_dim": told.shape[1], "cmap_dim": told.shape[0]}


def complete(state: State) -> dict[str, Tensor]:
    """The heads' tensors. KeyError: one is missing."""
    with torch.device("meta"):
        names = Heads(**heads_config(state)).state_dict()
    return {name: state[name] for name in names}


def own(names: Iterable[str]) -> dict[str, str]:
    return {n: n for n in names if n.startswith("heads.")}


HEADS = Layout(
    name="stylegan-t-discriminator",
    component="add-discriminator",
    recognise=lambda names: (
        {"heads.0.main.0.0.weight_orig", "heads.0.main.1.fn.0.weight_v", "heads.0.cls.bias"} <= set(names)
    ),
    to_ours=complete,
    from_ours=complete,
    config=heads_config,
    files=Files(names=own),
    summary="heads of autonomousvision/stylegan-t's discriminator",
)
