"""`vgm` and `python -m vgm_cli`: global options, the error a user sees, exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

from vgm_cli.errors import FAILED, INTERRUPTED, USAGE, VgmError
from vgm_cli.limits import short
from vgm_cli.ui import mute, ui

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
    for file in files:
        if not os.path.isfile(file):
            raise VgmError(f"no such plugin file: {file}", "--plugin takes the path of a .py file", USAGE)
    if blocked or files:
        registry.configure(tuple(blocked), tuple(files))
    return rest


def run(argv: list[str]) -> int:
    """The whole command; returns the exit code."""
    rest: list[str] = []
    try:
        rest = take_globals(argv)
        from vgm_cli import registry
        from vgm_cli.cli.app import command_of

        registry.registry().begin()
        ui.told.clear()
        return invoke(command_of(registry.registry()), rest)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else (0 if e.code is None else FAILED)
    except KeyboardInterrupt:
        ui.error(VgmError("interrupted", code=INTERRUPTED))
        return INTERRUPTED
    except BrokenPipeError:
        mute(sys.stdout)  # the reader left: not an error
        return 0
    except VgmError as e:
        if ui.debug:
            raise
        ui.error(e)
        return e.code
    except Exception as e:
        if ui.debug:
            raise
        explained = explain(e, next((a for a in rest if not a.startswith("-")), ""))
        ui.error(explained)
        return explained.code


def invoke(command: Any, args: list[str]) -> int:
    """Parse and run. What the parser refuses is shown as it shows it, and with --json also as an error on stdout."""
    import typer

    if "_VGM_COMPLETE" in os.environ:
        command(args=args, prog_name="vgm")  # answers the shell and exits
    try:
        with command.make_context("vgm", args) as context:
            command.invoke(context)
        return 0
    except typer.Exit as e:
        return int(e.exit_code)
    except typer.Abort:
        raise VgmError("aborted") from None
    except EOFError:
        raise VgmError("nobody answered") from None
    except Exception as e:
        if not hasattr(e, "format_message"):
            raise
        show_refusal(e)
        return int(getattr(e, "exit_code", USAGE))


def show_refusal(e: Any) -> None:
    """A usage error of the parser."""
    if ui.json:
        ui.event("error", error=e.format_message(), hint="--help shows what there is", code=int(e.exit_code))
    if ui.main:
        try:
            from typer.rich_utils import rich_format_error
        except ImportError:
            e.show()
        else:
            rich_format_error(e)


def explain(e: Exception, verb: str = "") -> VgmError:
    """An unexpected exception as one sentence. verb: the command that met it."""
    text = str(e).strip().splitlines()
    first = text[0] if text else ""
    if isinstance(e, OSError) and e.errno == errno.ENOSPC:
        return VgmError("the disk is full", "what was complete is still there; free space and resume")
    if isinstance(e, RecursionError):
        return VgmError("something in a file is nested too deeply")
    if isinstance(e, OSError) and e.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EISDIR):
        code = USAGE if e.errno == errno.ENAMETOOLONG else FAILED
        return VgmError(f"cannot open {short(e.filename or 'a file')}: {e.strerror}", code=code)
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
    for stream in (sys.stdout, sys.stderr):  # not at the interpreter's end, where a full disk is a traceback
        try:
            stream.flush()
        except (OSError, ValueError) as e:
            mute(stream)
            code = code if stream is sys.stderr or isinstance(e, BrokenPipeError) else code or FAILED
    if "RANK" in os.environ:
        from vgm_cli.engine.processes import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
