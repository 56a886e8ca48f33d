"""Laws over everything registered: listing costs no torch, plugins do not know each other, every recipe builds, every
published layout is recognised by one converter alone, the wheel carries what the checkout has."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from vgm_cli import recipe as recipes
from vgm_cli.registry import load_target, registry, signature

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(p.parent for p in (ROOT / "plugins").glob("*/__init__.py"))
RECIPES = sorted(f"{p.parent.name}/{p.stem}" for p in (ROOT / "recipes").glob("*/*.yaml"))
HOST_LIBRARY = {"hookspecs", "api", "conditioning", "convert_api", "errors", "ranges"}
HOST_LIBRARY |= {"nn", "nets", "diffusion", "ar", "losses", "operators"}
OTHER_PACKAGES = {"torch", "numpy", "safetensors", "PIL"}
OPTIONAL = {"diffusers", "transformers"}  # inside functions: extras of pyproject.toml
EXTRAS = {"scipy", "torchvision", "timm", "einops", "diffusers", "transformers", "click", "torchmetrics", "matplotlib"}


def imports(file: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, level of a relative import, at module level?) of every import statement."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = {id(n) for n in tree.body} | {id(n) for c in tree.body if isinstance(c, ast.If) for n in c.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, 0, id(node) in top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module in ("vgm_cli", "vgm_plugins") and not node.level:
                yield from ((f"{node.module}.{a.name}", 0, id(node) in top) for a in node.names)
            else:
                yield node.module or "", node.level, id(node) in top


def test_something_is_registered() -> None:
    assert len(PLUGINS) >= 5 and len(RECIPES) >= 10
    assert len(registry().papers) >= 5
    assert not [p.error for p in registry().plugins.values() if p.error]


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda p: p.name)
def test_a_plugin_stands_on_the_host_alone(folder: Path) -> None:
    """DESIGN's import rule: the shared library, torch, and its own folder by relative import."""
    for file in folder.rglob("*.py"):
        for module, level, top in imports(file):
            if level:
                assert level == 1, f"{file.name} reaches outside its folder: {'.' * level}{module}"
                continue
            root, _, rest = module.partition(".")
            if root == "vgm_cli":
                assert rest.split(".")[0] in HOST_LIBRARY, f"{file.name} imports {module}"
            else:
                known = OTHER_PACKAGES | set(sys.stdlib_module_names) | (set() if top else OPTIONAL)
                assert root in known, f"{file.name} imports {module}"


def test_networks_of_the_host_know_no_plugin() -> None:
    """A network, a block or a loop that papers share outlives each of them."""
    for folder in ("nets", "nn", "ar"):
        for file in (ROOT / "vgm_cli" / folder).rglob("*.py"):
            assert not [m for m, *_ in imports(file) if m.split(".")[0] in ("vgm_plugins", "plugins")], file.name
            assert "vgm_plugins" not in file.read_text(encoding="utf-8"), file.name


@pytest.mark.parametrize(
    "name", [n for (kind, n), c in registry().components.items() if kind == "model" and c.denoiser]
)
def test_every_denoising_network_shows_its_features(name: str) -> None:
    """api.HasFeatures, which is asked for by name: nobody guesses what a network calls its middle."""
    from vgm_cli.api import HasFeatures

    network = load_target(registry().find("model", name).target, name)
    assert callable(network.features) and network.middle
    arguments = list(inspect.signature(network.features).parameters)
    assert arguments[:4] == ["self", *list(inspect.signature(HasFeatures.features).parameters)[1:4]]
    assert set(inspect.signature(network.forward).parameters) <= set(arguments), "what forward takes"


