"""vgm cp."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("cp")(cp)


def cp(
    recipe: Annotated[
        str, typer.Argument(help="PAPER/RECIPE, PAPER or a YAML file.", autocompletion=complete.trainable)
    ],
    dest: Annotated[Path, typer.Argument(help="A new .yaml file, or a folder to put it in.")],
    make_parents: Annotated[bool, typer.Option("--make-parents", help="Create the folders above it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    force: Annotated[bool, typer.Option("--force/--no-clobber", hidden=True)] = False,
) -> None:
    """Copy a recipe to edit it.

    Examples:

        vgm cp dit/mnist my.yaml

        vgm cp dit/imagenet256 experiments/wide.yaml --make-parents

    Next: vgm validate my.yaml
    """
    from vgm_cli import atomic
    from vgm_cli.recipe import locate

    name, path = locate(recipe)
    target = dest / f"{path.stem}.yaml" if dest.is_dir() else dest
    if target.suffix not in (".yaml", ".yml"):
        raise VgmError(f"{target} does not end in .yaml", f"example: vgm cp {recipe} {target.name}.yaml", USAGE)
    if target.exists():
        if target.samefile(path):
            raise VgmError(f"{target} is the recipe itself", "copy it to another name", USAGE)
        if not overwrite and not force:
            raise VgmError(f"{target} exists", "--overwrite replaces it", USAGE)
    if not target.parent.is_dir() and not make_parents:
        raise VgmError(f"there is no folder {target.parent}", "--make-parents creates it", USAGE)
    atomic.write_text(target, with_full_base(path.read_text(encoding="utf-8"), path))
    ui.document({"recipe": name, "path": str(target)})
    ui.data(str(target))
    ui.info(f"next: vgm validate {shlex.quote(str(target))}")


def with_full_base(text: str, path: Path) -> str:
    """A base named relative to the recipe's own folder would be lost in a copy: it gets its full name."""
    from vgm_cli.recipe import shipped

    def full(match: re.Match[str]) -> str:
        base = match["base"].strip("\"'")
        near = path.parent / (base if base.endswith((".yaml", ".yml")) else f"{base}.yaml")
        if not near.is_file():
            return match[0]
        named = {p.resolve(): n for n, p in shipped().items()}
        return f"{match['key']}{named.get(near.resolve(), near.resolve())}"

    return re.sub(r"^(?P<key>base:[ \t]*)(?P<base>[^\s#]+)", full, text, count=1, flags=re.MULTILINE)
