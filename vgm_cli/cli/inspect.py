"""vgm inspect."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from vgm_cli.cli import complete
from vgm_cli.ui import human, ui


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            help="A .safetensors, .pt, .ckpt, .pkl, .npz or .msgpack file, shards, a folder or a run.",
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
        if t := facts.get("tokens"):
            grid = "×".join(map(str, t["grid"]))
            fewer = f"{t['compression']:.4g} times fewer bits than 8-bit pixels"
            lines.append(f"  tokens      {grid} of {t['codes']} codes an image: {fewer}")
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