def test_no_protocol_is_probed_for() -> None:
    probe = re.compile(r"""(has|get)attr\([^)]*["'](features|middle|example|truncate|overwriting)["']""")
    for folder in ("vgm_cli", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not probe.search(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("folder", PLUGINS, ids=lambda p: p.name)
def test_a_plugin_opens_with_its_source(folder: Path) -> None:
    """The docstring names the paper; the file is short and does not import torch."""
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    assert "arXiv" in (ast.get_docstring(ast.parse(text)) or "")
    assert not [m for m, *_ in imports(folder / "__init__.py") if m.split(".")[0] == "torch"]


def test_targets_lie_in_the_plugin_that_declares_them() -> None:
    """Plugins meet through names, never through each other's modules."""
    for (kind, name), component in registry().components.items():
        owner = registry().plugins[registry().owners[kind, name]]
        home = owner.module if owner.name != "vgm" else "vgm_cli"
        shared = ("vgm_cli.nets.",) if kind in ("model", "codec") else ()  # a network of several papers
        assert component.target.startswith((home + ".", *shared)), f"{kind} {name}: {component.target}"


def test_extras_are_never_imported_at_module_level() -> None:
    for folder in ("vgm_cli", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            found = [m for m, level, top in imports(file) if not level and top and m.split(".")[0] in EXTRAS]
            assert not found, f"{file}: {found}"


@pytest.mark.parametrize("key", sorted(registry().components), ids=lambda k: "-".join(k))
def test_every_component_can_be_imported(key: tuple[str, str]) -> None:
    component = registry().components[key]
    target = load_target(component.target, component.name)
    if component.kind != "converter":
        unread = [p.name for p in signature(target).parameters.values() if isinstance(p.annotation, str)]
        assert not unread, f"{key}: ranges that are not checked, the annotations of {unread}"
    assert component.summary, f"{key} has no summary for `vgm ls`"
    assert all(isinstance(kw, dict) for kw in registry().presets(component).values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name: str) -> None:
    """Known keys, components that fit, networks on the meta device; one whose roles come from another run is bound."""
    from vgm_cli.validation import check

    recipe = recipes.load(name)
    numbers, reason = check(recipe)
    assert numbers or reason, name
    assert all(n > 0 for n in numbers.values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_what_it_is(name: str) -> None:
    """What it reproduces, the command, an override; a full-scale one states the score to expect."""
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert len(head) >= 3, "open with comments: what it reproduces, the command, an override"
    paper, _, short = name.partition("/")
    joined = "\n".join(head)
    assert "vgm " in joined and "override" in joined
    assert paper in (yaml.safe_load(text).get("paper") or paper)
    if "imagenet" in short:
        assert any(ch.isdigit() for ch in joined)


@pytest.mark.parametrize("paper", sorted(registry().papers))
def test_every_paper_is_complete(paper: str) -> None:
    """A default recipe, a page with its parts, a test module."""
    slug = paper.replace("-", "_")
    assert (ROOT / "docs/papers" / f"{paper}.md").is_file(), "no docs page"
    page = (ROOT / "docs/papers" / f"{paper}.md").read_text(encoding="utf-8")
    for part in (
        "The idea in ten lines",
        "Equations and where they live",
        "Deviations from the ",
        "Results here",
        "At full scale",
    ):
        assert f"\n## {part}" in page, f"the page has no section: {part}"
    assert "\n10. " in page and "\n11. " not in page, "ten lines"
    assert ".py:" in page.partition("\n## Equations")[2].partition("\n## ")[0], "no equation names its function"
    assert "vgm " in page.partition("\n## At full scale")[2], "no command at full scale"
    assert (ROOT / "tests/plugins" / f"test_{slug}.py").is_file(), "no test module"
    assert [r for r in RECIPES if r.startswith(paper + "/")], "no recipe"


def test_host_imports_cost_no_torch() -> None:
    code = (
        "import sys, vgm_cli.cli.app as a; a.build_app(); import vgm_cli.recipe as r; r.shipped(); "
        "sys.exit(bool({'torch', 'accelerate', 'numpy.linalg'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [["--help"], ["ls"], ["ls", "recipes"], ["ls", "samplers"], ["plugins"], ["train", "--help"],
                                  ["explain", "dit"], ["cat", "dit/mnist"]], ids=" ".join)  # fmt: skip
def test_listing_imports_no_torch(args: list[str]) -> None:
    code = (
        f"import sys; from vgm_cli.__main__ import run; code = run({args!r}); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("False"), f"vgm {' '.join(args)} imports torch"


def test_help_is_quick() -> None:
    """CPU time of the whole process against that of the libraries that write help, the best of five of each: 1.6 to 1.9
    times on a busy machine, 0.2 to 0.3 s on an idle core."""
    measure = (
        "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], stdout=-3); "
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
    )
    libraries = "import typer, typer.rich_utils, rich.markdown, rich.columns, yaml, pluggy, importlib.metadata"
    times: dict[str, list[float]] = {"vgm --help": [], "libraries": []}
    for _ in range(5):
        for what, args in (("vgm --help", ["-m", "vgm_cli", "--help"]), ("libraries", ["-c", libraries])):
            done = subprocess.run([sys.executable, "-c", measure, *args], capture_output=True, text=True)
            times[what].append(float(done.stdout))
    assert min(times["vgm --help"]) < 2.4 * min(times["libraries"]), times


@pytest.mark.slow
def test_the_wheel_carries_everything(tmp_path: Path) -> None:
    """Every plugin, recipe and asset of the checkout is in the built wheel."""
    done = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for package, folder in (
        ("vgm_plugins", "plugins"),
        ("vgm_recipes", "recipes"),
        ("vgm_papers", "docs/papers"),
        ("vgm_cli", "vgm_cli"),
    ):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml", ".npz", ".safetensors", ".tmpl"):
                assert f"{package}/{file.relative_to(ROOT / folder)}" in names, file


def test_packages_are_importable_by_their_installed_names() -> None:
    for folder in PLUGINS:
        importlib.import_module(f"vgm_plugins.{folder.name}")


def keywords(file: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """(class, parameters, the header's source, docstrings) of every public constructor in a file."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        for f in node.body:
            if isinstance(f, ast.FunctionDef) and f.name == "__init__":
                names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)][1:]
                header = "\n".join(lines[f.lineno - 1 : f.body[0].lineno - 1])
                yield node.name, names, header, f"{ast.get_docstring(node)}\n{ast.get_docstring(f)}"


def unexplained(names: list[str], header: str, docs: str) -> list[str]:
    """Which of more than six parameters have neither a comment beside them nor a docstring line of their own."""
    if len(names) <= 6:
        return []
    told = set(re.findall(r"^\s*(\w+)\b[^#\n]*,  # \S", header, re.M)) | set(re.findall(r"^\s*(\w+): \S", docs, re.M))
    return [n for n in names if n not in told]


def test_long_constructors_explain_every_keyword() -> None:
    seen, found = 0, {}
    for file in (f for top in ("vgm_cli", "plugins") for f in (ROOT / top).rglob("*.py")):
        for name, names, header, docs in keywords(file):
            seen += len(names) > 6
            if missing := unexplained(names, header, docs):
                found[f"{file.relative_to(ROOT)}: {name}"] = missing
    assert seen > 30 and not found, found


def test_the_law_of_keywords_sees_one(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    body = "".join(f"        {k}: int = 1,  # width of {k}\n" for k in "abcdef")
    for last, missing in (("g: int = 1,  # width of g", []), ("g: int = 1,", ["g"])):
        file.write_text(f"class Net:\n    def __init__(\n        self,\n{body}        {last}\n    ):\n        pass\n")
        [(name, names, header, docs)] = keywords(file)
        assert name == "Net" and unexplained(names, header, docs) == missing


# -- every public function is reached ----------------------------------------------------------------------------------


def words_of(node: ast.AST) -> set[str]:
    """Every identifier and attribute in some code, and the names in strings such as "module:name"."""
    found = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name | ast.Attribute):
            found.add(n.id if isinstance(n, ast.Name) else n.attr)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and re.fullmatch(r"([\w.]*:)?\w+", n.value):
            found.add(n.value.rpartition(":")[2])
    return found


def unreached(sources: Iterable[str], documents: Iterable[str]) -> set[str]:
    """Public functions and classes that no code leads to, by name: neither what runs at import (a list of verbs, a
    manifest, a decorator that registers) nor what that uses, nor a document."""
    uses: dict[str, set[str]] = {}
    roots = {w for text in documents for w in re.findall(r"\w+", text)}
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                uses.setdefault(node.name, set()).update(words_of(node) - {node.name})
            elif not isinstance(node, ast.Import | ast.ImportFrom):
                roots |= words_of(node)
    waiting, reached = [n for n in roots if n in uses], set()
    while waiting:
        if (name := waiting.pop()) not in reached:
            reached.add(name)
            waiting += [n for n in uses[name] if n in uses]
    return {n for n in uses if not n.startswith("_")} - reached


def test_every_public_function_is_reached() -> None:
    """From a verb, a recipe or a documented interface. What only tests use belongs to the tests."""
    files = [f for top in ("vgm_cli", "plugins") for f in (ROOT / top).rglob("*.py")]
    own = [f.read_text(encoding="utf-8") for f in files if "testing" not in f.parts]  # that folder is for tests
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/papers").glob("*.md")]
    documents = ["main"]  # pyproject's script
    for page in pages:
        if page.name != "cli.md":
            documents += re.findall(r"`[^`\n]+`", page.read_text(encoding="utf-8"))
    documents += [r.read_text(encoding="utf-8") for r in (ROOT / "recipes").rglob("*.yaml")]
    documents += [t.read_text(encoding="utf-8") for t in (ROOT / "vgm_cli").rglob("*.tmpl")]
    documents += [f.read_text(encoding="utf-8") for f in files if "testing" in f.parts]
    assert not unreached(own, documents)


def test_the_law_of_reach_sees_one() -> None:
    source = (
        "def verb():\n    return used()\n\ndef used(): ...\n\ndef alone(): ...\n\ndef _own(): ...\n\nVERBS = [verb]\n"
    )
    assert unreached([source], []) == {"alone"}
    assert unreached([source], ["`module.py:alone`"]) == set()
