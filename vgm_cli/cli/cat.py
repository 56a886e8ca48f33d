"""vgm cat."""

from __future__ import annotations

from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("cat")(cat)


def cat(
    recipe: Annotated[
        str, typer.Argument(help="PAPER/RECIPE, PAPER or a YAML file.", autocompletion=complete.trainable)
    ],
    resolved: Annotated[bool, typer.Option("--resolved", help="With its `base:` recipes merged in.")] = False,
) -> None:
    """Show a recipe.

    Examples:

        vgm cat dit/imagenet512

        vgm cat dit/imagenet512 --resolved

    Next: vgm cp dit/imagenet512 my.yaml
    """
    import yaml

    from vgm_cli.recipe import load_file, locate

    name, path = locate(recipe)
    config, _ = load_file(path, name)
    text = path.read_text(encoding="utf-8")
    if resolved:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    ui.document({"name": name, "path": str(path), "config": config, "text": text})
    for line in text.splitlines():
        ui.data(line)
