"""Weights in files of any kind, read as plain states and written whole: .safetensors, also in shards with an index,
torch files, pickles, .npz and flax's .msgpack (read only)."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_cli import atomic, limits
from vgm_cli.engine import checkpoint as ckpt
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ui import ui
from vgm_cli.weights import nested, reading
from vgm_cli.weights.contents import contents
from vgm_cli.weights.nested import Network, State, is_average

INDEX = ".index.json"
DIFFUSERS = "diffusion_pytorch_model"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack")  # of the files that a folder may hold
WRITABLE = (".safetensors", *reading.TORCH_FILES, ".npz")


@dataclass
class Weights:
    """The content of one weights file. entries: {name: state}, with the name "" for a file that is one bare state.
    metadata: a .safetensors header. json: the config.json beside the file. remarks: on what was left out."""

    path: Path
    entries: dict[str, State]
    metadata: dict[str, str] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    below: frozenset[str] = frozenset()  # names of tensors that come from another file, see `upon`

    @property
    def ours(self) -> bool:
        return "vgm.component" in self.metadata

    def networks(self, known: Callable[[Mapping[str, Tensor]], list[Any]]) -> list[Network]:
        """Every network in the file that `known` has layouts for, averages before raw weights."""
        order = sorted(self.entries, key=lambda n: not is_average(n))
        return [found for n in order for found in nested.search(n, self.entries[n], known)]

    def pick(self, weights: str | None) -> list[str]:
        """Names of the entries that `--weights` allows, best first: averages before raw weights. VgmError: there is
        none."""
        chosen = [n for n in sorted(self.entries, key=lambda n: not is_average(n)) if asked(weights, n)]
        if not chosen:
            raise self.lacks(weights, self.entries)
        return chosen

    def lacks(self, weights: str | None, names: Iterable[str]) -> VgmError:
        have = ", ".join(n for n in sorted(names, key=is_average) if n) or "a bare state"
        return VgmError(f"{self.path} holds no '{weights}' weights", f"it holds {have}", USAGE)


def upon(top: Weights, bottom: Weights) -> Weights:
    """A file that holds a part of a network, upon one that holds the rest: the tensors of both, those of `top` first.
    VgmError: one of them is a file of ours."""
    if top.ours or bottom.ours:
        raise VgmError("--on puts a published file upon another published one", "files of ours are whole", USAGE)
    rest = max(bottom.entries.values(), key=len)
    own = max(top.entries, key=lambda n: len(top.entries[n]))
    merged = {**rest, **top.entries[own]}
    entries = {**top.entries, own: merged}
    return replace(top, entries=entries, below=frozenset(rest.keys() - top.entries[own].keys()))


def asked(weights: str | None, name: str) -> bool:
    """Whether `--weights WEIGHTS` may mean the network called `name`: None means any, "ema" any average, "model" and
    "raw" any that is no average, and otherwise the name itself, its first words or its last ones."""
    if weights is None or weights == name or f".{name}.".endswith(f".{weights}.") or name.startswith(f"{weights}."):
        return True
    return (weights == "ema" and is_average(name)) or (weights in ("model", "raw") and not is_average(name))


# -- reading -----------------------------------------------------------------------------------------------------------


def locate(source: str | Path, weights: str | None = None) -> Path:
    """The weights file that `source` means: a file, a folder with one file or index of weights, or a run. A shard
    stands for its index.

    VgmError: nothing is there, or it is the folder of a pipeline of several networks.
    """
    path = Path(source)
    if path.is_file():
        return index_of(path) or path
    own = {"ema": None, "model": "raw"}.get(weights or "", weights)
    if path.is_dir() and not is_run(path):
        found = in_folder(path)
        if found:
            if len(found) > 1:
                rest = ", ".join(f.name for f in found[1:4]) + (", …" if len(found) > 4 else "")
                ui.info(f"{path} holds several files of weights: {found[0].name} is taken, not {rest}")
            return found[0]
        if (path / "model_index.json").is_file():
            parts = ", ".join(sorted(p.parent.name for p in path.glob("*/config.json")))
            raise VgmError(f"{path} is a pipeline of several networks", f"name one of its folders: {parts}", USAGE)
    return ckpt.resolve(path, own)


def is_run(path: Path) -> bool:
    """Whether a folder is a run or one of its checkpoints."""
    own = any((path / n).exists() for n in ("checkpoints", "state.json", "trainer.safetensors"))
    return own or any(path.glob("ema-*.safetensors")) or any(path.glob("step-*/model.safetensors"))


def in_folder(path: Path) -> list[Path]:
    """Files and indices of weights in a folder, best first: plain ones before variants (.fp16), safetensors before
    torch files, indices before single files. Shards with an index are that index."""
    files = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
    indices = [p for p in files if ckpt.is_index(p)]
    shards = {name for p in indices for name in ckpt.names_in(p)}
    single = [p for p in files if p.suffix.lower() in WEIGHTS and p.name not in shards]

    def order(p: Path) -> tuple[bool, bool, bool, str]:
        stem = re.sub(r"\.index|\.json$|-\d{5}-of-\d{5}", "", p.name)
        return len(stem.split(".")) > 2, ".safetensors" not in p.name.lower(), p in single, p.name

    return sorted(indices + single, key=order)


def index_of(path: Path) -> Path | None:
    """The index that a shard (model-00001-of-00003.safetensors, model.fp16-00001-of-00003.safetensors) belongs to."""
    if not re.search(r"-\d{5}-of-\d{5}\.", path.name):
        return None
    indices = sorted(path.parent.glob("*.json"))
    return next((p for p in indices if ckpt.is_index(p) and path.name in ckpt.names_in(p)), None)


def read(path: Path, trust: bool = False) -> Weights:
    """Read everything in a weights file. Nothing in it is executed unless `trust` (see reading.read)."""
    beside = read_json(path.parent / "config.json")
    state: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for part in ckpt.shards_of(path) if ckpt.is_index(path) else [path]:
        if reading.kind_of(part) == "safetensors":
            tensors, more = ckpt.read_tensors(part)
            state, metadata = {**state, **tensors}, {**metadata, **more}
        else:
            state |= contents(reading.read(part, trust))
    if "vgm.component" in metadata:
        return Weights(path, {"": state}, metadata, beside)
    entries, remarks = nested.entries(state, path)
    return Weights(path, entries, metadata, beside, remarks)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = limits.parse_json(limits.read_text(path), str(path))
    except (OSError, ValueError, VgmError):
        return {}
    return found if isinstance(found, dict) else {}


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
    """Write a state in the format that the file's suffix means, atomically, and return the files, the one to open first
    at the front.

    A .safetensors file above `limit` bytes becomes shards and an index, which is written last. wrapper: the entry of a
    torch file that keeps the state.
    """
    writable(path)
    own = separate(state)
    suffix = path.suffix.lower()
    if suffix in reading.TORCH_FILES:
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


class Remembering:
    """A file that remembers the first error of writing. torch's writer replaces such errors (disk full) by its own."""

    def __init__(self, f: Any):
        self.f, self.flush = f, f.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> Any:
        try:
            return self.f.write(data)
        except OSError as e:
            self.error = e
            raise


