"""Plugins that are switched off, for whoever asks for something of theirs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from vgm_cli.errors import USAGE, VgmError


def error(kind: str, name: str, plugins: Iterable[str], package: str) -> VgmError | None:
    """The error for a component that one of these plugins brings; None: none is known to. What those of `package`
    bring, their torch-free modules say; a third party's is not imported, as the user wants it, so that it is found by
    its own name alone."""
    for plugin in sorted(plugins):
        module = f"{package}.{plugin.replace('-', '_')}"
        if importlib.util.find_spec(module) is None:
            brings, back = plugin == name, f"leave -p no:{plugin} out, and name it in VGM_PLUGINS if that is set"
        else:
            items: list[Any] = getattr(importlib.import_module(module), "vgm_components", list)()
            brings = any((getattr(item, "kind", ""), item.name) == (kind, name) for item in items)
            back = f"leave -p no:{plugin} out"
        if brings:
            return VgmError(f"the {kind} '{name}' is of the plugin '{plugin}', which is switched off", back, USAGE)
    return None
