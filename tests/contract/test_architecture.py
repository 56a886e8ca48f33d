"""docs/architecture.md lists the rooms that there are; no file of the host is longer than a sitting."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOST = ROOT / "vgm_cli"


def test_the_page_lists_every_folder_and_names_files_that_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(vgm_cli[\w/]*)` \|", text, re.MULTILINE)
    there = {str(p.parent.relative_to(ROOT)) for p in HOST.rglob("*.py") if "assets" not in p.parts}
    assert sorted(listed) == sorted(there)
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (HOST / name).is_file(), name


def test_no_file_of_the_host_is_over_400_lines() -> None:
    long = {str(p.relative_to(ROOT)): n for p in HOST.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
