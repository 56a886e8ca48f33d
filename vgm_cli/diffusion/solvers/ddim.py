"""One-step samplers in the path's own coordinates: DDIM, DDPM, and the Euler steps of flow matching.

`predict(x, i) -> (x0, eps)` at point i of a grid with alphas[i], sigmas[i] (N + 1 each, the last is where sampling
ends); behaviour of huggingface/diffusers@58eb52c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vgm_cli.diffusion.solvers.common import Callback, Draw, Predict, notify
from vgm_cli.errors import unknown
from vgm_cli.nn.shapes import expand


def ddim(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 0.0,
    clip: Callable[[Tensor], Tensor] | None = None,
    use_clipped_eps: bool = False,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16) on any alpha and sigma; on the linear path with eta = 0 the flow's Euler.

    eta: 0 deterministic, 1 as noisy as DDPM. clip: applied to x0; use_clipped_eps: eps then follows it.
    """
    for i in range(len(alphas) - 1):
        x0, eps = predict(x, i)
        if clip is not None:
            x0 = clip(x0)
            if use_clipped_eps:
                eps = (x - alphas[i] * x0) / sigmas[i]
        notify(callback, i, x, x0)
        std = eta * posterior_std(alphas, sigmas, i)
        x = alphas[i + 1] * x0 + (sigmas[i + 1] ** 2 - std**2).clamp(min=0) ** 0.5 * eps
        if eta and noise is not None:
            x = x + std * noise()
    return x


def posterior_std(alphas: Tensor, sigmas: Tensor, i: int) -> Tensor:
    """Standard deviation of q(x_{i+1} | x_i, x0), i + 1 being the cleaner point."""
    ratio = alphas[i] / alphas[i + 1]
    return sigmas[i + 1] / sigmas[i] * (sigmas[i] ** 2 - (ratio * sigmas[i + 1]) ** 2).clamp(min=0) ** 0.5


def ddpm(
    predict: Predict,
    x: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    variance: str = "fixed_small",
    clip: Callable[[Tensor], Tensor] | None = None,
    final_noise: bool = False,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, eq. 7): the posterior's mean, and noise of fixed_small (the posterior's) or
    fixed_large (the transition's) variance, "_log" forms being the same. final_noise: the last step has noise too."""
    if variance.removesuffix("_log") not in ("fixed_small", "fixed_large"):
        raise unknown("variance", variance, ("fixed_small", "fixed_large"))
    for i in range(len(alphas) - 1):
        x0, _ = predict(x, i)
        if clip is not None:
            x0 = clip(x0)
        notify(callback, i, x, x0)
        ratio = alphas[i] / alphas[i + 1]
        beta = sigmas[i] ** 2 - (ratio * sigmas[i + 1]) ** 2
        x = alphas[i + 1] * beta / sigmas[i] ** 2 * x0 + ratio * (sigmas[i + 1] / sigmas[i]) ** 2 * x
        if noise is not None and (final_noise or i < len(alphas) - 2):
            small = variance.startswith("fixed_small")
            std = posterior_std(alphas, sigmas, i).clamp(min=1e-10) if small else beta**0.5
            x = x + std * noise()
    return x


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Imagen's dynamic thresholding (Saharia et al. 2022): clip each image at its quantile, if above 1, and rescale."""
    edge = torch.quantile(x0.flatten(1).abs().float(), ratio, dim=1).clamp(min=1, max=max_value)
    edge = expand(edge, x0).to(x0.dtype)
    return torch.clamp(x0, -edge, edge) / edge


def flow_euler(
    velocity: Callable[[Tensor, int], Tensor],
    x: Tensor,
    sigmas: Tensor,
    *,
    stochastic: bool = False,
    noise: Draw | None = None,
    callback: Callback = None,
) -> Tensor:
    """Flow matching's Euler steps in sigma = t (Esser et al. 2024); stochastic: each step renoises its x0 estimate."""
    for i in range(len(sigmas) - 1):
        v = velocity(x, i)
        x0 = x - sigmas[i] * v
        notify(callback, i, x, x0)
        if stochastic and noise is not None:
            x = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * noise()
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x
