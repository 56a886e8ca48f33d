"""Published sizes of SiT. Torch-free."""

from vgm_cli.nets.dit_presets import presets

PRESETS = presets("SiT")
