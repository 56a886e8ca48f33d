"""Third-party plugins: found through the entry point or a file, reported when broken, never a crash; the template works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vgm_cli import registry as registries
from vgm_cli.errors import VgmError
from vgm_cli.hookspecs import Component, hookimpl
from vgm_cli.registry import PluginInfo, Registry

BROKEN = {
    "raises on import": ("raise RuntimeError('a loose wire')", "a loose wire"),
    "imports what is not there": ("import not_installed_anywhere", "not_installed_anywhere"),
    "misspells a hook": ("def vgm_component():\n    return []", "unknown hook 'vgm_component'"),
    "has a wrong signature": (
        "from vgm_cli.hookspecs import hookimpl\n@hookimpl\ndef vgm_commands(application):\n    pass",
        "application",
    ),
    "returns something else": (
        "from vgm_cli.hookspecs import hookimpl\n@hookimpl\ndef vgm_components():\n    return ['dit']",
        "expected Component",
    ),
    "duplicates a name": (
        "from vgm_cli.hookspecs import Component, hookimpl\n@hookimpl\ndef vgm_components():\n"
        "    return [Component(kind='model', name='dit', target='mine:Dit')]",
        "duplicate model 'dit': brought by both dit and",
    ),
    "wants another contract": ("requires_api = 99", "needs plugin API 99"),
    "unknown kind": (
        "from vgm_cli.hookspecs import Component, hookimpl\n@hookimpl\ndef vgm_components():\n"
        "    return [Component(kind='modle', name='x', target='mine:X')]",
        "unknown component kind 'modle'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_reported_and_the_rest_works(vgm, tmp_path: Path, what: str) -> None:
    code, words = BROKEN[what]
    (tmp_path / "mine.py").write_text(code)
    status, out, err = vgm("--plugin", tmp_path / "mine.py", "plugins", "--json")
    assert status == 0, err
    mine = next(p for p in json.loads(out) if p["name"] == "mine")
    assert words in mine["error"]
    status, out, _ = vgm("--plugin", tmp_path / "mine.py", "ls")
    assert status == 0 and "dit" in out


def test_a_file_brings_a_component_and_a_command(vgm, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from vgm_cli.hookspecs import Component, Paper, hookimpl

        @hookimpl
        def vgm_components():
            return [Component(kind="model", name="mine", target="mine_net:Net", summary="mine")]

        @hookimpl
        def vgm_commands(app):
            @app.command("greet")
            def greet(name: str) -> None:
                print(f"hello {name}")
    """)
    )
    status, out, err = vgm("--plugin", tmp_path / "mine.py", "greet", "world")
    assert status == 0 and out == "hello world\n", err
    assert "mine" in vgm("--plugin", tmp_path / "mine.py", "ls", "models")[1]
    assert "mine" not in vgm("ls", "models")[1].split()


def test_a_plugin_can_be_left_out(vgm) -> None:
    status, out, _ = vgm("-p", "no:dit", "ls", "models")
    assert status == 0 and "\ndit\t" not in out
    assert "\ndit\t" in vgm("ls", "models")[1]
    assert vgm("-p", "dit", "ls")[0] == 2


def install_wild(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    """A third party's plugin `wild`, the import of which raises."""
    import importlib.metadata as metadata

    class Entry:
        name, value, dist, group = "wild", "wild:plugin", None, "vgm"

        def load(self) -> object:
            raise raised

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()])


