"""Self-describing weights: one .safetensors file is enough to build the network again, sample from it, distill from it.

Header (all strings, values JSON): `vgm.component` {kind, name, kwargs}, `vgm.view` (how a sampler sees the network),
`vgm.codec` (reference), `vgm.recipe`, `vgm.data`, `vgm.step`, `vgm.images`, `vgm.weights` (raw or the average's name),
beside the ModelSpec keys. Nothing is ever unpickled here.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vgm_cli import __version__, atomic, foreign, limits
from vgm_cli.engine.budget import building
from vgm_cli.engine.run import complete, newest
from vgm_cli.engine.tokens import as_output
from vgm_cli.errors import FAILED, MISSING_ASSET, USAGE, VgmError
from vgm_cli.limits import short
from vgm_cli.registry import registry
from vgm_cli.ui import ui

SCHEMA = 1
ASSETS = Path(str(resources.files("vgm_cli"))) / "assets"


@dataclass
class Header:
    """What a weights file says of itself."""

    component: dict[str, Any]
    view: dict[str, Any] | None = None
    codec: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    images: int = 0
    weights: str = "raw"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_codec(self) -> bool:
        """It reconstructs and does not generate: a codec by its kind, or a network trained to be one."""
        return self.component.get("kind") == "codec" or (self.view or {}).get("name") == "codec"

    def metadata(self, title: str = "") -> dict[str, str]:
        values = {
            "schema": SCHEMA,
            "version": __version__,
            "component": self.component,
            "view": self.view,
            "codec": self.codec,
            "recipe": self.recipe,
            "data": self.data,
            "step": self.step,
            "images": self.images,
            "weights": self.weights,
            **self.extra,
        }
        spec = {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{self.component.get('name')}",
            "modelspec.implementation": "vgm",
            "modelspec.title": title or str(self.recipe.get("paper") or self.component.get("name")),
            "modelspec.date": time.strftime("%Y-%m-%d"),
        }
        return spec | {f"vgm.{k}": atomic.dump_json(v) for k, v in values.items()}

    @classmethod
    def parse(cls, metadata: Mapping[str, str], path: Path) -> Header:
        said = foreign.header(metadata, path)
        registry().note(said, str(path))
        known = {k: said[k] for k in ("component", "view", "codec", "step", "images", "weights") if k in said}
        return cls(**known, recipe=said.get("recipe") or {}, data=said.get("data") or {})


def save_network(path: Path, state: Mapping[str, Tensor], header: Header) -> None:
    """Write one self-describing file atomically; tensors are made contiguous and unshared."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    seen: dict[int, str] = {}
    for k, v in tensors.items():  # safetensors refuses shared storage
        if v.numel() and v.data_ptr() in seen:
            tensors[k] = v.clone()
        seen[v.data_ptr()] = k
    atomic.save_safetensors(tensors, path, header.metadata())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of any .safetensors file or index of shards; a truncated or foreign file is one sentence."""
    if not path.is_file():
        raise VgmError(f"no such file: {path}", code=USAGE)
    if is_index(path):
        parts = [read_tensors(p) for p in shards_of(path)]
        return {k: v for tensors, _ in parts for k, v in tensors.items()}, parts[0][1]
    limits.safetensors_header(path)
    try:
        with atomic.open_safetensors(path) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})
    except (SafetensorError, OSError, ValueError) as e:
        raise VgmError(
            f"{path} is not a readable safetensors file: {str(e).splitlines()[0]}",
            "it may be cut off; an official .pt or .ckpt goes through `vgm convert`",
            FAILED,
        ) from e


def is_index(path: Path) -> bool:
    """An index of shards: STEM.safetensors.index.json, of a variant STEM.safetensors.fp16.index.json or the like."""
    return re.search(r"\.index(\.\w+)?\.json$", path.name) is not None


def names_in(index: Path) -> list[str]:
    """Names of the files in an index of shards; none where it is no index."""
    try:
        found = limits.parse_json(limits.read_text(index), str(index))["weight_map"].values()
        return sorted({str(n) for n in found})
    except (VgmError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def shards_of(index: Path) -> list[Path]:
    """Files that an index of shards names. VgmError: it is no index, or a file is missing."""
    names = names_in(index)
    if not names:
        raise VgmError(f"{index} is not an index of shards", 'it holds {"weight_map": {...}}', FAILED)
    files = [index.parent / n for n in names]
    missing = [f.name for f in files if not f.is_file() or f.name != str(f.relative_to(index.parent))]
    if missing:
        raise VgmError(f"{index} names files that are not there: {', '.join(missing)}", code=FAILED)
    return files


def read_header(path: Path) -> Header:
    if is_index(path):
        path = shards_of(path)[0]
    return Header.parse(limits.safetensors_header(path)[1], path)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, 16 hexadecimal digits."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()[:16]


# -- finding weights -------------------------------------------------------------------------------------------------


def resolve(target: str | Path, weights: str | None = None) -> Path:
    """RUN, RUN/checkpoints/step-N, a file, or a short name of the newest run (engine.run.newest) -> the weights file.
    weights: "raw", an average's name, None: the first average, else raw."""
    path = Path(target)
    if path.is_file():
        return path
    if not path.exists():
        asset = ASSETS / f"{target}.safetensors"
        if asset.is_file():
            return asset
        path = newest(target) or path
        if not path.exists():
            raise VgmError(f"no such run or checkpoint: {target}", "`vgm runs ls` shows the runs below ./runs", USAGE)
        ui.info(f"{target}: the newest run is {path}")
    folder = path
    if not (path / "model.safetensors").is_file():
        base = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        steps = complete(base)
        if not steps and (found := newest(path)) not in (None, path):
            ui.info(f"{target}: the newest run is {found}")
            return resolve(str(found), weights)
        if not steps:
            raise VgmError(f"{target} holds no complete checkpoint", "train it, or pass a .safetensors file", USAGE)
        folder = steps[-1]
    files = sorted(p.stem for p in folder.glob("*.safetensors") if p.stem == "model" or p.stem.startswith("ema-"))
    if weights is None:
        name = next((f for f in files if f.startswith("ema-")), "model")
    else:
        name = "model" if weights == "raw" else weights
        if name not in files:
            have = ", ".join("raw" if f == "model" else f for f in files)
            raise VgmError(f"{folder} has no weights '{weights}'", f"it has {have}", USAGE)
    return folder / f"{name}.safetensors"


