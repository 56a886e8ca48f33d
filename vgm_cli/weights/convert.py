"""Conversion between published layouts and ours, and its proof.

Ours is one self-describing .safetensors file (engine/checkpoint.py). Everything goes through it: official -> ours ->
diffusers. `verify` proves a conversion by a bit-exact round trip and by a forward pass on both sides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic
from vgm_cli.convert_api import Converter
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.checkpoint import Header
from vgm_cli.errors import CHECK_FAILED, USAGE, VgmError, unknown
from vgm_cli.recipe import parse_yaml
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import layout as layouts
from vgm_cli.weights import nested, probe
from vgm_cli.weights.files import State, Weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS = {None: 1e-5, "fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-1}  # of a forward pass, relative to its largest value
OURS = "vgm"


@dataclass
class Source:
    """A network in our names. theirs: the state it was read from, {} where the file was ours; layout: its converter."""

    path: Path
    state: State
    header: Header
    layout: Converter | None = None
    theirs: State = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.header.component.get("kind", "model"))

    @property
    def name(self) -> str:
        return str(self.header.component["name"])

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.header.component.get("kwargs", {}))


# -- reading -----------------------------------------------------------------------------------------------------------


def open_source(
    source: str | Path,
    from_: str | None = None,
    weights: str | None = None,
    trust: bool = False,
    overrides: Sequence[str] = (),
) -> Source:
    """A run, a file of ours or a published checkpoint. weights: see weight_files.Weights.pick. overrides: KEY=VALUE for
    the constructor, where the layout does not tell. VgmError: unknown, ambiguous, incomplete or refused."""
    found = weight_files.read(weight_files.locate(source, weights), trust)
    if found.ours:
        if from_ not in (None, OURS):
            raise VgmError(f"{found.path} is a file of ours, not '{from_}'", "leave --from away", USAGE)
        if overrides:
            raise VgmError(f"{found.path} says what network it holds", f"leave {overrides[0]} away", USAGE)
        return own_source(found, weights, Path(source).is_dir())
    if from_ == OURS:
        raise VgmError(f"{found.path} does not say what network it holds", "--from names a layout", USAGE)
    entry, state, converter, remarks = recognise(found, from_, weights)
    return foreign_source(found, entry, state, converter, [*found.remarks, *remarks], overrides)


def own_source(found: Weights, weights: str | None, picked: bool) -> Source:
    header = Header.parse(found.metadata, found.path)
    known = {f"vgm.{k}" for k in (*vars(header), "schema", "version")}
    header.extra = {k[4:]: json.loads(v) for k, v in found.metadata.items() if k.startswith("vgm.") and k not in known}
    if weights is not None and not picked and weights not in kinds_of(header.weights):
        raise VgmError(f"{found.path} holds {header.weights} weights, not '{weights}'", "take the run instead", USAGE)
    return Source(found.path, next(iter(found.entries.values())), header)


def kinds_of(weights: str) -> tuple[str, ...]:
    """What `--weights` may call the weights that a header calls so."""
    return (weights, "ema") if weights.startswith("ema") else (weights, "model", "raw")


def recognise(found: Weights, from_: str | None, weights: str | None) -> tuple[str, State, Converter, list[str]]:
    """(the network's name in the file, its state, its layout, remarks): the first network of the asked kind that some
    layout knows, averages before raw weights. VgmError: there is none; several layouts know it."""
    wanted = layouts.converter(from_) if from_ is not None else None
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
    told = f"taken: '{name}'{', an average' if nested.is_average(name) else ''}; also there: {', '.join(also)}"
    return name, state, converter, [r for r in (remark, told if name and also else "") if r]


def beside(found: Weights, name: str, networks: Sequence[nested.Network]) -> list[str]:
    """Names of what a file holds beside the network `name`: other networks, and entries in which none is known."""
    names = [n.name for n in networks]
    unknown = [e for e in found.entries if len(found.entries[e]) > 1 and not any(within(n, e) for n in (name, *names))]
    return [f"'{n}'" if n else "the bare state" for n in (*names, *unknown) if n != name]


def within(name: str, entry: str) -> bool:
    return not entry or f"{name}.".startswith(f"{entry}.")


def foreign_source(
    found: Weights, entry: str, theirs: State, converter: Converter, remarks: list[str], overrides: Sequence[str]
) -> Source:
    """Through the converter into a state that its network takes strictly."""
    try:
        if converter.told_by is not None and found.json:
            converter = converter.told_by(found.json)
        told = converter.from_json(found.json) if converter.from_json is not None and found.json else {}
        read = {**converter.config_from(theirs), **told}
        published = converter.header(read) if converter.header is not None else {}
        said, view, recipe = keywords(converter, overrides, published)
        config = {**read, **said}
        state = dict(converter.to_ours(theirs))
        wanted = layouts.on_meta(converter.kind, converter.component, config)
        more = dict(converter.header(config)) if converter.header is not None else {}
        assumed = dict(converter.assumes(theirs, config)) if converter.assumes is not None else {}
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
    known = {text.partition("=")[0] for text in overrides} | set(told)
    remarks = [*remarks, *(f"assumed: {text}" for key, text in assumed.items() if key not in known)]
    source = Source(found.path, state, header, converter, own, remarks=remarks)
    pairs = {k: k for k in theirs} if converter.pairs is None else converter.pairs(theirs)
    source.left_out = sorted(set(theirs) - {pairs[k] for k in made if k in pairs})
    return source


def disagreement(converter: Converter, theirs: State, ours: State) -> str:
    """A tensor of the file that our network does not keep and that would come back with other values; "" if none: what
    is read once and stored often (copies, masks, filters) must be what it is taken for."""
    forgotten = [re.compile(p) for p in converter.forgets]
    for k, v in back(converter, ours).items():
        if k in theirs and not any(p.search(k) for p in forgotten) and not alike(theirs[k], v):
            return f"{k} is not what the layout's other tensors say"
    return ""


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding."""
    if a.shape != b.shape or same(a, b):
        return a.shape == b.shape
    return torch.allclose(a.double(), b.to(a.dtype).double(), rtol=1e-3, atol=1e-5, equal_nan=True)


def kind_of(entry: str) -> str:
    """A header's word for an entry of a checkpoint: an average, raw, or a bare state that says neither."""
    if not entry:
        return "released"
    return "ema" if nested.is_average(entry) else "raw"


def keywords(
    converter: Converter, overrides: Sequence[str], published: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """KEY=VALUE -> keywords of the component's constructor; parts of its view: how it was trained (prediction, time, …,
    and those of its path: schedule, steps); of its recipe: how it is sampled (sampler.KEY, null: without;
    guidance_scale). published: the layout's header. VgmError: unknown key."""
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
    """VgmError: there is no such schedule, prediction, ..."""
    try:
        ckpt.build_view(torch.nn.Identity(), view)
    except VgmError:
        raise
    except layouts.UNFIT as e:
        raise VgmError(f"no network is looked at so: {layouts.reason_of(e)}", code=USAGE) from e


def strict(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps a state from being loaded with strict=True; "" when nothing does."""
    for names, what in ((wanted.keys() - state.keys(), "missing"), (state.keys() - wanted.keys(), "unexpected")):
        if names:
            return f"{len(names)} tensors {what}, first {sorted(names)[0]}"
    for k, v in wanted.items():
        if v.shape != state[k].shape:
            return f"{k} is {tuple(state[k].shape)}, the network wants {tuple(v.shape)}"
    return ""


def back(converter: Converter, state: State) -> State:
    """Ours -> the layout. VgmError: a network that it cannot hold."""
    try:
        return converter.from_ours(state)
    except VgmError:
        raise
    except layouts.UNFIT as e:
        raise VgmError(f"this network has no '{converter.name}' layout: {layouts.reason_of(e)}", code=USAGE) from e


# -- converting --------------------------------------------------------------------------------------------------------


@dataclass
class Conversion:
    """What is to be written. layout: None for ours. state: in that layout's names."""

    source: Source
    layout: Converter | None
    ours: State
    state: State
    cast: str | None = None
    remarks: list[str] = field(default_factory=list)


def target_layout(source: Source, dst: Path, to: str | None) -> Converter | None:
    """The layout named by --to, or by the kind of file: ours for .safetensors, the official one for other files.

    VgmError: a layout of another component; ours in a file that cannot describe itself.
    """
    plain = dst.suffix.lower() == ".safetensors"
    if to == OURS or (to is None and plain):
        if not plain:
            raise VgmError(f"{dst} cannot say what network it holds", "ours is a .safetensors file", USAGE)
        return None
    if to is None:
        return layouts.official(source.name)
    chosen = layouts.converter(to)
    if chosen.component != source.name:
        fitting = [n for n, c in layouts.converters().items() if c.component == source.name]
        raise VgmError(
            f"'{to}' is a layout of {chosen.component}, and {source.path} holds {source.name}",
            f"its layouts: {', '.join([OURS, *fitting])}",
            USAGE,
        )
    return chosen


def prepare(source: Source, dst: Path, to: str | None = None, dtype: str | None = None) -> Conversion:
    """Cast and rename; nothing is written."""
    layout = target_layout(source, dst, to)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    told: Mapping[str, Any] = {}  # by the config.json of a folder
    if layout is not None and dst.suffix == "" and layout.config_json is not None:
        told = layout.config_json(source.config)
        layout = layout.told_by(told) if layout.told_by is not None else layout
    if layout is not None and layout.allows is not None:
        layout.allows(source.config)
    ours = cast(source.state, dtype, source.path) if dtype else source.state
    if layout is None:
        return Conversion(source, None, ours, ours, dtype)
    state = back(layout, ours)
    return Conversion(source, layout, ours, state, dtype, lost(source, layout, state, told))


def lost(source: Source, layout: Converter, state: State, told: Mapping[str, Any]) -> list[str]:
    """What a file of this layout does not say of the network when it is read back, as remarks. told: config.json."""
    remarks = []
    read = {**layout.config_from(state), **(layout.from_json(told) if layout.from_json is not None and told else {})}
    component = registry().find(source.kind, source.name)
    parameters = signature(load_target(component.target, source.name)).parameters.items()
    full = {**{k: p.default for k, p in parameters if p.default is not p.empty}, **read}
    untold = [k for k, v in source.config.items() if "drop" not in k and layouts.plain(full.get(k)) != layouts.plain(v)]
    words = [f"{k}={json.dumps(source.config[k], separators=(',', ':'))}" for k in untold]
    seen = untold_view(source, layout)
    if seen is None:
        remarks.append(f"'{layout.name}' keeps weights alone: read back, they pass for a network trained as published")
    words += [*(seen or []), *untold_sampler(source, layout)]
    if source.header.codec:
        words.append(f"codec={source.header.codec.get('asset') or source.header.codec.get('path')}")
    if words:
        remarks.append(
            f"'{layout.name}' does not tell {' '.join(words)}: `vgm convert` needs these words when it is read back"
        )
    return remarks


def untold_view(source: Source, layout: Converter) -> list[str] | None:
    """KEY=VALUE of how a network is sampled, where it is otherwise than published; None: no words would tell it."""
    published = json.loads(json.dumps(layout.header(source.config).get("view"))) if layout.header is not None else None
    own = source.header.view
    if published is None or own is None or own == published:
        return []
    flat, read = ({**v.get("path", {}), **v, "path": v.get("path", {}).get("name")} for v in (own, published))
    if flat.keys() - read.keys() or any(flat.get(k) != read.get(k) for k in ("name", "path")):
        return None
    return [f"{k}={json.dumps(v).strip(chr(34))}" for k, v in flat.items() if read.get(k) != v]


def untold_sampler(source: Source, layout: Converter) -> list[str]:
    """KEY=VALUE of the sampler and the guidance, where they are otherwise than published."""
    published = dict(layout.header(source.config).get("recipe", {})) if layout.header is not None else {}
    own, read = (dict(r.get("sampler") or {}) for r in (source.header.recipe, published))
    if not own or own.get("name") != read.get("name"):
        return []
    words = [f"sampler.{k}={json.dumps(own.get(k))}" for k in {**read, **own} if own.get(k) != read.get(k)]
    scale = source.header.recipe.get("guidance_scale")
    return words + ([f"guidance_scale={scale}"] if scale != published.get("guidance_scale") else [])


def cast(state: State, dtype: str, path: Path) -> State:
    """Floating-point tensors in another precision. VgmError: a finite value becomes infinite."""
    wanted = DTYPES[dtype]
    out = {}
    for k, v in state.items():
        out[k] = v.to(wanted) if v.is_floating_point() else v
        if wanted == torch.float16 and v.is_floating_point() and bool((out[k].isinf() & v.isfinite()).any()):
            raise VgmError(f"{path}: {k} has values beyond fp16's 65504", "--dtype bf16 holds them", USAGE)
    return out


def write(job: Conversion, dst: Path, limit: int, codec: str | None = None) -> list[Path]:
    """The files written, what to open first. Until the last step what was there under the name stays as it was; then it
    is replaced, and what is left of it removed."""
    source = job.source
    if job.layout is not None and dst.suffix == "":
        return write_folder(job, dst, limit)
    if job.layout is None:
        files = weight_files.write(dst, job.state, own_header(source, dst, codec).metadata(), limit=limit)
    else:
        files = weight_files.write(dst, job.state, {}, job.layout.wrapper, limit)
    weight_files.remove_older(dst, files)
    return files


def write_folder(job: Conversion, dst: Path, limit: int) -> list[Path]:
    """diffusers' folder: the weights and config.json, made beside and exchanged for the old one as a whole. VgmError:
    the old one holds something else, too."""
    assert job.layout is not None
    if job.layout.config_json is None:
        raise VgmError(f"{dst} has no suffix", f"name a file: {', '.join(weight_files.WRITABLE)}", USAGE)
    if dst.is_dir():
        known = re.compile(rf"config\.json|{weight_files.DIFFUSERS}[.-].*")
        other = sorted(p.name for p in dst.iterdir() if not known.fullmatch(p.name))
        if other:
            raise VgmError(f"{dst} holds more than a network: {', '.join(other[:3])}", "name another folder", USAGE)
    with atomic.replacing_folder(dst) as temp:
        files = weight_files.write(temp / f"{weight_files.DIFFUSERS}.safetensors", job.state, {}, limit=limit)
        atomic.write_json(temp / "config.json", job.layout.config_json(job.source.config))
    return [dst / f.name for f in (*files, temp / "config.json")]


def own_header(source: Source, dst: Path, codec: str | None) -> Header:
    """The header of our file: a codec is named from where the file will lie."""
    header = replace(source.header)
    path = None
    if codec is not None:
        path = ckpt.resolve(codec)
        name = ckpt.read_header(path).component["name"]
        if ("codec", name) not in registry().components:
            raise VgmError(f"{codec} is no codec but '{name}'", "`vgm ls codecs` names the codecs", USAGE)
    elif header.codec:
        path = ckpt.codec_path(header.codec, source.path)
    if path is not None:
        if codec is not None:
            header.data = {**header.data, **images_of(path, header.data)}
        told = (header.codec or {}).get("output")
        header.codec = ckpt.codec_reference(path, output=told or ("tokens" if header.data.get("vocab_size") else None))
    return header


def images_of(codec: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Data facts of the images that a codec makes of a network's latents. VgmError: it takes no such latents."""
    shape = data.get("sample_shape")
    if not shape or data.get("vocab_size"):
        return {}
    component = ckpt.read_header(codec).component
    with torch.device("meta"):
        built = registry().build("codec", {"name": component["name"], **component.get("kwargs", {})})
        try:
            image = built.decode(torch.zeros(1, *shape))
        except (RuntimeError, ValueError, IndexError) as e:
            shown = "x".join(map(str, shape))
            raise VgmError(f"{codec} decodes no latents of {shown}, which this network makes", code=USAGE) from e
    return {"image_size": image.shape[-1], "image_channels": image.shape[1]}


# -- proving -----------------------------------------------------------------------------------------------------------


@dataclass
class Proof:
    """What `--verify` found. Each check: (what, outcome, passed)."""

    checks: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, what: str, outcome: str, passed: bool = True) -> None:
        self.checks.append((what, outcome, passed))

    @property
    def passed(self) -> bool:
        return all(ok for *_, ok in self.checks)

    def failure(self, hint: str = "nothing was written") -> VgmError:
        what, outcome, _ = next(c for c in self.checks if not c[2])
        return VgmError(f"the conversion is not proved: {what}: {outcome}", hint, CHECK_FAILED)


def bits(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and signed zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names that only one has, or whose tensors differ in a bit."""
    return sorted(a.keys() ^ b.keys()) + [k for k in a if k in b and not same(a[k], b[k])]


def prove(job: Conversion) -> Proof:
    """Before writing: both round trips bit for bit; the network of the source beside that of what will be written, and
    beside the layouts' own code where they bring it."""
    proof = Proof()
    source = job.source
    bad = ckpt.non_finite(job.ours)
    proof.add(
        "every value is finite",
        f"{len(bad)} of {len(job.ours)} tensors hold NaN or infinities, first {bad[0]}" if bad else "yes",
        not bad,
    )
    if source.layout is not None:
        round_trips(proof, source.layout, source.state, source.theirs)
    if job.layout is not None and job.layout is not source.layout:
        round_trips(proof, job.layout, job.ours)
    elif job.layout is not None and job.cast:
        round_trips(proof, job.layout, job.ours)
    forward_passes(proof, job)
    return proof


def round_trips(proof: Proof, c: Converter, ours: State, theirs: State | None = None) -> None:
    """ours -> layout -> ours, and, for a file that was read, layout -> ours -> layout on what both name."""
    made = c.from_ours(ours)
    wrong = differing(ours, c.to_ours(made))
    proof.add(
        f"ours -> {c.name} -> ours", f"{len(wrong)} of {len(ours)} tensors differ, first {wrong[0]}" if wrong else
        f"{len(ours)} tensors bit for bit", bool(ours) and not wrong
    )  # fmt: skip
    if theirs is None:
        return
    forgotten = [re.compile(p) for p in c.forgets]
    names = [k for k in made if k in theirs and not any(p.search(k) for p in forgotten)]
    wrong = [k for k in names if not same(theirs[k], made[k]) and not rounded(theirs[k], made[k])]
    proof.add(
        f"{c.name} -> ours -> {c.name}", f"{len(wrong)} of {len(names)} tensors differ, first {wrong[0]}" if wrong else
        f"{len(names)} tensors bit for bit", bool(names) and not wrong
    )  # fmt: skip


def rounded(theirs: Tensor, made: Tensor) -> bool:
    """float64 in the file, float32 in our network: equal when rounded."""
    return theirs.dtype == torch.float64 and theirs.shape == made.shape and same(theirs.float(), made.float())


def forward_passes(proof: Proof, job: Conversion) -> None:
    """Up to the precision asked for; a package that a layout's own code needs may be missing."""
    source = job.source
    try:
        before = probe.run(source, source.state, job.layout)
        reason = "it is not known what this network takes"
    except (RuntimeError, ValueError, TypeError, IndexError, StopIteration) as e:
        before, reason = None, f"the network refuses made-up inputs ({layouts.reason_of(e)})"
    if before is None:
        proof.add("forward pass before and after", f"not made: {reason}")
        return
    after = probe.run(source, job.ours if job.layout is None else job.layout.to_ours(job.state), job.layout)
    gap = float("inf") if after is None else probe.distance(after, before)
    proof.add("forward pass before and after", f"differs by {gap:.1e}", gap <= LOSS[job.cast])
    sides = {c.name: (c, state, job.cast) for c, state in ((job.layout, job.state),) if c is not None}
    if source.layout is not None:
        sides[source.layout.name] = (source.layout, source.theirs, None)
    for c, state, precision in sides.values():
        if c.reference is None:
            continue
        what = f"forward pass of {c.name}'s own code"
        try:
            gap = probe.distance(c.reference(state, source.config), before)
        except VgmError as e:
            proof.add(what, f"not made: {e.message}")
            continue
        except layouts.UNFIT as e:
            proof.add(what, f"it refuses these weights: {layouts.reason_of(e)}", False)
            continue
        proof.add(what, f"differs from ours by {gap:.1e}", gap <= max(c.tolerance, LOSS[precision]))


def prove_written(job: Conversion, first: Path, proof: Proof) -> None:
    """After writing: the file read back holds the same bits."""
    state = next(iter(weight_files.read(first).entries.values()))
    wrong = differing(job.state, state)
    proof.add(
        f"{first.name} read back", f"{len(wrong)} tensors differ, first {wrong[0]}" if wrong else
        f"{len(state)} tensors bit for bit", bool(state) and not wrong
    )  # fmt: skip


# -- the whole ---------------------------------------------------------------------------------------------------------


def convert(
    src: str | Path,
    dst: Path,
    *,
    from_: str | None = None,
    to: str | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    verify: bool = False,
    trust: bool = False,
    max_shard_size: str = "5GB",
    codec: str | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read, convert, prove, write. Gives what was done. VgmError with CHECK_FAILED: the proof failed."""
    limit = weight_files.bytes_in(max_shard_size)
    if dst.suffix:
        weight_files.writable(dst)
    for path in (dst, dst.with_name(dst.name + weight_files.INDEX)):
        atomic.refuse_existing(path, overwrite)
    named = [text.partition("=")[2] for text in overrides if text.startswith("codec=")]
    codec = codec or (named[-1] if named else None)
    overrides = [text for text in overrides if not text.startswith("codec=")]
    if to is not None and to != OURS:
        layouts.converter(to)  # a misspelt name is told before gigabytes are read
    source = open_source(src, from_, weights, trust, overrides)
    if dst.exists() and dst.resolve() == source.path.resolve():
        raise VgmError(f"{dst} is the source itself", "convert it to another name", USAGE)
    job = prepare(source, dst, to, dtype)
    if bad := ckpt.non_finite(job.ours):
        job.remarks.append(f"{len(bad)} of {len(job.ours)} tensors hold NaN or infinities, first {bad[0]}")
    if dst.suffix == "" and (job.layout is None or job.layout.config_json is None):
        raise VgmError(f"{dst} has no suffix", f"name a file: {', '.join(weight_files.WRITABLE)}", USAGE)
    if codec is not None and job.layout is not None:
        raise VgmError(f"a file of '{job.layout.name}' names no codec", "leave --codec away", USAGE)
    proof = Proof()
    if verify:
        proof = prove(job)
        if not proof.passed:
            raise proof.failure()
    elif source.layout is not None and (problem := disagreement(source.layout, source.theirs, source.state)):
        raise layouts.misfit(source.layout, source.theirs, source.path, problem)
    files = write(job, dst, limit, codec)
    if verify:
        prove_written(job, files[0], proof)
        if not proof.passed:
            raise proof.failure(f"{files[0]} is there but not to be used")
    return summary(job, files, proof, codec)


def summary(job: Conversion, files: list[Path], proof: Proof, codec: str | None) -> dict[str, Any]:
    source = job.source
    header = source.header
    shape = header.data.get("sample_shape")
    image = [header.data.get("image_channels"), header.data.get("image_size"), header.data.get("image_size")]
    latent = job.layout is None and shape and None not in image and list(shape) != image
    return {
        "source": str(source.path),
        "from": source.layout.name if source.layout else OURS,
        "to": job.layout.name if job.layout else OURS,
        "component": header.component,
        "presets": layouts.presets_of(source.kind, source.name, source.config),
        "weights": header.weights,
        "tensors": len(job.state),
        "parameters": sum(v.numel() for v in job.state.values()),
        "left_out": source.left_out,
        "remarks": [*source.remarks, *job.remarks],
        "files": [str(f) for f in files],
        "verified": [{"what": w, "outcome": o, "passed": ok} for w, o, ok in proof.checks],
        "samplable": bool(job.layout is None and shape and header.recipe.get("sampler")),
        "needs_codec": bool(latent and codec is None and not header.codec),
    }
