"""The GAN half of DMD2: a small head on the fake score's own features.

Yin et al. 2024 (2405.14867), sec. 4.3; layers of tianweiy/DMD2@8d8fa55 (cls_pred_branch). Deviation: the official heads
are for maps of 8 x 8 and 32 x 32; this one is for any side, with the same layers at those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.api import HasFeatures
from vgm_cli.conditioning import Conditions
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import noise
from vgm_cli.ranges import Few, Width


class Head(nn.Sequential):
    """Strided convolutions down to one logit: (B, channels, side, side) -> (B, 1)."""

    def __init__(self, channels: Width = 768, side: Few = 8):
        layers: list[nn.Module] = []
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), norm(channels), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(channels, channels, side, side), norm(channels), nn.SiLU(), nn.Conv2d(channels, 1, 1)]
        super().__init__(*layers)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, config["channels"], config["side"], config["side"])}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


class Features:
    """Features of x_t as a network computes them: (B, C, h, w).

    layer: the name of one of its layers, None for its middle. Tokens become maps. VgmError: the network shows none.
    """

    def __init__(self, network: nn.Module, layer: str | None = None):
        if not isinstance(network, HasFeatures):
            raise VgmError(
                f"{type(network).__name__} shows the discriminator no features",
                "a network with `features` (docs/writing-a-plugin.md); or objective.gan_weight=0",
                USAGE,
            )
        self.network, self.layers = network, [network.middle if layer is None else layer]

    def __call__(self, view: Denoiser, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """At x_t (B, ...), host times t (B,); the network is fed as `view` feeds it. VgmError: no such layer."""
        inputs = view.input_of(x_t, t.double()), view.time_argument(t)
        (found,) = self.network.features(*inputs, self.layers, **cond)
        return as_map(found)


def as_map(features: Tensor) -> Tensor:
    """(B, T, D) tokens -> (B, D, side, side) where T is a square, else their mean (B, D, 1, 1); maps stay."""
    if features.ndim == 4:
        return features
    side = math.isqrt(features.shape[1])
    if side**2 == features.shape[1]:
        return features.transpose(1, 2).unflatten(2, (side, side))
    return features.mean(1)[:, :, None, None]


@torch.no_grad()
def head_for(network: nn.Module, features: Features, view: Denoiser, conditions: Conditions) -> Head:
    """A head of the size of the network's features; found by running it once on nothing."""
    where = next(network.parameters())
    x = torch.zeros(1, *network.sample_shape, device=where.device)  # type: ignore[misc]
    cond = conditions.example(1, where.device)["cond"]
    training = network.training
    network.eval()
    with torch.device("cpu"):
        noisiest = view.t_range()[1]
    t = torch.full((1,), noisiest, dtype=torch.float64, device=where.device)
    found = features(view, x, t, **cond)
    network.train(training)
    return Head(found.shape[1], found.shape[2])
