"""What the leaderboard says, from what is known of every run: docs/results.md, its pictures, and one page of HTML.

Rows are {run: stages}, as generate_results.py keeps them: a stage is {"value": what a command gave} or {"failed": why}.
"""

from __future__ import annotations

import io
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgm_cli.engine.report import charts, page
from vgm_cli.images import GAP, SHADE, Layout, make_grid, save_png
from vgm_cli.ui import with_error

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
Tables = list[tuple[str, str, list[str], list[list[str]]]]  # (title, what to know, heads, rows)
HEADS = ["", "run", "parameters", "minutes", "NFE", "images/s", "FID", "FID, all images", "precision", "recall",
         "class or caption", "bits/dim", "memorised"]  # fmt: skip
MAIN = "mnist5k"  # the set that most runs are trained on, and whose first rows are made again with another seed
TEASED = 10  # samples of a run in the picture of all

# -- figures -------------------------------------------------------------------------------------------------------------


def known(row: Row, stage: str) -> Any:
    """What a stage gave; None where it failed or was not reached."""
    return (row.get(stage) or {}).get("value")


def results(row: Row, stage: str, metric: str) -> list[dict[str, Any]]:
    """Every result of a metric that a stage measured to a finite number."""
    return [r for r in known(row, stage) or [] if r["metric"] == metric and r["value"] is not None]


def number(row: Row, stage: str, metric: str) -> float:
    """For ranking: infinite where nothing was measured."""
    found = results(row, stage, metric)
    return float(found[0]["value"]) if found else float("inf")


def cell(row: Row, stage: str, metric: str) -> str:
    return ", ".join(with_error(r["value"], r.get("uncertainty")) for r in results(row, stage, metric)[:1])


def data_of(row: Row) -> str:
    return str(known(row, "trained")["data"])


def first_seed(rows: Rows) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if "@" not in name}


def ranked(rows: Rows, data: str | None = None) -> list[str]:
    """Names of the generators of a data set (MAIN), those with the least FID first; of the first seed alone."""
    data = data or MAIN
    own = {n: r for n, r in first_seed(rows).items() if data_of(r) == data and known(r, "trained")["sampled"]}
    return sorted(own, key=lambda name: number(own[name], "measured", "fid"))


def fid(rows: Rows, name: str) -> str:
    """Of every seed, the first one's first."""
    seeds = [n for n in (name, f"{name}@1") if n in rows]
    return "; ".join(c for n in seeds if (c := cell(rows[n], "measured", "fid")))


def kind_of(kind: str) -> str:
    """How a likelihood was had, and of which pixels where they are not the 8-bit ones."""
    other = [part for part in kind.split(", ")[1:] if "bits" in part or "binarised" in part]
    return ", ".join([kind.split(",")[0], *other])


def likelihood(row: Row) -> str:
    """Bits per dimension, or, where a codec stands before the model, per latent number or code."""

    def told(r: Mapping[str, Any], per: str) -> str:
        options = r["protocol"].get("options") or {}
        kind = r["protocol"].get("likelihood") or options.get("likelihood") or ""
        return f"{with_error(r['value'], r.get('uncertainty'))}{per}" + (f" ({kind_of(kind)})" if kind else "")

    return ", ".join(
        [told(r, "") for r in results(row, "likelihood", "bits-per-dim")]
        + [told(r, " per latent") for r in results(row, "likelihood", "bits-per-latent-dim")]
    )


def memorised(row: Row) -> str:
    copies = results(row, "memorised", "copies")
    share = f", {100 * copies[0]['value']:.1f} % near" if copies else ""
    return cell(row, "memorised", "memorisation") + share


# -- tables --------------------------------------------------------------------------------------------------------------


def line(rows: Rows, name: str, place: str) -> list[str]:
    row, sampled = rows[name], known(rows[name], "sampled") or {}
    trained, speed = known(row, "trained"), sampled.get("images_per_second")
    return [
        place,
        name,
        f"{trained['parameters']:,}",
        f"{trained['seconds'] / 60:.1f}",
        str(sampled.get("nfe") or ""),
        f"{speed:,.0f}" if speed else "",
        fid(rows, name),
        cell(row, "measured-all", "fid"),
        cell(row, "measured", "precision"),
        cell(row, "measured", "recall"),
        cell(row, "measured", "class-accuracy") or cell(row, "caption", "retrieval"),
        likelihood(row),
        memorised(row),
    ]


def generators(rows: Rows) -> Tables:
    sets = dict.fromkeys(data_of(r) for r in rows.values())
    tables: Tables = []
    for data in sorted(sets, key=lambda d: d != MAIN):
        lines = [line(rows, name, str(place)) for place, name in enumerate(ranked(rows, data), 1)]
        tables.append((f"Every generator of {Path(data).name}", GENERATORS if data == MAIN else "", HEADS, lines))
    return tables


def codecs(rows: Rows) -> Tables:
    heads = ["run", "parameters", "minutes", "FID of reconstructions", "PSNR (dB)", "bits/dim"]
    lines = []
    for name, row in first_seed(rows).items():
        if not (trained := known(row, "trained"))["sampled"]:
            values = [cell(row, "measured", "fid"), cell(row, "measured", "psnr"), likelihood(row)]
            lines.append([name, f"{trained['parameters']:,}", f"{trained['seconds'] / 60:.1f}", *values])
    return [("Codecs", "Of the test images, put through the codec and back.", heads, lines)]


