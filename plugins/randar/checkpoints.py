"""RandAR weights: the official files, whose names are ours. They are LlamaGen's and one vector more.

Official files (huggingface.co/ziqipang/RandAR; ziqipang/RandAR@d374a72 sample_c2i.py loads them strictly): bare
safetensors of 16x16 codes. Training keeps accelerate's folders iters_N, whose model.safetensors is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.nets import llama_checkpoints as llama

State = Mapping[str, Tensor]
VECTOR = "pos_instruct_embeddings"


def recognise(names: Iterable[str]) -> bool:
    names = set(names)
    return VECTOR in names and llama.is_llama(names)


def to_ours(state: State) -> dict[str, Tensor]:
    """Official names are ours; KeyError: one is missing."""
    llama.require(state, [VECTOR, "cls_embedding.embedding_table.weight"])
    return llama.to_ours(state)


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a released model is sampled from: 88 passes, with the guidance of its published FID."""
    rows, columns = config["grid"]
    released = {(1024, 16384): 3.4}  # the others: 4.0
    return {
        "recipe": {
            "paper": "randar",
            "sampler": {"name": "randar"},
            "guidance_scale": released.get((config["dim"], config["vocab_size"]), 4.0),
        },
        "data": {
            "sample_shape": [rows, columns],
            "grid": [rows, columns],
            "vocab_size": config["vocab_size"],
            "num_classes": config["num_classes"],
            "image_size": 16 * rows,
            "image_channels": 3,
        },
    }


CONVERTER = Layout(
    name="randar",
    component="randar",
    recognise=recognise,
    to_ours=to_ours,
    from_ours=dict,
    config=llama.config_from,
    summary="official RandAR, 16x16 codes",
    files=Files(unused=(llama.UNUSED,)),
    published=Published(header=header, assumes=lambda state, config: llama.assumed(config)),
)
