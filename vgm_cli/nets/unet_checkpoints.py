"""Names of the ADM U-Net's blocks, in its official layout and in diffusers', which latent diffusion's shares.

Official: openai/guided-diffusion@22e0df8; diffusers 0.35.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import Tensor

State = Mapping[str, Tensor]


def indices(state: State, prefix: str) -> set[int]:
    return {int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix)}


def blocks_of_levels(state: State) -> list[int]:
    """Residual blocks of every level of a U-Net's encoder, the first level first: they lie between the layers that
    change the size. Where these are residual blocks, too, the decoder tells, in which they share a place with others.
    KeyError: it is not there, and the blocks are not those of one level.
    """
    blocks = indices(state, "input_blocks.")
    count = max(blocks) + 1
    missing = set(range(count)) - blocks  # averages have no weights
    convolutions = {int(k.split(".")[1]) for k in state if k.endswith(".op.weight")}
    if changes := sorted(missing or convolutions):
        return [b - a - 1 for a, b in zip([0, *changes], [*changes, count], strict=True)]
    ups = [int(k.split(".")[1]) for k in state if k.startswith("output_blocks.") and k.endswith(".in_layers.0.bias")]
    kinds = {(f"{b}.1.norm.weight" in state, len(state[f"{b}.0.out_layers.3.bias"]))
             for b in (f"input_blocks.{i}" for i in range(1, count))}  # fmt: skip
    if not ups and len(kinds) > 1:
        raise KeyError("output_blocks.0.0.in_layers.0.bias")
    ends = [-1, *sorted(i for i in set(ups) if ups.count(i) == 2), max(ups, default=count - 1)]
    return [b - a - 1 for a, b in pairwise(ends)][::-1]


OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
KINDS = ("weight", "bias")


def layers(levels: int, depth: int, attention: Iterable[int], updown: bool) -> list[tuple[str, str, str]]:
    """(ours, theirs, "res" | "attn" | "conv") of every block between the first and the last convolution."""
    attention = set(attention)
    pairs = [
        ("middle_block.0", "mid_block.resnets.0", "res"),
        ("middle_block.1", "mid_block.attentions.0", "attn"),
        ("middle_block.2", "mid_block.resnets.1", "res"),
    ]
    for i in range(levels):
        theirs = f"down_blocks.{i}"
        for j in range(depth):
            ours = f"input_blocks.{1 + i * (depth + 1) + j}"
            pairs.append((f"{ours}.0", f"{theirs}.resnets.{j}", "res"))
            if i in attention:
                pairs.append((f"{ours}.1", f"{theirs}.attentions.{j}", "attn"))
        if i < levels - 1:
            ours = f"input_blocks.{(i + 1) * (depth + 1)}.0"
            change = (ours, f"{theirs}.downsamplers.0", "res")
            pairs.append(change if updown else (f"{ours}.op", f"{theirs}.downsamplers.0.conv", "conv"))
        theirs = f"up_blocks.{levels - 1 - i}"
        for j in range(depth + 1):
            ours = f"output_blocks.{(levels - 1 - i) * (depth + 1) + j}"
            pairs.append((f"{ours}.0", f"{theirs}.resnets.{j}", "res"))
            if i in attention:
                pairs.append((f"{ours}.1", f"{theirs}.attentions.{j}", "attn"))
        if i > 0:
            ours = f"{ours}.{2 if i in attention else 1}"
            change = (ours, f"{theirs}.upsamplers.0", "res")
            pairs.append(change if updown else (f"{ours}.conv", f"{theirs}.upsamplers.0.conv", "conv"))
    return pairs
