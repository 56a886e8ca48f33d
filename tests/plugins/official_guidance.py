"""The official forward_with_cfg of DiT and SiT, said through the host's guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vgm_cli.diffusion.guidance import Guidance


def doubled(network: nn.Module, y: Tensor, scale: float, channels: int = 3) -> Callable[[Tensor, Tensor], Tensor]:
    """y: (B,) labels -> model(x, t) of a doubled batch (2B, ...), conditional half first, whose second half is ignored.

    Both halves of the output are guided in the leading channels; the others are the conditional ones in the first half
    and the unconditional ones in the second.
    """
    cond = {"y": y}
    guidance = Guidance(scale, channels)

    def model(x: Tensor, t: Tensor) -> Tensor:
        x, t = x[: len(y)], t[: len(y)]
        null_cond = network.null_condition(cond)  # type: ignore[operator]
        both, null = guidance(network, x, t, cond, null_cond), network(x, t, **null_cond)
        return torch.cat([both, torch.cat([both[:, :channels], null[:, channels:]], dim=1)])

    return model
