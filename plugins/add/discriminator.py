"""StyleGAN-T's projected discriminator: small heads on several depths of a frozen network of images.

Sauer et al. 2023 (StyleGAN-T, arXiv 2301.09515), sec. 3.2, whose design ADD takes over; behaviour and parameter names
of autonomousvision/stylegan-t@36ab80c networks/discriminator.py. Deviation: the power iterations of the spectral norms
are made once a step by `iterate`, not in every forward, so that a loss is a function of the step and of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nn.example import noise
from vgm_cli.ranges import Whole, Width

VIRTUAL_BATCH = 8  # images whose statistics a normalisation takes together


def unit(x: Tensor) -> Tensor:
    """x at length one."""
    return x / x.square().sum().sqrt().clamp_min(1e-12)


class SpectralConv1d(nn.Module):
    """A convolution over tokens whose weight is divided by its largest singular value (Miyato et al. 2018):
    (B, in, N) -> (B, out, N), the ends joined. `iterate` follows the weight with one power iteration."""

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1):
        super().__init__()
        made = nn.Conv1d(in_channels, out_channels, kernel)
        assert made.bias is not None
        self.weight_orig, self.bias, self.padding = nn.Parameter(made.weight.detach()), made.bias, kernel // 2
        self.register_buffer("weight_u", unit(torch.randn(out_channels)))
        self.register_buffer("weight_v", unit(torch.randn(in_channels * kernel)))
        self.iterate(10)

    @torch.no_grad()
    def iterate(self, times: int = 1) -> None:
        """Power iterations towards the weight's first singular vectors."""
        matrix = self.weight_orig.flatten(1)
        for _ in range(0 if matrix.is_meta else times):
            self.weight_v.copy_(unit(matrix.T @ self.weight_u))
            self.weight_u.copy_(unit(matrix @ self.weight_v))

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.weight_u.clone(), self.weight_v.clone()  # they move before the gradients are taken
        weight = self.weight_orig / torch.dot(u, self.weight_orig.flatten(1) @ v)
        if self.padding:
            x = F.pad(x, (self.padding, self.padding), mode="circular")
        return F.conv1d(x, weight, self.bias)


class BatchNormLocal(nn.Module):
    """Normalisation of every channel over the tokens of eight images at a time, in training as in evaluation."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) -> (B, C, N). Where eights do not divide B, the largest groups of fewer images that do."""
        least = math.ceil(len(x) / VIRTUAL_BATCH)
        groups = next(g for g in range(least, len(x) + 1) if len(x) % g == 0)
        split = x.view(groups, -1, *x.shape[1:])
        variance, mean = torch.var_mean(split, dim=(1, 3), unbiased=False, keepdim=True)
        x = ((split - mean) / (variance + self.eps).sqrt()).view_as(x)
        return x * self.weight[:, None] + self.bias[:, None]


class Residual(nn.Module):
    """(x + fn(x)) / sqrt 2."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / math.sqrt(2)


class Projection(nn.Module):
    """A linear map of a condition, its weights of unit deviation and divided by sqrt(width) as they are used."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, width)), nn.Parameter(torch.zeros(out))

    def forward(self, c: Tensor) -> Tensor:
        return F.linear(c, self.weight / math.sqrt(self.weight.shape[1]), self.bias)


def block(channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(SpectralConv1d(channels, channels, kernel), BatchNormLocal(channels), nn.LeakyReLU(0.2, True))


class Head(nn.Module):
    """Logits of every token of one level, (B, channels, N) -> (B, N), with a condition (B, c_dim) by projection: the
    inner product of what is computed at a token and a linear map of the condition."""

    def __init__(self, channels: int, c_dim: int = 0, cmap_dim: int = 64):
        super().__init__()
        self.main = nn.Sequential(block(channels, 1), Residual(block(channels, 9)))
        self.cmapper = Projection(c_dim, cmap_dim) if c_dim else None
        self.cls = SpectralConv1d(channels, cmap_dim if c_dim else 1)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        out = self.cls(self.main(x))  # (B, cmap_dim or 1, N)
        if self.cmapper is None:
            return out[:, 0]
        assert c is not None, "this head was built for a condition"
        return (out * self.cmapper(c)[:, :, None]).sum(1) / math.sqrt(out.shape[1])


class Heads(nn.Module):
    """One head for every level: level0=(B, channels[0], N_0), level1=… -> the logits of all tokens of all levels,
    (B, N_0 + N_1 + …). `logits` keeps the levels apart."""

    def __init__(
        self,
        channels: tuple[Width, ...],  # of every level
        c_dim: Whole = 0,  # width of the condition; 0: none
        cmap_dim: Width = 64,  # width of the space in which logits with a condition are inner products
    ):
        super().__init__()
        self.heads = nn.ModuleDict({str(k): Head(width, c_dim, cmap_dim) for k, width in enumerate(channels)})

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        given = {f"level{k}": noise(2, width, 5) for k, width in enumerate(config["channels"])}
        return given | ({"c": noise(2, config["c_dim"])} if config["c_dim"] else {})

    def iterate(self) -> None:
        """One power iteration of every spectral norm; after a step of the weights."""
        for module in self.modules():
            if isinstance(module, SpectralConv1d):
                module.iterate()

    def logits(self, levels: list[Tensor], c: Tensor | None = None) -> list[Tensor]:
        """(B, N_k) of every level (B, C_k, N_k)."""
        return [head(x, c) for head, x in zip(self.heads.values(), levels, strict=True)]

    def forward(self, c: Tensor | None = None, **levels: Tensor) -> Tensor:
        return torch.cat(self.logits([levels[f"level{k}"] for k in self.heads], c), dim=1)