def students(rows: Rows) -> Tables:
    """Teachers, and what was distilled from each."""
    heads = ["run", "NFE", "FID", "of the teacher's", "images/s", "minutes"]
    taught: dict[str, list[str]] = {}
    for name, row in first_seed(rows).items():
        if found := re.search(r"--teacher RUNS/(\S+)", known(row, "trained")["command"]):
            taught.setdefault(found[1], []).append(name)
    lines = []
    for teacher, names in taught.items():
        for name in (teacher, *sorted(names, key=lambda n: number(rows[n], "measured", "fid"))):
            if teacher not in rows:
                continue
            ratio = number(rows[name], "measured", "fid") / number(rows[teacher], "measured", "fid")
            of = line(rows, name, "")
            told = "" if name == teacher or ratio != ratio or ratio == float("inf") else f"{ratio:.2f}"
            lines.append(
                [f"{name}, student of {teacher}" if name != teacher else name, of[4], of[6], told, of[5], of[3]]
            )
    return [("Distillation (`vgm distill`)", "", heads, lines)]


def restorations(rows: Rows) -> Tables:
    heads = [
        "task",
        "method",
        "prior",
        "NFE",
        "baseline PSNR",
        "PSNR",
        "gain (dB)",
        "baseline SSIM",
        "SSIM",
        "images/s",
    ]
    found = []
    for name, row in first_seed(rows).items():
        for part in (known(row, stage) for stage in row if stage.startswith("restored ")):
            if part is None:
                continue
            method = re.search(r" ?--method (\S+)", part["task"])
            task = (
                part["task"]
                .replace(method[0] if method else "", "")
                .replace("--task ", "")
                .replace("--label data", "(class given)")
            )
            plain, better = part["baseline"] or {}, part["restored"]
            show = lambda side, key, digits: "" if side.get(key) is None else f"{side[key]:.{digits}f}"
            gain = "" if part["gain"] is None else f"{part['gain']:+.1f}"
            figures = [
                show(plain, "psnr", 1),
                show(better, "psnr", 1),
                gain,
                show(plain, "ssim", 2),
                show(better, "ssim", 2),
            ]
            line = [task.strip(), method[1] if method else "dps", name, str(part["nfe"]), *figures]
            found.append((task, -(better.get("psnr") or 0.0), [*line, f"{part['n'] / max(part['seconds'], 1e-9):.2g}"]))
    return [
        ("Restoration (`vgm restore`)", RESTORED, heads, [line for _, _, line in sorted(found, key=lambda f: f[:2])])
    ]


def rewarded(rows: Rows) -> Tables:
    heads = [
        "run",
        "steps",
        "minutes",
        "reward",
        "gain (standard deviations)",
        "KL per step",
        "class accuracy",
        "before",
        "FID",
    ]
    lines = []
    for name, row in first_seed(rows).items():
        trained = known(row, "trained")
        if found := re.search(r"finetune-rl .*--model RUNS/(\S+)", trained["command"]):
            log, base = trained["log"], rows.get(found[1], {})
            told = [f"{log[k]:.3g}" if k in log else "" for k in ("reward", "reward_gain", "kl")]
            accuracy = [cell(r, "measured", "class-accuracy") for r in (row, base)]
            minutes = f"{trained['seconds'] / 60:.1f}"
            lines.append([name, str(trained["steps"]), minutes, *told, *accuracy, cell(row, "measured", "fid")])
    return [("Reinforcement learning (`vgm finetune-rl`)", "", heads, lines)]


def tables(rows: Rows) -> Tables:
    made: list[Callable[[Rows], Tables]] = [generators, codecs, students, restorations, rewarded]
    return [table for make in made for table in make(rows) if table[3]]


def failures(rows: Rows, left: Mapping[str, str]) -> list[str]:
    """A sentence for whatever is missing."""
    parts = [f"{name}: {why}" for name, why in left.items()]
    for name, row in rows.items():
        parts += [f"{name}, {stage}: {found['failed']}" for stage, found in row.items() if "failed" in found]
    return parts


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
            name = "results.png" if data == MAIN else f"results-{Path(data).stem}.png"
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

GENERATORS = """FID, precision and recall: 2,000 samples against the 500 test digits, features of the shipped digit network
(mnist-features), so these numbers compare only with each other; ± is a standard error, a second number is the same with
another seed. FID, all images: against all 5,000, as these tables had it before there was a test part; it is smaller, as a
FID against more images is. Class: share of conditional samples that the shipped digit classifier recognises as
their class (it sees about 99 % of the test digits right). NFE: network evaluations for one image, guidance counted twice.
images/s: of 2,000. Memorised: how often a sample is farther from its nearest training digit than a test digit is (0.5: as
new as those, 0: copies), and the share of samples nearer than all but one in a hundred test digits (1 %: nothing was
copied).

bits/dim: of test digits, 8-bit pixels unless it says otherwise; where densities are continuous, with uniform
dequantisation. "exact" is that, an ODE is exact up to its solver, ELBO and IWAE are bounds. Models behind a codec have
the likelihood of its latents or codes ("per latent"), which does not compare with that of pixels. The shipped codec
(mnist-codec) has seen all digits."""
RESTORED = """64 test digits, Gaussian noise of 0.05 (none with a mask). The baseline is the adjoint; of super-resolution the
bicubic image. Completions of half a digit have no single truth, so their PSNR says how near the guess came, not how good
it looks."""
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
