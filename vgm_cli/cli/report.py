"""vgm report: one page about one run, or several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ui import counted, ui


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Runs, and results of `vgm evaluate --out`; the newest run.", autocompletion=complete.runs),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="A folder that gets every curve as a PNG, too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """One HTML page about a run, or several side by side: curves, previews, figures, settings, where weights came from.

    The page is complete in itself and runs no script: it can be sent and kept.

    Examples:

        vgm report runs/dit -o dit.html

        vgm report runs/dit runs/sit dit.json sit.json --png curves     # figures of `vgm evaluate RUN --out dit.json`

    Next: open the page in a browser
    """
    from vgm_cli import atomic
    from vgm_cli.engine.report import gather, page

    runs, results = sort_out(targets or ["last"])
    for path in filter(None, (out, png)):
        atomic.refuse_existing(path, overwrite)
    told = [gather.read(run, name) for run, name in zip(runs, gather.names_of(runs))]
    title = ", ".join(t.name for t in told) if len(told) < 4 else f"{len(told)} runs"
    atomic.write_text(out, page.page(told, results, title))
    made: list[Path] = []
    if png is not None:
        with atomic.replacing_folder(png) as folder:
            made = [png / p.name for p in page.save_curves(told, folder)]
    pictures = sum(len(t.pictures) for t in told)
    ui.document({"out": str(out), "runs": [str(r) for r in runs], "pictures": pictures, "png": [str(p) for p in made]})
    ui.info(f"{counted(len(runs), 'run')}, {counted(pictures, 'picture')}")
    ui.data(str(out))


def sort_out(targets: list[str]) -> tuple[list[Path], dict[str, list[dict[str, Any]]]]:
    """(runs, {results file: its content}) of what was named. VgmError: something is neither, or there is no run."""
    from vgm_cli.engine.evaluate.compare import read_results
    from vgm_cli.engine.run_files import is_run, newest

    runs: list[Path] = []
    results = {}
    for target in targets:
        path = Path(target)
        if path.is_file():
            results[target] = read_results(path)
            continue
        run = path if is_run(path) else newest(target)
        if run is None:
            message = "there is no run below ./runs" if target == "last" else f"no such run: {target}"
            raise VgmError(message, "name one: vgm report RUN; `vgm runs ls FOLDER` lists a folder's", USAGE)
        if run not in runs:
            runs.append(run)
    if not runs:
        raise VgmError("a report needs a run", "vgm report RUN RESULTS.json", USAGE)
    return runs, results
