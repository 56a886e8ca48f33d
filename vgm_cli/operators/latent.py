"""A degradation of images as a codec's latents see it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from vgm_cli.operators.base import SVD, Operator


class Decoded(Operator):
    """A(decode(z)) of latents z: (B, c, h, w): never linear, differentiable as far as the codec's decoder is.

    inner: the bound operator of images. codec: see vgm_cli.api.Codec.
    """

    linear = False
    latent = True

    def __init__(self, inner: Operator, codec: Any, shape: tuple[int, int, int]):
        self.inner, self.codec, self.shape = inner, codec, shape
        self.name, self.noise, self.items = f"{inner.name} of latents", inner.noise, inner.items

    def __call__(self, z: Tensor) -> Tensor:
        return self.inner(self.codec.decode(z.float()))

    def prox(self, z: Tensor, y: Tensor, weight: float) -> Tensor:
        """The proximal step of latents: decode, solve it for images in closed form, encode."""
        image = self.inner.prox(self.codec.decode(z.float()), y, weight)
        return self.codec.latents(self.codec.encode(image.clamp(-1, 1)))

    @cached_property
    def svd(self) -> SVD:
        raise self.not_linear("singular value decomposition")
