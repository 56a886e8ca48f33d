"""`vgm convert SRC DST base=OLD transfer=NEW`: a network that was trained on the published file OLD, moved to NEW."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import layout as layouts
from vgm_cli.weights.files import State
from vgm_cli.weights.source import recognise


def state_of(path: str, trust: bool) -> State:
    """The tensors of a published file, under the names that it has."""
    found = weight_files.read(weight_files.locate(path, None), trust)
    state: State = found.entries[found.pick(None)[0]]
    return state


def transfer(
    src: str | Path, dst: Path, words: Mapping[str, str], from_: str | None, trust: bool, limit: int
) -> dict[str, Any]:
    """Write DST, in the layout of SRC. VgmError: networks of that layout stand on no other, a base is not named, its
    tensors do not fit."""
    if "base" not in words:
        raise VgmError("transfer=NEW moves a network from the base it was trained on", "base=OLD transfer=NEW", USAGE)
    found = weight_files.read(weight_files.locate(src, None), trust)
    if found.ours:
        raise VgmError(f"{src} is a file of ours", "`vgm convert` it to its official layout, and move that", USAGE)
    _, state, layout, remarks = recognise(found, from_, None)
    if layout.transfer is None:
        raise VgmError(f"a network of '{layout.name}' stands on no other", code=USAGE)
    moved = layout.transfer(state, *(state_of(words[key], trust) for key in ("base", "transfer")))
    files = weight_files.write(dst, moved, {}, layout.files.wrapper, limit)
    weight_files.remove_older(dst, files)
    config = layout.config(moved)
    return {
        "source": str(src),
        "from": layout.name,
        "to": layout.name,
        "component": {"kind": layout.kind, "name": layout.component, "kwargs": config},
        "presets": layouts.presets_of(layout.kind, layout.component, config),
        "weights": "released",
        "tensors": len(moved),
        "parameters": sum(v.numel() for v in moved.values()),
        "left_out": [],
        "remarks": [*found.remarks, *remarks, f"moved from {words['base']} to {words['transfer']}"],
        "files": [str(f) for f in files],
        "verified": [],
        "samplable": False,
        "needs_base": False,
        "needs_codec": False,
    }
