"""What the generators and discriminators of StyleGAN and StyleGAN2 share: equalised layers, noise, styles, paths.

Karras et al. 2019 (arXiv 1812.04948) and 2020 (arXiv 2006.06676, 1912.04958). Official code: NVlabs/stylegan@1e0d5c7
training/networks_stylegan.py, NVlabs/stylegan2-ada-pytorch@d72cc7d training/networks.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import label, noise
from vgm_cli.nn.norm import pixel_norm  # noqa: F401  # its networks take all their layers from here
from vgm_cli.nn.precision import full_precision

# name: (function, gain that keeps the variance)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "linear": (lambda x: x, 1.0),
    "relu": (F.relu, math.sqrt(2)),
    "lrelu": (lambda x: F.leaky_relu(x, 0.2), math.sqrt(2)),
    "swish": (F.silu, math.sqrt(2)),
}


def bias_act(
    x: Tensor, bias: Tensor | None = None, act: str = "linear", gain: float | None = None, clamp: float | None = None
) -> Tensor:
    """clamp(gain * act(x + bias)); x: (B, C, ...), bias: (C,), gain: None for the activation's own."""
    function, own = ACTIVATIONS[act]
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    x = function(x)
    gain = own if gain is None else gain
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def one_hot(y: Tensor | None, classes: int) -> Tensor:
    """Labels (B,) int64, or vectors (B, classes) as they are -> (B, classes). VgmError without labels."""
    if y is None:
        raise VgmError("this network is class-conditional and needs labels", "example: --label 3", USAGE)
    if y.ndim == 2:
        return y.float()
    return (y[:, None] == torch.arange(classes, device=y.device)).float()


