"""vgm train."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.training import RecipeCommand, Training, trains


def register(app: typer.Typer) -> None:
    app.command("train", cls=RecipeCommand)(train)


@trains()
def train(
    paper: Annotated[
        str | None,
        typer.Argument(
            help="A paper (`vgm ls`), PAPER/RECIPE, or a YAML file; with --resume, the run's own recipe.",
            show_default=False,
            autocompletion=complete.trainable,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…", help="train.steps=100, ~optimizer.warmup …", autocompletion=complete.keys
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="A trained first stage: short for codec.weights=RUN, and no other.", autocompletion=complete.runs
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The trained network that this one is built on: roles.base.run, with its codec, conditions and data.",
            autocompletion=complete.runs,
        ),
    ] = None,
    *,
    options: Training,
) -> None:
    """Train a paper's model.

    Examples:

        vgm train dit                                   # MNIST, minutes on a laptop CPU

        vgm train dit data.path=FOLDER                  # your images, class sub-folders become labels

        vgm train ldm data.path=FOLDER                  # captions beside your images: text to image

        vgm train dit --recipe imagenet256 --plan       # what the paper's run costs

        vgm train llamagen --codec RUN data.path=FOLDER # on the codes of a `vgm train vqgan` run

        vgm train controlnet --base RUN                 # beside the frozen network of a `vgm train ldm` run

    Next: vgm sample RUN
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.errors import USAGE, VgmError
    from vgm_cli.overrides import env_assignments

    paper, assignments = options.words(paper, overrides, "paper")
    if codec is not None:
        assignments += [f"codec.weights={codec}", "codec.fallback=null"]
    recipes.allow_typed(assignments, options.trust)
    if paper is None:
        resolved = options.stored(assignments)
    elif base is None:
        own = options.recipe is None and any(w.startswith("data") for w in (*env_assignments(), *assignments))
        resolved = recipes.load(paper, for_data(paper, assignments) if own else options.recipe, assignments)
    else:
        resolved = based(paper, options.recipe, assignments, base)
    verb = recipes.verb_of(resolved.config)
    if verb != "train" and resolved.start() is None and not options.asks_only:
        needs = "a trained model" if verb == "finetune-rl" else "a trained teacher"
        hint = recipes.next_command(resolved.paper, verb)
        if (options.recipe or "/" in (paper or "")) and resolved.name in recipes.shipped():
            hint = f"vgm {verb} {resolved.name} --{'model' if verb == 'finetune-rl' else 'teacher'} RUN"
        raise VgmError(f"{resolved.name} needs {needs}", hint, USAGE)
    if verb == "finetune-rl" and not options.asks_only:
        raise VgmError(f"{resolved.name} learns from rewards", recipes.next_command(resolved.paper, verb), USAGE)
    options.run(engine, resolved)


def for_data(paper: str, assignments: list[str]) -> str | None:
    """The recipe that the user's own data asks for; None: the paper's default."""
    from vgm_cli.engine.train.captioned import recipe_for  # imports torch

    return recipe_for(paper, assignments)


def based(paper: str, recipe: str | None, assignments: list[str], base: str) -> Any:
    """The recipe of a network that is built on the run or file `base`. VgmError: it is built on none."""
    from vgm_cli import recipe as recipes
    from vgm_cli.engine import checkpoint as ckpt
    from vgm_cli.engine.distill import run as distill
    from vgm_cli.errors import USAGE, VgmError

    name, file = recipes.locate(paper, recipe)
    config, origins = recipes.load_file(file, f"recipe {name}")
    if "base" not in (config.get("roles") or {}):
        raise VgmError(f"{name} is built on no other network", "--base is for recipes with roles.base", USAGE)
    distill.start_from("base", config, origins, ckpt.resolve(base), keep=True)
    return distill.finish("base", config, origins, name, assignments)


def engine(*args: Any, **options: Any) -> None:
    from vgm_cli.engine.train import loop  # imports torch

    loop.train(*args, **options)
