"""vgm validate."""

from __future__ import annotations

from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.training import Trust
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("validate")(validate)


def validate(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, PAPER/RECIPE or PAPER.", autocompletion=complete.trainable)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="As for train.", autocompletion=complete.keys)
    ] = None,
    trust: Trust = False,
) -> None:
    """Check a recipe: keys, values, components; then build it without memory and count.

    Examples:

        vgm validate my.yaml

        vgm validate dit/imagenet256 model.preset=DiT-S/2

    Next: vgm train my.yaml
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.validation import check

    recipes.allow_typed(overrides or [], trust)
    resolved = recipes.load(recipe, None, overrides or [])
    numbers, reason = check(resolved)
    total = sum(numbers.values())
    ui.document({"recipe": resolved.name, "ok": True, "parameters": total, "networks": numbers, "not_built": reason})
    ui.data(f"ok: {total:,} parameters" if numbers else f"ok: not built, {reason}")
    if len(numbers) > 1:
        for role, n in numbers.items():
            ui.data(f"  {role}: {n:,}")
