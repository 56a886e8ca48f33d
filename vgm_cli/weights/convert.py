"""`vgm convert`: from one published layout to another.

Every conversion goes through our own form, one self-describing .safetensors file (engine/checkpoint.py), e.g. official
-> ours -> diffusers. source.py reads the input, prove.py shows that nothing is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vgm_cli import atomic
from vgm_cli.convert_api import Layout
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.checkpoint import Header
from vgm_cli.engine.parts import in_run
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.meta import on_meta
from vgm_cli.registry import load_target, registry, signature
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import layout as layouts
from vgm_cli.weights.files import State
from vgm_cli.weights.prove import Findings, prove, prove_written
from vgm_cli.weights.source import OURS, Conversion, Source, back, disagreement, open_source
from vgm_cli.weights.statistics import add_statistics
from vgm_cli.weights.transfer import transfer
from vgm_cli.weights.whole import name_parts, part_file, with_parts, write_parts

OTHER_FILES = ("codec=", "stats=", "base=", "transfer=")  # words that name files
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def target_layout(source: Source, dst: Path, to: str | None) -> Layout | None:
    """The layout named by --to, or by the kind of file: ours for .safetensors, the official one for other files.

    VgmError: a layout of another component; ours in a file that cannot describe itself.
    """
    plain = dst.suffix.lower() == ".safetensors"
    if to == OURS or (to is None and plain):
        if not plain:
            raise VgmError(f"{dst} cannot say what network it holds", "ours is a .safetensors file", USAGE)
        return None
    if to is None:
        came = source.header.extra.get("source", {}).get("layout", "")
        return layouts.official(source.name, str(source.header.recipe.get("paper", "")), str(came))
    chosen = layouts.find(to)
    if chosen.component != source.name:
        fitting = [n for n, c in layouts.known().items() if c.component == source.name]
        raise VgmError(
            f"'{to}' is a layout of {chosen.component}, and {source.path} holds {source.name}",
            f"its layouts: {', '.join([OURS, *fitting])}",
            USAGE,
        )
    return chosen


def prepare(source: Source, dst: Path, to: str | None = None, dtype: str | None = None) -> Conversion:
    """Convert a Source for the file `dst`: rename and cast its tensors. Nothing is written yet."""
    layout = target_layout(source, dst, to)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    config_json: Mapping[str, Any] = {}  # by the config.json of a folder
    if layout is not None and dst.suffix == "" and layout.diffusers is not None:
        config_json = layout.diffusers.config_json(source.config)
        layout = layout.diffusers.adapt(layout, config_json)
    if layout is not None:
        layout.allows(source.config)
    ours = cast(source.state, dtype, source.path) if dtype else source.state
    if layout is None:
        return Conversion(source, None, ours, ours, dtype)
    state = back(layout, ours)
    remarks = lost(source, layout, state, config_json, dst)
    if layout.beside and source.layout is None and dst.suffix:
        others, left_out = with_parts(source, layout)
        state |= cast(others, dtype, source.path) if dtype else others
        remarks += left_out
    return Conversion(source, layout, ours, state, dtype, remarks)


def lost(source: Source, layout: Layout, state: State, config_json: Mapping[str, Any], dst: Path) -> list[str]:
    """Remarks on what a foreign layout cannot store, and what would be different if the file were read back.

    A layout may leave the number of heads, the view (schedule, prediction) and the sampler unsaid; a reader then
    assumes the published values. A remark is made where this network's values differ from those. config_json: what is
    written beside the weights, or empty. dst: the file, whose name may tell the layout.
    """
    remarks = []
    read = {
        **layout.config(state),
        **(layout.diffusers.from_json(config_json) if layout.diffusers and config_json else {}),
    }
    full = layouts.full_config({"kind": source.kind, "name": source.name, "kwargs": read})
    published = layout.published.header(layouts.full_config(source.header.component))
    untold = [k for k, v in source.config.items() if "drop" not in k and layouts.plain(full.get(k)) != layouts.plain(v)]
    words = [f"{k}={json.dumps(source.config[k], separators=(',', ':'))}" for k in untold]
    seen = untold_view(source, published)
    if seen is None:
        remarks.append(f"'{layout.name}' keeps weights alone: read back, they pass for a network trained as published")
    words += [*(seen or []), *untold_sampler(source, published)]
    parts = {role: ref for role, ref in source.header.parts.items() if role not in layout.beside}
    where = {k: in_run(ref, source.path) if ref.relative else ref.path for k, ref in parts.items()}
    words += [f"{role}={ref.asset or where[role]}" for role, ref in parts.items()]
    words += [] if found_again(layout, state, config_json, dst) else [f"--from {layout.name}"]
    if words:
        remarks.append(
            f"'{layout.name}' does not tell {' '.join(words)}: `vgm convert` needs these words when it is read back"
        )
    return remarks


def found_again(layout: Layout, state: State, config_json: Mapping[str, Any], dst: Path) -> bool:
    """Whether the file that is written will be known for one of this layout."""
    try:
        return layouts.choose(state, dst, config_json)[0].name == layout.name
    except VgmError:
        return False


def untold_view(source: Source, header: Mapping[str, Any]) -> list[str] | None:
    """The KEY=VALUE words that `vgm convert` needs when the file is read back, so that the network is looked at as
    it was trained. [] where the published view is right; None where no words could say it. header: the published."""
    published = json.loads(json.dumps(header.get("view")))
    own = source.header.view
    if published is None or own is None or own == published:
        return []
    flat, read = ({**v.get("path", {}), **v, "path": v.get("path", {}).get("name")} for v in (own, published))
    if flat.keys() - read.keys() or any(flat.get(k) != read.get(k) for k in ("name", "path")):
        return None
    return [f"{k}={json.dumps(v).strip(chr(34))}" for k, v in flat.items() if read.get(k) != v]


def untold_sampler(source: Source, header: Mapping[str, Any]) -> list[str]:
    """The KEY=VALUE words that say which sampler and guidance are meant, where they differ from the published ones."""
    published = dict(header.get("recipe", {}))
    own, read = (dict(r.get("sampler") or {}) for r in (source.header.recipe, published))
    if not own or own.get("name") != read.get("name"):
        return []
    words = [f"sampler.{k}={json.dumps(own.get(k))}" for k in {**read, **own} if own.get(k) != read.get(k)]
    scale = source.header.recipe.get("guidance_scale")
    return words + ([f"guidance_scale={scale}"] if scale != published.get("guidance_scale") else [])


def cast(state: State, dtype: str, path: Path) -> State:
    """A state whose floating-point tensors have another precision. VgmError: a finite value would become infinite."""
    wanted = DTYPES[dtype]
    out = {}
    for k, v in state.items():
        out[k] = v.to(wanted) if v.is_floating_point() else v
        if wanted == torch.float16 and v.is_floating_point() and bool((out[k].isinf() & v.isfinite()).any()):
            raise VgmError(f"{path}: {k} has values beyond fp16's 65504", "--dtype bf16 holds them", USAGE)
    return out


def write(job: Conversion, dst: Path, limit: int, codec: str | None = None) -> list[Path]:
    """Write a prepared conversion and return the files, the one to open first at the front.

    An older file of that name stays intact until the last step replaces it.
    """
    source = job.source
    if job.layout is not None and dst.suffix == "":
        return write_folder(job, dst, limit)
    if job.layout is None:
        files = weight_files.write(dst, job.state, own_header(source, dst, codec).metadata(), limit=limit)
    else:
        files = weight_files.write(dst, job.state, {}, job.layout.files.wrapper, limit)
    weight_files.remove_older(dst, files)
    return files


def write_folder(job: Conversion, dst: Path, limit: int) -> list[Path]:
    """Write a diffusers folder, weights and config.json, which replaces an older one as a whole. VgmError: the older
    folder holds other files as well."""
    assert job.layout is not None
    if job.layout.diffusers is None:
        raise VgmError(f"{dst} has no suffix", f"name a file: {', '.join(weight_files.WRITABLE)}", USAGE)
    if dst.is_dir():
        known = re.compile(rf"config\.json|{weight_files.DIFFUSERS}[.-].*")
        other = sorted(p.name for p in dst.iterdir() if not known.fullmatch(p.name))
        if other:
            raise VgmError(f"{dst} holds more than a network: {', '.join(other[:3])}", "name another folder", USAGE)
    with atomic.replacing_folder(dst) as temp:
        files = weight_files.write(temp / f"{weight_files.DIFFUSERS}.safetensors", job.state, {}, limit=limit)
        atomic.write_json(temp / "config.json", job.layout.diffusers.config_json(job.source.config))
    return [dst / f.name for f in (*files, temp / "config.json")]


def own_header(source: Source, dst: Path, codec: str | None) -> Header:
    """The header of our own file. References to other files (parts) are made relative to where the file will lie."""
    header = replace(source.header)
    header.parts = {role: moved(ref, source.path, role) for role, ref in header.parts.items()}
    if codec is not None:
        path = ckpt.resolve(codec)
        name = ckpt.read_header(path).component["name"]
        if ("codec", name) not in registry().components:
            raise VgmError(f"{codec} is no codec but '{name}'", "`vgm ls codecs` names the codecs", USAGE)
        before = header.parts.get("codec")
        output = (before.output if before else "") or ("tokens" if header.data.get("vocab_size") else "")
        inside = dst.parent if path == part_file(dst, "codec") else None
        header.parts["codec"] = ckpt.refer(path, name, inside, output)
        header.data = {**header.data, **images_of(path, header.data)}
    return header


def alone(header: Header) -> bool:
    """Whether a network is one that is given another one, and its header names none."""
    return "base" not in header.parts and takes_base(str(header.component.get("kind", "model")), header.component)


def takes_base(kind: str, component: Mapping[str, Any]) -> bool:
    found = registry().find(kind, component["name"])
    return "base" in signature(load_target(found.target, found.name)).parameters


def stand_on(source: Source, base: Path, layout: Layout | None) -> None:
    """Let the header of a network that is given another one name this file, and say of its data and conditions what the
    file says, where it does not itself. VgmError: it is given none, or one of other shapes."""
    if not takes_base(source.kind, source.header.component) or layout is not None:
        what = f"a file of '{layout.name}'" if layout is not None else source.name
        raise VgmError(f"{what} stands on no other network", "leave base= away", USAGE)
    header, own = ckpt.read_header(base), source.header
    network = ckpt.outline(base)[0]
    with on_meta():
        registry().build(source.kind, {"name": source.name, **source.config}, base=network)
    own.parts["base"] = ckpt.refer(base, header.component["name"])
    if "codec" in header.parts:
        own.parts.setdefault("codec", moved(header.parts["codec"], base, "codec"))
    told = {k: n for k, n in (header.conditions or {}).items() if not n.get("train")}
    own.conditions = {**told, **(own.conditions or {})}
    own.view = header.view or own.view


def moved(ref: ckpt.Reference, origin: Path, role: str) -> ckpt.Reference:
    """The reference `ref` of the file `origin`, as a file that lies elsewhere must write it."""
    path = ckpt.locate(ref, origin, role)
    return ckpt.refer(path, ref.component or ckpt.read_header(path).component["name"], output=ref.output)


def images_of(codec: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The size and channels of the images that a codec makes of a network's latents. VgmError: the codec takes other
    latents."""
    shape = data.get("sample_shape")
    if not shape or data.get("vocab_size"):
        return {}
    component = ckpt.read_header(codec).component
    with on_meta():
        built = registry().build("codec", {"name": component["name"], **component.get("kwargs", {})})
        try:
            image = built.decode(torch.zeros(1, *shape))
        except (RuntimeError, ValueError, IndexError) as e:
            shown = "x".join(map(str, shape))
            raise VgmError(f"{codec} decodes no latents of {shown}, which this network makes", code=USAGE) from e
    return {"image_size": image.shape[-1], "image_channels": image.shape[1]}


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
    on: str | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read, convert, prove where `verify` asks for it, and write. Returns what was done, as `vgm convert --json` prints
    it.

    VgmError with CHECK_FAILED: the proof failed.
    """
    limit = weight_files.bytes_in(max_shard_size)
    if dst.suffix:
        weight_files.writable(dst)
    for path in (dst, dst.with_name(dst.name + weight_files.INDEX)):
        atomic.refuse_existing(path, overwrite)
    named = dict(text.split("=", 1) for text in overrides if text.startswith(OTHER_FILES))
    codec, stats = codec or named.get("codec"), named.get("stats")
    overrides = [text for text in overrides if text.partition("=")[0] not in named]
    if "transfer" in named:
        return transfer(src, dst, named, from_, trust, limit)
    if to is not None and to != OURS:
        layouts.find(to)  # a misspelt name is told before gigabytes are read
    source = open_source(src, from_, weights, trust, overrides, on)
    if dst.exists() and dst.resolve() == source.path.resolve():
        raise VgmError(f"{dst} is the source itself", "convert it to another name", USAGE)
    job = prepare(source, dst, to, dtype)
    if bad := ckpt.non_finite(job.ours):
        job.remarks.append(f"{len(bad)} of {len(job.ours)} tensors hold NaN or infinities, first {bad[0]}")
    if dst.suffix == "" and (job.layout is None or job.layout.diffusers is None):
        raise VgmError(f"{dst} has no suffix", f"name a file: {', '.join(weight_files.WRITABLE)}", USAGE)
    if "base" in named:
        source.parts.pop("base", None)
        stand_on(source, ckpt.resolve(named["base"]), job.layout)
    if codec is not None and job.layout is not None:
        raise VgmError(f"a file of '{job.layout.name}' names no codec", "leave --codec away", USAGE)
    proof = Findings()
    if verify:
        proof = prove(job)
        for role, part in source.parts.items():
            own = prove(prepare(part, part_file(dst, role), OURS, dtype))
            proof.checks += [(f"{role}: {what}", outcome, passed) for what, outcome, passed in own.checks]
        if not proof.passed:
            raise proof.failure()
    elif source.layout is not None and (problem := disagreement(source.layout, source.theirs, source.state)):
        raise layouts.misfit(source.layout, source.theirs, source.path, problem)
    if stats is not None:
        add_statistics(job, stats)
    beside: list[Path] = []
    if source.parts and job.layout is None:
        for role in source.parts:
            atomic.refuse_existing(part_file(dst, role), overwrite)
        beside = write_parts(source, dst, limit, lambda state: cast(state, dtype, source.path) if dtype else state)
        name_parts(source.header, source.parts, dst)
        if "codec" in source.parts and codec is None:
            codec = str(part_file(dst, "codec"))
    files = write(job, dst, limit, codec) + beside
    if verify:
        prove_written(job, files[0], proof)
        if not proof.passed:
            raise proof.failure(f"{files[0]} is there but not to be used")
    return summary(job, files, proof, codec)


def summary(job: Conversion, files: list[Path], proof: Findings, codec: str | None) -> dict[str, Any]:
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
        "samplable": bool(job.layout is None and shape and header.recipe.get("sampler") and not alone(header)),
        "needs_base": job.layout is None and alone(header),
        "needs_codec": bool(latent and codec is None and "codec" not in header.parts),
    }
