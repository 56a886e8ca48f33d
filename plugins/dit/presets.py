"""Published sizes of DiT. Torch-free."""

from vgm_cli.nets.dit_presets import presets

PRESETS = presets("DiT")
