"""The networks inside a checkpoint, whatever wraps them. This is the one place that knows how trainers save.

Dictionaries in dictionaries and lists of one are opened. Names lose the words of modules that only wrap another (DDP,
torch.compile, FSDP, activation checkpointing). Averages kept as lists or under names without dots get their names from
the network that they average. Networks inside another module (Lightning) are found below its names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import named_shadow
from vgm_cli.errors import FAILED, VgmError

State = dict[str, Tensor]
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")
AVERAGE = r"(^|[_.\-])(ema\d*|averages?|averaged|avg|shadow|polyak|swa|gs|running)($|[_.\-])"
RAW = ("online_model", "online", "raw")  # inside an average's own module
COUNTERS = ("decay", "num_updates", "n_averaged", "initted", "step")  # tensors of averaging modules
SHADOW = "shadow_params"
DEEPEST = 6


@dataclass(frozen=True)
class Network:
    """One network of a file. name: its path of keys and modules. layouts: names of the layouts that recognise it."""

    name: str
    state: State
    layouts: list[Any]


def is_average(name: str) -> bool:
    """Whether a path of keys and modules means averaged weights; of several telling words in it, the last decides."""
    for word in reversed(name.split(".")):
        if word in RAW:
            return False
        if re.search(AVERAGE, word.lower()):
            return True
    return False


def join(*words: str) -> str:
    return ".".join(w for w in words if w)


# -- names of wrapping modules -----------------------------------------------------------------------------------------


def unwrapped(state: Mapping[str, Any], path: Path) -> State:
    """The tensors of a dictionary, without the words of wrapping modules in their names. VgmError: parameters that FSDP
    has run together."""
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    flat = next((k for k in tensors if FLAT.search(k)), None)
    if flat is not None:
        raise VgmError(
            f"{path} holds parameters that FSDP has flattened ({flat}): it does not say which tensor is where in them",
            "save it again with FSDP's full state dict",
            FAILED,
        )
    words = {k: [w for w in k.split(".") if w not in WRAPPERS] for k in tensors}
    below: dict[tuple[str, ...], set[str]] = {}
    for parts in words.values():
        for i, word in enumerate(parts):
            below.setdefault(tuple(parts[:i]), set()).add(word)
    names = {k: ".".join(without_module(parts, below)) for k, parts in words.items()}
    names = {k: n for k, n in names.items() if n}
    if len(set(names.values())) < len(names):  # both with and without: they are not one network's
        return tensors
    return {n: tensors[k] for k, n in names.items()}


def without_module(parts: Sequence[str], below: Mapping[tuple[str, ...], set[str]]) -> list[str]:
    """DDP's, DataParallel's and AveragedModel's "module" is the only module of its parent."""
    out = []
    for i, word in enumerate(parts):
        siblings = below[tuple(parts[:i])]
        wraps = "module" in siblings and siblings <= {"module", "n_averaged"}
        if wraps and (word == "n_averaged" or i + 1 < len(parts)):
            if word == "n_averaged":
                return []
            continue
        out.append(word)
    return out


# -- dictionaries ------------------------------------------------------------------------------------------------------


def entries(found: Mapping[str, Any], path: Path) -> tuple[dict[str, State], list[str]]:
    """The dictionaries of tensors in a checkpoint, by the path of their keys; tensors at the top as "". Optimizers are
    left out; averages get names. And remarks on what was left out. VgmError: there are no tensors."""
    remarks = []
    states: dict[str, State] = {}
    lists: dict[str, list[Tensor]] = {}
    collect("", found, path, states, lists)
    for name, shadow in lists.items():
        named = next((s for k, v in states.items() if not is_average(k) and (s := shadow_of(v, shadow))), None)
        if named is not None:
            states[name] = named
        elif not states:
            raise VgmError(f"{path} holds an average without names ({name})", "the network's own file has them", FAILED)
        else:
            remarks.append(f"the average '{name}' is left out: its tensors have no names and fit no network here")
    for name in [k for k in states if is_average(k)]:
        others = {k: v for k, v in states.items() if not is_average(k)}
        states[name] = with_dots(states[name], others) or states[name]
    if not states:
        raise VgmError(f"{path} holds no tensors", code=FAILED)
    return states, remarks


