"""Weights of yang-song/score_sde_pytorch@cb1f359, {optimizer, model, ema, step} files, and of the JAX classifier.

The tensors do not say on which SDE a network was trained. Those with Fourier features are VE's in continuous time;
positional ones are read as VP in continuous time, unless another layout is named (sub-VP, discrete VP), or
scale_by_sigma=true is, which is VE's discrete ladder. Networks of 256 and 1024 pixels are in diffusers' layout, too:
diffusers_checkpoints.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Layout, Published
from vgm_cli.nets.ncsnpp_checkpoints import config_from, converter, recognise

from .objective import view_of
from .sde import SDE, Kind

State = Mapping[str, Tensor]
SNR = {64: 0.17, 256: 0.075, 1024: 0.15}  # of the published configs, by the side of images; others: 0.16


def config(state: State) -> dict[str, Any]:
    """Constructor keywords. Networks of VE see images in [0, 1]."""
    found = config_from(state)
    return {**found, "centered": not found["scale_by_sigma"]}


def sampler_of(kind: Kind, continuous: bool, side: int, steps: int, filtered: bool) -> dict[str, Any]:
    """The published sampler. steps: N. filtered: the network resamples by a filter."""
    if kind == "ve":
        predictor, corrector = (
            "reverse-diffusion",
            {"corrector": "langevin", "snr": SNR.get(side, 0.16), "norm": "batch"},
        )
    else:
        discrete = "reverse-diffusion" if filtered else "ancestral"
        predictor, corrector = "euler-maruyama" if continuous else discrete, {"corrector": "none"}
    return {"name": "score-sde", "steps": steps, "predictor": predictor, **corrector}


def header_of(kind: Kind, continuous: bool) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """How a converted network of this SDE is looked at and sampled. Those that divide by sigma are VE's."""

    def header(config: Mapping[str, Any]) -> dict[str, Any]:
        ve = config.get("scale_by_sigma", False)
        in_time = config.get("embedding_type") == "fourier" if ve else continuous
        own: Kind = "ve" if ve else kind
        ends = {k: config[k] for k in ("sigma_min", "sigma_max") if ve and k in config}
        steps = config.get("num_scales", 1000)
        sde = SDE(kind=own, steps=steps, **ends)
        size, channels = config["image_size"], config["in_channels"]
        facts = {"image_size": size, "image_channels": channels, "num_classes": 0, "size": size, "channels": channels}
        sampler = sampler_of(own, in_time, size, steps, bool(config.get("fir")))
        return {
            "view": view_of(sde, in_time, not config.get("centered", True)),
            "recipe": {"paper": "score-sde", "sampler": sampler},
            "data": {**facts, "sample_shape": [channels, size, size]},
        }

    return header


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    if config["embedding_type"] == "fourier":
        return {}
    more = "score-sde-subvp, score-sde-vp-discrete; scale_by_sigma=true centered=false is the discrete VE"
    return {"scale_by_sigma": f"which SDE the network is of, by the layout ({more})"}


def positional(names: Iterable[str]) -> bool:
    """Networks without Fourier features."""
    names = {k.removeprefix("module.") for k in names}
    return recognise(names) and "all_modules.0.W" not in names


def layout(name: str, summary: str, kind: Kind, continuous: bool, only: Callable[[Iterable[str]], bool]) -> Layout:
    published = Published(header=header_of(kind, continuous), assumes=assumes)
    return converter(name, f"yang-song/score_sde_pytorch: {summary}", config, only, published)


PLAIN = layout("score-sde", "VE, or VP in continuous time", "vp", True, recognise)
SUBVP = layout("score-sde-subvp", "sub-VP", "subvp", True, positional)
DISCRETE = layout("score-sde-vp-discrete", "VP on DDPM's 1000 steps", "vp", False, positional)


# -- the classifier ----------------------------------------------------------------------------------------------------

DENSE = (("embed_0", "Dense_0"), ("embed_1", "Dense_1"), ("head", "Dense_2"))
NORMS = ("init_bn", "bn_2")


def classifier_recognise(names: Iterable[str]) -> bool:
    names = set(names)
    block = "WideResnetGroup_2.WideResnetBlock_0."
    return {"GaussianFourierProjection_0.W", "init_conv.kernel", "pre-pool-bn.scale", block + "Dense_0.kernel"} <= names


def blocks_in(names: Iterable[str]) -> list[tuple[int, int]]:
    """(group, block) of every residual block of flax names."""
    return sorted(
        {
            (int(group.removeprefix("WideResnetGroup_")), int(block.removeprefix("WideResnetBlock_")))
            for group, block, *_ in (n.split(".") for n in names if n.startswith("WideResnetGroup_"))
        }
    )


def pairs(blocks: Iterable[tuple[int, int]]) -> list[tuple[str, str]]:
    """(our layer, flax's) of all layers with weights."""
    found = [*DENSE, ("init_conv", "init_conv"), ("norm", "pre-pool-bn")]
    for i, k in blocks:
        for layer in ("conv1", "conv2", "Dense_0", *NORMS):
            found.append((f"groups.{i}.{k}.{layer}", f"WideResnetGroup_{i}.WideResnetBlock_{k}.{layer}"))
    return found


def classifier_to_ours(state: State) -> dict[str, Tensor]:
    """Flax names and axes -> ours. KeyError: a tensor is missing."""
    found = {"fourier.W": state["GaussianFourierProjection_0.W"]}
    for ours, theirs in pairs(blocks_in(state)):
        if f"{theirs}.kernel" in state:
            kernel = state[f"{theirs}.kernel"]
            order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
            found[f"{ours}.weight"] = kernel.permute(*order).contiguous()
        else:
            found[f"{ours}.weight"] = state[f"{theirs}.scale"]
        if f"{theirs}.bias" in state:
            found[f"{ours}.bias"] = state[f"{theirs}.bias"]
    return found


def classifier_from_ours(state: State) -> dict[str, Tensor]:
    blocks = sorted({(int(n.split(".")[1]), int(n.split(".")[2])) for n in state if n.startswith("groups.")})
    found = {"GaussianFourierProjection_0.W": state["fourier.W"]}
    for ours, theirs in pairs(blocks):
        weight = state[f"{ours}.weight"]
        if weight.ndim == 1:
            found[f"{theirs}.scale"] = weight
        else:
            found[f"{theirs}.kernel"] = weight.permute(*((2, 3, 1, 0) if weight.ndim == 4 else (1, 0))).contiguous()
        if f"{ours}.bias" in state:
            found[f"{theirs}.bias"] = state[f"{ours}.bias"]
    return found


def classifier_config(state: State) -> dict[str, Any]:
    """Constructor keywords; no tensor tells the side of images, which does not matter."""
    wide = state["WideResnetGroup_0.WideResnetBlock_0.conv2.kernel"].shape[-1]
    return {
        "in_channels": state["init_conv.kernel"].shape[2],
        "num_classes": state["Dense_2.kernel"].shape[1],
        "blocks_per_group": 1 + max(k for _, k in blocks_in(state)),
        "channel_multiplier": wide // 16,
    }


CLASSIFIER = Layout(
    name="score-sde-classifier",
    component="score-sde-classifier",
    summary="yang-song/score_sde (flax): the wide residual network of class-conditional sampling",
    recognise=classifier_recognise,
    to_ours=classifier_to_ours,
    from_ours=classifier_from_ours,
    config=classifier_config,
)
