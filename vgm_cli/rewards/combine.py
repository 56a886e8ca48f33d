"""Rewards made of rewards: weighted sums, and any function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Movable
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.registry import load_code, registry

Terms = Mapping[str, Any]  # {name: weight} or {name: {weight: 1.0, option: ...}}


class Function:
    """target: "module:function" called with (images, batch); it may give a tensor, an array or a list of B numbers."""

    def __init__(self, target: str):
        self.name, self.function = target, load_code(target, "reward")
        if not callable(self.function):
            raise VgmError(f"the reward '{target}' is not a function", "a function of (images, batch)", USAGE)

    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return torch.as_tensor(self.function(images, batch), dtype=torch.float32, device=images.device)


class Weighted:
    """Sum of weight times reward. `parts` keeps what each gave in the last call, unweighted: {name: (B,)}.

    terms: {"ink": 1.0, "confidence": {"weight": 0.5, "log": true}}; a name "module:function" is such a function.
    VgmError: no terms, unknown rewards or options, a reward that gives something else than B finite numbers.
    """

    def __init__(self, terms: dict[str, Any]):
        if not terms:
            raise VgmError("no reward is given", "--reward NAME=WEIGHT; `vgm ls rewards` shows them", USAGE)
        self.weights: dict[str, float] = {}
        self.rewards: dict[str, Any] = {}
        for name, value in terms.items():
            options = dict(value) if isinstance(value, Mapping) else {"weight": value}
            weight = options.pop("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise VgmError(f"the weight of reward '{name}' is {weight!r}, not a number", f"{name}=1.0", USAGE)
            self.weights[name] = float(weight)
            node = {"name": "function", "target": name} if ":" in name else {"name": name}
            self.rewards[name] = registry().build("reward", {**node, **options})
        self.parts: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> None:
        for reward in self.rewards.values():
            if isinstance(reward, Movable):
                reward.to(device)

    def __call__(self, images: Tensor, batch: Mapping[str, Any]) -> Tensor:
        self.parts = {}
        for name, reward in self.rewards.items():
            value = reward(images, batch)
            if value.shape != (len(images),):
                given = f"{tuple(value.shape)} for {len(images)} images"
                raise VgmError(f"the reward '{name}' gives {given}", "one number per image is expected", FAILED)
            if not bool(torch.isfinite(value).all()):
                raise VgmError(f"the reward '{name}' gives numbers that are not finite", code=FAILED)
            self.parts[name] = value.float()
        return torch.stack([self.weights[n] * v for n, v in self.parts.items()]).sum(0)
