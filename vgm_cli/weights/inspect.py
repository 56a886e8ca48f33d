"""`vgm inspect`: what a weights file holds, told without building a network.

Published layouts are recognised by the names and shapes of their tensors. Nothing in a file is executed (reading.py),
and of .safetensors only headers and small tensors are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgm_cli import atomic, limits
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.foreign import header
from vgm_cli.nn.meta import on_meta
from vgm_cli.weights.reading import KNOWN, kind_of

KINDS = {"torch": "torch file", "pickle": "pickle", "arrays": "numpy archive", "flax": "flax checkpoint"}
KINDS["safetensors"] = "safetensors"
SMALL = 1 << 18  # elements of a tensor whose values may say something (a mask, a ladder of noise levels)
TORCH_NAMES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "u8": "uint8", "bool": "bool"}
TORCH_NAMES |= {f"i{n}": f"int{n}" for n in (8, 16, 32, 64)} | {f"u{n}": f"uint{n}" for n in (16, 32, 64)}
TORCH_NAMES |= {"f8_e4m3": "float8_e4m3fn", "f8_e5m2": "float8_e5m2"}


def describe(path: Path) -> dict[str, Any]:
    """Facts of one weights file: kind, tensors, parameters, dtypes, and what it says or seems to be. VgmError: the
    file is missing, cut off, of an unknown kind, or needs code to be run."""
    if not path.is_file():
        raise VgmError(f"no such file: {path}", "`vgm runs ls` shows the runs below ./runs", USAGE)
    parts = shards_of(path) if is_index(path) else [path]
    kinds = {kind_of(p) for p in parts}
    if kinds == {"safetensors"}:
        return safetensors_file(path, parts)
    if "" not in kinds:
        return foreign_file(path, KINDS[kinds.pop()])
    raise VgmError(f"{path} is not a kind of file that can be looked into", f"known: {KNOWN}, or a run", USAGE)


# -- .safetensors ------------------------------------------------------------------------------------------------------


def safetensors_file(path: Path, files: list[Path]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        own, more = limits.safetensors_header(file)
        tensors |= own
        metadata |= more
    kind = f"safetensors in {len(files)} shards" if is_index(path) else "safetensors"
    facts = {"path": str(path), "kind": kind, "bytes": sum(f.stat().st_size for f in files), **summary(tensors)}
    facts["non_finite"] = [name for f in files for name in non_finite_in(f)]
    said = own_header(metadata, path)
    if said:
        component = said["component"]
        return {**facts, "kind": "vgm checkpoint", **said, "presets": presets_of(component), **tokens_of(said)}
    from vgm_cli.weights import files as weight_files
    from vgm_cli.weights.nested import entries

    named, remarks = entries(light(files, tensors), path)
    found = weight_files.Weights(path, named, metadata, weight_files.read_json(path.parent / "config.json"), remarks)
    return {**facts, "metadata": metadata, **looks_like(found)}


def is_index(path: Path) -> bool:
    from vgm_cli.engine.checkpoint import is_index as named

    return named(path)


def shards_of(path: Path) -> list[Path]:
    from vgm_cli.engine.checkpoint import shards_of as named

    return named(path)


def non_finite_in(path: Path) -> list[str]:
    """Tensors of a .safetensors file that hold NaN or infinities, read one at a time."""

    from vgm_cli.engine.checkpoint import all_finite

    with atomic.open_safetensors(path) as f:
        return [k for k in f.keys() if not all_finite(f.get_tensor(k))]


def light(files: list[Path], tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A state whose small tensors are read; large ones are on the meta device, with their shapes alone."""
    import torch

    state: dict[str, Any] = {}
    for file in files:
        with atomic.open_safetensors(file) as f:
            for k in f.keys():
                t = tensors[k]
                dtype = getattr(torch, TORCH_NAMES.get(t["dtype"], "float32"))
                big = math.prod(t["shape"]) > SMALL or t["dtype"] not in TORCH_NAMES
                state[k] = torch.empty(t["shape"], dtype=dtype, device="meta") if big else f.get_tensor(k)
    return state


