"""Law: a golden check honours every key of its case's config, or says why it ignores it. A check that passes with
another value of a key assumes the stored one, and would pass on a case that the code gets wrong."""

from __future__ import annotations

import importlib
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vgm_cli.testing.golden import Config, GoldenCase, GoldenChecks, altered, assert_close

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    paper: module
    for module in sorted(
        [*(ROOT / "tests" / "plugins").glob("test_*.py"), *(ROOT / "tests" / "host").glob("test_*.py")]
    )
    for paper in re.findall(r'^golden = GoldenChecks\("([\w-]+)"\)', module.read_text(), re.M)  # complete ones
}
FILES = {paper: sorted((ROOT / "tests" / "golden" / paper).glob("*.safetensors")) for paper in MODULES}
ALL = [path for files in FILES.values() for path in files]
FEW = [path for files in FILES.values() for path in sorted(files, key=lambda p: (p.stat().st_size, p.name))[:4]]


def checks_of(paper: str) -> GoldenChecks:
    module = MODULES[paper]
    if str(module.parent) not in sys.path:
        sys.path.insert(0, str(module.parent))
    return importlib.import_module(module.stem).golden  # type: ignore[no-any-return]


def assumed(path: Path, chosen: slice = slice(None)) -> list[str]:
    """The keys of the file's config (those `chosen` of a shuffled list) whose value its checks assume."""
    checks = checks_of(path.parent.name)
    leaves = [(key, value) for key, value, _ in GoldenCase(path).config.leaves() if altered(value)]
    leaves.sort(key=lambda leaf: zlib.crc32(".".join((path.stem, *leaf[0])).encode()))
    return [".".join(key) for key, value in leaves[chosen] if checks.assumes(path, key, value)]


@pytest.mark.parametrize("path", FEW, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_checks_refuse_another_value_of_a_key(path: Path) -> None:
    """Two keys of each paper's smallest files; every key of every file below."""
    assert assumed(path, slice(2)) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_checks_refuse_another_value_of_every_key(path: Path) -> None:
    assert assumed(path) == []


# -- what sees to it -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A case whose output is scale times its input."""
    path = tmp_path / "case.safetensors"
    config = {"scale": 2.0, "seed": 3, "net": {"heads": 4, "blocks": [{"width": 8}, {"width": 9}]}}
    save_file({"in/x": torch.arange(4.0), "out/y": 2 * torch.arange(4.0)}, path, {"config": json.dumps(config)})
    return path


def checks_that(*reads: Any, ignored: tuple[str, ...] = ()) -> GoldenChecks:
    checks = GoldenChecks("none")

    @checks.check(lambda case: "scale" in case.config)
    def scaled(case: GoldenCase) -> None:
        assert_close(case.inputs["x"] * case.config["scale"], case.outputs["y"], 1e-6, "y")
        for read in reads:
            read(case.config)
        if ignored:
            case.ignore(*ignored, why="the input is stored")

    return checks


def test_a_key_that_nothing_reads_fails_the_case(stored: Path) -> None:
    with pytest.raises(AssertionError, match=r"never read seed, net\.heads, net\.blocks\[0\]\.width"):
        checks_that().run(GoldenCase(stored))
    with pytest.raises(AssertionError, match=r"never read net\.heads, net\.blocks\[1\]\.width of"):
        checks_that(lambda c: c["net"]["blocks"][0]["width"], ignored=("seed",)).run(GoldenCase(stored))
    checks_that(lambda c: dict(**c["net"])["blocks"], ignored=("seed", "net.blocks[0]", "net.blocks[1].width")).run(
        GoldenCase(stored)
    )
    with pytest.raises(ValueError, match="needs a reason"):
        GoldenCase(stored).ignore("seed", why="")


def test_a_value_that_is_passed_over_is_found(stored: Path) -> None:
    checks = checks_that(lambda c: c["net"]["heads"], ignored=("seed", "net.blocks"))
    checks.run(GoldenCase(stored))
    assert not checks.assumes(stored, ("scale",), 2.0)
    assert not checks.assumes(stored, ("seed",), 3), "said to be ignored"
    assert checks.assumes(stored, ("net", "heads"), 4), "read, and nothing made of it"


def test_config_remembers_what_was_read() -> None:
    reads = {
        "item": (lambda c: c["a"], {"a"}),
        "get": (lambda c: c.get("b"), {"b"}),
        "absent": (lambda c: c.get("z", 1), set()),
        "there": (lambda c: "a" in c, set()),
        "names": (lambda c: sorted(c), set()),
        "unpacked": (lambda c: dict(**c), {"a", "b"}),
        "copied": (lambda c: dict(c), {"a", "b"}),
        "merged": (lambda c: c | {"q": 1}, {"a", "b"}),
        "into": (lambda c: {"q": 1} | c, {"a", "b"}),
        "literal": (lambda c: {**c}, {"a", "b"}),
        "items": (lambda c: list(c.items()), {"a", "b"}),
        "compared": (lambda c: c == {"a": 1}, {"a", "b"}),
    }
    for name, (read, want) in reads.items():
        config = Config({"a": 1, "b": [1, 2]})
        read(config)
        assert config.read == want, name


def test_tolerance_is_relative_to_the_tensor_with_a_stated_floor() -> None:
    want = torch.tensor([1000.0, 0.0])
    assert_close(want + torch.tensor([0.0, 0.009]), want, 1e-5)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(want + torch.tensor([0.0, 0.011]), want, 1e-5)
    assert_close(torch.full((2,), 1e-4), torch.zeros(2), 1e-5, floor=1e-4)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(torch.full((2,), 1.1e-4), torch.zeros(2), 1e-5, floor=1e-4)
