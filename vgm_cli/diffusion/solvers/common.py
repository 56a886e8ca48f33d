"""What the solvers share: the types of their arguments, callbacks, noise, and two formulas in VE coordinates.

Randomness comes in as a callable: `noise()` gives the next standard normal draw like x. It is called exactly when the
official code draws, except that noise which a sampler multiplies by zero throughout (churn 0, eta 0) is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma (B,)) -> x0, in VE coordinates (x / alpha)
Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x, i) -> (x0, eps) at point i of the grid
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> dx/dt
Draw = Callable[[], Tensor]
Callback = Callable[[int, Tensor, Tensor | None], None] | None  # (i, x, x0): the state at which step i estimated x0
Estimate = Callable[[Tensor, Tensor, Tensor], Tensor] | None  # (x, t, slope) -> x0


def estimate(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    """x0 at one noise level for the whole batch."""
    return denoise(x, sigma.to(x.device).expand(len(x)))


def slope(x: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """dx/dsigma of the probability flow."""
    return (x - x0) / sigma


def ancestral_step(sigma: Tensor, sigma_next: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(level to step down to, standard deviation of the noise to add) so that the sum has level sigma_next."""
    if not eta:
        return sigma_next, torch.zeros_like(sigma_next)
    up = torch.minimum(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def notify(callback: Callback, i: int, x: Tensor, x0: Tensor | None) -> None:
    if callback is not None:
        callback(i, x, x0)


def notify_slope(callback: Callback, i: int, x: Tensor, t: Tensor, v: Tensor, x0_of: Estimate) -> None:
    """As `notify`, with the estimate of x0 that the slope v at (x, t) means."""
    if callback is not None:
        callback(i, x, None if x0_of is None else x0_of(x, t, v))


def add(x: Tensor, scale: Tensor | float, noise: Draw | None) -> Tensor:
    """x + scale noise; nothing is drawn where scale is 0."""
    return x + noise() * scale if noise is not None and scale > 0 else x
