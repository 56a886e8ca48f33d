"""LlamaGen weights: the official GPT files, whose names are ours, and the official tokenizers.

Official files (FoundationVision/LlamaGen@ce98ec4): "model" of a training checkpoint, deepspeed's "module",
"state_dict", or a bare state (FSDP); see vgm_cli.convert_api.unwrap. The grid is in no tensor (old files hold
`freqs_cis`, which tell it), so the layout's name says it: llamagen is 16x16 codes, llamagen-384 24x24, llamagen-512
32x32. The tokenizer is VQGAN's network under other names: its levels are in execution order, its middle is a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.nets.llama_checkpoints import UNUSED, assumed, config_from, is_llama, require, to_ours

from .presets import TOKENIZER

State = Mapping[str, Tensor]

# -- GPT -------------------------------------------------------------------------------------------------------------


def recognise(names: Iterable[str]) -> bool:
    """LlamaGen's names and nothing that only a descendant (RandAR, ...) has."""
    names = set(names)
    parts = ("tok_embeddings.", "cls_embedding.", "layers.", "norm.", "output.", "freqs_cis", "causal_mask")
    return is_llama(names) and all(n.startswith(parts) for n in names)


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a released model is sampled from: behind VQ-16, with the guidance of its published FID."""
    rows, columns = config["grid"]
    text = config.get("model_type") == "t2i"
    scale = {768: 2.0, 1024: 2.0, 3200: 1.65}.get(config["dim"], 1.75)
    sampler = {"name": "llamagen", "guidance_scale": 7.5, "top_k": 1000} if text else {"name": "llamagen"}
    return {
        "recipe": {"paper": "llamagen", "sampler": sampler, **({} if text else {"guidance_scale": scale})},
        "data": {
            "sample_shape": [rows, columns],
            "grid": [rows, columns],
            "vocab_size": config["vocab_size"],
            "num_classes": config.get("num_classes", 0),
            "image_size": 16 * rows,
            "image_channels": 3,
        },
    }


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """What no tensor tells, where the network is not a published one."""
    found = assumed(config)
    if "freqs_cis" not in state:
        rows, columns = config["grid"]
        found["grid"] = f"a grid of {rows}x{columns} codes (--from llamagen-384: 24x24, llamagen-512: 32x32)"
    return found


def gpt_converter(name: str, side: int) -> Layout:
    return Layout(
        name=name,
        component="llamagen",
        recognise=recognise,
        to_ours=to_ours,
        from_ours=dict,
        config=lambda state: config_from(state, side),
        summary=f"official LlamaGen GPT, {side}x{side} codes ({16 * side} pixels with VQ-16)",
        files=Files(wrapper="model", unused=(UNUSED,)),
        published=Published(header=header, assumes=assumes),
    )


CONVERTER, CONVERTER_384, CONVERTER_512 = (
    gpt_converter(name, side) for name, side in (("llamagen", 16), ("llamagen-384", 24), ("llamagen-512", 32))
)

# -- tokenizer ---------------------------------------------------------------------------------------------------------

MIDDLE = ("block_1", "attn_1", "block_2")


def tokenizer_recognise(names: Iterable[str]) -> bool:
    own = {"encoder.conv_blocks.0.res.0.conv1.weight", "decoder.mid.0.conv1.weight", "quantize.embedding.weight"}
    return own <= set(names)


def levels_of(state: State, side: str, form: str = "conv_blocks") -> int:
    return 1 + max(int(k.split(".")[2]) for k in state if k.startswith(f"{side}.{form}."))


def our_name(name: str, levels: int) -> str:
    """An official tokenizer name -> ours."""
    if m := re.fullmatch(r"encoder\.conv_blocks\.(\d+)\.(.+)", name):
        return f"encoder.down.{m[1]}.{inner(m[2])}"
    if m := re.fullmatch(r"decoder\.conv_blocks\.(\d+)\.(.+)", name):
        return f"decoder.up.{levels - 1 - int(m[1])}.{inner(m[2])}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.(\d)\.(.+)", name):
        return f"{m[1]}.mid.{MIDDLE[int(m[2])]}.{m[3]}"
    return name


def inner(rest: str) -> str:
    return rest.replace("res.", "block.", 1) if rest.startswith("res.") else rest


def tokenizer_to_ours(state: State) -> dict[str, Tensor]:
    """Official -> ours; the buffer of recently used codes is left out. KeyError when a half is missing."""
    levels = levels_of(state, "decoder")
    ours = {our_name(k, levels): v for k, v in state.items() if k != "quantize.codebook_used"}
    require(ours, [f"{n}.weight" for n in ("encoder.conv_out", "decoder.conv_out", "quant_conv", "post_quant_conv")])
    return ours


def tokenizer_from_ours(state: State) -> dict[str, Tensor]:
    """Ours -> official, with an empty buffer of recently used codes."""
    levels = levels_of(state, "decoder", "up")
    theirs = {}
    for name, tensor in state.items():
        if m := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)", name):
            side, number = m[1].split(".")[0], int(m[2])
            number = number if side == "encoder" else levels - 1 - number
            rest = m[3].replace("block.", "res.", 1) if m[3].startswith("block.") else m[3]
            name = f"{side}.conv_blocks.{number}.{rest}"
        elif m := re.fullmatch(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)", name):
            name = f"{m[1]}.mid.{MIDDLE.index(m[2])}.{m[3]}"
        theirs[name] = tensor
    return {**theirs, "quantize.codebook_used": torch.zeros(65536)}


def tokenizer_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes; everything else is as published."""
    own = tokenizer_to_ours(state)
    ch, in_channels = own["encoder.conv_in.weight"].shape[:2]
    levels = levels_of(own, "encoder", "down")
    blocks = 1 + max(int(k.split(".")[4]) for k in own if k.startswith("encoder.down.0.block."))
    n_embed, embed_dim = own["quantize.embedding.weight"].shape

    def widths(side: str, last: int) -> tuple[int, ...]:
        return tuple(own[f"{side}.{i}.block.{last}.conv2.weight"].shape[0] // ch for i in range(levels))

    config: dict[str, Any] = {
        **TOKENIZER["VQ-16"],
        "n_embed": n_embed,
        "embed_dim": embed_dim,
        "z_channels": own["decoder.conv_in.weight"].shape[1],
        "ch": ch,
        "ch_mult": widths("encoder.down", blocks - 1),
        "num_res_blocks": blocks,
        "attn_resolutions": (256 // 2 ** (levels - 1),),
        "in_channels": in_channels,
        "out_ch": own["decoder.conv_out.weight"].shape[0],
    }
    back = widths("decoder.up", blocks)
    return config if back == config["ch_mult"] else {**config, "decoder_ch_mult": back}


TOKENIZER_CONVERTER = Layout(
    name="llamagen-tokenizer",
    component="llamagen-tokenizer",
    kind="codec",
    recognise=tokenizer_recognise,
    to_ours=tokenizer_to_ours,
    from_ours=tokenizer_from_ours,
    config=tokenizer_config,
    summary="official LlamaGen tokenizers (vq_ds16_c2i.pt, vq_ds8_c2i.pt, vq_ds16_t2i.pt)",
    files=Files(wrapper="model", unused=(r"quantize\.codebook_used$",)),
)
