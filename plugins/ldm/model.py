"""First stages of latent diffusion: AutoencoderKL and VQModel. Rombach et al., CVPR 2022 (arXiv 2112.10752), sec. 3.1.

Official code: CompVis/latent-diffusion@a506df5 (ldm/models/autoencoder.py, ldm/modules/diffusionmodules/model.py) and
CompVis/taming-transformers@3ba01b2 (VectorQuantizer2). Parameter names are the official ones.
Deviations: attention is fused (SDPA, one head over all channels); `norm_groups` for networks narrower than 32 channels;
large images may go through in blended tiles; `latent_stats` measures mean and deviation of the latents during training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError

AttnType = Literal["vanilla", "linear", "none"]


# -- blocks ----------------------------------------------------------------------------------------------------------


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

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over positions, one head as wide as the channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, hw, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (B, C, hw)
        return x + self.proj_out(h.reshape(x.shape))


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
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (),
        resolution: int = 256,
        in_channels: int = 3,
        z_channels: int = 4,
        double_z: bool = True,
        dropout: float = 0.0,
        attn_type: AttnType = "vanilla",
        resamp_with_conv: bool = True,
        norm_groups: int = 32,
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
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (),
        resolution: int = 256,
        out_ch: int = 3,
        z_channels: int = 4,
        dropout: float = 0.0,
        attn_type: AttnType = "vanilla",
        resamp_with_conv: bool = True,
        tanh_out: bool = False,
        norm_groups: int = 32,
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

    def forward(self, z: Tensor) -> Tensor:
        h = self.run(self.mid, self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h, self.run)
        h = self.conv_out(F.silu(self.norm_out(h)))  # (B, out_ch, f h, f w)
        return torch.tanh(h) if self.tanh_out else h


# -- posterior and codebook --------------------------------------------------------------------------------------------


class DiagonalGaussian:
    """q(z|x) from moments (B, 2c, h, w): mean and log-variance, the latter clamped to [-30, 20]."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = (0.5 * self.logvar).exp()

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """(B,) KL divergence from the standard normal, summed over C, H, W."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))

    def nll(self, z: Tensor) -> Tensor:
        """(B,) negative log-density of z, summed over C, H, W."""
        scaled = (z - self.mean).square() / self.logvar.exp()
        return 0.5 * (math.log(2 * math.pi) + self.logvar + scaled).sum(dim=(1, 2, 3))


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook with straight-through gradients (taming's VectorQuantizer2).

    legacy: True puts beta on the codebook term, as every published model was trained; False on the commitment term, as
    the paper means it.
    """

    def __init__(self, n_embed: int, embed_dim: int, beta: float = 0.25, legacy: bool = True):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_embed, 1.0 / n_embed)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, c, h, w) -> quantised (B, c, h, w), codebook loss (), indices (B, h, w) int64."""
        with full_precision(z):  # bfloat16 distances pick wrong codes
            z = z.float()
            indices = self.indices(z)
            codes = self.lookup(indices)
            commitment = (codes.detach() - z).square().mean()
            codebook = (codes - z.detach()).square().mean()
        if self.legacy:
            loss = commitment + self.beta * codebook
        else:
            loss = self.beta * commitment + codebook
        return z + (codes - z).detach(), loss, indices

    @torch.no_grad()
    def indices(self, z: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, h, w), the first of equally near codes."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (B h w, c)
        weight = self.embedding.weight.float()
        distance = flat.square().sum(1, keepdim=True) + weight.square().sum(1) - 2 * flat @ weight.T
        return distance.argmin(1).view(z.shape[0], *z.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, c, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()


# -- tiles -----------------------------------------------------------------------------------------------------------


def tiled(fn: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: float) -> Tensor:
    """fn on overlapping square tiles of x (B, C, H, W), neighbours blended linearly where they overlap.

    tile: side in units of x; overlap: share of a tile, in [0, 1). Bounds memory to one tile and the result; a whole
    that fits in one tile is fn(x) itself. fn changes sizes by one rational factor.
    """
    height, width = x.shape[2:]
    if max(height, width) <= tile:
        return fn(x)
    stride = max(1, tile - int(tile * overlap))
    ys, xs = (tile_starts(n, tile, stride) for n in (height, width))
    out: Tensor | None = None
    total: Tensor | None = None
    for top in ys:
        for left in xs:
            part = fn(x[:, :, top : top + tile, left : left + tile])
            rows, cols = min(tile, height), min(tile, width)
            if out is None or total is None:
                size = height * part.shape[2] // rows, width * part.shape[3] // cols
                out = part.new_zeros(*part.shape[:2], *size)
                total = part.new_zeros(size)
            weight = ramp(part.shape[2], rows, stride, part)[:, None] * ramp(part.shape[3], cols, stride, part)
            a, b = top * part.shape[2] // rows, left * part.shape[3] // cols
            out[:, :, a : a + part.shape[2], b : b + part.shape[3]] += weight * part
            total[a : a + part.shape[2], b : b + part.shape[3]] += weight
    assert out is not None and total is not None
    return out / total


def tile_starts(size: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin; the last one ends at the border."""
    return [0] if size <= tile else [*range(0, size - tile, stride), size - tile]


