"""Glow: a multi-scale flow of actnorm, invertible 1x1 convolution and coupling. Kingma & Dhariwal 2018 (1807.03039).

openai/glow@91b2c57 (TensorFlow) and rosinality/glow-pytorch@97081ff in one network; see layers.Style for how they
differ. Images enter as z = x / 2^bits - 1/2 + u / 2^bits with u in [0, 1); `dequantise` and `to_images` are the two
ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.precision import full_precision
from vgm_cli.ranges import Depth, Side, Whole, Width

from .layers import (
    LOGSCALE_FACTOR,
    ActNorm,
    AffineCoupling,
    Coupling,
    InvConv,
    Permutation,
    Style,
    ZeroConv,
    channel_map,
    gaussian_log_prob,
    make_permutation,
    pairs,
    style_of,
)


def quantise(pixels: Tensor, n_bits: int) -> Tensor:
    """8-bit pixels 0..255 -> levels 0..2^n_bits - 1, as float."""
    return torch.floor(pixels.float() / 2 ** (8 - n_bits))


def dequantise(pixels: Tensor, u: Tensor, n_bits: int) -> Tensor:
    """pixels: (B, C, H, W) in 0..255, u: the same shape in [0, 1) -> z in [-0.5, 0.5)."""
    return (quantise(pixels, n_bits) + u) / 2**n_bits - 0.5


def to_pixels(z: Tensor, n_bits: int) -> Tensor:
    """z about [-0.5, 0.5] -> 0..255, the lowest value of its bin, as float."""
    return (torch.floor((z + 0.5) * 2**n_bits) * 2 ** (8 - n_bits)).clamp(0, 255)


def to_images(z: Tensor, n_bits: int) -> Tensor:
    """z about [-0.5, 0.5] -> images in [-1, 1]."""
    return to_pixels(z, n_bits) / 127.5 - 1


class Encoding(NamedTuple):
    """What the flow makes of images: one entry per level, the top last.

    z: factored-out latents. eps: the same normalised by their priors, which is what is kept and interpolated.
    log_priors: log-density of z given the levels above it, (B,) each. logdet: of the flow, (B,).
    """

    z: list[Tensor]
    eps: list[Tensor]
    log_priors: list[Tensor]
    logdet: Tensor

    @property
    def log_prob(self) -> Tensor:
        """log p of the dequantised images in nats: (B,)."""
        return torch.stack(self.log_priors).sum(0) + self.logdet


class FlowStep(nn.Module):
    """Actnorm, channel mixing, coupling."""

    def __init__(self, channels: int, width: int, coupling: Coupling, permutation: str, style: Style):
        super().__init__()
        self.actnorm = ActNorm(channels, style.log_norm)
        self.permutation = make_permutation(permutation, channels, style)
        self.coupling = AffineCoupling(channels, width, coupling, style)

    def mix(self, x: Tensor) -> Tensor:
        """Actnorm and permutation as one linear map, never in half precision."""
        with full_precision(x.device):
            scale, shift = self.actnorm.factors()
            matrix = self.permutation.matrix() * scale
            return channel_map(x, matrix, matrix @ shift)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) -> y, and the part of its log-determinant that depends on x: (B,) or None."""
        out: tuple[Tensor, Tensor | None] = self.coupling(self.mix(x))
        return out

    def reverse(self, y: Tensor, inverse: Tensor) -> Tensor:
        """inverse: (C, C) of the permutation's matrix."""
        x = self.coupling.reverse(y)
        with full_precision(x.device):
            scale, shift = self.actnorm.factors()
            return channel_map(x, inverse / scale[:, None], -shift)

    def initialise(self, x: Tensor) -> Tensor:
        self.actnorm.fit(x)
        self.coupling.net.initialise(self.mix(x).chunk(2, dim=1)[0])
        y, _ = self(x)
        return y


