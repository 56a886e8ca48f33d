"""First stages: an encoder and a decoder around a bottleneck, as a codec for latent and for token models.

Esser et al., CVPR 2021 (arXiv 2012.09841); Rombach et al., CVPR 2022 (arXiv 2112.10752); Sun et al. 2024 (arXiv
2406.06525). Official code: CompVis/taming-transformers@3ba01b2 taming/models/vqgan.py, CompVis/latent-diffusion@a506df5
ldm/models/autoencoder.py, FoundationVision/LlamaGen@ce98ec4 tokenizer/tokenizer_image/vq_model.py: one network, the
quantizers differ. Deviations: large images may go through in blended tiles; `latent_stats` measures mean and
deviation of the latents during training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.autoencoder import AttnType, Decoder, Encoder
from vgm_cli.nn.collectives import average
from vgm_cli.nn.example import noise
from vgm_cli.nn.gumbel import GumbelQuantizer
from vgm_cli.nn.quantize import EMAVectorQuantizer, Unknown, VectorQuantizer
from vgm_cli.ranges import Blocks, Fraction, NonNegative, Positive, Side, Vocabulary, Width

# -- posterior ---------------------------------------------------------------------------------------------------------


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
    """Encoder, 1x1 convolutions around the bottleneck, decoder, and the codec protocol that all first stages share.

    Latents handed to a model are ((z - latent_mean) / latent_std - shift_factor) * scale_factor, (B, embed_dim, h, w).
    The first two are buffers (embed_dim,) that exist with latent_stats and follow the latents of training.
    """

    encoder: Any
    decoder: Any
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        encoder: nn.Module,  # images (B, C, H, W) -> (B, z, h, w)
        decoder: nn.Module,  # (B, z, h, w) -> images
        convs: tuple[nn.Module, nn.Module],  # 1x1 convolutions after the encoder and before the decoder, or identities
        in_channels: int,  # of images
        embed_dim: Width,  # channels of the latents
        factor: int,  # side of an image over side of its latents
        scaling: tuple[float, float],  # scale_factor, shift_factor
        latent_stats: bool,  # measure mean and deviation of the latents per channel, and normalise by them
        tile: Width | None,  # encode and decode in tiles of this many pixels; None: never
        tile_overlap: Fraction,  # share of a tile that its neighbour covers, too
    ):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv, self.post_quant_conv = convs
        self.in_channels, self.embed_dim, self.factor = in_channels, embed_dim, factor
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

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        side = max(32, 2 ** len(config["ch_mult"]))
        return {"x": noise(1, config["in_channels"], side, side)}

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of an image -> (c, H/f, W/f). Raises VgmError when channels or sizes do not fit."""
        channels, height, width = image_shape
        if channels != self.in_channels:
            hint = f"data.channels={self.in_channels}" if self.in_channels in (1, 3) else ""
            raise VgmError(f"this codec takes {self.in_channels} channels, the images have {channels}", hint, USAGE)
        if height % self.factor or width % self.factor:
            hint = f"data.size={max(min(height, width) // self.factor, 1) * self.factor}"
            raise VgmError(f"{height}×{width} images do not divide by the codec's factor {self.factor}", hint, USAGE)
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
        both = average(torch.stack([flat.mean(1), flat.square().mean(1)]))
        self.latent_mean.lerp_(both[0], momentum)
        self.latent_std.lerp_((both[1] - both[0].square()).clamp_min(1e-8).sqrt(), momentum)

    def follow(self, z: Tensor) -> None:
        """Called with every training batch's latents."""
        if self.latent_stats and self.training and torch.is_grad_enabled():
            self.measure(z, 0.02)

    # -- for objectives and the host

    @property
    def last_layer(self) -> Tensor:
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


# -- vector-quantised --------------------------------------------------------------------------------------------------


class QuantizedStage(FirstStage):
    """A first stage with a codebook: a codec of tokens (`tokens`, `decode_tokens`) or of latents.

    Latents are NOT quantised when they are handed to a model; `decode` quantises them first.
    """

    quantize: Any  # a quantizer of vgm_cli/nn/quantize.py or gumbel.py

    @property
    def stochastic(self) -> bool:
        """Does the quantizer take noise while training?"""
        return isinstance(self.quantize, GumbelQuantizer)

    # -- codec of tokens

    @property
    def codebook_size(self) -> int:
        return self.quantize.codebook_size

    def token_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int]:
        """(C, H, W) of an image -> (h, w)."""
        _, h, w = self.latent_shape(image_shape)
        return h, w

    def tokens(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) in [-1, 1] -> ids (B, h, w) int64 in [0, codebook_size)."""
        return self.quantize.tokens(self.encode(x).float())

    def decode_tokens(self, ids: Tensor) -> Tensor:
        """(B, h, w) int64 -> images (B, C, H, W) about [-1, 1]."""
        return self.from_codes(self.quantize.lookup(ids))

    # -- codec of latents

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pre-quantised latents (B, c, h, w), scaled; there is no posterior to draw from."""
        return self.scale(moments)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Scaled latents (B, c, h, w) -> images, through the nearest codes unless force_not_quantize."""
        z = self.unscale(z)
        return self.from_codes(z if force_not_quantize else self.quantize(z)[0])

    def from_codes(self, codes: Tensor) -> Tensor:
        """(B, c, h, w) unscaled -> images, in tiles where the model has them."""
        tile = self.tile // self.factor if self.tile else max(codes.shape)
        return tiled(self.reconstruct, codes, tile, self.tile_overlap)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, H, W) -> reconstruction, codebook loss (), indices (B, h, w); noise: see GumbelQuantizer."""
        h = self.moments(x)
        self.follow(h)
        z, loss, indices = self.quantize(h, noise)
        return self.reconstruct(z), loss, indices


