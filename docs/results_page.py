"""What the leaderboard says, from what is known of every run: docs/results.md, its pictures, and one page of HTML.

Rows are as results_tables.py takes them.
"""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import results_tables
import torch
from PIL import Image
from results_tables import Row, Rows, data_of, failures, first_seed, known, ranked, tables
from torch import Tensor

from vgm_cli.engine.report import charts, page
from vgm_cli.images import GAP, SHADE, Layout, make_grid, save_png

TEASED = 10  # samples of a run in the picture of all

# -- pictures ------------------------------------------------------------------------------------------------------------


def first_samples(file: Path, n: int) -> Tensor | None:
    """The first samples of a run, (n, C, H, W) in [-1, 1]."""
    if not file.exists():
        return None
    with np.load(file) as arrays:
        pixels = torch.from_numpy(arrays["arr_0"][:n]).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1 if len(pixels) == n else None


def named_rows(parts: Mapping[str, Tensor]) -> np.ndarray:
    """Rows of as many small tiles each, twice as large, named."""
    columns = len(next(iter(parts.values())))
    channels = max(x.shape[1] for x in parts.values())
    x = torch.cat([x.expand(-1, channels, -1, -1) for x in parts.values()])
    scale = max(1, 64 // max(x.shape[-2:]))
    return make_grid(x, layout=Layout(columns, scale, GAP, SHADE), rows=list(parts))


def pictures(rows: Rows, runs: Path, images: Path) -> list[tuple[str, str]]:
    """Draws what there is; (file in docs/images, what it shows)."""
    drawn = []
    for data in dict.fromkeys(data_of(r) for r in rows.values()):
        found = {n: x for n in ranked(rows, data) if (x := first_samples(runs / f"{n}.npz", TEASED)) is not None}
        if found:
            name = "results.png" if data == results_tables.MAIN else f"results-{Path(data).stem}.png"
            save_png(named_rows(found), images / name)
            drawn.append((name, f"the first {TEASED} samples of every generator, the least FID on top"))
    if completed := dict(completions(rows)):
        save_png(named_rows(completed), images / "results-restored.png")
        drawn.append(("results-restored.png", "lower halves completed by every method, from what the first row shows"))
    return drawn


def completions(rows: Rows) -> Iterator[tuple[str, Tensor]]:
    """Of the task that all methods share: what was given, and what each made of it."""
    given = False
    for name, row in first_seed(rows).items():
        for part in (known(row, stage) for stage in row if stage.startswith("restored --mask lower")):
            folder = Path(part["picture"]).parent if part else Path()
            sides = [sorted((folder / side).glob("*.png"))[:TEASED] for side in ("degraded", "restored")]
            if part is None or len(sides[1]) < TEASED:
                continue
            for label, files in zip(("given", name), sides):
                if label != "given" or (not given and len(files) == TEASED):
                    pixels = np.stack([np.asarray(Image.open(f).convert("L")) for f in files])
                    yield label, torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
                    given = True


# -- pages ---------------------------------------------------------------------------------------------------------------

INTRO = """Every paper's small recipe, unchanged, trained on the part `train` of its data and measured on `test`, which chose
nothing (recipes are chosen on the parts `fit` and `val`, [data](data.md)). `make leaderboard` trains, measures and writes
this page and `leaderboard.html`, one page with samples, curves and commands of all. Machine: {machine}; {minutes:.0f}
minutes of commands for all rows. Second seeds: of the first rows."""

THEN = """Then `vgm sample RUNS/NAME -n 2000 --out NAME.npz`, `vgm evaluate NAME.npz --reference mnist5k --split test
--metrics fid,class-accuracy,precision-recall`, and for likelihoods `vgm evaluate RUNS/NAME --metrics bits-per-dim --split
test`."""


def wrapped(text: str, indent: str = "", end: str = "\n") -> str:
    """A paragraph of lines that fit a screen."""
    lines = textwrap.wrap(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return end.join(lines)


def minutes_of(rows: Rows) -> float:
    return sum(float(found.get("wall", 0.0)) for row in rows.values() for found in row.values()) / 60


def markdown(rows: Rows, left: Mapping[str, str], machine: str, images: Sequence[tuple[str, str]]) -> str:
    parts = ["# Results", wrapped(INTRO.format(machine=machine, minutes=minutes_of(rows)))]
    parts += [f"![{what}](images/{file})" for file, what in images]
    for title, about, heads, lines in tables(rows):
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *lines])
        parts += [f"## {title}", *map(wrapped, filter(None, about.split("\n\n"))), body]
    if missing := failures(rows, left):
        parts += ["## Not measured", "\n".join(wrapped(f"- {text}", "  ") for text in missing)]
    commands = [wrapped(known(r, "trained")["command"], "    ", " \\\n") for r in rows.values()]
    parts += ["## The commands", "\n".join(["```", *commands, "```"])]
    parts.append(wrapped(THEN))
    return "\n\n".join(parts) + "\n"


def html(rows: Rows, left: Mapping[str, str], machine: str, runs: Path) -> str:
    """One page with everything inside."""
    body = [f"<h1>Leaderboard</h1><p>{escape(plain(INTRO.format(machine=machine, minutes=minutes_of(rows))))}</p>"]
    for title, about, heads, lines in tables(rows):
        notes = [f'<p class="small">{escape(text)}</p>' for text in about.split("\n\n") if text]
        body += page.section(plain(title), [page.table(heads, lines), *notes])
    body += page.section("Not measured", [page.table(["what and why"], [[text] for text in failures(rows, left)])])
    body += page.section("Runs", [about_run(name, row, runs) for name, row in rows.items()])
    return page.document("Leaderboard", body)


def plain(text: str) -> str:
    """Without Markdown's marks."""
    return re.sub(r"\[(\w+)\]\([^)]+\)", r"docs/\1.md", text).replace("`", "")


def about_run(name: str, row: Row, runs: Path) -> str:
    """A fold with samples, restorations, curves and command."""
    inside = [page.pre([known(row, "trained")["command"]])]
    shown = []
    if (x := first_samples(runs / f"{name}.npz", 50)) is None:
        x = first_samples(runs / f"{name}.npz", TEASED)
    if x is not None:
        shown.append(page.picture("samples", png_of(make_grid(x, 10))))
    for part in (known(row, stage) for stage in row if stage.startswith("restored ")):
        if part and Path(part["picture"]).exists():
            shown.append(page.picture(part["task"], Path(part["picture"]).read_bytes()))
    inside.append(f'<div class="strip">{"".join(shown)}</div>' if shown else "")
    log = runs / name / "metrics.jsonl"
    lines = [json.loads(text) for text in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    for key in ("loss", *sorted({k for r in lines for k in r if k.endswith("/loss")})):
        points = [(float(r["step"]), float(r[key])) for r in lines if isinstance(r.get(key), int | float)]
        if len(points) > 1:
            inside.append(f"<figure><figcaption>{escape(key)}</figcaption>{charts.svg({key: points}, 'step')}</figure>")
    return f"<details><summary>{escape(name)}</summary>{''.join(inside)}</details>"


def png_of(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(out, format="PNG")
    return out.getvalue()
