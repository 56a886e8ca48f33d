"""The ADM U-Net and the classifier of noisy images. Dhariwal & Nichol, NeurIPS 2021 (arXiv 2105.05233), sec. 3.

Official code: openai/guided-diffusion@22e0df8 guided_diffusion/unet.py. Parameter names are the official ones.
The blocks are vgm_cli/nets/unet_blocks.py. Deviations: attention is fused; the upsampler is the U-Net with
super_res=True instead of a subclass; `null_class` adds a row to the label table for classifier-free guidance;
`patch_size` p moves p x p pixels into channels around the whole network (1: the published one), for small images, and
`norm_groups` makes the groups of narrow networks wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.unet_blocks import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    ResBlock,
    Upsample,
    attend,
    check_side,
    pointwise,
    timestep_embedding,
    zero,
)
from vgm_cli.nn.example import images, noise
from vgm_cli.nn.features import places
from vgm_cli.ranges import Blocks, Depth, Fraction, Side, Whole, Width

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]

# -- blocks ----------------------------------------------------------------------------------------------------------


class AttentionPool2d(nn.Module):
    """CLIP's pooling: the mean joins the positions as a token, attends, and is read out. (N, C, s, s) -> (N, K)."""

    def __init__(self, side: int, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        self.side, self.heads = side, channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.side, self.side):
            raise VgmError(
                f"attention pooling is built for {self.side}x{self.side} features, got {tuple(x.shape[2:])}",
                "model.image_size must be the size of the images",
                USAGE,
            )
        tokens = x.flatten(2).transpose(1, 2)  # (N, T, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)  # (N, 1 + T, C)
        tokens = tokens + self.positional_embedding.T.to(x.dtype)
        h = attend(pointwise(self.qkv_proj, tokens), self.heads, new_order=True)
        return pointwise(self.c_proj, h[:, :1])[:, 0]


