"""Llama decoders over codes in the official layout (FoundationVision/LlamaGen@ce98ec4 and its descendants).

The layout's names are ours. What a paper adds to the tensors, and what it says beside them, is its plugin's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .llama_presets import SIZES

State = Mapping[str, Tensor]
UNUSED = r"freqs_cis$|\.kv_cache\.|^causal_mask$"  # rotation tables and caches
HEADS = {dim: heads for _, heads, dim in SIZES.values()}
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
LAYER = ("attention.wqkv", "attention.wo", "attention_norm", "ffn_norm", *FEED_FORWARD)


def is_llama(names: Iterable[str]) -> bool:
    """Whether a state with these names has the decoder's, and perhaps others."""
    names = set(names)
    own = {f"{n}.weight" for n in ("tok_embeddings", "layers.0.attention.wqkv", "layers.0.feed_forward.w3", "output")}
    condition = {"cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"} & names
    return own <= names and bool(condition)


def to_ours(state: State) -> dict[str, Tensor]:
    """Official names are ours; rotation tables and caches, which some files hold, are left out. KeyError: one is
    missing."""
    layers = [f"layers.{i}.{part}.weight" for i in range(layers_of(state)) for part in LAYER]
    require(state, ["tok_embeddings.weight", *layers, "norm.weight", "output.weight"])
    return {k: v for k, v in state.items() if not re.search(UNUSED, k)}


def require(state: State, names: Iterable[str]) -> None:
    """KeyError: one of the names is missing."""
    for name in names:
        if name not in state:
            raise KeyError(name)


def layers_of(state: State) -> int:
    return 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers."))


def config_from(state: State, side: int = 16) -> dict[str, Any]:
    """Constructor keywords read off the shapes; heads follow the published widths, else 64 channels each. A null class
    is assumed. side: of the grid, where no rotation table tells it."""
    vocab, dim = state["tok_embeddings.weight"].shape
    n_head = HEADS.get(dim) or max(1, dim // 64)
    rows = state["layers.0.attention.wqkv.weight"].shape[0]
    hidden = state["layers.0.feed_forward.w1.weight"].shape[0]
    config: dict[str, Any] = {
        "dim": dim,
        "n_layer": layers_of(state),
        "n_head": n_head,
        "vocab_size": vocab,
        "grid": (side, side),
    }
    n_kv_head = (rows // (dim // n_head) - n_head) // 2
    if n_kv_head != n_head:
        config["n_kv_head"] = n_kv_head
    plain = int(2 * 4 * dim / 3)
    if hidden != -(-plain // 256) * 256:  # no published size: the largest rounding that gives it
        config["multiple_of"] = next(m for m in range(hidden, 0, -1) if -(-plain // m) * m == hidden)
    if "cls_embedding.embedding_table.weight" in state:
        config["num_classes"] = state["cls_embedding.embedding_table.weight"].shape[0] - 1
        prefix = 1
    else:
        prefix, caption_dim = state["cls_embedding.uncond_embedding"].shape
        config |= {"model_type": "t2i", "cls_token_num": prefix, "caption_dim": caption_dim, "num_classes": 0}
    if "freqs_cis" in state:
        own = round((state["freqs_cis"].shape[0] - prefix) ** 0.5)
        config["grid"] = (own, own)
    return config


def assumed(config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells of heads and classes, where the network is not a published one: {keyword: sentence}."""
    found = {}
    if config["dim"] not in HEADS:
        found["n_head"] = f"n_head={config['n_head']}, heads of 64 channels (n_head=N tells otherwise)"
    classes = config.get("num_classes", 0)
    if classes not in (0, 1000):
        found["num_classes"] = f"the {classes + 1} rows of the label table are {classes} classes and a null class"
    return found
