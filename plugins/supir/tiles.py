"""Large pictures in tiles: estimates of the denoiser blended by Gaussian weights, and first stages whose group
normalisations see all tiles.

Yu et al. 2024 (arXiv 2401.13627). Official code: Fanghua-Yu/SUPIR@bda91af sgm/modules/diffusionmodules/sampling.py
TiledRestoreEDMSampler, SUPIR/utils/tilevae.py VAEHook (multidiffusion-upscaler's). What is odd there is kept: the
weights are not symmetric from top to bottom; the variance of a group is the mean of the tiles' own, without that of
their means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nets.autoencoder import AttnBlock, Decoder, Encoder, ResnetBlock

Box = tuple[slice, slice]  # rows, columns
Statistics = Literal["pooled", "estimated"]
PADS = {True: 11, False: 32}  # of decoders in latents, of encoders in pixels

# -- estimates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Square windows of `size`, `stride` apart, the last ones at the border; no larger than what they cover."""

    size: int
    stride: int

    def boxes(self, height: int, width: int) -> list[Box]:
        return [(r, c) for r in self.spans(height) for c in self.spans(width)]

    def spans(self, n: int) -> list[slice]:
        side = min(self.size, n)
        starts = [*range(0, n - side + 1, self.stride)]
        starts += [n - side] if (n - side) % self.stride else []
        return [slice(start, start + side) for start in starts]

    def blend(self, fn: Callable[[int, Box], Tensor], x: Tensor) -> Tensor:
        """fn(number, box) of every window of x (B, C, H, W), averaged by `weights`: like x."""
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for i, (rows, columns) in enumerate(self.boxes(*x.shape[2:])):
            part = fn(i, (rows, columns))
            own = weights(*part.shape[2:])
            total[:, :, rows, columns] += (part.double().cpu() * own).to(total)
            count[:, :, rows, columns] += own.to(count)
        return total / count


def weights(height: int, width: int) -> Tensor:
    """(height, width) float64: a Gaussian over a window, whose middle lies between two columns but on a row."""
    var = 0.01

    def probabilities(n: int, middle: float) -> Tensor:
        at = torch.arange(n, dtype=torch.float64)
        return torch.exp(-((at - middle) ** 2) / n**2 / (2 * var)) / math.sqrt(2 * math.pi * var)

    return torch.outer(probabilities(height, height / 2), probabilities(width, (width - 1) / 2))


# -- first stages ------------------------------------------------------------------------------------------------------


