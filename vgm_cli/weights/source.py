"""A network read from a file: ours, or a published checkpoint through its layout into the names that ours has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli.convert_api import Layout
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.checkpoint import Header
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import layout as layouts
from vgm_cli.weights import nested
from vgm_cli.weights.compare import alike
from vgm_cli.weights.files import State, Weights
from vgm_cli.yaml_text import parse_yaml

OURS = "vgm"


@dataclass
class Source:
    """A network that was read from a file, under our names.

    theirs is the state as the file holds it, and layout the converter that it went through; {} and None for a file of
    ours. parts: what else of the layout's `beside` the file holds, by role.
    """

    path: Path
    state: State
    header: Header
    layout: Layout | None = None
    theirs: State = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    parts: dict[str, Source] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.header.component.get("kind", "model"))

    @property
    def name(self) -> str:
        return str(self.header.component["name"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.header.component.get("kwargs", {}))

    def theirs_names(self, found: Weights) -> set[str]:
        """Names in the file of the tensors that were read."""
        assert self.layout is not None
        names = [n for state in found.entries.values() for n in state]
        return set(self.layout.files.names(names).values())


@dataclass
class Conversion:
    """A network on its way into another file.

    layout: the target's layout; None: our own file. ours: the state under our names. state: the same under the target's
    names, as it will be written. cast: the precision that `--dtype` asks for.
    """

    source: Source
    layout: Layout | None
    ours: State
    state: State
    cast: str | None = None
    remarks: list[str] = field(default_factory=list)


def open_source(
    source: str | Path,
    from_: str | None = None,
    weights: str | None = None,
    trust: bool = False,
    overrides: Sequence[str] = (),
    on: str | Path | None = None,
) -> Source:
    """Read a run, a file of ours or a published checkpoint into a Source.

    weights: which of several networks to take, see files.Weights.pick. overrides: KEY=VALUE for the constructor, where
    the file does not say it. on: a published file whose tensors are taken where the first lacks them. VgmError: the
    file is of unknown or ambiguous layout, incomplete or refused.
    """
    found = weight_files.read(weight_files.locate(source, weights), trust)
    if on is not None:
        found = weight_files.upon(found, weight_files.read(weight_files.locate(on), trust))
    if found.ours:
        if from_ not in (None, OURS):
            raise VgmError(f"{found.path} is a file of ours, not '{from_}'", "leave --from away", USAGE)
        if overrides:
            raise VgmError(f"{found.path} says what network it holds", f"leave {overrides[0]} away", USAGE)
        return own_source(found, weights, Path(source).is_dir())
    if from_ == OURS:
        raise VgmError(f"{found.path} does not say what network it holds", "--from names a layout", USAGE)
    entry, state, converter, remarks = recognise(found, from_, weights)
    if found.below:
        remarks = [*remarks, from_below(found, state, converter, str(on))]
    words, of_parts = split_words(overrides, converter) if from_ is None else (overrides, {})
    taken = foreign_source(found, entry, state, converter, [*found.remarks, *remarks], words)
    if from_ is None:
        taken.parts = parts_beside(found, converter, of_parts)
        used = {n for part in taken.parts.values() for n in part.theirs_names(found)}
        taken.left_out = [n for n in taken.left_out if n not in used]
        taken.remarks += [f"{role}: {text}" for role, part in taken.parts.items() for text in part.remarks]
    return taken


def from_below(found: Weights, state: State, layout: Layout, on: str) -> str:
    """How many of a network's tensors another file had to give."""
    own = layout.files.names(state).values()
    lacking = sorted(k for k in own if k in found.below)
    said = f"{len(lacking)} of {len(own)} tensors are {on}'s, which {found.path.name} lacks"
    return said + (f", first {lacking[0]}" if lacking else "")


def split_words(overrides: Sequence[str], layout: Layout) -> tuple[list[str], dict[str, list[str]]]:
    """KEY=VALUE words: the network's own, and {role: words} of what lies beside it: codec.KEY, conditions.NAME.KEY."""
    own: list[str] = []
    of_parts: dict[str, list[str]] = {role: [] for role in layout.beside}
    for text in overrides:
        role, dot, rest = text.removeprefix("conditions.").partition(".")
        if dot and role in of_parts:
            of_parts[role].append(rest)
        else:
            own.append(text)
    return own, of_parts


