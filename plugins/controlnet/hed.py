"""The soft edges of HED, as the ControlNets of soft edges and of fake scribbles are told them, by local weights.

Xie and Tu 2015 (arXiv 1504.06375); lllyasviel/ControlNet@ed85cd1 annotator/hed ControlNetHED_Apache2, whose names these
are. The weights are not in this package: ControlNetHED.pth goes through `vgm convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.convert_api import Layout, Proof
from vgm_cli.nets.hints import Hint
from vgm_cli.nn.example import noise
from vgm_cli.ranges import Side, Width

from .annotators import fake_scribble

BLOCKS = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # channels over `width`, and convolutions


class Block(nn.Module):
    """Convolutions, and one channel of edges of what they give."""

    def __init__(self, in_channels: int, channels: int, count: int):
        super().__init__()
        widths = [in_channels, *[channels] * count]
        self.convs = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)))
        self.projection = nn.Conv2d(channels, 1, 1)

    def forward(self, h: Tensor) -> Tensor:
        for conv in self.convs:
            h = F.relu(conv(h))
        return h


class HED(nn.Module):
    """Soft edges of RGB pictures (N, 3, H, W) in [0, 255]: (N, 1, H, W) logits."""

    def __init__(self, width: Width = 64):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # the mean colour
        widths = [3, *(width * times for times, _ in BLOCKS)]
        for i, (_, count) in enumerate(BLOCKS):
            self.add_module(f"block{i + 1}", Block(widths[i], widths[i + 1], count))

    def sides(self, x: Tensor) -> list[Tensor]:
        """Edges at the picture's size, a half, … a sixteenth of it: (N, 1, h, w) each."""
        h, found = x - self.norm, []
        for i in range(len(BLOCKS)):
            block = self.get_submodule(f"block{i + 1}")
            h = block(F.max_pool2d(h, 2) if i else h)
            found.append(block.projection(h))  # type: ignore[operator]
        return found

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        own = [F.interpolate(s, size, mode="bilinear", align_corners=False) for s in self.sides(x)]
        return torch.stack(own).mean(0)


class HEDHint(HED):
    """The condition `hed`: soft edges of the images as a hint (B, hint_channels, H, W) in [0, 1].

    Its weights are frozen: `conditions: {hint: {name: hed, weights: hint.safetensors}}`, the file carrying the name of
    the condition. VgmError: a picture of another shape.
    """

    choices: Sequence[Any] = ()
    draws = False

    def __init__(
        self,
        size: Side,  # of the images
        channels: Width,  # of the images
        column: str | None = None,  # of the data; None: the images themselves
        keyword: str = "hint",  # of the network
        scribbles: bool = False,  # the edges are made lines as thick as a pen's
        hint_channels: Width = 3,  # of the hint, all alike
        width: Width = 64,  # channels of the first convolutions
    ):
        super().__init__(width)
        self.pictures = Hint(size, channels, column or "image", keyword=keyword)
        self.column, self.reads, self.keyword = self.pictures.column, self.pictures.reads, keyword
        self.scribbles, self.hint_channels = scribbles, hint_channels
        self.requires_grad_(False)

    def parse(self, words: Sequence[str]) -> list[Any]:
        """Files of pictures -> items."""
        return self.pictures.parse(words)

    def items_of(self, columns: Mapping[str, Tensor], drawn: Sequence[torch.Generator]) -> Tensor:
        """The pictures (B, C, H, W) in [-1, 1]."""
        return self.pictures.items_of(columns, drawn)

    @torch.no_grad()
    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        x = self.pictures.encode(items, device)[self.pictures.keyword] * 255
        edges = self(x.expand(-1, 3, -1, -1)).sigmoid().mul(255).floor()
        if self.scribbles:
            made = [fake_scribble(e) for e in edges[:, 0].byte().cpu().numpy()]
            edges = torch.from_numpy(np.stack(made))[:, None].to(device).float()
        return {self.keyword: (edges / 255).expand(-1, self.hint_channels, -1, -1)}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        side = self.pictures.size
        return {self.keyword: torch.zeros(n, self.hint_channels, side, side, device=device)}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return self.null(n, device)


NEEDED = {"norm", "block1.convs.0.weight", "block5.projection.weight"}


def recognise(names: Iterable[str]) -> bool:
    return set(names) >= NEEDED


CONVERTER = Layout(
    name="hed",
    component="hed",
    kind="condition",
    recognise=recognise,
    to_ours=dict,
    from_ours=dict,
    config=lambda state: {"size": 512, "channels": 3, "width": len(state["block1.convs.0.bias"])},
    proof=Proof(forward=lambda network, config: network(noise(1, 3, 32, 32) * 50 + 128)),
    summary="ControlNet's soft-edge network (ControlNetHED.pth)",
)