class Stage(nn.Sequential):
    """Layers in a row, of which residual blocks are also told emb."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


# -- the trunk ---------------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Time embedding, encoder and middle block: the part that the U-Net and the classifier have in common.

    Every stage of input_blocks leaves a skip connection. Their widths are in `skips`; `factor` is the side of the input
    over the side in the middle.
    """

    checkpointing = False

    def __init__(
        self,
        in_channels: Width,  # channels of the input
        model_channels: Width,  # channels of the first level
        num_res_blocks: Blocks,  # residual blocks of a level
        attention_resolutions: Sequence[int],  # downsampling factors at which attention follows every residual block
        dropout: Fraction,  # share of activations dropped in residual blocks
        channel_mult: Sequence[float],  # channels of each level over model_channels
        conv_resample: bool,  # sizes change by convolutions (without resblock_updown)
        num_heads: Depth,  # attention heads, where num_head_channels is None
        num_head_channels: Width | None,  # width of an attention head; goes before num_heads
        use_scale_shift_norm: bool,  # the embedding scales and shifts, instead of being added
        resblock_updown: bool,  # sizes change inside residual blocks
        use_new_attention_order: bool,  # q, k, v are split before the heads
        norm_groups: Width,  # groups of the group normalisations
    ):
        super().__init__()
        self.norm_groups = norm_groups
        self.model_channels, self.emb_channels = model_channels, 4 * model_channels
        self.dropout, self.scale_shift = dropout, use_scale_shift_norm
        self.widths = [int(m * model_channels) for m in channel_mult]
        self.head_channels = num_head_channels if num_head_channels and num_head_channels > 0 else None
        self.new_order = use_new_attention_order

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self.emb_channels), nn.SiLU(), nn.Linear(self.emb_channels, self.emb_channels)
        )
        ch = self.widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, ch, 3, padding=1))])
        self.skips, self.factor = [ch], 1
        for level, width in enumerate(self.widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [self.res(ch, width)]
                ch = width
                if self.factor in attention_resolutions:
                    layers.append(self.attention(ch, num_heads))
                self.input_blocks.append(Stage(*layers))
                self.skips.append(ch)
            if level < len(self.widths) - 1:
                down = self.res(ch, ch, "down") if resblock_updown else Downsample(ch, conv_resample)
                self.input_blocks.append(Stage(down))
                self.skips.append(ch)
                self.factor *= 2
        self.middle_block = Stage(self.res(ch, ch), self.attention(ch, num_heads), self.res(ch, ch))

    def res(self, in_channels: int, out_channels: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
        own = (self.emb_channels, self.dropout, self.scale_shift, resample, self.norm_groups)
        return ResBlock(in_channels, out_channels, *own)

    def attention(self, channels: int, num_heads: int) -> AttentionBlock:
        """Heads by number, or by their width where num_head_channels says so. VgmError: the width does not divide."""
        heads = channels // self.head_channels if self.head_channels else num_heads
        if channels % (self.head_channels or heads):
            raise VgmError(
                f"{channels} channels do not divide into attention heads",
                "change num_heads or num_head_channels",
                USAGE,
            )
        return AttentionBlock(channels, heads, self.new_order, self.norm_groups)

    def run(self, stage: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        """stage(h, emb), recomputed in backward when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, use_reentrant=False)
        return stage(h, emb)

    def embed(self, t: Tensor) -> Tensor:
        """(N,) timesteps -> (N, 4 * model_channels)."""
        return self.time_embed(timestep_embedding(t, self.model_channels))


class UNetModel(Trunk):
    """ADM's U-Net: forward(x, t, y) predicts the noise in x_t and, with learn_sigma, the interpolation of its variance.

    x: (N, in_channels, H, W), t: (N,), y: (N,) int64 -> (N, out_channels, H, W). A network with super_res also takes
    low_res (N, in_channels, h, w), which is resized to x and stacked on it. VgmError: widths that do not divide into
    groups or heads.
    """

    def __init__(
        self,
        image_size: Side = 256,  # side of x; it must halve once per level
        in_channels: Width = 3,  # channels of x
        model_channels: Width = 256,  # channels of the first level
        num_res_blocks: Blocks = 2,  # residual blocks of a level; the decoder has one more
        attention_resolutions: Sequence[int] = (8, 16, 32),  # attention where the side is image_size / one of these
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),  # channels of each level over model_channels
        num_classes: Whole | None = 1000,  # 0 or None is unconditional
        learn_sigma: bool = True,  # twice the output channels: the second half is the variance
        out_channels: Width | None = None,  # None: in_channels, twice that with learn_sigma
        dropout: Fraction = 0.0,  # share of activations dropped in residual blocks
        conv_resample: bool = True,  # sizes change by convolutions (without resblock_updown)
        num_heads: Depth = 1,  # attention heads, where num_head_channels is None
        num_head_channels: Width | None = None,  # width of an attention head; goes before num_heads
        num_heads_upsample: Depth | None = None,  # heads in the decoder; None: as num_heads
        use_scale_shift_norm: bool = True,  # the embedding scales and shifts, instead of being added
        resblock_updown: bool = True,  # sizes change inside residual blocks
        use_new_attention_order: bool = False,  # q, k, v are split before the heads
        super_res: bool = False,  # forward takes low_res, the small image that is enlarged
        null_class: bool = False,  # the label table has one more row, for "no class"
        patch_size: Width = 1,  # squares of so many pixels become channels; 1: none
        norm_groups: Width = 32,  # narrow networks want fewer: a group of one channel hides its brightness
    ):
        check_side(image_size, channel_mult, patch_size)
        out_channels = out_channels or in_channels * (2 if learn_sigma else 1)
        super().__init__(
            in_channels * (2 if super_res else 1) * patch_size**2,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            num_heads,
            num_head_channels,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
            norm_groups,
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.learn_sigma = out_channels == 2 * in_channels
        self.sample_shape = (in_channels, image_size, image_size)
        self.num_classes, self.null_class = num_classes or 0, null_class and bool(num_classes)
        if self.null_class:
            self.null_condition = self._null_condition  # api.NullCondition: absent without a null class
        self.super_res, self.patch_size = super_res, patch_size
        if self.num_classes:
            self.label_emb = nn.Embedding(self.num_classes + self.null_class, 4 * model_channels)

        up_heads = num_heads_upsample if num_heads_upsample and num_heads_upsample > 0 else num_heads
        ch, skips, factor = self.widths[-1], list(self.skips), self.factor
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [self.res(ch + skips.pop(), width)]
                ch = width
                if factor in attention_resolutions:
                    layers.append(self.attention(ch, up_heads))
                if level > 0 and i == num_res_blocks:
                    layers.append(self.res(ch, ch, "up") if resblock_updown else Upsample(ch, conv_resample))
                    factor //= 2
                self.output_blocks.append(Stage(*layers))
        final = zero(nn.Conv2d(self.widths[0], out_channels * patch_size**2, 3, padding=1))
        self.out = nn.Sequential(GroupNorm32(ch, norm_groups), nn.SiLU(), final)

    def _null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if "y" in cond else dict(cond)

    def labels(self, y: Tensor | None, x: Tensor) -> Tensor:
        """(N,) rows of the label table. VgmError: a label is needed."""
        if y is not None:
            return y
        if not self.null_class:
            message = "this network was built without a null class, it needs labels"
            raise VgmError(message, "model.null_class=true adds one", USAGE)
        return torch.full((len(x),), self.num_classes, device=x.device)

    def start(self, x: Tensor, t: Tensor, y: Tensor | None, low_res: Tensor | None) -> tuple[Tensor, Tensor]:
        """What forward is given -> what the first block sees, (N, C p^2, H/p, W/p), and its condition (N, 4M)."""
        if self.super_res:
            if low_res is None:
                raise VgmError("an upsampler needs the small image", "cond={'low_res': (N, C, h, w)}", USAGE)
            x = torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)
        emb = self.embed(t)
        if self.num_classes:
            emb = emb + self.label_emb(self.labels(y, x))
        return F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x, emb

    middle = "middle_block"

    def features(
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        y: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> list[Tensor]:
        """Maps (N, C, h, w) behind "input_blocks.3", "middle_block" or "output_blocks.0"; see api.HasFeatures."""
        ins, outs = len(self.input_blocks), len(self.output_blocks)
        down, up = ([f"{part}_blocks.{i}" for i in range(n)] for part, n in (("input", ins), ("output", outs)))
        at = places(layers, [*down, "middle_block", *up])
        h, emb = self.start(x, t, y, low_res)
        found: list[Tensor] = []
        for i, stage in enumerate(
            [*self.input_blocks, self.middle_block, *self.output_blocks][: max(at, default=-1) + 1]
        ):
            if i > ins:
                h = torch.cat([h, found[2 * ins - i]], dim=1)
            h = self.run(stage, h, emb)
            found.append(h)
        return [found[i] for i in at]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        channels, side = config["in_channels"], config["image_size"]
        small = {"low_res": noise(1, channels, side // 4, side // 4)} if config["super_res"] else {}
        return images(channels, side, config["num_classes"] or 0, t=500.0) | small

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """x: (N, C, H, W), H and W multiples of patch_size * 2^(levels - 1); t: (N,) timesteps in [0, 1000);
        y: (N,) int64 labels; low_res: (N, C, h, w) for super_res. Gives (N, out_channels, H, W). VgmError: low_res or
        labels are missing."""
        h, emb = self.start(x, t, y, low_res)
        skips = []
        for stage in self.input_blocks:
            h = self.run(stage, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), emb)
        h = self.out(h)  # (N, out p^2, H/p, W/p)
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h


class EncoderUNetModel(Trunk):
    """Classifier of noisy images, for classifier guidance: the U-Net's encoder and middle, then a pooling.

    x: (N, in_channels, H, W), t: (N,) -> logits (N, num_classes).
    """

    def __init__(
        self,
        image_size: Side = 256,  # side of x, which fixes the positions of the attention pooling
        in_channels: Width = 3,  # channels of x
        model_channels: Width = 128,  # channels of the first level
        num_res_blocks: Blocks = 2,  # residual blocks of a level
        attention_resolutions: Sequence[int] = (8, 16, 32),  # attention where the side is image_size / one of these
        channel_mult: Sequence[float] = (1, 1, 2, 2, 4, 4),  # channels of each level over model_channels
        num_classes: Whole = 1000,  # number of logits
        dropout: Fraction = 0.0,  # share of activations dropped in residual blocks
        conv_resample: bool = True,  # sizes change by convolutions (without resblock_updown)
        num_heads: Depth = 1,  # attention heads, where num_head_channels is None
        num_head_channels: Width | None = 64,  # width of an attention head; goes before num_heads
        use_scale_shift_norm: bool = True,  # the embedding scales and shifts, instead of being added
        resblock_updown: bool = True,  # sizes change inside residual blocks
        use_new_attention_order: bool = False,  # q, k, v are split before the heads
        pool: Pool = "attention",  # attention (as released), adaptive: means, spatial*: every stage's means, two layers
        norm_groups: Width = 32,  # groups of the group normalisations
    ):
        check_side(image_size, channel_mult)
        super().__init__(
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            num_heads,
            num_head_channels,
            use_scale_shift_norm,
            resblock_updown,
            use_new_attention_order,
            norm_groups,
        )
        self.num_classes, self.pool = num_classes, pool
        ch, features = self.widths[-1], sum(self.skips) + self.widths[-1]
        if pool == "attention":
            if self.head_channels is None:
                raise VgmError("attention pooling needs num_head_channels", code=USAGE)
            pooling = AttentionPool2d(image_size // self.factor, ch, self.head_channels, num_classes)
            layers: list[nn.Module] = [GroupNorm32(ch, norm_groups), nn.SiLU(), pooling]
        elif pool == "adaptive":
            head = zero(nn.Conv2d(ch, num_classes, 1))
            layers = [GroupNorm32(ch, norm_groups), nn.SiLU(), nn.AdaptiveAvgPool2d(1), head, nn.Flatten()]
        elif pool == "spatial":
            layers = [nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, num_classes)]
        else:
            layers = [nn.Linear(features, 2048), GroupNorm32(2048), nn.SiLU(), nn.Linear(2048, num_classes)]
        self.out = nn.Sequential(*layers)

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        return images(config["in_channels"], config["image_size"], t=500.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (N, C, H, W) in [-1, 1] plus noise; t: (N,) timesteps. Gives logits (N, num_classes)."""
        emb, h = self.embed(t), x
        means = []
        for stage in (*self.input_blocks, self.middle_block):
            h = self.run(stage, h, emb)
            means.append(h.mean(dim=(2, 3)))  # (N, width of the stage)
        return self.out(torch.cat(means, dim=1) if self.pool.startswith("spatial") else h)
