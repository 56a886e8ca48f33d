"""The tables of the leaderboard, from what is known of every run.

Rows are {run: stages}, as generate_results.py keeps them: a stage is {"value": what a command gave} or {"failed": why}.
"config" is the run's recipe, "tokens" what its codec makes of an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vgm_cli.ui import with_error

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
Tables = list[tuple[str, str, list[str], list[list[str]]]]  # (title, what to know, heads, rows)
HEADS = ["", "run", "parameters", "minutes", "NFE", "samples", "images/s", "FID", "FID, all images", "precision",
         "recall", "class or caption", "bits/dim", "memorised"]  # fmt: skip
MAIN = "mnist5k"  # the set that most runs are trained on, and whose first rows are made again with another seed

# -- what is told beside -----------------------------------------------------------------------------------------------

GENERATORS = """FID, precision and recall: so many samples against the 500 test digits, features of the shipped digit network
(mnist-features), so these numbers compare only with each other; ± is a standard error, a second number is the same with
another seed. FID, all images: against all 5,000, as these tables had it before there was a test part; it is smaller, as a
FID against more images is. Class: share of conditional samples that the shipped digit classifier recognises as
their class (it sees about 99 % of the test digits right). NFE: network evaluations for one image, guidance counted twice.
images/s: of those. Memorised: how often a sample is farther from its nearest training digit than a test digit is (0.5: as
new as those, 0: copies), and the share of samples nearer than all but one in a hundred test digits (1 %: nothing was
copied).

bits/dim: of test digits, 8-bit pixels unless it says otherwise; where densities are continuous, with uniform
dequantisation. "exact" is that, an ODE is exact up to its solver, ELBO and IWAE are bounds. Models behind a codec have
the likelihood of its latents or codes ("per latent"), which does not compare with that of pixels. The shipped codec
(mnist-codec) has seen all digits."""
TOKENS = """Every model reads and writes what the named tokenizer makes of a digit, so rows of one tokenizer compare
and others do not: `mnist-tokenizer` is the shipped VQGAN's, `mnist-codec` the shipped autoencoder's, whose vectors MAR
writes without a codebook; other names are runs of this page. Passes: of the network that reads all tokens, a guided one
counted once. bits per token, where the model's order gives exact ones: of the test digits' tokens; per image: times
their number. Models that guess many codes at once (MaskGIT) or vectors (MAR) have none."""
SAMPLERS = """NFE counts both the predictor's evaluations and the corrector's; that of the ODE is of one batch, since it finds
its steps itself. Rows with fewer samples have larger FIDs than the same sampler with more. bits/dim is a
property of the network, not of the sampler: the probability flow's, of the test digits."""
WORDS = """Text models are asked for captions that they were trained on, evenly spaced, since nearly every caption
belongs to one picture: top-1 and top-5 are the shares of samples whose own picture is the nearest, or one of the five
nearest, of all in colour-features, class that of samples whose nearest is of the right class. Models of a hint are
asked for test pictures by their own words and hints; edge F1 is the agreement of their edges with that picture's, and,
beside it, with another's, which is what chance gives. FID: of so many samples against the test pictures; SUPIR's hints
are pictures made bad. FID in one step: of the run's own sampler, asked for one step."""
RESTORED = """64 test digits, Gaussian noise of 0.05 (none with a mask). The baseline is the adjoint; of super-resolution the
bicubic image. Completions of half a digit have no single truth, so their PSNR says how near the guess came, not how good
it looks."""

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


def likelihood_of(result: Mapping[str, Any]) -> str:
    """How a likelihood was had, in the metric's words."""
    options = result["protocol"].get("options") or {}
    return str(result["protocol"].get("likelihood") or options.get("likelihood") or "")


def likelihood(row: Row) -> str:
    """Bits per dimension, or, where a codec stands before the model, per latent number or code."""

    def told(r: Mapping[str, Any], per: str) -> str:
        kind = likelihood_of(r)
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


def counted(sampled: Mapping[str, Any]) -> str:
    return f"{sampled['n']:,}" if "n" in sampled else ""


