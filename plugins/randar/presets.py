"""Published RandAR sizes, as constructor keywords. Torch-free.

Official files: ziqipang/RandAR@d374a72 configs/randar/*.yaml. The XXL has no file there: it is the paper's 1.4B, with
LlamaGen-XXL's layers, heads and width.
"""

from __future__ import annotations

from typing import Any

from vgm_cli.nets.llama_presets import SIZES

RANDAR: dict[str, dict[str, Any]] = {
    f"RandAR-{size}": dict(zip(("n_layer", "n_head", "dim"), SIZES[f"GPT-{size}"])) for size in ("L", "XL", "XXL")
}
RANDAR["RandAR-L-maskgit"] = {**RANDAR["RandAR-L"], "vocab_size": 1024}
