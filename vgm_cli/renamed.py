"""Names that older versions wrote, and what they are called now: the one table for checkpoints, runs and recipes.

Everything read from a file passes through here before anything else looks at it, so that the rest of the program knows
the new names alone. Torch-free.
"""

from __future__ import annotations

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
    """What stood under the key `old` of a recipe, as a role: a teacher with weights was a checkpoint."""
    if not isinstance(value, dict):
        return value
    if old == "pairs":
        return {"kind": "pairs", **value}
    if value.get("weights") is not None:
        return {"run": value["weights"], **{k: value[k] for k in ("sha256", "view") if k in value}}
    return {k: v for k, v in value.items() if k not in ("guidance_scale", "weights")}
