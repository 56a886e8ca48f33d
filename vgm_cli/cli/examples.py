"""Examples in a command's help: one block without blank lines, whose lines fit a terminal of 80 columns."""

from __future__ import annotations

import inspect
import re

import typer

WIDTH = 76  # of 80 columns, the margins of help texts taken off


def tidy(app: typer.Typer) -> None:
    """Lay out the examples of every command and sub-command of `app`, those of plugins included."""
    for command in app.registered_commands:
        if command.callback is not None and command.help is None and command.callback.__doc__:
            command.help = laid_out(inspect.cleandoc(command.callback.__doc__))
    for group in app.registered_groups:
        if group.typer_instance is not None:
            tidy(group.typer_instance)


def laid_out(text: str) -> str:
    """The docstring with each run of indented lines closed up into one block."""
    out: list[str] = []
    for line in text.splitlines():
        if not line.startswith("    "):
            out.append(line)
            continue
        while len(out) > 1 and not out[-1] and out[-2].startswith("    "):
            out.pop()  # a blank line between two examples
        out += [f"    {part}" for part in fitted(line.strip())]
    return "\n".join(out)


def fitted(example: str) -> list[str]:
    """One example in lines of at most WIDTH: a long line's comment goes above it, a long command is continued."""
    if len(example) <= WIDTH:
        return [example]
    command, *comment = re.split(r"\s+# ", example, maxsplit=1)
    lines = [f"# {c}" for c in comment]
    while len(command) > WIDTH:
        cut = command.rfind(" --", 20, WIDTH + 1)
        cut = command.rfind(" ", 20, WIDTH - 1) if cut < 0 else cut
        if cut < 0:
            break
        lines.append(command[:cut] + " \\")
        command = "    " + command[cut:].strip()
    return [*lines, command]
