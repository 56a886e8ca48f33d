"""What the data is, as models are built for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from vgm_cli.api import PyramidTokenizer
from vgm_cli.engine.tokens import TokenCodec
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.settings import Data


@dataclass(kw_only=True)
class Facts:
    """What the model is built for. image_*: pixels; size/channels: as the model sees x, after the codec.

    vocab_size, grid: of a codec's tokens, 0 and () where the model sees none; then size is the grid's last side.
    scales: (h, w) of every grid of a pyramid of tokens, coarse to fine, () of any other codec; then size is the last
    grid's side, and channels those of the features that the grids add up to.
    """

    image_size: int
    image_channels: int
    size: int
    channels: int
    num_classes: int = 0
    class_names: list[str] = field(default_factory=list)
    vocab_size: int = 0
    grid: tuple[int, ...] = ()
    scales: tuple[tuple[int, int], ...] = ()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.grid or (self.channels, self.size, self.size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_channels, self.image_size, self.image_size)

    @classmethod
    def of_pixels(cls, size: int, channels: int, **classes: Any) -> Facts:
        """Images that the model sees as they are. classes: num_classes, class_names."""
        return cls(image_size=size, image_channels=channels, size=size, channels=channels, **classes)

    def after(self, codec: Any) -> Facts:
        """The same data behind a codec."""
        shape = tuple(codec.latent_shape(self.image_shape))
        if not isinstance(codec, TokenCodec):
            return replace(self, size=shape[1], channels=shape[0], vocab_size=0, grid=(), scales=())
        of_tokens = replace(self, channels=1, size=shape[-1], vocab_size=codec.vocab_size, grid=shape, scales=())
        tokenizer = codec.codec
        if not isinstance(tokenizer, PyramidTokenizer):
            return of_tokens
        scales = tuple((h, w) for h, w in tokenizer.scales(self.image_shape))
        if shape != (sum(h * w for h, w in scales),):
            name = type(tokenizer).__name__
            raise VgmError(f"{name} says token_shape={shape}, its scales {scales} have other positions", code=USAGE)
        return replace(of_tokens, size=scales[-1][1], channels=tokenizer.code_vectors().shape[1], scales=scales)


def declared_facts(data: Data) -> Facts:
    """Facts from the recipe alone, for --plan without data."""
    if data.path == "mnist5k" and data.size is None:
        return Facts.of_pixels(28, 1, num_classes=10)  # the shipped set
    missing = [k for k in ("size", "channels") if getattr(data, k) is None]
    if missing:
        raise VgmError(
            f"without the data, {' and '.join('data.' + m for m in missing)} must be given",
            "example: data.size=256 data.channels=3 data.num_classes=1000",
            USAGE,
        )
    assert data.size and data.channels
    return Facts.of_pixels(data.size, data.channels, num_classes=data.num_classes or 0)


def facts_of(dataset: Any, labelled: bool) -> Facts:
    held = dataset.facts
    classes = (held.num_classes or 0) if labelled else 0
    return Facts.of_pixels(held.size, held.channels, num_classes=classes, class_names=list(held.class_names or []))
