"""Exponential moving averages of network weights, several at once.

Profiles: a constant decay (0.9999), the same with warm-up min(decay, (1 + n) / (10 + n)) as in TensorFlow (n from 0)
and LDM's LitEma (n from 1), a half-life in images as GANs state it (NVlabs' StyleGANs: decay 0.5^(batch / half_life),
with a ramp at most that share of the images seen), and the power function of EDM2 (arXiv 2312.02696, eq. 121: beta(n) =
(1 - 1/n)^(gamma + 1), gamma from the relative width sigma_rel), whose averages can be combined after training. Each
may be updated at every k-th step only: a decay is then that of one update, a half-life and a width mean what they do at
every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.engine.train.sharding import assign, local
from vgm_cli.settings import check_average


class EMA:
    """One average of a network's parameters; buffers are copied. config: a decay, or one of the mappings
    {decay: 0.9999}, {decay: 0.9999, warmup: 1} (the n of the first step), {decay: 0.9, every: 8}, {half_life: 10000}
    (images), {half_life: 500000, ramp: 0.05}, {sigma_rel: 0.05}. batch_size: images per step, for half-lives."""

    def __init__(self, network: nn.Module, config: float | Mapping[str, float], batch_size: int = 1):
        self.config = check_average(config)
        self.batch_size, self.every = batch_size, int(self.config.get("every", 1))
        self.gamma = _gamma(self.config["sigma_rel"]) if "sigma_rel" in self.config else None
        self.updates = 0
        self.source = network
        state = network.state_dict(keep_vars=True)
        self.names = [k for k, v in state.items() if v.dtype.is_floating_point and isinstance(v, nn.Parameter)]
        self.average = {k: v.detach().clone() for k, v in state.items()}

    @property
    def name(self) -> str:
        """Used in file names: "ema-0.9999", "ema-half-10000", "ema-power-0.05"."""
        if "half_life" in self.config:
            return f"ema-half-{self.config['half_life']:g}"
        return f"ema-power-{self.config['sigma_rel']:g}" if self.gamma is not None else f"ema-{self.config['decay']:g}"

    def decay(self) -> float:
        """Decay of the coming update (self.updates counts the steps done)."""
        if self.gamma is not None:
            return (1 - self.every / (self.updates + 1)) ** (self.gamma + 1)
        if "half_life" in self.config:
            life = self.config["half_life"]
            if "ramp" in self.config:
                life = min(life, self.updates * self.batch_size * self.config["ramp"])
            return float(0.5 ** (self.every * self.batch_size / max(life, 1e-8)))
        decay = self.config["decay"]
        if "warmup" not in self.config:
            return decay
        n = self.updates + self.config["warmup"]
        return min(decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self) -> None:
        """average += (1 - decay) (weights - average); called once per optimizer step."""
        if (self.updates + 1) % self.every:
            self.updates += 1
            return
        weight = 1 - self.decay()
        live = self.source.state_dict(keep_vars=True)
        average = [local(self.average[k]) for k in self.names]
        torch._foreach_lerp_(average, [local(live[k].detach()) for k in self.names], weight)
        for k in self.average.keys() - set(self.names):
            self.average[k].copy_(live[k])
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        if state.keys() != self.average.keys():
            raise ValueError("the EMA's tensors do not fit the network")
        for k, v in state.items():
            assign(self.average[k], v)
        self.updates = updates


def _gamma(sigma_rel: float) -> float:
    """The exponent whose averaging profile has relative width sigma_rel: the real root of
    (g+1)^(1/2) (g+2)^-1 (g+3)^(-1/2) = sigma_rel, by bisection (the left side falls with g)."""
    low, high = 0.0, 1e6
    for _ in range(200):
        mid = (low + high) / 2
        width = ((mid + 1) / (mid + 3)) ** 0.5 / (mid + 2)
        low, high = (mid, high) if width > sigma_rel else (low, mid)
    return (low + high) / 2


def swap_in(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copy `state` into the network and return what was there, for sampling from an average in mid-training."""
    before = {k: v.detach().clone() for k, v in network.state_dict().items()}
    network.load_state_dict(dict(state))
    return before
