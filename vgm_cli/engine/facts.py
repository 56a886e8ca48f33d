"""What is known of the data when a model is built for it: sizes, channels, classes, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vgm_cli.api import PyramidTokenizer
from vgm_cli.data import Dataset
from vgm_cli.data.texts import vocabulary
from vgm_cli.engine.tokens import TokenCodec
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.hookspecs import Component
from vgm_cli.recipe import Recipe
from vgm_cli.registry import registry
from vgm_cli.settings import Data

CAPTIONS, WORDS = 100_000, 8192  # captions that are read for their words, words that are kept


@dataclass(kw_only=True)
class Facts:
    """The data as a model is built for it: images of pixels, and what the model sees of them behind a codec."""

    image_size: int  # side of the images in pixels
    image_channels: int  # channels of the images
    size: int  # side of x as the model sees it; of tokens, the grid's last side
    channels: int  # channels of x as the model sees it; of tokens 1, of a pyramid those of the grids' features
    num_classes: int = 0  # 0: unlabelled
    class_names: list[str] = field(default_factory=list)  # one per class, or empty
    vocab_size: int = 0  # ids are in [0, vocab_size); 0: the model sees no tokens
    grid: tuple[int, ...] = ()  # shape of an image's tokens, (h, w) or (L,)
    scales: tuple[tuple[int, int], ...] = ()  # (h, w) of every grid of a pyramid of tokens, coarse to fine
    captions: bool = False  # whether there are any
    columns: dict[str, int] = field(default_factory=dict)  # channels of the pictures that are read with the images
    words: list[str] = field(default_factory=list)  # of the captions, commonest first, where a condition asks for them

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one item as the model sees it: (channels, size, size), or the grid of tokens."""
        return self.grid or (self.channels, self.size, self.size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.image_channels, self.image_size, self.image_size)

    @classmethod
    def of_pixels(cls, size: int, channels: int, **further: Any) -> Facts:
        """Facts of images that the model sees directly. further: num_classes, class_names, captions, columns."""
        return cls(image_size=size, image_channels=channels, size=size, channels=channels, **further)

    def after(self, codec: Any) -> Facts:
        """Facts of the same data behind a codec, from the shapes of its latents or tokens."""
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
    """Facts from the recipe alone, for `--plan` where the data is missing. VgmError: the recipe does not say enough."""
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
    told = {"captions": bool(held.captions), "columns": dict(held.columns)}
    names = list(held.class_names or [])
    return Facts.of_pixels(held.size, held.channels, num_classes=classes, class_names=names, **told)


def facts_for(recipe: Recipe, dataset: Any) -> Facts:
    """Facts of the recipe's data as its conditions use it: with its labels, and with the words of its captions."""
    facts = facts_of(dataset, labelled(recipe, dataset))
    open_ones = [node for c, node in conditions_in(recipe) if "words" in c.from_data and not node.get("words")]
    return replace(facts, words=words_of(dataset)) if open_ones else facts


def words_of(dataset: Any) -> list[str]:
    """The commonest words of a data set's captions; of a large one, of captions spread over it."""
    if not dataset.facts.captions or not isinstance(dataset, Dataset):
        return []
    n, count = len(dataset), min(len(dataset), CAPTIONS)
    return vocabulary((dataset.caption(i * n // count) or "" for i in range(count)), WORDS)


def conditions_in(recipe: Recipe) -> list[tuple[Component, Mapping[str, Any]]]:
    """The components of the recipe's conditions, with their nodes."""
    nodes = (recipe.config.get("conditions") or {}).items()
    return [(registry().find("condition", n.get("name", k)), n) for k, n in nodes if n is not None]


def labelled(recipe: Recipe, dataset: Any) -> bool:
    """Whether the labels of the data are used: where it has them, unless data.labels or the conditions say
    otherwise."""
    wanted = recipe.node("data").labels
    if wanted is None:
        told = any("num_classes" in component.from_data.values() for component, _ in conditions_in(recipe))
        wanted = told and bool(dataset.facts.num_classes)
    return bool(wanted)
