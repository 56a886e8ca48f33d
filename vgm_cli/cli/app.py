"""The typer app: one small module per verb, plugins' commands at the end. Torch-free at import."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer

from vgm_cli import __version__
from vgm_cli.registry import Registry, registry
from vgm_cli.ui import ui

HELP = """Visual generative models from their papers: train, sample, evaluate, and more.

Start: `vgm train dit` (minutes on a laptop CPU, on real images), then `vgm sample RUN`.
`vgm ls` shows papers, recipes and components; `vgm explain dit` a paper and its code."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vgm {__version__}")
        raise typer.Exit()


def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON document (JSON lines for long jobs) on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only results, warnings and errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    plugin: Annotated[
        list[str] | None, typer.Option("--plugin", metavar="FILE.py", help="Load one more plugin from a file.")
    ] = None,
    p: Annotated[list[str] | None, typer.Option("-p", metavar="no:NAME", help="Leave a plugin out.")] = None,
) -> None:
    """These options work anywhere on the command line."""


def build_app() -> typer.Typer:
    """The complete app. A plugin whose commands fail to register is reported and left out."""
    app = typer.Typer(
        name="vgm",
        help=HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(callback)
    from vgm_cli.cli import (
        cat,
        convert,
        cp,
        data,
        distill,
        env,
        evaluate,
        examples,
        explain,
        finetune_rl,
        inspect,
        ls,
        matrix,
        plugin,
        plugins,
        report,
        restore,
        runs,
        sample,
        train,
        validate,
    )

    work = (train, distill, finetune_rl, sample, restore, evaluate, convert, data)
    looks = (ls, cat, cp, validate, inspect, explain, plugins, env)
    for verb in (*work, *looks, matrix, runs, report, plugin):
        verb.register(app)
    r = registry()
    for name, module in r.manager.list_name_plugin():
        hook = getattr(module, "vgm_commands", None)
        if hook is not None:
            try:
                hook(app)
            except Exception as e:
                ui.warn(f"plugin '{name}' could not add its commands: {e}")
                r.plugins[name].error = f"vgm_commands: {type(e).__name__}: {e}"
    examples.tidy(app)
    return app


@functools.lru_cache(maxsize=1)
def command_of(known: Registry) -> Any:
    """The parser's command for what this registry knows, made once: a tenth of a second of reading signatures."""
    return typer.main.get_command(build_app())
