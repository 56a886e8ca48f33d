"""VDM: the score network, which never changes the size of the image, and the noise schedule that is learned with it.

Kingma, Salimans, Poole & Ho, NeurIPS 2021 (arXiv 2107.00630). Official code: google-research/vdm@dc27b98a model_vdm.py.
Deviations: attention is fused; `norm_groups` makes the groups of narrow networks wider; the learned schedule keeps its
ends unless pinned=False (see gamma.py); gamma="fixed" works (the official code crashes in its decoder).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import noise
from vgm_cli.nn.features import places
from vgm_cli.nn.sdpa import sdpa
from vgm_cli.ranges import Blocks, Rate, Vocabulary, Width, ordered

from .gamma import Gamma, Linear, Monotone, Scalar

GammaType = Literal["fixed", "learnable_scalar", "learnable_nnet"]


def lecun(layer: nn.Module) -> Any:
    """flax's initialisation: a normal of variance 1 / fan-in cut at two standard deviations, biases at 0."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    std = weight[0].numel() ** -0.5 / 0.87962566103423978  # the cut makes it narrower
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def zero(layer: nn.Module) -> Any:
    """The layer with its parameters set to 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def conv(inner: int, outer: int, size: int = 3) -> Any:
    return lecun(nn.Conv2d(inner, outer, size, padding=size // 2))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t (B,) in [0, 1] -> (B, dim): sines, then cosines, of 1000 t at frequencies from 1 down to 1e-4."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = 1000 * t.float()[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def fourier_features(z: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, H, W): sines, then cosines, of 2 pi 2^n z for n of 6 and 7. They tell apart neighbours of
    the 256 values that a pixel has, which a likelihood pays for."""
    rates = 2 * math.pi * torch.tensor([64.0, 128.0], device=z.device, dtype=z.dtype)
    angles = z.repeat_interleave(2, dim=1) * rates.repeat(z.shape[1])[:, None, None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), told of the noise level by cond (B, cond_channels)."""

    def __init__(self, inner: int, outer: int, cond_channels: int, dropout: float, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inner, eps=1e-6), conv(inner, outer)
        self.cond_proj = zero(nn.Linear(cond_channels, outer, bias=False))
        self.norm2, self.conv2 = nn.GroupNorm(groups, outer, eps=1e-6), zero(conv(outer, outer))
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = conv(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.cond_proj(cond)[:, :, None, None]
        return self.nin_shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class AttnBlock(nn.Module):
    """Self-attention of one head over all pixels, with a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v = (lecun(nn.Linear(channels, channels)) for _ in range(3))
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, T, C)
        q, k, v = (layer(tokens)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, T, C)
        return x + self.proj_out(sdpa(q, k, v)[:, 0]).transpose(1, 2).view_as(x)


