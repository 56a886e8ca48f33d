"""The convolutional encoder and decoder of VQGAN, latent diffusion and LlamaGen. Esser et al., CVPR 2021 (arXiv
2012.09841); Rombach et al., CVPR 2022 (arXiv 2112.10752), sec. 3.1.

Official code: CompVis/taming-transformers@3ba01b2 taming/modules/diffusionmodules/model.py and its copy in
CompVis/latent-diffusion@a506df5. Parameter names are the official ones. Deviations: attention is fused (SDPA, one head
over all channels); `norm_groups` for networks narrower than 32 channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError

AttnType = Literal["vanilla", "linear", "none"]


def norm(channels: int, groups: int) -> nn.GroupNorm:
    if channels % groups:
        raise VgmError(f"{channels} channels do not divide into norm_groups={groups}", "lower norm_groups", USAGE)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def shortcut(self, x: Tensor) -> Tensor:
        """What the block's work is added to."""
        return self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + self.shortcut(x)


class AttnBlock(nn.Module):
    """Self-attention over positions, one head as wide as the channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def attend(self, n: Tensor) -> Tensor:
        """The block's work on normalised features n (B, C, h, w)."""
        q, k, v = (f(n).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, hw, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (B, C, hw)
        return self.proj_out(h.reshape(n.shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.norm(x))


class LinAttnBlock(nn.Module):
    """Attention linear in the number of positions. As published: no norm, no residual, queries without softmax."""

    def __init__(self, channels: int):
        super().__init__()
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)  # (B, C, hw)
        context = k.softmax(dim=-1) @ v.transpose(1, 2)  # (B, C, C)
        return self.to_out((context.transpose(1, 2) @ q).reshape(x.shape))


def attention(channels: int, kind: AttnType, groups: int) -> nn.Module:
    if kind == "vanilla":
        return AttnBlock(channels, groups)
    return LinAttnBlock(channels) if kind == "linear" else nn.Identity()


class Downsample(nn.Module):
    """Half the size: 3x3 stride 2 with zeros on the right and bottom only, or 2x2 means."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then 3x3."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution; the attention is there whatever attn_resolutions says."""

    def __init__(self, channels: int, dropout: float, attn_type: AttnType, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = attention(channels, attn_type, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """All blocks of one resolution, each followed by attention where the level has it, then the resampling."""

    def __init__(self, widths: Sequence[int], dropout: float, attn: Callable[[int], nn.Module] | None, groups: int):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout, groups) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(attn(c) for c in widths[1:]) if attn else nn.ModuleList()

    def forward(self, h: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        for i, block in enumerate(self.block):
            h = run(block, h)
            if self.attn:
                h = run(self.attn[i], h)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                h = getattr(self, name)(h)
        return h


class Pyramid(nn.Module):
    """What encoder and decoder share: activation checkpointing."""

    checkpointing = False

    def run(self, block: nn.Module, h: Tensor) -> Tensor:
        """block(h), recomputed in backward when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, use_reentrant=False)
        return block(h)


class Encoder(Pyramid):
    """Images (B, in_channels, H, W) -> (B, z or 2z, H/f, W/f) with f = 2^(len(ch_mult) - 1).

    Attention goes where a counter that starts at `resolution` and halves is in attn_resolutions, whatever the input is.
    """

    def __init__(
        self,
        ch: int = 128,  # channels of the first level
        ch_mult: Sequence[int] = (1, 2, 4, 4),  # channels of each level over ch; each after the first halves the side
        num_res_blocks: int = 2,  # residual blocks of a level
        attn_resolutions: Sequence[int] = (),  # in units of `resolution`
        resolution: int = 256,  # nominal side; only decides where attention goes
        in_channels: int = 3,  # channels of the images
        z_channels: int = 4,  # channels of the latents
        double_z: bool = True,  # twice z_channels are given: mean and log-variance
        dropout: float = 0.0,  # share of activations dropped in residual blocks
        attn_type: AttnType = "vanilla",  # kind of attention
        resamp_with_conv: bool = True,  # levels are halved by convolutions; false: by means
        norm_groups: int = 32,  # groups of the group normalisations
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            has_attention = resolution // 2**i in attn_resolutions
            attn = (lambda c: attention(c, attn_type, norm_groups)) if has_attention else None
            level = Level([width, *[ch * mult] * num_res_blocks], dropout, attn, norm_groups)
            width = ch * mult
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = Middle(width, dropout, attn_type, norm_groups)
        self.norm_out = norm(width, norm_groups)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level(h, self.run)
        h = self.run(self.mid, h)  # (B, ch * ch_mult[-1], H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(Pyramid):
    """Latents (B, z, h, w) -> images (B, out_ch, f h, f w). `up[0]` is the highest resolution, as in checkpoints."""

    def __init__(
        self,
        ch: int = 128,  # channels of the last level
        ch_mult: Sequence[int] = (1, 2, 4, 4),  # channels of each level over ch, the image's first, as the encoder's
        num_res_blocks: int = 2,  # residual blocks of a level, less one
        attn_resolutions: Sequence[int] = (),  # in units of `resolution`
        resolution: int = 256,  # nominal side; only decides where attention goes
        out_ch: int = 3,  # channels of the images
        z_channels: int = 4,  # channels of the latents
        dropout: float = 0.0,  # share of activations dropped in residual blocks
        attn_type: AttnType = "vanilla",  # kind of attention
        resamp_with_conv: bool = True,  # a convolution follows every doubling
        tanh_out: bool = False,  # images end in a tanh
        norm_groups: int = 32,  # groups of the group normalisations
    ):
        super().__init__()
        self.tanh_out = tanh_out
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout, attn_type, norm_groups)
        levels = []
        for i in reversed(range(len(ch_mult))):
            # the counter starts from the rounded-down lowest resolution and doubles
            has_attention = resolution // 2 ** (len(ch_mult) - 1) * 2 ** (len(ch_mult) - 1 - i) in attn_resolutions
            attn = (lambda c: attention(c, attn_type, norm_groups)) if has_attention else None
            level = Level([width, *[ch * ch_mult[i]] * (num_res_blocks + 1)], dropout, attn, norm_groups)
            width = ch * ch_mult[i]
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm(width, norm_groups)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def features(self, z: Tensor) -> Tensor:
        """What the last normalisation gets, (B, ch * ch_mult[0], f h, f w): the official give_pre_end=True."""
        h = self.run(self.mid, self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h, self.run)
        return h

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_out(F.silu(self.norm_out(self.features(z))))  # (B, out_ch, f h, f w)
        return torch.tanh(h) if self.tanh_out else h
