"""NCSN++ and DDPM++ weights: the layout of score_sde_pytorch and of RectifiedFlow, whose names are ours.

A checkpoint is {optimizer, model, ema, step} (convert_api.unwrap names the list that `ema` is). `sigmas`, the ladder of
noise levels, is float64 there and float32 here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Layout, Published

State = Mapping[str, Tensor]


def recognise(keys: Iterable[str]) -> bool:
    """A flat list of layers among which there are residual blocks and single-head attention."""
    keys = {k.removeprefix("module.") for k in keys}
    leaves = {re.sub(r"^all_modules\.\d+\.", "", k) for k in keys if k.startswith("all_modules.")}
    return {"Conv_0.weight", "Conv_1.weight", "GroupNorm_1.weight", "NIN_3.W"} <= leaves


def to_ours(state: State) -> dict[str, Tensor]:
    """Blocks of a network that is not told the time keep an official layer for it, which nothing goes through: it is
    left out. KeyError: the ladder is missing."""
    ours = {k.removeprefix("module."): v for k, v in state.items()}
    if not told_time(ours):
        ours = {k: v for k, v in ours.items() if ".Dense_0." not in k}
    return ours | {"sigmas": ours["sigmas"].float()}


def told_time(state: State) -> bool:
    """Whether linear layers embed the time before the first convolution."""
    return any(state[k].ndim == 2 for k in ("all_modules.0.weight", "all_modules.1.weight") if k in state)


def from_ours(state: State) -> dict[str, Tensor]:
    return {**state, "sigmas": state["sigmas"].double()}


# -- reading the constructor's keywords off the shapes -----------------------------------------------------------------


def layers_of(state: State) -> list[dict[str, Tensor]]:
    """The tensors of every entry of all_modules; {} where an entry has none."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("all_modules."):
            _, index, leaf = key.split(".", 2)
            found.setdefault(int(index), {})[leaf] = value
    return [found.get(i, {}) for i in range(max(found) + 1)]


def kind(layer: Mapping[str, Tensor], ddpm: bool) -> str:
    """res, attention, resize (a block or layer that changes sizes), pyramid, combine, norm, conv, linear or fourier."""
    if "Conv_1.weight" in layer:
        out, into = layer["Conv_0.weight"].shape[:2]
        return "resize" if out == into and "Conv_2.weight" in layer else "res"
    if "NIN_3.W" in layer:
        return "attention"
    if "Conv2d_0.weight" in layer:
        return "resize" if ddpm else "pyramid"
    if "Conv_0.weight" in layer:
        return "combine" if layer["Conv_0.weight"].shape[-1] == 1 else "resize" if ddpm else "pyramid"
    if "weight" in layer:
        return {1: "norm", 2: "linear", 4: "conv"}[layer["weight"].ndim]
    return "fourier" if "W" in layer else "resize"  # means have no weights


def start_of_decoder(layers: list[dict[str, Tensor]], kinds: list[str], stem: int) -> int:
    """The first residual block that also takes a skip connection, so more channels than the block before gave."""
    ch = layers[stem]["weight"].shape[0]
    for i in range(stem + 1, len(kinds)):
        if kinds[i] == "res":
            out, into = layers[i]["Conv_0.weight"].shape[:2]
            if into > ch and kinds[i - 1] != "combine":
                return i
            ch = out
    raise KeyError("all_modules: no decoder")


def config_from(state: State) -> dict[str, Any]:
    """Constructor keywords. What shapes do not tell follows the published networks: attention is at 16 pixels; those
    with Fourier features or an image pyramid resample by a filter (unless the pyramid's convolutions are plain), those
    with Fourier features divide by sigma or t; those with DDPM's blocks are the DDPM."""
    layers = layers_of(state)
    ddpm = not any("Conv_2.weight" in layer for layer in layers)
    kinds = [kind(layer, ddpm) for layer in layers]
    for i in range(1, len(kinds)):  # DDPM's blocks: of two changes of size in a row, one is the image's
        if kinds[i - 1 : i + 1] == ["resize", "resize"]:
            kinds[i] = "pyramid"
    stem = kinds.index("conv")
    decoder = start_of_decoder(layers, kinds, stem)
    levels: list[list[int]] = [[]]
    for i in range(stem + 1, decoder - 3):
        if kinds[i] == "resize":
            levels.append([])
        else:
            levels[-1].append(i)
    nf, channels = layers[stem]["weight"].shape[:2]
    residual = [[i for i in level if kinds[i] == "res"] for level in levels]
    attends = [n for n, level in enumerate(levels) if any(kinds[i] == "attention" for i in level)]
    size = 16 * 2 ** attends[0] if attends else 4 * 2 ** len(levels)
    fourier, skip, pyramid = kinds[0] == "fourier", "combine" in kinds, "pyramid" in kinds[:decoder]
    heads = [i for i in range(decoder, len(kinds)) if kinds[i] == "norm"]  # the first is followed by the first image
    features = layers[heads[0] + 1]["weight"].shape[0] != channels  # or, with progressive=residual, by features
    filtered = any("Conv2d_0.weight" in layer for layer in layers) if pyramid or features else fourier or skip
    config: dict[str, Any] = {
        "image_size": size,
        "in_channels": channels,
        "nf": nf,
        "ch_mult": [layers[level[0]]["Conv_1.weight"].shape[0] // nf for level in residual],
        "num_res_blocks": len(residual[0]),
        "attn_resolutions": [size // 2**n for n in attends],
        "resblock_type": "ddpm" if ddpm else "biggan",
        "skip_rescale": not ddpm,
        "norm_groups": 32 if ddpm and nf % 32 == 0 else None,
        "fir": filtered,
        "progressive": "residual" if features else "output_skip" if len(heads) > 1 else "none",
        "progressive_input": "input_skip" if skip else "residual" if pyramid else "none",
        "embedding_type": "fourier" if fourier else "positional",
        "conditional": told_time(state),
        "scale_by_sigma": fourier,
        "num_classes": len(state["label_emb.weight"]) if "label_emb.weight" in state else 0,
    }
    ladder = state.get("sigmas")
    if ladder is not None and not ladder.is_meta:
        config |= {"sigma_max": round(float(ladder[0]), 4), "sigma_min": round(float(ladder[-1]), 6)}
        config["num_scales"] = len(ladder)
    return config


def converter(
    name: str,
    summary: str,
    config: Callable[[State], dict[str, Any]] = config_from,
    recognise: Callable[[Iterable[str]], bool] = recognise,
    published: Published = Published(),  # noqa: B008, frozen
) -> Layout:
    """The layout under a paper's name: score-based models and rectified flows share it, and no tensor says whose a file
    is. config, recognise, published: where the paper's own networks tell more."""
    return Layout(
        name=name,
        component="ncsnpp",
        summary=summary,
        recognise=recognise,
        to_ours=to_ours,
        from_ours=from_ours,
        config=config,
        published=published,
    )
