"""The pieces of MeanFlow's loss, each a function of tensors alone. Geng et al. 2025 (2505.13447), sec. 4.

Here `velocity(z, t, r, **cond)` is the network's average velocity u (B, ...) on the way from t to r <= t, times being
the host's: 0 is data. With r = t it is the velocity of the flow at t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.diffusion.jvp import total_derivative
from vgm_cli.nn.shapes import expand

Velocity = Callable[..., Tensor]
Cond = Mapping[str, Tensor]
Order = Literal["sort", "cap"]


def pairs_of_times(first: Tensor, second: Tensor, equal: Tensor, order: Order = "sort") -> tuple[Tensor, Tensor]:
    """(t, r), each (B,) with r <= t, of two draws; equal (B,) bool: rows in which r is t.

    sort: the larger draw is t, then rows are made equal. cap: t is the first draw, rows are made equal, and r is at
    most t, so that some more rows come out equal.
    """
    if order == "cap":
        return first, torch.where(equal, first, second).minimum(first)
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    return t, torch.where(equal, t, r)


@torch.no_grad()
def guided_velocity(
    velocity: Velocity,
    z: Tensor,  # (B, ...) on the path at t
    t: Tensor,  # (B,)
    v: Tensor,  # (B, ...) velocity of the path from data to noise through z
    cond: Cond,  # keywords of the network, each (B, ...)
    null: Cond,  # the same without a condition
    omega: float,  # weight of v
    kappa: float,  # weight of the network's own conditional velocity
    interval: tuple[float, float] = (0.0, 1.0),  # times that are guided; v outside
) -> Tensor:
    """omega v + kappa u(z | cond) + (1 - omega - kappa) u(z | null), (B, ...): the velocity of a flow that is guided
    with scale omega / (1 - kappa) (eq. 19 to 21). The network is asked as it is, without a gradient."""
    inside = (interval[0] <= t) & (t <= interval[1])
    w, k = (expand(torch.where(inside, a, b).to(v.dtype), v) for a, b in ((omega, 1.0), (kappa, 0.0)))
    if kappa == 0:
        u = velocity(z, t, t, **null)
        return u + w * (v - u)
    both = {key: torch.cat([value, null[key]]) for key, value in cond.items()}
    wanted, worse = velocity(torch.cat([z, z]), torch.cat([t, t]), torch.cat([t, t]), **both).chunk(2)
    return w * v + k * wanted + (1 - w - k) * worse


def average_velocity(
    velocity: Velocity,
    z: Tensor,  # (B, ...)
    t: Tensor,  # (B,)
    r: Tensor,  # (B,)
    v: Tensor,  # (B, ...) velocity at z, guided or not: where z goes as t grows
    apart: Tensor,  # (B,) bool on the CPU: rows in which r < t
    cond: Cond,
    joint: bool = True,  # value and derivative in one pass, which keeps activations of both for the backward one
) -> tuple[Tensor, Tensor]:
    """u and its total derivative du/dt = v . grad_z u + d_t u along the flow, both (B, ...).

    Where r = t the derivative is not needed: it is 0 there, and those rows cost a plain evaluation. The derivative has
    no gradient; without `joint` it is taken alone, and the same dropout masks are drawn again for the value.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    same, differ = ((apart == wanted).nonzero()[:, 0] for wanted in (False, True))
    for rows in (same, differ):
        if not len(rows):
            continue
        at = rows.to(z.device)
        own = {k: value[at] for k, value in cond.items()}
        here = (z[at], t[at], r[at])
        if rows is same:
            u = velocity(*here, **own)
            parts.append((u, torch.zeros_like(u)))
            continue
        tangents = (v[at], torch.ones_like(here[1]), torch.zeros_like(here[2]))
        parts.append(total_derivative(lambda z, t, r, own=own: velocity(z, t, r, **own), here, tangents, joint=joint))
    back = torch.cat([same, differ]).argsort().to(z.device)
    u, du = (torch.cat(column)[back] for column in zip(*parts))
    return u, du.detach()


def target_of(v: Tensor, du: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """What u is drawn to, without a gradient: v - (t - r) du/dt, (B, ...), the MeanFlow identity (eq. 6)."""
    return (v - expand((t - r).to(v.dtype), v) * du).detach()


def summed(error: Tensor) -> Tensor:
    """Sum of squares over all but the batch: (B, ...) -> (B,)."""
    return error.square().flatten(1).sum(1)


def adaptive(raw: Tensor, p: float = 1.0, eps: float = 0.01, squared: bool = False) -> Tensor:
    """raw / (raw + eps)^p with no gradient through the weight, (B,) -> (B,). With p = 1 the value is about 1 whatever
    is learned; its gradient is that of ln(raw). squared: raw^2 in place of raw, as zhuyu-cs/MeanFlow does."""
    power = raw.square() if squared else raw
    return power / (power.detach() + eps) ** p


def logs_of(raw: Tensor, du: Tensor, apart: Tensor) -> dict[str, Any]:
    """Detached scalars: the unweighted error of all rows, of those with r = t and with r < t, and the root mean square
    of du/dt in the latter; 0 where there are none."""
    apart = apart.to(raw.device)
    raw, many = raw.detach(), apart.sum().clamp(min=1)
    return {
        "raw": raw.mean(),
        "raw_same": torch.where(apart, 0.0, raw).sum() / (~apart).sum().clamp(min=1),
        "raw_apart": torch.where(apart, raw, 0.0).sum() / many,
        "du_dt": (du.square().flatten(1).mean(1).sum() / many).sqrt(),
    }
