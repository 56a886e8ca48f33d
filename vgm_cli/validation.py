"""Checking a recipe without training it: bind its components, build them on the meta device, count.

Torch-free at import.
"""

from __future__ import annotations

from pathlib import Path

from vgm_cli.errors import VgmError
from vgm_cli.recipe import Recipe, check_components


def check(recipe: Recipe) -> tuple[dict[str, int], str]:
    """({role: parameters}, "") of a recipe that builds; ({}, why) when its components fit but nothing tells the size
    of the images. VgmError: unknown keys, values that do not fit, parts that do not go together."""
    check_components(recipe)
    import torch

    from vgm_cli.engine import build

    data = recipe.node("data")
    try:
        facts = build.declared_facts(data)
    except VgmError as e:
        if data.path is None or not Path(data.path).exists():
            return {}, e.message
        from vgm_cli.engine.plan import plan_facts

        facts = plan_facts(recipe)[0]
    else:
        if recipe.config.get("codec"):
            facts = facts.after(build.meta_codec(recipe.config["codec"], facts))
    with torch.device("meta"):
        built = build.build_objective(recipe, facts)
    return {role: sum(p.numel() for p in network.parameters()) for role, network in built.networks.items()}, ""
