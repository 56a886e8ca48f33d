"""Weights that a network starts from, `weights: RUN|FILE` of its node: all of them, or with `partial: true` those that
fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import fit
from vgm_cli.ui import some, ui


def initialise(network: nn.Module, node: Mapping[str, Any]) -> nn.Module:
    """The network with the weights that its node names. VgmError: they are another network's; with `partial`: not one
    tensor fits."""
    weights = node.get("weights")
    partial = fit(node.get("partial", False), bool, "partial")
    if not weights or next((p.is_meta for p in network.parameters()), False):
        return network
    path = ckpt.resolve(weights)
    tensors, metadata = ckpt.read_tensors(path)
    name = str(node.get("name", type(network).__name__))
    if "vgm.component" in metadata and not partial:
        refuse_other(ckpt.Header.parse(metadata, path), name, path)
    state = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    if partial:
        state = fitting(network, state, path, name)
    else:
        ckpt.check_fit(network, state, path, name, USAGE)
    ckpt.refuse_non_finite(state, path)
    network.load_state_dict(state, strict=not partial)
    return network


def fitting(network: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a state that the network has in the same shape; what is left is told. VgmError: there are none."""
    own = network.state_dict()
    taken = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not taken:
        raise VgmError(f"no tensor of {path} fits {name}", f"`vgm inspect {path}` says what it holds", USAGE)
    for what, names in (("start anew", own.keys() - taken.keys()), ("are left out", state.keys() - taken.keys())):
        if names:
            ui.warn(f"of {path} {len(taken)} tensors are taken; {len(names)} {what}: {some(sorted(names), 4)}")
    return taken


def refuse_other(header: ckpt.Header, name: str, path: Path) -> None:
    """VgmError: the file says that its weights are another component's."""
    if (held := header.component["name"]) != name:
        raise VgmError(f"{path} holds {article(held)}, not {article(name)}", f"`vgm inspect {path}` says more", USAGE)


def article(name: str) -> str:
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"
