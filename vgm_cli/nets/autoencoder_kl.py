"""The KL-regularised autoencoder of latent diffusion. Rombach et al., CVPR 2022 (arXiv 2112.10752), sec. 3.1.

Official code: CompVis/latent-diffusion@a506df5 ldm/models/autoencoder.py. Parameter names are the official ones; VA-VAE
(arXiv 2501.01423; hustvl/LightningDiT@2725fed vavae/ldm/models/autoencoder.py) is the same network with a projection,
MAR's KL-16 (arXiv 2406.11838; LTH14/mar@fe470ac models/vae.py) the same with less attention in the decoder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vgm_cli.nets.autoencoder import AttnType, Decoder, Encoder
from vgm_cli.nets.first_stage import DiagonalGaussian, FirstStage
from vgm_cli.ranges import Blocks, Fraction, Positive, Side, Whole, Width


class AutoencoderKL(FirstStage):
    """KL-regularised autoencoder. With feature_dim it holds VA-VAE's projection between its latents and the features of
    a vision foundation model, which training alone uses."""

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
        scale_factor: Positive = 1.0,  # latents are multiplied by this, so that models see unit variance
        shift_factor: float = 0.0,  # subtracted from the latents before that
        latent_stats: bool = False,  # measure mean and std of the latents per channel, and normalise by them
        tile: Width | None = None,  # encode and decode in tiles of this many pixels; None: never
        tile_overlap: Fraction = 0.25,  # share of a tile that its neighbour covers, too
        feature_dim: Whole = 0,  # width of a foundation model's features, which latents are compared with; 0: none
        reverse_proj: bool = True,  # latents are projected to features; false: features to latents, with a bias
        decoder_attn: bool = True,  # the decoder has attention where the encoder has; false: in the middle alone
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
        of_decoder = {**shared, "attn_resolutions": attn_resolutions if decoder_attn else ()}
        super().__init__(
            Encoder(in_channels=in_channels, double_z=True, **shared),
            Decoder(out_ch=out_ch or in_channels, tanh_out=tanh_out, **of_decoder),
            (nn.Conv2d(2 * z_channels, 2 * embed_dim, 1), nn.Conv2d(embed_dim, z_channels, 1)),
            in_channels,
            embed_dim,
            2 ** (len(ch_mult) - 1),
            (scale_factor, shift_factor),
            latent_stats,
            tile,
            tile_overlap,
        )
        self.feature_dim, self.reverse_proj = feature_dim, reverse_proj
        if feature_dim:
            ends = (embed_dim, feature_dim) if reverse_proj else (feature_dim, embed_dim)
            self.linear_proj = nn.Conv2d(*ends, 1, bias=not reverse_proj)

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

    def compared(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Unscaled latents (B, c, h, w) and features (B, feature_dim, h, w), one of them projected to the other's
        channels."""
        return (self.linear_proj(z), features) if self.reverse_proj else (z, self.linear_proj(features))