def parts_beside(found: Weights, layout: Layout, words: Mapping[str, Sequence[str]]) -> dict[str, Source]:
    """{role: what lies beside the network in a file}, each through its own layout. VgmError: words for what is not
    there."""
    parts = {}
    for role, known in layout.beside.items():
        for own in map(layouts.find, known):
            state = next((s for s in found.entries.values() if own.recognise(s)), None)
            if state is not None and fits(own, state, words[role]):
                part = parts[role] = foreign_source(found, "", state, own, [], words[role])
                if problem := disagreement(own, part.theirs, part.state):
                    raise layouts.misfit(own, state, found.path, problem)
                break
    if lost := [role for role, own_words in words.items() if own_words and role not in parts]:
        raise VgmError(f"{found.path} holds no {lost[0]}, of which {words[lost[0]][0]} tells", code=USAGE)
    return parts


def fits(layout: Layout, state: State, words: Sequence[str]) -> bool:
    """Whether all of a layout's network is in a state, some of its keywords being said."""
    try:
        read = dict(layout.config(state))
    except layouts.UNFIT:
        return False
    said = keywords(layout, words, layout.published.header(read))[0] if words else {}
    return layouts.fit(layout, state, {**read, **said}).exact


def own_source(found: Weights, weights: str | None, picked: bool) -> Source:
    header = Header.parse(found.metadata, found.path)
    known = {f"vgm.{k}" for k in (*vars(header), "schema", "version")}
    header.extra = {k[4:]: json.loads(v) for k, v in found.metadata.items() if k.startswith("vgm.") and k not in known}
    if weights is not None and not picked and weights not in kinds_of(header.weights):
        raise VgmError(f"{found.path} holds {header.weights} weights, not '{weights}'", "take the run instead", USAGE)
    return Source(found.path, next(iter(found.entries.values())), header)


def kinds_of(weights: str) -> tuple[str, ...]:
    """The values of `vgm.weights` in a header that an option `--weights` stands for.

    For example "ema" stands for any average ("ema-0.9999"), and "model" for "raw".
    """
    return (weights, "ema") if weights.startswith("ema") else (weights, "model", "raw")


def recognise(found: Weights, from_: str | None, weights: str | None) -> tuple[str, State, Layout, list[str]]:
    """(the network's name in the file, its state, its layout, remarks): the first network of the asked kind that some
    layout knows, averages before raw weights. VgmError: there is none; several layouts know it."""
    wanted = layouts.find(from_) if from_ is not None else None
    if wanted is None:
        networks = found.networks(layouts.recognising)
    else:
        networks = found.networks(lambda state: [wanted] if wanted.recognise(state) else [])
    taken = next((n for n in networks if weight_files.asked(weights, n.name)), None)
    if taken is not None:
        name, state = taken.name, taken.state
    elif networks and wanted is None:
        raise found.lacks(weights, [n.name for n in networks])
    else:
        name = found.pick(weights)[0]
        state = found.entries[name]
        if wanted is None:
            raise layouts.unfamiliar(state, found.path)
    converter, remark = (wanted, "") if wanted is not None else layouts.choose(state, found.path, found.json)
    also = beside(found, name, networks)
    said = f"taken: '{name}'{', an average' if nested.is_average(name) else ''}; also there: {', '.join(also)}"
    return name, state, converter, [r for r in (remark, said if name and also else "") if r]


def beside(found: Weights, name: str, networks: Sequence[nested.Network]) -> list[str]:
    """Names of what else the file holds besides the network `name`, for a remark: other networks, and entries
    without one."""
    names = [n.name for n in networks]
    unknown = [e for e in found.entries if len(found.entries[e]) > 1 and not any(within(n, e) for n in (name, *names))]
    return [f"'{n}'" if n else "the bare state" for n in (*names, *unknown) if n != name]


def within(name: str, entry: str) -> bool:
    return not entry or f"{name}.".startswith(f"{entry}.")


