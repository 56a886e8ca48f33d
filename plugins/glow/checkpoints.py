"""Glow weights: the official TensorFlow variables and the layout of rosinality/glow-pytorch.

Official (openai/glow@91b2c57): the variables of a tf.train.Saver checkpoint by name, as arrays, e.g. exported to
.safetensors or .npz from tf.train.load_checkpoint; optimizer slots and Polyak averages beside them are left out
(`openai_average` takes the averages). Shapes are channels-last with row vectors, ours channels-first with columns; the
determinant's parametrisation (free or P L U) is kept. Port (@97081ff): masks are constants, every actnorm has its own
`initialized` flag; ours is one for the network.
Neither layout tells n_bits nor the size: config_from takes 8 bits and the published size for that many levels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Files, Layout, Published
from vgm_cli.errors import USAGE, VgmError

State = Mapping[str, Tensor]
Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # theirs -> ours, ours -> theirs


def same(x: Tensor) -> Tensor:
    return x


FLAT4: Pair = (torch.flatten, lambda x: x.reshape(1, 1, 1, -1))  # NHWC channel vector
FLAT2: Pair = (torch.flatten, lambda x: x.reshape(1, -1))
FLATC: Pair = (torch.flatten, lambda x: x.reshape(1, -1, 1, 1))  # NCHW channel vector
CONV: Pair = (lambda x: x.permute(3, 2, 0, 1).contiguous(), lambda x: x.permute(2, 3, 1, 0).contiguous())
MATRIX: Pair = (lambda x: x.T.contiguous(), lambda x: x.T.contiguous())
SAME: Pair = (same, same)


def blocks_of(keys: Iterable[str], pattern: str) -> int:
    """1 + the largest number that `pattern` captures in any of the keys."""
    return 1 + max(int(m[1]) for k in keys if (m := re.match(pattern, k)))


# -- official --------------------------------------------------------------------------------------------------------


def zero_conv(theirs: str, ours: str) -> dict[str, tuple[str, Pair]]:
    """Without W, which is ours.weight and ours.edge."""
    return {f"{theirs}/b": (f"{ours}.bias", FLAT4), f"{theirs}/logs": (f"{ours}.logs", FLAT2)}


def actnorm(theirs: str, ours: str) -> dict[str, tuple[str, Pair]]:
    return {f"{theirs}_center/b": (f"{ours}.b", FLAT4), f"{theirs}_scale/logs": (f"{ours}.logs", FLAT4)}


def official_names(keys: Iterable[str]) -> dict[str, tuple[str, Pair]]:
    """{official variable: (our tensor, how to reshape)} for a network with these variables."""
    keys = set(keys)
    levels, depth = blocks_of(keys, r"model/(\d+)/"), blocks_of(keys, r"model/0/(\d+)/")
    names: dict[str, tuple[str, Pair]] = {}
    for level in range(levels):
        for step in range(depth):
            theirs, ours = f"model/{level}/{step}", f"blocks.{level}.flows.{step}"
            names |= actnorm(f"{theirs}/actnorm", f"{ours}.actnorm")
            own = f"{ours}.permutation"
            if f"{theirs}/invconv/W" in keys:
                names[f"{theirs}/invconv/W"] = (f"{own}.weight", MATRIX)
            elif f"{theirs}/invconv/L" in keys:
                for a, b in (("P", "w_p"), ("L", "w_l"), ("U", "w_u"), ("sign_S", "s_sign"), ("log_S", "w_s")):
                    names[f"{theirs}/invconv/{a}"] = (f"{own}.{b}", SAME)
            elif f"{theirs}/shuffle/indices" in keys:
                names[f"{theirs}/shuffle/indices"] = (f"{own}.indices", (Tensor.long, Tensor.int))
            for a, b in (("l_1", "conv1"), ("l_2", "conv2")):
                names[f"{theirs}/f1/{a}/W"] = (f"{ours}.coupling.net.{b}.weight", CONV)
                names |= actnorm(f"{theirs}/f1/{a}/actnorm", f"{ours}.coupling.net.{b}.norm")
            names |= zero_conv(f"{theirs}/f1/l_last", f"{ours}.coupling.net.last")
        if level < levels - 1:
            names |= zero_conv(f"model/pool{level}/conv", f"blocks.{level}.prior")
    if "model/prior/p/W" in keys:
        names |= zero_conv("model/prior/p", "prior.zeros")
    if "model/prior/y_emb/W" in keys:
        names |= {"model/prior/y_emb/W": ("prior.y_weight", SAME), "model/prior/y_emb/b": ("prior.y_bias", FLAT2),
                  "model/prior/y_emb/logs": ("prior.y_logs", FLAT2)}  # fmt: skip
    if "model/classifier/W" in keys:
        names |= {"model/classifier/W": ("classifier.weight", MATRIX), "model/classifier/b": ("classifier.bias", FLAT2),
                  "model/classifier/logs": ("classifier.logs", FLAT2)}  # fmt: skip
    return names


def official_keys(ours: Iterable[str]) -> list[str]:
    """Variables that a network with our tensors has officially, enough for official_names."""
    ours = set(ours)
    steps = [re.match(r"blocks\.(\d+)\.flows\.(\d+)\.actnorm\.b", k) for k in ours]
    marks = {"weight": "invconv/W", "w_l": "invconv/L", "indices": "shuffle/indices"}
    keys = []
    for m in steps:
        if m:
            keys.append(f"model/{m[1]}/{m[2]}/actnorm_center/b")
            own = f"blocks.{m[1]}.flows.{m[2]}.permutation."
            keys += [f"model/{m[1]}/{m[2]}/{theirs}" for name, theirs in marks.items() if own + name in ours]
    tops = {"prior.zeros.weight": "prior/p", "prior.y_weight": "prior/y_emb", "classifier.weight": "classifier"}
    return keys + [f"model/{theirs}/W" for name, theirs in tops.items() if name in ours]


def zero_conv_names(names: Mapping[str, tuple[str, Pair]]) -> dict[str, str]:
    """{official W: ours without the last part} of the zero-initialised convolutions: those whose bias is 4-D."""
    found = {k.removesuffix("/b"): v[0].removesuffix(".bias") for k, v in names.items() if v[0].endswith(".bias")}
    return {f"{k}/W": v for k, v in found.items() if not v.startswith("classifier")}


def official_to_ours(state: State) -> dict[str, Tensor]:
    """KeyError when a variable of the layout is missing."""
    state = {k: torch.as_tensor(v) for k, v in state.items()}
    names = official_names(state)
    ours = {name: shape[0](state[key]) for key, (name, shape) in names.items()}
    for theirs, name in zero_conv_names(names).items():
        weight = CONV[0](state[theirs])  # the ring is the last input channel
        ours |= {f"{name}.weight": weight[:, :-1].contiguous(), f"{name}.edge": weight[:, -1:].contiguous()}
    return {**ours, "initialised": torch.ones((), dtype=torch.uint8)}


def official_from_ours(state: State) -> dict[str, Tensor]:
    names = official_names(official_keys(state))
    theirs = {k: shape[1](state[name]) for k, (name, shape) in names.items()}
    for key, name in zero_conv_names(names).items():
        theirs[key] = CONV[1](torch.cat([state[f"{name}.weight"], state[f"{name}.edge"]], dim=1))
    for key, value in list(theirs.items()):
        if key.endswith("shuffle/indices"):
            theirs[key + "_inverse"] = value.argsort().int()
    return theirs


def averages(state: State) -> dict[str, Tensor]:
    """The Polyak averages of a checkpoint under the variables' own names; what has none (indices, P) as it is."""
    return {ours: state[theirs] for ours, theirs in average_pairs(state).items()}


