"""VQ-VAE's second stage: PixelCNNs over the grid of codes. van den Oord et al. 2017 (arXiv 1711.00937), sec. 3.3.

The paper takes a PixelCNN of about the size of the PixelCNN paper's and says no more; no code of it is published. The
gated one (van den Oord et al. 2016, arXiv 1606.05328, sec. 2) is the default here: it has no blind spot. The plain
masked one is that of clementchadebec/benchmark_VAE@6419e21 (pythae), under its names.
Both see the codes of whole grids at once while training; a `Decoder` writes them one after the other, from what is kept
of the rows above.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import TokenDecoder
from vgm_cli.ar.sampling import token_log_probs
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import label
from vgm_cli.ranges import Depth, Rate, Vocabulary, Whole, Width


class CodePrior(nn.Module, ABC):
    """p(codes | class) in raster order. Subclasses give forward(ids, y) -> logits and decoder(n, y)."""

    latent_likelihood = True  # of codes, see vgm_cli/metrics/likelihood.py

    def __init__(self, vocab_size: int, grid: tuple[int, int], num_classes: int):
        super().__init__()
        self.vocab_size, self.grid, self.num_classes = vocab_size, tuple(grid), num_classes
        if len(self.grid) != 2:
            raise VgmError(f"a PixelCNN reads rows and columns, not a grid of {list(self.grid)}", code=USAGE)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        h, w = config["grid"]
        ids = torch.arange(h * w).view(1, h, w) * 7 % config["vocab_size"]
        return {"ids": ids, **label(config.get("num_classes", 0))}

    @abstractmethod
    def forward(self, ids: Tensor, y: Tensor | None = None) -> Tensor:
        """ids: (B, h, w) int64, y: (B,) -> logits (B, h, w, K), of each code given those before it."""

    @abstractmethod
    def decoder(self, n: int, y: Tensor | None) -> TokenDecoder:
        """What writes n grids, code after code."""

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, generators: list[torch.Generator], y: Tensor | None = None
    ) -> tuple[Tensor, str]:
        """x: (B, h, w) int64 codes -> nats (B,), exact; the contract of vgm_cli/metrics/likelihood.py."""
        logits = self(x, y).flatten(1, 2)
        given = "given the class" if self.num_classes else "without a condition"
        return token_log_probs(logits, x.flatten(1)).sum(1), f"exact, of the codes {given}"


# -- gated -------------------------------------------------------------------------------------------------------------


def gate(x: Tensor) -> Tensor:
    """(B, 2 C, h, w) -> tanh(first half) sigmoid(second half): (B, C, h, w)."""
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks. The vertical one sees the rows above, the horizontal one this row's codes to the left
    and, through it, all that the vertical one sees.

    What it is given is padded with zeros above and to the left by `reach`, or holds what a Decoder has kept there.
    """

    def __init__(self, channels: int, kernel_size: int, num_classes: int, dropout: float):
        super().__init__()
        self.reach = kernel_size // 2
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.reach + 1, kernel_size), padding=(0, self.reach))
        self.down = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, self.reach + 1))
        self.out = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.condition = nn.Embedding(num_classes, 4 * channels) if num_classes else None

    def condition_terms(self, y: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """What the class adds to both stacks, (B, 2 C, 1, 1) each."""
        if self.condition is None or y is None:
            return 0.0, 0.0
        vertical, horizontal = self.condition(y)[:, :, None, None].chunk(2, 1)
        return vertical, horizontal

    def across(self, h: Tensor, vertical: Tensor, terms: Tensor | float) -> Tensor:
        """h: (B, C, rows, reach + columns), vertical: (B, 2 C, rows, columns) before its gate -> the horizontal stack's
        next (B, C, rows, columns)."""
        new = self.out(self.dropout(gate(self.horizontal(h) + self.down(vertical) + terms)))
        return h[..., self.reach :] + new

    def forward(self, v: Tensor, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Whole grids: v, h (B, C, rows, columns) -> the next of either."""
        for_v, for_h = self.condition_terms(y)
        vertical = self.vertical(F.pad(v, (0, 0, self.reach, 0)))
        return gate(vertical + for_v), self.across(F.pad(h, (self.reach, 0)), vertical, for_h)


class GatedPixelCNN(CodePrior):
    """Conditional gated PixelCNN of codes. Every code depends on all before it as long as the grid is no wider and
    higher than (layers times kernel_size // 2) + 1. VgmError: a grid that is no rectangle, an even kernel."""

    def __init__(
        self,
        vocab_size: Vocabulary = 512,  # codes
        grid: tuple[int, int] = (32, 32),  # rows and columns of codes
        num_classes: Whole = 0,  # 0: no condition
        channels: Width = 64,  # of both stacks
        n_layer: Depth = 8,  # gated layers
        kernel_size: Width = 3,  # columns that the vertical stack sees, an odd number
        head_channels: Width = 128,  # between the horizontal stack and the logits
        dropout: Rate = 0.0,  # behind the gates of the horizontal stack
    ):
        super().__init__(vocab_size, grid, num_classes)
        if kernel_size % 2 == 0:
            raise VgmError(f"kernel_size={kernel_size} has no middle", "an odd number", USAGE)
        self.embed = nn.Embedding(vocab_size, channels)
        self.layers = nn.ModuleList(GatedLayer(channels, kernel_size, num_classes, dropout) for _ in range(n_layer))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, head_channels, 1), nn.ReLU(), nn.Conv2d(head_channels, vocab_size, 1)
        )

    def checked(self, y: Tensor | None) -> Tensor | None:
        if self.num_classes and y is None:
            raise VgmError("this prior needs a class", "--label N", USAGE)
        return y

    def forward(self, ids: Tensor, y: Tensor | None = None) -> Tensor:
        """ids: (B, h, w) int64, y: (B,) -> logits (B, h, w, K), of each code given those before it."""
        y = self.checked(y)
        e = self.embed(ids).permute(0, 3, 1, 2)  # (B, C, h, w)
        v = F.pad(e[:, :, :-1], (0, 0, 1, 0))  # the vertical stack at row r sees rows before r
        h = F.pad(e[:, :, :, :-1], (1, 0))  # the horizontal one at column c sees columns before c
        for layer in self.layers:
            v, h = layer(v, h, y)
        return self.head(h).permute(0, 2, 3, 1).float()

    def decoder(self, n: int, y: Tensor | None) -> GatedDecoder:
        return GatedDecoder(self, n, self.checked(y))


class GatedDecoder:
    """One generation. Each row of the vertical stack is computed once, each column of the horizontal one as well; of
    every layer's inputs the last `reach` rows, or columns of this row, are kept."""

    def __init__(self, model: GatedPixelCNN, n: int, y: Tensor | None):
        self.model, self.width, self.at = model, model.grid[1], 0
        zeros = model.embed.weight.new_zeros
        channels = model.embed.embedding_dim
        self.condition_terms = [layer.condition_terms(y) for layer in model.layers]  # type: ignore[operator]
        self.above = [zeros(n, channels, int(layer.reach) + 1, self.width) for layer in model.layers]  # type: ignore[arg-type]
        self.before: list[Tensor] = []
        self.vertical: list[Tensor] = []
        self.row = zeros(n, channels, 1, self.width)  # the codes of this row, embedded

    def next_row(self, v: Tensor) -> None:
        """v: (B, C, 1, w), the row above, embedded."""
        self.vertical = []
        for i, layer in enumerate(self.model.layers):
            self.above[i] = torch.cat([self.above[i][:, :, 1:], v], 2)
            self.vertical.append(layer.vertical(self.above[i]))  # type: ignore[operator]
            v = gate(self.vertical[-1] + self.condition_terms[i][0])
        self.before = [v.new_zeros(*v.shape[:2], 1, int(layer.reach) + 1) for layer in self.model.layers]  # type: ignore[arg-type]

    def column(self, h: Tensor) -> Tensor:
        """h: (B, C, 1, 1), the code to the left, embedded -> logits (B, K) of this one."""
        here = slice(self.at % self.width, self.at % self.width + 1)
        for i, layer in enumerate(self.model.layers):
            self.before[i] = torch.cat([self.before[i][..., 1:], h], 3)
            h = layer.across(self.before[i], self.vertical[i][..., here], self.condition_terms[i][1])  # type: ignore[operator]
        return self.model.head(h)[:, :, 0, 0].float()

    def first(self) -> Tensor:
        """Logits (B, K) of the first code."""
        self.next_row(self.row)
        return self.column(self.row[..., :1])

    def step(self, ids: Tensor) -> Tensor:
        """ids: (B,) the latest codes -> logits (B, K) of the next."""
        new = self.model.embed(ids)[:, :, None, None]
        self.row[..., self.at % self.width : self.at % self.width + 1] = new
        self.at += 1
        if self.at % self.width == 0:
            self.next_row(self.row)
            new = torch.zeros_like(new)
        return self.column(new)


# -- plain -------------------------------------------------------------------------------------------------------------


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees what comes before in raster order; the first of a network does not see the place itself,
    the others do."""

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, first: bool):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        middle = kernel_size // 2
        mask = torch.ones(kernel_size, kernel_size)
        mask[middle, middle + (not first) :] = 0
        mask[middle + 1 :] = 0
        self.register_buffer("mask", mask.expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)  # type: ignore[arg-type]


class MaskedPixelCNN(CodePrior):
    """Plain PixelCNN: codes enter as numbers, and some before a place are never seen from it (the blind spot of masked
    convolutions). As pythae's, for its weights and for comparison. planes: codes per position."""

    def __init__(
        self,
        vocab_size: Vocabulary = 512,  # codes
        grid: tuple[int, int] = (32, 32),  # rows and columns of codes
        n_layer: Depth = 10,
        kernel_size: Width = 5,  # an odd number
        channels: Width = 64,
        planes: Width = 1,  # codes that lie over one another at a position, none of which sees another
    ):
        super().__init__(vocab_size, grid, 0)
        if kernel_size % 2 == 0:
            raise VgmError(f"kernel_size={kernel_size} has no middle", "an odd number", USAGE)
        self.planes, self.reach = planes, n_layer * (kernel_size // 2)
        blocks = [
            nn.Sequential(
                MaskedConv2d(channels if i else planes, channels, kernel_size, first=i == 0),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for i in range(n_layer)
        ]
        self.net = nn.Sequential(*blocks, nn.Conv2d(channels, vocab_size * planes, 1))

    def logits(self, codes: Tensor) -> Tensor:
        """codes: (B, planes, h, w), any numbers -> (B, K, planes, h, w)."""
        return self.net(codes.to(self.net[-1].weight)).unflatten(1, (self.vocab_size, self.planes)).float()  # type: ignore[arg-type]

    def forward(self, ids: Tensor, y: Tensor | None = None) -> Tensor:
        """ids: (B, h, w) int64 -> logits (B, h, w, K), of each code given those before it."""
        if self.planes > 1:
            raise VgmError(f"{self.planes} codes over one another are no grid of codes", code=USAGE)
        return self.logits(ids[:, None])[:, :, 0].permute(0, 2, 3, 1)

    def decoder(self, n: int, y: Tensor | None) -> MaskedDecoder:
        return MaskedDecoder(self, n)


class MaskedDecoder:
    """One generation; of the rows above, those that are out of reach are not computed again."""

    def __init__(self, model: MaskedPixelCNN, n: int):
        self.model, self.at = model, 0
        self.ids = torch.zeros(n, *model.grid, dtype=torch.int64, device=next(model.parameters()).device)

    def first(self) -> Tensor:
        """Logits (B, K) of the first code."""
        row, column = divmod(self.at, self.model.grid[1])
        return self.model(self.ids[:, max(0, row - self.model.reach) : row + 1])[:, -1, column]

    def step(self, ids: Tensor) -> Tensor:
        """ids: (B,) the latest codes -> logits (B, K) of the next."""
        row, column = divmod(self.at, self.model.grid[1])
        self.ids[:, row, column] = ids
        self.at += 1
        return self.first()