def rate(sampled: Mapping[str, Any]) -> str:
    """Images per second, to two digits where there are few."""
    speed = sampled.get("images_per_second")
    return "" if not speed else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def line(rows: Rows, name: str, place: str) -> list[str]:
    row, sampled = rows[name], known(rows[name], "sampled") or {}
    trained = known(row, "trained")
    return [
        place,
        name,
        f"{trained['parameters']:,}",
        f"{trained['seconds'] / 60:.1f}",
        str(sampled.get("nfe") or ""),
        counted(sampled),
        rate(sampled),
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
        if not (trained := known(row, "trained"))["sampled"] and "measured" in row:
            values = [cell(row, "measured", "fid"), cell(row, "measured", "psnr"), likelihood(row)]
            lines.append([name, f"{trained['parameters']:,}", f"{trained['seconds'] / 60:.1f}", *values])
    return [("Codecs", "Of the test images, put through the codec and back.", heads, lines)]


def token_writers(rows: Rows) -> Tables:
    """Models of what a codec makes of an image, where that is a list: of codes, or MAR's of vectors."""
    heads = ["run", "tokenizer", "tokens", "parameters", "passes", "images/s", "FID", "class", "bits per token",
             "bits per image"]  # fmt: skip
    lines = []
    for name in ranked(rows):
        row, tokens = rows[name], known(rows[name], "tokens")
        if tokens is None:
            continue
        sampled, sampler = known(row, "sampled") or {}, known(row, "config").get("sampler") or {}
        exact = [r for r in results(row, "likelihood", "bits-per-latent-dim") if likelihood_of(r).startswith("exact")]
        bits = exact[0]["value"] if exact else None
        each = f"of {tokens['vocabulary']}" if tokens["vocabulary"] else f"vectors of {tokens['channels']}"
        lines.append([
            name,
            tokens["tokenizer"],
            f"{tokens['count']} {each}",
            f"{known(row, 'trained')['parameters']:,}",
            str(sampler.get("steps") or sampled.get("nfe") or ""),
            rate(sampled),
            fid(rows, name),
            cell(row, "measured", "class-accuracy"),
            "" if bits is None else with_error(bits, exact[0].get("uncertainty")),
            "" if bits is None else f"{bits * tokens['count']:.0f}",
        ])  # fmt: skip
    ways = f"{len(lines)} ways to write them" if len(lines) > 1 else "one way to write them"
    return [(f"The same digit tokens, {ways}", TOKENS, heads, lines)]


SDES = {"ve": "VE", "vp": "VP", "subvp": "sub-VP"}


def score_sdes(rows: Rows) -> Tables:
    """Every sampler that a score network of these SDEs was sampled with, and its likelihood."""
    heads = ["SDE", "run", "sampler", "NFE", "samples", "FID", "images/s", "bits/dim"]
    lines = []
    for name, row in first_seed(rows).items():
        config = known(row, "config") or {}
        if config.get("paper") != "score-sde" or not known(row, "trained")["sampled"]:
            continue
        objective = config["objective"]
        sde = SDES.get(str(objective.get("sde") or objective.get("preset")), "")
        for found in samplings(row):
            sampled, fids = found["sampled"], [r for r in found["results"] if r["metric"] == "fid"]
            told = [with_error(r["value"], r.get("uncertainty")) for r in fids if r["value"] is not None]
            figures = [str(sampled.get("nfe") or ""), counted(sampled), *(told or [""]), rate(sampled)]
            lines.append([sde, name, sampler_told(sampled["sampler"]), *figures, likelihood(row)])
    return [("Score-SDE: three SDEs, predictor and corrector or ODE", SAMPLERS, heads, lines)]


def samplings(row: Row) -> Iterator[dict[str, Any]]:
    """What the run was sampled with: by its own sampler, then by others."""
    if sampled := known(row, "sampled"):
        yield {"sampled": sampled, "results": known(row, "measured") or []}
    for stage in row:
        if stage.startswith("sampled ") and (found := known(row, stage)):
            yield found


def sampler_told(node: Mapping[str, Any]) -> str:
    """A sampler of score-sde in few words."""
    if node["name"] == "score-sde-ode":
        return f"ODE (RK45, tolerance {float(node.get('rtol', 1e-5)):g})"
    steps, corrector = f"{node.get('steps', 1000)} steps", node.get("corrector", "langevin")
    predictor = node.get("predictor", "reverse-diffusion")
    if corrector == "none":
        return f"predictor ({predictor}), {steps}"
    return f"predictor-corrector ({predictor}, {corrector}, snr {float(node.get('snr', 0.16)):g}), {steps}"


def words_and_hints(rows: Rows) -> Tables:
    """Models that draw what words say, or follow a picture."""
    heads = ["run", "parameters", "minutes", "NFE", "samples", "FID", "FID in one step", "top-1", "top-5",
             "class", "edge F1", "edge F1, another's", "asked for"]  # fmt: skip
    lines = []
    for name, row in first_seed(rows).items():
        asked = next((s for s in ("caption", "paired") if known(row, s)), None)
        if asked is None:
            continue
        trained, sampled = known(row, "trained"), known(row, "sampled") or {}
        own = "measured" if sampled else "paired"
        some = known(row, asked)[0]["n"]
        part = "training captions" if asked == "caption" else "test pictures' own words and hints"
        retrieved = [cell(row, asked, f"retrieval-{end}") for end in ("top1", "top5", "class")]
        lines.append([
            name,
            f"{trained['parameters']:,}",
            f"{trained['seconds'] / 60:.1f}",
            str(sampled.get("nfe") or ""),
            counted(sampled) or f"{some:,}",
            cell(row, own, "fid"),
            in_one_step(row),
            *retrieved,
            cell(row, "paired", "edge-f1"),
            cell(row, "paired", "edge-f1-other"),
            f"{some:,} {part}",
        ])  # fmt: skip
    return [("Words and hints", WORDS, heads, lines)]


def in_one_step(row: Row) -> str:
    """FID of one step: the run's own where it takes one, otherwise that of its sampler asked for one."""
    for found in samplings(row):
        sampled = found["sampled"]
        if sampled.get("nfe") == (1 if sampled.get("guidance_scale") in (None, 1) else 2):
            told = [with_error(r["value"], r.get("uncertainty")) for r in found["results"] if r["metric"] == "fid"]
            return ", ".join(told)
    return ""


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
            of = dict(zip(HEADS, line(rows, name, "")))
            told = "" if name == teacher or ratio != ratio or ratio == float("inf") else f"{ratio:.2f}"
            who = f"{name}, student of {teacher}" if name != teacher else name
            lines.append([who, of["NFE"], of["FID"], told, of["images/s"], of["minutes"]])
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
    made: list[Callable[[Rows], Tables]] = [
        generators, codecs, token_writers, score_sdes, words_and_hints, students, restorations, rewarded
    ]  # fmt: skip
    return [table for make in made for table in make(rows) if table[3]]


def failures(rows: Rows, left: Mapping[str, str]) -> list[str]:
    """A sentence for whatever is missing."""
    parts = [f"{name}: {why}" for name, why in left.items()]
    for name, row in rows.items():
        parts += [f"{name}, {stage}: {found['failed']}" for stage, found in row.items() if "failed" in found]
    return parts
