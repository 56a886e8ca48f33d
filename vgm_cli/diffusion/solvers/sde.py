"""Stochastic samplers: the family of reverse SDEs, and score-SDE's predictor-corrector (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vgm_cli.diffusion.solvers.common import Callback, Draw, Estimate, add, notify, notify_slope
from vgm_cli.errors import unknown
from vgm_cli.nn.shapes import expand


def predictor_corrector(
    score: Callable[[Tensor, int], Tensor],
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    predictor: str = "reverse-diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    noise: Draw,
    callback: Callback = None,
) -> Tensor:
    """Score-SDE's predictor-corrector (Song et al. 2021, alg. 2 to 5): Langevin steps, then one down the grid.

    predictor: reverse-diffusion | ancestral | none. The last step's mean is returned, without its noise. Deviation: the
    Langevin step size uses each image's own norms, the official one the batch's mean. VgmError: unknown predictor.
    """
    if predictor not in ("reverse-diffusion", "ancestral", "none"):
        raise unknown("predictor", predictor, ("reverse-diffusion", "ancestral", "none"))
    mean = x
    for i in range(len(alphas) - 1):
        ratio = alphas[i] / alphas[i + 1]
        for _ in range(corrector_steps):
            gradient, draw = score(x, i), noise()
            size = snr * per_item(torch.linalg.vector_norm, draw) / per_item(torch.linalg.vector_norm, gradient)
            step = 2 * ratio**2 * size**2
            mean = x + step * gradient
            x = mean + (2 * step) ** 0.5 * draw
        gradient = score(x, i)
        notify(callback, i, x, (x + sigmas[i] ** 2 * gradient) / alphas[i])
        if predictor == "none":
            continue
        variance = sigmas[i] ** 2 - (ratio * sigmas[i + 1]) ** 2
        if predictor == "ancestral":
            mean = (x + variance * gradient) / ratio
            variance = variance * (sigmas[i + 1] / sigmas[i]) ** 2
        else:
            mean = (2 - ratio) * x + variance * gradient
        x = mean + variance**0.5 * noise()
    return mean


def per_item(reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A reduction over everything but the batch: (B, 1, ...)."""
    return expand(reduce(x.flatten(1), dim=1), x)


def reverse_sde(
    drift_score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    times: Tensor,
    diffusion: Callable[[Tensor], Tensor],
    *,
    noise: Draw,
    callback: Callback = None,
    x0_of: Estimate = None,
) -> Tensor:
    """Euler-Maruyama on dx = (u - e^2 / 2 score) dt + e dW, t descending: any e(t) >= 0 keeps the marginals.

    drift_score(x, t) -> (u, score), the score being x0_of's slope; diffusion(t) -> e. e = 0 is the ODE, e^2 =
    path.g2(t) the exact time reversal. The last step adds no noise.
    """
    for i in range(len(times) - 1):
        u, score = drift_score(x, times[i])
        notify_slope(callback, i, x, times[i], score, x0_of)
        e, dt = diffusion(times[i]), times[i + 1] - times[i]
        x = x + dt * (u - e**2 / 2 * score)
        if i < len(times) - 2:
            x = add(x, e * dt.abs().sqrt(), noise)
    return x
