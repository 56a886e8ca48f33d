"""`vgm` and `python -m vgm_cli`: global options, the error a user sees, exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys

from vgm_cli.errors import FAILED, INTERRUPTED, USAGE, VgmError
from vgm_cli.ui import ui

_FLAGS = ("--json", "--quiet", "--debug")


def take_globals(argv: list[str]) -> list[str]:
    """Apply --json, --quiet, --debug, -p no:NAME and --plugin FILE wherever they stand; return the rest."""
    from vgm_cli import registry

    rest: list[str] = []
    blocked: list[str] = []
    files: list[str] = []
    i = 0
    while i < len(argv):
        arg = argv[i]
        if arg == "--":
            rest += argv[i:]
            break
        if arg in _FLAGS:
            setattr(ui, arg[2:], True)
        elif arg in ("-p", "--plugin") or arg.startswith("--plugin="):
            if "=" in arg:
                value = arg.partition("=")[2]
            elif i + 1 < len(argv):
                i += 1
                value = argv[i]
            else:
                raise VgmError(
                    f"{arg} needs a value", "-p no:NAME leaves a plugin out, --plugin FILE.py adds one", USAGE
                )
            if arg == "-p":
                if not value.startswith("no:"):
                    raise VgmError(f"-p {value} is not understood", "-p no:NAME leaves a plugin out", USAGE)
                blocked.append(value[3:])
            else:
                files.append(value)
        else:
            rest.append(arg)
        i += 1
    if blocked or files:
        registry.configure(tuple(blocked), tuple(files))
    return rest


def run(argv: list[str]) -> int:
    """The whole command; returns the exit code."""
    rest: list[str] = []
    try:
        rest = take_globals(argv)
        from vgm_cli.cli.app import build_app

        build_app()(args=rest, prog_name="vgm")
        return 0
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else (0 if e.code is None else FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: not an error
        return 0
    except VgmError as e:
        if ui.debug:
            raise
        ui.error(e)
        return e.code
    except Exception as e:
        if ui.debug:
            raise
        ui.error(explain(e, next((a for a in rest if not a.startswith("-")), "")))
        return FAILED


def explain(e: Exception, verb: str = "") -> VgmError:
    """An unexpected exception as one sentence. verb: the command that met it."""
    text = str(e).strip().splitlines()
    first = text[0] if text else ""
    if isinstance(e, OSError) and e.errno == errno.ENOSPC:
        return VgmError("the disk is full", "what was complete is still there; free space and resume")
    if out_of_memory(e):
        lower = "train.accumulate=2 with the same train.batch_size, train.checkpointing=true, or a smaller batch"
        if verb in ("sample", "evaluate", "restore"):
            lower = "a smaller --batch-size"
        return VgmError("out of memory" if isinstance(e, MemoryError) else "out of GPU memory", lower)
    return VgmError(f"{type(e).__name__}: {first}", "--debug shows the traceback; this may be a bug worth reporting")


def out_of_memory(e: Exception) -> bool:
    """Python's own, torch's, and those of the libraries that it calls."""
    text = str(e)
    named = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
    return named or "CUDA error: out of memory" in text or "_STATUS_ALLOC_FAILED" in text


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is shown, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    if "RANK" in os.environ:
        from vgm_cli.engine.distributed import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
