"""What connects SUPIR's control to the decoder: feature modulation that starts without effect, and cross-attention.

Yu et al. 2024 (arXiv 2401.13627), sec. 3.1. Official code: Fanghua-Yu/SUPIR@bda91af SUPIR/modules/SUPIR_v0.py ZeroSFT,
ZeroCrossAttn. Parameter names are the official ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vgm_cli.nets.spatial_transformer import CrossAttention
from vgm_cli.nets.unet_blocks import GroupNorm32, zero

HIDDEN, HEAD = 128, 64


class ZeroSFT(nn.Module):
    """A map of the control modulates a decoder feature and its skip connection, laid side by side.

    forward(c, h, before, scale): c (N, control, H, W), h (N, skip, H, W), before (N, decoder, H, W) or None -> (N,
    decoder + skip, H, W). scale 0 gives the two as they are; 1 normalises and modulates them. At the start the
    modulation is none, but the normalisation (which norm=False leaves out) is not: the network is then not yet the one
    that it steers.
    """

    def __init__(self, control: int, skip: int, decoder: int = 0, groups: int = 32, norm: bool = True):
        super().__init__()
        both = skip + decoder
        self.skip, self.decoder = skip, decoder
        self.param_free_norm = GroupNorm32(both, groups) if norm else nn.Identity()  # with weights all the same
        self.mlp_shared = nn.Sequential(nn.Conv2d(control, HIDDEN, 3, padding=1), nn.SiLU())
        self.zero_mul = zero(nn.Conv2d(HIDDEN, both, 3, padding=1))
        self.zero_add = zero(nn.Conv2d(HIDDEN, both, 3, padding=1))
        self.zero_conv = zero(nn.Conv2d(control, skip, 1))

    def forward(self, c: Tensor, h: Tensor, before: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        raw = h if before is None else torch.cat([before, h], dim=1)
        h = h + self.zero_conv(c)
        h = h if before is None else torch.cat([before, h], dim=1)
        hidden = self.mlp_shared(c)
        h = self.param_free_norm(h) * (1 + self.zero_mul(hidden)) + self.zero_add(hidden)
        return h * scale + raw * (1 - scale)


class ZeroCrossAttn(nn.Module):
    """A decoder feature attends to a map of the control, with a residual.

    forward(c, h, scale): c (N, control, H, W), h (N, decoder, H, W) -> like h. Not zero at the start, as released.
    """

    def __init__(self, control: int, decoder: int, groups: int = 32):
        super().__init__()
        heads = max(1, decoder // HEAD)
        self.attn = CrossAttention(decoder, control, heads, min(HEAD, decoder), 0.0)
        self.norm1, self.norm2 = GroupNorm32(decoder, groups), GroupNorm32(control, groups)

    def forward(self, c: Tensor, h: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        x, context = (norm(map_).flatten(2).transpose(1, 2) for norm, map_ in ((self.norm1, h), (self.norm2, c)))
        return h + self.attn(x, context).transpose(1, 2).unflatten(2, tuple(h.shape[2:])) * scale
