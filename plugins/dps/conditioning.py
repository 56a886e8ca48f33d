"""What DPS, its variants and MCG do after every ancestral step, as pure functions.

Chung et al. 2022 (DPS, 2209.14687) algorithms 1 and 2; Chung et al. 2022 (MCG, 2206.00941). Official code:
DPS2022/diffusion-posterior-sampling@effbde7 guided_diffusion/condition_methods.py. The gradient is that of the norm,
not of its square, with respect to x_t, through the clipped x0 and the network. Deviation: norms are per item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vgm_cli.nn.shapes import expand
from vgm_cli.operators.base import Operator

Project = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> x that agrees with y


def distance(operator: Operator, x0: Tensor, y: Tensor, noise: str = "gaussian") -> Tensor:
    """|y - A(x0)| per item: (B,). noise "poisson": the norm over |y|, averaged over the measurement."""
    norm = (y - operator(x0)).flatten(1).norm(dim=1)
    return (norm[:, None] / y.abs().flatten(1)).mean(1) if noise == "poisson" else norm


def gradient(x_t: Tensor, value: Tensor) -> Tensor:
    """d value / d x_t of every item; value: (B,)."""
    return torch.autograd.grad(value.sum(), x_t)[0]


def posterior_sampling(
    operator: Operator,
    x_t: Tensor,
    x_next: Tensor,
    x0: Tensor,
    y: Tensor,
    zeta: float,
    noise: str = "gaussian",
    limited: bool = False,
) -> tuple[Tensor, Tensor]:
    """DPS ("ps"): x_next - zeta d distance / d x_t, and the distance (B,).

    limited: a step ends where the distance would be what Gaussian noise leaves (0 of other noise) if it went on falling
    as it does (Polyak's step size).
    """
    value = distance(operator, x0, y, noise)
    g = gradient(x_t, value)
    if not limited:
        return x_next - zeta * g, value
    expected = operator.noise.sigma * y[0].numel() ** 0.5 if noise == "gaussian" else 0.0
    step = (value.detach() - expected).clamp(min=0) / g.flatten(1).square().sum(1).clamp(min=1e-12)
    return x_next - expand(step.clamp(max=zeta), g) * g, value


def posterior_sampling_plus(
    operator: Operator, x_t: Tensor, x_next: Tensor, x0: Tensor, y: Tensor, zeta: float, draws: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """ "ps+": the mean distance over x0 + 0.05 u; draws: one u like x0 each, uniform in [0, 1)."""
    value = torch.stack([distance(operator, x0 + 0.05 * u, y) for u in draws]).mean(0)
    return x_next - zeta * gradient(x_t, value), value


def manifold_constrained(
    operator: Operator,
    x_t: Tensor,
    x_next: Tensor,
    x0: Tensor,
    y: Tensor,
    y_t: Tensor,
    zeta: float,
    noise: str = "gaussian",
    project: Project | None = None,
    limited: bool = False,
) -> tuple[Tensor, Tensor]:
    """MCG: a DPS step, then a projection onto the measurement noised to the same step, y_t."""
    x, value = posterior_sampling(operator, x_t, x_next, x0, y, zeta, noise, limited)
    return (project or projection(operator))(x, y_t), value


def projection(operator: Operator) -> Project:
    """x + A^+ (y - A x): the nearest image that measures y."""
    return lambda x, y: x + operator.pinv(y - operator(x))
