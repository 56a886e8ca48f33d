"""One recipe on top of another: files, KEY=VALUE from the command line and the environment, and the origin of each."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from vgm_cli import renamed
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import shown
from vgm_cli.registry import registry
from vgm_cli.settings import COMPONENT_NODES, ELSEWHERE, NO_DATA_HINT, NODES, STARTS, TOP
from vgm_cli.yaml_text import parse_yaml

SHORT = {**dict.fromkeys((*COMPONENT_NODES, "optimizer"), "name"), "data": "path"}  # KEY=WORD means KEY.FIRST=WORD


def verbs_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The verbs that offer a recipe's objective."""
    node = config.get("objective")
    name = node.get("name", "") if isinstance(node, dict) else ""
    component = registry().components.get(("objective", name)) if isinstance(name, str) else None
    return component.verbs if component is not None else ()


def start_role(config: Mapping[str, Any]) -> str:
    """The role that a trained network takes in this recipe: teacher, or reference where a reward is learned from."""
    return STARTS["finetune-rl" if "finetune-rl" in verbs_of(config) else "distill"]


def merge(into: dict[str, Any], new: Mapping[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    """Deep merge; a component node whose `name` changes, or which becomes a checkpoint (`run`), is replaced whole:
    its keywords belong to the name.

    A word for a node (`sampler: ddim`, `data: FOLDER`) stands for the node's first key: see SHORT.
    """
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        old = into.get(key)
        if isinstance(value, str) and (first := SHORT.get(dotted)):
            value = {first: value}
        another = (
            isinstance(value, dict)
            and isinstance(old, dict)
            and dotted not in NODES
            and (value.get("name", old.get("name")) != old.get("name") or ("run" in value and "run" not in old))
        )
        if isinstance(value, dict) and isinstance(old, dict) and not another:
            merge(old, value, origins, origin, dotted + ".")
            continue
        for k in [k for k in origins if k == dotted or k.startswith(dotted + ".")]:
            del origins[k]
        into[key] = value
        for leaf in leaves(value, dotted):
            origins[leaf] = origin


def leaves(value: Any, dotted: str) -> Iterable[str]:
    """Dotted keys of everything in a value that is no mapping, or an empty one."""
    if isinstance(value, dict) and value:
        for k, v in value.items():
            yield from leaves(v, f"{dotted}.{k}")
    else:
        yield dotted


def override(config: dict[str, Any], origins: dict[str, str], assignments: Iterable[str], origin: str) -> None:
    """Apply KEY=VALUE (dotted key, YAML value, split at the first '=') and ~KEY (delete)."""
    start = start_role(config)
    for text in assignments:
        if text.startswith("~"):
            key = renamed.key(text[1:], start)
            parent, last = _descend(config, key, text, create=False)
            parent.pop(last, None)
            for k in [k for k in origins if k == key or k.startswith(key + ".")]:
                del origins[k]
            continue
        key, eq, value = text.partition("=")
        if isinstance(config.get("roles"), dict | None):
            key = renamed.key(key, start)
        if not eq or not all(key.split(".")):
            raise VgmError(f"{shown(text)} is not KEY=VALUE", "example: train.steps=100", USAGE)
        if key in ("data", "data.path") and not value.strip():
            raise VgmError(f"{key}= is empty", NO_DATA_HINT, USAGE)
        head = key.split(".")[0]
        if head not in TOP:
            inside = [f"{n}.{f.name}" for n, cls in NODES.items() for f in dataclasses.fields(cls)]
            hits = [i for i in inside if i.endswith("." + key)]
            if head in ELSEWHERE:
                raise VgmError(f"unknown key '{key}'", ELSEWHERE[head], USAGE)
            raise (
                VgmError(f"unknown key '{key}'", f"did you mean {hits[0]}?", USAGE)
                if hits
                else unknown("key", head, TOP)
            )
        node: Any = parse_yaml(value, text)
        if key == "codec" and isinstance(node, str) and ":" not in node and node not in registry().names("codec"):
            node = {"weights": node, "fallback": None}  # a trained one, as for --codec
        for part in reversed(key.split(".")):
            node = {part: node}
        merge(config, node, origins, origin)


def _descend(config: dict[str, Any], key: str, text: str, create: bool) -> tuple[dict[str, Any], str]:
    *parents, last = key.split(".")
    for p in parents:
        config = config.get(p)  # type: ignore[assignment]
        if not isinstance(config, dict):
            raise VgmError(f"'{text}': there is no '{key}' to delete", code=USAGE)
    if last not in config:
        raise VgmError(f"'{text}': there is no '{key}' to delete", code=USAGE)
    return config, last


def env_assignments() -> list[str]:
    """VGM_TRAIN__STEPS=10 -> train.steps=10 (double underscore between levels)."""
    out = []
    for name, value in sorted(os.environ.items()):
        if name.startswith("VGM_") and "__" in name:
            out.append(f"{name[4:].lower().replace('__', '.')}={value}")
    return out


def rename(config: dict[str, Any], origins: dict[str, str]) -> None:
    """Move what an older version wrote to where it stands now (see the module renamed)."""
    start = start_role(config)
    for old in [k for k in renamed.RECIPE if k in config]:
        moved = {renamed.key(k, start): origins.pop(k) for k in list(origins) if k.split(".")[0] == old}
        role = renamed.key(old, start).partition(".")[2]
        merge(config, {"roles": {role: renamed.node(old, config.pop(old))}}, origins, "recipe")
        origins.update({k: v for k, v in moved.items() if k in origins})
    roles = config.get("roles")
    nodes = [config.get("model"), *(roles.values() if isinstance(roles, dict) else [])]
    for node in nodes:  # `name: teacher`, as a copy of the trained network was called whatever it was for
        if isinstance(node, dict) and node.get("name") == STARTS["distill"] and STARTS["distill"] not in (roles or {}):
            node["name"] = start
    renamed.conditions(config, origins)
