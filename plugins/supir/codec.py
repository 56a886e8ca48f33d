"""Latent diffusion's autoencoder with a second encoder, which sees degraded pictures and gives latents of clean ones.

Yu et al. 2024 (arXiv 2401.13627), sec. 3.1. Official code: Fanghua-Yu/SUPIR@bda91af SUPIR/models/SUPIR_model.py
(`denoise_encoder`, a copy of the encoder that was trained on degraded pictures). The other encoder encodes what is
clean already; the decoder is one for both.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.nets.autoencoder import AttnType, Encoder
from vgm_cli.nets.autoencoder_kl import AutoencoderKL
from vgm_cli.nets.first_stage import DiagonalGaussian, tiled
from vgm_cli.ranges import Blocks, Fraction, Positive, Side, Width

from .tiles import in_tiles


class RobustAutoencoderKL(AutoencoderKL):
    """An AutoencoderKL whose `denoise_encoder` reads degraded pictures. In tiles its group normalisations see as
    tile_statistics says: every tile its own, neighbours blended; or of all tiles, as SUPIR's official code has it."""

    def __init__(
        self,
        ch: Width = 128,  # width of the highest resolution
        ch_mult: tuple[int, ...] = (1, 2, 4, 4),  # widths per level; each level after the first halves the size
        num_res_blocks: Blocks = 2,  # per level; the decoder has one more
        attn_resolutions: tuple[int, ...] = (),  # in units of `resolution`
        resolution: Side = 256,  # nominal; only decides where attention goes
        z_channels: Width = 4,  # channels before the 1x1 convolution to the latents
        embed_dim: Width = 4,  # channels of the latents
        in_channels: Width = 3,  # channels of the images
        out_ch: Width | None = None,  # None: as in_channels
        dropout: Fraction = 0.0,  # share of activations dropped in residual blocks
        attn_type: AttnType = "vanilla",  # kind of attention: vanilla, linear or none
        resamp_with_conv: bool = True,  # levels are halved and doubled by convolutions
        tanh_out: bool = False,  # images end in a tanh
        norm_groups: Width = 32,  # groups of the group normalisations
        scale_factor: Positive = 0.13025,  # latents are multiplied by this, so that models see unit variance
        shift_factor: float = 0.0,  # subtracted from the latents before that
        latent_stats: bool = False,  # mean and std of the latents per channel, by which they are normalised
        tile: Width | None = None,  # encode and decode in tiles of this many pixels; None: never
        tile_overlap: Fraction = 0.25,  # share of a tile that its neighbour covers, too, of statistics "own"
        tile_statistics: Literal["own", "pooled", "estimated"] = "pooled",  # see tiles.in_tiles
    ):
        own = {k: v for k, v in locals().items() if k not in ("self", "__class__", "tile_statistics")}
        super().__init__(**own)
        self.tile_statistics = tile_statistics
        self.denoise_encoder = copy.deepcopy(self.encoder)

    def encoded(self, encoder: Encoder, x: Tensor) -> Tensor:
        """Moments (B, 2c, h, w) of images by one of the two encoders."""
        if self.tile is None or self.tile_statistics == "own":
            return tiled(lambda part: self.quant_conv(encoder(part)), x, self.tile or max(x.shape), self.tile_overlap)
        return self.quant_conv(in_tiles(encoder, x, self.tile, self.tile_statistics, self.factor))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoded(self.encoder, x)

    def decode(self, z: Tensor) -> Tensor:
        if self.tile is None or self.tile_statistics == "own":
            return super().decode(z)
        z = self.post_quant_conv(self.unscale(z))
        return in_tiles(self.decoder, z, max(1, self.tile // self.factor), self.tile_statistics, self.factor)

    def degraded_latents(self, x: Tensor) -> Tensor:
        """Degraded pictures (B, C, H, W) in [-1, 1] -> scaled latents (B, c, h, w) of what they show, the mode."""
        return self.scale(DiagonalGaussian(self.encoded(self.denoise_encoder, x)).mean)

    def restored(self, x: Tensor) -> Tensor:
        """Degraded pictures -> the decoder's picture of their latents: the first of SUPIR's two stages."""
        return self.decode(self.degraded_latents(x))

    @torch.no_grad()
    def start(self) -> None:
        """The second encoder as the first."""
        self.denoise_encoder.load_state_dict(self.encoder.state_dict())

    @property
    def checkpointing(self) -> bool:
        return self.encoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = self.denoise_encoder.checkpointing = on


def robust(codec: Any) -> RobustAutoencoderKL | None:
    """The codec, where it has a second encoder."""
    return codec if isinstance(codec, RobustAutoencoderKL) else None
