"""What a run was made with: machine, packages, the state of the code, and what the processor can do."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vgm_cli import __version__

PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "pillow", "typer", "rich", "pluggy", "pydantic", "pyyaml")


def environment() -> dict[str, Any]:
    """Versions and hardware, for bug reports and records."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    info: dict[str, Any] = {
        "vgm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": bf16_supported(),
        "packages": versions,
    }
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def bf16_supported(device: Any = None) -> bool:
    """Does this machine (or this device of it) multiply bf16 matrices in hardware?"""
    import torch

    kind = device.type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "mps":
        return False
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags() or platform.machine() in ("arm64", "aarch64")


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def git_state() -> dict[str, Any]:
    """Commit of the working directory's repository and whether a tracked file differs from it, {} outside one.

    The repository may be a stranger's, whose settings name programs: a monitor of files, hooks, filters of contents, a
    way to fetch what is missing. They are set to nothing.
    """
    env = os.environ | {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, env=env)
        return done.stdout.strip()

    def set_to(settings: Mapping[str, str]) -> None:
        env["GIT_CONFIG_COUNT"] = str(len(settings))
        for i, (name, value) in enumerate(settings.items()):
            env[f"GIT_CONFIG_KEY_{i}"], env[f"GIT_CONFIG_VALUE_{i}"] = name, value

    off = {"core.fsmonitor": "false", "core.hooksPath": os.devnull}
    try:
        set_to(off)
        filters = git("config", "--null", "--name-only", "--get-regexp", r"^filter\.").split("\0")
        set_to(off | {name: "" for name in filters if name})
        sha = git("rev-parse", "--verify", "--quiet", "HEAD")
        changed = sha and git("diff-index", "--name-only", "--ignore-submodules=all", "HEAD", "--")
        return {"sha": sha, "dirty": bool(changed)} if sha else {}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return {}
