"""Published ControlNets as constructor keywords: those of Stable Diffusion 1.5 and 2.1. Torch-free.

Official files: lllyasviel/ControlNet@ed85cd1 models/cldm_v15.yaml, cldm_v21.yaml.
"""

from __future__ import annotations

from typing import Any

from vgm_cli.nets.ldm_unet_presets import PRESETS as UNETS

HINT: dict[str, Any] = {"hint_size": 512, "hint_channels": 3, "hint_widths": (16, 32, 96, 256)}
PRESETS: dict[str, dict[str, Any]] = {"v1.5": {**UNETS["sd1"], **HINT}, "v2.1": {**UNETS["sd2"], **HINT}}