def average_pairs(names: Iterable[str]) -> dict[str, str]:
    """{variable: its average's name, or its own where there is no average}."""
    names = list(names)
    suffix = "/ExponentialMovingAverage"
    own = {k: k for k in names if not k.endswith(suffix) and "_adam_" not in k}
    return own | {"model/" + k.removesuffix(suffix).split("model/")[-1]: k for k in names if k.endswith(suffix)}


def assumes(state: State, config: Mapping[str, Any]) -> dict[str, str]:
    """Neither the size nor the depth of colours is in a tensor; averages in the file are another layout's."""
    size, levels = config["size"], config["levels"]
    found = {} if levels in (3, 6) else {"size": f"size={size}, as published networks of {levels} levels have it"}
    found |= {"n_bits": f"n_bits={config['n_bits']} (n_bits=5 for the published faces)"}
    if any(k.endswith("/ExponentialMovingAverage") for k in state):
        found["weights"] = "raw weights are wanted; the file also holds averages (--from glow-average takes them)"
    return found


def ours_config(state: State, style: str) -> dict[str, Any]:
    """Constructor keywords from tensors under our names."""
    levels, depth = blocks_of(state, r"blocks\.(\d+)\."), blocks_of(state, r"blocks\.0\.flows\.(\d+)\.")
    net = "blocks.0.flows.0.coupling.net"
    channels = len(state["blocks.0.flows.0.actnorm.b" if style == "openai" else "blocks.0.flows.0.actnorm.loc"])

    def kind(level: int) -> str:
        own = f"blocks.{level}.flows.0.permutation."
        marks = {"weight": "invconv", "w_l": "lu", "indices": "shuffle"}
        return next((k for mark, k in marks.items() if own + mark in state), "reverse")

    classes = state["prior.y_weight"].shape[0] if "prior.y_weight" in state else 0
    return {
        "size": 2 ** (levels + 2),
        "in_channels": channels // 4,
        "levels": levels,
        "depth": depth,
        "width": state[f"{net}.conv1.weight"].shape[0],
        "coupling": "affine" if state[f"{net}.last.weight"].shape[0] == channels else "additive",
        "permutation": kind(0),
        "top_permutation": None if kind(levels - 1) == kind(0) else kind(levels - 1),
        "n_bits": 8,
        "learn_top": "prior.zeros.weight" in state,
        "num_classes": classes,
        "classifier": "classifier.weight" in state,
        "style": style,
    }


