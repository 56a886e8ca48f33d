"""Looking inside a network: what api.HasFeatures needs in common."""

from __future__ import annotations

from collections.abc import Sequence

from vgm_cli.errors import USAGE, VgmError


def places(layers: Sequence[str], known: Sequence[str]) -> list[int]:
    """Where the wanted layers are among those that a network shows, in order of evaluation. VgmError: no such layer."""
    for name in layers:
        if name not in known:
            hint = f"it has {known[0]} to {known[-1]}" if len(known) > 6 else f"it has {', '.join(known)}"
            raise VgmError(f"the network has no layer '{name}'", hint, USAGE)
    return [known.index(name) for name in layers]
