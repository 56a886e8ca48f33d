"""Self-describing weights: one .safetensors file is enough to build the network again, sample from it, distill from it.

Header (all strings, values JSON): `vgm.component` {kind, name, kwargs}, `vgm.view` (how a sampler sees the network),
`vgm.parts` {role: reference} (other files that it needs, such as its codec), `vgm.conditions` (what the network is
told, by name), `vgm.recipe`, `vgm.data`, `vgm.step`, `vgm.images`, `vgm.weights` (raw or the average's name), beside
the ModelSpec keys. Nothing is ever unpickled here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vgm_cli import __version__, atomic, foreign, limits, renamed
from vgm_cli.conditioning import Conditions, build_parts
from vgm_cli.engine.budget import building
from vgm_cli.engine.parts import ASSETS, Reference, file_hash, leave_out, locate, refer
from vgm_cli.engine.run_files import complete, newest
from vgm_cli.engine.tokens import as_output
from vgm_cli.errors import FAILED, MISSING_ASSET, USAGE, VgmError
from vgm_cli.limits import short
from vgm_cli.nn.meta import on_meta
from vgm_cli.registry import registry
from vgm_cli.ui import ui

SCHEMA = 1


@dataclass
class Header:
    """What a weights file states about itself, in its safetensors metadata."""

    component: dict[str, Any]
    view: dict[str, Any] | None = None
    parts: dict[str, Reference] = field(default_factory=dict)  # by role: "codec", what the network was given
    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    images: int = 0
    weights: str = "raw"
    extra: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] | None = None  # {name: node}; None: see renamed.conditions_of

    @property
    def is_codec(self) -> bool:
        """Whether this is a first stage, which reconstructs images and does not generate any: a component of kind
        codec, or a network that was trained to be one."""
        return self.component.get("kind") == "codec" or (self.view or {}).get("name") == "codec"

    def metadata(self, title: str = "") -> dict[str, str]:
        values = {
            "schema": SCHEMA,
            "version": __version__,
            "component": self.component,
            "view": self.view,
            "parts": {role: ref.record() for role, ref in self.parts.items()},
            "conditions": self.conditions,
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
        known = {k: said[k] for k in ("component", "view", "conditions", "step", "images", "weights") if k in said}
        parts = {role: Reference.parse(ref) for role, ref in (said.get("parts") or {}).items()}
        if odd := [role for role in parts if not role.isidentifier() or role in ("kind", "node")]:
            raise VgmError(f"{path}: {short(odd[0])} is no name of a part", code=FAILED)
        return cls(**known, parts=parts, recipe=said.get("recipe") or {}, data=said.get("data") or {})


def save_network(path: Path, state: Mapping[str, Tensor], header: Header) -> None:
    """Write one weights file with its header, atomically. Tensors are made contiguous, and copied where they share
    memory."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    storages: set[int] = set()
    for k, v in tensors.items():  # safetensors refuses shared storage
        if v.numel() and v.data_ptr() in storages:
            tensors[k] = v.clone()
        storages.add(v.data_ptr())
    atomic.save_safetensors(tensors, path, header.metadata())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read (tensors, header) of a .safetensors file or of an index of shards. VgmError: the file is cut off or not
    ours."""
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
    """Whether a file is an index of shards: STEM.safetensors.index.json, or with a variant,
    STEM.safetensors.fp16.index.json."""
    return re.search(r"\.index(\.\w+)?\.json$", path.name) is not None


def names_in(index: Path) -> list[str]:
    """File names in an index of shards; none if the file is not an index."""
    try:
        shards = limits.parse_json(limits.read_text(index), str(index))["weight_map"].values()
        return sorted({str(n) for n in shards})
    except (VgmError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def shards_of(index: Path) -> list[Path]:
    """Paths of the shards that an index names. VgmError: the file is not an index, or a shard is missing."""
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


# -- finding weights -------------------------------------------------------------------------------------------------


def resolve(target: str | Path, weights: str | None = None) -> Path:
    """The weights file that a target means: RUN, RUN/checkpoints/step-N, a file, or a short name of the newest run
    (`run_files.newest`). weights: "raw", an average's name, None: the first average, else raw."""
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
        if not steps and (latest := newest(path)) not in (None, path):
            ui.info(f"{target}: the newest run is {latest}")
            return resolve(str(latest), weights)
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
    """A network brought back from its file, frozen."""

    model: nn.Module
    view: Any  # what a sampler takes: the view that the header names around the network, or the network itself
    codec: Any  # None in pixel space
    header: Header
    path: Path
    roles: dict[str, Any] = field(default_factory=dict)  # what a sampler's constructor receives by parameter name
    conditions: Conditions = field(default_factory=Conditions)  # what the network is told

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
    codec = load_codec(header, path, device)
    parts = {r: load(locate(ref, path, r), None, device) for r, ref in header.parts.items() if r != "codec"}
    given = {"codec": codec} if codec is not None else {}
    given |= {role: part.model for role, part in parts.items()}
    model = build_with_weights(header.component, tensors, path, given)
    model.eval().requires_grad_(False).to(device)
    if dtype is not None:
        model.to(dtype)
    views, conditions = {r: p.view for r, p in parts.items()}, load_conditions(header, path, model, device, codec)
    return Loaded(model, build_view(model, header.view), codec, header, path, views, conditions)