def summary(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Number of tensors and of their elements, in all and by dtype."""
    by_dtype: dict[str, int] = {}
    for t in tensors.values():
        by_dtype[t["dtype"]] = by_dtype.get(t["dtype"], 0) + math.prod(t["shape"])
    return {"tensors": len(tensors), "parameters": sum(by_dtype.values()), "dtypes": by_dtype}


def own_header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a file of ours states about itself; {} for other files."""
    if "vgm.component" not in metadata:
        return {}
    said = header(metadata, path)
    order = ("component", "weights", "step", "images", "view", "parts", "data", "recipe")
    return {k: said[k] for k in order if said.get(k) is not None} | {k: v for k, v in said.items() if k not in order}


def tokens_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """{"tokens": the grid of an image, the number of codes of each, and how many times fewer bits these are than its
    8-bit values} of a codec that has tokens and says of which images; else {}."""

    from vgm_cli.api import SeveralCodebooks, Tokenizer
    from vgm_cli.engine.budget import building
    from vgm_cli.engine.tokens import compression_factor
    from vgm_cli.registry import registry

    data, component = said.get("data") or {}, said["component"]
    if "codec" not in (component.get("kind"), (said.get("view") or {}).get("name")) or not data.get("image_size"):
        return {}
    image = (data["image_channels"], data["image_size"], data["image_size"])
    try:
        with on_meta(), building(component["name"]):
            codec = registry().build("codec", {"name": component["name"], **component.get("kwargs", {})})
        if not isinstance(codec, Tokenizer):
            return {}
        grid = list(codec.token_shape(image))
    except (VgmError, RuntimeError, TypeError, ValueError):  # what the header says cannot be built
        return {}
    codes = codec.codes_each if isinstance(codec, SeveralCodebooks) else codec.codebook_size
    factor = compression_factor(math.prod(image), math.prod(grid), codes)
    return {"tokens": {"grid": grid, "codes": codes, "compression": round(factor, 4)}}


def presets_of(component: Mapping[str, Any]) -> list[str]:
    from vgm_cli.weights import layout as layouts

    try:
        return layouts.presets_of(component.get("kind", "model"), component["name"], component.get("kwargs", {}))
    except VgmError:
        return []  # its optional package is not installed


# -- files that others wrote -------------------------------------------------------------------------------------------


def foreign_file(path: Path, kind: str) -> dict[str, Any]:
    """Facts of a torch file, pickle or .npz: its dictionaries of tensors, which of them would be converted, and
    which layout each resembles."""
    from vgm_cli.engine.checkpoint import non_finite
    from vgm_cli.weights import files as weight_files

    found = weight_files.read(path)
    facts = looks_like(found)
    inside = [n for n in found.entries if f"{facts['entry']}.".startswith(f"{n}.") or not n]
    chosen = found.entries[max(inside, key=len)]
    tensors = {k: {"dtype": str(v.dtype).removeprefix("torch."), "shape": list(v.shape)} for k, v in chosen.items()}
    return {
        "path": str(path),
        "kind": f"{kind} (nothing in it was executed)",
        "bytes": path.stat().st_size,
        "entries": {k: len(v) for k, v in found.entries.items() if k},
        **summary(tensors),
        "non_finite": non_finite(chosen),
        **facts,
    }


def looks_like(found: Any) -> dict[str, Any]:
    """Compare a file's networks with the known layouts.

    found: a files.Weights. The result: entry and weights, what `vgm convert` would take; also, the other networks;
    looks_like, the layouts that recognise it, fitting ones first; fit, the first of these, or with what is missing, the
    nearest layout.
    """
    from vgm_cli.weights import layout as layouts
    from vgm_cli.weights import source

    networks = found.networks(layouts.recognising)
    if networks:
        taken = networks[0]
        fits = sorted((layouts.fit(c, taken.state) for c in taken.layouts), key=lambda f: not f.exact)
        first = fits[0]
        if len(fits) > 1:
            try:
                wanted = layouts.choose(taken.state, found.path, found.json)[0]
                first = next(f for f in fits if f.converter.name == wanted.name)
            except VgmError:
                pass  # ambiguous: all are listed
        return {
            "entry": taken.name,
            "weights": source.kind_of(taken.name),
            "also": source.beside(found, taken.name, networks),
            "looks_like": [layout(f) for f in sorted(fits, key=lambda f: (not f.exact, f is not first))],
            "fit": table(first),
        }
    name = found.pick(None)[0]
    close = layouts.nearest(found.entries[name])
    near = {"nearest": layout(close), "fit": table(close)} if close is not None else {}
    return {"entry": name, "weights": source.kind_of(name), "also": [], "looks_like": [], **near}


def layout(fit: Any) -> dict[str, Any]:
    """A layout as `vgm inspect` names it."""
    from vgm_cli.weights import layout as layouts

    c = fit.converter
    return {
        "converter": c.name,
        "component": c.component,
        "kind": c.kind,
        "family": family(c.name, c.component),
        "summary": c.summary,
        "fits": fit.exact,
        "presets": layouts.presets_of(c.kind, c.component, fit.config) if fit.config else [],
        "config": fit.config,
    }


def family(converter: str, component: str) -> str:
    """The paper that a layout belongs to: the one of the component's name, else that of the plugin that brings the
    layout."""
    from vgm_cli.registry import registry

    r = registry()
    paper = r.papers.get(component) or r.papers.get(converter)
    if paper is None:
        owner = r.plugins[r.owners["converter", converter]]
        paper = owner.papers[0] if owner.papers else None
    return paper.family if paper is not None else ""


def table(fit: Any) -> dict[str, Any]:
    """Missing tensors with the nearest name in the file, unexpected ones, and those of another shape."""
    return {
        "layout": fit.converter.name,
        "wanted": fit.wanted,
        "reason": fit.reason,
        "missing": {k: fit.nearest(k) for k in fit.missing},
        "unexpected": fit.unexpected,
        "shapes": {k: {"file": list(a), "wanted": list(b)} for k, (a, b) in fit.shapes.items()},
    }
