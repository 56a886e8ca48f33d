"""Conditions of latent diffusion's semantic and layout models: maps of labels, and boxes of objects.

CompVis/latent-diffusion@a506df5 ldm/modules/encoders/modules.py SpatialRescaler; CompVis/taming-transformers@3ba01b2
taming/data/conditional_builder/objects_bbox.py. Deviation: objects are in the order of the text, where officially they
are shuffled each time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nets.bert_text import BERTText
from vgm_cli.nets.hints import Hint
from vgm_cli.ranges import Blocks, Count, Depth, Fraction, Positive, Side, Vocabulary, Width

Box = tuple[float, float, float, float]  # left, top, width, height, as shares of the picture's sides
NUMBER = r"\s+([\d.]+(?:e-?\d+)?)"
OBJECT = re.compile(rf"(.+?)(\*)?{NUMBER}{NUMBER}{NUMBER}{NUMBER}")

# -- maps of labels ----------------------------------------------------------------------------------------------------


class SemanticMap(nn.Module):
    """The condition `semantic`: a map of labels -> {"concat": (B, out_channels, side, side)}, trained with the network.

    The map is a grey picture whose values are labels, of the images' size (in one that is resized, labels are mixed).
    Each label is a channel; the channels are made smaller and mixed to those of the latent.
    """

    column = "semantic"
    choices: Sequence[Any] = ()
    draws = False
    checkpointing = False

    def __init__(
        self,
        size: Side,  # of the images
        classes: Width = 182,  # labels: 0 to classes - 1
        stages: Blocks = 2,  # times that both sides are halved, to the latent's
        out_channels: Width | None = 3,  # of what is stacked on the latent; None: the labels' channels are not mixed
        method: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear",  # of halving
        column: str = "semantic",  # of the data
        keyword: str = "concat",  # of the network
        multiplier: Positive = 0.5,  # of both sides, at every stage
        bias: bool = False,  # of the mixing
    ):
        super().__init__()
        self.size, self.classes, self.stages, self.method = size, classes, stages, method
        self.column, self.keyword, self.multiplier = column, keyword, multiplier
        self.out_channels, self.side = out_channels or classes, size
        for _ in range(stages):
            self.side = int(self.side * multiplier)
        if not self.side:
            message = f"nothing is left of {size} pixels times {multiplier:g}, {stages} times"
            raise VgmError(message, "fewer stages", USAGE)
        self.reads = (column,)
        self.files = Hint(size, 1, column)
        self.channel_mapper = nn.Conv2d(classes, out_channels, 1, bias=bias) if out_channels else nn.Identity()

    def parse(self, words: Sequence[str]) -> list[Any]:
        """Files of maps -> items."""
        return self.files.parse(words)

    def items_of(self, columns: Mapping[str, Tensor], drawn: Sequence[torch.Generator]) -> Tensor:
        return columns[self.column]

    def forward(self, labels: Tensor) -> Tensor:
        """(B, H, W) int64 -> (B, out_channels, h, w), of sides made smaller. VgmError: a label that there is not."""
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            message = f"a map has the label {int(labels.max())}, the network knows 0 to {self.classes - 1}"
            raise VgmError(message, "conditions.semantic.classes", USAGE)
        x = F.one_hot(labels, self.classes).movedim(-1, 1)
        x = x.to(next(self.parameters(), torch.zeros(0)).dtype)
        for _ in range(self.stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        mixed: Tensor = self.channel_mapper(x)
        return mixed

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        x = self.files.check(items, (1, self.size, self.size), device)
        return {self.keyword: self(((x[:, 0] + 1) * 127.5).round().long())}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {self.keyword: torch.zeros(n, self.out_channels, self.side, self.side, device=device)}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return self.null(n, device)


# -- boxes of objects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Object:
    """One object of a layout. group: it stands for several of its class."""

    number: int  # of its class
    box: Box
    group: bool = False


WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def inside(box: Box, crop: Box) -> bool:
    """Whether some of the box is in the crop."""
    starts, ends = zip(*((max(a, b), min(a + u, b + v)) for a, u, b, v in zip(box[:2], box[2:], crop[:2], crop[2:])))
    return all(low < high for low, high in zip(starts, ends))


def seen(box: Box, crop: Box, flip: bool) -> Box:
    """The box in shares of the crop, and mirrored."""
    x, y = (min(max((v - low) / side, 0.0), 1.0) for v, low, side in zip(box[:2], crop[:2], crop[2:]))
    w, h = min(box[2] / crop[2], 1 - x), min(box[3] / crop[3], 1 - y)
    return (1 - (x + w) if flip else x, y, w, h)


def corners(box: Box, tokens: int) -> list[int]:
    """Tokens of a box's upper left and lower right corner, on a grid of as many sections a side as fit."""
    sections, (x, y, w, h) = math.isqrt(tokens), box

    def token(x: float, y: float) -> int:
        column, row = (round(min(max(v, 0.0), 1.0) * (sections - 1)) for v in (x, y))
        return row * sections + column

    return [token(x, y), token(x + w, y + h)]