def ramp(n: int, tile: int, stride: int, like: Tensor) -> Tensor:
    """(n,) blending weights in (0, 1]: rising over the overlap, flat, falling."""
    edge = max(1, (tile - stride) * n // tile)
    positions = torch.arange(n, device=like.device, dtype=like.dtype)
    return (torch.minimum(positions + 0.5, n - 0.5 - positions) / edge).clamp(max=1.0)


# -- the codecs --------------------------------------------------------------------------------------------------------


class FirstStage(nn.Module):
    """Encoder, 1x1 convolutions around the bottleneck, decoder, and the codec protocol they share.

    Latents handed to a model are ((z - latent_mean) / latent_std - shift_factor) * scale_factor; the first two are
    buffers (c,) that exist with latent_stats and follow the latents of training.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        convs: tuple[nn.Conv2d, nn.Conv2d],
        embed_dim: int,
        factor: int,
        scaling: tuple[float, float],
        latent_stats: bool,
        tile: int | None,
        tile_overlap: float,
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv, self.post_quant_conv = convs
        self.embed_dim, self.factor = embed_dim, factor
        self.scale_factor, self.shift_factor = scaling
        self.latent_stats = latent_stats
        if latent_stats:
            self.register_buffer("latent_mean", torch.zeros(embed_dim))
            self.register_buffer("latent_std", torch.ones(embed_dim))
        if tile is not None and (tile % factor or tile < 2 * factor):
            raise VgmError(f"tile={tile} is not a multiple of the codec's factor {factor}", code=USAGE)
        if not 0 <= tile_overlap < 1:
            raise VgmError(f"tile_overlap={tile_overlap} is not in [0, 1)", code=USAGE)
        self.tile, self.tile_overlap = tile, tile_overlap

    # -- codec protocol

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of an image -> (c, H/f, W/f). Raises VgmError when channels or sizes do not fit."""
        channels, height, width = image_shape
        if channels != self.encoder.conv_in.in_channels:
            raise VgmError(
                f"this codec takes {self.encoder.conv_in.in_channels} channels, the images have {channels}", code=USAGE
            )
        if height % self.factor or width % self.factor:
            raise VgmError(f"{height}x{width} images do not divide by the codec's factor {self.factor}", code=USAGE)
        return self.embed_dim, height // self.factor, width // self.factor

    def encode(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1] -> moments (B, 2c, h, w), or the latents themselves (B, c, h, w) of a VQ model."""
        return tiled(self.moments, x, self.tile or max(x.shape), self.tile_overlap)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) -> images (B, C, H, W)."""
        tile = self.tile // self.factor if self.tile else max(z.shape)
        return tiled(self.reconstruct, self.unscale(z), tile, self.tile_overlap)

    def scale(self, z: Tensor) -> Tensor:
        if self.latent_stats:
            z = (z - per_channel(self.latent_mean)) / per_channel(self.latent_std)
        return (z - self.shift_factor) * self.scale_factor

    def unscale(self, z: Tensor) -> Tensor:
        z = z / self.scale_factor + self.shift_factor
        if self.latent_stats:
            z = z * per_channel(self.latent_std) + per_channel(self.latent_mean)
        return z

    # -- the two halves without scaling or tiles

    def moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def measure(self, z: Tensor, momentum: float = 1.0) -> None:
        """Move the statistics towards those of unscaled latents z (B, c, h, w), of all ranks; momentum 1 replaces."""
        flat = z.detach().float().transpose(0, 1).flatten(1)  # (c, B h w)
        both = torch.stack([flat.mean(1), flat.square().mean(1)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
            both /= torch.distributed.get_world_size()
        self.latent_mean.lerp_(both[0], momentum)
        self.latent_std.lerp_((both[1] - both[0].square()).clamp_min(1e-8).sqrt(), momentum)

    def follow(self, z: Tensor) -> None:
        """Called with every training batch's latents."""
        if self.latent_stats and self.training and torch.is_grad_enabled():
            self.measure(z, 0.02)

    # -- for objectives and the host

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the discriminator's gradient is balanced."""
        return self.decoder.conv_out.weight

    @property
    def checkpointing(self) -> bool:
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = on


def per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


class AutoencoderKL(FirstStage):
    """KL-regularised autoencoder; Stable Diffusion's VAE is preset kl-f8 (scale_factor 0.18215)."""

    def __init__(
        self,
        ch: int = 128,  # width of the highest resolution
        ch_mult: tuple[int, ...] = (1, 2, 4, 4),  # widths per level; each level after the first halves the size
        num_res_blocks: int = 2,  # per level; the decoder has one more
        attn_resolutions: tuple[int, ...] = (),  # in units of `resolution`
        resolution: int = 256,  # nominal; only decides where attention goes
        z_channels: int = 4,
        embed_dim: int = 4,  # channels of the latents
        in_channels: int = 3,
        out_ch: int | None = None,  # None: as in_channels
        dropout: float = 0.0,
        attn_type: AttnType = "vanilla",
        resamp_with_conv: bool = True,
        tanh_out: bool = False,
        norm_groups: int = 32,
        scale_factor: float = 1.0,
        shift_factor: float = 0.0,
        latent_stats: bool = False,  # measure mean and std of the latents per channel, and normalise by them
        tile: int | None = None,  # encode and decode in tiles of this many pixels; None: never
        tile_overlap: float = 0.25,
    ):
        shared: dict[str, Any] = {
            "ch": ch,
            "ch_mult": ch_mult,
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": attn_resolutions,
            "resolution": resolution,
            "z_channels": z_channels,
            "dropout": dropout,
            "attn_type": attn_type,
            "resamp_with_conv": resamp_with_conv,
            "norm_groups": norm_groups,
        }
        super().__init__(
            Encoder(in_channels=in_channels, double_z=True, **shared),
            Decoder(out_ch=out_ch or in_channels, tanh_out=tanh_out, **shared),
            (nn.Conv2d(2 * z_channels, 2 * embed_dim, 1), nn.Conv2d(embed_dim, z_channels, 1)),
            embed_dim,
            2 ** (len(ch_mult) - 1),
            (scale_factor, shift_factor),
            latent_stats,
            tile,
            tile_overlap,
        )

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """moments (B, 2c, h, w) -> scaled latents (B, c, h, w); noise standard normal, None for the mode."""
        posterior = DiagonalGaussian(moments)
        return self.scale(posterior.mean if noise is None else posterior.sample(noise))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) -> reconstruction and moments (B, 2c, h, w); noise as in `latents`."""
        moments = self.moments(x)
        posterior = DiagonalGaussian(moments)
        z = posterior.mean if noise is None else posterior.sample(noise)
        self.follow(z)
        return self.reconstruct(z), moments


class VQModel(FirstStage):
    """Vector-quantised autoencoder. As a codec its latents are NOT quantised: `decode` quantises first."""

    def __init__(
        self,
        n_embed: int = 8192,  # codes
        ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: tuple[int, ...] = (),
        resolution: int = 256,
        z_channels: int = 3,
        embed_dim: int = 3,
        in_channels: int = 3,
        out_ch: int | None = None,
        dropout: float = 0.0,
        attn_type: AttnType = "vanilla",
        resamp_with_conv: bool = True,
        tanh_out: bool = False,
        norm_groups: int = 32,
        beta: float = 0.25,
        legacy: bool = True,
        scale_factor: float = 1.0,
        shift_factor: float = 0.0,
        latent_stats: bool = False,
        tile: int | None = None,
        tile_overlap: float = 0.25,
    ):
        shared: dict[str, Any] = {
            "ch": ch,
            "ch_mult": ch_mult,
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": attn_resolutions,
            "resolution": resolution,
            "z_channels": z_channels,
            "dropout": dropout,
            "attn_type": attn_type,
            "resamp_with_conv": resamp_with_conv,
            "norm_groups": norm_groups,
        }
        super().__init__(
            Encoder(in_channels=in_channels, double_z=False, **shared),
            Decoder(out_ch=out_ch or in_channels, tanh_out=tanh_out, **shared),
            (nn.Conv2d(z_channels, embed_dim, 1), nn.Conv2d(embed_dim, z_channels, 1)),
            embed_dim,
            2 ** (len(ch_mult) - 1),
            (scale_factor, shift_factor),
            latent_stats,
            tile,
            tile_overlap,
        )
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta, legacy)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pre-quantised latents (B, c, h, w), scaled; there is no posterior to draw from."""
        return self.scale(moments)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Scaled latents (B, c, h, w) -> images, through the nearest codes unless force_not_quantize."""
        z = self.unscale(z)
        if not force_not_quantize:
            z = self.quantize(z)[0]
        return tiled(self.reconstruct, z, self.tile // self.factor if self.tile else max(z.shape), self.tile_overlap)

    def encode_tokens(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1] -> code indices (B, h, w) int64."""
        return self.quantize.indices(self.encode(x).float())

    def decode_tokens(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> images (B, C, H, W)."""
        z = self.quantize.lookup(indices)
        return tiled(self.reconstruct, z, self.tile // self.factor if self.tile else max(z.shape), self.tile_overlap)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, H, W) -> reconstruction, codebook loss (), indices (B, h, w); noise is unused."""
        h = self.moments(x)
        self.follow(h)
        z, loss, indices = self.quantize(h)
        return self.reconstruct(z), loss, indices
