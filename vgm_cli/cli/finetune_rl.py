"""vgm finetune-rl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.training import RecipeCommand, Training, trains


def register(app: typer.Typer) -> None:
    app.command("finetune-rl", cls=RecipeCommand)(finetune_rl)


@trains("plan")
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
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to draw, of a model that reads some. Default: the captions of its data."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts, one a line.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the model: raw, or an average: ema-0.9999. Default: the first average.")
    ] = None,
    *,
    options: Training,
) -> None:
    """Tune a trained model towards a reward.

    The model is any diffusion or flow model; it learns from images that it makes itself. A run that collapses stops
    with exit code 5, its last checkpoint intact.

    Examples:

        vgm finetune-rl flow-grpo --model RUN --reward ink

        vgm finetune-rl flow-grpo --model RUN --reward jpeg-compressibility=500 --reward confidence=0.5

        vgm finetune-rl flow-grpo --model RUN --reward mymodule:score objective.lora={rank: 8}

        vgm finetune-rl flow-grpo --model TEXT_RUN --reward clip-score --prompts prompts.txt

    Next: vgm sample RUN
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.conditioning import lines_of
    from vgm_cli.engine.finetune_rl import run as engine
    from vgm_cli.errors import USAGE, VgmError

    method, assignments = options.words(method, overrides, "method")
    recipes.allow_typed([*assignments, *(reward or [])], options.trust)
    if method is None:
        resolved = options.stored(assignments)
    else:
        asked = [*(prompt or []), *(lines_of(prompts, "--prompts") if prompts is not None else [])]
        resolved = engine.load(method, options.recipe, assignments, model, weights, reward or [], asked)
    if resolved.start() is None and not options.asks_only:
        raise VgmError("reinforcement learning needs a model", f"vgm finetune-rl {method} --model RUN", USAGE)
    options.run(engine.run, resolved)
