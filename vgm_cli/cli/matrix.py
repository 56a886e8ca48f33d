"""vgm matrix: which network, trained how, works with which verb. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.errors import unknown
from vgm_cli.registry import registry
from vgm_cli.ui import ui

VERBS = {"distill": "objective", "restore": "sampler", "finetune-rl": "objective"}  # and the kind of their methods


def register(app: typer.Typer) -> None:
    app.command("matrix")(matrix)


def networks(incomplete: str) -> list[str]:
    return complete.names("model", incomplete)


def matrix(
    network: Annotated[
        str | None, typer.Argument(help="Only this one of `vgm ls models`.", autocompletion=networks)
    ] = None,
) -> None:
    """List which networks and trainings combine, and which of distill, restore and finetune-rl take the result.

    Single methods may ask for more and say so (of latents, only some restore). Combinations without a shipped recipe
    are made by overrides.

    Examples:

        vgm matrix

        vgm matrix adm-unet

        vgm train adm-unet "objective={name: flow-matching}" "sampler={name: euler, steps: 50}"

    Next: vgm distill METHOD --teacher RUN
    """
    found = rows()
    if network is not None:
        if network not in {r["network"] for r in found}:
            raise unknown("trained network", network, {r["network"] for r in found})
        found = [r for r in found if r["network"] == network]
    methods = {verb: methods_of(verb) for verb in VERBS}
    ui.document([{**r, **{v: methods[v] if r[v] else [] for v in VERBS}} for r in found])
    table = [
        (
            r["network"],
            r["training"],
            ", ".join(r["recipes"]) or "by overrides",
            *("yes" if r[v] else "no" for v in VERBS),
            r["reason"],
        )
        for r in found
    ]
    ui.table(("network", "training", "recipes", *VERBS, "reason"), table)
    for verb, names in methods.items():
        ui.info(f"{verb}: {', '.join(names)}")


def methods_of(verb: str) -> list[str]:
    found = registry().components.values()
    return sorted(c.name for c in found if c.kind == VERBS[verb] and verb in c.verbs)


def rows() -> list[dict[str, Any]]:
    """Every denoising network by every training of denoisers, then what else the shipped recipes train."""
    components = registry().components
    shipped = trained()
    models, trainings = (
        sorted(c.name for c in components.values() if c.kind == kind and c.denoiser) for kind in ("model", "objective")
    )
    pairs = [(m, o) for m in models for o in trainings]
    pairs += sorted(p for p in shipped if p not in pairs)
    return [row(m, o, shipped.get((m, o), [])) for m, o in pairs]


def trained() -> dict[tuple[str, str], list[str]]:
    """{(network, training): shipped recipes} of those that need no teacher."""
    from vgm_cli.recipe import has_teacher, load_file, shipped

    found: dict[tuple[str, str], list[str]] = {}
    for name, path in shipped().items():
        config, _ = load_file(path, name)
        if not has_teacher(config):
            found.setdefault((config["model"]["name"], config["objective"]["name"]), []).append(name)
    return found


def row(network: str, training: str, recipes: list[str]) -> dict[str, Any]:
    components = registry().components
    lacking = [
        f"{name} {what}"
        for kind, name, what in (("model", network, "is no denoiser"), ("objective", training, "trains no denoiser"))
        if (kind, name) not in components or not components[kind, name].denoiser
    ]
    can = dict.fromkeys(VERBS, not lacking)
    return {"network": network, "training": training, "recipes": recipes, **can, "reason": ", ".join(lacking[-1:])}
