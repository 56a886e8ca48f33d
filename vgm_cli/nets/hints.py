"""Pictures as conditions: hints of what an image shows (line art, a small or spoilt version of it), and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vgm_cli.api import Codec, generators, seed_of
from vgm_cli.conditioning import Picture
from vgm_cli.data.decode import Unreadable, load_image, load_masked
from vgm_cli.data.transforms import crop_to
from vgm_cli.errors import FAILED, USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.ranges import Side, Width
from vgm_cli.registry import registry
from vgm_cli.ui import ui

MODES = {1: "L", 3: "RGB"}


class FromPictures:
    """What hints and masks share: files are cut as training images are, and what an operator makes of them is drawn
    from one generator for each."""

    choices: Sequence[Any] = ()
    column: str
    keyword: str
    size: int
    channels: int
    codec: Codec | None
    operator: Operator | None

    def operate(self, x: Tensor, drawn: Sequence[torch.Generator]) -> Operator:
        """The operator bound to these pictures (B, C, H, W)."""
        assert self.operator is not None
        return self.operator.bind(tuple(x.shape[1:]), drawn)

    def draw_seeds(self, n: int) -> list[torch.Generator]:
        return generators(seed_of("given picture", i) for i in range(n))

    @property
    def draws(self) -> bool:
        """Whether the operator makes something else of a picture each time."""
        return self.operator is not None and self.operator.is_drawn

    def squared(self, image: Image.Image, path: str) -> np.ndarray:
        """A file's picture cut to the side of the images: (H, W) or (H, W, C)."""
        if image.size != (self.size, self.size):
            shape = f"{image.width}×{image.height}"
            ui.warn(f"{path} is {shape}: cut and resized to {self.size}×{self.size}, as training images are")
        return np.array(crop_to(image, self.size, "adm"))

    def pixels(self, image: Image.Image, path: str) -> Tensor:
        """A file's picture as a training image: (C, H, W) in [-1, 1]."""
        a = torch.from_numpy(self.squared(image.convert(MODES[self.channels]), path)).float().div(127.5).sub(1)
        return a[None] if a.ndim == 2 else a.permute(2, 0, 1)

    def check(self, items: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Items as one tensor (B, *shape). VgmError: they are of another shape."""
        rows = items if isinstance(items, Tensor) else torch.stack([item.pixels for item in items])
        if tuple(rows.shape[1:]) != shape:
            own, wanted = ("×".join(map(str, s)) for s in (rows.shape[1:], shape))
            raise VgmError(f"the network's {self.keyword} is of {wanted}, got one of {own}", code=USAGE)
        return rows.to(device, torch.float32)

    def latents_of(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] as the model sees them behind its codec. VgmError: there is no codec."""
        if self.codec is None:
            raise VgmError(f"{self.keyword}: latents=true needs a codec", "codec: {name: …}, or latents=false", USAGE)
        with torch.no_grad():
            return self.codec.latents(self.codec.encode(x)).float()

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        if self.codec is None:
            raise VgmError(f"{self.keyword}: latents=true needs a codec", "codec: {name: …}, or latents=false", USAGE)
        return tuple(self.codec.latent_shape(shape))


class Hint(FromPictures):
    """The condition `hint`: a picture that images follow -> {keyword: (B, C, H, W)}.

    It is read from a column of the data, such as line art, or made by an operator of the images themselves, of which a
    picture that the user gives is then taken for one, too. VgmError: a picture of another shape.
    """

    def __init__(
        self,
        size: Side,  # of the images
        channels: Width,  # of the column's pictures
        column: str | None = None,  # of the data; None: hint, and with an operator image
        operator: dict[str, Any] | None = None,  # {name: …}, see `vgm ls operators`: what it makes of the pictures
        keyword: str = "hint",  # of the network
        low: float = 0.0,  # what black becomes
        high: float = 1.0,  # what white becomes
        invert: bool = False,  # black and white change places, as for lines on white
        empty: float = 0.0,  # what stands everywhere where there is no hint
        latents: bool = False,  # the codec's latents instead of pixels
        small: bool = False,  # what the operator measures, as small as it is, in place of a picture of it
        codec: Codec | None = None,  # the recipe's
    ):
        self.size, self.channels, self.keyword, self.small = size, channels, keyword, small
        self.operator = None if operator is None else registry().build("operator", operator)
        self.column = column or ("hint" if operator is None else "image")
        self.reads = (self.column,)
        self.low, self.high, self.invert, self.empty = low, high, invert, empty
        self.latents, self.codec = latents, codec
        if channels not in MODES:
            raise VgmError(f"conditions.{keyword}.channels={channels}: pictures have 1 or 3", code=USAGE)

    @cached_property
    def picture_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a hint in pixels."""
        with torch.device("cpu"):  # also where networks are built without memory
            x = torch.zeros(1, self.channels, self.size, self.size)
            c, h, w = self.items_of({self.column: x}, self.draw_seeds(1)).shape[1:]
        return c, h, w

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of what the network is told."""
        return self.latent_shape(self.picture_shape) if self.latents else self.picture_shape

    def parse(self, words: Sequence[str]) -> list[Any]:
        """Files of pictures -> items."""
        found = []
        for path in words:
            try:
                image = load_image(path)
            except (Unreadable, OSError) as e:
                raise VgmError(f"{path} cannot be read: {e}", code=FAILED if Path(path).exists() else USAGE) from e
            found.append(self.pixels(image, path))
        made = [self.items_of({self.column: x[None]}, [g])[0] for x, g in zip(found, self.draw_seeds(len(found)))]
        return [Picture(x) for x in made]

    def items_of(self, columns: Mapping[str, Tensor], drawn: Sequence[torch.Generator]) -> Tensor:
        """The column's pictures (B, C, H, W) in [-1, 1], or what the operator makes of them."""
        x = columns[self.column]
        if self.operator is None:
            return x
        operator = self.operate(x, drawn)
        with torch.no_grad():
            y = operator(x)
            return (y if self.small else operator.picture(y)).float()

    def encode(self, items: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
        x = self.check(items, self.picture_shape, device)
        x = -x if self.invert else x
        return {self.keyword: self.latents_of(x) if self.latents else self.low + (x + 1) * (self.high - self.low) / 2}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return {self.keyword: torch.full((n, *self.shape), self.empty, device=device)}

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        return self.null(n, device)


class Mask(FromPictures):
    """The condition `mask`, of networks that complete images: {"mask": (B, 1, H, W), 1 where a pixel is known,
    "masked": (B, C, H, W), the image, 0 where it is not}; one keyword for both is the image with the mask behind it.

    An item is a picture whose last channel says what is known: of a file, its opaque part. While training, masks are
    drawn by an operator that hides pixels (`{name: inpainting, mask: random}`), or read from a column of the data that
    is bright where pixels are known. VgmError: an operator that does something else, a file without transparency.
    """

    def __init__(
        self,
        size: Side,  # of the images
        image_channels: Width,  # of the images
        column: str | None = None,  # of the data; None: mask
        operator: dict[str, Any] | None = None,  # {name: inpainting, …}: draws the masks; None: the column has them
        keyword: str = "mask",  # of the network, for the mask
        picture: str = "masked",  # of the network, for what is known of the image
        invert: bool = False,  # 1 where a pixel is to be made (LDM)
        fill: float = 0.0,  # the image's value where nothing is known (LDM: -1)
        low: float = 0.0,  # what stands for the mask's 0 (LDM: -1)
        latents: bool = False,  # the codec's latents of the masked image; the mask at their size
        codec: Codec | None = None,  # the recipe's
    ):
        self.size, self.channels, self.keyword, self.picture = size, image_channels, keyword, picture
        self.fill, self.low = fill, low
        self.operator = None if operator is None else registry().build("operator", operator)
        self.column = column or "mask"
        self.reads = ("image",) if operator is not None else ("image", self.column)
        self.invert, self.latents, self.codec = invert, latents, codec

    def parse(self, words: Sequence[str]) -> list[Any]:
        """Files of pictures with transparent parts -> items."""
        found = []
        for path in words:
            try:
                image, known = load_masked(path)
            except (Unreadable, OSError) as e:
                raise VgmError(f"{path} cannot be read: {e}", code=FAILED if Path(path).exists() else USAGE) from e
            if known is None:
                hint = "make what is to be painted transparent; `vgm restore --mask FILE` takes the two apart"
                raise VgmError(f"{path} has no transparent part", hint, USAGE)
            opaque = torch.from_numpy(self.squared(known, path))[None, None] > 127
            found.append(Picture(self.joined(self.pixels(image, path)[None], opaque)[0]))
        return found

    @staticmethod
    def joined(x: Tensor, known: Tensor) -> Tensor:
        """Images (B, C, H, W) and what is known of them (B, 1, H, W) bool -> items (B, C + 1, H, W)."""
        return torch.cat([x * known, known.to(x)], 1)

    def items_of(self, columns: Mapping[str, Tensor], drawn: Sequence[torch.Generator]) -> Tensor:
        """Images in [-1, 1] with what is known of them: (B, C + 1, H, W)."""
        x = columns["image"]
        if self.operator is None:
            return self.joined(x, columns[self.column].mean(1, keepdim=True) > 0)
        known = self.operate(x, drawn).kept
        if known is None:
            hint = "operator: {name: inpainting, mask: random}"
            raise VgmError(f"{self.operator.name} hides no pixels: it draws no masks", hint, USAGE)
        return self.joined(x, known.to(x.device))

    def encode(self, items: Any, device: torch.device) -> dict[str, Tensor]:
        return self.told(self.check(items, (self.channels + 1, self.size, self.size), device))

    def told(self, x: Tensor) -> dict[str, Tensor]:
        """Keywords of items (B, C + 1, H, W), whatever their size."""
        known = x[:, -1:]
        image = x[:, :-1] + self.fill * (1 - known)
        mask = 1 - known if self.invert else known
        mask = self.low + (1 - self.low) * mask
        if self.latents:
            image = self.latents_of(image)
            mask = F.interpolate(mask, image.shape[-2:])  # nearest, as LDM does
        return self.named(mask, image)

    def named(self, mask: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Both under their keywords; under one, the mask behind the image."""
        if self.keyword == self.picture:
            return {self.keyword: torch.cat([image, mask], 1)}
        return {self.keyword: mask, self.picture: image}

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """Nothing is known."""
        return self.encode(torch.zeros(n, self.channels + 1, self.size, self.size, device=device), device)

    def example(self, n: int, device: torch.device) -> dict[str, Tensor]:
        shape: tuple[int, ...] = (self.channels, self.size, self.size)
        shape = self.latent_shape((self.channels, self.size, self.size)) if self.latents else shape
        return self.named(torch.zeros(n, 1, *shape[1:], device=device), torch.zeros(n, *shape, device=device))
