"""SUPIR: a frozen text-to-image U-Net that is steered by a copy of its encoder which sees the degraded picture.

Yu et al. 2024 (arXiv 2401.13627). Official code: Fanghua-Yu/SUPIR@bda91af SUPIR/modules/SUPIR_v0.py GLVControl,
LightGLVUNet. Parameter names are the official ones, `control` for their control_model. The official lists of channels
are those of SDXL; here they follow from whatever U-Net is steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import HasClasses, NullCondition
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nets.ldm_unet import LDMEncoder, LDMUNet, Stage
from vgm_cli.nets.unet_blocks import ResBlock, Upsample, zero
from vgm_cli.nn.example import images, noise
from vgm_cli.ranges import Blocks, Count

from .layers import ZeroCrossAttn, ZeroSFT


class GLVControl(LDMEncoder):
    """A copy of the encoder and of the middle block that sees x_t and, through one convolution, the latents of the
    degraded picture."""

    def __init__(self, input_upscale: int, **encoder: Any):
        super().__init__(**encoder)
        self.input_upscale = input_upscale
        hint = nn.Conv2d(self.in_channels, self.widths[0], 3, padding=1)
        self.input_hint_block = Stage(zero(hint))

    def forward(
        self,
        picture: Tensor,
        t: Tensor,
        x: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> list[Tensor]:
        """picture: latents (N, C, H / input_upscale, W / input_upscale), x: (N, C, H, W), t: (N,) -> a map for every
        skip connection and one for the middle."""
        if self.input_upscale != 1:
            picture = F.interpolate(picture, scale_factor=self.input_upscale, mode="bilinear", antialias=True)
        emb = self.embed(t, y, vector)
        middle, skips = self.encode(x, emb, context, self.input_hint_block(picture, emb, context))
        return [*skips, middle]


def up_layer(stage: Any) -> bool:
    """Whether a stage of the decoder ends by doubling its side, behind attention."""
    return len(stage) == 3 and isinstance(stage[-1], Upsample | ResBlock)


class SUPIRUNet(nn.Module):
    """A frozen U-Net (the role `base`), the control and the connectors: forward(x, t, context, y, vector, control)
    predicts the noise in x_t as the base does.

    control: latents (N, C, H, W) of the degraded picture, as the codec's degradation-robust encoder gives them.
    control_scale: 1 lets the control have all its effect, 0 none. Everything else: see LDMUNet. VgmError: no picture, a
    base that sees more than x, a depth that the base's transformers do not have.
    """

    middle = "middle"

    def __init__(
        self,
        base: Any = None,  # the U-Net that is steered: a role
        control_depth: Sequence[Blocks] | None = None,  # blocks of the control's transformers by level; None: all
        input_upscale: Count = 1,  # latents of the degraded picture are enlarged by this
        unet: dict[str, Any] | None = None,  # keywords of the base where it is not given: nothing can be run then
    ):
        super().__init__()
        steered = base
        if base is None and unet is not None:
            with torch.device("meta"):
                base = LDMUNet(**unet)
        if not isinstance(base, LDMUNet):
            found = "nothing" if base is None else f"a {type(base).__name__}"
            raise VgmError(f"SUPIR steers an ldm-unet, not {found}", "roles.base={run: RUN}", USAGE)
        if base.concat_channels:
            raise VgmError("SUPIR steers a network that sees x alone, this one has more stacked on it", code=USAGE)
        self.base: Any = steered
        encoder = {k: v for k, v in base.keywords.items() if k not in ("out_channels", "n_embed")}
        if control_depth is not None:
            encoder["transformer_depth"] = depths(base, control_depth)
        self.control = GLVControl(input_upscale, **encoder)
        self.project_modules = nn.ModuleList(connectors(base))
        self.sample_shape = base.sample_shape
        if isinstance(base, HasClasses):
            self.num_classes = base.num_classes
        if isinstance(base, NullCondition):
            self.null_condition = base.null_condition  # api.NullCondition
        start(self.control, base)

    @property
    def checkpointing(self) -> bool:
        return self.control.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.control.checkpointing = self.base.checkpointing = on

    @property
    def stages(self) -> int:
        """Number of the decoder's stages."""
        return len(self.control.skips)

    def features(
        self,
        x: Tensor,
        t: Tensor,
        layers: Sequence[str],
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        control: Tensor | None = None,
        control_scale: float | Tensor = 1.0,
    ) -> list[Tensor]:
        """Maps (N, C, h, w) of "middle" and of "output.K", the decoder's K-th stage; see api.HasFeatures."""
        found: dict[str, Tensor] = {}
        names = ["middle", *(f"output.{i}" for i in range(self.stages))]
        if odd := [name for name in layers if name not in names]:
            raise VgmError(f"this network has no layer {odd[0]!r}", f"it has {', '.join(names)}", USAGE)
        self.run(x, t, context, y, vector, control, control_scale, found)
        return [found[name] for name in layers]

    @staticmethod
    def example(config: Mapping[str, Any]) -> dict[str, Tensor]:
        """For the base that the configuration describes."""
        own = config.get("unet") or {}
        channels, side = own.get("in_channels", 4), 2 ** (len(own.get("channel_mult", (1, 2, 4))) + 1)
        given = images(channels, side, own.get("num_classes") or 0, t=500.0)
        for name, key in (("context", "context_dim"), ("vector", "vector_dim")):
            if own.get(key):
                given[name] = noise(1, *((7,) if name == "context" else ()), own[key])
        return {**given, "control": noise(1, channels, side, side)}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        vector: Tensor | None = None,
        control: Tensor | None = None,
        control_scale: float | Tensor = 1.0,
    ) -> Tensor:
        return self.run(x, t, context, y, vector, control, control_scale, {})

    def run(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None,
        y: Tensor | None,
        vector: Tensor | None,
        control: Tensor | None,
        control_scale: float | Tensor,
        found: dict[str, Tensor],
    ) -> Tensor:
        """forward, with the maps that `features` names written into `found`."""
        if control is None:
            raise VgmError("this network follows a degraded picture", "--hint IMAGE, or vgm restore", USAGE)
        if self.base is None:
            hint = "vgm convert … base=UNET.safetensors"
            raise VgmError("the U-Net that this network steers is not there", hint, USAGE)
        base, own = self.base, list(self.project_modules)
        maps = self.control(control.to(x), t, x, context, y, vector)
        with torch.no_grad():  # nothing before the first connector is trained
            emb = base.embed(t, y, vector)
            h, skips = base.encode(x, emb, context)
        h = own.pop()(maps.pop(), h, scale=control_scale)
        found["middle"] = h
        for i, stage in enumerate(base.output_blocks):
            c = maps.pop()
            h = own.pop()(c, skips.pop(), h, control_scale)
            if up_layer(stage):
                h = base.run(stage[:-1], h, emb, context)
                h = base.run(stage[-1:], own.pop()(c, h, control_scale), emb, context)
            else:
                h = base.run(stage, h, emb, context)
            found[f"output.{i}"] = h
        return base.out(h)


