"""Checkpoints that hold a network with what it needs: its codec, and the encoders of what it is told.

A layout says what lies `beside` its network in such files. Into our own form each part becomes a file of its own, which
the network's header names; back, all of them go into one file again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vgm_cli.convert_api import Layout
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.engine.checkpoint import Header
from vgm_cli.errors import VgmError
from vgm_cli.weights import files as weight_files
from vgm_cli.weights import layout as layouts
from vgm_cli.weights.files import State
from vgm_cli.weights.source import Source, back


def part_file(dst: Path, role: str) -> Path:
    return dst.with_name(f"{dst.stem}.{role}.safetensors")


def name_parts(header: Header, parts: dict[str, Source], dst: Path) -> None:
    """Let the header of a network in the file dst name its parts, which are written already; the codec is named with
    the file."""
    conditions: dict[str, Any] = dict(header.conditions or {})
    for role, part in parts.items():
        if role == "codec":
            continue
        if role == "base":
            header.parts["base"] = ckpt.refer(part_file(dst, role), part.name)
            continue
        conditions[role] = {"name": part.name, **part.config, "train": True}
        if classes := part.config.get("num_classes"):
            header.data = {**header.data, "num_classes": classes}
    if conditions:
        header.conditions = conditions


def write_parts(source: Source, dst: Path, limit: int, dtype: Any) -> list[Path]:
    """Write what lies beside a network, each part into its file. dtype: (state) -> state."""
    written = []
    mark = {"checkpoint": source.header.extra.get("source", {}).get("sha256", "")}
    source.header.extra |= mark
    for role, part in source.parts.items():
        header = replace(part.header, extra={**part.header.extra, **mark})
        file = part_file(dst, role)
        written += weight_files.write(file, dtype(part.state), header.metadata(), limit=limit)
    return written


def with_parts(source: Source, layout: Layout) -> tuple[State, list[str]]:
    """The tensors of what a file of ours refers to, under the names that they have beside its network in the layout.
    And remarks on what the layout has no place for, or is not there."""
    state: State = {}
    remarks: list[str] = []
    nodes = (source.header.conditions or {}).items()
    told = [name for name, node in nodes if node.get("train") or node.get("weights")]  # kept beside the network
    for role in (*source.header.parts, *told):
        try:
            if role in told:
                file = ckpt.encoder_file(source.path, role)
            else:
                file = ckpt.locate(source.header.parts[role], source.path, role)
            tensors, metadata = ckpt.read_tensors(file)
        except VgmError as e:
            remarks.append(f"left out: {e.message}")
            continue
        name = came_as(Header.parse(metadata, file))
        known = {n: p for n, p in layout.beside.get(role, {}).items() if layouts.find(n).component == name}
        if not known:
            remarks.append(f"left out: the {role} {name}, for which '{layout.name}' has no place")
            continue
        chosen = layout_read_from(metadata) if layout_read_from(metadata) in known else next(iter(known))
        state |= {known[chosen] + k: v for k, v in back(layouts.find(chosen), tensors).items()}
    return state, remarks


def came_as(header: Header) -> str:
    return str(header.component["name"])


def layout_read_from(metadata: dict[str, str]) -> str:
    """The layout that a file of ours was converted from; "" where it was trained."""
    return str(json.loads(metadata.get("vgm.source", "{}") or "{}").get("layout", ""))
