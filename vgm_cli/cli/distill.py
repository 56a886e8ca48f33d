"""vgm distill."""

from __future__ import annotations

from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.training import RecipeCommand, Training, trains
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("distill", cls=RecipeCommand)(distill)


@trains()
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
    *,
    options: Training,
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
    from vgm_cli.errors import USAGE, VgmError

    method, assignments = options.words(method, overrides, "method")
    recipes.allow_typed(assignments, options.trust)
    if method is None:
        resolved = options.stored(assignments)
    else:
        if teacher is None and options.resume and options.out is not None:
            teacher = engine.teacher_of(options.out)
            ui.info(f"teacher: {teacher}, as {options.out} says")
        resolved = engine.load(method, options.recipe, assignments, teacher, weights)
    if resolved.start() is None and not options.asks_only:
        raise VgmError("distillation needs a teacher", f"vgm distill {method} --teacher RUN", USAGE)
    options.run(engine.run, resolved)
