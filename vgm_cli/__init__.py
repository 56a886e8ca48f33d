"""vgm: train, sample, distill, RL-finetune, restore, evaluate and convert visual generative models.

Importing this package never imports torch; `vgm_cli.load` and `vgm_cli.train` do (vgm_cli/python.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vgm_cli.errors import VgmError
from vgm_cli.hookspecs import Component, Paper, hookimpl

__version__ = "0.1.0"
__all__ = ["Component", "Model", "Paper", "VgmError", "__version__", "hookimpl", "load", "train"]

if TYPE_CHECKING:
    from vgm_cli.python import Model, load, train


def __getattr__(name: str) -> Any:
    if name in ("Model", "load", "train"):
        return getattr(import_module("vgm_cli.python"), name)
    raise AttributeError(f"module 'vgm_cli' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
