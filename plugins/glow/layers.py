"""The invertible layers of Glow and the small networks inside them (Kingma & Dhariwal 2018, arXiv 1807.03039, table 1).

Two published parametrisations of the same flow, chosen by a Style: openai/glow@91b2c57 (OPENAI) and the PyTorch port
rosinality/glow-pytorch@97081ff (PORT). Wherever an actnorm is followed by a linear map or follows a convolution, the
two are applied as one convolution with scaled weights: weights are small, activations are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError, unknown

LOGSCALE_FACTOR = 3.0  # log-scales are stored divided by this: they learn three times as fast
Permutation = Literal["invconv", "lu", "shuffle", "reverse"]
Coupling = Literal["affine", "additive"]


@dataclass(frozen=True)
class Style:
    """How a parametrisation writes the same flow.

    log_norm: actnorm as (x + b) exp(3 logs), initialised with biased statistics; else scale (x + loc), unbiased.
    hidden_norm: hidden convolutions end in an actnorm; else in a bias. ring: every 3x3 convolution sees an extra
    channel that is 1 on the padding; else hidden ones see zeros and zero-initialised ones are padded with ones.
    interleaved: pairs of a network's output are (0::2, 1::2), shift before scale; else halves, log-scale before shift
    in couplings. row: a factorised matrix W = P L U multiplies row vectors, x W; else columns.
    """

    name: str
    log_norm: bool
    hidden_norm: bool
    ring: bool
    interleaved: bool
    row: bool


OPENAI = Style("openai", log_norm=True, hidden_norm=True, ring=True, interleaved=True, row=True)
PORT = Style("rosinality", log_norm=False, hidden_norm=False, ring=False, interleaved=False, row=False)
STYLES = {s.name: s for s in (OPENAI, PORT)}


def style_of(name: str) -> Style:
    if name not in STYLES:
        raise unknown("style", name, STYLES)
    return STYLES[name]


def pairs(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Channels of h (B, 2C, H, W) -> two (B, C, H, W)."""
    a, b = h.unflatten(1, (-1, 2)).unbind(2) if interleaved else h.chunk(2, dim=1)
    return a, b