class Stage(nn.Module):
    """A residual block, with attention behind it where there is any."""

    def __init__(self, inner: int, outer: int, cond_channels: int, dropout: float, groups: int, attention: bool):
        super().__init__()
        self.block = ResnetBlock(inner, outer, cond_channels, dropout, groups)
        self.attn = AttnBlock(outer, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h: Tensor = self.attn(self.block(x, cond))
        return h


class VDM(nn.Module):
    """The score network eps_hat(z, log-SNR), and as `gamma` the schedule that it is trained and sampled on.

    It is told its place between gamma_min and gamma_max, also after the schedule's own ends have moved. VgmError: a
    width that does not divide into groups.
    """

    checkpointing = False
    num_classes = 0
    middle = "middle"

    def __init__(
        self,
        in_channels: Width = 3,  # of the images, 8-bit pixels
        n_embd: Width = 128,  # width of every layer
        n_layer: Blocks = 32,  # residual blocks before the middle; one more follows it
        dropout: Rate = 0.1,  # inside the blocks
        attention: bool = False,  # behind every block, not in the middle alone
        fourier: bool = True,  # the network also sees sines and cosines of its input
        gamma: GammaType = "learnable_scalar",  # learnable_nnet: a monotone network; the others are straight lines
        gamma_min: float = -13.3,  # -log-SNR of the least noise that the schedule starts from
        gamma_max: float = 5.0,  # of the most noise
        pinned: bool = True,  # learnable_nnet keeps its ends; False: the official one, which moves them
        levels: Vocabulary = 256,  # values that a pixel has
        norm_groups: Width = 32,  # of every normalisation; a group of one channel hides its brightness
    ):
        super().__init__()
        ordered(gamma_min, gamma_max, "gamma_min, gamma_max")
        if n_embd % norm_groups or n_embd < 4 or levels < 2:
            raise VgmError(
                f"n_embd={n_embd}, norm_groups={norm_groups}, levels={levels} make no network",
                "n_embd is a multiple of norm_groups and at least 4, levels at least 2",
                USAGE,
            )
        self.n_embd, self.fourier, self.levels = n_embd, fourier, levels
        self.gamma_min, self.gamma_max = gamma_min, gamma_max
        wide, own = 4 * n_embd, (dropout, norm_groups, attention)
        self.gamma: Gamma
        if gamma == "learnable_nnet":
            self.gamma = Monotone(gamma_min, gamma_max, pinned=pinned)
        else:
            self.gamma = (Scalar if gamma == "learnable_scalar" else Linear)(gamma_min, gamma_max)
        self.dense0, self.dense1 = lecun(nn.Linear(n_embd + 1, wide)), lecun(nn.Linear(wide, wide))
        self.conv_in = conv(in_channels * (5 if fourier else 1), n_embd)
        self.down = nn.ModuleList(Stage(n_embd, n_embd, wide, *own) for _ in range(n_layer))
        self.mid = nn.ModuleList(Stage(n_embd, n_embd, wide, dropout, norm_groups, first) for first in (True, False))
        self.up = nn.ModuleList(Stage(2 * n_embd, n_embd, wide, *own) for _ in range(n_layer + 1))
        self.norm_out = nn.GroupNorm(norm_groups, n_embd, eps=1e-6)
        self.conv_out = zero(conv(n_embd, in_channels))

    def run(self, stage: nn.Module, h: Tensor, cond: Tensor) -> Tensor:
        """stage(h, cond), recomputed in backward when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, cond, use_reentrant=False)  # type: ignore[no-any-return]
        out: Tensor = stage(h, cond)
        return out

    def start(self, z: Tensor, t: Tensor, conditioning: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first convolution's output, and what all blocks are told."""
        place = (-t - self.gamma_min) / (self.gamma_max - self.gamma_min)
        condition = torch.zeros_like(place) if conditioning is None else conditioning
        cond = torch.cat([timestep_embedding(place, self.n_embd), condition.float()[:, None]], dim=1)
        cond = F.silu(self.dense1(F.silu(self.dense0(cond))))
        return self.conv_in(torch.cat([z, fourier_features(z)], dim=1) if self.fourier else z), cond

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """The noise in x (B, C, H, W), alpha times pixels in (-1, 1) plus sigma times noise; t (B,): its log-SNR
        -gamma; conditioning (B,): one number beside it, 0 in all published networks. -> (B, C, H, W)."""
        h, cond = self.start(x, t, conditioning)
        skips = [h]
        for stage in self.down:
            skips.append(self.run(stage, skips[-1], cond))
        h = skips[-1]
        for stage in self.mid:
            h = self.run(stage, h, cond)
        for stage in self.up:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), cond)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h))) + x
        return out

    def features(self, x: Tensor, t: Tensor, layers: Sequence[str], conditioning: Tensor | None = None) -> list[Tensor]:
        """Maps (B, n_embd, H, W): "down.0" is the first convolution's, "down.1", ... those of the blocks that follow;
        "middle" lies between the two halves; see api.HasFeatures."""
        at = places(layers, [*(f"down.{i}" for i in range(len(self.down) + 1)), self.middle])
        h, cond = self.start(x, t, conditioning)
        found = [h]
        for stage in self.down[: max(at, default=0)]:
            found.append(self.run(stage, found[-1], cond))
        if max(at, default=0) > len(self.down):
            h = found[-1]
            for stage in self.mid:
                h = self.run(stage, h, cond)
            found.append(h)
        return [found[i] for i in at]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"x": noise(1, config["in_channels"], 8, 8), "t": torch.tensor([2.5])}
