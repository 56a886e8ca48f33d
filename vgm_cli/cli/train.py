"""vgm train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import ui

RUN, HARDWARE, RECORD = "Run", "Hardware", "Records"
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the code (module:attr) that the recipe file names. Only for files you trust."),
]


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    paper: Annotated[
        str,
        typer.Argument(help="A paper (`vgm ls`), PAPER/RECIPE, or a YAML file.", autocompletion=complete.papers),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="train.steps=100, ~optimizer.warmup …", autocompletion=complete.keys
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe of the paper, or a YAML file. Default: mnist.", autocompletion=complete.recipes),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/PAPER-RECIPE/TIME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Empty --out first.", rich_help_panel=RUN)] = False,
    stop_after: Annotated[
        int | None, typer.Option(help="Save and stop at this step; --resume goes on.", rich_help_panel=RUN)
    ] = None,
    trust: Trust = False,
    codec: Annotated[
        str | None,
        typer.Option(
            help="A trained first stage: short for codec.weights=RUN, and no other.", autocompletion=complete.runs
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for train.seed=N.", rich_help_panel=RUN)] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Parameters, FLOPs, memory, time; trains nothing.", rich_help_panel=RUN)
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="The resolved recipe with origins.", rich_help_panel=RUN)
    ] = False,
    help_config: Annotated[
        bool, typer.Option("--help-config", help="Every key with type and default.", rich_help_panel=RUN)
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="auto | cpu | cuda | cuda:N | mps. auto: the GPU, if there is one.", rich_help_panel=HARDWARE
        ),
    ] = "auto",
    nproc: Annotated[int, typer.Option(help="Processes on this machine.", rich_help_panel=HARDWARE)] = 1,
    nnodes: Annotated[int, typer.Option(help="Machines.", rich_help_panel=HARDWARE)] = 1,
    rdzv: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Meeting point of the machines.", rich_help_panel=HARDWARE)
    ] = None,
    track: Annotated[
        str,
        typer.Option(
            help="jsonl | none | tensorboard | wandb | trackio (the last three are extras).", rich_help_panel=RECORD
        ),
    ] = "jsonl",
) -> None:
    """Train a paper's model.

    Examples:

        vgm train dit                                   # MNIST, minutes on a laptop CPU

        vgm train dit data.path=FOLDER                  # your images, class sub-folders become labels

        vgm train dit --recipe imagenet256 --plan       # what the paper's run costs

        vgm train llamagen --codec RUN data.path=FOLDER # on the codes of a `vgm train vqgan` run

    Next: vgm sample RUN
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.engine import tracking
    from vgm_cli.errors import USAGE, VgmError

    tracking.check(track)
    assignments = list(overrides or [])
    if seed is not None:
        assignments.append(f"train.seed={seed}")
    if codec is not None:
        assignments += [f"codec.weights={codec}", "codec.fallback=null"]
    recipes.allow_typed(assignments, trust)
    resolved = recipes.load(paper, recipe, assignments)
    if codec is not None and "name" not in resolved.config["codec"]:
        raise VgmError(f"{resolved.name} trains on pixels, it takes no codec", "leave --codec out", USAGE)
    if help_config:
        show_keys(resolved)
        return
    if print_config:
        show_config(resolved)
        return
    if nproc < 1 or nnodes < 1:
        raise VgmError("--nproc and --nnodes must be at least 1", code=USAGE)
    from vgm_cli.engine import distributed

    distributed.adopt_slurm()
    if (nproc > 1 or nnodes > 1) and not distributed.launched():
        argv = distributed.default_argv()
        raise typer.Exit(distributed.relaunch(nproc, nnodes, rdzv, argv))
    recipes.check_components(resolved)
    if resolved.config.get("teacher") and "weights" not in resolved.config["teacher"] and not plan:
        raise VgmError(f"{resolved.name} needs a trained teacher", f"vgm distill {paper} --teacher RUN", USAGE)
    if plan:
        from vgm_cli.engine.plan import make_plan, show_plan

        show_plan(make_plan(resolved))
        return
    from vgm_cli.engine.trainer import train as run

    run(resolved, out, resume=resume, overwrite=overwrite, stop_after=stop_after, track=track, device=device)


def show_config(resolved: object) -> None:
    """The resolved YAML, each leaf with where it came from."""
    from vgm_cli.recipe import Recipe
    from vgm_cli.ui import flat

    assert isinstance(resolved, Recipe)
    ui.document({"config": resolved.config, "origins": resolved.origins})
    values = flat(resolved.config)
    width = max(len(f"{k}: {v}") for k, v in values.items())
    for k, v in values.items():
        ui.data(f"{k}: {v}".ljust(width) + f"  # {resolved.origins.get(k, '')}".rstrip(" #"))


def show_keys(resolved: object) -> None:
    """Typed keys of the host's nodes and of the recipe's components."""
    from vgm_cli.recipe import COMPONENT_NODES, NODES, Recipe, explain_type
    from vgm_cli.registry import load_target, registry, signature

    assert isinstance(resolved, Recipe)
    rows = []
    for node, cls in NODES.items():
        for f in dataclasses.fields(cls):
            rows.append((f"{node}.{f.name}", str(f.type), resolved.config[node].get(f.name)))
    for kind in COMPONENT_NODES:
        config = resolved.config.get(kind)
        if config:
            component = registry().find(kind, config["name"])
            for name, p in signature(load_target(component.target, component.name)).parameters.items():
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and (name != "model" or kind == "model"):
                    default = config.get(name, None if p.default is p.empty else p.default)
                    kind_of = "" if p.annotation is p.empty else explain_type(p.annotation)
                    rows.append((f"{kind}.{name}", kind_of, default))
    ui.document([{"key": k, "type": t, "value": v} for k, t, v in rows])
    ui.table(("key", "type", "value here"), rows)
