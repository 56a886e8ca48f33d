"""What files from elsewhere say of themselves is checked before it is used: every entry is of its type, and what it
names outside is told or refused. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from vgm_cli import limits, renamed
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.registry import strings
from vgm_cli.ui import ui


def fields() -> dict[str, dict[str, Any]]:
    """{kind of file: {dotted key: type}} of what is read from it; "*" stands for every key of a mapping. Keys that are
    not listed are records."""
    from pydantic import Field, FiniteFloat

    count, size = Annotated[int, Field(ge=0)] | None, Annotated[int, Field(gt=0)] | None
    mapping, text = dict[str, Any], str | None
    sampling = {"sampler": mapping | None, "sampler.name": str, "guidance_scale": FiniteFloat | None}
    header = {
        "component": mapping,
        "component.name": str,
        "component.kind": Literal["model", "codec", "condition"],
        "component.kwargs": mapping,
        "view": mapping | None,
        "view.name": str,
        "parts": mapping | None,
        "parts.*": mapping,
        **{f"parts.*.{k}": text for k in ("asset", "path", "sha256", "component", "output")},
        "parts.*.relative": bool,
        "conditions": dict[str, dict[str, Any]] | None,
        "recipe": mapping | None,
        **{f"recipe.{k}": v for k, v in sampling.items()},
        "recipe.paper": text,
        **{f"recipe.{k}": mapping | None for k in ("data", "train", "objective", "model", "roles")},
        "recipe.data.path": text,
        "recipe.train.precision": str,
        "data": mapping | None,
        **{f"data.{k}": size for k in ("image_size", "image_channels", "size", "channels")},
        **{f"data.{k}": count for k in ("num_classes", "vocab_size", "count")},
        "data.sample_shape": list[Annotated[int, Field(gt=0)]] | None,
        "data.class_names": list[str] | None,
        "data.columns": dict[str, Literal[1, 3]] | None,
        "data.words": list[str] | None,
        "data.root": text,
        "step": Annotated[int, Field(ge=0)],
        "images": Annotated[int, Field(ge=0)],
        "weights": str,
    }
    picture = {
        "model": str,
        "weights": str,
        "sha256": str,
        "step": count,
        "n": Annotated[int, Field(gt=0)],
        "seed": int,
        "labels": list[int],
        "words": dict[str, list[str]] | None,
        "negative": dict[str, list[str]] | None,
        "conditions": mapping | None,
        "steps": size | str,  # a spacing such as "ddim50"
        "asked": list[str],
        "input": text,
        "mask": text,
        "precision": Literal["fp32", "bf16"],
        "batch_size": Annotated[int, Field(gt=0)],
        "guidance_interval": Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None,
        **sampling,
    }
    features = {"features": text, "features_kind": text, "features_sha256": text, "features_dim": size, "resize": text}
    reference = {"reference": text, "reference_fingerprint": text, "reference_subset": text}
    shape = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)] | None
    statistics = {**features, **reference, "reference_shape": shape}
    result = {
        "metric": str,
        "value": float | None,
        "uncertainty": FiniteFloat | None,
        "n": count,
        "n_reference": count,
        "protocol": mapping,
        "protocol.options": mapping | None,
    }
    return {"header": header, "picture": picture, "statistics": statistics, "result": result}


@cache
def adapters(kind: str) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return {key: TypeAdapter(of) for key, of in fields()[kind].items()}


def check(values: Any, kind: str, source: Path | str, prefix: str = "") -> dict[str, Any]:
    """The values themselves. VgmError: they are no mapping, or an entry is of another type than it should be."""
    from pydantic import ValidationError

    if not isinstance(values, dict):
        raise VgmError(f"{source} does not hold named values but {type(values).__name__}", code=FAILED)
    for pattern, adapter in adapters(kind).items():
        for key, value in entries(values, pattern):
            try:
                adapter.validate_python(value, strict=True)
            except ValidationError as e:
                shown, reason = limits.short(value), e.errors()[0]["msg"].lower()
                raise VgmError(f"{source}: {prefix}{key}={shown} does not fit: {reason}", code=FAILED) from e
    return values


def entries(values: Mapping[str, Any], pattern: str) -> list[tuple[str, Any]]:
    """[(dotted key, value)] of the entries that a dotted pattern means; none where they are not there."""
    found: list[tuple[str, Any]] = [("", values)]
    for name in pattern.split("."):
        inside = [(above, node) for above, node in found if isinstance(node, dict)]
        found = [
            (f"{above}.{limits.short(k)}".lstrip("."), node[k])
            for above, node in inside
            for k in (node if name == "*" else [name] if name in node else [])
        ]
    return found


def header(metadata: Mapping[str, str], source: Path | str) -> dict[str, Any]:
    """What a checkpoint says of itself: {entry: value}. VgmError: nothing, or nothing that can be understood."""
    own = {k: v for k, v in metadata.items() if k.startswith("vgm.")}
    said = {k[4:]: limits.parse_json(v, f"{source}: its header entry {limits.short(k)}") for k, v in own.items()}
    if not isinstance(said.get("component"), dict) or "name" not in said["component"]:
        hint = "a foreign checkpoint is made self-describing by `vgm convert`"
        if Path(source).name == "trainer.safetensors":
            hint = "training goes on from it; the network lies beside it, in model.safetensors"
        raise VgmError(f"{source} does not say what network it holds", hint, FAILED)
    return check(renamed.header(said), "header", source, "vgm.")


def tell_files(keywords: Any, source: Path | str) -> None:
    """Say which files a header's keywords name besides the one it stands in. VgmError: a device or a pipe."""
    for text in sorted({s for s in strings(keywords) if os.path.exists(s)}):
        if not os.path.isfile(text) and not os.path.isdir(text):
            raise VgmError(f"{source} names {text}, which is no file", code=FAILED)
        ui.info(f"{source} also names {text}")
