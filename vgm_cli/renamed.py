"""Names that older versions wrote, and what they are called now: the one table for checkpoints, runs and recipes.

Everything read from a file passes through here before anything else looks at it, so that the rest of the program knows
the new names alone. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# (kind, name) of a component -> its name now, and keywords that the old name implied
COMPONENTS: dict[tuple[str, str], dict[str, Any]] = {
    ("view", "consistency"): {"name": "flow-map", "boundary": "skip"},
    ("view", "vgm_plugins.consistency.function:ConsistencyFunction"): {"name": "flow-map", "boundary": "skip"},
    ("view", "dmd"): {"name": "flow-map"},
    ("view", "vgm_plugins.dmd.generator:Generator"): {"name": "flow-map"},
}
HEADER = {"codec": "parts.codec"}  # entry of a checkpoint's header -> where it stands now
RECIPE = {"teacher": "roles.{start}", "pairs": "roles.pairs"}  # top key of a recipe -> where it stands now; start: the
# role that the recipe's verb fills with a trained network, teacher or reference


def header(said: dict[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint's header under today's names; an entry that is null is left out."""
    for old, new in HEADER.items():
        value = said.pop(old, None)
        if value is None:
            continue
        first, role = new.split(".")
        parts = said.get(first)
        if parts is None or isinstance(parts, dict):  # else the check of its types refuses it
            said[first] = {role: value, **(parts or {})}
    return said


def key(dotted: str, start: str) -> str:
    """A dotted key of a recipe under today's name. start: see RECIPE."""
    first, dot, rest = dotted.partition(".")
    return f"{RECIPE[first].format(start=start)}{dot}{rest}" if first in RECIPE else dotted


def node(old: str, value: Any) -> Any:
    """The role that stands for what an older version wrote under the key `old`, e.g. a teacher with weights is a
    checkpoint."""
    if not isinstance(value, dict):
        return value
    if old == "pairs":
        return {"kind": "pairs", **value}
    if value.get("weights") is not None:
        return {"run": value["weights"], **{k: value[k] for k in ("sha256", "view") if k in value}}
    return {k: v for k, v in value.items() if k not in ("guidance_scale", "weights")}


# -- conditions --------------------------------------------------------------------------------------------------------

# objectives that once dropped labels themselves, and the share that they dropped where nothing was said
OLD_DROPOUT = {
    "iddpm": 0.1,
    "gaussian": 0.1,
    "flow-matching": 0.1,
    "rectified-flow": 0.1,
    "reflow": 0.1,
    "llamagen": 0.1,
    "adm-upsampler": 0.0,
}


def conditions(config: dict[str, Any], origins: dict[str, str] | None = None) -> None:
    """Recipes once dropped labels in their objective and named a text encoder among the roles: written anew, in place.

    A recipe without conditions is one whose labels, where the data has them, are a condition.
    """
    origins = {} if origins is None else origins
    objective, roles = config.get("objective"), config.get("roles")
    said = config.get("conditions")
    nodes: dict[str, Any] = dict(said) if isinstance(said, Mapping) else {}
    name = objective.get("name") if isinstance(objective, dict) else None
    if isinstance(roles, dict) and isinstance(roles.get("text"), dict) and roles["text"].get("name") == "flan-t5":
        own = {k: v for k, v in roles.pop("text").items() if k not in ("kind", "name")}
        nodes["text"] = {"name": "flan-t5", **(nodes.get("text") or {}), **own}
        for k in [k for k in origins if k.startswith("roles.text.")]:
            origins["conditions" + k.removeprefix("roles")] = origins.pop(k)
    target = "text" if "text" in nodes else "class"
    if said is None and not nodes:
        nodes["class"] = {"dropout": OLD_DROPOUT.get(str(name), 0.0)}
        origins["conditions.class.dropout"] = "default"
    if isinstance(objective, dict) and name in OLD_DROPOUT and "label_dropout" in objective:
        share, origin = objective.pop("label_dropout"), origins.pop("objective.label_dropout", "")
        typed = origins.get(f"conditions.{target}.dropout") in ("command line", "environment")
        if not typed or origin in ("command line", "environment"):
            nodes[target] = {**(nodes.get(target) or {}), "dropout": share}
            origins[f"conditions.{target}.dropout"] = origin
    if nodes or said is None:
        config["conditions"] = nodes
    if roles == {}:
        config.pop("roles")


def conditions_of(component: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of a checkpoint that does not say which it has."""
    if component.get("kwargs", {}).get("model_type") == "t2i":
        text = (recipe.get("roles") or {}).get("text") or {}
        return {"text": {"name": "flan-t5", **{k: v for k, v in text.items() if k in ("path", "tokens")}}}
    return {"class": {}}
