"""Published sizes of Llama decoders over codes, which LlamaGen and its descendants share. Torch-free.

Official file: FoundationVision/LlamaGen@ce98ec4 autoregressive/models/gpt.py.
"""

from __future__ import annotations

SIZES = {  # layers, heads, width
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}
