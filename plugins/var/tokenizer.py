"""VAR's tokenizer: one codebook, used on grids from coarse to fine, each for what the coarser ones have left.

Tian et al. 2024 (arXiv 2404.02905), algorithms 1 and 2. Official code: FoundationVision/VAR@78b9539 models/quant.py,
models/vqvae.py, models/basic_vae.py; parameter names are the official ones, but the encoder's and the decoder's are
VQGAN's (queries, keys and values of an attention apart), whose network it is (vgm_cli/nets/autoencoder.py).
Deviations: `keep` decodes the first few scales in training; codes are counted without a process group, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.autoencoder import AttnType, Decoder, Encoder
from vgm_cli.nets.first_stage import QuantizedStage
from vgm_cli.nn.collectives import gather, total
from vgm_cli.nn.example import noise
from vgm_cli.nn.precision import full_precision
from vgm_cli.nn.quantize import VectorQuantizer, code_counts
from vgm_cli.ranges import Blocks, Fraction, NonNegative, Side, Vocabulary, Whole, Width

from .presets import ladder, squares

# -- phi: what is done to the codes of a grid after they are enlarged --------------------------------------------------


class Phi(nn.Conv2d):
    """(1 - share) h + share conv3x3(h)."""

    def __init__(self, channels: int, share: float):
        super().__init__(channels, channels, 3, padding=1)
        self.share = share

    def forward(self, h: Tensor) -> Tensor:
        return (1 - self.share) * h + self.share * super().forward(h)


def phi_of(scale: int, scales: int, phis: int) -> int:
    """Which of several phi a scale takes: that whose tick on [0, 1] is the nearest to the scale's place there, the
    first of two as near. The ticks of four are a little further out than those of any other number."""
    low = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(low, 1 - low, phis)
    return int(np.abs(ticks - scale / max(scales - 1, 1)).argmin())


# -- the quantizer -----------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """One scale of an image that is taken apart."""

    seen: Tensor  # (B, C, p, p): what the coarser scales have left, as means of areas
    ids: Tensor  # (B, p, p): the codes nearest to it
    features: Tensor  # (B, C, h, w): what this scale and the coarser ones add up to


class MultiScaleQuantizer(VectorQuantizer):
    """Features (B, C, s, s) as a sum over grids of sides p_1 < ... < p_K = s: phi_k(bicubic(codes_k)), k = 1 to K.

    ids of an image are those of all grids one after the other, (B, L), L = sum of p_k^2. ema_vocab_hit_SV, (K, codes),
    counts how often a code was chosen on every scale, a running mean over training batches of all processes.
    """

    ema_vocab_hit_SV: Tensor
    DECAY = 0.99  # of that mean

    def __init__(
        self,
        n_embed: int,  # codes
        embed_dim: int,  # their length C
        patch_nums: tuple[int, ...],  # sides of the grids
        share_quant_resi: int = 4,  # how many phi there are: one for each scale (0), or so many
        quant_resi: float = 0.5,  # share of the convolution in phi; 0: no phi
        using_znorm: bool = False,  # the nearest code by angle instead of by distance
        beta: float = 0.25,  # weight of the commitment
    ):
        super().__init__(n_embed, embed_dim, beta, legacy=False)
        self.patch_nums, self.using_znorm = patch_nums, using_znorm

        def phis(n: int) -> nn.ModuleList:
            share = abs(quant_resi)
            return nn.ModuleList(Phi(embed_dim, share) if share > 1e-6 else nn.Identity() for _ in range(n))

        if share_quant_resi == 1:
            self.quant_resi: nn.Module = nn.ModuleDict({"qresi": phis(1)[0]})
        elif share_quant_resi:
            self.quant_resi = nn.ModuleDict({"qresi_ls": phis(share_quant_resi)})
        else:
            self.quant_resi = phis(len(patch_nums))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(patch_nums), n_embed))

    def phi(self, scale: int) -> nn.Module:
        own = self.quant_resi
        if isinstance(own, nn.ModuleDict):
            if "qresi" in own:
                return own["qresi"]
            own = own["qresi_ls"]  # type: ignore[assignment]
        assert isinstance(own, nn.ModuleList)
        return own[phi_of(scale, len(self.patch_nums), len(own))]

    def indices(self, z: Tensor) -> Tensor:
        """z: (B, C, p, p) -> the nearest codes (B, p, p), by distance, or with using_znorm by angle."""
        if not self.using_znorm:
            return super().indices(z)
        flat = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), dim=-1)
        return (flat @ F.normalize(self.codebook, dim=-1).T).argmax(1).view(z.shape[0], *z.shape[2:])

    def added(self, features: Tensor, codes: Tensor, scale: int) -> Tensor:
        """features (B, C, s, s) and what the code vectors (B, C, p, p) of a scale add to them."""
        if scale < len(self.patch_nums) - 1:
            codes = F.interpolate(codes, size=features.shape[2:], mode="bicubic")
        return features + self.phi(scale)(codes)

    def scales(self, f: Tensor) -> Iterator[Scale]:
        """Features (B, C, s, s) taken apart, scale after scale. Gradients go to the codes and to phi."""
        rest = f.detach()
        features = torch.zeros_like(rest)
        last = len(self.patch_nums) - 1
        for k, side in enumerate(self.patch_nums):
            seen = rest if k == last else F.interpolate(rest, size=(side, side), mode="area")
            ids = self.indices(seen)
            more = self.added(torch.zeros_like(features), self.embed(ids), k)
            features = features + more
            rest = rest - more.detach()
            yield Scale(seen, ids, features)

    def forward(self, z: Tensor, noise: Tensor | None = None, keep: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, C, s, s) -> its sum of codes with straight-through gradients, the loss (), ids (B, L).

        keep: give the sum of the first so many scales, whose gradients go through `coarse`; None: of all. The loss is
        the mean over the scales of beta |f - sg(sum)|^2 + |sg(f) - sum|^2, the sums being those of the first k scales.
        """
        with full_precision(z.device):
            z = z.float()
            fixed, loss, ids = z.detach(), z.new_zeros(()), []
            scales, kept = len(self.patch_nums), fixed
            for k, scale in enumerate(self.scales(z)):
                loss = loss + self.beta * F.mse_loss(scale.features.detach(), z) + F.mse_loss(scale.features, fixed)
                ids.append(scale.ids.flatten(1))
                if k < (keep or scales):
                    kept = scale.features
            if self.training and torch.is_grad_enabled():
                self.count(ids)
            through = self.coarse(z, keep or scales)
        return through + (kept - through).detach(), loss / scales, torch.cat(ids, dim=1)

    def coarse(self, z: Tensor, keep: int) -> Tensor:
        """What the first `keep` scales can tell of z (B, C, s, s): means of areas, enlarged. z itself, of all scales.

        Were the gradients of a coarse sum given to z as they are, they would push what no coarse code can follow, and
        the features would grow without end.
        """
        if keep == len(self.patch_nums):
            return z
        side = self.patch_nums[keep - 1]
        means = F.interpolate(z, size=(side, side), mode="area")
        return F.interpolate(means, size=z.shape[2:], mode="bicubic")

    @torch.no_grad()
    def count(self, ids: list[Tensor]) -> None:
        n = self.ema_vocab_hit_SV.shape[1]
        found = torch.stack([code_counts(i, n) for i in ids]).to(self.ema_vocab_hit_SV)
        self.ema_vocab_hit_SV.mul_(self.DECAY).add_(total(found), alpha=1 - self.DECAY)

    @torch.no_grad()
    def tokens(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z: (B, C, s, s) -> ids (B, L)."""
        with full_precision(z.device):
            return torch.cat([scale.ids.flatten(1) for scale in self.scales(z.float())], dim=1)

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (B, L) of all scales, or of the first few -> the features (B, C, s, s) that they add up to. VgmError: so
        many ids end within a scale."""
        sizes = [p * p for p in self.patch_nums]
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        if ids.shape[1] not in ends:
            text = f"{ids.shape[1]} ids are no whole number of scales"
            raise VgmError(text, f"the scales end at {', '.join(map(str, ends))}", USAGE)
        side = self.patch_nums[-1]
        features = self.codebook.new_zeros(len(ids), self.codebook.shape[1], side, side)
        for k, part in enumerate(ids.split(sizes[: ends.index(ids.shape[1]) + 1], dim=1)):
            features = self.added(features, self.embed(part.unflatten(1, (self.patch_nums[k],) * 2)), k)
        return features

    @torch.no_grad()
    def restart(self, dead: Tensor, z: Tensor, u: Tensor) -> None:
        """Move the codes where dead (n,) is true onto what is left of features z (B, C, s, s) of all processes: on
        scale floor(K u), at the place that the rest of u (n,) in [0, 1) chooses, each scale as often as any other."""
        with full_precision(z.device):
            place = u * len(self.patch_nums)
            scale, within = place.long().clamp(max=len(self.patch_nums) - 1), place % 1
            weight = self.embedding.weight
            for k, found in enumerate(list(self.scales(z.float()))):
                flat = gather(found.seen.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))
                chosen = flat[(within * len(flat)).long().clamp(max=len(flat) - 1)]
                weight.copy_(torch.where((dead & (scale == k))[:, None], chosen, weight))

    @torch.no_grad()
    def place(self, z: Tensor) -> None:
        """Put all codes onto features z (B, C, s, s) of data, as many of every scale."""
        n = len(self.embedding.weight)
        everything = torch.ones(n, dtype=torch.bool, device=z.device)
        self.embedding.weight.zero_()  # nothing is taken away from scale to scale, but for phi's biases
        self.restart(everything, z, torch.arange(n, device=z.device) / n)

    def usage(self) -> tuple[Tensor, Tensor]:
        """Of every scale lately: the perplexity of its codes and the share of codes that were chosen, (K,) each."""
        hits = self.ema_vocab_hit_SV
        share = hits / hits.sum(1, keepdim=True).clamp_min(1e-20)
        perplexity = (-(share * (share + 1e-10).log()).sum(1)).exp()
        return perplexity, (share > 1e-3 / hits.shape[1]).float().mean(1)