def header(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a converted network is sampled: at temperature 0.7, as the paper's pictures are."""
    size, channels, classes = config["size"], config["in_channels"], config["num_classes"]
    facts = {"image_size": size, "image_channels": channels, "num_classes": classes, "size": size, "channels": channels}
    return {
        "recipe": {"paper": "glow", "sampler": {"name": "glow", "temperature": 0.7}},
        "data": {**facts, "sample_shape": [channels, size, size]},
    }


def only(style: str) -> Callable[[Mapping[str, Any]], None]:
    """Refuses networks of the other parametrisation."""

    def allows(config: Mapping[str, Any]) -> None:
        if config.get("style", "openai") != style:
            raise VgmError(f"a network of style {config['style']} has no such layout", f"it takes style={style}", USAGE)
        if style == "rosinality" and (config.get("num_classes") or config.get("learn_top") is False):
            raise VgmError("the port has neither classes nor a fixed top prior", code=USAGE)

    return allows


def official_recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return {"model/0/0/actnorm_center/b", "model/0/0/f1/l_1/W", "model/0/0/f1/l_last/logs"} <= keys


UNUSED = (r"_adam_", r"(^|/)adam_t$", r"ExponentialMovingAverage$", r"indices_inverse$")

CONVERTER = Layout(
    name="glow",
    component="glow",
    recognise=official_recognise,
    to_ours=official_to_ours,
    from_ours=official_from_ours,
    config=lambda state: ours_config(official_to_ours(state), "openai"),
    allows=only("openai"),
    files=Files(unused=UNUSED),
    published=Published(header=header, assumes=assumes),
    summary="openai/glow: TensorFlow variables by name",
)
CONVERTER_AVERAGE = Layout(
    name="glow-average",
    component="glow",
    recognise=lambda keys: False,  # chosen by name only
    to_ours=lambda state: official_to_ours(averages(state)),
    from_ours=official_from_ours,
    config=lambda state: ours_config(official_to_ours(state), "openai"),
    allows=only("openai"),
    files=Files(names=average_pairs, unused=UNUSED),
    published=Published(header=header),
    summary="openai/glow: the Polyak averages of a training checkpoint",
)


# -- rosinality ------------------------------------------------------------------------------------------------------

PORT_STEP: dict[str, tuple[str, Pair]] = {
    "actnorm.loc": ("actnorm.loc", FLATC),
    "actnorm.scale": ("actnorm.scale", FLATC),
    "coupling.net.0.weight": ("coupling.net.conv1.weight", SAME),
    "coupling.net.0.bias": ("coupling.net.conv1.bias", SAME),
    "coupling.net.2.weight": ("coupling.net.conv2.weight", SAME),
    "coupling.net.2.bias": ("coupling.net.conv2.bias", SAME),
}
PORT_PLAIN: Pair = (lambda x: x[:, :, 0, 0], lambda x: x[:, :, None, None])


def port_zero_conv(theirs: str, ours: str) -> dict[str, tuple[str, Pair]]:
    return {f"{theirs}.conv.weight": (f"{ours}.weight", SAME), f"{theirs}.conv.bias": (f"{ours}.bias", SAME),
            f"{theirs}.scale": (f"{ours}.logs", FLATC)}  # fmt: skip


def port_step(theirs: str, ours: str, lu: bool) -> dict[str, tuple[str, Pair]]:
    names = {theirs + a: (ours + b, shape) for a, (b, shape) in PORT_STEP.items()}
    names |= port_zero_conv(f"{theirs}coupling.net.4", f"{ours}coupling.net.last")
    if not lu:
        return {**names, f"{theirs}invconv.weight": (f"{ours}permutation.weight", PORT_PLAIN)}
    own = {f"{theirs}invconv.{k}": (f"{ours}permutation.{k}", SAME) for k in ("w_p", "w_l", "w_u", "w_s", "s_sign")}
    return {**names, **own}


def port_names(levels: int, depth: int, lu: list[bool]) -> dict[str, tuple[str, Pair]]:
    """{the port's tensor: (ours, how to reshape)}. lu: of every level."""
    names: dict[str, tuple[str, Pair]] = {}
    for level in range(levels):
        for step in range(depth):
            own = f"blocks.{level}.flows.{step}."
            names |= port_step(own, own, lu[level])
        top = level == levels - 1
        names |= port_zero_conv(f"blocks.{level}.prior", "prior.zeros" if top else f"blocks.{level}.prior")
    return names


def port_names_of(state: State, mark: str) -> dict[str, tuple[str, Pair]]:
    levels, depth = blocks_of(state, r"blocks\.(\d+)\."), blocks_of(state, r"blocks\.0\.flows\.(\d+)\.")
    return port_names(levels, depth, [f"blocks.{i}.flows.0.{mark}.w_l" in state for i in range(levels)])


def port_to_ours(state: State) -> dict[str, Tensor]:
    ours = {name: shape[0](state[key]) for key, (name, shape) in port_names_of(state, "invconv").items()}
    return {**ours, "initialised": state["blocks.0.flows.0.actnorm.initialized"]}


def port_from_ours(state: State) -> dict[str, Tensor]:
    names = port_names_of(state, "permutation")
    theirs = {key: shape[1](state[name]) for key, (name, shape) in names.items()}
    for key in list(theirs):
        prefix, _, last = key.rpartition(".")
        if last == "loc":
            theirs[f"{prefix}.initialized"] = state["initialised"].clone()
        elif last == "w_l":
            lower = torch.ones_like(theirs[key]).tril(-1)
            theirs |= {f"{prefix}.l_mask": lower, f"{prefix}.u_mask": lower.T.contiguous(),
                       f"{prefix}.l_eye": torch.eye(len(lower))}  # fmt: skip
    return theirs


def port_recognise(keys: Iterable[str]) -> bool:
    keys = set(keys)
    return {"blocks.0.flows.0.actnorm.loc", "blocks.0.flows.0.coupling.net.4.conv.weight"} <= keys


PORT = Layout(
    name="glow-rosinality",
    component="glow",
    recognise=port_recognise,
    to_ours=port_to_ours,
    from_ours=port_from_ours,
    config=lambda state: ours_config(port_to_ours(state), "rosinality"),
    allows=only("rosinality"),
    published=Published(header=header),
    summary="rosinality/glow-pytorch",
)
