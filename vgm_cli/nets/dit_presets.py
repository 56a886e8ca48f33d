"""Published sizes of DiT and of the papers that take its network, as constructor keywords. Torch-free."""

from __future__ import annotations

from typing import Any

SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


def presets(name: str) -> dict[str, dict[str, Any]]:
    """{"DiT-XL/2": keywords, ...} for name "DiT": every size with patches of 2, 4 and 8."""
    return {f"{name}-{size}/{p}": {**keywords, "patch_size": p} for size, keywords in SIZES.items() for p in (2, 4, 8)}