def test_a_run_of_a_plugin_that_is_left_out_says_so(vgm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, recipes and names ask for what a plugin would bring; of a third party's nothing is imported."""
    few = ("train.steps=1", "train.batch_size=2", "train.preview_n=0", "model.hidden=[8,8]")
    assert vgm("train", "vae", *few, "--out", tmp_path / "run")[0] == 0
    for command in (("sample", tmp_path / "run", "-n", "1"), ("validate", "vae")):
        code, _, err = vgm("-p", "no:vae", *command)
        assert code == 2 and "of the plugin 'vae', which is switched off" in err and "leave -p no:vae out" in err, err
    code, _, err = vgm("-p", "no:vae", "validate", "dit", "model.name=ditt")
    assert code == 2 and "unknown model 'ditt'" in err

    install_wild(monkeypatch, AssertionError("it is switched off"))
    r = Registry()
    r.discover("")
    with pytest.raises(VgmError, match="plugin 'wild', which is switched off") as told:
        r.find("model", "wild")
    assert "VGM_PLUGINS" in told.value.hint


@pytest.mark.parametrize(("out", "paper"), [("dit", "sit"), ("sit", "dit")])
def test_papers_that_share_a_network_do_not_need_each_other(out: str, paper: str, vgm, tmp_path: Path) -> None:
    """DiT's network is the host's: either paper validates, plans, trains, samples and converts without the other."""
    without = ("-p", f"no:{out}")
    assert f"\n{out}\t" not in vgm(*without, "ls", "models")[1]
    assert vgm(*without, "train", paper, "--recipe", "imagenet256", "--plan")[0] == 0
    path = tmp_path / "small.yaml"
    small = "hidden_size: 16, depth: 1, num_heads: 2"
    path.write_text(f"base: {paper}/mnist\ncodec: null\nmodel: {{{small}, patch_size: 14}}\ntrain: {{batch_size: 2}}\n")
    assert vgm(*without, "validate", path)[0] == 0
    run = tmp_path / "run"
    code, _, err = vgm(*without, "train", path, "train.steps=1", "train.preview_every=0", "--out", run)
    assert code == 0, err
    code, _, err = vgm(*without, "sample", run, "-n", "1", "--steps", "3", "--out", tmp_path / "pictures")
    assert code == 0, err
    assert list((tmp_path / "pictures").glob("*.png"))
    (model,) = (run / "checkpoints" / "last").glob("model*.safetensors")
    code, _, err = vgm(*without, "convert", model, tmp_path / "official.safetensors", "--to", paper)
    assert code == 0, err


def test_names_of_plugins_do_not_collide() -> None:
    """Two distributions with one plugin name: the second is listed under its distribution's name, with the reason."""

    class Mine:
        @staticmethod
        @hookimpl
        def vgm_components() -> list[Component]:
            return []

    r = Registry()
    r.add(PluginInfo("x", "first"), lambda: Mine())
    r.add(PluginInfo("x", "second"), lambda: Mine())
    assert not r.plugins["x"].error
    assert "taken by first" in r.plugins["second:x"].error


def test_an_entry_point_that_raises_does_not_stop_discovery(monkeypatch: pytest.MonkeyPatch) -> None:

    install_wild(monkeypatch, ImportError("torch was built for another planet"))
    r = Registry()
    r.discover(None)
    assert "another planet" in r.plugins["wild"].error
    assert ("model", "dit") in r.components
    r = Registry()
    r.discover("")  # VGM_PLUGINS= : none
    assert "wild" not in r.plugins
    assert registries.BUILTIN == "vgm_plugins"


def test_the_template_is_complete_and_checked(vgm, tmp_path: Path) -> None:
    status, _, err = vgm("plugin", "new", "mynet", "--dir", tmp_path / "mynet", "--title", "My net")
    assert status == 0, err
    files = {str(p.relative_to(tmp_path / "mynet")) for p in (tmp_path / "mynet").rglob("*") if p.is_file()}
    assert {"pyproject.toml", "README.md", "src/mynet/__init__.py", "src/mynet/model.py", "src/mynet/recipes/mnist.yaml",
            "tests/test_mynet.py"} <= files  # fmt: skip
    assert vgm("plugin", "new", "mynet", "--dir", tmp_path / "mynet")[0] == 2  # never written over
    assert vgm("plugin", "new", "My-Net")[0] == 2
    assert vgm("plugin", "new", "class")[0] == 2
    for text in ("$name", "$title", "$dashed"):
        assert not [f for f in files if text in (tmp_path / "mynet" / f).read_text()]


@pytest.mark.slow
def test_the_template_installs_passes_its_tests_and_trains(tmp_path: Path) -> None:
    """What `vgm plugin new` wrote: pip install, its own tests unchanged, vgm plugin check, vgm train. The package goes
    into a folder of its own that is put on the path, so this environment stays as it is."""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "2"}
    env.pop("VGM_PLUGINS", None)

    def run(*args: str, cwd: Path = tmp_path) -> str:
        done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd=cwd)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    run("-m", "vgm_cli", "plugin", "new", "mynet")
    run(
        "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), "./mynet"
    )
    assert "mynet" in run("-m", "vgm_cli", "plugins")
    assert "passed" in run("-m", "pytest", "-q", "tests", cwd=tmp_path / "mynet")
    assert "ok" in run("-m", "vgm_cli", "plugin", "check", "mynet")
    run("-m", "vgm_cli", "train", "mynet", "train.steps=20", "train.preview_n=0", "--out", "run")
    run("-m", "vgm_cli", "sample", "run", "-n", "4", "--steps", "2", "--out", "grid.png")
    assert (tmp_path / "grid.png").exists()


def test_names_of_no_plugin_are_told(vgm, tmp_path: Path) -> None:
    status, _, err = vgm("-p", "no:ditt", "ls")
    assert status == 2 and "unknown plugin 'ditt'" in err and "dit" in err
    status, _, err = vgm("--plugin", "mynet/mynet", "ls")
    assert status == 2 and "no such plugin file: mynet/mynet" in err
