"""Samples of a Glow: every level's eps from its own normal draws times the temperature, then the flow backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgm_cli.api import Request, generators, seed_of
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Few, NonNegative, Width

from .model import Glow, dequantise, to_images


class GlowSampler:
    """temperature: of the priors; 0.7 for pictures, 1 for the model's own distribution."""

    def __init__(self, temperature: NonNegative = 0.7):
        self.temperature = temperature

    def __call__(self, model: Glow, request: Request) -> Tensor:
        eps = [self.temperature * request.randn(shape) for shape in model.latent_shapes(request.shape)]
        request.info["nfe"] = 1
        return to_images(model.cropped(model.decode(eps, request.cond.get("y"))), model.n_bits)


def interpolate(a: Sequence[Tensor], b: Sequence[Tensor], alpha: Tensor) -> list[Tensor]:
    """eps of two batches of images -> eps on the line between them: (B, ...) per level, alpha (B,)."""
    return [e + alpha.view(-1, 1, 1, 1) * (f - e) for e, f in zip(a, b)]


def attribute_direction(positive: Sequence[Tensor], negative: Sequence[Tensor]) -> list[Tensor]:
    """Mean eps of images with an attribute minus that of images without (sec. 5.2): (n, ...) per level -> (1, ...)."""
    return [p.mean(0, keepdim=True) - n.mean(0, keepdim=True) for p, n in zip(positive, negative)]


def manipulate(eps: Sequence[Tensor], direction: Sequence[Tensor], amount: Tensor) -> list[Tensor]:
    """Move images along an attribute's direction: amount (B,), negative to remove it."""
    return [e + amount.view(-1, 1, 1, 1) * d for e, d in zip(eps, direction)]


class InterpolationSampler:
    """Strips of images on straight lines in eps space (sec. 5.2): item i is point i mod `points` of strip i div
    `points`.

    Strip k goes from image 2k to image 2k + 1 of request.images, or between two draws from the prior at `temperature`
    that depend on (seed, k) alone. An item's label is used for both ends: a strip has one. VgmError: a single image.
    """

    grid_labels = "rows"

    def __init__(self, points: Few = 8, temperature: NonNegative = 0.7, seed: int = 0):
        if points < 2:
            raise VgmError(f"points={points}: a line has at least 2", code=USAGE)
        self.points, self.temperature, self.seed = points, temperature, seed
        self.grid_columns = points

    def __call__(self, model: Glow, request: Request) -> Tensor:
        y = request.cond.get("y")
        a, b = (self.ends(model, request, end, y) for end in (0, 1))
        alpha = torch.tensor([i % self.points / (self.points - 1) for i in request.index], device=request.device)
        request.info["nfe"] = 1 if request.images is None else 3
        return to_images(model.cropped(model.decode(interpolate(a, b, alpha), y)), model.n_bits)

    def ends(self, model: Glow, request: Request, end: int, y: Tensor | None) -> list[Tensor]:
        """eps of one end of every item's strip."""
        numbers = [2 * (i // self.points) + end for i in request.index]
        own = request.drawn_by(generators(seed_of("glow-interpolate", self.seed, k) for k in numbers))
        if request.images is None:
            return [self.temperature * own.randn(shape) for shape in model.latent_shapes(request.shape)]
        if len(request.images) < 2:
            raise VgmError(
                "interpolation needs two images for every strip", "--input DATA, -n the number of points", USAGE
            )
        return codes(model, own, request.images[[k % len(request.images) for k in numbers]], y)


class AttributeSampler:
    """Images moved along an attribute's direction (sec. 5.2): item i is point i mod `points` of image i div `points`,
    from `amount` against the attribute to `amount` towards it.

    request.images: the first `positive` of them have the attribute, the others lack it; all of them make the direction.
    VgmError: not some of each.
    """

    grid_labels = "rows"

    def __init__(self, positive: Width, points: Few = 5, amount: NonNegative = 1.0, seed: int = 0):
        if points < 2:
            raise VgmError(f"points={points}: a line has at least 2", code=USAGE)
        self.positive, self.points, self.amount, self.seed = positive, points, amount, seed
        self.grid_columns = points

    def __call__(self, model: Glow, request: Request) -> Tensor:
        images, y = request.images, request.cond.get("y")
        if images is None or not 0 < self.positive < len(images):
            raise VgmError(
                "an attribute needs images that have it and images that lack it",
                f"--input DATA whose first {self.positive} pictures (sampler.positive) have it",
                USAGE,
            )
        every = request.drawn_by(generators(seed_of("glow-attribute", self.seed, k) for k in range(len(images))))
        eps = codes(model, every, images.to(request.device), None if y is None else y[:1].expand(len(images)))
        direction = attribute_direction(*zip(*((e[: self.positive], e[self.positive :]) for e in eps)))
        numbers = [i // self.points % len(images) for i in request.index]
        amount = torch.tensor([i % self.points / (self.points - 1) * 2 - 1 for i in request.index])
        moved = manipulate([e[numbers] for e in eps], direction, self.amount * amount.to(request.device))
        request.info["nfe"] = 2
        return to_images(model.cropped(model.decode(moved, y)), model.n_bits)


def codes(model: Glow, request: Request, x: Tensor, y: Tensor | None) -> list[Tensor]:
    """eps of images (B, C, H, W) in [-1, 1], each dequantised by its own draw of the request."""
    x = model.padded(((x + 1) * 127.5).round())
    return model(dequantise(x, request.rand(tuple(x.shape[1:])), model.n_bits), y).eps