def best_size(wanted: int, most: int) -> int:
    """The smallest size from `wanted` to `most` that is a multiple of 32, or else of 16, 8, 4, 2; `wanted` if none."""
    for divider in (32, 16, 8, 4, 2):
        rounded = -(-wanted // divider) * divider
        if rounded == wanted or rounded <= most:
            return rounded
    return wanted


@dataclass(frozen=True)
class Tile:
    """Where a tile is read, and which part of the result it gives: rows and columns (start, stop)."""

    read: tuple[tuple[int, int], tuple[int, int]]
    made: tuple[tuple[int, int], tuple[int, int]]


def split(height: int, width: int, size: int, pad: int, up: bool, factor: int = 8) -> list[Tile]:
    """Tiles of about `size` that are read with `pad` around them. up: the result is `factor` times larger, else
    smaller."""
    counts = [max(math.ceil((n - 2 * pad) / size), 1) for n in (height, width)]
    sides = [best_size(math.ceil((n - 2 * pad) / k), size) for n, k in zip((height, width), counts)]

    def span(i: int, side: int, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
        low, high = pad + i * side, min(pad + (i + 1) * side, n)
        made = (low if low > pad else 0, high if high < n - pad else n)
        scaled = tuple(v * factor if up else v // factor for v in made)
        return (max(0, low - pad), min(n, high + pad)), scaled  # type: ignore[return-value]

    rows = [span(i, sides[0], height) for i in range(counts[0])]
    columns = [span(j, sides[1], width) for j in range(counts[1])]
    return [Tile((r[0], c[0]), (r[1], c[1])) for r in rows for c in columns]


Asked = tuple[Tensor, Tensor, int]  # variance and mean of every group, (B, groups), and of how many pixels
Told = tuple[Tensor, Tensor]
Course = Generator[Asked, Told, Tensor]  # a tile on its way through the network, which stops at every normalisation


def normalised(layer: nn.GroupNorm, x: Tensor) -> Course:
    """A group normalisation by statistics that others have a part in. While the tile waits it lies on the CPU."""
    groups, device = layer.num_groups, x.device
    var, mean = torch.var_mean(x.unflatten(1, (groups, -1)).flatten(2), 2, unbiased=False)
    shape = x.shape
    x = x.cpu()
    var, mean = yield var, mean, shape[2] * shape[3]
    x = x.to(device).unflatten(1, (groups, -1)).flatten(2)
    x = ((x - mean[..., None]) / torch.sqrt(var[..., None] + layer.eps)).view(shape)
    return x * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def course(layer: nn.Module, x: Tensor) -> Course:
    """A tile x (B, C, h, w) through one layer."""
    device = x.device
    if isinstance(layer, nn.GroupNorm):
        return (yield from normalised(layer, x))
    if isinstance(layer, ResnetBlock):
        rest = layer.shortcut(x).cpu()
        h = layer.conv1(F.silu((yield from normalised(layer.norm1, x))))
        h = layer.conv2(F.silu((yield from normalised(layer.norm2, h))))
        return h + rest.to(device)
    if isinstance(layer, AttnBlock):
        rest = x.cpu()
        h = layer.attend((yield from normalised(layer.norm, x)))
        return h + rest.to(device)
    return layer(x)


def through(net: Encoder | Decoder, x: Tensor) -> Course:
    """A tile through a whole encoder or decoder."""
    for layer in pieces(net):
        x = yield from course(layer, x)
    x = F.silu((yield from normalised(net.norm_out, x)))
    x = net.conv_out(x)
    return torch.tanh(x) if isinstance(net, Decoder) and net.tanh_out else x


def pieces(net: Encoder | Decoder) -> list[nn.Module]:
    """The layers of an encoder or a decoder in the order in which they run, up to the last normalisation."""
    middle = [net.mid.block_1, net.mid.attn_1, net.mid.block_2]
    levels: list[nn.Module] = []
    each: Iterable[Any] = reversed(net.up) if isinstance(net, Decoder) else net.down
    for level in each:
        for i, block in enumerate(level.block):
            levels += [block, *([level.attn[i]] if level.attn else [])]
        levels += [getattr(level, name) for name in ("downsample", "upsample") if name in level._modules]
    return [net.conv_in, *(middle + levels if isinstance(net, Decoder) else levels + middle)]


def pooled(asked: Sequence[Asked]) -> Told:
    """Statistics of all tiles: means weighted by their pixels, of the variances as well."""
    share = torch.tensor([n for *_, n in asked], dtype=torch.float32)
    share = (share / share.max() / (share / share.max()).sum()).to(asked[0][0])
    var, mean = (torch.einsum("t,tbg->bg", share, torch.stack(parts)) for parts in list(zip(*asked))[:2])
    return var, mean


def estimated(net: Encoder | Decoder, x: Tensor, size: int) -> list[Told]:
    """The statistics at every normalisation of a small version of x (B, C, H, W) whose mean and deviation are x's."""
    small = F.interpolate(x, scale_factor=size / max(x.shape[2:]), mode="nearest-exact")
    (std, mean), (std_small, mean_small) = (torch.std_mean(v, dim=[0, 2, 3], keepdim=True) for v in (x, small))
    small = ((small - mean_small) / std_small * std + mean).clamp(x.min(), x.max())
    run, found = through(net, small), []
    told: Told | None = None
    try:
        while True:
            var, mean, _ = next(run) if told is None else run.send(told)
            told = (var, mean)
            found.append(told)
    except StopIteration:
        return found


def in_tiles(
    net: Encoder | Decoder, x: Tensor, size: int, statistics: Statistics = "pooled", factor: int = 8
) -> Tensor:
    """An encoder or decoder on tiles of about `size` of x (B, C, H, W), as if it saw the whole but for its attention.

    statistics of the group normalisations: pooled from all tiles, or estimated on a small version of x, so that tiles
    need not wait for one another. A whole of no more than a tile with its margins goes through undivided.
    """
    up = isinstance(net, Decoder)
    pad, (height, width) = PADS[up], x.shape[2:]
    if max(height, width) <= 2 * pad + size:
        return net(x)
    tiles = split(height, width, size, pad, up, factor)
    out: Tensor | None = None

    def place(tile: Tile, made: Tensor) -> None:
        nonlocal out
        if out is None:
            full = (height * factor, width * factor) if up else (height // factor, width // factor)
            out = made.new_zeros(*made.shape[:2], *full)
        (top, bottom), (left, right) = tile.made
        rows, columns = ((low * factor if up else low // factor) for low in (tile.read[0][0], tile.read[1][0]))
        own = made[:, :, top - rows : bottom - rows, left - columns : right - columns]
        out[:, :, top:bottom, left:right] = own

    def read(tile: Tile) -> Tensor:
        (top, bottom), (left, right) = tile.read
        return x[:, :, top:bottom, left:right]

    if statistics == "estimated":
        known = estimated(net, x, size)
        for tile in tiles:
            place(tile, driven(through(net, read(tile)), known))
    else:
        runs = [through(net, read(tile)) for tile in tiles]
        asked = [next(run) for run in runs]
        while asked:
            told, asked = pooled(asked), []
            for tile, run in zip(tiles, runs):
                try:
                    asked.append(run.send(told))
                except StopIteration as end:
                    place(tile, end.value)
    assert out is not None
    return out


def driven(run: Course, known: Iterable[Told]) -> Tensor:
    """A tile to its end by statistics that are known already."""
    next(run)
    try:
        for told in known:
            run.send(told)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("more normalisations than statistics")