def save_torch(content: Mapping[str, Any], path: Path) -> None:
    with atomic.replacing(path) as temp, open(temp, "wb") as f:
        kept = Remembering(f)
        try:
            torch.save(dict(content), kept)  # type: ignore[arg-type]
        except RuntimeError as e:
            raise kept.error or OSError(errno.EIO, str(e).splitlines()[0]) from e


def save_arrays(state: State, path: Path) -> None:
    import numpy as np

    low = [k for k, v in state.items() if v.dtype == torch.bfloat16]
    if low:
        raise VgmError(f".npz has no bfloat16 ({low[0]})", "--dtype fp32, or a .safetensors file", USAGE)
    with atomic.replacing(path) as temp, open(temp, "wb") as f:
        np.savez(f, **{k: v.numpy() for k, v in state.items()})  # type: ignore[arg-type]


def save_shards(state: State, path: Path, metadata: Mapping[str, str], limit: int) -> list[Path]:
    """Write STEM-00001-of-0000N.safetensors and so on, then STEM.safetensors.index.json, which makes them the file.

    Each shard carries the header. New shards are called STEM.2-00001-of-… where old ones exist, which stay until the
    index names the new ones.
    """
    pieces = list(shards(state, limit))
    for stem in itertools.chain([path.stem], (f"{path.stem}.{n}" for n in itertools.count(2))):
        files = [path.with_name(f"{stem}-{i:05d}-of-{len(pieces):05d}{path.suffix}") for i in range(1, len(pieces) + 1)]
        if not any(f.exists() for f in files):
            break
    index = path.with_name(path.name + INDEX)
    try:
        for file, piece in zip(files, pieces):
            atomic.save_safetensors(piece, file, {"format": "pt", **metadata})
        atomic.write_json(
            index,
            {
                "metadata": {"total_size": size_of(state)},
                "weight_map": {k: file.name for file, piece in zip(files, pieces) for k in piece},
            },
        )
    except BaseException:
        if not index.is_file() or files[0].name not in ckpt.names_in(index):
            for file in files:
                file.unlink(missing_ok=True)
        raise
    return [index, *files]


def remove_older(path: Path, files: Sequence[Path]) -> None:
    """Remove files that an earlier conversion left under this name and the new one (`files`) did not replace. The
    index goes before its shards, so that an interruption leaves no index without shards."""
    index = path.with_name(path.name + INDEX)
    pattern = re.compile(rf"{re.escape(path.stem)}(\.\d+)?-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}")
    found = [p for p in sorted(path.parent.iterdir()) if pattern.fullmatch(p.name)]
    for old in (index, path, *found):
        if old not in files and old.is_file():
            try:
                old.unlink(missing_ok=True)
            except OSError as e:
                ui.warn(f"{old} is of an earlier conversion and could not be removed: {e.strerror}")
    atomic.sync_folder(path.parent)
