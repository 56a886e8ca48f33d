"""vgm distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.train import (
    HARDWARE,
    RECORD,
    RUN,
    RecipeCommand,
    Trust,
    launch,
    named,
    run_to_resume,
    shown_instead,
)
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("distill", cls=RecipeCommand)(distill)


def distill(
    method: Annotated[
        str | None,
        typer.Argument(
            help="dmd, consistency, … or METHOD/RECIPE, or a YAML file; with --resume, the run's own recipe.",
            show_default=False,
            autocompletion=complete.methods,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="train.steps=100, objective.update_ratio=10 …", autocompletion=complete.keys
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A run, a checkpoint folder or a .safetensors file.", autocompletion=complete.runs),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the teacher: raw, or an average: ema-0.9999. Default: the first average.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe of the method, or a YAML file. Default: its mnist one.", autocompletion=complete.recipes
        ),
    ] = None,
    trust: Trust = False,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/METHOD-RECIPE/TIME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Empty --out first.", rich_help_panel=RUN)] = False,
    stop_after: Annotated[
        int | None,
        typer.Option(help="Save and stop at this step; --resume goes on.", min=1, rich_help_panel=RUN),
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
    """Distill a trained model into one that samples in one or a few steps.

    The teacher is any diffusion or flow model: its schedule and prediction, codec and data are read off its checkpoint.

    Examples:

        vgm distill dmd --teacher runs/sit-mnist/20260101-120000

        vgm distill consistency --teacher RUN train.steps=4000

        vgm distill dmd --teacher RUN --plan            # what it costs

    Next: vgm sample RUN
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.distill import run as engine
    from vgm_cli.engine.train import tracking
    from vgm_cli.errors import USAGE, VgmError

    tracking.check(track)
    method, assignments = named(method, overrides, "method", resume)
    assignments += [] if seed is None else [f"train.seed={seed}"]
    recipes.allow_typed(assignments, trust)
    if method is None:
        resolved = recipes.stored(run_to_resume(out), assignments)
    else:
        if teacher is None and resume and out is not None:
            teacher = engine.teacher_of(out)
            ui.info(f"teacher: {teacher}, as {out} says")
        resolved = engine.load(method, recipe, assignments, teacher, weights)
    if resolved.start() is None and not (plan or help_config or print_config):
        raise VgmError("distillation needs a teacher", f"vgm distill {method} --teacher RUN", USAGE)
    if shown_instead(resolved, help_config, print_config, plan, nproc, nnodes):
        return
    launch(nproc, nnodes, rdzv)
    engine.run(resolved, out, resume=resume, overwrite=overwrite, stop_after=stop_after, track=track, device=device)
