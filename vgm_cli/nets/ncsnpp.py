"""NCSN++, DDPM++ and DDPM: the U-Nets of score-based models and rectified flows.

Song et al. 2021 (arXiv 2011.13456), app. H. Official code: yang-song/score_sde_pytorch@cb1f359 models/ncsnpp.py,
models/ddpm.py (resblock_type=ddpm, skip_rescale=false, norm_groups=32: the same layers in the same order) and
gnobitab/RectifiedFlow@5a1fd4d ImageGeneration/models/ncsnpp.py. Parameter names are the official ones: a flat list
`all_modules` walked in the order of its construction.
Deviations: attention is fused; progressive="residual" works with a FIR filter (officially it cannot run); the table of
noise levels is float32 and needs no lookup outside it. Added, off by default: classes (`num_classes`, `null_class`) and
`patch_size` p, which moves p x p pixels into channels around the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.ncsnpp_layers import (
    ACTIVATIONS,
    Attention,
    Combine,
    Fourier,
    Resample,
    ResBlock,
    conv3x3,
    group_norm,
    initialised,
    positions,
    residual,
)
from vgm_cli.nn.example import images
from vgm_cli.nn.features import places
from vgm_cli.ranges import Blocks, Fraction, NonNegative, Positive, Side, Whole, Width, ordered

Activation = Literal["swish", "elu", "relu", "lrelu"]
Progressive = Literal["none", "output_skip", "residual"]
ProgressiveInput = Literal["none", "input_skip", "residual"]


def noise_levels(sigma_min: float, sigma_max: float, num_scales: int) -> Tensor:
    """(num_scales,) float32, from sigma_max down to sigma_min in equal ratios."""
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), num_scales, dtype=torch.float64).exp().float()


class NCSNpp(nn.Module):
    """NCSN++ and DDPM++ (Song et al. 2021): a velocity, score or noise network. The defaults are DDPM++ for 32 pixels.

    x: (B, in_channels, H, W), t: (B,), y: (B,) int64 -> like x. With embedding_type=fourier the network is given the
    noise level itself as t and embeds its logarithm; with positional, t is embedded as it is. scale_by_sigma divides
    the output by the noise level: by t (fourier), or by entry t of the descending ladder sigma_max..sigma_min of
    num_scales levels (positional). VgmError: a side that cannot be halved once per level.
    """

    checkpointing = False

    def __init__(
        self,
        image_size: Side = 32,  # side of x
        in_channels: Width = 3,  # channels of x
        nf: Width = 128,  # channels of the first level
        ch_mult: Sequence[int] = (1, 2, 2, 2),  # channels of each level over nf
        num_res_blocks: Blocks = 4,  # residual blocks of a level; the decoder has one more
        attn_resolutions: Sequence[int] = (16,),  # sides at which attention follows every block of the encoder
        dropout: Fraction = 0.1,  # share of activations dropped in residual blocks
        resblock_type: Literal["biggan", "ddpm"] = "biggan",  # biggan changes the size inside the block
        resamp_with_conv: bool = True,  # levels are halved and doubled by convolutions (ddpm)
        fir: bool = False,  # filtered changes of size
        fir_kernel: Sequence[float] = (1, 3, 3, 1),  # taps of that filter
        skip_rescale: bool = True,  # sums of two branches are divided by sqrt(2)
        progressive: Progressive = "none",  # decoder's levels give images (output_skip) or features (residual) to sum
        progressive_input: ProgressiveInput = "none",  # the image, smaller and smaller, joins the encoder
        progressive_combine: Literal["sum", "cat"] = "sum",  # how it joins
        embedding_type: Literal["positional", "fourier"] = "positional",  # of t, see above
        fourier_scale: Positive = 16.0,  # deviation of the random Fourier frequencies
        scale_by_sigma: bool = False,  # divide the output by the noise level, see above
        centered: bool = True,  # x is in [-1, 1] already; false maps [0, 1] there
        conditional: bool = True,  # the network is told t
        init_scale: NonNegative = 0.0,  # of every block's last convolution; 0: almost zero
        nonlinearity: Activation = "swish",  # of the layers
        sigma_min: Positive = 0.01,  # lowest noise level of the ladder
        sigma_max: Positive = 50.0,  # highest noise level of the ladder
        num_scales: Width = 1000,  # levels of the ladder
        num_classes: Whole | None = 0,  # 0 or None is unconditional
        null_class: bool = False,  # the label table has one more row, for "no class"
        patch_size: Width = 1,  # squares of so many pixels become channels; 1: none
        norm_groups: Width | None = None,  # of every normalisation, the widths divide by it; None: see group_norm
    ):
        super().__init__()
        ordered(sigma_min, sigma_max, "sigma_min, sigma_max")
        levels, side = len(ch_mult), image_size // patch_size
        if side * patch_size != image_size or side % 2 ** (levels - 1):
            raise VgmError(
                f"{image_size} pixels cannot be halved {levels - 1} times in patches of {patch_size}",
                f"data.size a multiple of {patch_size * 2 ** (levels - 1)}, or fewer entries in model.ch_mult",
                USAGE,
            )
        self.nf, self.num_res_blocks, self.levels = nf, num_res_blocks, levels
        self.attn_sides = tuple(attn_resolutions)
        self.embedding_type, self.scale_by_sigma, self.centered = embedding_type, scale_by_sigma, centered
        self.conditional, self.skip_rescale, self.biggan = conditional, skip_rescale, resblock_type == "biggan"
        self.progressive, self.progressive_input = progressive, progressive_input
        self.in_channels, self.patch_size = in_channels, patch_size
        self.sample_shape = (in_channels, image_size, image_size)
        self.num_classes, self.null_class = num_classes or 0, null_class and bool(num_classes)
        if self.null_class:
            self.null_condition = self._null_condition  # api.NullCondition: absent without a null class
        self.act = ACTIVATIONS[nonlinearity]
        self.sigmas: Tensor
        self.register_buffer("sigmas", noise_levels(sigma_min, sigma_max, num_scales))

        if norm_groups and any(nf * m % norm_groups for m in ch_mult):
            raise VgmError(f"{norm_groups} groups do not divide every width", f"nf a multiple of {norm_groups}", USAGE)
        self._dropout, self._init_scale, self._with_conv = dropout, init_scale, resamp_with_conv
        self._groups = norm_groups
        self._taps = tuple(fir_kernel) if fir else None
        self._temb = 4 * nf if conditional else None
        self.all_modules = nn.ModuleList(
            self._layers([nf * m for m in ch_mult], side, progressive_combine, fourier_scale)
        )
        self.pyramid_down = Resample(False, self._taps)
        self.pyramid_up = Resample(True, self._taps)
        if self.num_classes:
            if not conditional:
                raise VgmError("classes are told through the time embedding", "model.conditional=true", USAGE)
            self.label_emb = nn.Embedding(self.num_classes + self.null_class, 4 * nf)

    # construction

    def _layers(self, widths: list[int], side: int, combine: Any, fourier_scale: float) -> Iterator[nn.Module]:
        """Every layer with parameters, in the order in which forward takes them."""
        image = self.in_channels * self.patch_size**2
        if self.embedding_type == "fourier":
            yield Fourier(self.nf, fourier_scale)
        if self.conditional:
            yield initialised(nn.Linear(self.nf * (2 if self.embedding_type == "fourier" else 1), 4 * self.nf))
            yield initialised(nn.Linear(4 * self.nf, 4 * self.nf))
        yield conv3x3(image, self.nf)
        ch, pyramid, skips = self.nf, image, [self.nf]
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                yield self._res(ch, width)
                ch = width
                if side in self.attn_sides:
                    yield self._attention(ch)
                skips.append(ch)
            if level < self.levels - 1:
                yield self._resize(ch, up=False)
                if self.progressive_input == "input_skip":
                    yield Combine(pyramid, ch, combine)
                    ch *= 2 if combine == "cat" else 1
                elif self.progressive_input == "residual":
                    yield Resample(False, self._taps, pyramid, ch, with_conv=True)
                    pyramid = ch
                skips.append(ch)
                side //= 2
        yield self._res(ch, ch)
        yield self._attention(ch)
        yield self._res(ch, ch)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(self.num_res_blocks + 1):
                yield self._res(ch + skips.pop(), width)
                ch = width
            if side in self.attn_sides:
                yield self._attention(ch)
            if self.progressive == "output_skip":
                yield group_norm(ch, self._groups)
                yield conv3x3(ch, image, self._init_scale)
            elif self.progressive == "residual" and level == self.levels - 1:
                yield group_norm(ch, self._groups)
                yield conv3x3(ch, ch)
                pyramid = ch
            elif self.progressive == "residual":
                yield Resample(True, self._taps, pyramid, ch, with_conv=True)
                pyramid = ch
            if level > 0:
                yield self._resize(ch, up=True)
                side *= 2
        if self.progressive != "output_skip":
            yield group_norm(ch, self._groups)
            yield conv3x3(ch, image, self._init_scale)

    def _res(self, in_ch: int, out_ch: int, resample: Resample | None = None) -> ResBlock:
        options = (self._temb, self.act, self._dropout, self._init_scale, self.skip_rescale, self.biggan, resample)
        return ResBlock(in_ch, out_ch, *options, self._groups)

    def _attention(self, channels: int) -> Attention:
        return Attention(channels, self._init_scale, self.skip_rescale, self._groups)

    def _resize(self, channels: int, up: bool) -> nn.Module:
        if self.biggan:
            return self._res(channels, channels, Resample(up, self._taps))
        return Resample(up, self._taps, channels, channels, self._with_conv)

    # conditions

    def _null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if "y" in cond else dict(cond)

    def labels(self, y: Tensor | None, x: Tensor) -> Tensor:
        """(B,) rows of the label table. VgmError: a label is needed."""
        if y is not None:
            return y
        if not self.null_class:
            message = "this network was built without a null class, it needs labels"
            raise VgmError(message, "model.null_class=true adds one", USAGE)
        return torch.full((len(x),), self.num_classes, device=x.device)

    # evaluation

    def run(self, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        """layer(*inputs), recomputed in backward when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def descend(
        self, layers: Iterator[nn.Module], x: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """What forward is given -> features behind the middle, those on the way down, and what blocks are told of time
        and class. layers: all of them; those up to the middle are taken from it."""
        attends = self.attn_sides
        temb = None
        emb = next(layers)(t.log()) if self.embedding_type == "fourier" else positions(t, self.nf)  # (B, nf or 2 nf)
        if self.conditional:
            first, second = next(layers), next(layers)
            temb = second(self.act(first(emb)))  # (B, 4 nf)
            if self.num_classes:
                temb = temb + self.label_emb(self.labels(y, x))
        h = x if self.centered else 2 * x - 1
        if self.patch_size > 1:
            h = F.pixel_unshuffle(h, self.patch_size)  # (B, C p^2, H / p, W / p)

        image = h
        h = next(layers)(h)
        skips = [h]
        for level in range(self.levels):
            for _ in range(self.num_res_blocks):
                h = self.run(next(layers), h, temb)
                if h.shape[-1] in attends:
                    h = self.run(next(layers), h)
                skips.append(h)
            if level < self.levels - 1:
                h = self._resized(next(layers), h, temb)
                if self.progressive_input == "input_skip":
                    image = self.pyramid_down(image)
                    h = next(layers)(image, h)
                elif self.progressive_input == "residual":
                    h = image = residual(next(layers)(image), h, self.skip_rescale)
                skips.append(h)

        h = self.run(next(layers), h, temb)
        h = self.run(next(layers), h)
        return self.run(next(layers), h, temb), skips, temb

    middle = "middle"

    def features(
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        y: Tensor | None = None,
    ) -> list[Tensor]:
        """Maps (B, C, h, w): "down.0", "down.1", ... are what the decoder is handed, "middle" lies between the two; see
        api.HasFeatures."""
        h, skips, _ = self.descend(iter(self.all_modules), x, t, y)
        at = places(layers, [*(f"down.{i}" for i in range(len(skips))), "middle"])
        return [[*skips, h][i] for i in at]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return images(config["in_channels"], config["image_size"], config["num_classes"] or 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W); t: (B,), what the objective tells of time or noise, above 0 for fourier embeddings; y: (B,)
        int64 labels. Gives (B, C, H, W). VgmError: labels are missing."""
        layers = iter(self.all_modules)
        attends = self.attn_sides
        h, skips, temb = self.descend(layers, x, t, y)

        out: Tensor | None = None
        for level in reversed(range(self.levels)):
            for _ in range(self.num_res_blocks + 1):
                h = self.run(next(layers), torch.cat([h, skips.pop()], dim=1), temb)
            if h.shape[-1] in attends:
                h = self.run(next(layers), h)
            if self.progressive == "output_skip":
                more = self._head(layers, h)  # (B, C, H', W')
                out = more if out is None else self.pyramid_up(out) + more
            elif self.progressive == "residual":
                if out is None:
                    out = self._head(layers, h)
                else:
                    h = out = residual(next(layers)(out), h, self.skip_rescale)
            if level > 0:
                h = self._resized(next(layers), h, temb)
        h = out if self.progressive == "output_skip" and out is not None else self._head(layers, h)
        if self.patch_size > 1:
            h = F.pixel_shuffle(h, self.patch_size)
        if self.scale_by_sigma:
            sigma = t if self.embedding_type == "fourier" else self.sigmas[t.long()]
            h = h / sigma.to(h.dtype)[:, None, None, None]
        return h

    def _head(self, layers: Iterator[nn.Module], h: Tensor) -> Tensor:
        norm, conv = next(layers), next(layers)
        return conv(self.act(norm(h)))

    def _resized(self, layer: nn.Module, h: Tensor, temb: Tensor | None) -> Tensor:
        return self.run(layer, h, temb) if self.biggan else self.run(layer, h)
