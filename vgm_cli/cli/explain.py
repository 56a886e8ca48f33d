"""vgm explain."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.ls import recipes_of
from vgm_cli.errors import unknown
from vgm_cli.hookspecs import KINDS, Component
from vgm_cli.registry import registry
from vgm_cli.ui import ui


def register(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    paper: Annotated[str, typer.Argument(help="A paper of `vgm ls`.", autocompletion=complete.papers)],
) -> None:
    """Tell what a paper is, its published numbers, and which files to read.

    Examples:

        vgm explain dit

    Next: vgm cat PAPER/RECIPE, vgm train PAPER
    """
    r = registry()
    if paper not in r.papers:
        raise unknown("paper", paper, r.papers)
    p = r.papers[paper]
    recipes = recipes_of(paper)
    parts = [describe_component(c) for c in used_by(paper)]
    page, idea, equations = page_of(paper)
    ui.document(
        {
            "name": p.name,
            "title": p.title,
            "year": p.year,
            "arxiv": p.arxiv,
            "repository": p.repository,
            "family": p.family,
            "summary": p.summary,
            "expects": dict(p.expects),
            "page": page,
            "idea": idea,
            "equations": equations,
            "components": parts,
            "recipes": recipes,
        }
    )
    ui.data(f"{p.title} ({p.year})" + (f", arXiv {p.arxiv}" if p.arxiv else ""))
    ui.data(f"  {p.summary}" if p.summary else f"  {p.family}")
    for label, text in (("family", p.family), ("official code", p.repository)):
        if text:
            ui.data(f"  {label:<14} {text}")
    for what, value in p.expects.items():
        ui.data(f"  published      {what}: {value:g}")
    if idea:
        ui.data("  the idea")
    for sentence in idea:
        for line in textwrap.wrap(sentence, 110, initial_indent="    ", subsequent_indent="       "):
            ui.data(line)
    if equations:
        ui.data("  equations and where they live")
    for equation, code in equations:
        ui.data(f"    {equation}")
        ui.data(f"               {code}")
    ui.data("  parts")
    for part in parts:
        ui.data(f"    {part['kind']:<10} {part['name']:<18} {part['target']}")
        ui.data(f"               {part['file']}" if part["file"] else f"               {part['summary']}")
    if page:
        ui.data(f"  page           {page}")
    ui.data(f"  recipes        {', '.join(f'{paper}/{n}' for n in recipes) or 'none'}")
    if recipes:
        from vgm_cli.recipe import next_command

        ui.info(f"next: {next_command(paper)}")


def page_of(paper: str) -> tuple[str, list[str], list[tuple[str, str]]]:
    """The paper's page: its file, the lines of the idea, (equation, code) pairs; empty for a plugin without a page."""
    found = importlib.util.find_spec("vgm_papers") is not None  # not in an editable installation of before
    path = Path(str(resources.files("vgm_papers"))) / f"{paper}.md" if found else Path()
    if not path.is_file():
        return "", [], []
    sections = {s.partition("\n")[0]: s for s in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)}
    idea = re.findall(r"^\d+\. .*(?:\n   .*)*", sections.get("The idea in ten lines", ""), re.M)
    table = sections.get("Equations and where they live", "")
    rows = re.findall(r"^\| (?!equation|---)(.*?) \| (.*?) \|$", table.replace("\\|", "∣"), re.M)
    return str(path), [" ".join(line.split()) for line in idea], [(a.strip(), b.replace("`", "")) for a, b in rows]


def used_by(paper: str) -> list[Component]:
    """What the paper's plugin brings, then what its recipes take from elsewhere."""
    from vgm_cli.recipe import COMPONENT_NODES, load_file, shipped

    r = registry()
    found = [c for p in r.plugins.values() if any(x.name == paper for x in p.papers) for c in p.components]
    for name, path in shipped().items():
        if not name.startswith(f"{paper}/"):
            continue
        config, _ = load_file(path, name)
        nodes = [(kind, config.get(kind)) for kind in COMPONENT_NODES]
        nodes += [((n or {}).get("kind", "model"), n) for n in (config.get("roles") or {}).values()]
        for kind, node in nodes:
            component = r.components.get((kind, (node or {}).get("name", "")))
            if component is not None and component not in found:
                found.append(component)
    order = {kind: i for i, kind in enumerate(KINDS)}
    return sorted(found, key=lambda c: order[c.kind])


def describe_component(c: Component) -> dict[str, str]:
    return {"kind": c.kind, "name": c.name, "target": c.target, "file": source_file(c.target), "summary": c.summary}


def source_file(target: str) -> str:
    """The file to read, found without importing it (its package is imported, which is torch-free)."""
    try:
        spec = importlib.util.find_spec(target.partition(":")[0])
    except (ImportError, ValueError):
        return ""
    return spec.origin or "" if spec else ""
