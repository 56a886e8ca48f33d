"""Published sizes of DiT (and SiT), as constructor keywords. Torch-free."""

SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PRESETS = {f"DiT-{size}/{p}": {**SIZES[size], "patch_size": p} for size in SIZES for p in (2, 4, 8)}
SIT_PRESETS = {name.replace("DiT", "SiT"): keywords for name, keywords in PRESETS.items()}
