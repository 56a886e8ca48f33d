"""vgm finetune-rl."""

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


def register(app: typer.Typer) -> None:
    app.command("finetune-rl", cls=RecipeCommand)(finetune_rl)


def finetune_rl(
    method: Annotated[
        str | None,
        typer.Argument(
            help="flow-grpo, or METHOD/RECIPE, or a YAML file; with --resume, the run's own recipe.",
            show_default=False,
            autocompletion=complete.rl_methods,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…",
            help="train.steps=100, objective.beta=0.1, reward.NAME.OPTION=… …",
            autocompletion=complete.keys,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A run, a checkpoint folder or a .safetensors file.", autocompletion=complete.runs),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="`vgm ls rewards`, or module:function; several are added. Default: the recipe's.",
            autocompletion=complete.rewards,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the model: raw, or an average: ema-0.9999. Default: the first average.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe of the method, or a YAML file. Default: mnist.", autocompletion=complete.recipes),
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
    """Tune a trained model towards a reward.

    The model is any diffusion or flow model; it learns from images that it makes itself. A run that collapses stops
    with exit code 5, its last checkpoint intact.

    Examples:

        vgm finetune-rl flow-grpo --model RUN --reward ink

        vgm finetune-rl flow-grpo --model RUN --reward jpeg-compressibility=500 --reward confidence=0.5

        vgm finetune-rl flow-grpo --model RUN --reward mymodule:score objective.lora={rank: 8}

    Next: vgm sample RUN
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.finetune_rl import run as engine
    from vgm_cli.engine.train import tracking
    from vgm_cli.errors import USAGE, VgmError

    tracking.check(track)
    method, assignments = named(method, overrides, "method", resume)
    assignments += [] if seed is None else [f"train.seed={seed}"]
    recipes.allow_typed([*assignments, *(reward or [])], trust)
    if method is None:
        resolved = recipes.stored(run_to_resume(out), assignments)
    else:
        resolved = engine.load(method, recipe, assignments, model, weights, reward or [])
    if resolved.start() is None and not (help_config or print_config):
        raise VgmError("reinforcement learning needs a model", f"vgm finetune-rl {method} --model RUN", USAGE)
    if shown_instead(resolved, help_config, print_config, False, nproc, nnodes):
        return
    launch(nproc, nnodes, rdzv)
    engine.run(resolved, out, resume=resume, overwrite=overwrite, stop_after=stop_after, track=track, device=device)
