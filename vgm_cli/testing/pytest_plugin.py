"""pytest plugin: the `--golden DIR` option, the `golden_case` fixture, and the fixtures of the conformance suites
(tiny_dataset, tmp_run, vgm). Import-light: loaded in every pytest run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", action="append", default=[], metavar="DIR", help="also run the golden cases below DIR/<paper>/"
    )
    parser.addoption(
        "--golden-device",
        default="cpu",
        metavar="DEVICE",
        help="where golden cases compute: cuda, in fp32 without tf32",
    )


def golden_folders(config: pytest.Config) -> list[Path]:
    committed = Path(str(config.rootpath)) / "tests" / "golden"
    start = config.invocation_params.dir  # tests may change the working directory
    extra = [start / p for p in config.getoption("--golden")]
    for folder in extra:
        if not folder.is_dir():
            raise pytest.UsageError(f"--golden {folder}: no such folder")
    return [p for p in [committed, *extra] if p.is_dir()]


def golden_files(config: pytest.Config) -> dict[str, list[Path]]:
    """{paper: files}; the folder's name is the paper's, a file given twice runs once (the first wins)."""
    found: dict[str, dict[str, Path]] = {}
    for folder in golden_folders(config):
        for path in sorted(folder.rglob("*.safetensors")):
            same = found.setdefault(path.parent.name, {})
            key = path.name if path.name not in same or _same(same[path.name], path) else f"{path.parent}/{path.name}"
            same.setdefault(key, path)
    return {paper: list(files.values()) for paper, files in found.items()}


def _same(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


def pytest_generate_tests(metafunc: Any) -> None:
    if "golden_case" not in metafunc.fixturenames:
        return
    checks = metafunc.module.golden
    seen = metafunc.config.stash.setdefault(_CLAIMED, {})
    seen[checks.paper] = checks
    files = golden_files(metafunc.config).get(checks.paper, [])
    if checks.partial is not None:
        from vgm_cli.testing.golden import GoldenCase

        files = [f for f in files if checks.claims(GoldenCase(f))]
        seen[checks.paper + "#files"] = files
    metafunc.parametrize("golden_case", files, indirect=True, ids=lambda p: p.stem)


@pytest.fixture
def golden_case(request: pytest.FixtureRequest) -> Any:
    """The golden file under test, loaded."""
    from vgm_cli.testing.golden import GoldenCase

    device = request.config.getoption("--golden-device")
    if device != "cpu":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return GoldenCase(request.param, device)


_CLAIMED: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    claimed = config.stash.get(_CLAIMED, None)
    if claimed is None or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    left: list[str] = []
    for paper, files in sorted(golden_files(config).items()):
        checks = claimed.get(paper)
        if checks is None:
            left.append(f"{paper}: not in yet, {len(files)} cases")
        elif checks.partial is not None:
            out = [f.stem for f in files if f not in claimed[paper + "#files"]]
            if out:
                left.append(f"{paper}: {checks.partial} only, {len(out)} cases left ({', '.join(out)})")
    if left:
        terminalreporter.section("golden cases not run")
        for line in left:
            terminalreporter.write_line(line)


# -- fixtures for plugin authors -------------------------------------------------------------------------------------


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> Path:
    """A folder of 24 grey images of 28 x 28 pixels in two classes: bright squares and bright discs."""
    from PIL import Image, ImageDraw

    for label in ("disc", "square"):
        folder = tmp_path / "tiny_dataset" / label
        folder.mkdir(parents=True)
        for i in range(12):
            image = Image.new("L", (28, 28), 10 * (i % 4))
            box = (3 + i % 5, 4 + i % 3, 17 + i % 7, 18 + i % 5)
            draw = ImageDraw.Draw(image)
            (draw.rectangle if label == "square" else draw.ellipse)(box, fill=200 + 4 * i)
            image.save(folder / f"{i:02d}.png")
    return tmp_path / "tiny_dataset"


@pytest.fixture
def tmp_run(tmp_path: Path) -> Path:
    """An empty folder for runs."""
    folder = tmp_path / "runs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def vgm(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run the CLI in this process: vgm("ls", "--json") -> (exit code, stdout, stderr)."""
    from vgm_cli import registry
    from vgm_cli.__main__ import run
    from vgm_cli.ui import ui

    flags = ("json", "quiet", "debug")
    before = {flag: getattr(ui, flag) for flag in flags}

    def reset() -> None:
        for flag in flags:
            setattr(ui, flag, before[flag])
        if registry._blocked or registry._files:
            registry.configure()  # what -p and --plugin changed

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        reset()
        code = run([str(a) for a in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    yield call
    reset()
