"""EDM2's magnitude-preserving U-Net, with the changes that sCM makes to it. Karras et al. 2024 (2312.02696), config G.

Same function and parameter names as NVlabs/edm2@4bf8162 training/networks_edm2.py UNet, the head of Precond beside it;
preconditioning is the Denoiser's (path edm, prediction F, time edm; of sCM path trig, prediction trig). sCM's changes
(2410.11081, sec. 4.1): the time is told as it is, by waves of low frequency; modulation by two pixel norms; queries and
keys are normalised already. Deviations: labels are numbers, not one-hot rows; attention is fused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.example import images
from vgm_cli.nn.features import places
from vgm_cli.nn.norm import double_norm
from vgm_cli.nn.sdpa import sdpa
from vgm_cli.ranges import Depth, Fraction, Positive, Rate, Side, Whole, Width

Modulation = Literal["scale", "double-norm"]


def normalize(x: Tensor, dims: Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """x with unit mean square over dims, all but the first by default."""
    dims = list(range(1, x.ndim)) if dims is None else list(dims)
    length = torch.linalg.vector_norm(x.float() if x.dtype.itemsize < 4 else x, dim=dims, keepdim=True)
    return x / (eps + length * math.sqrt(length.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """a + t (b - a), with the magnitude of either."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Channels of both, of equal weight whatever their numbers."""
    n, m = a.shape[1], b.shape[1]
    c = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([c / math.sqrt(n) * (1 - t) * a, c / math.sqrt(m) * t * b], dim=1)


