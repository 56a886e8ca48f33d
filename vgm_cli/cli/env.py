"""vgm env."""

from __future__ import annotations

import typer

from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("env")(env)


def env() -> None:
    """Versions and hardware, for bug reports.

    Examples:

        vgm env --json

    Next: vgm plugins --all
    """
    from vgm_cli.engine.environment import environment

    facts = environment()
    ui.document(facts)
    for key, value in facts.items():
        if isinstance(value, dict):
            ui.data(f"{key}: " + ", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            ui.data(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