# -- the codec ---------------------------------------------------------------------------------------------------------


class VARTokenizer(QuantizedStage):
    """Codec of tokens (a pyramid, see api.PyramidTokenizer), or of its features before they are quantised.

    VgmError: sides of grids that do not grow.
    """

    quantize: MultiScaleQuantizer

    def __init__(
        self,
        n_embed: Vocabulary = 4096,  # number of codes
        embed_dim: Width = 32,  # dimensions of a code, channels of the features
        patch_nums: tuple[Width, ...] | None = None,  # sides of the grids, coarse to fine; None: see presets.ladder
        resolution: Side = 256,  # side of the images, where patch_nums is left open
        ch: Width = 160,  # width of the highest resolution
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),  # widths per level; each level after the first halves the size
        num_res_blocks: Blocks = 2,  # per level; the decoder has one more
        attn_type: AttnType = "vanilla",  # attention at the lowest level: vanilla, linear or none
        in_channels: Width = 3,  # channels of the images
        dropout: Fraction = 0.0,  # share of activations dropped in residual blocks
        norm_groups: Width = 32,  # groups of the group normalisations
        share_quant_resi: Whole = 4,  # number of phi convolutions; 0: one for each scale
        quant_resi: Fraction = 0.5,  # share of the convolution in phi
        using_znorm: bool = False,  # nearest codes by angle
        beta: NonNegative = 0.25,  # weight of the commitment
    ):
        levels = len(ch_mult)
        factor = 2 ** (levels - 1)
        sides = tuple(patch_nums or ladder(max(resolution // factor, 1)))
        if any(a >= b for a, b in itertools.pairwise(sides)):
            raise VgmError(f"patch_nums={list(sides)} are not sides from coarse to fine", "example: [1,2,4,7]", USAGE)
        shared: dict[str, Any] = {
            "ch": ch,
            "ch_mult": ch_mult,
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": (1,),
            "resolution": factor,  # so that the lowest level alone has attention
            "z_channels": embed_dim,
            "dropout": dropout,
            "attn_type": attn_type,
            "norm_groups": norm_groups,
        }
        super().__init__(
            Encoder(in_channels=in_channels, double_z=False, **shared),
            Decoder(out_ch=in_channels, **shared),
            (nn.Conv2d(embed_dim, embed_dim, 3, padding=1), nn.Conv2d(embed_dim, embed_dim, 3, padding=1)),
            in_channels,
            embed_dim,
            factor,
            (1.0, 0.0),
            latent_stats=False,
            tile=None,
            tile_overlap=0.25,
        )
        self.patch_nums = sides
        self.quantize = MultiScaleQuantizer(n_embed, embed_dim, sides, share_quant_resi, quant_resi, using_znorm, beta)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        factor = 2 ** (len(config["ch_mult"]) - 1)
        side = factor * (config["patch_nums"] or ladder(max(config["resolution"] // factor, 1)))[-1]
        return {"x": noise(1, config["in_channels"], side, side)}

    # -- pyramid of tokens

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of an image -> (c, s, s). VgmError: the grids do not end at s."""
        shape = super().latent_shape(image_shape)
        side = self.patch_nums[-1]
        if shape[1:] != (side, side):
            found, wanted = f"{image_shape[1]}x{image_shape[2]}", self.factor * side
            hint = f"patch_nums={list(ladder(shape[1]))}".replace(" ", "") if shape[1] == shape[2] else "data.size=N"
            raise VgmError(f"this tokenizer's grids are for images of {wanted}x{wanted}, not {found}", hint, USAGE)
        return shape

    def scales(self, image_shape: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
        self.latent_shape(image_shape)
        return squares(self.patch_nums)

    def token_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:  # type: ignore[override]
        return (sum(h * w for h, w in self.scales(image_shape)),)

    def code_vectors(self) -> Tensor:
        return self.quantize.codebook

    def added(self, features: Tensor, codes: Tensor, scale: int) -> Tensor:
        return self.quantize.added(features, codes, scale)

    def decode_features(self, features: Tensor) -> Tensor:
        """(B, C, s, s), of all scales or of the first few -> images (B, C, H, W) in [-1, 1]."""
        return self.reconstruct(features).clamp(-1, 1)

    def from_codes(self, codes: Tensor) -> Tensor:
        return self.decode_features(codes)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, H, W) -> reconstruction, codebook loss (), ids (B, L)."""
        z, loss, ids = self.quantize(self.moments(x))
        return self.reconstruct(z), loss, ids
