"""Files of the feature networks that ship with the package: which kind one holds, and its weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vgm_cli.errors import FAILED, MISSING_ASSET, VgmError


def kind_of_file(path: str | Path) -> str | None:
    """What a .safetensors file says it holds, metadata "vgm.features". VgmError: it is not readable."""
    try:
        with safe_open(path, framework="pt") as f:
            found: str | None = (f.metadata() or {}).get("vgm.features")
            return found
    except (SafetensorError, OSError) as e:
        raise VgmError(f"{path} is not a readable safetensors file: {str(e).splitlines()[0]}", code=FAILED) from e


def read_features(path: str | Path, kind: str, what: str, script: str) -> dict[str, Tensor]:
    """The weights in fp32 of a file of this kind, which `python -m SCRIPT` writes. what: "digit", "colour".

    Raises VgmError (exit code 4) when the file is missing, (1) when it is something else.
    """
    if not Path(path).is_file():
        hint = f"it ships with the package; make it again with `python -m {script}`"
        raise VgmError(f"the {what} feature network is missing: {path}", hint, MISSING_ASSET)
    if kind_of_file(path) != kind:
        raise VgmError(f"{path} does not hold {what} features", f"train one with {script}", FAILED)
    with safe_open(path, framework="pt") as f:
        state = {k: f.get_tensor(k) for k in f.keys()}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
