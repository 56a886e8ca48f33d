"""PLMS, the pseudo linear multistep method of order four. Liu et al. 2022 (arXiv 2202.09778).

Official code: CompVis/latent-diffusion@a506df5 ldm/models/diffusion/plms.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vgm_cli.diffusion.solvers.common import Callback, Predict, notify

WEIGHTS = (  # of the latest estimates of the noise, the newest first (Adams-Bashforth)
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    clip: Callable[[Tensor], Tensor] | None = None,
    keep: Callable[[Tensor, int], Tensor] | None = None,
    callback: Callback = None,
) -> Tensor:
    """DDIM's deterministic steps with the noise extrapolated from the last four evaluations; the first step is one of
    Heun's, with an evaluation more. predict, alphas, sigmas: as `ddim`'s. clip: applied to x0. keep: applied to x
    before every step, not before the evaluation more.
    """

    def estimate(x: Tensor, eps: Tensor, i: int) -> Tensor:
        x0 = (x - sigmas[i] * eps) / alphas[i]
        return x0 if clip is None else clip(x0)

    def step(x: Tensor, eps: Tensor, i: int) -> Tensor:
        return alphas[i + 1] * estimate(x, eps, i) + sigmas[i + 1] * eps

    known: list[Tensor] = []
    last = len(alphas) - 2
    for i in range(last + 1):
        before = x
        x = x if keep is None else keep(x, i)
        known = [predict(x, i)[1], *known[:3]]
        if i == 0:
            ahead = predict(step(x, known[0], 0), min(1, last))[1]
            eps = (known[0] + ahead) / 2
        else:
            eps = torch.stack([w * e for w, e in zip(WEIGHTS[len(known) - 1], known, strict=True)]).sum(0)
        notify(callback, i, before, estimate(x, eps, i))
        x = step(x, eps, i)
    return x