def collect(
    name: str, value: Any, path: Path, states: dict[str, State], lists: dict[str, list[Tensor]], depth: int = 0
) -> None:
    """Sort what a checkpoint holds below `name` into `states` (dictionaries of tensors) and `lists` (averages
    without names)."""
    if isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value):
        for i, v in enumerate(value):
            collect(name if len(value) == 1 else join(name, str(i)), v, path, states, lists, depth + 1)
    elif isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(v, Tensor) for v in value):
        parent, _, key = name.rpartition(".")
        if key == SHADOW or is_average(key):
            lists[(parent or "ema") if key == SHADOW else name] = list(value)
    elif isinstance(value, Mapping) and depth < DEEPEST and not is_optimizer(value):
        own = unwrapped(value, path)
        inside: dict[str, State] = {}
        for k, v in value.items():
            if isinstance(v, Mapping | list | tuple):
                collect(join(name, str(k)), v, path, inside, lists, depth + 1)
        if own and (not inside or len(own) > max(map(len, inside.values()))):
            states[name] = own
        states.update(inside)


def is_optimizer(value: Mapping[str, Any]) -> bool:
    return "param_groups" in value


def shadow_of(model: State, shadow: list[Tensor]) -> State | None:
    try:
        return named_shadow(model, shadow)
    except VgmError:
        return None


def with_dots(average: Mapping[str, Tensor], others: Mapping[str, State]) -> State | None:
    """LitEma's average, whose names lost their dots, under the names of the network it averages.

    That is the smallest of `others` that has all of the names; tensors that LitEma does not average are taken from that
    network. None: it is no such average, or its network is not in the file.
    """
    own = {k: v for k, v in average.items() if k not in COUNTERS}
    if len(own) < 2 or any("." in k for k in own):
        return None
    networks = [s for v in others.values() for s in (v, *below_names(v))]
    for network in sorted(networks, key=len):
        dotted = {k.replace(".", ""): k for k in network}
        names = {k: dotted.get(k) or dotted.get(plain(k)) for k in own}
        if all(n is not None and network[n].shape == own[k].shape for k, n in names.items()):
            return {**network, **{n: own[k] for k, n in names.items() if n is not None}}
    return None


def plain(name: str) -> str:
    """A name without dots, without the words of wrapping modules."""
    for word in WRAPPERS:
        name = name.replace(word, "")
    return name.removeprefix("module")


def below_names(state: Mapping[str, Tensor], depth: int = 0) -> Iterator[State]:
    """Every network inside a state, by the first words of its names."""
    for part in parts_of(state).values():
        if len(part) > 1:
            yield part
            if depth < DEEPEST:
                yield from below_names(part, depth + 1)


def parts_of(state: Mapping[str, Tensor]) -> dict[str, State]:
    """A state split by the first word of its names: networks wrapped in another module; averages named, and first."""
    parts: dict[str, State] = {}
    for k, v in state.items():
        head, dot, rest = k.partition(".")
        if dot:
            parts.setdefault(head, {})[rest] = v
    return parts


# -- searching ---------------------------------------------------------------------------------------------------------


def search(
    name: str, state: State, known: Callable[[Mapping[str, Tensor]], list[Any]], depth: int = 0
) -> Iterator[Network]:
    """Networks that `known` gives layouts for, best first: a state whose names are known after the averages of the same
    network inside it; else what lies below its first words, averages first."""
    parts = {k: v for k, v in parts_of(state).items() if len(v) > 1}
    averages = [k for k in parts if is_average(k)]
    rest = [k for k in parts if k not in averages]
    outside = {"": {k: v for k, v in state.items() if k.partition(".")[0] not in averages}}
    hits = known(state)
    inside: list[Network] = []
    if depth < DEEPEST:
        for k in averages:
            inside += search(join(name, k), with_dots(parts[k], outside) or parts[k], known, depth + 1)
    if hits:
        same = [n for n in inside if is_average(n.name) and any(c in hits for c in n.layouts)]
        yield from same
        yield Network(name, state, hits)
        inside = [n for n in inside if n not in same]
    yield from inside
    if depth < DEEPEST:
        for k in rest:
            yield from (
                n
                for n in search(join(name, k), parts[k], known, depth + 1)
                if not any(c in hits for c in n.layouts)  # it is the known state itself, under its own prefix
            )
