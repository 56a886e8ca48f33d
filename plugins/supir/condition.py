"""The degraded picture as SUPIR's network is told it: latents by the codec's second encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Codec
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.hints import Hint
from vgm_cli.ranges import Side, Width

from .codec import robust


class DegradedPicture(Hint):
    """The condition `degraded`: a picture -> {"control": (B, c, h, w)}, latents of what it shows.

    In training an operator degrades the image itself; without one the column `hint` has degraded pictures. The image's
    own size is kept: a smaller measurement is enlarged. Pictures that a user gives are degraded already, and may have
    any size that the codec takes.
    """

    def __init__(
        self,
        size: Side,  # of the images
        channels: Width,  # of the pictures
        column: str | None = None,  # of the data; None: hint, and with an operator image
        operator: dict[str, Any] | None = None,  # {name: real-esrgan, …}: what spoils the images
        codec: Codec | None = None,  # the recipe's, which has two encoders
    ):
        super().__init__(
            size, channels, column, operator, keyword="control", low=-1.0, high=1.0, latents=True, codec=codec
        )

    def items_of(self, columns: Mapping[str, Tensor], drawn: Sequence[torch.Generator]) -> Tensor:
        """The column's pictures (B, C, H, W) in [-1, 1], or the images degraded and enlarged to their size."""
        x = columns[self.column]
        if self.operator is None:
            return x
        operator = self.operate(x, drawn)
        with torch.no_grad():
            return operator.enlarged(operator(x)).float().clamp(-1, 1)

    def parse(self, words: Sequence[str]) -> list[Any]:
        """Files of degraded pictures -> items."""
        operator, self.operator = self.operator, None
        try:
            return super().parse(words)
        finally:
            self.operator = operator

    def check(self, items: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Items as one tensor (B, C, H, W) of any size. VgmError: other channels."""
        rows = items if isinstance(items, Tensor) else torch.stack([item.pixels for item in items])
        return super().check(rows, (shape[0], *rows.shape[2:]), device)

    def latents_of(self, x: Tensor) -> Tensor:
        """By the encoder that reads degraded pictures. VgmError: the codec has none."""
        codec = robust(self.codec)
        if codec is None:
            hint = "codec.weights=RUN of `vgm train supir --recipe …-encoder`"
            raise VgmError("SUPIR's codec has a second encoder, for degraded pictures; this one has none", hint, USAGE)
        with torch.no_grad():
            return codec.degraded_latents(x).float()
