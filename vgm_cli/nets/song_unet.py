"""DDPM++ as EDM has it: the U-Net of EDM, MeanFlow and sCM on CIFAR-10. Karras et al. 2022 (2206.00364), app. F.

Same function and parameter names as NVlabs/edm@008a4e5 training/networks.py SongUNet in the form that is trained on
CIFAR-10 (standard encoder and decoder, positional embedding), and, told two times, as Gsunshine/py-meanflow@1f6d72d.
Deviations from the former: labels are numbers, not one-hot rows; channels of qkv are ordered as in the latter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.edm import GroupNorm
from vgm_cli.nets.ncsnpp_layers import positions
from vgm_cli.nn.example import images
from vgm_cli.nn.features import places
from vgm_cli.nn.fir import downsample_fir, fir_kernel, upsample_fir
from vgm_cli.nn.norm import double_norm
from vgm_cli.nn.sdpa import sdpa
from vgm_cli.ranges import Depth, Rate, Side, Whole, Width

Modulation = Literal["add", "double-norm"]
SMALL = 1e-5  # factor on the first weights of layers that end a residual branch


def initialised(layer: Any, factor: float = 1.0) -> Any:
    """The layer with Xavier weights times a factor, and no bias."""
    nn.init.xavier_uniform_(layer.weight, gain=factor)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Conv(nn.Conv2d):
    """A convolution of odd width that keeps the size, after a filtered change of size where `way` is "up" or "down"."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        way: str | None = None,
        taps: Sequence[float] = (),
        factor: float = 1.0,
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        initialised(self, factor)
        self.way, self.taps = way, tuple(taps)
        if way:  # officially a tensor of the checkpoint
            self.register_buffer("resample_filter", fir_kernel(self.taps, self.weight.detach())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.way:
            x = upsample_fir(x, self.taps) if self.way == "up" else downsample_fir(x, self.taps)
        return super().forward(x)


class UNetBlock(nn.Module):
    """Residual block told of the times by emb (N, emb_channels), then attention with one head. (N, in, h, w) -> (N,
    out, h', w')."""

    def __init__(
        self,
        in_channels: int,  # of x
        out_channels: int,  # of what it gives
        emb_channels: int,  # of emb
        dropout: float,  # before the second convolution
        taps: Sequence[float],  # of the filter of a change of size
        attention: bool = False,  # whether attention follows
        way: str | None = None,  # "up" or "down" changes the size; None keeps it
        modulation: Modulation = "add",  # how it is told, see SongUNet
    ):
        super().__init__()
        self.in_channels, self.dropout, self.attention = in_channels, dropout, attention
        self.modulation = modulation
        self.norm0 = GroupNorm(in_channels, 1e-6)
        self.conv0 = Conv(in_channels, out_channels, 3, way, taps)
        self.affine = initialised(nn.Linear(emb_channels, out_channels * (1 if modulation == "add" else 2)))
        self.norm1 = GroupNorm(out_channels, 1e-6)
        self.conv1 = Conv(out_channels, out_channels, 3, factor=SMALL)
        self.skip = Conv(in_channels, out_channels, 1, way, taps) if way or out_channels != in_channels else None
        if attention:
            self.norm2 = GroupNorm(out_channels, 1e-6)
            self.qkv = Conv(out_channels, 3 * out_channels, 1, factor=math.sqrt(0.2))
            self.proj = Conv(out_channels, out_channels, 1, factor=SMALL)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(emb).to(h.dtype)
        if self.modulation == "add":
            h = F.silu(self.norm1(h + told[:, :, None, None]))
        else:
            scale, shift = told.chunk(2, dim=1)
            h = F.silu(double_norm(self.norm1(h), 1 + scale, shift))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return (self.attend(self.norm2(h)) + h) * math.sqrt(0.5) if self.attention else h

    def attend(self, h: Tensor) -> Tensor:
        """Self-attention over positions; channels of qkv are all queries, all keys, all values."""
        q, k, v = (part[:, None] for part in self.qkv(h).flatten(2).transpose(1, 2).chunk(3, dim=2))  # (N, 1, T, C)
        # contiguous: the forward derivative of group_norm views what comes out of here
        return self.proj(sdpa(q, k, v)[:, 0].transpose(1, 2).contiguous().view(h.shape))


class SongUNet(nn.Module):
    """F(x, t, y, s, augment): what a Denoiser's network gives, told the time t and, where it is built for them, a
    class, a second number s and what was done to each image (None: nothing, as in sampling).

    VgmError: the side cannot be halved often enough.
    """

    def __init__(
        self,
        img_resolution: Side = 32,  # side of x
        in_channels: Width = 3,  # channels of x
        out_channels: Width | None = None,  # None: as many
        augment_dim: Whole = 0,  # numbers that say how an image was augmented; 0: it is not told
        model_channels: Width = 128,  # width that the multipliers are of
        channel_mult: Sequence[int] = (2, 2, 2),  # of every level, each half the size of the one before
        channel_mult_emb: Width = 4,  # of the embedding
        num_blocks: Depth = 4,  # residual blocks of a level
        attn_resolutions: Sequence[int] = (16,),  # sides at which attention follows a block
        dropout: Rate = 0.1,  # inside blocks
        channel_mult_noise: Width = 1,  # of each time's waves
        resample_filter: Sequence[int] = (1, 1),  # taps of the filter of every change of size
        num_classes: Whole = 0,  # 0: it is told no class
        second_time: bool = False,  # forward is told a second number, s
        modulation: Modulation = "add",  # an embedding is added to maps, or scales and shifts them, both normalised
    ):
        super().__init__()
        levels = len(channel_mult)
        if img_resolution % 2 ** (levels - 1):
            raise VgmError(
                f"a side of {img_resolution} cannot be halved {levels - 1} times", "fewer channel_mult", USAGE
            )
        out_channels = out_channels or in_channels
        self.sample_shape = (in_channels, img_resolution, img_resolution)
        self.augment_dim, self.num_classes, self.second_time = augment_dim, num_classes, second_time
        self.waves = model_channels * channel_mult_noise
        told, emb = self.waves * (2 if second_time else 1), model_channels * channel_mult_emb
        if num_classes:
            self.map_label = initialised(nn.Linear(num_classes, told))
        if augment_dim:
            self.map_augment = initialised(nn.Linear(augment_dim, told, bias=False))
        self.map_layer0 = initialised(nn.Linear(told, emb))
        self.map_layer1 = initialised(nn.Linear(emb, emb))

        def block(cin: int, cout: int, attention: bool = False, way: str | None = None) -> UNetBlock:
            return UNetBlock(cin, cout, emb, dropout, resample_filter, attention, way, modulation)

        self.enc = nn.ModuleDict()
        ch = model_channels
        skips = [ch]
        for level, mult in enumerate(channel_mult):
            side = img_resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = Conv(in_channels, ch, 3)
            else:
                self.enc[f"{side}x{side}_down"] = block(ch, ch, way="down")
                skips.append(ch)
            for i in range(num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = block(ch, model_channels * mult, side in attn_resolutions)
                ch = model_channels * mult
                skips.append(ch)
        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            side = img_resolution >> level
            if level == levels - 1:
                self.dec[f"{side}x{side}_in0"] = block(ch, ch, True)
                self.dec[f"{side}x{side}_in1"] = block(ch, ch)
            else:
                self.dec[f"{side}x{side}_up"] = block(ch, ch, way="up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and side in attn_resolutions
                self.dec[f"{side}x{side}_block{i}"] = block(ch + skips.pop(), model_channels * mult, attention)
                ch = model_channels * mult
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = GroupNorm(ch, 1e-6)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv(ch, out_channels, 3, factor=SMALL)

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The unconditional version of cond: label num_classes, whose one-hot row is zero."""
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if cond.get("y") is not None else dict(cond)

    def embed(self, t: Tensor, y: Tensor | None, s: Tensor | None, augment: Tensor | None) -> Tensor:
        """(N,) times and labels, (N, augment_dim) numbers -> (N, emb). VgmError: a second number that is not told."""
        waves = [positions(t, self.waves)]
        if self.second_time:
            waves.append(positions(torch.zeros_like(t) if s is None else s, self.waves))
        elif s is not None:
            raise VgmError("the network is told one time, not two", "model.second_time=true", USAGE)
        emb = torch.cat(waves, dim=1).to(self.map_layer0.weight.dtype)
        if self.num_classes and y is not None:
            rows = y[:, None] == torch.arange(self.num_classes, device=y.device)
            emb = emb + self.map_label(rows.to(emb.dtype) * math.sqrt(self.num_classes))
        if augment is not None and self.augment_dim:
            emb = emb + self.map_augment(augment.to(emb.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """(name, layer) of all that lies between x and the output's norm."""
        named = [(f"enc.{name}", layer) for name, layer in self.enc.items()]
        return named + [(f"dec.{name}", layer) for name, layer in self.dec.items() if "aux" not in name]

    @property
    def middle(self) -> str:
        return f"enc.{list(self.enc)[-1]}"

    def run(self, x: Tensor, emb: Tensor, last: int | None = None) -> list[Tensor]:
        """What each of the blocks gives, up to the one of index `last`: maps (N, C, h, w)."""
        found: list[Tensor] = []
        skips: list[Tensor] = []
        for i, (_, layer) in enumerate(self.blocks()[: None if last is None else last + 1]):
            if i >= len(self.enc) and x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            found.append(x)
            if i < len(self.enc):
                skips.append(x)
        return found

    def features(
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        y: Tensor | None = None,
        s: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> list[Tensor]:
        """Maps (N, C, h, w) behind the blocks that are named "enc.8x8_block0" or "dec.8x8_up"; see api.HasFeatures."""
        at = places(layers, [name for name, _ in self.blocks()])
        found = self.run(x, self.embed(t, y, s, augment), max(at, default=-1))
        return [found[i] for i in at]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        given = images(config["in_channels"], config["img_resolution"], config.get("num_classes", 0))
        given |= {"s": torch.tensor([0.25])} if config.get("second_time") else {}
        return given | ({"augment": torch.ones(1, config["augment_dim"])} if config["augment_dim"] else {})

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        s: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """x: (N, C, H, W); t: (N,); y: (N,) int64 labels; s: (N,) the second number, None for 0; augment: (N,
        augment_dim). Gives (N, out_channels, H, W)."""
        h = self.run(x, self.embed(t, y, s, augment))[-1]
        norm, conv = (layer for name, layer in self.dec.items() if "aux" in name)
        return conv(F.silu(norm(h)))  # type: ignore[no-any-return]
