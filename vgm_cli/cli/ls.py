"""vgm ls."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vgm_cli.errors import unknown
from vgm_cli.hookspecs import KINDS
from vgm_cli.registry import registry
from vgm_cli.ui import ui

PLURALS = {f"{kind}s": kind for kind in KINDS}
LISTS = ("papers", "recipes", "presets", "components", *PLURALS)


def register(app: typer.Typer) -> None:
    app.command("ls")(ls)


def complete_lists(incomplete: str) -> list[str]:
    return [n for n in LISTS if n.startswith(incomplete)]


def ls(
    what: Annotated[
        str,
        typer.Argument(
            help="papers, recipes, presets, components, " + ", ".join(PLURALS), autocompletion=complete_lists
        ),
    ] = "papers",
) -> None:
    """List papers, recipes, presets or components.

    Examples:

        vgm ls                      # papers

        vgm ls recipes

        vgm ls samplers --json

    Next: vgm explain PAPER
    """
    if what not in LISTS:
        raise unknown("list", what, LISTS)
    columns: tuple[str, ...]
    if what == "papers":
        columns, rows = ("paper", "year", "family", "summary", "recipes"), papers_table()
    elif what == "recipes":
        columns, rows = ("recipe", "summary"), recipes_table()
    elif what == "presets":
        columns, rows = ("kind", "component", "preset", "keywords"), presets_table()
    elif what == "components":
        columns = ("kind", "name", "plugin", "presets", "summary")
        rows = [(kind, *row) for kind in PLURALS.values() for row in components_table(kind)]
    else:
        columns, rows = ("name", "plugin", "presets", "summary"), components_table(PLURALS[what])
    ui.document([dict(zip(columns, row)) for row in rows])
    ui.table(columns, [[shown(cell) for cell in row] for row in rows])
    broken = [p.name for p in registry().plugins.values() if p.error]
    if broken:
        ui.info(f"not loaded: {', '.join(broken)}; `vgm plugins` says why")


def shown(cell: Any) -> str:
    if isinstance(cell, list):
        return ", ".join(map(str, cell))
    return json.dumps(cell) if isinstance(cell, dict) else str(cell)


def recipes_of(paper: str) -> list[str]:
    from vgm_cli.recipe import shipped

    return [name.partition("/")[2] for name in shipped() if name.startswith(f"{paper}/")]


def papers_table() -> list[tuple[Any, ...]]:
    ordered = sorted(registry().papers.values(), key=lambda p: (p.year, p.name))
    return [(p.name, p.year, p.family, p.summary, recipes_of(p.name)) for p in ordered]


def recipes_table() -> list[tuple[Any, ...]]:
    from vgm_cli.recipe import shipped

    return [(name, headline(path)) for name, path in shipped().items()]


def headline(path: Path) -> str:
    """The first sentence of a recipe's opening comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line[2:].strip())
    text = re.sub(r"\([^()]*\)", lambda m: m[0].replace(". ", ".\N{NO-BREAK SPACE}"), " ".join(lines))
    # a sentence ends at a full stop or colon that is followed by a capital, not inside brackets, not after "et al"
    first = re.split(r"(?<=[.:])(?<!et al\.)(?<!app\.)(?<!vs\.)\s+(?=[A-Z])", text)[0]
    return first.replace("\N{NO-BREAK SPACE}", " ").rstrip(":")


def presets_table() -> list[tuple[Any, ...]]:
    rows = []
    for (kind, name), component in sorted(registry().components.items()):
        rows += [(kind, name, preset, dict(kw)) for preset, kw in registry().presets(component).items()]
    return rows


def components_table(kind: str) -> list[tuple[Any, ...]]:
    r = registry()
    found = [(name, r.components[kind, name]) for name in r.names(kind)]
    rows = [(name, r.owners[kind, name], list(r.presets(c)), c.summary) for name, c in found]
    if kind == "dataset":
        from vgm_cli.data import SHIPPED

        rows += [(name, "vgm", [], summary) for name, summary in SHIPPED.items()]
    return rows