class MPFourier(nn.Module):
    """(N,) -> (N, width): cosines of fixed random frequencies, drawn once with deviation `bandwidth`."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, width: int, bandwidth: float = 1.0):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, t: Tensor) -> Tensor:
        return (t.float()[:, None] * self.freqs.float() + self.phases.float()).cos() * math.sqrt(2)


class MPPositional(nn.Module):
    """(N,) -> (N, width): cosines, then sines, of frequencies 1 down to 1/10,000: DDPM's, of unit magnitude."""

    def __init__(self, width: int):
        super().__init__()
        self.waves = width // 2

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(self.waves, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * 10000 ** (-k / self.waves)
        return torch.cat([angles.cos(), angles.sin()], dim=1) * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution, or a linear layer where kernel is 0, whose weights are normalised whenever they are used."""

    def __init__(self, cin: int, cout: int, kernel: int = 0):
        super().__init__()
        self.out_channels = cout
        self.weight = nn.Parameter(torch.randn(cout, cin, *([kernel] * 2 if kernel else [])))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = normalize(self.weight.float() if self.weight.dtype.itemsize < 4 else self.weight)
        w = (w * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Block(nn.Module):
    """Residual block told by emb (N, emb_channels), then attention. (N, in, h, w) -> (N, out, h', w')."""

    def __init__(
        self,
        in_channels: int,  # of x
        out_channels: int,  # of what it gives
        emb_channels: int,  # of emb
        flavor: Literal["enc", "dec"],  # enc: x is normalised first
        way: str | None = None,  # "up" or "down" changes the size; None keeps it
        heads: int = 0,  # of attention; 0: none
        dropout: float = 0.0,  # before the second convolution
        res_balance: float = 0.3,  # weight of the residual branch
        attn_balance: float = 0.3,  # weight of attention
        clip_act: float | None = 256.0,  # limit of what it gives
        modulation: Modulation = "scale",  # see EDM2UNet
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.flavor, self.way = in_channels, out_channels, flavor, way
        self.heads, self.dropout, self.clip_act, self.modulation = heads, dropout, clip_act, modulation
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels * (1 if modulation == "scale" else 2))
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.way:
            x = F.avg_pool2d(x, 2) if self.way == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        if self.flavor == "enc":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dims=(1,))
        y = self.conv_res0(mp_silu(x))
        told = self.emb_linear(emb, gain=self.emb_gain)
        if self.modulation == "scale":
            y = y * (told + 1)[:, :, None, None].to(y.dtype)
        else:
            scale, shift = told.chunk(2, dim=1)
            y = double_norm(normalize(y, dims=(1,)), 1 + scale, shift)
        y = self.conv_res1(F.dropout(mp_silu(y), self.dropout, self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            qkv = normalize(self.attn_qkv(x).view(len(x), self.heads, -1, 3, x[0, 0].numel()), dims=(2,))
            q, k, v = (part.transpose(2, 3) for part in qkv.unbind(3))  # (N, heads, T, out / heads)
            x = mp_sum(x, self.attn_proj(sdpa(q, k, v).transpose(2, 3).reshape(x.shape)), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)


class EDM2UNet(nn.Module):
    """F(x, t, y, s), and the logarithm of its error.

    While training, weights are brought to unit length before every forward, as in EDM2, so that the learning rate alone
    says how fast they turn. forces_weights: whether forward does so; an objective that differentiates forward cannot
    have its weights changed inside, sets it to False, and calls `normalise_weights` itself. VgmError: sizes that do not
    go together.
    """

    forces_weights = True

    def __init__(
        self,
        img_resolution: Side = 64,  # side of x
        in_channels: Width = 3,  # channels of x
        num_classes: Whole = 0,  # 0: it is told no class
        model_channels: Width = 192,  # width that the multipliers are of
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # of every level, each half the size of the one before
        channel_mult_noise: Width | None = None,  # of the time's waves; None: the first level's
        channel_mult_emb: Width | None = None,  # of the embedding; None: the widest level's
        num_blocks: Depth = 3,  # residual blocks of a level
        attn_resolutions: Sequence[int] = (16, 8),  # sides at which attention follows a block
        channels_per_head: Width = 64,  # width of a head of attention
        dropout: Rate = 0.0,  # inside blocks
        dropout_below: Side | None = None,  # largest side at which there is dropout; None: at all
        label_balance: Fraction = 0.5,  # weight of the class in the embedding
        concat_balance: Fraction = 0.5,  # weight of what comes across from the encoder
        logvar_channels: Width = 128,  # waves of the head that gives the error
        time_embedding: Literal["fourier", "positional"] = "fourier",  # random frequencies, or DDPM's
        bandwidth: Positive = 1.0,  # deviation of the random frequencies
        modulation: Modulation = "scale",  # maps are scaled by the embedding, or normalised, scaled and shifted
        second_time: bool = False,  # forward is told a second number, s: the guidance scale of a guided student
    ):
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            said = f"a side of {img_resolution} cannot be halved {len(channel_mult) - 1} times"
            raise VgmError(said, "fewer channel_mult", USAGE)
        widths = [model_channels * m for m in channel_mult]
        noise = model_channels * (channel_mult_noise or channel_mult[0])
        emb = model_channels * (channel_mult_emb or max(channel_mult))
        self.sample_shape = (in_channels, img_resolution, img_resolution)
        self.num_classes, self.second_time = num_classes, second_time
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise, bandwidth) if time_embedding == "fourier" else MPPositional(noise)
        self.emb_noise = MPConv(noise, emb)
        self.emb_label = MPConv(num_classes, emb) if num_classes else None
        if second_time:
            self.emb_second, self.second_gain = MPConv(noise, emb), nn.Parameter(torch.zeros([]))

        def block(
            cin: int, cout: int, flavor: Literal["enc", "dec"], side: int, way: str | None, attend: bool
        ) -> Block:
            rate = dropout if dropout_below is None or side <= dropout_below else 0.0
            heads = cout // channels_per_head if attend else 0
            return Block(cin, cout, emb, flavor, way, heads, rate, modulation=modulation)

        self.enc = nn.ModuleDict()
        ch = in_channels + 1
        for level, width in enumerate(widths):
            side = img_resolution >> level
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = MPConv(ch, width, 3)
                ch = width
            else:
                self.enc[f"{side}x{side}_down"] = block(ch, ch, "enc", side, "down", False)
            for i in range(num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = block(ch, width, "enc", side, None, side in attn_resolutions)
                ch = width
        skips: list[Any] = [layer.out_channels for layer in self.enc.values()]
        self.dec = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            side = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{side}x{side}_in0"] = block(ch, ch, "dec", side, None, True)
                self.dec[f"{side}x{side}_in1"] = block(ch, ch, "dec", side, None, False)
            else:
                self.dec[f"{side}x{side}_up"] = block(ch, ch, "dec", side, "up", False)
            for i in range(num_blocks + 1):
                attend = side in attn_resolutions
                self.dec[f"{side}x{side}_block{i}"] = block(ch + skips.pop(), width, "dec", side, None, attend)
                ch = width
        self.out_conv = MPConv(ch, in_channels, 3)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    def null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The unconditional version of cond: label num_classes, whose one-hot row is zero."""
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if cond.get("y") is not None else dict(cond)

    def log_variance(self, t: Tensor) -> Tensor:
        """(N,) -> (N,): see weight.KnowsError."""
        return self.logvar_linear(self.logvar_fourier(t))[:, 0]

    def reset_log_variance(self) -> None:
        nn.init.normal_(self.logvar_linear.weight)

    @torch.no_grad()
    def normalise_weights(self) -> None:
        """Bring the weights of every layer's outputs to unit length."""
        for layer in self.modules():
            if isinstance(layer, MPConv):
                layer.weight.copy_(normalize(layer.weight))

    def embed(self, t: Tensor, y: Tensor | None, s: Tensor | None) -> Tensor:
        """(N,) times, labels and second numbers -> (N, emb). VgmError: a second number that is not told."""
        emb = self.emb_noise(self.emb_fourier(t).to(self.emb_noise.weight.dtype))
        if self.emb_label is not None:
            y = torch.full(t.shape, self.num_classes, device=t.device) if y is None else y
            rows = (y[:, None] == torch.arange(self.num_classes, device=y.device)).to(emb.dtype)
            emb = mp_sum(emb, self.emb_label(rows * math.sqrt(self.num_classes)), self.label_balance)
        if self.second_time:
            told = torch.zeros_like(t) if s is None else s
            emb = emb + self.emb_second(self.emb_fourier(told).to(emb.dtype), gain=self.second_gain)
        elif s is not None:
            raise VgmError("the network is told one number, not two", "model.second_time=true", USAGE)
        return mp_silu(emb)

    def blocks(self) -> list[tuple[str, Any]]:
        """(name, layer) of all that lies between x and the last convolution."""
        named = [(f"enc.{name}", layer) for name, layer in self.enc.items()]
        return named + [(f"dec.{name}", layer) for name, layer in self.dec.items()]

    @property
    def middle(self) -> str:
        return f"enc.{list(self.enc)[-1]}"

    def features(
        self, x: Tensor, t: Tensor, layers: Sequence[str], y: Tensor | None = None, s: Tensor | None = None
    ) -> list[Tensor]:
        """Maps (N, C, h, w) behind the blocks that are named "enc.8x8_block0" or "dec.8x8_up"; see api.HasFeatures."""
        at = places(layers, [name for name, _ in self.blocks()])
        found = self.run(x, self.embed(t, y, s), max(at, default=-1) + 1)
        return [found[i] for i in at]

    def run(self, x: Tensor, emb: Tensor, many: int | None = None) -> list[Tensor]:
        """What each of the first `many` blocks gives: maps (N, C, h, w)."""
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        found: list[Tensor] = []
        for i, (_, layer) in enumerate(self.blocks()[:many]):
            if i >= len(self.enc) and h.shape[1] != layer.in_channels:
                h = mp_cat(h, skips.pop(), self.concat_balance)
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            found.append(h)
            if i < len(self.enc):
                skips.append(h)
        return found

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        given = images(config["in_channels"], config["img_resolution"], config["num_classes"])
        return given | ({"s": torch.tensor([1.5])} if config["second_time"] else {})

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W) of unit deviation; t: (N,) what it is told of the time; y: (N,) int64 labels; s: (N,) the
        second number, None for 0. Gives (N, C, H, W)."""
        if self.training and self.forces_weights:
            self.normalise_weights()
        h = self.run(x, self.embed(t, y, s))[-1]
        return self.out_conv(h, gain=self.out_gain)  # type: ignore[no-any-return]
