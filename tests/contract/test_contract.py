"""Laws of the contract: docs/hooks.md names all of it, nobody asks an object what it has, imports form no circle."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vgm_cli import api, registry
from vgm_cli.hookspecs import KINDS, Component, Hooks, Paper

ROOT = Path(__file__).parents[2]
HOOKS = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
HOMES = ("vgm_cli.api", "vgm_cli.offers")
CONTRACT = {n: c for n, c in vars(api).items() if inspect.isclass(c) and c.__module__ in HOMES}
SUBJECTS = {"objective", "network", "net", "model", "sampler"}  # names that code gives to objects of the contract


def public(cls: type) -> set[str]:
    return {n for n in (*inspect.get_annotations(cls), *vars(cls)) if not n.startswith("_")}


def rows(text: str = HOOKS) -> dict[str, set[str]]:
    """{first cell: names in backticks in the second} of every table row."""
    found = {}
    for line in text.splitlines():
        if m := re.match(r"\| `(\w+)[^`]*` \| ([^|]*) \|", line):
            found[m[1]] = set(re.findall(r"`(\w+)`", m[2]))
    return found


# -- docs/hooks.md -----------------------------------------------------------------------------------------------------


def test_the_page_lists_every_kind_and_hook() -> None:
    table = HOOKS.partition("## Kinds")[2].partition("## ")[0]
    assert set(KINDS) == set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    for name, hook in vars(Hooks).items():
        if name.startswith("vgm_"):
            arguments = ", ".join(list(inspect.signature(hook).parameters)[1:])
            assert f"| `{name}({arguments})` |" in HOOKS


@pytest.mark.parametrize("cls", [Component, Paper, *CONTRACT.values()], ids=lambda c: c.__name__)
def test_the_page_lists_every_name(cls: type) -> None:
    assert cls.__name__ in rows(), f"docs/hooks.md has no row for {cls.__name__}"
    assert rows()[cls.__name__] == public(cls)
    assert (inspect.getdoc(cls) or "").strip(), "no docstring"


def test_the_page_names_nothing_else() -> None:
    known = {*CONTRACT, "Component", "Paper", *KINDS, *(n for n in vars(Hooks) if n.startswith("vgm_"))}
    assert rows().keys() <= known, rows().keys() - known


# -- nothing is probed -------------------------------------------------------------------------------------------------


def offered() -> set[str]:
    """Names that the contract's classes may have: nobody asks for them by string."""
    classes = [c for n, c in CONTRACT.items() if n not in ("Phase", "Step", "Request")]
    return set().union(*(public(c) for c in classes))


def probes(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, subject, name) of every hasattr and getattr with a name spelt out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            subject, name = node.args[:2]
            last = subject.attr if isinstance(subject, ast.Attribute) else getattr(subject, "id", "")
            if isinstance(name, ast.Constant):
                yield node.lineno, last, name.value


def test_no_object_of_the_contract_is_probed() -> None:
    names = offered() - {"state_dict"} | {"rates", "truncate", "overwriting"}  # strangers' pickles have states, too
    found = []
    for folder in ("vgm_cli", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for line, subject, name in probes(ast.parse(file.read_text(encoding="utf-8"))):
                if name in names or subject in SUBJECTS:
                    found.append(f"{file.relative_to(ROOT)}:{line} asks {subject} for {name!r}")
    assert not found, "isinstance with a protocol of vgm_cli.api: " + "; ".join(found)


def test_the_law_of_probes_sees_one() -> None:
    tree = ast.parse('getattr(self.model, "secret", 0)\nhasattr(thing, "null_condition")\ngetattr(os, "O_BINARY", 0)')
    assert [(s, n) for _, s, n in probes(tree)] == [
        ("model", "secret"),
        ("thing", "null_condition"),
        ("os", "O_BINARY"),
    ]
    assert "null_condition" in offered()


# -- bare objects are completed once -----------------------------------------------------------------------------------


class Bare:
    """The least that an objective is."""

    def __init__(self, model: nn.Module):
        self.networks = {"model": model}

    def phases(self) -> list[api.Phase]:
        return [api.Phase("main")]

    def loss(self, phase: str, batch: api.Batch, step: api.Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = batch["x"]
        return (self.networks["model"](x, torch.zeros(len(x))) - x).square().mean(), {}


@dataclasses.dataclass(frozen=True)
class BareSampler:
    """The least that a sampler is; frozen, as many are."""

    scale: float = 1.0

    def __call__(self, view: Any, request: api.Request) -> torch.Tensor:
        return request.randn() * self.scale


def test_a_bare_objective_is_completed_and_trains(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_cli import recipe as recipes
    from vgm_cli.engine.train.loop import train

    r = registry.registry()
    for kind, cls in (("objective", Bare), ("sampler", BareSampler)):
        target = f"{__name__}:{cls.__name__}"
        monkeypatch.setitem(r.components, (kind, "bare"), Component(kind=kind, name="bare", target=target))
        monkeypatch.setitem(r.owners, (kind, "bare"), "vgm")
    monkeypatch.setitem(__import__("sys").modules, __name__, inspect.getmodule(Bare))
    made = r.build("objective", {"name": "bare"}, model=nn.Identity())
    assert public(api.ObjectiveBase) <= set(dir(made)) and made.view() is None and made.schedule(api.Step(0)) == {}
    assert made.networks.keys() == {"model"}, "what it has stays"
    sampler = r.build("sampler", {"name": "bare"})
    assert sampler.grid_columns is None and sampler.grid_labels == "columns" and sampler.scale == 1.0
    assert not isinstance(sampler, api.TakesSteps)
    done = train(recipes.load(str(tiny), None, ["objective=bare", "sampler=bare", "train.steps=2"]), tmp_path / "run")
    assert done.step == 2


def test_components_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        Component("model", "x", "mine:X")  # type: ignore[misc]


# -- imports -----------------------------------------------------------------------------------------------------------


def graph() -> dict[str, set[str]]:
    """{module of vgm_cli: modules of vgm_cli that it imports}, inside functions, too; not what types alone need."""
    files = {}
    for file in (ROOT / "vgm_cli").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    out: dict[str, set[str]] = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for body in node.body
            for inner in ast.walk(body)
        }
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        out[module] = set()
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names = [f"{base}.{a.name}" if f"{base}.{a.name}" in files else base for a in node.names]
            out[module] |= {n for n in names if n in files and n != module}
    return out


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that lie on a circle or behind one, after everything that leads nowhere is taken away."""
    left = {module: set(targets) for module, targets in edges.items()}
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    return sorted(left)


def test_imports_form_no_circle() -> None:
    edges = graph()
    assert len(edges) > 150 and "vgm_cli.errors" in edges["vgm_cli.registry"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert not circle(edges)


def test_the_update_is_on_one_screen() -> None:
    text = (ROOT / "vgm_cli/engine/train/loop.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    update = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "update")
    assert update.end_lineno is not None and update.end_lineno - update.lineno < 40
