"""Derivatives of a network along a direction: what MeanFlow and continuous-time consistency models train on.

d/ds f(x + s v, t + s) at s = 0 is a Jacobian-vector product, one forward pass of dual numbers (forward mode). The fused
attention kernels have no forward mode and half precision makes its differences noise (Lu & Song 2025, 2410.11081,
app. B; NVlabs/FastGen@34f30e8f sCM.py, mean_flow.py), so attention is written out and autocast is off here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def total_derivative(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *,
    step: float | None = None,
    joint: bool = True,
) -> tuple[Tensor, Tensor]:
    """(f(primals), sum_i df/dprimal_i tangent_i), both shaped like f's value and differentiable in f's parameters.

    primals, tangents: floating-point tensors of equal shapes, taken to float32 at least; other arguments of f are bound
    by the caller. Where f draws (dropout), every evaluation sees the same draws.
    step: None is forward mode; a number is the central difference (f(p + step v) - f(p - step v)) / (2 step), two more
    evaluations, for networks with operators that have no forward mode (FSDP shards, fused attention).
    joint: False takes the derivative by itself and without a gradient, and the value by a plain evaluation after it,
    in the caller's precision: one evaluation more, but the backward pass keeps the activations of the value alone.
    Call the bare network: wrapping a compiled one in forward mode breaks its graph, compile the caller instead (DiT and
    SiT compile so; networks with group norms do not, torch cannot trace the forward derivative of group_norm).
    """
    primals = tuple(p.to(torch.promote_types(p.dtype, torch.float32)) for p in primals)
    tangents = tuple(v.to(p) for p, v in zip(primals, tangents, strict=True))
    device = primals[0].device
    if not joint:
        replay = SameDraws(device)
        with replay, torch.no_grad():
            _, derivative = total_derivative(function, primals, tangents, step=step)
        with replay:
            return function(*primals), derivative
    with torch.autocast(device.type, enabled=False):
        if step is None:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(function, primals, tangents)  # type: ignore[return-value]  # two without aux
        replay, values = SameDraws(device), []
        for h in (0.0, step, -step):
            with replay:
                values.append(function(*(p + h * v for p, v in zip(primals, tangents))))
        return values[0], (values[1] - values[2]) / (2 * step)


class SameDraws:
    """A context that can be entered again: random draws inside start where they would have started when it was made."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.random.get_rng_state()
        self.gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        torch.random.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)

    def __exit__(self, *_: object) -> None:
        pass