class VQModel(QuantizedStage):
    """Vector-quantised autoencoder of convolutions, residual blocks and attention (VQGAN, LDM, LlamaGen)."""

    def __init__(
        self,
        n_embed: Vocabulary = 8192,  # number of codes
        ch: Width = 128,  # width of the highest resolution
        ch_mult: tuple[int, ...] = (1, 2, 4),  # widths per level; each level after the first halves the size
        decoder_ch_mult: tuple[int, ...] | None = None,  # None: as ch_mult
        num_res_blocks: Blocks = 2,  # per level; the decoder has one more
        attn_resolutions: tuple[int, ...] = (),  # in units of `resolution`
        resolution: Side = 256,  # nominal; only decides where attention goes
        z_channels: Width = 3,  # channels before the 1x1 convolution to the codes
        embed_dim: Width = 3,  # dimensions of a code
        in_channels: Width = 3,  # channels of the images
        out_ch: Width | None = None,  # None: as in_channels
        dropout: Fraction = 0.0,  # share of activations dropped in residual blocks
        attn_type: AttnType = "vanilla",  # kind of attention: vanilla, linear or none
        resamp_with_conv: bool = True,  # levels are halved and doubled by convolutions
        tanh_out: bool = False,  # images end in a tanh
        norm_groups: Width = 32,  # groups of the group normalisations
        quantizer: Literal["nearest", "ema", "gumbel"] = "nearest",  # ema: codes are running means
        beta: NonNegative = 0.25,  # weight of the commitment, or of the codebook term when legacy
        legacy: bool = True,  # beta weighs the codebook's term, as in all published weights; false: the commitment
        l2_norm: bool = False,  # latents and codes of unit length
        entropy_weight: NonNegative = 0.0,  # of the loss that spreads the use of codes
        ema_decay: Fraction = 0.99,  # of the codes' running means (ema)
        straight_through: bool = True,  # forward takes one code, backward the soft mixture (gumbel)
        kl_weight: NonNegative = 5e-4,  # of the divergence from uniform use (gumbel)
        remap: str | None = None,  # .npy of the codes in use; ids count only those
        unknown_index: Unknown = "random",  # id of the other codes: random, "extra" for one id more, or a number
        scale_factor: Positive = 1.0,  # latents are multiplied by this, so that models see unit variance
        shift_factor: float = 0.0,  # subtracted from the latents before that
        latent_stats: bool = False,  # measure mean and deviation of the latents per channel, and normalise by them
        tile: Width | None = None,  # encode and decode in tiles of this many pixels; None: never
        tile_overlap: Fraction = 0.25,  # share of a tile that its neighbour covers, too
    ):
        shared: dict[str, Any] = {
            "ch": ch,
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": attn_resolutions,
            "resolution": resolution,
            "z_channels": z_channels,
            "dropout": dropout,
            "attn_type": attn_type,
            "resamp_with_conv": resamp_with_conv,
            "norm_groups": norm_groups,
        }
        back = decoder_ch_mult or ch_mult
        if len(back) != len(ch_mult):
            raise VgmError("decoder_ch_mult needs as many levels as ch_mult", code=USAGE)
        super().__init__(
            Encoder(in_channels=in_channels, ch_mult=ch_mult, double_z=False, **shared),
            Decoder(out_ch=out_ch or in_channels, ch_mult=back, tanh_out=tanh_out, **shared),
            (nn.Conv2d(z_channels, embed_dim, 1), nn.Conv2d(embed_dim, z_channels, 1)),
            in_channels,
            embed_dim,
            2 ** (len(ch_mult) - 1),
            (scale_factor, shift_factor),
            latent_stats,
            tile,
            tile_overlap,
        )
        if quantizer == "gumbel":
            self.quantize = GumbelQuantizer(n_embed, embed_dim, None, straight_through, kl_weight)
        else:
            more: dict[str, Any] = {"l2_norm": l2_norm, "entropy_weight": entropy_weight}
            more |= {"remap": remap, "unknown_index": unknown_index}
            if quantizer == "ema":
                self.quantize = EMAVectorQuantizer(n_embed, embed_dim, beta, ema_decay, **more)
            else:
                self.quantize = VectorQuantizer(n_embed, embed_dim, beta, legacy, **more)