def foreign_source(
    found: Weights, entry: str, theirs: State, converter: Layout, remarks: list[str], overrides: Sequence[str]
) -> Source:
    """Convert a published state into a Source whose network takes it strictly."""
    try:
        said: dict[str, Any] = {}
        if converter.diffusers is not None and found.json:
            said = converter.diffusers.from_json(found.json)
            converter = converter.diffusers.adapt(converter, found.json)
        read = {**converter.config(theirs), **said}
        said, view, recipe = keywords(converter, overrides, converter.published.header(read))
        config = {**read, **said}
        if converter.diffusers is not None and (told := {k: said[k] for k in converter.diffusers.words if k in said}):
            converter = converter.diffusers.adapt(converter, {**found.json, **told})
        state = dict(converter.to_ours(theirs))
        wanted = layouts.on_meta(converter.kind, converter.component, config)
        more = dict(converter.published.header(config))
        assumed = dict(converter.published.assumes(theirs, config))
    except VgmError:
        raise
    except layouts.UNFIT as e:
        raise layouts.misfit(converter, theirs, found.path, layouts.reason_of(e)) from e
    if problem := strict(wanted, state):
        raise layouts.misfit(converter, theirs, found.path, problem)
    if converter.kind == "codec":
        more.setdefault("view", {"name": "codec"})
    if view:
        more["view"] = {**more["view"], **view}
        check_view(more["view"])
    if recipe:
        more["recipe"] = {**more["recipe"], **recipe}
        registry().build("sampler", more["recipe"]["sampler"])  # VgmError: it takes no such words
    own = dict(converter.own(theirs))
    made = back(converter, state)
    header = Header(
        component={"kind": converter.kind, "name": converter.component, "kwargs": config},
        weights=kind_of(entry),
        extra={"source": {"file": found.path.name, "sha256": ckpt.file_hash(found.path), "layout": converter.name}},
        **more,
    )
    known = {text.partition("=")[0] for text in overrides} | set(said)
    remarks = [*remarks, *(f"assumed: {text}" for key, text in assumed.items() if key not in known)]
    source = Source(found.path, state, header, converter, own, remarks=remarks)
    pairs = converter.files.names(theirs)
    source.left_out = sorted(set(theirs) - {pairs[k] for k in made if k in pairs})
    return source


def disagreement(converter: Layout, theirs: State, ours: State) -> str:
    """The first tensor of the file that the conversion leaves out although it holds other values than a conversion back
    would write; "" if there is none.

    Published files store some values several times (copies, masks, filters), of which our network keeps one.
    """
    unused = [re.compile(p) for p in converter.files.unused]
    for k, v in back(converter, ours).items():
        if k in theirs and not any(p.search(k) for p in unused) and not alike(theirs[k], v):
            return f"{k} is not what the layout's other tensors say"
    return ""


def kind_of(entry: str) -> str:
    """The value of `vgm.weights` for an entry of a checkpoint: an average's name, "raw", or "released" for a bare
    state, which says neither."""
    if not entry:
        return "released"
    return "ema" if nested.is_average(entry) else "raw"


def keywords(
    converter: Layout, overrides: Sequence[str], published: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sort KEY=VALUE words of `vgm convert` into three groups: constructor keywords; parts of the view, which say how
    the network was trained (prediction, time, schedule, steps); parts of the recipe, which say how it is sampled
    (sampler.KEY, guidance_scale; null removes one).

    published: the layout's header, which the words go on top of. VgmError: unknown key.
    """
    own: dict[str, Any] = {}
    seen: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    view = published.get("view")
    path = dict((view or {}).get("path") or {})
    sampler = dict(published.get("recipe", {}).get("sampler") or {})
    component = registry().find(converter.kind, converter.component)
    known = signature(load_target(component.target, converter.component)).parameters
    parts = [k for k in (*(view or {}), *path) if k not in ("name", "path")]
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq:
            raise VgmError(f"'{text}' is not KEY=VALUE", "example: num_heads=6", USAGE)
        said = parse_yaml(value, text)
        if sampler and key.startswith("sampler."):
            sampler[key.removeprefix("sampler.")] = said
            recipe["sampler"] = {k: v for k, v in sampler.items() if v is not None}
        elif sampler and key == "guidance_scale":
            recipe[key] = said
        elif key not in known and key not in parts:
            raise unknown("key", key, [*known, *parts, "codec"], converter.component)
        elif key in known:
            own[key] = said
        elif key in path:
            path[key] = said
            seen["path"] = path
        else:
            seen[key] = said
    return own, seen, recipe


def check_view(view: Mapping[str, Any]) -> None:
    """VgmError: the view names a schedule, a prediction or the like that does not exist."""
    try:
        ckpt.build_view(torch.nn.Identity(), view)
    except VgmError:
        raise
    except layouts.UNFIT as e:
        raise VgmError(f"no network is looked at so: {layouts.reason_of(e)}", code=USAGE) from e


def strict(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Why a state cannot be loaded with strict=True into a network whose state is `wanted`; "" if it can."""
    for names, what in ((wanted.keys() - state.keys(), "missing"), (state.keys() - wanted.keys(), "unexpected")):
        if names:
            return f"{len(names)} tensors {what}, first {sorted(names)[0]}"
    for k, v in wanted.items():
        if v.shape != state[k].shape:
            return f"{k} is {tuple(state[k].shape)}, the network wants {tuple(v.shape)}"
    return ""


def back(converter: Layout, state: State) -> State:
    """Convert a state under our names into the layout. VgmError: the layout cannot hold such a network."""
    try:
        return converter.from_ours(state)
    except VgmError:
        raise
    except layouts.UNFIT as e:
        raise VgmError(f"this network has no '{converter.name}' layout: {layouts.reason_of(e)}", code=USAGE) from e
