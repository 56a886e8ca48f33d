"""Weights drawn by name, the same wherever they are drawn: what an official network computed with them once is kept in
oracles/feature-networks.safetensors, and ours must compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vgm_cli.api import seed_of


def seeded_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict: matrices scaled by their fan-in, norms about 1, biases about 0, variances in [0.5, 1.5)."""
    state = {}
    for name, shape in shapes.items():
        g = torch.Generator().manual_seed(seed_of("feature weights", name))
        last = name.rsplit(".", 1)[-1]
        if last in ("num_batches_tracked", "position_ids"):
            state[name] = torch.zeros(tuple(shape), dtype=torch.long)
        elif last == "running_var":
            state[name] = torch.rand(tuple(shape), generator=g) + 0.5
        elif len(shape) >= 2 and last in ("weight", "in_proj_weight"):
            state[name] = torch.randn(tuple(shape), generator=g) * (2 / prod(shape[1:])) ** 0.5
        elif last in ("weight", "gamma", "lambda1"):
            state[name] = 1 + 0.1 * torch.randn(tuple(shape), generator=g)
        else:
            state[name] = 0.1 * torch.randn(tuple(shape), generator=g)
    return state


def lpips_weights(folder: Path) -> tuple[Path, Path]:
    """VGG16 and the heads of LPIPS with drawn weights, in torchvision's and lpips' layouts."""
    from vgm_cli.nets.vgg import WIDTHS, VGG16Features

    with torch.device("meta"):
        layout = {k: v.shape for k, v in VGG16Features().state_dict().items()}
    torch.save(seeded_state(layout), folder / "vgg.pth")
    heads = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(WIDTHS)}
    torch.save({k: v.abs() for k, v in seeded_state(heads).items()}, folder / "heads.pth")
    return folder / "vgg.pth", folder / "heads.pth"
