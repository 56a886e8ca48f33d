"""VDM's weights: flax's TrainState of google-research/vdm@dc27b98a, whose `ema_params` hold `score_model` and `gamma`.

Names here are joined by dots (score_model.down.block_0.conv1.kernel), as the host reads flax's files; slashes are read
too. Kernels of convolutions are HWIO, of dense layers (in, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.meta import on_meta

from .model import VDM

State = Mapping[str, Tensor]
PARTS = {"norm1": "GroupNorm_0", "norm2": "GroupNorm_1", "norm": "GroupNorm_0", "norm_out": "GroupNorm_0"}


def their_name(ours: str) -> str:
    """down.0.block.norm1.weight -> score_model.down.block_0.GroupNorm_0.scale."""
    *path, kind = ours.split(".")
    if path[0] == "gamma":
        return ours.replace(".weight", ".kernel")
    if path[0] in ("down", "mid", "up"):
        half, index, part, *rest = path
        number = str(int(index) + 1) if half == "mid" else index
        path = [half, f"{part}_{number}", *rest]
    norm = path[-1] in PARTS
    path = [*path[:-1], PARTS.get(path[-1], path[-1])]
    return ".".join(["score_model", *path, {"weight": "scale" if norm else "kernel"}.get(kind, kind)])


def to_theirs(ours: str, x: Tensor) -> Tensor:
    if not ours.endswith(".weight") or x.ndim == 1:
        return x
    if "nin_shortcut" in ours:  # a dense layer there
        x = x.flatten(1)
    return x.permute(2, 3, 1, 0).contiguous() if x.ndim == 4 else x.T.contiguous()


def from_theirs(ours: str, x: Tensor) -> Tensor:
    if not ours.endswith(".weight") or x.ndim == 1:
        return x
    x = x.permute(3, 2, 0, 1).contiguous() if x.ndim == 4 else x.T.contiguous()
    return x[:, :, None, None] if "nin_shortcut" in ours else x


def config_of(state: State) -> dict[str, Any]:
    """Constructor keywords from tensors of the layout; KeyError when one that tells is missing."""
    kernel, channels = state["score_model.conv_in.kernel"], state["score_model.conv_out.kernel"].shape[-1]
    blocks = [int(m[1]) for k in state if (m := re.match(r"score_model\.down\.block_(\d+)\.", k))]
    gamma = "fixed"
    if any(k.startswith("gamma.") for k in state):
        gamma = "learnable_nnet" if any(k.startswith("gamma.l") for k in state) else "learnable_scalar"
    return {
        "in_channels": channels,
        "n_embd": kernel.shape[-1],
        "n_layer": 1 + max(blocks, default=-1),
        "attention": any(k.startswith("score_model.up.attn_") for k in state),
        "fourier": kernel.shape[2] == 5 * channels,
        "gamma": gamma,
        "pinned": False,
    }


def to_ours(state: State) -> dict[str, Tensor]:
    with on_meta():
        names = VDM(**config_of(state)).state_dict()
    return {name: from_theirs(name, state[their_name(name)]) for name in names}


def from_ours(state: State) -> dict[str, Tensor]:
    return {their_name(name): to_theirs(name, x) for name, x in state.items()}


def recognise(names: Iterable[str]) -> bool:
    found = {name.replace("/", ".") for name in names}
    return {"score_model.conv_in.kernel", "score_model.mid.attn_1.q.kernel"} <= found


def allows(config: Mapping[str, Any]) -> None:
    """VgmError: the official code has no such network."""
    if config.get("gamma") == "learnable_nnet" and config.get("pinned", True):
        raise VgmError("officially the learned schedule moves its ends", "it takes model.pinned=false", USAGE)
    if config.get("norm_groups", 32) != 32:
        raise VgmError("officially every normalisation has 32 groups", code=USAGE)


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    return {
        "gamma_min": "gamma_min=-13.3 and gamma_max=5, as all published configurations have it",
        "levels": "levels=256, pixels of 8 bits",
        "norm_groups": "32 groups in every normalisation",
    }


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released networks: 32 pixels a side, 1,000 ancestral steps."""
    channels = config["in_channels"]
    facts = {"image_size": 32, "image_channels": channels, "num_classes": 0, "size": 32, "channels": channels}
    return {
        "view": {"name": "vdm"},
        "recipe": {"paper": "vdmpp", "sampler": {"name": "vdm", "steps": 1000}},
        "data": {**facts, "sample_shape": [channels, 32, 32]},
    }


CONVERTER = Layout(
    name="vdm",
    component="vdm",
    recognise=recognise,
    to_ours=to_ours,
    from_ours=from_ours,
    config=config_of,
    allows=allows,
    files=Files(names=lambda names: {name.replace("/", "."): name for name in names}),
    published=Published(header=header, assumes=assumes),
    summary="google-research/vdm: flax parameters by name",
)
