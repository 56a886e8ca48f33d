"""Which of the small recipes reads captions, and when it is the one that is meant."""

from __future__ import annotations

from collections.abc import Sequence

from vgm_cli import recipe as recipes
from vgm_cli.data import SHIPPED, open_dataset
from vgm_cli.errors import VgmError
from vgm_cli.overrides import env_assignments
from vgm_cli.ui import ui


def reading(paper: str) -> str | None:
    """PAPER/NAME of the small recipe with a condition on texts, this paper's own where it has one; None: there is
    none."""
    found = [
        name
        for name, file in recipes.shipped().items()
        if recipes.starter(name) and "text" in (recipes.load_file(file, name)[0].get("conditions") or {})
    ]
    return min(found, key=lambda n: (not n.startswith(f"{paper}/"), len(n)), default=None)


def recipe_for(paper: str, assignments: Sequence[str]) -> str | None:
    """The recipe that `vgm train PAPER data.path=…` means where pictures have captions and no classes: the paper's
    small one that reads captions, which is told. None: the default one, as also where the conditions are named."""
    if "/" in paper or paper not in (own.partition("/")[0] for own in recipes.shipped()):
        return None
    name = reading(paper)
    keys = {word.lstrip("~").partition("=")[0] for word in (*env_assignments(), *assignments)}
    if name is None or not name.startswith(f"{paper}/") or any(k.split(".")[0] == "conditions" for k in keys):
        return None
    try:
        default = recipes.load(paper, None, assignments)
        data = default.node("data")
        if default.name == name or not data.path or data.path in SHIPPED or data.labels:
            return None
        facts = open_dataset(data.path, split=data.split, quiet=True).facts
    except VgmError:  # told where the recipe is loaded and the data opened
        return None
    if not facts.captions or (facts.num_classes or 0) > 1:
        return None
    short = default.name.partition("/")[2]
    ui.info(f"{data.path} has captions: recipe {name}, which draws what a text says (--recipe {short} reads none)")
    return name.partition("/")[2]
