"""vgm plugin: write a third-party package to start from, check an installed one."""

from __future__ import annotations

import importlib.util
import keyword
import re
import string
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from vgm_cli import __version__
from vgm_cli.errors import CHECK_FAILED, USAGE, VgmError, unknown
from vgm_cli.hookspecs import API_VERSION
from vgm_cli.registry import PluginInfo, load_target, registry
from vgm_cli.ui import ui

TEMPLATE = Path(str(resources.files("vgm_cli"))) / "templates" / "plugin"


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Write a plugin, check a plugin.")
    group.command("new")(new)
    group.command("check")(check)
    app.add_typer(group, name="plugin")


def new(
    name: Annotated[
        str, typer.Argument(help="Lower-case Python name: it names the module, the paper and the network.")
    ],
    dir: Annotated[Path | None, typer.Option("--dir", help="Where the package goes. Default: ./NAME.")] = None,
    title: Annotated[str, typer.Option(help="The paper's title. Default: from the name.")] = "",
) -> None:
    """Write a package with a working network, a recipe and tests.

    Examples:

        vgm plugin new mynet

        pip install -e mynet && vgm train mynet

    Next: vgm plugin check NAME
    """
    check_name(name)
    title = title or name.replace("_", " ").capitalize()
    if re.search(r'["\\\n\r$]', title):
        raise VgmError("the title holds a quote, a backslash, a dollar sign or a line break", "leave it out", USAGE)
    folder = dir if dir is not None else Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise VgmError(f"{folder} exists and is not an empty folder", "--dir chooses another", USAGE)
    files = write_package(folder, name, title)
    ui.document({"name": name, "path": str(folder), "files": [str(f) for f in files]})
    for file in files:
        ui.data(str(file))
    ui.info(f"next: {sys.executable} -m pip install -e {folder}, then vgm train {name}")


def check_name(name: str) -> None:
    """VgmError unless the name can be a module's, is free here, and hides no module that can be imported."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        fixed = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_0123456789")
        usable = fixed and not keyword.iskeyword(fixed)
        raise VgmError(
            f"'{name}' cannot name a Python module", f"for example '{fixed}'" if usable else "lower-case letters", USAGE
        )
    r = registry()
    dashed = name.replace("_", "-")
    taken = {n for _, n in r.components} | set(r.papers) | set(r.plugins)
    if name in taken or dashed in taken:
        raise VgmError(f"'{name}' is taken by a plugin that is there", "`vgm plugins --all` lists them", USAGE)
    if importlib.util.find_spec(name) is not None:
        raise VgmError(f"'{name}' is a module that is already installed", "choose another name", USAGE)


def write_package(folder: Path, name: str, title: str) -> list[Path]:
    """Fill the template into `folder`; returns the files."""
    from vgm_cli import atomic

    values = {
        "name": name,
        "dashed": name.replace("_", "-"),
        "title": title,
        "version": __version__,
        "api": API_VERSION,
        "year": time.strftime("%Y"),
    }
    written = []
    for source in sorted(TEMPLATE.rglob("*.tmpl")):
        relative = str(source.relative_to(TEMPLATE)).removesuffix(".tmpl").replace("__name__", name)
        text = string.Template(source.read_text(encoding="utf-8")).substitute(values)
        atomic.write_text(folder / relative, text)
        written.append(folder / relative)
    return written


def check(
    name: Annotated[
        str | None, typer.Argument(help="A plugin of `vgm plugins --all`. Default: all third-party ones.")
    ] = None,
) -> None:
    """Check plugins: loaded, torch-free to list, every component and recipe buildable. Exit code 3 if not.

    Examples:

        vgm plugin check mynet

    Next: python -m pytest   (the suites of vgm_cli.testing.suites)
    """
    known = registry().plugins
    if name is not None and name not in known:
        raise unknown("plugin", name, known)
    chosen = [p for p in known.values() if (p.name == name if name else not p.builtin)]
    found = {p.name: problems(p) for p in chosen}
    ui.document([{"plugin": n, "ok": not wrong, "problems": wrong} for n, wrong in found.items()])
    for n, wrong in found.items():
        for problem in wrong or ["ok"]:
            ui.data(f"{n}: {problem}")
    if not found:
        ui.info("no third-party plugin is installed; `vgm plugin new NAME` writes one")
    if any(found.values()):
        bad = [n for n, wrong in found.items() if wrong]
        raise VgmError(f"{', '.join(bad)}: {sum(map(len, found.values()))} problems", "listed above", CHECK_FAILED)


def problems(plugin: PluginInfo) -> list[str]:
    """What is wrong with one plugin, a line each."""
    from vgm_cli.recipe import load, shipped
    from vgm_cli.validation import check as check_recipe

    if plugin.error:
        return [plugin.error]
    out = []
    module = plugin.module.partition(":")[0]
    if not module.endswith(".py"):
        code = f"import importlib, sys; importlib.import_module({module!r}); sys.exit('torch' in sys.modules)"
        if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
            out.append(f"importing {module} imports torch: name targets as strings")
    if not plugin.components and not plugin.papers:
        out.append("it brings nothing: is there a vgm_components hook?")
    for component in plugin.components:
        try:
            load_target(component.target, component.name)
            presets = registry().presets(component)
            if not all(isinstance(kw, dict) for kw in presets.values()):
                out.append(f"{component.kind} {component.name}: a preset is not a dictionary of keywords")
        except Exception as e:
            out.append(f"{component.kind} {component.name}: {getattr(e, 'message', e)}")
    papers = {p.name for p in plugin.papers}
    for recipe in [n for n in shipped() if n.split("/")[0] in papers]:
        try:
            check_recipe(load(recipe))
        except Exception as e:
            out.append(f"recipe {recipe}: {getattr(e, 'message', e)}")
    return out
