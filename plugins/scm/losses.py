"""The pieces of sCM's loss, each a function of tensors alone. Lu & Song 2025 (2410.11081), sec. 4 and algorithm 1.

TrigFlow: x_t = cos(t) x0 + sin(t) z with z = sigma_data noise, and F(x, t) is a network's velocity over sigma_data
there (the host's prediction "trig"). Here a network is a function F(x (B, ...), t (B,)) -> (B, ...), its conditions
bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.diffusion.jvp import SameDraws, total_derivative
from vgm_cli.diffusion.path import TrigPath
from vgm_cli.nn.shapes import along, expand

Network = Callable[[Tensor, Tensor], Tensor]
Tangent = Literal["normalise", "rms", "clip"]
LAST = math.pi / 2 - 1e-4  # the latest time at which networks are asked: at pi / 2 nothing is left of x0


def times_of(normal: Tensor, mean: float, std: float, sigma_data: float) -> Tensor:
    """Times t (B,) of standard normal draws (B,): tan(t) sigma_data, the noise level, is log-normal."""
    return torch.atan((normal * std + mean).exp() / sigma_data)


def moved(F: Network, x: Tensor, t: Tensor, slope: Tensor, joint: bool = True) -> tuple[Tensor, Tensor]:
    """F, and its derivative along the flow times cos(t) sin(t), without a gradient: (B, ...) both.

    slope: dx/dt (B, ...). The factor is in the tangents, so that nothing large is formed near t = pi / 2 (sec. 4.2,
    "JVP rearrangement"). joint: in one pass, or the derivative by itself first.
    """
    speed = t.cos() * t.sin()
    value, derivative = total_derivative(F, (x, t), (along(speed, x) * slope, speed), joint=joint)
    return value, derivative.detach()


def moved_by_differences(
    F: Network, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor, path: TrigPath, step: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """`moved` by a central difference, for networks without a forward mode: (B, ...) both.

    The difference is between two points with the same x0 and noise (B, ...), at t (1 +- step), not along a teacher's
    flow (NVlabs/FastGen@34f30e8f sCM.py): what it estimates is the derivative of consistency training.
    """
    t = t.double().clamp(max=math.pi / 2 - 1e-5)
    h = (step * t).clamp(min=1e-6)
    replay = SameDraws(x.device)
    ends = []
    for end in ((t + h).clamp(max=math.pi / 2 - 1e-5), t - h):
        with replay, torch.no_grad():
            ends.append(F(path.add_noise(x0.double(), noise.double(), end).to(x.dtype), end))
    with replay:
        value = F(x, t)
    factor = expand(t.cos() * t.sin() / (2 * h), x)
    return value, (ends[0].double() - ends[1].double()) * factor


def tangent(F: Tensor, slope: Tensor, x: Tensor, derivative: Tensor, t: Tensor, r: float, sigma_data: float) -> Tensor:
    """g = -cos^2(t) (sigma_data F - dx/dt) - r (cos(t) sin(t) x + sigma_data dF/dt cos(t) sin(t)), (B, ...), float64.

    It is cos(t) times the derivative of the consistency function along the flow, the weight 1 / (sigma_data tan t)
    included. F: of the frozen copy, (B, ...); derivative: see `moved`; r: 0 at the start of training to 1.
    """
    cos, sin = (expand(v, x) for v in (t.double().cos(), t.double().sin()))
    first = -(cos**2) * (sigma_data * F.detach().double() - slope.double())
    return first - r * (cos * sin * x.double() + sigma_data * derivative.double())


def norms(g: Tensor, kind: Tangent = "normalise") -> Tensor:
    """(B,) lengths of g (B, ...): rms is a value's root mean square, which other sizes of images leave as it is."""
    length = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return length / g[0].numel() ** 0.5 if kind == "rms" else length


def bounded(g: Tensor, kind: Tangent = "normalise", c: float = 0.1) -> Tensor:
    """g / (|g| + c) with the length of `norms`, or every value cut off at +-1."""
    return g.clamp(-1, 1) if kind == "clip" else g / (expand(norms(g, kind), g) + c)


def weighted(
    F: Tensor,  # (B, ...) of the trained network
    g: Tensor,  # (B, ...) bounded tangent
    w: Tensor,  # (B,) adaptive log weight
    prior: Tensor | None = None,  # (B,) a further factor; None: the paper's, which is in g already
    divide: bool = False,  # divided by the number of values once more
) -> tuple[Tensor, Tensor]:
    """e^w mean (F - stopgrad(F) - g)^2 - w of each item, and the mean itself: (B,), (B,). Its gradient in F is that of
    -2 g F: the value says nothing of how good the network is."""
    error = (F.double() - F.detach().double() - g).square().flatten(1).mean(1)
    factor = w.double().exp() / (g[0].numel() if divide else 1)
    return (factor if prior is None else factor * prior) * error - w.double(), error
