"""A plugin of one small denoiser that follows pictures, for the tests of conditions: `vgm --plugin hinted.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.hookspecs import Component, hookimpl

requires_api = 1


class Hinted(nn.Module):
    """x, its time and a picture (N, hint_channels, H, W) beside it -> (N, C, H, W); mask and masked, where they are
    given, are pictures like the hint."""

    def __init__(self, channels: int = 3, hint_channels: int = 1, width: int = 8):
        super().__init__()
        self.into = nn.Conv2d(channels + hint_channels + 1, width, 3, padding=1)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, hint: Tensor | None = None, **more: Any) -> Tensor:
        pictures = [p for p in (hint, more.get("mask"), more.get("masked")) if p is not None]
        time = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:]).to(x)
        return self.out(torch.tanh(self.into(torch.cat([x, *pictures, time], 1))))


@hookimpl
def vgm_components() -> list[Component]:
    return [
        Component(
            kind="model",
            name="hinted",
            target="vgm_local_hinted:Hinted",
            from_data={"channels": "channels"},
            denoiser=True,
            summary="a test's network",
        )
    ]
