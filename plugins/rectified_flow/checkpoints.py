"""Weights of gnobitab/RectifiedFlow: {optimizer, model, ema, step} files of NCSN++ and DDPM++ networks."""

from __future__ import annotations

from vgm_cli.nets.ncsnpp_checkpoints import converter

CONVERTER = converter("rectified-flow", "gnobitab/RectifiedFlow checkpoints")
