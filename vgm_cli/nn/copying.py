"""Trainable copies of a trained network, or of a part of it."""

from __future__ import annotations

import torch
from torch import nn

from vgm_cli.errors import USAGE, VgmError


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, prefix: str = "") -> None:
    """Give `target` the values that `source` has below `prefix`: the usual start of a branch that is trained beside a
    frozen network (ControlNet's copy of an encoder: `copy_weights(base, self.encoder, "encoder.")`).

    Every tensor of `target` is taken from the tensor of `source` whose name is `prefix` and its own; what `source` has
    besides is left alone, and nothing is shared. On the meta device, where there are no values, names and shapes are
    checked all the same. VgmError: `source` has no such tensor, or one of another shape.
    """
    values = source.state_dict()
    for name, tensor in target.state_dict().items():
        value = values.get(prefix + name)
        if value is None or value.shape != tensor.shape:
            there = "no such tensor" if value is None else f"{tuple(value.shape)}, not {tuple(tensor.shape)}"
            raise VgmError(f"a copy of {type(source).__name__} cannot start: {prefix}{name} is {there}", code=USAGE)
        if not value.is_meta:
            tensor.copy_(value)
