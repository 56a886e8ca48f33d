"""Latent diffusion's U-Net: ADM's, with attention to a sequence of vectors. Rombach et al. 2022 (arXiv 2112.10752).

Official code: CompVis/latent-diffusion@a506df5 ldm/modules/diffusionmodules/openaimodel.py; with linear projections
Stability-AI/stablediffusion@cf1d67a (Stable Diffusion 2), with several blocks a level and a vector beside the time
Stability-AI/generative-models@fbdc58c (SDXL). Parameter names are the official ones.

Deviations: attention is fused; what is stacked on x is a keyword of its own, `concat`; `norm_groups` makes the groups
of narrow networks wider; a class table may have one more row, `null_class`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.spatial_transformer import SpatialTransformer
from vgm_cli.nets.unet_blocks import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    ResBlock,
    Upsample,
    check_side,
    timestep_embedding,
    zero,
)
from vgm_cli.nn.example import images, noise
from vgm_cli.nn.features import places
from vgm_cli.ranges import Blocks, Depth, Fraction, Side, Vocabulary, Whole, Width


class Stage(nn.Sequential):
    """Layers in a row: residual blocks are told emb, transformers the context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def by_level(value: Any, levels: int, what: str) -> list[Any]:
    """One value for every level. VgmError: a list of another length."""
    found = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(found) != levels:
        raise VgmError(f"{what} has {len(found)} entries, channel_mult {levels}", f"one {what} for each level", USAGE)
    return found


