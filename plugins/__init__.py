"""One folder per paper. Import path: vgm_plugins.<paper>."""