class Block(nn.Module):
    """One level: squeeze, `depth` steps and, unless it is the top, half of the channels factored out."""

    def __init__(
        self,
        in_channels: int,  # channels of its input; squeezing makes four times as many
        depth: int,  # flow steps
        width: int,  # channels inside the coupling networks
        coupling: Coupling,  # affine or additive
        permutation: str,  # how channels are mixed before a coupling
        style: Style,  # parametrisation, see layers.Style
        top: bool,  # the last level, of which nothing is factored out
    ):
        super().__init__()
        channels = 4 * in_channels
        self.style, self.top = style, top
        self.flows = nn.ModuleList(FlowStep(channels, width, coupling, permutation, style) for _ in range(depth))
        self.prior = None if top else ZeroConv(channels // 2, channels, style)

    def steps(self) -> list[FlowStep]:
        return list(self.flows)  # type: ignore[arg-type]

    def constant_logdet(self, positions: int) -> Tensor:
        """What the actnorms and permutations contribute, one determinant for the whole level, in float64: ()."""
        scales = torch.stack([f.actnorm.log_scales() for f in self.steps()]).double().sum()
        known = [d for f in self.steps() if (d := f.permutation.log_det()) is not None]
        if known:  # one kind of permutation per level
            mixing = torch.stack(known).double().sum()
        else:
            weights: list[Tensor] = [f.permutation.weight for f in self.steps() if isinstance(f.permutation, InvConv)]
            mixing = torch.linalg.slogdet(torch.stack(weights).double())[1].sum()
        return positions * (scales + mixing)

    def inverses(self) -> Tensor:
        """Inverses of the permutations, computed in float64: (depth, C, C)."""
        with full_precision(self.steps()[0].permutation.matrix().device):
            matrices = torch.stack([f.permutation.matrix() for f in self.steps()])
            return torch.linalg.inv(matrices.double()).to(matrices.dtype)

    def prior_of(self, z1: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log sigma) of the factored-out half given the kept one."""
        assert self.prior is not None
        return pairs(self.prior(z1), self.style.interleaved)

    def forward(self, x: Tensor, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
        """(B, c, H, W) -> (B, 4c, H/2, W/2) after the steps, log-determinant (B,)."""
        x = F.pixel_unshuffle(x, 2)  # channel c*4 + 2*dy + dx
        logdet = self.constant_logdet(x.shape[2] * x.shape[3]).to(x.dtype).expand(len(x))
        for flow in self.flows:
            x, own = checkpoint(flow, x, use_reentrant=False) if checkpointing else flow(x)
            if own is not None:
                logdet = logdet + own
        return x, logdet

    def reverse(self, x: Tensor) -> Tensor:
        """(B, 4c, H/2, W/2) -> (B, c, H, W)."""
        for flow, inverse in zip(reversed(self.steps()), self.inverses().flip(0)):
            x = flow.reverse(x, inverse)
        return F.pixel_shuffle(x, 2)

    def initialise(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, 2)
        for flow in self.steps():
            x = flow.initialise(x)
        return x


class TopPrior(nn.Module):
    """Gaussian of the top latent: standard, or learned per position class (through the border), or given a class."""

    def __init__(self, channels: int, learn: bool, num_classes: int, style: Style):
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.zeros = ZeroConv(2 * channels if style.ring else channels, 2 * channels, style) if learn else None
        if self.zeros is not None and style.ring:
            self.zeros.weight.requires_grad_(False)  # it only ever sees zeros: officially a variable without gradient
        if num_classes:
            self.y_weight = nn.Parameter(torch.zeros(num_classes, 2 * channels))
            self.y_bias = nn.Parameter(torch.zeros(2 * channels))
            self.y_logs = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, like: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """like: (B, C, h, w) for its size; y: (B',) labels -> mean, log sigma: (1 or B', C, 1 or h, 1 or w)."""
        h = like.new_zeros(1, 2 * self.channels, 1, 1) if self.zeros is None else self.zeros.of_zeros(like)
        if self.num_classes:
            if y is None:
                raise VgmError("this Glow is class-conditional: it needs labels", code=USAGE)
            own = (self.y_weight[y] + self.y_bias) * torch.exp(LOGSCALE_FACTOR * self.y_logs)
            h = h + own[:, :, None, None]
        mean, logs = h.chunk(2, dim=1)
        return mean, logs


class Classifier(nn.Module):
    """Zero-initialised linear map of the top latent's spatial mean to class logits."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, channels))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.logs = nn.Parameter(torch.zeros(num_classes))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z.mean((2, 3)), self.weight, self.bias).float() * torch.exp(LOGSCALE_FACTOR * self.logs)


class Glow(nn.Module):
    """An invertible network: images to latents of several scales (`encode`) and back (`decode`), with exact likelihood.

    VgmError: sizes that do not fit, unknown names, labels missing.
    """

    initialised: Tensor

    def __init__(
        self,
        size: Side = 32,  # side of the images, a multiple of 2^levels unless `pad`
        in_channels: Width = 3,  # channels of the images
        levels: Depth = 3,  # scales; each halves the side
        depth: Depth = 32,  # flow steps per scale
        width: Width = 512,  # channels inside the coupling networks
        coupling: Coupling = "affine",  # affine (better likelihood) or additive (better pictures)
        permutation: Permutation = "invconv",  # how channels are mixed before a coupling
        top_permutation: Permutation | None = None,  # the last scale's; None: as permutation
        n_bits: int = 8,  # bits of a pixel value, 1 to 8
        learn_top: bool = True,  # mean and scale of the coarsest latent are learned
        num_classes: Whole = 0,  # 0 is unconditional
        classifier: bool = False,  # a head predicts the class from the coarsest latent
        style: Literal["openai", "rosinality"] = "openai",  # whose parametrisation, see layers.Style
        pad: bool = False,  # black border up to the next multiple of 2^levels (28 -> 32); samples lose it again
    ):
        super().__init__()
        self.margin = -size % 2**levels  # width of the border, both sides together
        if self.margin and not pad:
            raise VgmError(
                f"{levels} levels halve the image {levels} times: size {size} is no multiple of {2**levels}",
                f"model.levels={(size & -size).bit_length() - 1} or model.pad=true would fit",
                USAGE,
            )
        if not 1 <= n_bits <= 8:
            raise VgmError(f"n_bits must be 1 to 8, got {n_bits}", code=USAGE)
        own = style_of(style)
        self.size, self.in_channels, self.levels, self.n_bits = size, in_channels, levels, n_bits
        self.num_classes, self.checkpointing = num_classes, False
        self.blocks = nn.ModuleList()
        channels = in_channels
        for level in range(levels):
            top = level == levels - 1
            kind = top_permutation or permutation if top else permutation
            self.blocks.append(Block(channels, depth, width, coupling, kind, own, top))
            channels = 4 * channels if top else 2 * channels
        self.prior = TopPrior(channels, learn_top, num_classes, own)
        self.classifier = Classifier(channels, num_classes) if classifier and num_classes else None
        self.register_buffer("initialised", torch.zeros((), dtype=torch.uint8))  # data-dependent initialisation done

    def scales(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, self.size, self.size)

    def padded(self, pixels: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h + margin, w + margin), black around."""
        before, after = self.margin // 2, self.margin - self.margin // 2
        return F.pad(pixels, (before, after, before, after))

    def cropped(self, x: Tensor) -> Tensor:
        """The inverse of `padded`."""
        before, (h, w) = self.margin // 2, (side - self.margin for side in x.shape[2:])
        return x[..., before : before + h, before : before + w]

    def latent_shapes(self, shape: Sequence[int] | None = None) -> list[tuple[int, int, int]]:
        """Shapes of the latents of every level for images of shape (C, H, W), the top last."""
        c, h, w = shape or self.sample_shape
        h, w = h + self.margin, w + self.margin
        shapes = [(c * 2 ** (i + 1), h >> (i + 1), w >> (i + 1)) for i in range(self.levels)]
        top_c, top_h, top_w = shapes[-1]
        return [*shapes[:-1], (2 * top_c, top_h, top_w)]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Two smooth images, padded, of the first and the last class."""
        size, classes = config["size"], config["num_classes"]
        line = torch.linspace(-0.4, 0.4, size + -size % 2 ** config["levels"])
        x = (line[:, None] * line.cos()).expand(config["in_channels"], -1, -1)
        return {"x": torch.stack([x, x.flip(-1)]), **({"y": torch.tensor([0, classes - 1])} if classes else {})}

    def forward(self, x: Tensor, y: Tensor | None = None) -> Encoding:
        """x: (B, C, H, W) padded and dequantised in [-0.5, 0.5), y: (B,) labels of a conditional model."""
        z, eps, log_priors = [], [], []
        logdet = x.new_zeros(len(x))
        checkpointing = self.checkpointing and self.training
        for block in self.scales():
            x, own = block(x, checkpointing)
            logdet = logdet + own
            if block.top:
                mean, logs = self.prior(x, y)
                new = x
            else:
                x, new = x.chunk(2, dim=1)
                mean, logs = block.prior_of(x)
            log_prior, normalised = gaussian_log_prob(new, mean, logs)
            z.append(new)
            eps.append(normalised)
            log_priors.append(log_prior)
        return Encoding(z, eps, log_priors, logdet)

    def decode(self, latents: Sequence[Tensor], y: Tensor | None = None, normalised: bool = True) -> Tensor:
        """Latents of every level, the top last -> x (B, C, H, W) about [-0.5, 0.5], padding included.

        normalised: the latents are eps, to be passed through the priors; else they are z itself.
        """
        x = latents[-1]
        if normalised:
            mean, logs = self.prior(x, y)
            x = mean + logs.exp() * x
        for block, new in zip(reversed(self.scales()), [None, *reversed(latents[:-1])]):
            if new is not None:
                if normalised:
                    mean, logs = block.prior_of(x)
                    new = mean + logs.exp() * new
                x = torch.cat([x, new], dim=1)
            x = block.reverse(x)
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Data-dependent initialisation of every actnorm from one batch x (B, C, H, W), dequantised; once."""
        for block in self.scales():
            x = block.initialise(x)
            if not block.top:
                x = x.chunk(2, dim=1)[0]
        self.initialised.fill_(1)

    def log_prob_of_classes(self, encoding: Encoding) -> Tensor:
        """log p(x | y) for every class y: (B, num_classes). encoding: made with any label."""
        top = encoding.z[-1]
        below = torch.stack([*encoding.log_priors[:-1], encoding.logdet]).sum(0)
        mean, logs = self.prior(top, torch.arange(self.num_classes, device=top.device))
        each = [gaussian_log_prob(top, m[None], s[None])[0] for m, s in zip(mean, logs.expand_as(mean))]
        return below[:, None] + torch.stack(each, dim=1)

    def log_likelihood(
        self, x: Tensor, generators: list[torch.Generator], y: Tensor | None = None
    ) -> tuple[Tensor, str]:
        """Log-likelihood of 8-bit images: (nats (B,), the method in words), see vgm_cli/metrics/likelihood.py.

        x: uint8 (B, C, H, W), reduced to n_bits. One uniform dequantisation draw per image makes this a lower bound of
        log P in expectation. A padded image has at most the probability of the image. Without labels a
        class-conditional model is averaged over its classes, which is exact too.
        """
        x = self.padded(x)
        u = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x.device)
        z = dequantise(x, u, self.n_bits)
        kind = "exact, uniform dequantisation" + (f", {self.n_bits} bits" if self.n_bits < 8 else "")
        kind += ", with the border" if self.margin else ""
        if self.num_classes and y is None:
            any_class = torch.zeros(len(x), dtype=torch.long, device=x.device)
            of_classes = self.log_prob_of_classes(self(z, any_class))
            nats = of_classes.logsumexp(1) - math.log(self.num_classes)
        else:
            nats = self(z, y if self.num_classes else None).log_prob
            kind += ", given the class" if self.num_classes else ""
        return nats - x[0].numel() * self.n_bits * math.log(2), kind