class LDMEncoder(nn.Module):
    """Time embedding, encoder and middle block of the U-Net, which networks that steer it have, too.

    Every stage of input_blocks leaves a skip connection. Their widths are in `skips`; `factor` is the side of the input
    over the side in the middle.
    """

    checkpointing = False

    def __init__(
        self,
        image_size: Side = 64,  # side of x as it was trained; any other side that halves once per level will do
        in_channels: Width = 4,  # channels of x
        concat_channels: Whole = 0,  # channels of what is stacked on x
        model_channels: Width = 320,  # channels of the first level
        num_res_blocks: Blocks | Sequence[Blocks] = 2,  # residual blocks of a level; the decoder has one more
        attention_resolutions: Sequence[int] = (4, 2, 1),  # downsampling factors at which there is attention
        channel_mult: Sequence[float] = (1, 2, 4, 4),  # channels of each level over model_channels
        dropout: Fraction = 0.0,  # share of activations dropped in residual blocks
        conv_resample: bool = True,  # sizes change by convolutions (without resblock_updown)
        num_heads: Depth = 8,  # attention heads, where num_head_channels is None
        num_head_channels: Width | None = None,  # width of an attention head; goes before num_heads
        num_heads_upsample: Depth | None = None,  # heads of the decoder's legacy attention blocks; None: num_heads
        use_scale_shift_norm: bool = False,  # the embedding scales and shifts, instead of being added
        resblock_updown: bool = False,  # sizes change inside residual blocks
        use_spatial_transformer: bool = True,  # attention is by transformers; False: ADM's attention blocks
        transformer_depth: Depth | Sequence[Blocks] = 1,  # blocks of a transformer, of all levels or of each
        context_dim: Width | None = 768,  # width of the context's vectors; None: attention is over positions alone
        use_linear_in_transformer: bool = False,  # see SpatialTransformer
        disable_self_attentions: Sequence[bool] | None = None,  # levels whose transformers see the context alone
        disable_middle_self_attn: bool = False,  # the middle's transformer sees the context alone
        num_attention_blocks: Sequence[Blocks] | None = None,  # first blocks of each level with attention; None: all
        legacy: bool = False,  # heads share all channels also where num_head_channels does not divide them
        use_new_attention_order: bool = False,  # of attention blocks: q, k, v are split before the heads
        num_classes: Whole | None = None,  # rows of the class table that is added to the time
        null_class: bool = False,  # the class table has one more row, for "no class"
        vector_dim: Width | None = None,  # width of a vector that is embedded and added to the time (SDXL: 2816)
        norm_groups: Width = 32,  # groups of the group normalisations; narrow networks want fewer
        out_channels: Width | None = None,  # of the decoder; None: in_channels
        n_embed: Vocabulary | None = None,  # codes of a codebook: the decoder gives their logits, instead of a map
    ):
        keywords = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_side(image_size, channel_mult)
        super().__init__()
        self.keywords = keywords  # for networks that are made like this one
        levels = len(channel_mult)
        self.in_channels, self.concat_channels = in_channels, concat_channels
        self.model_channels, self.emb_channels = model_channels, 4 * model_channels
        self.widths = [int(m * model_channels) for m in channel_mult]
        self.blocks = by_level(num_res_blocks, levels, "num_res_blocks")
        self.depths = by_level(transformer_depth, levels, "transformer_depth")
        self.alone = by_level(disable_self_attentions or [False] * levels, levels, "disable_self_attentions")
        attending = num_attention_blocks or [n + 1 for n in self.blocks]
        self.attending = by_level(attending, levels, "num_attention_blocks")
        self.attended = set(attention_resolutions)
        self.dropout, self.scale_shift, self.updown = dropout, use_scale_shift_norm, resblock_updown
        self.conv_resample, self.norm_groups = conv_resample, norm_groups
        self.heads, self.head_channels, self.legacy = num_heads, num_head_channels, legacy
        counted = legacy and not use_spatial_transformer  # elsewhere the official code divides by the encoder's width
        self.heads_up = num_heads_upsample if counted and num_heads_upsample else num_heads
        self.transformers, self.linear = use_spatial_transformer, use_linear_in_transformer
        self.context_dim = context_dim if use_spatial_transformer else None
        self.new_order = use_new_attention_order
        self.sample_shape = (in_channels, image_size, image_size)

        def embedder(width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, self.emb_channels), nn.SiLU(), nn.Linear(self.emb_channels, self.emb_channels)
            )

        self.time_embed = embedder(model_channels)
        self.label_emb: nn.Module | None = None
        if num_classes and vector_dim:
            raise VgmError("the network adds a class or a vector to the time", "num_classes=0", USAGE)
        if num_classes:
            self.num_classes, self.null_class = num_classes, null_class
            self.label_emb = nn.Embedding(num_classes + null_class, self.emb_channels)
            if null_class:
                self.null_condition = self._null_condition  # api.NullCondition: absent without a null class
        elif vector_dim:
            self.label_emb = nn.Sequential(embedder(vector_dim))

        ch = self.widths[0]
        first = nn.Conv2d(in_channels + concat_channels, ch, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage(first)])
        self.skips, self.factor = [ch], 1
        for level, width in enumerate(self.widths):
            for i in range(self.blocks[level]):
                attention = self.attention(width, level, i, self.factor, num_heads)
                self.input_blocks.append(Stage(self.res(ch, width), *attention))
                ch = width
                self.skips.append(ch)
            if level < levels - 1:
                down = self.res(ch, ch, "down") if resblock_updown else Downsample(ch, conv_resample)
                self.input_blocks.append(Stage(down))
                self.skips.append(ch)
                self.factor *= 2
        middle = self.attend(ch, self.depths[-1], disable_middle_self_attn, num_heads)
        self.middle_block = Stage(self.res(ch, ch), middle, self.res(ch, ch))
        self.add_decoder(out_channels or in_channels, n_embed)

    def add_decoder(self, out_channels: int, n_embed: int | None) -> None:
        """An encoder alone has none."""

    def res(self, in_channels: int, out_channels: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
        own = (self.emb_channels, self.dropout, self.scale_shift, resample, self.norm_groups)
        return ResBlock(in_channels, out_channels, *own)

    def attention(self, channels: int, level: int, place: int, factor: int, heads: int) -> list[nn.Module]:
        """What follows the residual block at this place of a level: attention, or nothing."""
        if factor not in self.attended or place >= self.attending[level]:
            return []
        if self.transformers and not self.depths[level]:
            return []
        return [self.attend(channels, self.depths[level], self.alone[level], heads)]

    def attend(self, channels: int, depth: int, alone: bool, heads: int) -> nn.Module:
        """Heads by number, or by their width where num_head_channels says so. VgmError: the width does not divide."""
        heads = channels // self.head_channels if self.head_channels else heads
        width = self.head_channels or channels // heads
        if not heads or (channels % (width if self.head_channels else heads) and not self.transformers):
            message = f"{channels} channels do not divide into attention heads"
            raise VgmError(message, "change num_heads or num_head_channels", USAGE)
        if not self.transformers:
            return AttentionBlock(channels, heads, self.new_order, self.norm_groups)
        width = channels // heads if self.legacy else width
        own = (width, depth, self.context_dim, self.linear, 0.0, self.norm_groups, not alone)
        return SpatialTransformer(channels, heads, *own)

    def _null_condition(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "y": torch.full_like(cond["y"], self.num_classes)} if "y" in cond else dict(cond)

    def run(self, stage: nn.Module, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """stage(h, emb, context), recomputed in backward when `checkpointing` is on."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, context, use_reentrant=False)
        return stage(h, emb, context)

    def embed(self, t: Tensor, y: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        """(N,) timesteps, with classes (N,) or vectors (N, vector_dim) -> (N, 4 * model_channels). VgmError: the
        network was built with one of these and is not given it."""
        emb = self.time_embed(timestep_embedding(t, self.model_channels))
        if self.label_emb is None:
            return emb
        if isinstance(self.label_emb, nn.Embedding):
            if y is None and self.null_class:
                y = torch.full((len(t),), self.num_classes, device=t.device)
            if y is None:
                message = "this network was built without a null class, it needs labels"
                raise VgmError(message, "model.null_class=true adds one", USAGE)
            return emb + self.label_emb(y)
        if vector is None:
            raise VgmError("this network needs a vector beside the time", 'cond={"vector": (N, vector_dim)}', USAGE)
        return emb + self.label_emb(vector)

    def stacked(self, x: Tensor, concat: Tensor | None) -> Tensor:
        """x with what is stacked on it, (N, in_channels + concat_channels, H, W). VgmError: they do not fit."""
        if not self.concat_channels:
            return x
        wanted = (self.concat_channels, *x.shape[2:])
        if concat is None or tuple(concat.shape[1:]) != wanted:
            found = "nothing" if concat is None else "×".join(map(str, concat.shape[1:]))
            message = f"{found} is stacked on x where {'×'.join(map(str, wanted))} is wanted"
            raise VgmError(message, "a condition with keyword=concat gives it", USAGE)
        return torch.cat([x, concat.to(x.dtype)], dim=1)

    def encode(
        self, h: Tensor, emb: Tensor, context: Tensor | None, hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Through encoder and middle: (N, C, H, W) -> the middle's map, and every skip connection. hint: (N,
        widths[0], H, W), added behind the first convolution. VgmError: there is no context."""
        if self.context_dim and context is None:
            raise VgmError("this network needs a context", 'cond={"context": (N, L, context_dim)}', USAGE)
        skips: list[Tensor] = []
        for i, stage in enumerate(self.input_blocks):
            h = self.run(stage, h, emb, context)
            h = h + hint if i == 0 and hint is not None else h
            skips.append(h)
        return self.run(self.middle_block, h, emb, context), skips


class LDMUNet(LDMEncoder):
    """Latent diffusion's U-Net: forward(x, t, context, y, vector, concat) predicts the noise in x_t, or the velocity.

    x: (N, in_channels, H, W), t: (N,) timesteps in [0, 1000), context: (N, L, context_dim), y: (N,) int64, vector: (N,
    vector_dim), concat: (N, concat_channels, H, W) -> (N, out_channels, H, W). VgmError: widths that do not divide into
    groups or heads, conditions that the network has and is not given.
    """

    def add_decoder(self, out_channels: int, n_embed: int | None) -> None:
        self.out_channels = out_channels
        ch, skips, factor = self.widths[-1], list(self.skips), self.factor
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.blocks[level] + 1):
                layers: list[nn.Module] = [self.res(ch + skips.pop(), width)]
                layers += self.attention(width, level, i, factor, self.heads_up)
                ch = width
                if level > 0 and i == self.blocks[level]:
                    layers.append(self.res(ch, ch, "up") if self.updown else Upsample(ch, self.conv_resample))
                    factor //= 2
                self.output_blocks.append(Stage(*layers))
        final = zero(nn.Conv2d(self.widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(GroupNorm32(ch, self.norm_groups), nn.SiLU(), final)
        self.id_predictor: nn.Module | None = None
        if n_embed:
            self.id_predictor = nn.Sequential(GroupNorm32(ch, self.norm_groups), nn.Conv2d(self.widths[0], n_embed, 1))

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        channels, side = config["in_channels"], min(config["image_size"], 2 ** (len(config["channel_mult"]) + 1))
        given = images(channels, side, config["num_classes"] or 0, t=500.0)
        for name, key, shape in (
            ("context", "context_dim", (1, 7)),
            ("vector", "vector_dim", (1,)),
            ("concat", "concat_channels", (1,)),
        ):
            if config[key]:
                given[name] = noise(*shape, config[key], *([side, side] if name == "concat" else []))
        return given

    middle = "middle_block"

    def features(
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """Maps (N, C, h, w) behind "input_blocks.3", "middle_block" or "output_blocks.0"; see api.HasFeatures. The
        encoder is always run whole."""
        ins, outs = len(self.input_blocks), len(self.output_blocks)
        down, up = ([f"{part}_blocks.{i}" for i in range(n)] for part, n in (("input", ins), ("output", outs)))
        at = places(layers, [*down, self.middle, *up])
        emb = self.embed(t, y, vector)
        h, skips = self.encode(self.stacked(x, concat), emb, context)
        after = range(max(at, default=0) - ins)
        found = [*skips, h, *(m for _, m in zip(after, self.decoded(h, skips, emb, context, control)))]
        return [found[i] for i in at]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """See the class. H and W are multiples of 2^(levels - 1). control: a map or None for every skip connection,
        from the first on, and one for the middle, which are added to them."""
        emb = self.embed(t, y, vector)
        h, skips = self.encode(self.stacked(x, concat), emb, context)
        return self.decode(h, skips, emb, context, control)

    def decode(
        self,
        h: Tensor,
        skips: Sequence[Tensor],
        emb: Tensor,
        context: Tensor | None,
        control: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The output of what `encode` gives; control: see forward."""
        *_, h = self.decoded(h, skips, emb, context, control)
        return self.out(h) if self.id_predictor is None else self.id_predictor(h)

    def decoded(
        self,
        h: Tensor,
        skips: Sequence[Tensor],
        emb: Tensor,
        context: Tensor | None,
        control: Sequence[Tensor | None] | None = None,
    ) -> Iterator[Tensor]:
        """The maps behind every stage of the decoder, one after the other."""
        skips = list(skips)
        if control is not None:
            *sides, middle = control
            h = h if middle is None else h + middle
            skips = [s if c is None else s + c for s, c in zip(skips, sides, strict=True)]
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), emb, context)
            yield h
