"""EDM's version of the ADM U-Net: the network of EDM, DMD and DMD2 on ImageNet 64.

Karras et al. 2022 (2206.00364), app. F.3, after Dhariwal & Nichol 2021. Same function and parameter names as NVlabs/edm
@008a4e5 training/networks.py DhariwalUNet; preconditioning is the Denoiser's (path edm, prediction F, time edm).
Deviations: labels are numbers, not one-hot rows (rows work too); attention is fused; no augmentation labels, which the
released ImageNet network does not have either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import images
from vgm_cli.nn.features import places
from vgm_cli.ranges import Depth, Fraction, Side, Whole, Width


def zero(module: nn.Module) -> Any:
    """The module with its parameters at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class GroupNorm(nn.GroupNorm):
    """At most 32 groups, of at least 4 channels each; computed in the input's type."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(min(32, channels // 4), channels, eps)


class Resample(nn.Module):
    """Half or twice the size by a 2x2 box: (N, C, H, W) -> (N, C, H/2, W/2) or (N, C, 2H, 2W)."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.way == "down" else F.interpolate(x, scale_factor=2, mode="nearest")


class Conv(nn.Conv2d):
    """A convolution of odd width that keeps the size, after a change of size where `way` says "up" or "down"."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, way: str | None = None):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.way = way
        if way:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        if self.way:
            x = F.avg_pool2d(x, 2) if self.way == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        return super().forward(x)


class UNetBlock(nn.Module):
    """Residual block told of time and class by emb (N, emb_channels), then attention. (N, in, h, w) -> (N, out, h, w).

    heads: 0 for no attention. way: "up" or "down" changes the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        heads: int = 0,
        way: str | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.heads, self.dropout = in_channels, out_channels, heads, dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, way)
        self.affine = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = zero(Conv(out_channels, out_channels, 3))
        self.skip: nn.Module | None = None
        if out_channels != in_channels:
            self.skip = Conv(in_channels, out_channels, 1, way)
        elif way:
            self.skip = Resample(way)
        if heads:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = zero(nn.Conv2d(out_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))  # (N, out, h', w')
        scale, shift = self.affine(emb).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = h + (x if self.skip is None else self.skip(x))
        return h + self.proj(self.attend(self.norm2(h))) if self.heads else h

    def attend(self, h: Tensor) -> Tensor:
        """Self-attention over positions; the 3C channels of qkv are ordered (head, channel, q|k|v)."""
        n, c, height, width = h.shape
        qkv = self.qkv(h).view(n, self.heads, c // self.heads, 3, height * width)
        q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))  # (N, heads, T, C / heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, height, width)


