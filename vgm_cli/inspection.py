"""What is in a weights file, told without building anything. .safetensors headers are read without torch; .pt and .ckpt
are opened with weights_only=True, so that nothing in them is executed."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vgm_cli.errors import FAILED, USAGE, VgmError

TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def describe(path: Path) -> dict[str, Any]:
    """Facts of one weights file: kind, tensors, parameters, dtypes, and what it says or seems to be.

    VgmError: not there, cut off, of an unknown kind, or holding objects that only unpickling could read.
    """
    if not path.is_file():
        raise VgmError(f"no such file: {path}", "`vgm runs ls` shows the runs below ./runs", USAGE)
    if path.suffix == ".safetensors":
        tensors, metadata = safetensors_header(path)
        facts = {"path": str(path), "kind": "safetensors", "bytes": path.stat().st_size, **summary(tensors)}
        own = own_header(metadata, path)
        if own:
            return {**facts, "kind": "vgm checkpoint", **own}
        return {**facts, "metadata": metadata, "looks_like": recognised(tensors)}
    if path.suffix in TORCH_FILES:
        return {"path": str(path), "bytes": path.stat().st_size, **torch_file(path)}
    known = ", ".join((".safetensors", *TORCH_FILES))
    raise VgmError(f"{path} is not a kind of file that can be looked into", f"known: {known}, or a run", USAGE)


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({tensor: {"dtype", "shape"}}, metadata) of a .safetensors file. VgmError: cut off or not such a file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(LONGEST_HEADER, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(f.read(length))
        metadata = header.pop("__metadata__", {})
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
        tensors = {k: {"dtype": t["dtype"].lower(), "shape": list(t["shape"])} for k, t in header.items()}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as e:
        raise VgmError(f"{path} is not a readable safetensors file: {e}", "it may be cut off", FAILED) from e
    if 8 + length + end != size:
        raise VgmError(f"{path} is cut off: {size} bytes, its header promises {8 + length + end}", code=FAILED)
    return tensors, metadata


def summary(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Number of tensors and of their elements, in all and by dtype."""
    by_dtype: dict[str, int] = {}
    for t in tensors.values():
        by_dtype[t["dtype"]] = by_dtype.get(t["dtype"], 0) + math.prod(t["shape"])
    return {"tensors": len(tensors), "parameters": sum(by_dtype.values()), "dtypes": by_dtype}


def own_header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a file of ours says of itself; {} for a foreign one."""
    if "vgm.component" not in metadata:
        return {}
    try:
        said = {k[4:]: json.loads(v) for k, v in metadata.items() if k.startswith("vgm.")}
    except ValueError as e:
        raise VgmError(f"{path}: its header is not JSON", code=FAILED) from e
    order = ("component", "weights", "step", "images", "view", "codec", "data", "recipe")
    return {k: said[k] for k in order if said.get(k) is not None} | {k: v for k, v in said.items() if k not in order}


def torch_file(path: Path) -> dict[str, Any]:
    """A .pt or .ckpt: its dictionaries of tensors, and what the one that would be converted looks like."""
    import pickle

    import torch

    from vgm_cli.convert_api import unwrap

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as e:
            if "mmap" not in str(e):
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)  # files from before torch 1.6
    except pickle.UnpicklingError as e:
        raise VgmError(
            f"{path} holds Python objects besides tensors, which are not unpickled here",
            "`vgm convert --trust-pickle` opens a file whose origin you trust",
            FAILED,
        ) from e
    except Exception as e:
        raise VgmError(
            f"{path} is not a readable torch file: {str(e).splitlines()[0]}", "it may be cut off", FAILED
        ) from e
    if not isinstance(found, Mapping):
        raise VgmError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors", code=FAILED)

    def tensors_of(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {
            k: {"dtype": str(v.dtype).removeprefix("torch."), "shape": list(v.shape)}
            for k, v in state.items()
            if isinstance(k, str) and isinstance(v, torch.Tensor)
        }

    entries = {str(k): len(inner) for k, v in found.items() if isinstance(v, Mapping) and (inner := tensors_of(v))}
    tensors = tensors_of(unwrap({str(k): v for k, v in found.items()}))
    return {
        "kind": "torch file (opened with weights_only, recognised by its tensors' names)",
        "entries": entries,
        **summary(tensors),
        "looks_like": recognised(tensors),
    }


def recognised(keys: Iterable[str]) -> list[dict[str, str]]:
    """Published layouts whose converter knows a state with these names, in the order of their names."""
    from vgm_cli.registry import load_target, registry

    keys = list(keys)
    if keys and all(k.startswith("module.") for k in keys):
        keys = [k.removeprefix("module.") for k in keys]
    hits = []
    for name in registry().names("converter"):
        component = registry().find("converter", name)
        try:
            converter = load_target(component.target, name)
            known = bool(keys) and converter.recognise(keys)
        except VgmError:
            continue  # its optional package is not installed
        if known:
            hits.append({"converter": name, "component": converter.component, "summary": component.summary})
    return hits
