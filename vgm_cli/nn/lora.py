"""Low-rank adapters on the Linear and convolution layers of any network, in place. Hu et al. 2021 (2106.09685).

A layer's output gets (alpha / rank) B A x on top. Names of the network's own weights stay as they are; a layer X gains
X.lora_A (rank, in, ...) and X.lora_B (out, rank, ...), B at zero, so that attaching changes nothing. Code that reads
X.weight instead of calling X (attention written with einsum, nn.MultiheadAttention) sees the adapted weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError, nearest

Init = Literal["gaussian", "kaiming"]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
A, B = "lora_A", "lora_B"


# -- attaching -------------------------------------------------------------------------------------------------------


def attach(
    network: nn.Module,
    rank: int = 32,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    init: Init = "gaussian",
) -> list[str]:
    """Freeze the network and add trainable adapters; gives the names of the adapted layers.

    alpha: the update is scaled by alpha / rank, None for alpha = rank. targets: layers whose name is one of these or
    ends with it after a dot ("attn.qkv"), None for every layer that can be. init of A: gaussian, standard deviation
    1 / rank, or kaiming, as of a linear layer (PEFT's two). VgmError: no layer fits, or adapters are there already.
    """
    if rank < 1:
        raise VgmError(f"lora rank {rank}: at least 1 is needed", code=USAGE)
    if adapted(network):
        raise VgmError("this network has adapters already", "merge them first", USAGE)
    layers = adaptable(network)
    chosen = {n: m for n, m in layers.items() if targets is None or matches(n, targets)}
    missing = [t for t in targets or () if not any(matches(n, [t]) for n in layers)]
    if missing or not chosen:
        known = sorted({n.rpartition(".")[2] for n in layers})
        close = nearest(missing[0], layers, 2) if missing else []
        hint = f"did you mean {', '.join(close)}?" if close else f"layers end with {', '.join(known[:8])}"
        raise VgmError(f"no layer for lora target '{missing[0] if missing else targets}'", hint, USAGE)
    network.requires_grad_(False)
    for module in chosen.values():
        adapt(module, rank, rank if alpha is None else alpha, init)
    return list(chosen)


def matches(name: str, targets: Sequence[str]) -> bool:
    """Is the layer's name a target, or does it end with one at a dot?"""
    return any(name == t or name.endswith(f".{t}") for t in targets)


def adaptable(network: nn.Module) -> dict[str, nn.Module]:
    """Linear and ungrouped convolution layers by name, those with a forward of their own left out."""
    return {name: m for name, m in network.named_modules() if plain_linear(m) or plain_conv(m)}


def plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def plain_conv(module: nn.Module) -> bool:
    own = next((c for c in CONVS if isinstance(module, c)), None)
    return own is not None and type(module).forward is own.forward and module.groups == 1  # type: ignore[return-value]


class Adapted:
    """What adapting mixes into the class of a layer."""

    _parameters: dict[str, Tensor]
    lora_A: Tensor
    lora_B: Tensor
    lora_scale: float
    lora_enabled: bool

    @property
    def weight(self) -> Tensor:
        """The adapted weight, for those who read it."""
        weight = self._parameters["weight"]
        return weight + self.lora_scale * delta(self.lora_A, self.lora_B) if self.lora_enabled else weight


class AdaptedLinear(Adapted):
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self._parameters["weight"], self.bias)
        return out + self.lora_scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.lora_enabled else out


class AdaptedConv(Adapted):
    bias: Tensor | None
    _conv_forward: Any  # the layer's own stride and padding

    def forward(self, x: Tensor) -> Tensor:
        out = self._conv_forward(x, self._parameters["weight"], self.bias)
        if not self.lora_enabled:
            return out
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.lora_B.ndim]
        return out + self.lora_scale * conv(self._conv_forward(x, self.lora_A, None), self.lora_B)


def adapt(module: nn.Module, rank: int, alpha: float, init: Init) -> None:
    """One layer."""
    weight = module._parameters["weight"]
    assert weight is not None
    ones = [1] * (weight.ndim - 2)
    down, up = weight.new_empty(rank, *weight.shape[1:]), weight.new_zeros(weight.shape[0], rank, *ones)
    if init == "gaussian":
        nn.init.normal_(down, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    module.register_parameter(A, nn.Parameter(down))
    module.register_parameter(B, nn.Parameter(up))
    module.lora_scale, module.lora_enabled = alpha / rank, True  # type: ignore[assignment]
    mixin = AdaptedLinear if isinstance(module, nn.Linear) else AdaptedConv
    module.__class__ = adapted_class(mixin, type(module))  # type: ignore[arg-type]  # mypy: classes are not hashable


@cache
def adapted_class(mixin: type, layer: type) -> type:
    """One class for all layers of a kind."""
    return type(f"Adapted{layer.__name__}", (mixin, layer), {})


def adapted(network: nn.Module) -> dict[str, Any]:
    """The layers that carry adapters, by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, Adapted)}


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """The network without its adapters, for a frozen reference."""
    layers = adapted(network).values()
    for module in layers:
        module.lora_enabled = False
    try:
        yield
    finally:
        for module in layers:
            module.lora_enabled = True


# -- merging ---------------------------------------------------------------------------------------------------------


def delta(down: Tensor, up: Tensor) -> Tensor:
    """B A as one weight: down (r, in, ...), up (out, r, ...) -> (out, in, ...)."""
    return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def merged_state(network: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of the plain network with the updates folded in. state: this network's or an average's, None for its
    own; not changed."""
    state = network.state_dict() if state is None else state
    plain = {k: v.detach() for k, v in state.items() if k.rpartition(".")[2] not in (A, B)}
    for name, module in adapted(network).items():
        update = module.lora_scale * delta(state[f"{name}.{A}"].detach(), state[f"{name}.{B}"].detach())
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + update.to(plain[f"{name}.weight"])
    return plain


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Fold the updates into the weights and take the adapters off, in place."""
    state = merged_state(network)
    for name, module in adapted(network).items():
        module._parameters["weight"].copy_(state[f"{name}.weight"])
        del module.lora_A, module.lora_B, module.lora_scale, module.lora_enabled
        module.__class__ = type(module).__bases__[1]


# -- adapter files ---------------------------------------------------------------------------------------------------


def to_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapter -> the names of PEFT's adapter_model.safetensors."""
    return {f"base_model.model.{k}.weight": v for k, v in state.items()}


def peft_config(rank: int, alpha: float, layers: Sequence[str]) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
    return config | {"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "base_model_name_or_path": None}
