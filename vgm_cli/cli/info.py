"""What is there: ls, cat, cp, validate, inspect, plugins, explain, env."""

from __future__ import annotations

import importlib.util
import json
import re
import textwrap
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.cli.train import Trust
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.hookspecs import KINDS, Component
from vgm_cli.registry import registry
from vgm_cli.ui import human, ui

PLURALS = {f"{kind}s": kind for kind in KINDS}
LISTS = ("papers", "recipes", "presets", "components", *PLURALS)


def register(app: typer.Typer) -> None:
    for name, command in (
        ("ls", ls),
        ("cat", cat),
        ("cp", cp),
        ("validate", validate),
        ("inspect", inspect),
        ("explain", explain),
        ("plugins", plugins),
        ("env", env),
    ):
        app.command(name)(command)


def complete_lists(incomplete: str) -> list[str]:
    return [n for n in LISTS if n.startswith(incomplete)]


# -- ls --------------------------------------------------------------------------------------------------------------


def ls(
    what: Annotated[
        str,
        typer.Argument(
            help="papers, recipes, presets, components, " + ", ".join(PLURALS), autocompletion=complete_lists
        ),
    ] = "papers",
) -> None:
    """List papers, recipes, presets or components.

    Examples:

        vgm ls                      # papers

        vgm ls recipes

        vgm ls samplers --json

    Next: vgm explain PAPER
    """
    if what not in LISTS:
        raise unknown("list", what, LISTS)
    columns: tuple[str, ...]
    if what == "papers":
        columns, rows = ("paper", "year", "family", "summary", "recipes"), papers_table()
    elif what == "recipes":
        columns, rows = ("recipe", "summary"), recipes_table()
    elif what == "presets":
        columns, rows = ("kind", "component", "preset", "keywords"), presets_table()
    elif what == "components":
        columns = ("kind", "name", "plugin", "presets", "summary")
        rows = [(kind, *row) for kind in PLURALS.values() for row in components_table(kind)]
    else:
        columns, rows = ("name", "plugin", "presets", "summary"), components_table(PLURALS[what])
    ui.document([dict(zip(columns, row)) for row in rows])
    ui.table(columns, [[shown(cell) for cell in row] for row in rows])
    broken = [p.name for p in registry().plugins.values() if p.error]
    if broken:
        ui.info(f"not loaded: {', '.join(broken)}; `vgm plugins` says why")


def shown(cell: Any) -> str:
    if isinstance(cell, list):
        return ", ".join(map(str, cell))
    return json.dumps(cell) if isinstance(cell, dict) else str(cell)


def recipes_of(paper: str) -> list[str]:
    from vgm_cli.recipe import shipped

    return [name.partition("/")[2] for name in shipped() if name.startswith(f"{paper}/")]


def papers_table() -> list[tuple[Any, ...]]:
    ordered = sorted(registry().papers.values(), key=lambda p: (p.year, p.name))
    return [(p.name, p.year, p.family, p.summary, recipes_of(p.name)) for p in ordered]


def recipes_table() -> list[tuple[Any, ...]]:
    from vgm_cli.recipe import shipped

    return [(name, headline(path)) for name, path in shipped().items()]


