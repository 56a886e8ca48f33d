"""vgm matrix: which network, trained how, works with which verb. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.errors import unknown
from vgm_cli.hookspecs import Component
from vgm_cli.registry import registry
from vgm_cli.ui import ui

VERBS = {"distill": "objective", "restore": "sampler", "finetune-rl": "objective"}  # and the kind of their methods
NONE: dict[str, list[str]] = {verb: [] for verb in VERBS}


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

    Single methods may ask for more and say so (of latents, only some restore). Models of tokens complete images with
    their own sampler. Combinations without a shipped recipe are made by overrides.

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
    ui.document(found)
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
    for verb in VERBS:
        names = sorted({name for r in found for name in r[verb]})
        if names:
            ui.info(f"{verb}: {', '.join(names)}")


def methods_of(verb: str) -> list[str]:
    found = registry().components.values()
    return sorted(c.name for c in found if c.kind == VERBS[verb] and verb in c.verbs)


def rows() -> list[dict[str, Any]]:
    """Every denoising network by every training of denoisers, then what else the shipped recipes train, with the
    methods of each verb that take the result."""
    components = registry().components
    shipped = trained()
    models, trainings = (
        sorted((c for c in components.values() if c.kind == kind and c.denoiser), key=lambda c: c.name)
        for kind in ("model", "objective")
    )
    pairs = [
        (m.name, o.name)
        for m in models
        for o in trainings
        if m.two_times >= o.two_times and (not o.trains or m.name in o.trains)
    ]
    denoisers = set(pairs)
    pairs += sorted(p for p in shipped if p not in denoisers)
    own = own_restorers()
    general = {verb: methods_of(verb) for verb in VERBS}
    general["restore"] = [m for m in general["restore"] if m not in own]
    found = []
    for network, training in pairs:
        made = shipped.get((network, training), {})
        home = plugin_of(components["objective", training])
        completes = sorted(m for m, plugin in own.items() if plugin == home and any(made.values()))
        takes = general if (network, training) in denoisers else {**NONE, "restore": completes}
        reason = "" if (network, training) in denoisers else lacking(network, training)
        found.append({"network": network, "training": training, "recipes": list(made), **takes, "reason": reason})
    return found


def plugin_of(component: Component) -> str:
    """The package that a component lives in: "vgm_plugins.maskgit"."""
    return ".".join(component.target.partition(":")[0].split(".")[:2])


def own_restorers() -> dict[str, str]:
    """{restoration method: its plugin} of those that are for what the plugin trains, none of which is a denoiser."""
    found = registry().components.values()
    training = {plugin_of(c) for c in found if c.kind == "objective"}
    denoising = {plugin_of(c) for c in found if c.kind in ("model", "objective") and c.denoiser}
    methods = methods_of("restore")
    homes = {c.name: plugin_of(c) for c in found if c.kind == "sampler" and c.name in methods}
    return {name: home for name, home in homes.items() if home in training - denoising}


def trained() -> dict[tuple[str, str], dict[str, str]]:
    """{(network, training): {shipped recipe: its sampler}} of those that need no teacher."""
    from vgm_cli.recipe import has_teacher, load_file, shipped

    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, path in shipped().items():
        config, _ = load_file(path, name)
        if not has_teacher(config):
            pair = (config["model"]["name"], config["objective"]["name"])
            found.setdefault(pair, {})[name] = (config.get("sampler") or {}).get("name", "")
    return found


def lacking(network: str, training: str) -> str:
    """Why the result is no denoiser."""
    components = registry().components
    found = [
        f"{name} {what}"
        for kind, name, what in (("model", network, "is no denoiser"), ("objective", training, "trains no denoiser"))
        if (kind, name) not in components or not components[kind, name].denoiser
    ]
    return found[-1]