def minibatch_stddev(x: Tensor, group_size: int | None = 4, features: int = 1) -> Tensor:
    """Append to x (B, C, H, W) how much a group of images differs: `features` constant maps, one per share of channels.

    Image i is grouped with i + B / group_size, i + 2 B / group_size, ... (ProGAN, sec. 3). A batch that the group size
    does not divide is cut into the largest groups that do. group_size: None for the whole batch.
    """
    b, c, h, w = x.shape
    group = min(group_size or b, b)
    while b % group:
        group -= 1
    y = x.float().reshape(group, b // group, features, c // features, h, w)
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean((2, 3, 4))  # (B / group, features); var is slower
    y = y.repeat(group, 1)[:, :, None, None].expand(b, features, h, w)
    return torch.cat([x, y.to(x.dtype)], dim=1)


class EqualLinear(nn.Module):
    """Linear layer whose weight is scaled at run time by gain / sqrt(in), so that all layers learn at one speed.

    lr_multiplier: how fast it learns in comparison; its weights are kept larger by the inverse.
    """

    def __init__(self, fan_in: int, out: int, gain: float = 1.0, lr_multiplier: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, fan_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out,), float(bias)))
        self.scale, self.lr_multiplier = gain / math.sqrt(fan_in) * lr_multiplier, lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) -> (B, out), in single precision."""
        bias = self.bias if self.lr_multiplier == 1 else self.bias * self.lr_multiplier
        with full_precision(x.device):
            return F.linear(x.float(), self.weight * self.scale, bias)


class EqualConv(nn.Module):
    """The weight (out, in, k, k) and bias of an equalised convolution."""

    def __init__(self, fan_in: int, out: int, kernel: int, gain: float = 1.0, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, fan_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.scale = gain / math.sqrt(fan_in * kernel**2)

    def scaled(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W), with the bias."""
        return F.conv2d(x, self.scaled(), self.bias, padding=self.weight.shape[-1] // 2)


def sides(size: int, base: int | None = None) -> list[int]:
    """Sides of the feature maps, from the constant's to the image's, each twice the one before: 4, 8, ... 1024.

    base: of the constant; None for 4, or the smallest that halving `size` leads to (28: 7, 14, 28).
    """
    start = base or size
    while base is None and start % 2 == 0 and start >= 8:
        start //= 2
    steps = (size // start).bit_length() - 1
    if start << steps != size or start > 8:
        raise VgmError(f"images of {size} pixels do not grow by doubling", "sizes such as 28, 32, 48, 64, 1024", USAGE)
    return [start << i for i in range(steps + 1)]


class StyleGenerator(nn.Module):
    """z -> w -> one style per layer -> image. What samplers, objectives and path lengths ask of a generator.

    Subclasses have map(z, y) and synthesis(ws, noise, lod), and set the attributes below. w_avg: mean of w, a buffer.
    """

    latent_size: int
    w_dim: int
    num_layers: int  # styles per image
    num_classes: int
    noise_shapes: list[tuple[int, int, int]]  # (1, h, w) of every noise input
    w_avg: Tensor
    map: Callable[..., Tensor]  # (z: (B, latent_size), y) -> w: (B, w_dim)
    synthesis: Callable[..., Tensor]  # (ws: (B, num_layers, w_dim), noise, lod) -> images

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"z": noise(1, config["latent_size"]), **label(config["num_classes"])}

    def center(self) -> Tensor:
        """What truncation pulls towards: the running mean of w, (w_dim,)."""
        return self.w_avg

    def styles(self, w: Tensor, psi: float = 1.0, cutoff: int | None = None) -> Tensor:
        """w: (B, w_dim), or (B, num_layers, w_dim) -> styles (B, num_layers, w_dim), the first `cutoff` layers
        truncated: mean + psi (w - mean) (sec. 2, app. B)."""
        ws = w[:, None].expand(-1, self.num_layers, -1) if w.ndim == 2 else w
        if psi == 1 or cutoff == 0:
            return ws
        near = torch.lerp(self.center().expand_as(ws), ws, psi)
        return near if cutoff is None else torch.cat([near[:, :cutoff], ws[:, cutoff:]], dim=1)

    def random_noise(self, seeds: Sequence[int], device: torch.device) -> list[Tensor]:
        """Noise inputs (B, 1, h, w) of items with these seeds, drawn on `device`."""
        sizes = [math.prod(s) for s in self.noise_shapes]
        if device.type == "meta":
            flat = torch.empty(len(seeds), sum(sizes), device=device)
        else:
            gens = [torch.Generator(device).manual_seed(s) for s in seeds]
            flat = torch.stack([torch.randn(sum(sizes), generator=g, device=device) for g in gens])
        return self.split_noise(flat)

    def split_noise(self, flat: Tensor) -> list[Tensor]:
        """(B, all pixels) -> noise inputs (B, 1, h, w)."""
        parts = flat.split([math.prod(s) for s in self.noise_shapes], dim=1)
        return [p.reshape(len(flat), *s) for p, s in zip(parts, self.noise_shapes)]

    def fixed_noise(self) -> list[Tensor] | None:
        """The noise inputs that belong to the weights, (1, 1, h, w) each; None where there are none."""
        return None

    def forward(
        self,
        z: Tensor,
        y: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
        psi: float = 1.0,
        cutoff: int | None = None,
        lod: float | None = None,
    ) -> Tensor:
        """z: (B, latent_size), y: (B,) labels, noise: see noise_shapes -> images (B, C, H, W) about [-1, 1]."""
        return self.synthesis(self.styles(self.map(z, y), psi, cutoff), noise, lod)

    @torch.no_grad()
    def path_samples(
        self, generators: Sequence[torch.Generator], epsilon: float, space: str, sampling: str
    ) -> tuple[Tensor, Tensor]:
        """Image pairs epsilon apart on latent paths, for the perceptual path length (sec. 4.1)."""
        device, n = self.w_avg.device, len(generators)

        def draw(fn: Any, *shape: int) -> Tensor:
            return torch.stack([fn(shape, generator=g) for g in generators]).to(device)

        z0, z1 = draw(torch.randn, 2, self.latent_size).unbind(1)
        t = draw(torch.rand, 1) if sampling == "full" else torch.zeros(n, 1, device=device)
        y = (draw(torch.rand) * self.num_classes).long() if self.num_classes else None
        noise = self.split_noise(draw(torch.randn, sum(math.prod(s) for s in self.noise_shapes)))
        if space == "z":
            a, b = (self.map(slerp(z0, z1, t + e), y) for e in (0.0, epsilon))
        else:
            w0, w1 = self.map(z0, y), self.map(z1, y)
            a, b = (torch.lerp(w0, w1, t + e) for e in (0.0, epsilon))
        return self.synthesis(self.styles(a), noise, None), self.synthesis(self.styles(b), noise, None)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """On the unit sphere from a to b, both (B, D), t: (B, 1)."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    cosine = (a * b).sum(-1, keepdim=True)
    angle = t * cosine.clamp(-1, 1).acos()
    return a * angle.cos() + F.normalize(b - cosine * a, dim=-1) * angle.sin()
