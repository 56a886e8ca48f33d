"""Trainable copies of a trained network, or of a part of it, or of one that is told less."""

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


LAST_OF_SECOND = ("r_embedder.mlp.2.",)  # of DiT: at 0 the second number changes nothing


@torch.no_grad()
def copy_and_tell(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, which is `source` told a second number (`second_time`), its values: at first it is the same
    function whatever it is told. Networks that do not begin so by themselves have their second embedder's last layer
    set to 0. On the meta device names and shapes are checked. VgmError: it is another network."""
    want, have = target.state_dict(), source.state_dict()
    own = want.keys() - have.keys()
    if not have.keys() <= want.keys() or any(have[k].shape != want[k].shape for k in have):
        hint = "model={name: teacher, second_time: true, weights: null}"
        raise VgmError("the network is not the teacher's with a second time", hint, USAGE)
    if any(p.is_meta for p in target.parameters()):
        return
    for name, tensor in want.items():
        if name in have:
            tensor.copy_(have[name])
        elif name in own and name.startswith(LAST_OF_SECOND):
            tensor.zero_()
