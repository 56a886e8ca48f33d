"""Which published layout a state has, how well it fits, and which published network it is. Shared by `vgm inspect`
and `vgm convert`. Networks are built on the meta device, so nothing is allocated."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vgm_cli.convert_api import Layout
from vgm_cli.errors import FAILED, USAGE, VgmError, unknown
from vgm_cli.hookspecs import Component
from vgm_cli.nn.meta import on_meta as without_memory
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.ui import ui

State = Mapping[str, Tensor]
UNFIT: tuple[type[Exception], ...] = (  # what reading a state as something that it is not may raise
    *(KeyError, ValueError, IndexError, RuntimeError, StopIteration, ZeroDivisionError, AssertionError, TypeError),
    *(AttributeError, VgmError),
)


def known() -> dict[str, Layout]:
    """{name: layout} of everything registered; one that cannot be imported is left out."""
    global _known
    registered = tuple(c for (kind, _), c in registry().components.items() if kind == "converter")
    if len(registered) != len(_known[0]) or any(a is not b for a, b in zip(registered, _known[0])):
        found = {}
        for name in registry().names("converter"):
            try:
                found[name] = find(name)
            except Exception as e:  # a plugin's own mistake must not keep others' files from being read
                ui.warn(f"the layout '{name}' cannot be imported: {e}")
        _known = registered, found
    return dict(_known[1])


_known: tuple[tuple[Component, ...], dict[str, Layout]] = (), {}  # what is registered, and its layouts


def find(name: str) -> Layout:
    """The layout of this name. VgmError: there is none."""
    if name not in registry().names("converter"):
        raise unknown("layout", name, registry().names("converter"))
    found = load_target(registry().find("converter", name).target, name)
    if not isinstance(found, Layout):
        raise VgmError(
            f"the target of converter '{name}' is a {type(found).__name__}, not a convert_api.Layout", code=USAGE
        )
    return found


def official(component: str, *likely: str) -> Layout:
    """The layout of a component's own official code: the one with the component's name, or a `likely` one (its paper's,
    the one it came in), or its only one. VgmError: there is none, or several."""
    own = {name: c for name, c in known().items() if c.component == component}
    for name in (component, *likely):
        if name in own:
            return own[name]
    if len(own) == 1:
        return next(iter(own.values()))
    names = ", ".join(sorted(own))
    raise VgmError(
        f"'{component}' has {'several published layouts' if own else 'no published layout that is known here'}",
        f"--to {names}" if own else "a .safetensors file keeps it as it is",
        USAGE,
    )


def recognising(keys: Iterable[str]) -> list[Layout]:
    """The layouts that recognise a state with these names."""
    keys = list(keys)
    return [c for c in known().values() if keys and c.recognise(keys)]


# -- how well a state fits ---------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """The result of comparing a state with a layout.

    config: constructor keywords read off the state, {} if that fails; reason says why. missing, unexpected: names in
    the layout. shapes: {name: (shape in the file, shape wanted)}.
    """

    converter: Layout
    config: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    reason: str = ""
    wanted: int = 0

    @property
    def exact(self) -> bool:
        """Whether the state has every tensor of the layout in the right shape. It may hold others as well: losses,
        optimizer slots, caches."""
        return not (self.missing or self.shapes or self.reason)

    def nearest(self, name: str) -> str:
        """The unexpected name that is closest to a missing one; "" if none is close."""
        return next(iter(difflib.get_close_matches(name, self.unexpected, n=1, cutoff=0.6)), "")


def on_meta(kind: str, name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a component built on the meta device: names and shapes without memory."""
    with without_memory():
        state: dict[str, Tensor] = registry().build(kind, {"name": name, **config}).state_dict()
    return state


