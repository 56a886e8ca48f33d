"""Weights in files of any kind, read as plain states and written whole: .safetensors, also in shards with an index,
torch files, pickles and .npz."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic, limits, unpickle
from vgm_cli.convert_api import named_shadow
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import FAILED, USAGE, VgmError

INDEX = ".index.json"
DIFFUSERS = "diffusion_pytorch_model"
WRITABLE = (".safetensors", *unpickle.TORCH_FILES, ".npz")
State = dict[str, Tensor]


@dataclass
class Weights:
    """What a file holds. entries: {name: state}, "" for tensors at the top; metadata: a .safetensors header; json: the
    config.json beside it."""

    path: Path
    entries: dict[str, State]
    metadata: dict[str, str] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return "vgm.component" in self.metadata

    def pick(self, weights: str | None) -> list[str]:
        """Entries to try, best first: the named one; averages for "ema"; the others for "model"; None: averages, then
        the others. VgmError: there is none of the kind."""
        names = [n for n in self.entries if n]
        averages = [n for n in names if is_average(n)]
        rest = [n for n in names if n not in averages] + [n for n in self.entries if not n]
        if weights is None:
            return averages + rest
        if weights in self.entries:
            return [weights]
        chosen = {"ema": averages, "model": rest, "raw": rest}.get(weights, [])
        if not chosen:
            have = ", ".join(names) or "a bare state"
            raise VgmError(f"{self.path} holds no '{weights}' weights", f"it holds {have}", USAGE)
        return chosen


def is_average(name: str) -> bool:
    return bool(re.search(r"(^|[_.\-])(ema|averages?|averaged|gs)($|[_.\-])", name.lower()))


# -- reading -----------------------------------------------------------------------------------------------------------


def locate(source: str | Path, weights: str | None = None) -> Path:
    """A file, a folder with an index or one file of diffusers', a run -> the file to read. A shard leads to its index.

    VgmError: nothing there, a pipeline's folder.
    """
    path = Path(source)
    if path.is_file():
        return index_of(path) or path
    if path.is_dir():
        for pattern in (f"*.safetensors{INDEX}", f"*.bin{INDEX}", f"{DIFFUSERS}.safetensors", f"{DIFFUSERS}.bin"):
            found = sorted(path.glob(pattern))
            if found:
                return found[0]
        if (path / "model_index.json").is_file():
            parts = ", ".join(sorted(p.parent.name for p in path.glob("*/config.json")))
            raise VgmError(f"{path} is a pipeline of several networks", f"name one of its folders: {parts}", USAGE)
    own = {"ema": None, "model": "raw"}.get(weights or "", weights)
    return ckpt.resolve(path, own)


def index_of(path: Path) -> Path | None:
    """The index that a shard (model-00001-of-00003.safetensors) belongs to."""
    if m := re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name):
        index = path.with_name(f"{m[1]}{m[2]}{INDEX}")
        return index if index.is_file() else None
    return None


def read(path: Path, trust: bool = False) -> Weights:
    """Everything in a file; nothing in it is executed unless `trust` (see unpickle.read)."""
    beside = read_json(path.parent / "config.json")
    if path.name.endswith(INDEX) or path.suffix == ".safetensors":
        state: State = {}
        metadata: dict[str, str] = {}
        for part in ckpt.shards_of(path) if path.name.endswith(INDEX) else [path]:
            tensors, more = ckpt.read_tensors(part) if part.suffix == ".safetensors" else (read_torch(part, trust), {})
            state |= tensors
            metadata |= more
        return Weights(path, entries_of(state, path), metadata, beside)
    return Weights(path, entries_of(unpickle.contents(unpickle.read(path, trust)), path), {}, beside)


def read_torch(path: Path, trust: bool) -> State:
    found = entries_of(unpickle.contents(unpickle.read(path, trust)), path)
    return next(iter(found.values()))


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = limits.parse_json(limits.read_text(path), str(path))
    except (OSError, ValueError, VgmError):
        return {}
    return found if isinstance(found, dict) else {}


def entries_of(found: Mapping[str, Any], path: Path) -> dict[str, State]:
    """The dictionaries of tensors in a checkpoint, by name; tensors at the top as "". Wrappers of data-parallel and
    compiled networks are dropped from the names, lists of averages (score_sde) get theirs from "model".

    VgmError: there are no tensors.
    """
    entries = {k: s for k, v in found.items() if isinstance(v, Mapping) and (s := tensors_of(v))}
    ema = found.get("ema")
    if isinstance(ema, Mapping) and isinstance(ema.get("shadow_params"), list | tuple):
        entries["ema"] = named_shadow(entries.get("model") or {}, ema["shadow_params"])
    top = tensors_of(found)
    if top and (not entries or len(top) > max(map(len, entries.values()))):
        entries = {"": top, **entries}
    if not entries:
        raise VgmError(f"{path} holds no tensors", code=FAILED)
    return entries


def tensors_of(state: Mapping[str, Any]) -> State:
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for wrapper in ("module.", "_orig_mod.", "module."):
        if tensors and all(k.startswith(wrapper) for k in tensors):
            tensors = {k.removeprefix(wrapper): v for k, v in tensors.items()}
    return tensors


def parts_of(state: Mapping[str, Tensor]) -> dict[str, State]:
    """A flat state split by the first word of its names: networks wrapped in another module."""
    parts: dict[str, State] = {}
    for k, v in state.items():
        head, dot, rest = k.partition(".")
        if dot:
            parts.setdefault(head, {})[rest] = v
    return parts


# -- writing -----------------------------------------------------------------------------------------------------------


def size_of(state: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def bytes_in(text: str) -> int:
    """'5GB' -> 5000000000. VgmError: not a size."""
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)[iI]?[bB]?", text.strip())
    if not m or float(m[1]) == 0:
        raise VgmError(f"'{text}' is not a size", "examples: 5GB, 500MB", USAGE)
    return int(float(m[1]) * 1000 ** " KMGT".index(m[2].upper() or " "))


def shards(state: Mapping[str, Tensor], limit: int) -> Iterator[State]:
    """The state in pieces of at most `limit` bytes (a larger tensor is a piece of its own), in its own order."""
    piece: State = {}
    for name, tensor in state.items():
        if piece and size_of(piece) + size_of({name: tensor}) > limit:
            yield piece
            piece = {}
        piece[name] = tensor
    yield piece


def writable(path: Path) -> None:
    """VgmError: no kind of file that is written here."""
    if path.suffix.lower() not in WRITABLE:
        raise VgmError(f"{path} is not a kind of file that is written", f"known: {', '.join(WRITABLE)}", USAGE)


def write(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], wrapper: str = "", limit: int = 5 * 10**9
) -> list[Path]:
    """Write a state by the file's suffix, atomically; .safetensors above `limit` bytes becomes shards and an index,
    which is written last. wrapper: the entry that a torch file keeps it under. Gives the files, what to open first."""
    writable(path)
    own = separate(state)
    suffix = path.suffix.lower()
    if suffix in unpickle.TORCH_FILES:
        save_torch({wrapper: own} if wrapper else own, path)
    elif suffix == ".npz":
        save_arrays(own, path)
    elif size_of(own) > limit:
        return save_shards(own, path, metadata, limit)
    else:
        atomic.save_safetensors(own, path, {"format": "pt", **metadata})
    return [path]


def separate(state: Mapping[str, Tensor]) -> State:
    """Contiguous tensors on the CPU, none of which shares memory with another or keeps a larger one alive."""
    out: State = {}
    seen: set[int] = set()
    for k, v in state.items():
        t = v.detach().cpu().contiguous()
        if t.numel() and (t.data_ptr() in seen or t.untyped_storage().nbytes() != t.numel() * t.element_size()):
            t = t.clone()
        seen.add(t.data_ptr())
        out[k] = t
    return out


def save_torch(content: Mapping[str, Any], path: Path) -> None:
    with atomic.replacing(path) as temp, open(temp, "wb") as f:
        try:
            torch.save(dict(content), f)
        except RuntimeError as e:  # torch's writer keeps the system's error to itself
            raise OSError(errno.EIO, str(e).splitlines()[0]) from e


def save_arrays(state: State, path: Path) -> None:
    import numpy as np

    low = [k for k, v in state.items() if v.dtype == torch.bfloat16]
    if low:
        raise VgmError(f".npz has no bfloat16 ({low[0]})", "--dtype fp32, or a .safetensors file", USAGE)
    with atomic.replacing(path) as temp, open(temp, "wb") as f:
        np.savez(f, **{k: v.numpy() for k, v in state.items()})  # type: ignore[arg-type]


def save_shards(state: State, path: Path, metadata: Mapping[str, str], limit: int) -> list[Path]:
    """STEM-00001-of-0000N.safetensors, then STEM.safetensors.index.json; each shard carries the header."""
    pieces = list(shards(state, limit))
    names = [f"{path.stem}-{i:05d}-of-{len(pieces):05d}{path.suffix}" for i in range(1, len(pieces) + 1)]
    done: list[Path] = []
    try:
        for name, piece in zip(names, pieces):
            atomic.save_safetensors(piece, path.with_name(name), {"format": "pt", **metadata})
            done.append(path.with_name(name))
    except BaseException:
        for file in done:
            file.unlink(missing_ok=True)
        raise
    index = path.with_name(path.name + INDEX)
    atomic.write_json(
        index,
        {
            "metadata": {"total_size": size_of(state)},
            "weight_map": {k: name for name, piece in zip(names, pieces) for k in piece},
        },
    )
    return [index, *done]