@dataclass
class Loaded:
    """A network brought back: `model` in eval mode, `view` what a sampler takes, `codec` or None."""

    model: nn.Module
    view: Any
    codec: Any
    header: Header
    path: Path

    def sha256(self) -> str:
        """Of the weights' file."""
        return file_hash(self.path) if self.path.is_file() else ""


def load(
    target: str | Path, weights: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """Build network, view and codec from a run, a checkpoint folder or one file."""
    path = resolve(target, weights)
    tensors, metadata = read_tensors(path)
    header = Header.parse(metadata, path)
    refuse_non_finite(tensors, path)
    model = build_with_weights(header.component, tensors, path)
    model.eval().requires_grad_(False).to(device)
    if dtype is not None:
        model.to(dtype)
    codec = load_codec(header.codec, path, device) if header.codec else None
    return Loaded(model, build_view(model, header.view), codec, header, path)


def build_with_weights(component: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Construct on the meta device (no wasted initialisation), then assign the stored tensors strictly."""
    keywords = component.get("kwargs", {})
    foreign.tell_files(keywords, path)
    node = {**keywords, "name": component["name"]}
    try:
        with torch.device("meta"), building(f"{path}: {short(component['name'])}", tensors):
            model = registry().build(component.get("kind", "model"), node)
        model.state_dict()
    except VgmError:
        raise
    except Exception as e:  # a constructor's own complaint about what a stranger's header says
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise VgmError(f"{path}: {component['name']} cannot be built as its header says: {reason}", code=FAILED) from e
    state = {k: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for k, v in tensors.items()}
    check_fit(model, state, path, component["name"])
    model.load_state_dict(state, assign=True)
    lost = [n for n, b in model.named_buffers() if b.is_meta]  # non-persistent buffers are not stored
    if lost:
        fresh = registry().build(component.get("kind", "model"), node)
        fresh.load_state_dict(state, assign=True)
        return fresh
    return model


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: Path, name: str, code: int = FAILED) -> None:
    """VgmError: the state is not that of this network, whose component is `name`."""
    wanted = model.state_dict()
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected:
        raise VgmError(
            f"{path} does not fit {name}: {len(missing)} tensors missing, {len(unexpected)} unexpected",
            f"first: {sorted(missing | unexpected)[0]}",
            code,
        )
    for k, v in wanted.items():
        if v.shape != state[k].shape:
            raise VgmError(
                f"{path} does not fit {name}: {k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}", code=code
            )


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinities, each read once."""
    return [k for k, v in tensors.items() if not all_finite(v)]


def all_finite(v: Tensor) -> bool:
    if v.is_meta or not (v.is_floating_point() or v.is_complex()):
        return True
    if v.element_size() == 1:  # float8 has no arithmetic
        v = v.float()
    total = v.sum(dtype=torch.float32 if v.element_size() < 4 else None)
    return bool(total.isfinite()) or bool(v.isfinite().all())  # a sum of finite values may overflow


def refuse_non_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """VgmError: a tensor holds NaN or infinities; a network of them gives black images."""
    name = next((k for k, v in tensors.items() if not all_finite(v)), None)
    if name is not None:
        what = "NaN" if bool(tensors[name].isnan().any()) else "infinite values"
        raise VgmError(f"{path} holds {what}: {name}", f"`vgm inspect {path}` counts such tensors", FAILED)


def build_view(model: nn.Module, view: Mapping[str, Any] | None) -> Any:
    """What the sampler is handed: the registered view that a header names (by default a Denoiser), or the network."""
    if not view or view.get("name") == "codec":
        return model
    if "network" in view:
        raise VgmError("a view is told how to look at a network, not which", "leave view.network away", USAGE)
    return registry().build("view", {"name": "denoiser", **view}, network=model)


def check_view(view: Mapping[str, Any] | None) -> None:
    """VgmError: a checkpoint could not be read back, because its view is not registered."""
    if view and view.get("name") != "codec":
        registry().find("view", view.get("name", "denoiser"))


# -- codecs ----------------------------------------------------------------------------------------------------------


def codec_reference(path: Path, base: Path | None = None, output: str | None = None) -> dict[str, Any]:
    """How a checkpoint names its codec: by asset name, or by path (relative to the run where possible) and hash; and
    what it gives, where that is not its latents."""
    more = {} if output in (None, "latents") else {"output": output}
    if path.parent == ASSETS:
        return {"asset": path.stem, "sha256": file_hash(path), **more}
    shown = path.resolve()
    inside = base is not None and base.resolve() in shown.parents
    return {
        "path": str(shown.relative_to(base.resolve())) if inside and base else str(shown),
        "relative": inside,
        "sha256": file_hash(path),
        **more,
    }


def codec_key(ref: Mapping[str, Any]) -> str:
    """What a cache of the codec's output is tied to: its hash, and the kind of output where that is not latents."""
    return f"{ref['sha256']}:{ref['output']}" if "output" in ref else str(ref["sha256"])


def codec_path(ref: Mapping[str, Any], origin: Path) -> Path:
    """The file of the codec that `origin`'s header refers to; refused when its bytes are not those of training.

    A file outside the run (or the folder) of `origin` must have the hash that the header says, and is told.
    """
    near = False
    if ref.get("asset") is not None:
        path, near = ASSETS / f"{Path(ref['asset']).name}.safetensors", True
    elif ref.get("path") is None:
        raise VgmError(f"{origin} refers to a codec without saying which", code=FAILED)
    elif ref.get("relative"):
        if Path(ref["path"]).is_absolute() or ".." in Path(ref["path"]).parts:
            raise VgmError(f"{origin} refers to the codec {ref['path']}, which does not lie beside it", code=FAILED)
        tried = [p / ref["path"] for p in origin.resolve().parents[:4]]
        path = next((p for p in tried if os.path.isfile(p)), tried[0])
    else:
        path = Path(ref["path"])
    if not os.path.isfile(path):
        raise VgmError(f"the codec of {origin.name} is missing: {path}", "keep it with the run", MISSING_ASSET)
    near = near or folder_of(origin) in path.resolve().parents
    if not near and not ref.get("sha256"):
        raise VgmError(f"{origin} refers to {path} without its hash", "keep the codec beside it", FAILED)
    if ref.get("sha256") and file_hash(path) != ref["sha256"]:
        raise VgmError(f"the codec {path} is not the one {origin.name} was trained with", code=FAILED)
    if not near:
        ui.info(f"codec: {path}, as {origin} says")
    return path


def folder_of(weights: Path) -> Path:
    """The run that a weights file belongs to, or the folder it lies in."""
    folder = weights.resolve().parent
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder


def load_codec(ref: Mapping[str, Any], origin: Path, device: torch.device | str = "cpu") -> Any:
    """The frozen codec that `origin`'s header refers to."""
    return read_codec(codec_path(ref, origin), device, ref.get("output"))


def read_codec(path: Path, device: torch.device | str = "cpu", output: str | None = None) -> Any:
    """A frozen codec from its file. output: "tokens" for what a token model sees."""
    tensors, metadata = read_tensors(path)
    header = Header.parse(metadata, path)
    if not header.is_codec:
        raise VgmError(f"{path} is no codec but {header.component['name']}", "`vgm ls codecs` names the codecs", USAGE)
    refuse_non_finite(tensors, path)
    codec = build_with_weights(header.component, tensors, path)
    return as_output(codec.eval().requires_grad_(False).to(device), output)
