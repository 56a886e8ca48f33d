"""The weights of a fixed network (LPIPS, Inception, a learned blur) from any kind of file. Torch-free at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vgm_cli import atomic, limits
from vgm_cli.convert_api import unwrap
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.weights.contents import contents
from vgm_cli.weights.reading import kind_of, read

if TYPE_CHECKING:
    from torch import Tensor


def read_state(path: str | Path, hint: str = "") -> dict[str, Tensor]:
    """Tensors by name; of a training checkpoint its average where it has one. Nothing in the file is executed.

    hint: where such a file comes from. VgmError: refused, cut off, of another kind, or without tensors at its top.
    """
    from torch import Tensor

    path = Path(path)
    try:
        if kind_of(path) == "safetensors":
            limits.safetensors_header(path)
            with atomic.open_safetensors(path) as f:
                found = {k: f.get_tensor(k) for k in f.keys()}
        else:
            found = unwrap(contents(read(path)))
    except VgmError as e:
        raise VgmError(e.message, hint or e.hint, e.code) from e
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)}
    if not state:
        raise VgmError(f"{path} holds no tensors by name", hint, FAILED)
    return state
