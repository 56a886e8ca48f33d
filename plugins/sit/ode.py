"""Explicit Runge-Kutta integration with the semantics of torchdiffeq 0.2.5, which the official code integrates with.

Fixed methods take one step between neighbouring grid points. Adaptive ones (Hairer, Norsett & Wanner, Solving ODEs I,
II.4) choose their own steps, step beyond a grid point and interpolate back with a quartic; their error norm is over the
whole batch, so what they give for one item depends a little (within rtol) on the others: the host's own dopri5
(diffusion/solvers/ode.py) steps every item by itself, with the same stages and another estimate of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vgm_cli.diffusion.solvers.ode import DORMAND_PRINCE, HEUN3, KUTTA38
from vgm_cli.errors import DIVERGED, VgmError, unknown

State = tuple[Tensor, ...]
Field = Callable[[float, State], State]


@dataclass(frozen=True)
class Tableau:
    """nodes c, rows a (one per node), weights b; error and mid (weights of the half-way point) when adaptive."""

    order: int
    c: Sequence[float]
    a: Sequence[Sequence[float]]
    b: Sequence[float]
    error: Sequence[float] = ()
    mid: Sequence[float] = ()


METHODS = {
    "euler": Tableau(1, [], [], [1]),
    "midpoint": Tableau(2, [1 / 2], [[1 / 2]], [0, 1]),
    "heun2": Tableau(2, [1], [[1]], [1 / 2, 1 / 2]),
    "heun3": Tableau(3, [c for c, _ in HEUN3[0]], [row for _, row in HEUN3[0]], HEUN3[1]),
    "rk4": Tableau(4, [c for c, _ in KUTTA38[0]], [row for _, row in KUTTA38[0]], KUTTA38[1]),
    "adaptive_heun": Tableau(2, [1], [[1]], [1 / 2, 1 / 2], error=[1 / 2, -1 / 2], mid=[1 / 2, 0]),
    "fehlberg2": Tableau(
        2,
        [1 / 2, 1],
        [[1 / 2], [1 / 256, 255 / 256]],
        [1 / 512, 255 / 256, 1 / 512],
        error=[-1 / 512, 0, 1 / 512],
        mid=[0, 1 / 2, 0],
    ),
    "bosh3": Tableau(
        3,
        [1 / 2, 3 / 4, 1],
        [[1 / 2], [0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]],
        [2 / 9, 1 / 3, 4 / 9, 0],
        error=[2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8],
        mid=[0, 1 / 2, 0, 0],
    ),
    "dopri5": Tableau(
        5,
        [c for c, _ in DORMAND_PRINCE],
        [weights for _, weights in DORMAND_PRINCE],
        [*DORMAND_PRINCE[-1][1], 0],
        error=[  # fifth minus fourth order, Shampine's variant
            35 / 384 - 1951 / 21600,
            0,
            500 / 1113 - 22642 / 50085,
            125 / 192 - 451 / 720,
            -2187 / 6784 + 12231 / 42400,
            11 / 84 - 649 / 6300,
            -1 / 60,
        ],
        mid=[
            6025192743 / 30085553152 / 2,
            0,
            51252292925 / 65400821598 / 2,
            -2691868925 / 45128329728 / 2,
            187940372067 / 1594534317056 / 2,
            -1776094331 / 19743644256 / 2,
            11237099 / 235043384 / 2,
        ],
    ),
}


def combine(y: State, h: float, weights: Sequence[float], slopes: Sequence[State]) -> State:
    """y + h * sum of weight * slope."""
    used = [(h * w, k) for w, k in zip(weights, slopes) if w]
    out = []
    for i, part in enumerate(y):
        for w, k in used:
            part = part + w * k[i]
        out.append(part)
    return tuple(out)


def slopes_of(f: Field, t: float, h: float, y: State, first: State, tableau: Tableau) -> list[State]:
    """The stages' slopes; `first` is f(t, y)."""
    slopes = [first]
    for c, row in zip(tableau.c, tableau.a):
        slopes.append(f(t + c * h, combine(y, h, row, slopes)))
    return slopes


def rms(y: State, scale: State) -> float:
    """The largest root mean square of y / scale over the state's parts."""
    return max(float((a / s).square().mean().sqrt()) for a, s in zip(y, scale))


