"""Images of a style-based generator: truncation and style mixing (arXiv 1812.04948, sec. 2, 3.1 and app. B)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.api import Request, generators, seed_of
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import Few

from .layers import StyleGenerator

Noise = Literal["random", "const", "none"]


def noise_inputs(model: StyleGenerator, request: Request, kind: Noise) -> list[Tensor] | None:
    """Noise inputs of the synthesis network: "random", drawn per item; "const", the maps stored with the weights;
    "none", zeros."""
    if kind == "const":
        return model.fixed_noise()
    if kind == "none" or not model.noise_shapes:
        return None
    return model.split_noise(request.randn((sum(math.prod(s) for s in model.noise_shapes),)))


class StyleGANSampler:
    """truncation_psi: how far styles may lie from their mean: 1 leaves them, 0.7 trades variety for quality, 0 is the
    mean image. truncation_cutoff: layers that are truncated, from the first; None for all (8 in the paper). noise:
    random, const (stored with the weights) or none.
    """

    def __init__(self, truncation_psi: float = 1.0, truncation_cutoff: int | None = None, noise: Noise = "random"):
        self.psi, self.cutoff, self.noise = truncation_psi, truncation_cutoff, noise

    def __call__(self, model: StyleGenerator, request: Request) -> Tensor:
        z = request.randn((model.latent_size,))
        noise = noise_inputs(model, request, self.noise)
        request.info["nfe"] = 1
        return model(z, request.cond.get("y"), noise, self.psi, self.cutoff)


LAYERS = {"coarse": (0, 4), "middle": (4, 8), "fine": (8, 18)}


def layer_range(layers: str, count: int) -> list[int]:
    """ "coarse", "middle", "fine" (sides 4-8, 16-32, 64 and more), or numbers such as "0-3" and "4,6" -> layers."""
    if layers in LAYERS:
        return list(range(*LAYERS[layers]))[: max(count - LAYERS[layers][0], 0)]
    chosen: list[int] = []
    for part in layers.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise unknown("layers", layers, [*LAYERS, f"0-{count - 1}"])
        chosen += range(int(first), int(last or first) + 1)
    return [i for i in chosen if i < count]


class StyleMixingSampler:
    """A table: left column and top row are images of their own, the image at a crossing has the row's styles, in
    `layers` the column's. The first item is left grey.

    columns: of the table, without the left one, so that items 0 to columns are the top row. layers: see layer_range.
    Sources depend on (seed, their number) alone. A label is its column's, the left one included.
    """

    def __init__(
        self,
        columns: Few = 7,
        layers: str = "coarse",
        truncation_psi: float = 0.7,
        truncation_cutoff: int | None = None,
        noise: Noise = "const",
        seed: int = 0,
    ):
        if columns < 1:
            raise VgmError(f"columns={columns}: a table has at least 1", code=USAGE)
        self.columns, self.layers, self.seed = columns, str(layers), seed
        self.grid_columns = columns + 1
        self.psi, self.cutoff, self.noise = truncation_psi, truncation_cutoff, noise

    def __call__(self, model: StyleGenerator, request: Request) -> Tensor:
        y = request.cond.get("y")
        places = [divmod(i, self.columns + 1) for i in request.index]
        rows = self.styles(model, request, "row", [r for r, _ in places], y)
        columns = self.styles(model, request, "column", [c for _, c in places], y)
        chosen = layer_range(self.layers, model.num_layers)
        ws = rows.clone()
        ws[:, chosen] = columns[:, chosen]
        row, column = (torch.tensor([p[k] for p in places], device=request.device) for k in (0, 1))
        ws = torch.where((column == 0)[:, None, None], rows, ws)
        ws = torch.where((row == 0)[:, None, None], columns, ws)
        request.info["nfe"] = 1
        images = model.synthesis(ws, noise_inputs(model, request, self.noise))
        return images * ((row > 0) | (column > 0))[:, None, None, None]

    def styles(
        self, model: StyleGenerator, request: Request, side: str, numbers: list[int], y: Tensor | None
    ) -> Tensor:
        own = request.drawn_by(generators(seed_of("style mixing", self.seed, side, k) for k in numbers))
        return model.styles(model.map(own.randn((model.latent_size,)), y), self.psi, self.cutoff)