def layout_of(c: Layout, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that the layout has for a network with these keywords, on the meta device."""
    return c.from_ours({k: v.to("meta") for k, v in on_meta(c.kind, c.component, config).items()})


def fit(c: Layout, state: State, config: Mapping[str, Any] | None = None) -> Fit:
    """Compare a state with the tensors of the layout for these keywords, by default those read off the state."""
    try:
        own = dict(c.config(state)) if config is None else dict(config)
        wanted = layout_of(c, own)
    except UNFIT as e:
        return Fit(c, reason=reason_of(e))
    unused = [re.compile(p) for p in c.files.unused]
    pairs = dict(c.files.names(state))
    used = {theirs for ours, theirs in pairs.items() if ours in wanted}
    missing = [k for k in wanted if k not in pairs and not any(p.search(k) for p in unused)]
    unexpected = [k for k in state if k not in used]
    both = {k: (tuple(state[pairs[k]].shape), tuple(v.shape)) for k, v in wanted.items() if k in pairs}
    shapes = {k: v for k, v in both.items() if v[0] != v[1] and not any(p.search(k) for p in unused)}
    found = Fit(c, own, missing, unexpected, shapes, wanted=len(wanted))
    if found.missing:  # a layout may know other names for the same tensors (of older versions): then all is there
        try:
            ours = c.to_ours(state)
            network = on_meta(c.kind, c.component, own)
            if all(k in ours and ours[k].shape == v.shape for k, v in network.items()):
                found.missing = []
        except UNFIT:
            pass
    return found


def reason_of(e: Exception) -> str:
    if isinstance(e, KeyError):
        return f"{e.args[0] if e.args else 'a tensor'} is missing"
    lines = (str(e).strip() or type(e).__name__).splitlines()
    return " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))


def nearest(state: State) -> Fit | None:
    """The layout whose names agree most with a state's, numbers in them ignored; None if fewer than half agree."""
    own = patterns(state)
    scores = {}
    for c in known().values():
        names = patterns_of(c.name)
        scores[c.name] = len(names & own) / max(1, len(names | own))
    name = max(scores, key=lambda n: scores[n])
    if scores[name] < 0.5:
        return None
    c = find(name)
    presets = registry().presets(registry().find(c.kind, c.component)).values()
    fits = [f for f in (fit(c, state), *(fit(c, state, p) for p in presets)) if not f.reason]
    return min(fits, key=lambda f: len(f.missing) + len(f.unexpected) + len(f.shapes), default=None)


def patterns(names: Iterable[str]) -> frozenset[str]:
    return frozenset(re.sub(r"\d+", "#", k) for k in names)


@functools.cache
def patterns_of(name: str) -> frozenset[str]:
    """Names of a typical network in a layout, with numbers replaced by a sign, for `nearest`."""
    c = find(name)
    component = registry().components.get((c.kind, c.component))
    presets = [] if component is None else list(registry().presets(component).values())
    for config in ({}, *presets[:2], *presets[2:][-2:]):  # a layout may hold some of its component's networks only
        try:
            return patterns(layout_of(c, config))
        except UNFIT:
            continue
    return frozenset()


# -- choosing ----------------------------------------------------------------------------------------------------------


def choose(
    state: State, path: Path, json: Mapping[str, Any] | None = None, name: str | None = None
) -> tuple[Layout, str]:
    """The layout of a state, and a remark when something besides its tensors decided. name: what the user said.

    Names first, then shapes, then the config.json beside the file, then the file's own name; of layouts whose names
    begin alike (dit-diffusers, dit-diffusers-512) the shortest is taken. VgmError: unknown or ambiguous.
    """
    if name is not None:
        return find(name), ""
    found = recognising(state)
    if not found:
        raise unfamiliar(state, path)
    if len(found) > 1:
        found = [c for c in found if fit(c, state).exact] or found
    if len(found) > 1:
        found = [c for c in found if all(o is c or any(o.name in n for n in c.beside.values()) for o in found)] or found
    if len(found) > 1 and json:
        found = [c for c in found if c.diffusers is not None and c.diffusers.matches(json)] or found
    if len(found) == 1:
        return found[0], ""
    names = [c.name for c in found]
    chosen = by_file_name(names, path)
    if chosen is not None:
        rest = ", ".join(n for n in names if n != chosen)
        why = "by the name of the file"
    else:
        chosen = next((n for n in names if all(m == n or m.startswith(n + "-") for m in names)), None)
        rest, why = ", ".join(n for n in names if n != chosen), "the plainest of its kind"
    if chosen is None:
        raise VgmError(f"{path} may be {' or '.join(names)}: its tensors do not say", f"--from {names[0]}", USAGE)
    return find(chosen), f"taken for {chosen}, {why}; --from tells otherwise ({rest})"


def by_file_name(names: list[str], path: Path) -> str | None:
    """The one layout among `names` that shares a word with the file's or folder's name which no other of them has;
    None if there is none."""
    words = set(re.findall(r"[a-z]+|\d+", f"{path.parent.name} {path.name}".lower()))
    tokens = {n: set(re.findall(r"[a-z]+|\d+", n)) for n in names}
    shared = set.intersection(*tokens.values())
    summary = [n for n in names if (tokens[n] - shared) & words]
    return summary[0] if len(summary) == 1 else None


def unfamiliar(state: State, path: Path) -> VgmError:
    """The error for a state whose names no layout has: it names the nearest layout and what differs."""
    close = nearest(state)
    if close is None:
        example = next(iter(state), "")
        return VgmError(
            f"{path} has no published layout that is known here: {len(state)} tensors like '{example}'",
            "`vgm ls converters` names the layouts",
            USAGE,
        )
    return VgmError(
        f"{path} is almost '{close.converter.name}': {summary(close)}",
        f"`vgm inspect {path}` lists the differences",
        USAGE,
    )


def summary(found: Fit) -> str:
    """A Fit in words: '3 of 40 tensors missing (first: x), 2 unexpected'."""
    if found.reason:
        return found.reason
    parts = []
    if found.missing:
        parts.append(f"{len(found.missing)} of {found.wanted} tensors missing (first: {found.missing[0]})")
    if found.shapes:
        name, (have, want) = next(iter(found.shapes.items()))
        parts.append(f"{len(found.shapes)} of another shape ({name}: {have}, not {want})")
    if found.unexpected:
        parts.append(f"{len(found.unexpected)} unexpected (first: {found.unexpected[0]})")
    return ", ".join(parts) or "all tensors fit"


def misfit(c: Layout, state: State, path: Path, said: str) -> VgmError:
    """The error for a state that cannot be read as the layout `c`. said: why."""
    others = [x.name for x in recognising(state) if x.name != c.name and fit(x, state).exact]
    hint = f"it looks like {', '.join(others)}" if others else f"`vgm inspect {path}` says what it looks like"
    return VgmError(f"{path} does not have the layout '{c.name}': {said}", hint, USAGE if others else FAILED)


# -- published networks ------------------------------------------------------------------------------------------------


def full_config(component: Mapping[str, Any]) -> dict[str, Any]:
    """A component's keywords, completed by the defaults of its constructor."""
    found = registry().find(component.get("kind", "model"), component["name"])
    parameters = signature(load_target(found.target, found.name)).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    return defaults | dict(component.get("kwargs", {}))


def presets_of(kind: str, name: str, config: Mapping[str, Any]) -> list[str]:
    """Names of the presets that a configuration matches in every keyword but dropout, which no file tells. Of two
    where one fixes more keywords than the other, that one."""
    component = registry().components.get((kind, name))
    if component is None:
        return []
    full = full_config({"kind": kind, "name": name, "kwargs": config})
    summary = {k: {n: w for n, w in v.items() if "drop" not in n} for k, v in registry().presets(component).items()}
    hits = [k for k, v in summary.items() if v and all(plain(full.get(n)) == plain(w) for n, w in v.items())]
    return [k for k in hits if not any(summary[k].keys() < summary[other].keys() for other in hits)]


def plain(value: Any) -> Any:
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