def depths(base: LDMUNet, wanted: Sequence[int]) -> list[int]:
    """Blocks of the control's transformers by level. VgmError: more than the base has, another number of levels."""
    if len(wanted) != len(base.depths) or any(a > b for a, b in zip(wanted, base.depths)) or not wanted[-1]:
        has = f"the base has {list(base.depths)}"
        raise VgmError(f"control_depth={list(wanted)} does not fit", f"{has}: as many or fewer, by level", USAGE)
    return list(wanted)


def connectors(base: LDMUNet) -> list[nn.Module]:
    """In the order of the encoder: for every skip connection, and for the middle, what the control does to it; before
    the one behind which the decoder doubles its side, cross-attention."""
    groups, middle = base.norm_groups, base.widths[-1]
    found: list[nn.Module] = [ZeroSFT(middle, middle, 0, groups)]
    skips, h = list(base.skips), middle
    for stage in base.output_blocks:
        skip = skips.pop()
        found.append(ZeroSFT(skip, skip, h, groups))
        h = stage[0].out_layers[-1].out_channels  # type: ignore[index]
        if up_layer(stage):
            found.append(ZeroCrossAttn(skip, h, groups))
    return found[::-1]


@torch.no_grad()
def start(control: GLVControl, base: LDMUNet) -> None:
    """The control starts as the base's encoder, of whose transformers it may have the first blocks alone."""
    theirs = base.state_dict()
    own = control.state_dict()
    if any(v.is_meta for v in own.values()) or any(v.is_meta for v in theirs.values()):
        return
    control.load_state_dict({k: theirs[k] for k in own if k in theirs}, strict=False)