class DhariwalUNet(nn.Module):
    """The network F(c_in x, ln(sigma) / 4, y) inside EDM's preconditioning, for ImageNet at 64 pixels.

    x: (N, in_channels, H, W), t: (N,), y: (N,) int64 -> (N, out_channels, H, W). VgmError: the side cannot be halved
    once per level.
    """

    def __init__(
        self,
        img_resolution: Side = 64,  # side of x
        in_channels: Width = 3,  # channels of x
        out_channels: Width | None = None,  # None: as in_channels
        num_classes: Whole | None = 1000,  # 0 or None is unconditional
        model_channels: Width = 192,  # channels of the first level
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # channels of each level over model_channels
        channel_mult_emb: Width = 4,  # width of the embedding over model_channels
        num_blocks: Depth = 3,  # residual blocks of a level
        attn_resolutions: Sequence[int] = (32, 16, 8),  # sides at which attention follows a block
        head_channels: Width = 64,  # width of a head; narrower blocks have no attention
        dropout: Fraction = 0.1,  # as trained by EDM; 0 in DMD2
    ):
        super().__init__()
        levels = len(channel_mult)
        if img_resolution % 2 ** (levels - 1):
            raise VgmError(
                f"a side of {img_resolution} cannot be halved {levels - 1} times", "fewer channel_mult", USAGE
            )
        self.model_channels, self.num_classes, self.checkpointing = model_channels, num_classes or 0, False
        self.sample_shape = (in_channels, img_resolution, img_resolution)
        emb = model_channels * channel_mult_emb
        self.map_layer0 = nn.Linear(model_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        if self.num_classes:
            self.map_label = nn.Linear(self.num_classes, emb, bias=False)
            nn.init.normal_(self.map_label.weight)

        def block(cin: int, cout: int, attention: bool = False, way: str | None = None) -> UNetBlock:
            return UNetBlock(cin, cout, emb, dropout, cout // head_channels if attention else 0, way)

        self.enc = nn.ModuleDict()
        ch, skips = model_channels * channel_mult[0], [model_channels * channel_mult[0]]
        for level, mult in enumerate(channel_mult):
            side = img_resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv(in_channels, ch, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(ch, ch, way="down")
                skips.append(ch)
            for i in range(num_blocks):
                width = model_channels * mult
                self.enc[f"{side}x{side}_block{i}"] = block(ch, width, side in attn_resolutions)
                ch = width
                skips.append(ch)
        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            side = img_resolution >> level
            if level == levels - 1:
                self.dec[f"{side}x{side}_in0"] = block(ch, ch, True)
                self.dec[f"{side}x{side}_in1"] = block(ch, ch)
            else:
                self.dec[f"{side}x{side}_up"] = block(ch, ch, way="up")
            for i in range(num_blocks + 1):
                width = model_channels * mult
                self.dec[f"{side}x{side}_block{i}"] = block(ch + skips.pop(), width, side in attn_resolutions)
                ch = width
        self.out_norm = GroupNorm(ch)
        self.out_conv = zero(Conv(ch, out_channels or in_channels, 3))

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The unconditional version of cond: label num_classes, whose one-hot row is zero."""
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if cond.get("y") is not None else dict(cond)

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """(N,) noise conditions and labels -> (N, emb)."""
        half = self.model_channels // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * 10000 ** (-k / half)  # (N, half)
        emb = F.silu(self.map_layer0(torch.cat([angles.cos(), angles.sin()], dim=1)))
        emb = self.map_layer1(emb)
        if self.num_classes and y is not None:
            rows = y if y.is_floating_point() else y[:, None] == torch.arange(self.num_classes, device=y.device)
            emb = emb + self.map_label(rows.to(emb.dtype))
        return F.silu(emb)

    def run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if not isinstance(block, UNetBlock):
            return block(h)
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Every block's output on the way down; the last is the bottleneck."""
        skips: list[Tensor] = []
        for block in self.enc.values():
            skips.append(self.run(block, skips[-1] if skips else x, emb))
        return skips

    @property
    def middle(self) -> str:
        """The bottleneck, which DMD2's classifier looks at."""
        return f"enc.{list(self.enc)[-1]}"

    def features(
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Maps (N, C, h, w) behind the blocks that are named "enc.8x8_block0" or "dec.8x8_up"; see api.HasFeatures."""
        at = places(layers, [*(f"enc.{name}" for name in self.enc), *(f"dec.{name}" for name in self.dec)])
        emb = self.embed(t, y)
        found: list[Tensor] = []
        skips: list[Tensor] = []
        for i, block in enumerate([*self.enc.values(), *self.dec.values()][: max(at, default=-1) + 1]):
            if i >= len(self.enc) and x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self.run(block, x, emb)
            found.append(x)
            if i < len(self.enc):
                skips.append(x)
        return [found[i] for i in at]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return images(config["in_channels"], config["img_resolution"], config["num_classes"] or 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W) scaled by c_in; t: (N,) ln(sigma) / 4; y: (N,) int64 labels or (N, num_classes) rows.
        Gives F (N, out_channels, H, W)."""
        emb = self.embed(t, y)
        skips = self.encode(x, emb)
        h = skips[-1]
        for block in self.dec.values():
            if h.shape[1] != block.in_channels:
                h = torch.cat([h, skips.pop()], dim=1)
            h = self.run(block, h, emb)
        return self.out_conv(F.silu(self.out_norm(h)))
