"""What the discriminator's heads are told: what the student is told, and the picture that it started from.

Sauer et al. 2023 (2311.17042), sec. 3.2: heads are conditioned by projection on the text and on an embedding of the
real image, which the student sees a part of unless its input is pure noise. How the two are joined is not published:
here each is scaled to a mean square of one and they stand beside each other, zeros where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.conditioning import Conditions
from vgm_cli.nets.foundation import ShowsLevels

Told = Literal["both", "text", "image", "none"]


def scaled(c: Tensor) -> Tensor:
    """Rows (B, D) with a mean square of one; rows of zeros stay."""
    return c / c.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8)


class HeadCondition:
    """The condition of the heads, (B, width): classes as one-hot vectors, texts as the mean of their context, vectors
    as they are; then the embedding of the image. kind: which of the two."""

    def __init__(self, kind: Told, conditions: Conditions, features: ShowsLevels):
        self.classes = 0
        if (label := conditions.of_column("label")) is not None:
            self.classes = len(label.condition.choices)
        self.with_text, self.with_image = kind in ("both", "text"), kind in ("both", "image")
        told = self.of_words(conditions.example(1, torch.device("cpu"))["cond"]) if self.with_text else []
        self.width = sum(part.shape[1] for part in told) + (features.dim if self.with_image else 0)
        self.features = features

    def of_words(self, cond: Mapping[str, Any]) -> list[Tensor]:
        """A vector (B, D) for every keyword of the student that is no picture."""
        found = []
        for key in sorted(cond):
            value = cond[key].detach()
            if not value.is_floating_point():
                if value.ndim == 1 and self.classes:  # the number behind the last class stands for no class
                    found.append(F.one_hot(value.clamp(max=self.classes), self.classes + 1)[:, :-1].float())
            elif value.ndim in (2, 3):
                found.append(value.float() if value.ndim == 2 else value.float().mean(1))
        return found

    def __call__(self, cond: Mapping[str, Any], pictures: Tensor, seen: Tensor) -> Tensor | None:
        """pictures: (B, C, H, W), of which the student saw something where seen (B,) says so. None: heads are told
        nothing."""
        parts = [scaled(part) for part in self.of_words(cond)] if self.with_text else []
        if self.with_image:
            with torch.no_grad():
                embedded = scaled(self.features.embedding(pictures).float())
            parts.append(embedded * seen[:, None])
        return torch.cat(parts, dim=1) if parts and self.width else None
