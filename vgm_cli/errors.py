"""The one error a user sees: a sentence, a hint, an exit code. Torch-free."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any

FAILED = 1
USAGE = 2
CHECK_FAILED = 3
MISSING_ASSET = 4
DIVERGED = 5
INTERRUPTED = 130


class VgmError(Exception):
    """A failure told in one sentence. code is the process's exit code (0 ok, 1 failed, 2 usage or configuration,
    3 a check failed, 4 missing asset or optional dependency, 5 training diverged, 130 interrupted after saving)."""

    def __init__(self, message: str, hint: str = "", code: int = FAILED):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names closest to `name`, best first."""
    known = list(known)
    lowered = {k.lower(): k for k in known}
    hits = [lowered[h] for h in difflib.get_close_matches(name.lower(), list(lowered), n=n, cutoff=0.5)]
    return hits or [k for k in known if name.lower() in k.lower()][:n]


def unknown(what: str, name: Any, known: Iterable[str], where: str = "") -> VgmError:
    """'No such recipe: X. Did you mean Y?' with exit code 2."""
    known, name = sorted(known), str(name)
    close = nearest(name, known)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known[:12]) or 'none'}"
    return VgmError(f"unknown {what} '{name}'{' in ' + where if where else ''}", hint, USAGE)


def needs_extra(what: str, package: str, extra: str) -> VgmError:
    """An optional package is missing: names it, its extra of pyproject.toml, and the command for this very Python."""
    hint = f"{sys.executable} -m pip install {package}"
    return VgmError(f"{what} needs the package {package}, an optional one (extra {extra})", hint, MISSING_ASSET)
