"""ControlNet: a trainable copy of a frozen U-Net's encoder, joined to it by convolutions that begin at zero.

Zhang, Rao and Agrawala 2023 (arXiv 2302.05543), section 3.1. Official code: lllyasviel/ControlNet@ed85cd1 cldm/cldm.py.
Parameter names are the official ones, without `control_model.`.

Deviations: the decoder of unlocked training is a copy too, so that the base's file never changes; the hint block
halves the sides as often as the latents are smaller than the images (the official one always three times).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vgm_cli.api import NullCondition
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.ldm_unet import LDMUNet
from vgm_cli.nets.unet_blocks import zero
from vgm_cli.nn.copying import copy_weights
from vgm_cli.nn.example import noise
from vgm_cli.nn.features import places
from vgm_cli.ranges import Blocks, Depth, Fraction, Side, Whole, Width

COPIED = ("time_embed", "label_emb", "input_blocks", "middle_block")
DECODER = ("output_blocks", "out")


def hint_block(channels: int, widths: Sequence[int], out_channels: int, halvings: int) -> nn.Sequential:
    """Convolutions from a hint (N, channels, H, W) to (N, out_channels, H / 2^halvings, W / 2^halvings), zero at first.

    VgmError: more halvings than steps between the widths.
    """
    if halvings > len(widths) - 1:
        message = f"{len(widths)} widths halve a hint at most {len(widths) - 1} times, {halvings} are wanted"
        raise VgmError(message, "more hint_widths", USAGE)
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.SiLU()]
    for i, (before, after) in enumerate(pairwise(widths)):
        stride = 2 if i < halvings else 1
        layers += [nn.Conv2d(before, before, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, zero(nn.Conv2d(widths[-1], out_channels, 3, padding=1)))


def factor_of(config: Mapping[str, Any]) -> int:
    """How many times larger a hint is than x, by a network's keywords."""
    if config["hint_size"] is None:
        return int(2 ** (len(config["hint_widths"]) - 1))
    return int(config["hint_size"]) // int(config["image_size"])


