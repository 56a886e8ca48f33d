"""One page of HTML about runs, complete in itself: styles, curves and pictures are inside, and it runs no script.

Every text of a run is escaped: a run of a stranger can show what it wants and do nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vgm_cli import __version__
from vgm_cli.engine.evaluate.compare import compare_one
from vgm_cli.engine.report import charts, gather
from vgm_cli.engine.report.gather import Link, Told
from vgm_cli.ui import with_error

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; } h3 { margin-bottom: 0.3em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.2em 0.9em 0.2em 0; border-bottom: 1px solid #eee; vertical-align: top; }
th { font-weight: 600; } td.n { font-variant-numeric: tabular-nums; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } pre { background: #f6f6f6; padding: 0.8em; overflow-x: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: 1em; }
.strip { display: flex; gap: 1em; overflow-x: auto; align-items: flex-start; } figure { margin: 0; }
figure img { height: 300px; image-rendering: pixelated; } figcaption, .small { color: #666; font-size: 0.9em; }
.curves figure svg { width: 100%; }
"""


def page(runs: Sequence[Told], results: Mapping[str, list[dict[str, Any]]], title: str) -> str:
    """The whole document. results: {file: what `vgm evaluate --out` wrote there}."""
    body = [
        f"<h1>{escape(title)}</h1>",
        table(["", *(r.name for r in runs)], summary_rows(runs)),
        *section("Figures", figures(results)),
        *section("Pictures", [part for run in runs for part in strip(run)]),
        *section("Curves", curves(runs)),
        *section("Settings that differ" if len(runs) > 1 else "Settings given", settings(runs)),
        *section("Where the weights come from", [part for run in runs for part in chain(run)]),
        *section("Command lines", [f"<h3>{escape(r.name)}</h3>{pre(r.commands)}" for r in runs if r.commands]),
        *section("Recipes", [whole_recipe(run) for run in runs if run.config]),
        f'<p class="small">vgm {escape(__version__)} report</p>',
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """A page of these parts, into which nothing comes from outside, and that runs no script."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">{head}'
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"


def section(title: str, parts: Iterable[str]) -> list[str]:
    """A part of the page; nothing where there is nothing to tell."""
    told = [p for p in parts if p]
    return [f"<h2>{escape(title)}</h2>", *told] if told else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [f"<tr>{''.join(f'<td class=n>{escape(c)}</td>' for c in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>{''.join(body)}</table>" if body else ""


def pre(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


# -- parts -----------------------------------------------------------------------------------------------------------


def summary_rows(runs: Sequence[Told]) -> Iterator[list[str]]:
    for key in dict.fromkeys(k for run in runs for k in run.summary):
        yield [key, *(run.summary.get(key, "") for run in runs)]


def settings(runs: Sequence[Told]) -> list[str]:
    """Of several runs the keys in which their recipes differ; of one what its user gave, with where it came from."""
    if len(runs) == 1:
        own = {k: o for k, o in runs[0].origins.items() if not o.startswith(("recipe", "default"))}
        rows = [[k, str(runs[0].config.get(k, "")), o] for k, o in sorted(own.items()) if k in runs[0].config]
        return [table(["key", "value", "from"], rows)]
    keys = dict.fromkeys(k for run in runs for k in run.config)
    values = {k: [str(run.config.get(k, "–")) for run in runs] for k in keys}
    return [table(["key", *(r.name for r in runs)], ([k, *v] for k, v in values.items() if len(set(v)) > 1))]


def curves(runs: Sequence[Told]) -> list[str]:
    drawn = []
    for name, lines in gather.curves(runs).items():
        log = charts.spans_decades(lines)
        picture = charts.svg(lines, "step, logarithmic scale" if log else "step", log)
        drawn.append(f"<figure><figcaption>{escape(name)}</figcaption>{picture}</figure>")
    return [f'<div class="curves">{"".join(drawn)}</div>'] if drawn else []


def picture(what: str, png: bytes) -> str:
    """A PNG with what it shows below it."""
    inside = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(what)}" src="data:image/png;base64,{inside}">'
        f"<figcaption>{escape(what)}</figcaption></figure>"
    )


def strip(run: Told) -> list[str]:
    """A run's pictures in the order of its steps."""
    figures = [picture(what, p.read_bytes()) for what, p in run.pictures]
    return [f'<h3>{escape(run.name)}</h3><div class="strip">{"".join(figures)}</div>'] if figures else []


def figures(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """One row for each metric, one column for each file; what may not be compared with the first file is marked."""
    names = list(dict.fromkeys(r["metric"] for found in results.values() for r in found))
    rows, remarks, protocols = [], [], []
    for metric in names:
        row, first = [metric], None
        for file, found in results.items():
            one = next((r for r in found if r["metric"] == metric), None)
            if one is None:
                row.append("")
                continue
            mark = ""
            if first is not None and (reasons := compare_one(first, one)["reasons"]):
                mark = " *"
                remarks.append(f"* {metric} of {file} is not comparable with the first: {'; '.join(reasons)}")
            row.append(f"{with_error(one['value'], one.get('uncertainty'))} (n={one.get('n')}){mark}")
            protocols.append([metric, file, str(one.get("model", "")), protocol_of(one)])
            first = first or one
        rows.append(row)
    heads = ["", *results]
    notes = [f'<p class="small">{escape(r)}</p>' for r in remarks]
    detail = table(["metric", "file", "model", "protocol"], protocols)
    more = f"<details><summary>how they were measured</summary>{detail}</details>" if protocols else ""
    return [table(heads, rows), *notes, more] if rows else []


def protocol_of(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in result["protocol"].items() if v not in (None, "", {}, []))


def chain(run: Told) -> list[str]:
    return [f"<h3>{escape(run.name)}</h3><ul>{link(run.chain)}</ul>"] if run.chain else []


def link(of: Link, role: str = "") -> str:
    parts = "".join(link(part, name) for name, part in of.parts.items())
    named, note = f"{escape(role)}: " if role else "", f" ({escape(of.note)})" if of.note else ""
    inner = f"<ul>{parts}</ul>" if parts else ""
    return f"<li>{named}<code>{escape(of.path)}</code> {escape(of.says)}{note}{inner}</li>"


def whole_recipe(run: Told) -> str:
    lines = [f"{k}: {v}" for k, v in run.config.items()]
    return f"<details><summary>{escape(run.name)}</summary>{pre(lines)}</details>"


def save_curves(runs: Sequence[Told], folder: Path) -> list[Path]:
    """Every curve as FOLDER/COLUMN.png."""
    made = []
    for name, lines in gather.curves(runs).items():
        path = folder / f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in name)}.png"
        log = charts.spans_decades(lines)
        charts.save_png(lines, f"step; {name}{', logarithmic scale' if log else ''}", path, log)
        made.append(path)
    return made
