"""Masks and blur kernels from files: images, .npy arrays, or what an earlier restoration saved of its drawings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vgm_cli import limits
from vgm_cli.data.decode import SUFFIXES, Unreadable, load_image
from vgm_cli.errors import FAILED, USAGE, VgmError


def read_one(path: Path, key: str) -> Tensor:
    """(H, W) or (B, 1, H, W) float32: an image over 255, an .npy as it is, tensor `key` of a .safetensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as f:
                if key not in f.keys():
                    raise VgmError(f"{path} holds no '{key}'", f"it holds {', '.join(f.keys())}", USAGE)
                return f.get_tensor(key).float()
        if path.suffix == ".npy":
            return torch.from_numpy(limits.read_npy(path)).float()
        return torch.from_numpy(np.array(load_image(path).convert("L"))).float() / 255
    except VgmError:
        raise
    except (Unreadable, OSError, ValueError) as e:
        raise VgmError(f"{path} cannot be read: {str(e).splitlines()[0]}", code=FAILED) from e
    except Exception as e:  # safetensors raises its own kind
        raise VgmError(f"{path} is damaged: {str(e).splitlines()[0]}", code=FAILED) from e


def read_arrays(where: str, key: str, items: int, first: int = 0) -> Tensor:
    """(B or 1, 1, H, W): one array for all items, or rows first..first + items of a folder or a stacked file.

    VgmError: fewer arrays than items, sizes that differ, nothing readable.
    """
    path = Path(where)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES | {".npy"})
        if len(files) < first + items:
            raise VgmError(f"{where} holds {len(files)} files for {first + items} images", "one for each", USAGE)
        found = [read_one(p, key) for p in files[first : first + items]]
        if len({a.shape for a in found}) > 1:
            raise VgmError(f"the files in {where} differ in size", code=USAGE)
        array = torch.stack([a.squeeze() for a in found])
    else:
        array = read_one(path, key)
        if array.ndim > 2 and len(array) > 1:
            if len(array) < first + items:
                raise VgmError(f"{where} holds {len(array)} of them for {first + items} images", code=USAGE)
            array = array[first : first + items]
        array = array.reshape(-1, *array.shape[-2:])
    return array[:, None]