class ControlNet(LDMUNet):
    """A frozen U-Net and its trainable copy, which sees a hint: forward(x, t, context, hint) is like x.

    hint: (N, hint_channels, f H, f W) in [0, 1], where the latents x (N, C, H, W) are f times smaller than the images.
    All keywords between image_size and norm_groups are those of the base, see LDMEncoder. The state has the copy alone.
    VgmError: the base is another network than these say.
    """

    def __init__(
        self,
        base: nn.Module | None = None,  # the frozen U-Net; without it there are only the maps of `control`
        hint_size: Side | None = None,  # side of hints where x has image_size; None: all that hint_widths can halve
        hint_channels: Width = 3,  # channels of hints; several pictures may be stacked
        hint_widths: Sequence[Width] = (16, 32, 96, 256),  # of the hint block, from the hint on
        unlocked: bool = False,  # a copy of the decoder is trained, too (sd_locked=False)
        image_size: Side = 64,  # side of x as it was trained
        in_channels: Width = 4,  # channels of x
        concat_channels: Whole = 0,  # channels of what is stacked on x
        model_channels: Width = 320,  # channels of the first level
        num_res_blocks: Blocks | Sequence[Blocks] = 2,  # residual blocks of a level
        attention_resolutions: Sequence[int] = (4, 2, 1),  # downsampling factors at which there is attention
        channel_mult: Sequence[float] = (1, 2, 4, 4),  # channels of each level over model_channels
        dropout: Fraction = 0.0,  # share of activations dropped in residual blocks
        conv_resample: bool = True,  # sizes change by convolutions
        num_heads: Depth = 8,  # attention heads, where num_head_channels is None
        num_head_channels: Width | None = None,  # width of an attention head
        num_heads_upsample: Depth | None = None,  # heads of the decoder's attention blocks
        use_scale_shift_norm: bool = False,  # the embedding scales and shifts
        resblock_updown: bool = False,  # sizes change inside residual blocks
        use_spatial_transformer: bool = True,  # attention is by transformers
        transformer_depth: Depth | Sequence[Blocks] = 1,  # blocks of a transformer
        context_dim: Width | None = 768,  # width of the context's vectors
        use_linear_in_transformer: bool = False,  # linear projections around transformers
        disable_self_attentions: Sequence[bool] | None = None,  # levels whose transformers see the context alone
        disable_middle_self_attn: bool = False,  # the middle's transformer sees the context alone
        num_attention_blocks: Sequence[Blocks] | None = None,  # first blocks of each level with attention
        legacy: bool = False,  # heads share all channels also where num_head_channels does not divide them
        use_new_attention_order: bool = False,  # of attention blocks
        num_classes: Whole | None = None,  # rows of the class table
        null_class: bool = False,  # the class table has one more row
        vector_dim: Width | None = None,  # width of a vector that is added to the time
        norm_groups: Width = 32,  # groups of the group normalisations
        out_channels: Width | None = None,  # of an unlocked decoder; None: in_channels
    ):
        own = dict(locals())
        encoder = {k: v for k, v in own.items() if k not in (*OWN, "self", "__class__")}
        self.unlocked = unlocked
        super().__init__(**encoder)
        factor = factor_of(own)
        halvings = factor.bit_length() - 1
        if halvings < 0 or (hint_size or factor * image_size) != image_size * 2**halvings:
            message = f"hints of {hint_size} pixels are not 1, 2, 4, … times the {image_size} of x"
            raise VgmError(message, "hint_size is a power of two times image_size", USAGE)
        self.hint_channels, self.hint_factor = hint_channels, factor
        first = self.widths[0]
        self.input_hint_block = hint_block(hint_channels, hint_widths, first, halvings)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero(nn.Conv2d(c, c, 1))) for c in self.skips)
        middle = self.widths[-1]
        self.middle_block_out = nn.Sequential(zero(nn.Conv2d(middle, middle, 1)))
        self.base: LDMUNet | None = None
        if base is not None:
            if not isinstance(base, LDMUNet):
                message = f"a ControlNet is trained on latent diffusion's U-Net, not on {type(base).__name__}"
                raise VgmError(message, "`vgm ls models`: ldm-unet", USAGE)
            self.base = base.requires_grad_(False)
            for name in (*COPIED, *(DECODER if unlocked else ())):
                part = getattr(self, name)
                if part is not None:
                    copy_weights(base, part, f"{name}.")

    def add_decoder(self, out_channels: int, n_embed: int | None) -> None:
        self.id_predictor = None
        if self.unlocked:
            super().add_decoder(out_channels, n_embed)

    @property
    def downsampling(self) -> list[int]:
        """By how much each connection's map is smaller than x, in the order of the connections."""
        found, factor = [1], 1
        for level, blocks in enumerate(self.blocks):
            found += [factor] * blocks
            if level < len(self.blocks) - 1:
                factor *= 2
                found.append(factor)
        return [*found, factor]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        given = LDMUNet.example(config)
        side = factor_of(config) * given["x"].shape[-1]
        return {**given, "hint": noise(1, config["hint_channels"], side, side)}

    def control(
        self,
        x: Tensor,
        t: Tensor,
        hint: Tensor,
        scales: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> list[Tensor] | None:
        """What is added to the base: a map for every skip connection, from the first on, and one for the middle. The
        hint is added behind the first convolution. scales: (N, number of maps), factors on the maps; None where all
        are 0. VgmError: a hint that does not fit x."""
        if scales is not None and not scales.is_meta and not scales.any():
            return None
        wanted = (self.hint_channels, *(self.hint_factor * n for n in x.shape[2:]))
        if tuple(hint.shape[1:]) != wanted:
            found, want = ("×".join(map(str, s)) for s in (hint.shape[1:], wanted))
            raise VgmError(f"the hint is {found} where {want} is wanted", "conditions.hint sees to it", USAGE)
        emb = self.embed(t, y, vector)
        h, skips = self.encode(self.stacked(x, concat), emb, context, self.input_hint_block(hint))
        maps = [conv(s) for conv, s in zip(self.zero_convs, skips)] + [self.middle_block_out(h)]
        return maps if scales is None else [m * scales[:, i, None, None, None].to(m) for i, m in enumerate(maps)]

    def frozen(self) -> LDMUNet:
        """The base. VgmError: there is none."""
        if self.base is None:
            hint = "vgm convert FILE OUT base=UNET.safetensors names the U-Net that it goes with"
            raise VgmError("this ControlNet has no base to steer", hint, USAGE)
        return self.base

    def steered(
        self,
        x: Tensor,
        t: Tensor,
        control: Sequence[Tensor | None] | None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """The base's output with these maps added. Its encoder keeps no graph, unless one leads to x. VgmError: there
        is no base."""
        base = self.frozen()
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            emb = base.embed(t, y, vector)
            h, skips = base.encode(base.stacked(x, concat), emb, context)
        decoder = self if self.unlocked else base
        decoder.checkpointing = self.checkpointing
        return decoder.decode(h, skips, emb, context, control)

    def features(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        hint: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> list[Tensor]:
        """Maps (N, C, h, w) of the steered base behind "input_blocks.3", "middle_block" or "output_blocks.0"; see
        api.HasFeatures."""
        base, count = self.frozen(), len(self.skips)
        down, up = ([f"{part}_blocks.{i}" for i in range(count)] for part in ("input", "output"))
        at = places(layers, [*down, self.middle, *up])
        told = {"context": context, "y": y, "vector": vector, "concat": concat}
        emb = base.embed(t, y, vector)
        h, skips = base.encode(base.stacked(x, concat), emb, context)
        found = [*skips, h]
        if max(at, default=0) > count:
            control = None if hint is None else self.control(x, t, hint, scales, **told)
            stages = (self if self.unlocked else base).decoded(h, skips, emb, context, control)
            found += [m for _, m in zip(range(max(at) - count), stages)]
        return [found[i] for i in at]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        hint: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """See the class; without a hint the base's own output. scales: see `control`."""
        self.frozen()
        told = {"context": context, "y": y, "vector": vector, "concat": concat}
        control = None if hint is None else self.control(x, t, hint, scales, **told)
        return self.steered(x, t, control, **told)


OWN = ("base", "hint_size", "hint_channels", "hint_widths", "unlocked")


class Summed:
    """Several ControlNets of one base, whose maps are added: called with the first one's keywords, and those of the
    k-th with `_k` (hint_1, scales_1, …)."""

    def __init__(self, networks: Sequence[ControlNet]):
        self.networks = networks
        if isinstance(networks[0], NullCondition):
            self.null_condition = networks[0].null_condition  # api.NullCondition: of the first, as of all

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """x: (N, C, H, W), t: (N,) -> like x."""
        own = [{key: cond.pop(keyword(key, k), None) for key in ("hint", "scales")} for k in range(len(self.networks))]
        total: list[Tensor] | None = None
        for network, told in zip(self.networks, own):  # each is told what the base is told
            hint = told["hint"]
            found = None if hint is None else network.control(x, t, hint, told["scales"], **cond)
            if found is not None:
                total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return self.networks[0].steered(x, t, total, **cond)


def keyword(key: str, k: int) -> str:
    """The keyword of the k-th ControlNet."""
    return f"{key}_{k}" if k else key