def headline(path: Path) -> str:
    """The first sentence of a recipe's opening comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line[2:].strip())
    text = re.sub(r"\([^()]*\)", lambda m: m[0].replace(". ", ".\N{NO-BREAK SPACE}"), " ".join(lines))
    # a sentence ends at a full stop or colon that is followed by a capital, not inside brackets, not after "et al"
    first = re.split(r"(?<=[.:])(?<!et al\.)(?<!app\.)(?<!vs\.)\s+(?=[A-Z])", text)[0]
    return first.replace("\N{NO-BREAK SPACE}", " ").rstrip(":")


def presets_table() -> list[tuple[Any, ...]]:
    rows = []
    for (kind, name), component in sorted(registry().components.items()):
        rows += [(kind, name, preset, dict(kw)) for preset, kw in registry().presets(component).items()]
    return rows


def components_table(kind: str) -> list[tuple[Any, ...]]:
    r = registry()
    found = [(name, r.components[kind, name]) for name in r.names(kind)]
    rows = [(name, r.owners[kind, name], list(r.presets(c)), c.summary) for name, c in found]
    if kind == "dataset":
        from vgm_cli.data import SHIPPED

        rows += [(name, "vgm", [], summary) for name, summary in SHIPPED.items()]
    return rows


# -- cat and cp ------------------------------------------------------------------------------------------------------


def cat(
    recipe: Annotated[
        str, typer.Argument(help="PAPER/RECIPE, PAPER or a YAML file.", autocompletion=complete.trainable)
    ],
    resolved: Annotated[bool, typer.Option("--resolved", help="With its `base:` recipes merged in.")] = False,
) -> None:
    """Show a recipe.

    Examples:

        vgm cat dit/imagenet512

        vgm cat dit/imagenet512 --resolved

    Next: vgm cp dit/imagenet512 my.yaml
    """
    import yaml

    from vgm_cli.recipe import load_file, locate

    name, path = locate(recipe)
    config, _ = load_file(path, name)
    text = path.read_text(encoding="utf-8")
    if resolved:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    ui.document({"name": name, "path": str(path), "config": config, "text": text})
    for line in text.splitlines():
        ui.data(line)


def cp(
    recipe: Annotated[
        str, typer.Argument(help="PAPER/RECIPE, PAPER or a YAML file.", autocompletion=complete.trainable)
    ],
    dest: Annotated[Path, typer.Argument(help="A new .yaml file, or a folder to put it in.")],
    make_parents: Annotated[bool, typer.Option("--make-parents", help="Create the folders above it.")] = False,
    force: Annotated[bool, typer.Option("--force/--no-clobber", help="Replace a file that is there.")] = False,
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
        if not force:
            raise VgmError(f"{target} exists", "--force replaces it", USAGE)
    if not target.parent.is_dir() and not make_parents:
        raise VgmError(f"there is no folder {target.parent}", "--make-parents creates it", USAGE)
    atomic.write_text(target, with_full_base(path.read_text(encoding="utf-8"), path))
    ui.document({"recipe": name, "path": str(target)})
    ui.data(str(target))
    ui.info(f"next: vgm validate {target}")


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


# -- validate --------------------------------------------------------------------------------------------------------


def validate(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, PAPER/RECIPE or PAPER.", autocompletion=complete.trainable)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="As for train.", autocompletion=complete.keys)
    ] = None,
    trust: Trust = False,
) -> None:
    """Check a recipe: keys, values, components; then build it without memory and count.

    Examples:

        vgm validate my.yaml

        vgm validate dit/imagenet256 model.preset=DiT-S/2

    Next: vgm train my.yaml
    """
    from vgm_cli import recipe as recipes
    from vgm_cli.validation import check

    recipes.allow_typed(overrides or [], trust)
    resolved = recipes.load(recipe, None, overrides or [])
    numbers, reason = check(resolved)
    total = sum(numbers.values())
    ui.document({"recipe": resolved.name, "ok": True, "parameters": total, "networks": numbers, "not_built": reason})
    ui.data(f"ok: {total:,} parameters" if numbers else f"ok: not built, {reason}")
    if len(numbers) > 1:
        for role, n in numbers.items():
            ui.data(f"  {role}: {n:,}")


# -- inspect ---------------------------------------------------------------------------------------------------------


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            help="A .safetensors, .pt, .ckpt, .pkl or .npz file, shards, a folder or a run.",
            autocompletion=complete.runs,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor (.safetensors only).")] = False,
) -> None:
    """Say what a weights file holds. Nothing in it is executed.

    Examples:

        vgm inspect runs/dit-mnist/20260101-120000

        vgm inspect DiT-XL-2-256x256.pt

    Next: vgm convert FILE OUT.safetensors   or   vgm sample FILE
    """
    from vgm_cli.limits import safetensors_header
    from vgm_cli.weights.files import locate
    from vgm_cli.weights.inspect import describe

    path = locate(file)
    facts = describe(path)
    if tensors and path.suffix == ".safetensors":
        facts["list"] = safetensors_header(path)[0]
    ui.document(facts)
    for line in report(facts):
        ui.data(line)


def report(facts: dict[str, Any]) -> list[str]:
    """The lines of `vgm inspect`."""
    dtypes = ", ".join(f"{d} {human(n)}" for d, n in facts["dtypes"].items())
    lines = [f"{facts['path']}: {facts['kind']}"]
    component = facts.get("component")
    if component:
        kwargs = ", ".join(f"{k}={v}" for k, v in component.get("kwargs", {}).items())
        lines.append(f"  component   {component.get('kind', 'model')} {component['name']}({kwargs})")
        if facts.get("presets"):
            lines.append(f"  preset      {' or '.join(facts['presets'])}")
        lines.append(f"  weights     {facts.get('weights', 'raw')}, step {facts.get('step', 0):,}")
        for key in ("view", "parts", "data"):
            if facts.get(key):
                lines.append(f"  {key:<11} {json.dumps(facts[key])}")
        if facts.get("recipe", {}).get("paper"):
            lines.append(f"  paper       {facts['recipe']['paper']}")
        if facts.get("source"):
            lines.append(f"  source      {facts['source']['file']} ({facts['source']['layout']})")
    for entry, n in facts.get("entries", {}).items():
        taken = ", which `vgm convert` takes" if f"{facts.get('entry', '')}.".startswith(f"{entry}.") else ""
        lines.append(f"  entry       '{entry}': {n} tensors{taken}")
    lines.append(f"  tensors     {facts['tensors']:,}")
    lines.append(f"  parameters  {facts['parameters']:,} ({dtypes or 'none'})")
    if bad := facts.get("non_finite"):
        rest = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        lines.append(f"  not finite  {len(bad)} of {facts['tensors']} tensors hold NaN or infinities: {bad[0]}{rest}")
    if facts.get("also"):
        lines.append(f"  also        {', '.join(facts['also'])}; `vgm convert --weights NAME` takes one of them")
    if "looks_like" in facts:
        lines += [f"  {k:<11} {v}" for k, v in layout_lines(facts)]
    for name, t in facts.get("list", {}).items():
        lines.append(f"  {name}  {t['dtype']} {tuple(t['shape'])}")
    return lines


WEIGHTS = {"ema": "an average", "raw": "raw, not averaged", "released": "the file does not say whether averaged"}
ROWS = 10  # of a table of differences; --json has all


def layout_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a foreign file seems to be, and how it differs."""
    lines = []
    for i, hit in enumerate(facts["looks_like"] or [facts["nearest"]] if facts.get("nearest") else facts["looks_like"]):
        preset = f", {' or '.join(hit['presets'])}" if hit["presets"] else ""
        text = f"{hit['converter']}: {hit['summary']}; {hit['kind']} {hit['component']}{preset}"
        text += f", {hit['family']}" if hit["family"] else ""
        lines.append((("looks like" if not i else "or") if facts["looks_like"] else "nearest", text))
    if not lines:
        return [("looks like", "no published layout that is known here")]
    lines.append(("weights", WEIGHTS[facts["weights"]]))
    fit = facts["fit"]
    if fit["reason"]:
        return [*lines, ("does not fit", fit["reason"])]
    lines.append(("fits", f"{fit['wanted'] - len(fit['missing']) - len(fit['shapes'])} of {fit['wanted']} tensors"))
    rows = [("missing", f"{k} (nearest: {near})" if near else k) for k, near in fit["missing"].items()]
    shapes = fit["shapes"].items()
    rows += [("shape", f"{k} {tuple(v['file'])}, wanted {tuple(v['wanted'])}") for k, v in shapes]
    rows += [("unexpected", k) for k in fit["unexpected"]]
    if len(rows) > ROWS:
        rows = [*rows[:ROWS], ("", f"and {len(rows) - ROWS} more; --json lists all")]
    return lines + rows