def integrate(
    f: Field,
    y: State,
    grid: Tensor,
    method: str = "dopri5",
    atol: float = 1e-6,
    rtol: float = 1e-3,
    overshoot: bool = True,
) -> Iterator[tuple[float, State]]:
    """Solve dy/dt = f(t, y) from y at grid[0]; yields (t, y) at every grid point, the first included.

    grid: (N,) increasing or decreasing. overshoot: adaptive steps may pass grid[-1] before interpolating back (as
    torchdiffeq does); False where f is not defined there. VgmError: unknown method, or the solution blows up.
    """
    if method not in METHODS:
        raise unknown("ODE method", method, METHODS)
    points = grid.tolist()
    if points[-1] < points[0]:  # backwards in time: forwards in -t

        def mirrored(t: float, y: State) -> State:
            return tuple(-v for v in f(-t, y))

        for t, state in integrate(mirrored, y, -grid, method, atol, rtol, overshoot):
            yield -t, state
        return
    tableau = METHODS[method]
    if tableau.error:
        yield from adaptive(f, y, points, tableau, atol, rtol, overshoot)
        return
    yield points[0], y
    for t, t_next in pairwise(points):
        h = t_next - t
        y = combine(y, h, tableau.b, slopes_of(f, t, h, y, f(t, y), tableau))
        yield t_next, y


def adaptive(
    f: Field, y: State, points: Sequence[float], tableau: Tableau, atol: float, rtol: float, overshoot: bool
) -> Iterator[tuple[float, State]]:
    t = begin = points[0]
    slope = f(t, y)
    h = first_step(f, t, y, slope, tableau.order, atol, rtol)
    curve = [y]
    yield t, y
    for target in points[1:]:
        while target > t:
            if not overshoot:
                h = min(h, points[-1] - t)
            if not t + h > t or not all(bool(torch.isfinite(part).all()) for part in y):
                raise VgmError(
                    "the ODE solver cannot go on: the solution blows up", "a fixed method, e.g. heun2", DIVERGED
                )
            slopes = slopes_of(f, t, h, y, slope, tableau)
            y_next = combine(y, h, tableau.b, slopes)
            zero = tuple(torch.zeros_like(part) for part in y)
            scale = tuple(atol + rtol * torch.maximum(a.abs(), b.abs()) for a, b in zip(y, y_next))
            error = rms(combine(zero, h, tableau.error, slopes), scale)
            if error <= 1:
                curve = quartic(y, y_next, combine(y, h, tableau.mid, slopes), slopes[0], slopes[-1], h)
                begin, t, y, slope = t, t + h, y_next, slopes[-1]
            # safety 0.9, growth at most 10, shrinkage at most 0.2 and only after a rejection
            wish = 0.9 / error ** (1 / tableau.order) if error > 0 else 10.0
            h = h * min(10.0, max(wish, 1.0 if error < 1 else 0.2))
        s = (target - begin) / (t - begin)
        yield (
            target,
            tuple(sum((c[i] * s**n for n, c in enumerate(curve)), torch.zeros_like(y[i])) for i in range(len(y))),
        )


def first_step(f: Field, t: float, y: State, slope: State, order: int, atol: float, rtol: float) -> float:
    """A careful first step from the sizes of y, y' and an estimate of y''."""
    scale = tuple(atol + part.abs() * rtol for part in y)
    d0, d1 = rms(y, scale), rms(slope, scale)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    later = f(t + h0, combine(y, h0, [1], [slope]))
    d2 = rms(tuple(b - a for a, b in zip(slope, later)), scale) / h0
    h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / order)
    return min(100 * h0, h1)


def quartic(y0: State, y1: State, mid: State, f0: State, f1: State, h: float) -> list[State]:
    """Coefficients, constant first, of the quartic through both ends' values and slopes and the middle."""
    rows = []
    for a, b, m, p, q in zip(y0, y1, mid, f0, f1):
        rows.append(
            (
                a,
                h * p,
                h * (q - 4 * p) - 11 * a - 5 * b + 16 * m,
                h * (5 * p - 3 * q) + 18 * a + 14 * b - 32 * m,
                2 * h * (q - p) - 8 * (b + a) + 16 * m,
            )
        )
    return [tuple(row[n] for row in rows) for n in range(5)]
