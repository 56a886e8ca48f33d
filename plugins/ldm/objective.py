"""The objective of LDM's first stages is the one that VQGAN's and LlamaGen's share: vgm_cli/losses/first_stage.py."""

from __future__ import annotations

from vgm_cli.losses.first_stage import (
    AutoencoderObjective,
    discriminator_term,
    generator_term,
    reconstruction_loss,
)
from vgm_cli.nn.quantize import code_usage

__all__ = ["AutoencoderObjective", "code_usage", "discriminator_term", "generator_term", "reconstruction_loss"]
