"""Pictures that a sampling job starts from, and what is kept of them: img2img and inpainting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import CompletesImages, generators
from vgm_cli.conditioning import Conditions, Picture
from vgm_cli.data.decode import SUFFIXES
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.hints import Hint, Mask
from vgm_cli.operators.inpainting import Inpainting
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.ui import ui

STRENGTH = 0.75  # of img2img, the official script's


@dataclass(frozen=True)
class Given:
    """Pictures; item i of a job is of the i-th of them, from the first again."""

    source: str  # the data that they were read from
    images: Tensor  # (M, *shape) as the model sees them
    pixels: Tensor  # (M, C, H, W) in [-1, 1]
    mask: str | None = None  # as the user said it
    kept: Tensor | None = None  # (M, 1, H, W) bool, true where a picture is kept
    by_sampler: bool = False  # the sampler keeps it; else the network is told

    def rows(self, index: Sequence[int]) -> list[int]:
        return [i % len(self.images) for i in index]

    def of_request(self, index: Sequence[int]) -> dict[str, Any]:
        """Keywords of a request for the items of these numbers."""
        if self.kept is None:
            return {"images": self.images}
        rows = self.rows(index)
        return {"images": self.images[rows], "mask": self.kept[rows]} if self.by_sampler else {}

    def pasted(self, x: Tensor, index: Sequence[int]) -> Tensor:
        """Results (B, C, H, W) with what is kept as it was."""
        if self.kept is None:
            return x
        rows = self.rows(index)
        return torch.where(self.kept[rows].to(x.device), self.pixels[rows].to(x), x)

    def items(self, conditions: Conditions) -> dict[str, list[Any]]:
        """{condition: items} of the conditions that a network is told of masks by."""
        if self.kept is None:
            return {}
        found = [Picture(row) for row in Mask.joined(self.pixels, self.kept)]
        return {p.name: found for p in told_masks(conditions)}


def told_masks(conditions: Conditions) -> list[Any]:
    return [p for p in conditions.of_pictures() if isinstance(p.condition, Mask)]


def given_pictures(loaded: ckpt.Loaded, sampler: Any, source: str, mask: str | None, n: int) -> Given:
    """The first n pictures of a data set, a folder or a file. mask: what is kept of them, see the operator
    `inpainting`. VgmError: neither network nor sampler completes pictures, a mask of another size."""
    device = next(loaded.model.parameters()).device
    images = pixels = opened(source, loaded.header.data, n).to(device)
    if loaded.codec is not None:
        with torch.no_grad():
            images = loaded.codec.latents(loaded.codec.encode(pixels))
    if mask is None:
        return Given(source, images, pixels)
    told = bool(told_masks(loaded.conditions))
    if not told and not isinstance(sampler, CompletesImages):
        hint = "--sampler ldm keeps what a mask says, of diffusion models of discrete timesteps; or vgm restore --mask"
        raise VgmError("this sampler makes whole pictures, it keeps no part of one", hint, USAGE)
    operator = Inpainting(mask).bind(tuple(pixels.shape[1:]), generators(range(len(pixels))))
    assert operator.kept is not None
    kept = operator.kept.to(device).expand(len(pixels), -1, -1, -1)
    return Given(source, images, pixels, mask, kept, by_sampler=not told)


def opened(source: str, facts: Mapping[str, Any], n: int) -> Tensor:
    """(<= n, C, H, W) in [-1, 1] of a picture, or of data as for train, cut as training images are."""
    size, channels = facts.get("image_size"), facts.get("image_channels")
    if Path(source).is_file() and Path(source).suffix.lower() in SUFFIXES and size and channels:
        return torch.stack([item.pixels for item in Hint(size, channels, "image").parse([source])])
    from vgm_cli.data import open_dataset

    dataset = open_dataset(source, size=size, channels=channels)
    pixels: Tensor = dataset.pixels(range(min(n, len(dataset))))
    return pixels


def with_strength(node: dict[str, Any], strength: float | None, image: str | None, mask: str | None) -> dict[str, Any]:
    """The sampler's node with how far the given pictures go back to noise. VgmError: the sampler starts from noise
    alone."""
    known = signature(load_target(registry().find("sampler", node["name"]).target, node["name"])).parameters
    if strength is None:
        if image is None or mask is not None or node.get("strength") is not None or "strength" not in known:
            return node
        ui.info(f"strength {STRENGTH:g}: --strength says how much of the way back to noise the picture goes")
        return {**node, "strength": STRENGTH}
    if image is None:
        raise VgmError("--strength is of a picture to start from", "--image FILE", USAGE)
    if "strength" not in known:
        raise VgmError(f"the sampler {node['name']} starts from noise alone", "--sampler ldm", USAGE)
    return {**node, "strength": strength}
