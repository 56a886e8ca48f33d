"""Launching and sharing: how several processes start, which device each uses, and how they divide a list of work.

`--nproc N` re-executes the command through torch.distributed.run; under torchrun, accelerate launch and Slurm the
processes that are there are used. Work is divided item by item and results return in the order of the items, so that
they do not depend on the number of processes. Sums and gathers of tensors are in nn/collectives.py.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from vgm_cli.errors import FAILED, USAGE, VgmError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


# -- starting --------------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Is this process already one of several?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_slurm() -> None:
    """srun starts N tasks without RANK: translate its variables. VgmError: on several machines nobody said where they
    meet."""
    if launched() or int(os.environ.get("SLURM_NTASKS", "1")) == 1 or "SLURM_PROCID" not in os.environ:
        return
    if int(os.environ.get("SLURM_NNODES", "1")) > 1 and "MASTER_ADDR" not in os.environ:
        hint = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        raise VgmError("several machines, and MASTER_ADDR does not say where they meet", hint, USAGE)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], os.environ["SLURM_NTASKS"]
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def relaunch(nproc: int, nnodes: int, rdzv: str | None, argv: Sequence[str]) -> int:
    """Run `python -m vgm_cli argv` in nproc processes and return the first failing exit code, or 0. A signal to this
    process goes to all of them; they have ten minutes to save, and the code is 128 + signal."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    os.environ["PYTHONSAFEPATH"] = "1"  # `python -m` would look for every module in the working folder first
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of two processes starve each other
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", rdzv] if rdzv else ["--standalone"]
    args = ["--nproc-per-node", str(nproc), "--nnodes", str(nnodes), *where, "-m", "vgm_cli", *argv]
    try:
        torchrun(args)
    except ChildFailedError as e:
        codes = [f.exitcode if f.exitcode >= 0 else 128 - f.exitcode for f in e.failures.values()]
        return next((c for c in codes if c > 0), FAILED)
    except SignalException as e:
        return 128 + int(e.sigval)
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def relaunched(nproc: int) -> bool:
    """Run this command in several processes, unless this is one of them already; leaves with their code on failure."""
    adopt_slurm()
    if nproc == 1 or launched():
        return False
    code = relaunch(nproc, 1, None, default_argv())
    if code:
        raise SystemExit(code)
    return True


def leave(code: int) -> NoReturn:
    """End one process of several with an exit code, skipping the interpreter's shutdown.

    There native code sometimes aborts a process whose work is done ("terminate called without an active exception"; the
    cause is not known), which would turn a success into a failure.
    """
    dist = sys.modules.get("torch.distributed")
    if code == 0 and dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # the reader may have left
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def pick_device(name: str | None = None) -> torch.device:
    """What --device means: auto (the default) is the GPU where there is one, else the CPU; cuda, cuda:N,
    cpu and mps are that or a VgmError."""
    import torch

    asked = name or "auto"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        asked = "cuda" if gpus else "cpu"
    kind, colon, number = asked.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and (kind != "cuda" or not number.isdecimal())):
        raise VgmError(f"unknown device '{name}'", "auto, cpu, cuda, cuda:N or mps", USAGE)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise VgmError("no Apple GPU (mps) is available here", "--device auto takes what is there", USAGE)
    if kind != "cuda":
        return torch.device(kind)
    if not gpus:
        raise VgmError("no CUDA GPU is available here", "--device auto takes what is there", USAGE)
    if colon and launched():
        raise VgmError(f"several processes do not share {asked}", "CUDA_VISIBLE_DEVICES chooses their GPUs", USAGE)
    if colon and int(number) >= gpus:
        raise VgmError(f"there is no {asked} here", f"the last is cuda:{gpus - 1}", USAGE)
    return torch.device(asked)


def without_launch_options(argv: Sequence[str]) -> list[str]:
    """sys.argv[1:] without --nproc/--nnodes/--rdzv and their values."""
    out, skip = [], False
    for arg in argv:
        if skip:
            skip = False
        elif arg in ("--nproc", "--nnodes", "--rdzv"):
            skip = True
        elif not arg.startswith(("--nproc=", "--nnodes=", "--rdzv=")):
            out.append(arg)
    return out


def default_argv() -> list[str]:
    return without_launch_options(sys.argv[1:])


def keep_memory() -> None:
    """On Linux with glibc, let freed tensors stay in the process: handing every large one back to the system and
    faulting it in again costs a training step on a CPU 7 to 12 % (measured). Harmless elsewhere."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


# -- shared work ------------------------------------------------------------------------------------------------------


def join() -> None:
    """Meet the other processes, if this one was launched as one of several. Objects travel over gloo."""
    import torch
    import torch.distributed as dist

    if launched() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("gloo")


def joined() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank_world() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if joined() else (0, 1)


def mine(items: Iterable[T]) -> list[tuple[int, T]]:
    """The (position, item) pairs of `items` that are this process's share."""
    rank, world = rank_world()
    return [(i, item) for i, item in enumerate(items) if i % world == rank]


def in_order(parts: dict[int, R]) -> list[R]:
    """Put together what all processes made, {position: result} each, into one list in order. Only the first process
    receives it; the others receive []."""
    if not joined():
        return [parts[i] for i in sorted(parts)]
    import torch.distributed as dist

    rank, world = rank_world()
    received: list[dict[int, R] | None] | None = [None] * world if rank == 0 else None
    dist.gather_object(parts, received)
    together = {i: part for each in received or [] for i, part in (each or {}).items()}
    return [together[i] for i in sorted(together)]


def shares(items: Iterable[T], work: Callable[[T], R]) -> list[R]:
    """[work(item) for item in items] with the items spread over processes; the whole list on every process."""
    made = in_order({i: work(item) for i, item in mine(items)})
    return from_main(made)


def from_main(value: T) -> T:
    """The value that the first process passed, on every process."""
    if not joined():
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_main(work: Callable[[], None]) -> None:
    """Call `work` on the first process alone. A VgmError there is raised on every process."""
    refused: tuple[str, str, int] | None = None
    if rank_world()[0] == 0:
        try:
            work()
        except VgmError as e:
            refused = (e.message, e.hint, e.code)
    refused = from_main(refused)
    if refused is not None:
        raise VgmError(*refused)