def load_conditions(
    header: Header, path: Path, model: nn.Module, device: torch.device | str = "cpu", codec: Any = None
) -> Conditions:
    """What the network is told, as its header says. An encoder that was trained with it lies in a file beside it."""
    nodes = header.conditions
    if nodes is None:
        nodes = renamed.conditions_of(header.component, header.recipe)
    if odd := [name for name in nodes if not re.fullmatch(r"[\w-]+", name)]:
        raise VgmError(f"{path}: {short(odd[0])} is no name of a condition", code=FAILED)
    nodes = {k: {key: v for key, v in node.items() if key not in ("items", "weights")} for k, node in nodes.items()}
    foreign.tell_files(nodes, path)
    conditions = Conditions(build_parts(nodes, header.data, codec), model)
    for name, encoder in conditions.networks.items():
        file = encoder_file(path, name)
        tensors, metadata = read_tensors(file)
        first = shards_of(path)[0] if is_index(path) else path
        if metadata.get("vgm.checkpoint") != limits.safetensors_header(first)[1].get("vgm.checkpoint"):
            raise VgmError(f"{file} is of another checkpoint than {path.name}", "keep both files together", FAILED)
        check_fit(encoder, tensors, file, name)
        refuse_non_finite(tensors, file)
        encoder.load_state_dict(tensors)
        encoder.eval().requires_grad_(False).to(device)
        conditions.parts[name].trained = False  # from here on each item is encoded once
    return conditions


def encoder_file(path: Path, name: str) -> Path:
    """The file of an encoder that a network was trained with: MODEL.NAME.safetensors beside it, or NAME.safetensors.
    VgmError (code 4): there is none."""
    stem = path.name.partition(".safetensors")[0]
    files = [path.parent / f"{stem}.{name}.safetensors", path.parent / f"{name}.safetensors"]
    if (file := next((f for f in files if f.is_file()), None)) is None:
        message = f"the encoder that {path.name} was trained with is missing: {files[-1].name}"
        raise VgmError(message, f"keep it beside {path.name}", MISSING_ASSET)
    return file


def outline(path: Path) -> tuple[nn.Module, Any]:
    """The network of a weights file and its view, built on the meta device: shapes without values."""
    header = read_header(path)
    given: dict[str, Any] = {}
    for role, ref in header.parts.items():
        if role != "codec":
            given[role] = outline(locate(ref, path, role))[0]
    with on_meta(), building(f"{path}: {short(header.component['name'])}"):
        node = {**header.component.get("kwargs", {}), "name": header.component["name"]}
        network = registry().build(header.component.get("kind", "model"), node, **given)
    return network, build_view(network, header.view)


def build_with_weights(
    component: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, given: Mapping[str, Any] | None = None
) -> nn.Module:
    """Construct the network on the meta device, which skips initialisation, and assign the stored tensors strictly.

    given: networks that the constructor receives, by role.
    """
    keywords = component.get("kwargs", {})
    foreign.tell_files(keywords, path)
    node = {**keywords, "name": component["name"]}
    try:
        with on_meta(), building(f"{path}: {short(component['name'])}", tensors):
            model = registry().build(component.get("kind", "model"), node, **(given or {}))
        leave_out(model, given or {})
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
        fresh = registry().build(component.get("kind", "model"), node, **(given or {}))
        leave_out(fresh, given or {})
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
    """Names of the tensors that hold NaN or infinities."""
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
    """What a sampler receives: the registered view that the header names (a Denoiser where it names none), around the
    network; or the bare network where there is no view."""
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


def load_codec(header: Header, origin: Path, device: torch.device | str = "cpu") -> Any:
    """The frozen codec that the header of the file `origin` refers to, or None."""
    ref = header.parts.get("codec")
    return None if ref is None else read_codec(locate(ref, origin, "codec"), device, ref.output)


def refer_codec(path: Path, base: Path | None = None, output: str | None = None) -> Reference:
    """The reference to a codec's file, see parts.refer."""
    return refer(path, read_header(path).component["name"], base, output)


def check_codec(header: Header, path: Path) -> None:
    """VgmError: the file holds something else than a codec."""
    if not header.is_codec:
        raise VgmError(f"{path} is no codec but {header.component['name']}", "`vgm ls codecs` names the codecs", USAGE)


def read_codec(path: Path, device: torch.device | str = "cpu", output: str | None = None) -> Any:
    """Read a frozen codec from its file. output: "tokens" wraps it so that it gives ids, as token models need."""
    tensors, metadata = read_tensors(path)
    header = Header.parse(metadata, path)
    check_codec(header, path)
    refuse_non_finite(tensors, path)
    codec = build_with_weights(header.component, tensors, path)
    return as_output(codec.eval().requires_grad_(False).to(device), output or None)
