"""The noise-conditional classifier of class-conditional sampling: a wide residual network (Zagoruyko & Komodakis 2016).

Song et al. 2021 (2011.13456), app. I.1; yang-song/score_sde@0acb9e0 models/wideresnet_noise_conditional.py (flax).
Deviation: images of other than three channels are not scaled by CIFAR-10's mean and deviation, which is undone by the
standardisation of every image that follows, up to the weights of the channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.nets.ncsnpp_layers import Fourier
from vgm_cli.nn.example import images
from vgm_cli.ranges import Depth, Side, Width

MEAN = (0.49139968, 0.48215841, 0.44653091)  # of CIFAR-10's channels in [0, 1]
DEVIATION = (0.24703223, 0.24348513, 0.26158784)
LOWEST = 1e-4  # level that is told of 0, the first number of a ladder
EMBEDDING = 128  # frequencies of the noise level


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-5)


def conv3x3(in_ch: int, out_ch: int, stride: int = 1) -> nn.Conv2d:
    """Padded as flax pads: where it halves an even side, behind alone, which `same` does."""
    layer = nn.Conv2d(in_ch, out_ch, 3, stride, padding=0, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer


def same(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(x), its result ceil(side / stride) wide: the odd row of padding lies behind."""
    pads: list[int] = []
    for side in (x.shape[-1], x.shape[-2]):
        stride = layer.stride[0]
        total = max((math.ceil(side / stride) - 1) * stride + 3 - side, 0)
        pads += [total // 2, total - total // 2]
    return layer(F.pad(x, pads))


class Block(nn.Module):
    """Two convolutions told of the noise, and a shortcut without weights: (B, in_ch, H, W) -> (B, channels, H', W')."""

    def __init__(self, in_ch: int, channels: int, stride: int = 1, activate_before: bool = False):
        super().__init__()
        self.activate_before = activate_before
        self.init_bn = group_norm(in_ch)
        self.conv1 = conv3x3(in_ch, channels, stride)
        self.Dense_0 = dense(4 * EMBEDDING, channels)
        self.bn_2 = group_norm(channels)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = F.relu(self.init_bn(x))
        x = h if self.activate_before else x
        h = same(h, self.conv1) + self.Dense_0(F.silu(temb))[:, :, None, None]
        h = same(F.relu(self.bn_2(h)), self.conv2)
        if h.shape[1] != x.shape[1]:
            stride = x.shape[-1] // h.shape[-1]
            x = F.avg_pool2d(x, stride)
            x = F.pad(x, (0, 0, 0, 0, 0, h.shape[1] - x.shape[1]))
        return h + x


def dense(in_ch: int, out_ch: int) -> nn.Linear:
    """A linear layer as flax initialises it: variance 1 / fan in, no bias."""
    layer = nn.Linear(in_ch, out_ch)
    nn.init.trunc_normal_(layer.weight, std=math.sqrt(1 / in_ch) / 0.87962566, a=-2 / math.sqrt(in_ch))
    nn.init.zeros_(layer.bias)
    return layer


class NoisyWideResNet(nn.Module):
    """logits (B, num_classes) of noisy images x (B, in_channels, H, W) and their noise levels t (B,) above 0.

    On VE, images are in [0, 1] and t is sigma, as the guided network is told. Its logarithm is embedded.
    """

    def __init__(
        self,
        image_size: Side = 32,  # side of x, divisible by 4
        in_channels: Width = 3,  # channels of x
        num_classes: Width = 10,  # logits
        blocks_per_group: Depth = 4,  # residual blocks in each of the three groups
        channel_multiplier: Width = 10,  # widths are 16, 32 and 64 times it
    ):
        super().__init__()
        self.num_classes, self.in_channels = num_classes, in_channels
        self.sample_shape = (in_channels, image_size, image_size)
        self.fourier = Fourier(EMBEDDING, 16.0)
        self.embed_0 = dense(2 * EMBEDDING, 4 * EMBEDDING)
        self.embed_1 = dense(4 * EMBEDDING, 4 * EMBEDDING)
        self.init_conv = conv3x3(in_channels, 16)
        self.groups = nn.ModuleList()
        width = 16
        for i in range(3):
            channels = 16 * 2**i * channel_multiplier
            blocks = []
            for k in range(blocks_per_group):
                blocks.append(Block(width, channels, 2 if i > 0 and k == 0 else 1, i == 0 and k == 0))
                width = channels
            self.groups.append(nn.ModuleList(blocks))
        self.norm = group_norm(width)
        self.head = nn.Linear(width, num_classes)
        bound = 1 / math.sqrt(num_classes)
        nn.init.uniform_(self.head.weight, -bound, bound)
        nn.init.zeros_(self.head.bias)

    def blocks(self) -> Iterator[nn.Module]:
        """The residual blocks in their order."""
        return (block for group in self.groups for block in group.children())

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        given = images(config["in_channels"], config["image_size"], 0)
        return {"x": given["x"], "t": given["t"].abs() + 0.1}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.in_channels == 3:
            mean, deviation = (x.new_tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
            x = (x - mean) / deviation
        flat = x.flatten(1)
        spread = flat.var(1, correction=0).clamp(min=1e-20).sqrt().clamp(min=flat.shape[1] ** -0.5)
        x = (x - flat.mean(1)[:, None, None, None]) / spread[:, None, None, None]
        temb = self.embed_1(F.silu(self.embed_0(self.fourier(t.clamp(min=LOWEST).log()))))  # (B, 512)
        h = same(x, self.init_conv)
        for block in self.blocks():
            h = block(h, temb)
        return self.head(F.relu(self.norm(h)).mean((2, 3)))
