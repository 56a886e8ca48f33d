"""The one output sink. Data goes to stdout; progress, warnings and hints to stderr; `--json` prints one document (or
JSON lines while training) and never colour. Torch-free."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vgm_cli.atomic import dump_json
from vgm_cli.errors import FAILED, VgmError

LONGEST = 10_000  # characters of one line; names and captions come from files
KEPT = "\u200c\u200d"  # the joiners that Persian and emoji are written with


def clean(text: Any) -> str:
    """One line that a terminal only shows. Control characters, line breaks, bidirectional controls and bytes that are
    no text appear as \\x1b, \\n, \\u202e: text from files could otherwise move the cursor or pose as ours."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}… ({len(text) - LONGEST} more characters)"
    if text.isascii() and text.isprintable():
        return text
    return "".join(shown(c) for c in text)


def shown(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in KEPT
    return character.encode("unicode_escape").decode("ascii") if hidden else character


class UI:
    """Output modes: human (default), json, quiet."""

    def __init__(self) -> None:
        self.json = False
        self.quiet = False
        self.lasting = False  # a long job goes on when nobody reads what it says
        self.told: set[str] = set()  # what `once` has said in this command
        self.debug = os.environ.get("VGM_DEBUG", "") not in ("", "0")

    def _print(self, text: str, stream: Any = None) -> None:
        """A line on stdout or another stream. Nothing is lost with stderr. When stdout's reader leaves, the command
        ends without an error; when stdout takes no more, with one; a lasting job goes on in both cases."""
        stream = stream or sys.stdout
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            self._print(text.encode(stream.encoding or "ascii", "backslashreplace").decode("ascii", "replace"), stream)
        except (OSError, ValueError) as e:  # ValueError: the stream is closed
            mute(stream)
            if stream is sys.stderr:
                return
            reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
            if self.lasting:
                self.warn(f"standard output is lost ({reason}): going on without it")
            elif isinstance(e, BrokenPipeError):
                raise SystemExit(0) from None
            else:
                raise VgmError(f"cannot write to standard output: {reason}", code=FAILED) from e

    @property
    def main(self) -> bool:
        """Only the first process speaks."""
        return os.environ.get("RANK", "0") == "0"

    @property
    def interactive(self) -> bool:
        return sys.stderr.isatty() and not self.json and not self.quiet and not os.environ.get("CI")

    def data(self, text: str) -> None:
        """A result line on stdout."""
        if self.main and not self.json:
            self._print(clean(text))

    def document(self, value: Any) -> None:
        """The command's one JSON document."""
        if self.main and self.json:
            self._print(dump_json(value, indent=2))

    def event(self, event: str, **fields: Any) -> None:
        """One JSON line of a long job."""
        if self.main and self.json:
            self._print(dump_json({"event": event, **fields}))

    def once(self, what: str, text: str) -> None:
        """`info`, where nothing was said about `what` in this command."""
        if what not in self.told:
            self.told.add(what)
            self.info(text)

    def info(self, text: str) -> None:
        """Progress for people, on stderr."""
        if self.main and not self.json and not self.quiet:
            self._print(clean(text), sys.stderr)

    def warn(self, text: str) -> None:
        if self.main:
            self._print(f"warning: {clean(text)}", sys.stderr)

    def error(self, e: VgmError) -> None:
        """One sentence and a hint on stderr; with --json also an error document on stdout."""
        if not self.main and os.environ.get("WORLD_SIZE", "1") != "1":
            return
        if self.json:
            with contextlib.suppress(VgmError, SystemExit):  # stdout itself may be what failed
                self.event("error", error=e.message, hint=e.hint, code=e.code)
        self._print(f"error: {clean(e.message)}", sys.stderr)
        if e.hint:
            self._print(f"  hint: {clean(e.hint)}", sys.stderr)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
        """A table on stdout; plain tab-separated rows when stdout is a pipe."""
        if self.json or not self.main:
            return
        rows = [[clean(c) for c in r] for r in rows]
        if not sys.stdout.isatty():
            for r in (columns, *rows):
                self._print("\t".join(r))
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, title=title or None, title_justify="left", box=None, pad_edge=False)
        for r in rows:
            table.add_row(*(Text(c) for c in r))  # "[red]" in a name is no markup
        Console().print(table)


def mute(stream: Any) -> None:
    """Send what is still to come, buffers at the process's end included, nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


ui = UI()


class Progress:
    """Progress of a long loop: a bar on a terminal, otherwise a plain line whenever `line` is called.

    every: without a terminal, `update` says how far it is once in so many seconds, too.
    """

    def __init__(self, what: str, total: int, done: int = 0, every: float | None = None):
        self.what, self.total, self.every, self.last_line = what, total, every, time.monotonic()
        self.bar: Any = None
        if ui.interactive and ui.main:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self.bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(clean(what), total=total, completed=done, note="")
            self.bar.start()

    def update(self, done: float, note: str | None = None) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, **({"note": clean(note)} if note is not None else {}))
        elif self.every is not None and time.monotonic() - self.last_line >= self.every:
            self.last_line = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            ui.info(f"{self.what} {int(done)}{of}" + (f", {note}" if note else ""))

    def note(self, text: str) -> None:
        """What is being done now, which moves nothing."""
        if self.bar is not None:
            self.bar.update(self.task, note=clean(text))
        else:
            ui.info(text)

    def line(self, text: str) -> None:
        if self.bar is None:
            ui.info(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def human(n: float) -> str:
    """1234567 -> '1.23 M', 1.35e15 -> '1,350 T': never an exponent."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            n /= size
            return f"{n:,.0f} {unit}" if abs(n) >= 999.5 else f"{n:.3g} {unit}"
    return f"{n:.4g}"


def with_error(value: float, error: float | None) -> str:
    """A number and its standard deviation to the same digit: (802.9, 137) -> '803 ± 140', (0.61728, 0.0123) ->
    '0.617 ± 0.012'."""
    if error is None or not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.4g}"
    if error <= 0:
        return f"{value:.4g} ± 0"
    digits = 1 - math.floor(math.log10(error))  # two digits of the error count
    if digits > 7 or max(abs(value), error) >= 1e9:
        return f"{value:.4g} ± {error:.1e}"
    places = max(digits, 0)
    return f"{value:.{places}f} ± {round(error, digits):.{places}f}"


def some(names: Sequence[str], n: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n:,} more" if len(names) > n else "")


def counted(n: int, thing: str) -> str:
    """ "1 image", "2,000 images"."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    """3725 -> '1 h 2 min', 5.97e9 -> '189 years'."""
    s = int(seconds)
    if s >= 2 * 365.25 * 86400:
        return f"{s / (365.25 * 86400):,.0f} years"
    if s >= 172800:
        return f"{s / 86400:.1f} days" if s < 100 * 86400 else f"{s / 86400:,.0f} days"
    if s >= 3600:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 60} min {s % 60} s" if s >= 60 else f"{s} s"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted scalars, as trackers want it."""
    out: dict[str, Any] = {}
    for k, v in config.items():
        if isinstance(v, Mapping):
            out.update(flat(v, f"{prefix}{k}."))
        else:
            out[f"{prefix}{k}"] = v if isinstance(v, int | float | str | bool) else str(v)
    return out
