"""Shell completion from the static index: no torch."""

from __future__ import annotations

from pathlib import Path

import typer


def trainable(incomplete: str) -> list[str]:
    """Papers with recipes, and PAPER/RECIPE."""
    from vgm_cli.recipe import shipped

    names = set(shipped()) | {n.split("/")[0] for n in shipped()}
    return sorted(n for n in names if n.startswith(incomplete))


def papers(incomplete: str) -> list[str]:
    from vgm_cli.registry import registry

    return sorted(n for n in registry().papers if n.startswith(incomplete))


def recipes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Recipes of the paper or method that is already on the line, of all while there is none."""
    from vgm_cli.recipe import shipped

    given = ctx.params.get("paper") or ctx.params.get("method")
    found = [n.split("/") for n in shipped()]
    return sorted({name for paper, name in found if given in (None, paper) and name.startswith(incomplete)})


def samplers(incomplete: str) -> list[str]:
    return names("sampler", incomplete)


def names(kind: str, incomplete: str) -> list[str]:
    from vgm_cli.registry import registry

    return [n for n in registry().names(kind) if n.startswith(incomplete)]


def offering(verb: str, incomplete: str) -> list[str]:
    """Papers whose plugin brings an objective for this verb."""
    from vgm_cli.registry import registry

    r = registry()
    owners = {r.owners[k, n] for (k, n), c in r.components.items() if k == "objective" and verb in c.verbs}
    found = {p.name for owner in owners for p in r.plugins[owner].papers}
    return sorted(n for n in found if n.startswith(incomplete))


def methods(incomplete: str) -> list[str]:
    return offering("distill", incomplete)


def rl_methods(incomplete: str) -> list[str]:
    return offering("finetune-rl", incomplete)


def rewards(incomplete: str) -> list[str]:
    return names("reward", incomplete)


def layouts(incomplete: str) -> list[str]:
    return [*(n for n in ("vgm",) if n.startswith(incomplete)), *names("converter", incomplete)]


def runs(incomplete: str) -> list[str]:
    found = [str(p.parent) for p in Path("runs").glob("*/*/config.yaml")] if Path("runs").is_dir() else []
    return sorted(f for f in found if f.startswith(incomplete))


def keys(incomplete: str) -> list[str]:
    import dataclasses

    from vgm_cli.recipe import NODES

    known = [f"{n}.{f.name}=" for n, cls in NODES.items() for f in dataclasses.fields(cls)]
    return [k for k in known if k.startswith(incomplete)]
