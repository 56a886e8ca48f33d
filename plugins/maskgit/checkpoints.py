"""MaskGIT weights: the flax files of its two networks, the tokenizer's PyTorch port, and the Halton release.

google-research/maskgit@1db2359: flax msgpack, everything below "params"; kernels are (in, out), those of attention
(in, heads, d) and (heads, d, out), convolutions HWIO. The port (maskgit-vqgan-imagenet-f16-256.bin of
fun-research/TiTok on the Hugging Face hub): bare, its names are ours. valeoai/Halton-MaskGIT@f61b0a1 Trainer/:
{model_state_dict, ...}, names may begin with DDP's and torch.compile's words; the head's weight is the table's, stored
twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError

from .presets import SIZES

State = Mapping[str, Tensor]


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that the pattern's group finds."""
    return 1 + max((int(m[1]) for n in names if (m := re.match(pattern, n))), default=-1)


def of_grid(positions: int, side: int | None = None) -> tuple[int, int]:
    """A square grid of so many positions. VgmError: there is none."""
    side = side or round(positions**0.5)
    if side * side != positions:
        raise VgmError(f"{positions} positions are no square grid", "grid=[ROWS,COLUMNS] says which", USAGE)
    return side, side


def data(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its data: codes of a tokenizer of factor 16, published ones all are."""
    grid = list(config["grid"])
    return {
        "sample_shape": grid,
        "grid": grid,
        "vocab_size": config["vocab_size"],
        "num_classes": config["num_classes"],
        "image_size": 16 * grid[0],
        "image_channels": 3,
    }


# -- MaskGIT, flax -----------------------------------------------------------------------------------------------------

SELF = "TransformerLayer_{i}.Attention_0.self_attention."
LINEAR = {  # ours -> theirs
    "attention_ln": "TransformerLayer_{i}.Attention_0.attention_output_ln",
    "intermediate": "TransformerLayer_{i}.Mlp_0.intermediate_output",
    "output": "TransformerLayer_{i}.Mlp_0.layer_output",
    "output_ln": "TransformerLayer_{i}.Mlp_0.layer_output_ln",
}
OUTER = {
    "embeddings_ln": "Embed_0.embeddings_ln",
    "mlm_dense": "MlmLayer_0.mlm_dense",
    "mlm_ln": "MlmLayer_0.mlm_ln",
}
TABLES = {
    "word_embeddings.weight": "Embed_0.word_embeddings.embedding",
    "position_embeddings.weight": "Embed_0.position_embeddings.embedding",
    "mlm_bias": "MlmLayer_0.mlm_bias.bias",
}
WORDS, POSITIONS = TABLES["word_embeddings.weight"], TABLES["position_embeddings.weight"]


def modules(layers: int) -> dict[str, str]:
    """{ours: theirs} of norms and linear layers, but for those of heads."""
    inner = {f"layers.{i}.{a}": b.format(i=i) for i in range(layers) for a, b in LINEAR.items()}
    return OUTER | inner


def bert_to_ours(state: State) -> dict[str, Tensor]:
    """KeyError: a tensor is missing."""
    layers = count(state, r"TransformerLayer_(\d+)\.")
    ours = {own: state[theirs] for own, theirs in TABLES.items()}
    for own, theirs in modules(layers).items():
        norm = own.endswith("_ln")
        ours[f"{own}.weight"] = state[f"{theirs}.scale"] if norm else state[f"{theirs}.kernel"].T.contiguous()
        ours[f"{own}.bias"] = state[f"{theirs}.bias"]
    for i in range(layers):
        for part in ("query", "key", "value"):
            name = SELF.format(i=i) + part
            ours[f"layers.{i}.{part}.weight"] = state[f"{name}.kernel"].permute(1, 2, 0).contiguous()
            ours[f"layers.{i}.{part}.bias"] = state[f"{name}.bias"]
        name = SELF.format(i=i) + "out"
        ours[f"layers.{i}.out.weight"] = state[f"{name}.kernel"].flatten(0, 1).T.contiguous()
        ours[f"layers.{i}.out.bias"] = state[f"{name}.bias"]
    return ours


def bert_from_ours(state: State) -> dict[str, Tensor]:
    layers = count(state, r"layers\.(\d+)\.")
    theirs = {name: state[own] for own, name in TABLES.items()}
    for own, name in modules(layers).items():
        weight = state[f"{own}.weight"]
        if own.endswith("_ln"):
            theirs[f"{name}.scale"] = weight
        else:
            theirs[f"{name}.kernel"] = weight.T.contiguous()
        theirs[f"{name}.bias"] = state[f"{own}.bias"]
    for i in range(layers):
        for part in ("query", "key", "value"):
            name = SELF.format(i=i) + part
            theirs[f"{name}.kernel"] = state[f"layers.{i}.{part}.weight"].permute(2, 0, 1).contiguous()
            theirs[f"{name}.bias"] = state[f"layers.{i}.{part}.bias"]
        name, shape = SELF.format(i=i) + "out", state[f"layers.{i}.query.bias"].shape
        theirs[f"{name}.kernel"] = state[f"layers.{i}.out.weight"].T.unflatten(0, tuple(shape)).contiguous()
        theirs[f"{name}.bias"] = state[f"layers.{i}.out.bias"]
    return theirs


def bert_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes. Codes and classes share one table: 1000 classes, as published, where it
    is large enough."""
    rows, width = state[WORDS].shape
    heads = state[SELF.format(i=0) + "query.bias"].shape[0]
    classes = 1000 if rows > 1001 else 0
    return {
        "vocab_size": rows - 1001 if classes else rows - 2,
        "grid": of_grid(len(state[POSITIONS]) - 1),
        "num_classes": classes,
        "hidden_size": width,
        "num_hidden_layers": count(state, r"TransformerLayer_(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": state[LINEAR["intermediate"].format(i=0) + ".bias"].shape[0],
    }


def bert_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the released networks are sampled from: 8 steps for 16x16 codes, 12 for more."""
    steps = 8 if config["grid"][0] <= 16 else 12
    return {"recipe": {"paper": "maskgit", "sampler": {"name": "maskgit", "steps": steps}}, "data": data(config)}


def bert_assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    rows = state[WORDS].shape[0]
    if (rows, config["num_classes"]) == (2025, 1000):
        return {}
    text = f"{config['num_classes']} of the table's {rows} rows are classes (num_classes=N vocab_size=K tell otherwise)"
    return {"num_classes": text}


BERT = Layout(
    name="maskgit",
    component="maskgit",
    summary="official MaskGIT transformers (flax msgpack, params)",
    recognise=lambda names: {*TABLES.values(), SELF.format(i=0) + "query.kernel"} <= set(names),
    to_ours=bert_to_ours,
    from_ours=bert_from_ours,
    config=bert_config,
    published=Published(header=bert_header, assumes=bert_assumes),
)

# -- tokenizer ---------------------------------------------------------------------------------------------------------

CODEBOOK = "quantizer.codebook"


def shape_of(state: State) -> tuple[int, int]:
    """(levels, residual blocks of each) of our names."""
    return count(state, r"encoder\.down\.(\d+)\."), count(state, r"encoder\.mid\.(\d+)\.")


def port_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes of our names."""
    levels, depth = shape_of(state)
    ch, channels = state["encoder.conv_in.weight"].shape[:2]
    n_embed, embed_dim = state["quantize.embedding.weight"].shape
    widths = [state[f"encoder.down.{i}.block.{depth - 1}.conv2.weight"].shape[0] for i in range(levels)]
    config: dict[str, Any] = {
        "n_embed": n_embed,
        "embed_dim": embed_dim,
        "ch": ch,
        "ch_mult": tuple(w // ch for w in widths),
        "num_res_blocks": depth,
        "in_channels": channels,
    }
    if normalisation_of(state) == "LayerNorm":
        config["norm_groups"] = 0
    elif ch % 32:  # no published model: the largest number of groups that divides
        config["norm_groups"] = next(g for g in (16, 8, 4, 2, 1) if ch % g == 0)
    return config | ({"conv_downsample": True} if strided(state) else {})


def normalisation_of(names: Iterable[str]) -> str:
    """flax's name of a tokenizer's normalisations, by our names or theirs."""
    return "LayerNorm" if any(".over_channels." in n or ".LayerNorm_" in n for n in names) else "GroupNorm"


def strided(names: Iterable[str]) -> bool:
    """Whether convolutions halve the levels, by our names or theirs: of two convolutions one is the first."""
    return any(".downsample_conv." in n or n.startswith("encoder.Conv_2.") for n in names)


def norm_names(ours: str, theirs: str) -> dict[str, str]:
    own = f"{ours}.over_channels" if ".LayerNorm_" in theirs else ours
    return {f"{own}.weight": f"{theirs}.scale", f"{own}.bias": f"{theirs}.bias"}


def block_names(ours: str, theirs: str, changes: bool, norm: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for i in (1, 2):
        names |= norm_names(f"{ours}.norm{i}", f"{theirs}.{norm}_{i - 1}")
        names[f"{ours}.conv{i}.weight"] = f"{theirs}.Conv_{i - 1}.kernel"
    return names | ({f"{ours}.nin_shortcut.weight": f"{theirs}.Conv_2.kernel"} if changes else {})


def tokenizer_names(state: Iterable[str], levels: int, depth: int, changing: Iterable[str]) -> dict[str, str]:
    """{ours: theirs}: flax numbers a module's parts in the order in which they are called. state: names, ours or
    theirs. changing: blocks, by their flax names, that change the number of channels."""
    changing, norm = set(changing), normalisation_of(state)
    down = [f"encoder.down.{i}.block.{k}" for i in range(levels) for k in range(depth)]
    up = [f"decoder.up.{i}.block.{k}" for i in reversed(range(levels)) for k in range(depth)]
    order = {
        "encoder": down + [f"encoder.mid.{k}" for k in range(depth)],
        "decoder": [f"decoder.mid.{k}" for k in range(depth)] + up,
    }
    names = {"quantize.embedding.weight": CODEBOOK}
    for side, found in order.items():
        for i, own in enumerate(found):
            theirs = f"{side}.ResBlock_{i}"
            names |= block_names(own, theirs, theirs in changing, norm)
        names |= norm_names(f"{side}.norm_out", f"{side}.{norm}_0")
    convs = ["decoder.conv_in", *(f"decoder.up.{i}.upsample_conv" for i in reversed(range(1, levels)))]
    numbered = {f"decoder.Conv_{i}": own for i, own in enumerate([*convs, "decoder.conv_out"])}
    halving = [f"encoder.down.{i}.downsample_conv" for i in range(levels - 1)] if strided(state) else []
    numbered |= {f"encoder.Conv_{i}": own for i, own in enumerate([*halving, "encoder.conv_out"], 1)}
    for theirs, own in numbered.items():
        names |= {f"{own}.weight": f"{theirs}.kernel", f"{own}.bias": f"{theirs}.bias"}
    return names | {"encoder.conv_in.weight": "encoder.Conv_0.kernel"}


def tokenizer_to_ours(state: State) -> dict[str, Tensor]:
    """KeyError: a tensor is missing."""
    levels = count(state, r"decoder\.Conv_(\d+)\.") - 1
    depth = count(state, r"encoder\.ResBlock_(\d+)\.") // max(1, levels + 1)
    changing = [n.removesuffix(".Conv_2.kernel") for n in state if n.endswith(".Conv_2.kernel") and "ResBlock" in n]
    names = tokenizer_names(state, levels, depth, changing)
    return {
        own: state[theirs].permute(3, 2, 0, 1).contiguous() if theirs.endswith(".kernel") else state[theirs]
        for own, theirs in names.items()
    }


def tokenizer_from_ours(state: State) -> dict[str, Tensor]:
    levels, depth = shape_of(state)
    changing = {f"{s}.ResBlock_{i}" for s in ("encoder", "decoder") for i in range(1000)}
    every = tokenizer_names(state, levels, depth, changing)
    return {
        theirs: state[own].permute(2, 3, 1, 0).contiguous() if theirs.endswith(".kernel") else state[own]
        for own, theirs in every.items()
        if own in state or ".nin_shortcut." not in own
    }


def port_to_ours(state: State) -> dict[str, Tensor]:
    """Names are ours. KeyError: a tensor is missing."""
    levels, depth = shape_of(state)
    for own in tokenizer_names(state, levels, depth, ()):
        state[own]
    return dict(state)


TOKENIZER = Layout(
    name="maskgit-tokenizer",
    component="maskgit-tokenizer",
    kind="codec",
    summary="official MaskGIT tokenizers (flax msgpack, params)",
    recognise=lambda names: {CODEBOOK, "encoder.ResBlock_0.Conv_0.kernel", "decoder.Conv_0.bias"} <= set(names),
    to_ours=tokenizer_to_ours,
    from_ours=tokenizer_from_ours,
    config=lambda state: port_config(tokenizer_to_ours(state)),
)
PORT = {"encoder.conv_in.weight", "encoder.mid.0.conv1.weight", "decoder.conv_out.bias", "quantize.embedding.weight"}
TOKENIZER_PORT = Layout(
    name="maskgit-tokenizer-torch",
    component="maskgit-tokenizer",
    kind="codec",
    summary="the tokenizer's PyTorch port (maskgit-vqgan-imagenet-f16-256.bin)",
    recognise=lambda names: PORT <= set(names) and "encoder.conv_in.bias" not in set(names),
    to_ours=port_to_ours,
    from_ours=dict,
    config=port_config,
)

# -- Halton ------------------------------------------------------------------------------------------------------------

HEADS = {dim: heads for dim, _, heads in SIZES.values()}
ATTENTION, FEED_FORWARD = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
OWN = ("tok_emb.weight", "pos_emb.weight", "cls_emb.weight", "head.bias", "last_norm.norm_final.bias")
INNER = (*(f"attn.{p}.weight" for p in ATTENTION), *(f"ff.{p}.weight" for p in FEED_FORWARD))
BLOCK = ("mlp.1.weight", "mlp.1.bias", "ln1.weight", "ln2.weight", *INNER)
TIED = "head.weight"


def halton_to_ours(state: State) -> dict[str, Tensor]:
    """Names are ours, without the second name of the table. KeyError: a tensor is missing."""
    layers = count(state, r"transformer\.layers\.(\d+)\.")
    names = [*OWN, TIED, "last_norm.norm_final.weight", "last_norm.mlp.1.weight", "last_norm.mlp.1.bias"]
    for name in [*names, *(f"transformer.layers.{i}.{part}" for i in range(layers) for part in BLOCK)]:
        state[name]
    return {k: v for k, v in state.items() if k != TIED}


def halton_from_ours(state: State) -> dict[str, Tensor]:
    return {**state, TIED: state["tok_emb.weight"].clone()}


def halton_config(state: State) -> dict[str, Any]:
    """Constructor keywords read off the shapes; heads follow the published widths, else 64 channels each."""
    rows, dim = state["tok_emb.weight"].shape
    inner = state["transformer.layers.0.ff.w1.weight"].shape[0]
    config: dict[str, Any] = {
        "vocab_size": rows - 1,
        "grid": of_grid(len(state["pos_emb.weight"])),
        "num_classes": len(state["cls_emb.weight"]) - 1,
        "hidden_dim": dim,
        "depth": count(state, r"transformer\.layers\.(\d+)\."),
        "heads": HEADS.get(dim) or max(1, dim // 64),
        "register": len(state["reg_tokens.weight"]) if "reg_tokens.weight" in state else 0,
    }
    if inner != 256 * -(-int(8 * dim / 3) // 256):
        config["mlp_dim"] = 3 * inner // 2
    return config


def halton_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the released networks are sampled from: 32 steps in the Halton order, guided as in the README's table."""
    scales = {384: 2.5, 512: 2.0, 768: 1.7, 1024: 1.5}
    recipe = {"paper": "maskgit", "sampler": {"name": "halton", "steps": 32}}
    return {"recipe": {**recipe, "guidance_scale": scales.get(config["hidden_dim"], 1.5)}, "data": data(config)}


def halton_assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    if config["hidden_dim"] in HEADS:
        return {}
    return {"heads": f"heads={config['heads']}, of 64 channels (heads=N tells otherwise)"}


HALTON = Layout(
    name="halton-maskgit",
    component="halton-maskgit",
    summary="official Halton-MaskGIT (ImageNet_256_base.pth)",
    recognise=lambda names: {*OWN, TIED, "transformer.layers.0.attn.wq.weight"} <= set(names),
    to_ours=halton_to_ours,
    from_ours=halton_from_ours,
    config=halton_config,
    files=Files(wrapper="model_state_dict"),
    published=Published(header=halton_header, assumes=halton_assumes),
)
