"""Files of strangers: whatever they claim, nothing they say is allocated, looped over or printed without a bound."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vgm_cli.ui import LONGEST, clean

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2028x\nerror: spoofed\r\udcff"


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


# -- terminal ----------------------------------------------------------------------------------------------------------


def test_clean_shows_what_would_act():
    assert clean(HOSTILE) == (r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2028x\nerror: spoofed\r\udcff")
    assert clean("plain, ünïcode, 日本語, C:\\names") == "plain, ünïcode, 日本語, C:\\names"
    assert clean("👩\u200d🔬") == "👩\u200d🔬"  # a joined emoji stays whole
    assert len(clean("a" * 10**7)) < LONGEST + 100


def hostile_folder(root: Path) -> Path:
    for name in ("\x1b[31mcat", "\u202edog\n"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(root / name / f"{i}.png")
    (root / "\x1b[31mcat" / "\x1b[2Jbroken.png").write_bytes(b"no picture")
    (root / "\x1b[31mcat" / "0.txt").write_text("\x1b]2;title\x07")
    return root


def test_names_of_files_and_classes_reach_no_terminal(vgm, tmp_path):
    root = hostile_folder(tmp_path / "data\x1b[0m")
    code, out, err = vgm("data", "info", root)
    assert code == 0 and r"\x1b[31mcat" in out and r"\u202edog" in out and r"\x1b[2Jbroken.png" in out
    assert harmless(out) and harmless(err)
    code, out, _ = vgm("data", "info", root, "--json")
    assert code == 0 and out.isascii() and harmless(out)
    assert "\u202edog\n" in json.loads(out)["classes"]  # the document keeps the name


def test_headers_reach_no_terminal(vgm, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    component = {"kind": "model", "name": HOSTILE[:-1], "kwargs": {}}
    save_file({HOSTILE[:-1]: np.zeros(3, np.float32)}, path, {"vgm.component": json.dumps(component)})
    for args in (("inspect", path), ("inspect", path, "--tensors"), ("sample", path)):
        code, out, err = vgm(*args)
        assert harmless(out) and harmless(err) and "spoofed" in out + err
        assert not any(line.startswith("error: spoofed") for line in (out + err).splitlines())
    assert code != 0


def test_markup_in_names_is_no_markup(capsys, monkeypatch):
    import sys

    from vgm_cli.ui import UI

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    UI().table(["name"], [["[link=http://x]a[/link][red]b"], ["\x1b[1mc"]])
    out = capsys.readouterr().out
    assert "[link=http://x]a[/link][red]b" in out and r"\x1b[1mc" in out and "\x1b[1mc" not in out
