"""vgm distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.train import HARDWARE, RECORD, RUN, Trust, show_config, show_keys
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("distill")(distill)


def distill(
    method: Annotated[
        str,
        typer.Argument(help="dmd, consistency, … or METHOD/RECIPE, or a YAML file.", autocompletion=complete.methods),
    ],
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
        int | None, typer.Option(help="Save and stop at this step; --resume goes on.", rich_help_panel=RUN)
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
    from vgm_cli.engine import distill as engine
    from vgm_cli.engine import tracking
    from vgm_cli.errors import USAGE, VgmError

    tracking.check(track)
    if teacher is None and resume and out is not None:
        teacher = engine.resumed(out)[0]
        ui.info(f"teacher: {teacher}, as {out} says")
    assignments = [*(overrides or []), *([] if seed is None else [f"train.seed={seed}"])]
    recipes.allow_typed(assignments, trust)
    resolved = engine.load(method, recipe, assignments, teacher, weights)
    if help_config:
        show_keys(resolved)
        return
    if print_config:
        show_config(resolved)
        return
    if teacher is None and not plan:
        raise VgmError("distillation needs a teacher", f"vgm distill {method} --teacher RUN", USAGE)
    if nproc < 1 or nnodes < 1:
        raise VgmError("--nproc and --nnodes must be at least 1", code=USAGE)
    from vgm_cli.engine import distributed

    distributed.adopt_slurm()
    if (nproc > 1 or nnodes > 1) and not distributed.launched():
        raise typer.Exit(distributed.relaunch(nproc, nnodes, rdzv, distributed.default_argv()))
    recipes.check_components(resolved)
    if plan:
        from vgm_cli.engine.plan import make_plan, show_plan

        show_plan(make_plan(resolved))
        return
    engine.run(resolved, out, resume=resume, overwrite=overwrite, stop_after=stop_after, track=track, device=device)
