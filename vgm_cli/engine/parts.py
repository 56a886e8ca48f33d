"""Other weights files that a checkpoint needs, named by where they lie and by the hash of their bytes.

A network that works on latents needs its frozen codec; a network that was given another network (the frozen base of a
ControlNet) needs that one. Neither is copied into the checkpoint: its header refers to the file, and nothing is built
of a file whose bytes are not those of training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from vgm_cli.errors import FAILED, MISSING_ASSET, VgmError
from vgm_cli.ui import ui

ASSETS = Path(str(resources.files("vgm_cli"))) / "assets"


@dataclass(frozen=True)
class Reference:
    """Which file a role is filled from."""

    path: str = ""  # absolute, or below the folder of the checkpoint's run where `relative` says so; "" of an asset
    sha256: str = ""  # the first 16 digits of the hash of its bytes
    component: str = ""  # name of the registered component that it holds; "" in files of older versions
    asset: str = ""  # name of weights that come with this package, in place of a path
    relative: bool = False
    output: str = ""  # what is asked of a codec: "tokens", or "" for its latents

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> Reference:
        """A reference as a header holds it; entries that are null or unknown are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in said.items() if k in known and v is not None})

    def record(self) -> dict[str, Any]:
        """The reference as a header holds it: without what is empty."""
        return {k: v for k, v in asdict(self).items() if v}

    @property
    def cache_key(self) -> str:
        """The key of caches of this codec's output: its hash, and ":tokens" or the like where the output is not
        latents."""
        return f"{self.sha256}:{self.output}" if self.output else self.sha256


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, 16 hexadecimal digits."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()[:16]


def refer(path: Path, component: str, base: Path | None = None, output: str | None = None) -> Reference:
    """The reference to a weights file: by asset name, or by its hash and its path, relative where it lies below `base`,
    the folder of the run that refers to it. output: what a codec is asked for, see Reference."""
    asked = "" if output in (None, "latents") else str(output)
    digest = file_hash(path)
    if path.parent == ASSETS:
        return Reference(asset=path.stem, sha256=digest, component=component, output=asked)
    shown = path.resolve()
    inside = base is not None and base.resolve() in shown.parents
    return Reference(
        path=str(shown.relative_to(base.resolve())) if inside and base else str(shown),
        sha256=digest,
        component=component,
        relative=inside,
        output=asked,
    )


def in_run(ref: Reference, origin: Path) -> Path:
    """Where a relative path that the checkpoint `origin` refers to leads: below the nearest of the folders above it."""
    places = [p / ref.path for p in origin.resolve().parents[:4]]
    return next((p for p in places if os.path.isfile(p)), places[0])


def locate(ref: Reference, origin: Path, role: str) -> Path:
    """The file that the header of the checkpoint `origin` refers to as its `role`.

    A file that has moved is looked for as ROLE.safetensors beside the run of `origin`. A file outside the folder of
    `origin` must have the hash that the header says, and is told. VgmError: it is missing, its bytes are not those of
    training, or the header does not say enough to know.
    """
    own = folder_of(origin)
    near = False
    if ref.asset:
        path, near = ASSETS / f"{Path(ref.asset).name}.safetensors", True
    elif not ref.path:
        raise VgmError(f"{origin} refers to a {role} without saying which", code=FAILED)
    elif ref.relative:
        if Path(ref.path).is_absolute() or ".." in Path(ref.path).parts:
            raise VgmError(f"{origin} refers to the {role} {ref.path}, which does not lie beside it", code=FAILED)
        path = in_run(ref, origin)
    else:
        path = Path(ref.path)
    beside = own / f"{role}.safetensors"
    if not os.path.isfile(path) and os.path.isfile(beside) and beside != origin.resolve():
        path = beside
    if not os.path.isfile(path):
        hint = f"put it back, or copy it to {beside}: its hash is compared"
        raise VgmError(f"the {role} of {origin.name} is missing: {path}", hint, MISSING_ASSET)
    near = near or own in path.resolve().parents
    if not near and not ref.sha256:
        raise VgmError(f"{origin} refers to {path} without its hash", f"keep the {role} beside it", FAILED)
    if ref.sha256 and file_hash(path) != ref.sha256:
        raise VgmError(f"the {role} {path} is not the one {origin.name} was trained with", code=FAILED)
    if not near:
        ui.once(f"{role} {path}", f"{role}: {path}, as {origin} says")
    return path


def folder_of(weights: Path) -> Path:
    """The run that a weights file belongs to, or the folder it lies in."""
    folder = weights.resolve().parent
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder


# -- networks inside networks ----------------------------------------------------------------------------------------


def freeze(network: nn.Module) -> nn.Module:
    """The same network without gradients and in evaluation mode, where it stays: `train()` of a network that holds it
    does not reach it (its dropout would otherwise be switched on by the trainer)."""
    network.eval().requires_grad_(False)
    network.train = MethodType(lambda self, mode=True: self, network)  # type: ignore[method-assign]
    return network


def leave_out(network: nn.Module, parts: Mapping[str, Any]) -> None:
    """Take the networks of `parts` that `network` holds out of its state.

    From here on `network.state_dict()` has the network's own tensors alone, and `load_state_dict` wants these alone, so
    that checkpoints, averages and resuming leave to the part's own file what never changes.
    """
    held = {id(p) for p in parts.values() if isinstance(p, nn.Module)}
    names = [n for n, m in network.named_modules(remove_duplicate=False) if n and id(m) in held]
    if not names:
        return

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        inside = tuple(f"{prefix}{n}." for n in names)
        for key in [k for k in state if k.startswith(inside)]:
            del state[key]

    def fill(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for n in names:
            for key, value in module.get_submodule(n).state_dict().items():
                state[f"{prefix}{n}.{key}"] = value

    network.register_state_dict_post_hook(drop)
    network.register_load_state_dict_pre_hook(fill)
