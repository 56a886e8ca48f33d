"""vgm plugins."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vgm_cli.hookspecs import Component
from vgm_cli.registry import registry
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("plugins")(plugins)


def plugins(
    all: Annotated[bool, typer.Option("--all", help="Also the built-in papers.")] = False,
) -> None:
    """List plugins: what they bring, how long they take to load, what is wrong with them.

    Examples:

        vgm plugins --all

        vgm plugins --all --json

    Next: vgm plugin new NAME   (VGM_PLUGINS=a,b loads only these, -p no:NAME leaves one out)
    """
    found = [p for p in registry().plugins.values() if all or p.error or not p.builtin]
    ui.document(
        [
            {
                "name": p.name,
                "version": p.version,
                "distribution": p.distribution,
                "builtin": p.builtin,
                "module": p.module,
                "papers": [x.name for x in p.papers],
                "components": [{"kind": c.kind, "name": c.name, "target": c.target} for c in p.components],
                "milliseconds": round(p.seconds * 1000, 2),
                "error": p.error,
                "trace": p.trace,
            }
            for p in found
        ]
    )
    if not found:
        ui.info("no plugins besides the built-in papers; --all shows those")
        return
    rows = [
        (
            p.name,
            p.version or "-",
            p.distribution,
            brings(p.papers, p.components),
            f"{p.seconds * 1000:.1f} ms",
            p.error,
        )
        for p in found
    ]
    ui.table(("plugin", "version", "distribution", "brings", "load", "error"), rows)


def brings(papers: list[Any], components: list[Component]) -> str:
    """'paper dit; model dit; converter dit, dit-diffusers'."""
    kinds: dict[str, list[str]] = {"paper": [p.name for p in papers]}
    for c in components:
        kinds.setdefault(c.kind, []).append(c.name)
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names) or "-"
