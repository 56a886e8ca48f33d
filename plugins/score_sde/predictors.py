"""Predictors, correctors and the walk of both, as pure functions. Song et al. 2021 (2011.13456), alg. 2 to 5.

Behaviour of yang-song/score_sde_pytorch@cb1f359 sampling.py: at each time the corrector comes first, then the predictor
at the same time. Deviations: step sizes of Langevin by each image's own norms unless norm="batch"; Langevin works on
sub-VP (officially a table is missing there).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import expand

from .sde import SDE, Score

Predictor = Literal["reverse-diffusion", "euler-maruyama", "ancestral", "none"]
Corrector = Literal["langevin", "ald", "none"]
Norm = Literal["image", "batch"]
Noise = Callable[[], Tensor]  # the next standard normal draw like x
Pair = tuple[Tensor, Tensor]  # (the next state, the same without this step's noise): (B, ...) each


def scaled(scale: Tensor, x: Tensor) -> Tensor:
    """x (B, ...) times scale (B,), in the precision of x."""
    return expand(scale, x).to(x.dtype) * x


def predict(
    sde: SDE,
    predictor: Predictor,
    x: Tensor,  # (B, ...) at times t
    t: Tensor,  # (B,)
    score: Tensor,  # (B, ...) at x
    z: Tensor,  # (B, ...) standard normal
    flow: bool = False,  # the probability flow in place of the reverse SDE
) -> Pair:
    """One step down; none changes nothing. VgmError: ancestral steps of sub-VP, or of the probability flow."""
    if predictor == "none":
        return x, x
    if predictor == "reverse-diffusion":
        drift, noise = sde.reverse_step(x, t, score, flow)
        mean = x - drift
        return mean + scaled(noise, z), mean
    if predictor == "euler-maruyama":
        drift, diffusion = sde.reverse_drift(x, t, score, flow)
        mean = x - drift / sde.steps
        return mean + scaled(diffusion / sde.steps**0.5, z), mean
    if sde.kind == "subvp" or flow:
        what = "sub-VP has no ancestral steps" if sde.kind == "subvp" else "the probability flow has no ancestral steps"
        raise VgmError(what, "predictor=euler-maruyama or reverse-diffusion", USAGE)
    if sde.kind == "ve":
        high, low = sde.levels(t)
        mean = x + scaled(high**2 - low**2, score)
        return mean + scaled((low**2 * (high**2 - low**2) / high**2).sqrt(), z), mean
    beta = sde.at(sde.betas, t)
    mean = scaled((1 - beta).rsqrt(), x + scaled(beta, score))
    return mean + scaled(beta.sqrt(), z), mean


def correct(
    sde: SDE,
    corrector: Corrector,
    x: Tensor,  # (B, ...) at times t
    t: Tensor,  # (B,)
    score: Score,
    noise: Noise,
    snr: float = 0.16,  # signal-to-noise ratio, from which the step size follows
    steps: int = 1,
    norm: Norm = "image",  # norms that the step size of langevin follows from: each image's, or their mean
) -> Pair:
    """Steps of Langevin dynamics at the same time: langevin, or ald, whose step size follows from t alone. none changes
    nothing."""
    if corrector == "none":
        return x, x
    one = torch.ones_like(t, dtype=torch.float64)
    alpha = one if sde.kind == "ve" else sde.at(1 - sde.betas, t)
    mean = x
    for _ in range(steps):
        gradient, draw = score(x, t), noise()
        if corrector == "ald":
            ratio = sde.path.sigma(t.double())
        else:
            ratio = norm_of(draw, norm) / norm_of(gradient, norm)
        size = 2 * alpha * (snr * ratio.double()) ** 2
        mean = x + scaled(size, gradient)
        x = mean + scaled((2 * size).sqrt(), draw)
    return x, mean


def norm_of(x: Tensor, norm: Norm) -> Tensor:
    """Euclidean norms of the images, or for each image their mean: (B,)."""
    norms = x.flatten(1).norm(dim=1)
    return norms if norm == "image" else norms.mean().expand(len(x))


def times_of(sde: SDE, eps: float) -> Tensor:
    """The N times of the walk, 1 down to eps: (N,) float32."""
    return torch.linspace(1.0, eps, sde.steps)


def walk(
    sde: SDE,
    score: Score,
    x: Tensor,  # (B, ...) at t = 1
    *,
    predictor: Predictor = "reverse-diffusion",
    corrector: Corrector = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norm: Norm = "image",
    flow: bool = False,
    eps: float = 1e-3,
    noise: Noise,
    impose: Callable[[Tensor, Tensor], Pair] | None = None,
    callback: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Pair:
    """From noise to data: (the last state, the same without its last noise).

    impose(x, t): makes a state agree with what is known, after the corrector and after the predictor. callback(i, t, x,
    x0): the state at which step i estimates data; not called without a predictor.
    """
    mean = x
    keep = impose or (lambda state, t: (state, state))
    for i, time in enumerate(times_of(sde, eps).tolist()):
        t = torch.full((len(x),), time, device=x.device)
        if corrector != "none":
            x, mean = correct(sde, corrector, x, t, score, noise, snr, corrector_steps, norm)
        if impose is not None:
            x, mean = keep(x, t)
        if predictor == "none":
            mean = x
        else:
            s = score(x, t)
            if callback is not None:
                alpha, sigma = sde.path.alpha(t.double()), sde.path.sigma(t.double())
                callback(i, t, x, scaled(1 / alpha, x + scaled(sigma**2, s)))
            x, mean = predict(sde, predictor, x, t, s, noise(), flow)
        if impose is not None:
            x, mean = keep(x, t)
    return x, mean