def layout_tokens(
    objects: Sequence[Object],  # in the order of their tokens
    most: int,  # objects; what is missing is filled with the last token
    tokens: int,  # size of the vocabulary
    classes: int,  # of objects; a group's token is its class behind all of these
    crop: Box = WHOLE,  # the part of the picture that is seen
    flip: bool = False,  # the picture is mirrored
    with_crop: bool = False,  # two more tokens say which part is seen, and boxes are those of the whole picture
    groups: bool = True,  # classes of groups have tokens of their own
) -> list[int]:
    """Three tokens for each object, its class and two corners; two for the crop. Of the first `most` objects, those
    that lie outside of the crop are left out."""
    found: list[int] = []
    for thing in objects[:most]:
        if inside(thing.box, crop):
            box = seen(thing.box, WHOLE if with_crop else crop, flip)
            found += [thing.number + classes * (thing.group and groups), *corners(box, tokens)]
    found += [tokens - 1] * (3 * most - len(found))
    return found + (corners(seen(crop, WHOLE, flip), tokens) if with_crop else [])


class Layout(BERTText):
    """The condition `layout`: boxes of objects -> {"context": (B, length, width)}, trained with the network.

    A text says one object after the other, as "apple 0.1 0.2 0.5 0.5; 17* 0 0 0.3 1": the name or number of its class,
    the left and upper end of its box, its width and height, as shares of the picture's sides; a star says that there
    are several.
    VgmError: a text of another form, a class that is not known.
    """

    def __init__(
        self,
        num_classes: Width = 600,  # classes of objects
        classes: list[str] | None = None,  # their names
        objects: Count = 30,  # of a picture at most; those behind are left out
        with_crop: bool = True,  # two more tokens, which say that the whole picture is seen
        groups: bool = True,  # several objects in one box are a class of their own
        width: Width = 512,  # of a token's vector
        depth: Depth = 16,  # number of blocks
        vocabulary: Vocabulary = 8192,  # tokens: classes, and places on a square grid
        heads: Depth = 8,  # attention heads
        head_channels: Width = 64,  # width of a head
        dropout: Fraction = 0.0,  # share of the tokens' vectors dropped
    ):
        if num_classes * (1 + groups) >= vocabulary:
            raise VgmError(f"{num_classes} classes do not fit into {vocabulary} tokens", "vocabulary=8192", USAGE)
        super().__init__(width, depth, vocabulary, 3 * objects + 2 * with_crop, heads, head_channels, dropout)
        self.names, self.num_classes, self.objects = list(classes or []), num_classes, objects
        self.with_crop, self.groups = with_crop, groups

    def read(self, text: str) -> list[Object]:
        """The objects of a text."""
        found = []
        for part in filter(None, (p.strip() for p in text.split(";"))):
            match = OBJECT.fullmatch(part)
            if match is None:
                example = "apple 0.1 0.2 0.5 0.5; tree* 0 0 0.3 1"
                raise VgmError(f"'{part}' is no object and its box", f"CLASS LEFT TOP WIDTH HEIGHT; … {example}", USAGE)
            x, y, w, h = (float(match[i]) for i in range(3, 7))
            found.append(Object(self.number(match[1]), (x, y, w, h), bool(match[2])))
        return found

    def number(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        if not name.isdecimal() or int(name) >= self.num_classes:
            raise unknown("class", name, self.names or [f"0 to {self.num_classes - 1}"])
        return int(name)

    def parse(self, words: Sequence[str]) -> list[Any]:
        for text in words:
            self.read(text)
        return list(words)

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        sizes = (self.objects, self.vocabulary, self.num_classes)
        how: dict[str, Any] = {"with_crop": self.with_crop, "groups": self.groups}
        ids = [layout_tokens(self.read(text), *sizes, **how) for text in items]
        return {"context": self(torch.tensor(ids, device=device))}
