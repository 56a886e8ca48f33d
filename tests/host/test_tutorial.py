"""The commands of the tutorial and README.md are run as they stand, with few steps; docs name things that exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FEW = ["train.preview_n=0", "train.precision=fp32", "data.cache_latents=false"]  # of 5,000 images, 16 are encoded
SMALL = {
    "train": ["train.steps=2", "train.batch_size=8", *FEW],
    "distill": ["train.steps=1", "train.batch_size=8", *FEW],
    "finetune-rl": ["train.steps=1", *FEW],
}
FEWER = {
    "sample": ["-n", "2", "--steps", "2"],
    "evaluate": ["-n", "40", "--steps", "2"],
    "restore": ["-n", "2", "--steps", "3"],
}


def commands(page: Path) -> list[list[str]]:
    """The `vgm …` lines of a page's code blocks, in order."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("vgm ")]


def shortened(args: list[str]) -> list[str]:
    """The same command, made to take seconds."""
    small = list(args)
    for option, value in zip(FEWER.get(args[0], [])[::2], FEWER.get(args[0], [])[1::2]):
        if args[:2] == ["evaluate", "diff"]:
            continue
        if option in small:
            small[small.index(option) + 1] = value
        else:
            small += [option, value]
    return small + tiny_pairs(args) + SMALL.get(args[0], [])


def tiny_pairs(args: list[str]) -> list[str]:
    """Distillation from stored pairs, and policy groups, made small."""
    if args[0] == "distill":
        return ["pairs.count=8", "pairs.steps=2"]
    if args[0] == "finetune-rl":
        return ["objective.group_size=4", "objective.steps=4", "objective.window=1", "objective.window_range=[0,2]"]
    return []


def lessons() -> list[Path]:
    """The tutorial's pages, in its order."""
    index = ROOT / "docs/tutorial.md"
    return [
        index.parent / page
        for page in re.findall(r"^\d\. \[\w[\w-]*\]\((tutorial/[\w-]+\.md)\)", index.read_text(encoding="utf-8"), re.M)
    ]


def test_every_verb_has_its_page() -> None:
    verbs = ["train", "sample", "evaluate", "distill", "restore", "finetune-rl", "convert"]
    assert [page.stem for page in lessons()] == verbs
    assert all(verb in {args[0] for args in commands(page)} for verb, page in zip(verbs, lessons()))


def test_the_tutorial_runs(vgm) -> None:
    """Page after page, in one folder, as a reader would."""
    for args in (args for page in lessons() for args in commands(page)):
        code, _, err = vgm(*shortened(args))
        allowed = (0, 3) if args[:2] == ["evaluate", "diff"] else (0,)  # two models measured alike, or told apart
        assert code in allowed, f"vgm {' '.join(shortened(args))}\n{err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_documented_commands_exist(page: Path, vgm) -> None:
    """Every `vgm VERB` of a page is a command, every recipe and preset it names is there."""
    from vgm_cli import recipe as recipes

    known = set(re.findall(r"^│ ([a-z][a-z-]+) ", vgm("--help")[1], re.MULTILINE))
    for args in commands(page):
        assert args[0].startswith("-") or args[0] in known, f"{page.name}: vgm {args[0]}"
        if args[0] == "train" and re.fullmatch(r"[a-z][a-z-]+", args[1]):
            named = args[args.index("--recipe") + 1] if "--recipe" in args else None
            if args[1] != "mynet" and (named is None or re.fullmatch(r"[a-z0-9-]+", named)):
                recipes.locate(args[1], named)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_documented_functions_exist(page: Path) -> None:
    """`path/to/file.py:name` points at a function, class, method or constant of that file; links lead somewhere."""
    text = page.read_text(encoding="utf-8")
    for file, name in re.findall(r"`((?:vgm_cli|plugins|tests|recipes|docs)/[\w/.-]+\.py)(?::([\w.]+))?`", text):
        path = ROOT / file
        assert path.is_file(), f"{page.name}: {file}"
        if name:
            names = {n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(n, "name")}
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
            assert set(name.split(".")) <= names, f"{page.name}: {file}:{name}"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: link to {target}"


def test_the_reading_path_goes_through_the_families() -> None:
    """From VAE to diffusion, one command each; every paper is on it; README and the tutorial lead to it."""
    path = ROOT / "docs/reading-path.md"
    assert [c[:2] for c in commands(path)] == [
        ["train", p] for p in ("vae", "vqgan", "stylegan", "glow", "llamagen", "adm-unet")
    ]
    linked = set(re.findall(r"\]\(papers/([\w-]+)\.md\)", path.read_text(encoding="utf-8").replace("\n", " ")))
    assert linked == {p.stem for p in (ROOT / "docs/papers").glob("*.md")}
    companions = (
        "yang-song.net",
        "rectifiedflow.github.io",
        "diffusionflow.github.io",
        "kl-is-all-you-need",
        "pml-book",
        "deepgenerativemodels.github.io",
        *(f"notes/{n.name}" for n in (ROOT / "docs/notes").glob("*.md")),
    )
    assert [c for c in companions if c not in path.read_text(encoding="utf-8")] == []
    steps = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    assert all("Murphy" in step and "CS236" in step for step in steps), "every step names its companions"
    assert "docs/reading-path.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "reading-path.md" in (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")


def test_the_command_reference_is_true() -> None:
    """docs/cli.md is what `python docs/generate_cli.py` writes."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.document() == (ROOT / "docs/cli.md").read_text(encoding="utf-8"), "run python docs/generate_cli.py"


def too_long(text: str) -> list[str]:
    """Lines of over 120 columns, but for those that cannot wrap: rows of a table, and words such as a link."""
    return [line for line in text.splitlines() if len(line) > 120 and line[0] != "|" and " " in line.strip()[:120]]


def test_lines_fit_a_screen() -> None:
    pages = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    assert not {p.name: long for p in pages if (long := too_long(p.read_text(encoding="utf-8")))}
    assert too_long("word " * 30) and not too_long(f"| {'a table ' * 30} |\nhttps://{'x' * 130}")