# -- plugins ---------------------------------------------------------------------------------------------------------


def plugins(
    all: Annotated[bool, typer.Option("--all", help="Also the built-in papers.")] = False,
) -> None:
    """List plugins: what they bring, how long they take to load, what is wrong with them.

    Examples:

        vgm plugins --all

        vgm plugins --all --json

    Next: vgm plugin new NAME   (VGM_PLUGINS=a,b loads only these, -p no:NAME leaves one out)
    """
    found = [p for p in registry().plugins.values() if all or p.error or not p.builtin]
    ui.document(
        [
            {
                "name": p.name,
                "version": p.version,
                "distribution": p.distribution,
                "builtin": p.builtin,
                "module": p.module,
                "papers": [x.name for x in p.papers],
                "components": [{"kind": c.kind, "name": c.name, "target": c.target} for c in p.components],
                "milliseconds": round(p.seconds * 1000, 2),
                "error": p.error,
                "trace": p.trace,
            }
            for p in found
        ]
    )
    if not found:
        ui.info("no plugins besides the built-in papers; --all shows those")
        return
    rows = [
        (
            p.name,
            p.version or "-",
            p.distribution,
            brings(p.papers, p.components),
            f"{p.seconds * 1000:.1f} ms",
            p.error,
        )
        for p in found
    ]
    ui.table(("plugin", "version", "distribution", "brings", "load", "error"), rows)


def brings(papers: list[Any], components: list[Component]) -> str:
    """'paper dit; model dit; converter dit, dit-diffusers'."""
    kinds: dict[str, list[str]] = {"paper": [p.name for p in papers]}
    for c in components:
        kinds.setdefault(c.kind, []).append(c.name)
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names) or "-"


# -- explain ---------------------------------------------------------------------------------------------------------


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


# -- env -------------------------------------------------------------------------------------------------------------


def env() -> None:
    """Versions and hardware, for bug reports.

    Examples:

        vgm env --json

    Next: vgm plugins --all
    """
    from vgm_cli.engine.run import environment

    facts = environment()
    ui.document(facts)
    for key, value in facts.items():
        if isinstance(value, dict):
            ui.data(f"{key}: " + ", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            ui.data(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