def gaussian_log_prob(z: Tensor, mean: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """log N(z; mean, exp(logs)^2) summed over an item, and the normalised eps: z (B, C, H, W) -> (B,), (B, C, H, W)."""
    eps = (z - mean) * torch.exp(-logs)
    log_prob = -0.5 * (math.log(2 * math.pi) + eps.square()) - logs
    return log_prob.flatten(1).sum(1), eps


# -- activation normalisation ----------------------------------------------------------------------------------------


class ActNorm(nn.Module):
    """A scale and a shift per channel that give unit Gaussian channels on the first batch (sec. 3.1)."""

    def __init__(self, channels: int, log_norm: bool = True):
        super().__init__()
        self.log_norm = log_norm
        if log_norm:
            self.b = nn.Parameter(torch.zeros(channels))
            self.logs = nn.Parameter(torch.zeros(channels))
        else:
            self.loc = nn.Parameter(torch.zeros(channels))
            self.scale = nn.Parameter(torch.ones(channels))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Data-dependent initialisation from x (B, C, H, W)."""
        values = x.transpose(0, 1).flatten(1)  # (C, B H W)
        mean = values.mean(1)
        if self.log_norm:
            std = (values - mean[:, None]).square().mean(1).sqrt()
            self.b.copy_(-mean)
            self.logs.copy_(-torch.log(std + 1e-6) / LOGSCALE_FACTOR)
        else:
            self.loc.copy_(-mean)
            self.scale.copy_(1 / (values.std(1) + 1e-6))

    def factors(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,): y = scale (x + shift)."""
        if self.log_norm:
            return torch.exp(LOGSCALE_FACTOR * self.logs), self.b
        return self.scale, self.loc

    def log_scales(self) -> Tensor:
        """log |scale|: (C,)."""
        return LOGSCALE_FACTOR * self.logs if self.log_norm else self.scale.abs().log()

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.factors()
        return scale[:, None, None] * (x + shift[:, None, None])

    def reverse(self, y: Tensor) -> Tensor:
        scale, shift = self.factors()
        return y / scale[:, None, None] - shift[:, None, None]


# -- channel mixing --------------------------------------------------------------------------------------------------


def random_rotation(channels: int) -> Tensor:
    """Q of a normal matrix's QR decomposition; on the meta device only its shape."""
    q: Tensor = torch.linalg.qr(torch.randn(channels, channels))[0]
    return q


class InvConv(nn.Module):
    """Invertible 1x1 convolution, y = M x with M free (sec. 3.2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(random_rotation(channels))

    def matrix(self) -> Tensor:
        """M: (C, C)."""
        return self.weight

    def log_det(self) -> Tensor | None:
        """None: found by the determinant of the matrix."""
        return None


class InvConvLU(nn.Module):
    """The same with W = P (L + I) (U + diag(s)), P and sign(s) fixed: its log-determinant is a sum (eq. 10)."""

    w_p: Tensor
    s_sign: Tensor

    def __init__(self, channels: int, row: bool = True):
        super().__init__()
        self.row = row
        p, lower, upper = torch.linalg.lu(random_rotation(channels))
        s = upper.diagonal()
        self.register_buffer("w_p", p)
        self.register_buffer("s_sign", s.sign())
        self.w_l = nn.Parameter(lower)
        self.w_u = nn.Parameter(upper.triu(1))
        self.w_s = nn.Parameter(s.abs().log())

    def matrix(self) -> Tensor:
        lower = self.w_l.tril(-1) + torch.eye(len(self.w_s), device=self.w_l.device, dtype=self.w_l.dtype)
        upper = self.w_u.triu(1) + torch.diag(self.s_sign * self.w_s.exp())
        w: Tensor = self.w_p @ (lower @ upper)
        return w.T if self.row else w

    def log_det(self) -> Tensor | None:
        return self.w_s.sum()


class Shuffle(nn.Module):
    """A fixed permutation of the channels: random, or reversed (RealNVP's); y_j = x_indices[j]."""

    indices: Tensor

    def __init__(self, channels: int, reverse: bool):
        super().__init__()
        indices = torch.arange(channels).flip(0) if reverse else torch.randperm(channels)
        self.register_buffer("indices", indices, persistent=not reverse)

    def matrix(self) -> Tensor:
        return torch.eye(len(self.indices), device=self.indices.device)[self.indices]

    def log_det(self) -> Tensor | None:
        return torch.zeros((), device=self.indices.device)


def make_permutation(kind: str, channels: int, style: Style) -> InvConv | InvConvLU | Shuffle:
    if kind == "invconv":
        return InvConv(channels)
    if kind == "lu":
        return InvConvLU(channels, style.row)
    if kind in ("shuffle", "reverse"):
        return Shuffle(channels, kind == "reverse")
    raise unknown("permutation", kind, ("invconv", "lu", "shuffle", "reverse"))


def channel_map(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = M x + bias at every position: x (B, C, H, W), matrix (C, C), bias (C,)."""
    flat = x.flatten(2)  # (B, C, HW): batched matrix products beat 1x1 convolutions of few channels
    if bias is None:
        return (matrix @ flat).view_as(x)
    return torch.baddbmm(bias[None, :, None], matrix.expand(len(x), -1, -1), flat).view(x.shape)


# -- networks of the couplings and priors ------------------------------------------------------------------------------


def ring(x: Tensor) -> Tensor:
    """1 on the padding around an image of x's size, 0 inside: (1, 1, H + 2, W + 2)."""
    return F.pad(x.new_zeros(1, 1, *x.shape[2:]), (1, 1, 1, 1), value=1.0)


class ZeroConv(nn.Module):
    """3x3 convolution that starts at zero, times exp(3 logs), and knows where the border is (sec. 3.3)."""

    def __init__(self, in_channels: int, out_channels: int, style: Style = OPENAI):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, 3, 3))
        self.edge = nn.Parameter(torch.zeros(out_channels, 1, 3, 3)) if style.ring else None  # of the ring channel
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.logs = nn.Parameter(torch.zeros(out_channels))

    def border(self, x: Tensor) -> Tensor:
        """What the padding and the bias contribute: (1, out_channels, H, W)."""
        weight = self.weight.sum(1, keepdim=True) if self.edge is None else self.edge
        return F.conv2d(ring(x), weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.weight, padding=1).float() + self.border(x).float()
        return h * torch.exp(LOGSCALE_FACTOR * self.logs)[:, None, None]

    def of_zeros(self, like: Tensor) -> Tensor:
        """The output for an input of zeros with the size of `like`: (1, out_channels, H, W)."""
        return self.border(like).float() * torch.exp(LOGSCALE_FACTOR * self.logs)[:, None, None]


class HiddenConv(nn.Module):
    """Convolution and, by style, an actnorm (folded into the weights) or a bias. kernel: 1 or 3."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, style: Style = OPENAI):
        super().__init__()
        self.ring = style.ring and kernel == 3
        self.kernel = kernel
        self.weight = nn.Parameter(0.05 * torch.randn(out_channels, in_channels + self.ring, kernel, kernel))
        self.norm = ActNorm(out_channels) if style.hidden_norm else None
        self.bias = None if style.hidden_norm else nn.Parameter(torch.zeros(out_channels))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.ring:
            x = F.pad(x, (1, 1, 1, 1))
            x = torch.cat([x, ring(x[..., 1:-1, 1:-1]).expand(len(x), -1, -1, -1)], dim=1)
        return F.conv2d(x, weight, bias, padding=1 if self.kernel == 3 and not self.ring else 0)

    def initialise(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            self.norm.fit(self.convolve(x, self.weight, None))
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return self.convolve(x, self.weight, self.bias)
        scale, shift = self.norm.factors()
        return self.convolve(x, self.weight * scale[:, None, None, None], scale * shift)


class CouplingNet(nn.Module):
    """3x3, ReLU, 1x1, ReLU, 3x3 starting at zero."""

    def __init__(self, in_channels: int, width: int, out_channels: int, style: Style = OPENAI):
        super().__init__()
        self.conv1 = HiddenConv(in_channels, width, 3, style)
        self.conv2 = HiddenConv(width, width, 1, style)
        self.last = ZeroConv(width, out_channels, style)

    def initialise(self, x: Tensor) -> None:
        h = F.relu(self.conv1.initialise(x))
        self.conv2.initialise(h)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x), inplace=True)
        h = F.relu(self.conv2(h), inplace=True)
        return self.last(h)


class AffineCoupling(nn.Module):
    """The first half of the channels shifts (and scales) the second: z2 -> (z2 + t) sigmoid(s + 2) (sec. 3.3)."""

    def __init__(self, channels: int, width: int, coupling: Coupling = "affine", style: Style = OPENAI):
        super().__init__()
        if channels % 2:
            raise VgmError(f"a coupling needs an even number of channels, got {channels}", code=USAGE)
        if coupling not in ("affine", "additive"):
            raise unknown("coupling", coupling, ("affine", "additive"))
        self.affine, self.style = coupling == "affine", style
        self.net = CouplingNet(channels // 2, width, channels if self.affine else channels // 2, style)

    def shift_and_log_scale(self, z1: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.net(z1)
        if not self.affine:
            return h, None
        a, b = pairs(h, self.style.interleaved)
        shift, s = (a, b) if self.style.interleaved else (b, a)
        return shift, F.logsigmoid(s + 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, C, H, W) -> y, and its log-determinant (B,), None for zero."""
        z1, z2 = x.chunk(2, dim=1)
        shift, log_scale = self.shift_and_log_scale(z1)
        z2 = z2 + shift
        if log_scale is None:
            return torch.cat([z1, z2], dim=1), None
        return torch.cat([z1, z2 * log_scale.exp()], dim=1), log_scale.flatten(1).sum(1)

    def reverse(self, y: Tensor) -> Tensor:
        z1, z2 = y.chunk(2, dim=1)
        shift, log_scale = self.shift_and_log_scale(z1)
        if log_scale is not None:
            z2 = z2 * torch.exp(-log_scale)
        return torch.cat([z1, z2 - shift], dim=1)
