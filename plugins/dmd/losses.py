"""The formulas of DMD and DMD2 as pure functions; every draw is made by the caller.

Yin et al. 2024 (DMD, 2311.18828, eq. 7, 8; DMD2, 2405.14867). Behaviour of tianweiy/DMD2@8d8fa55
main/edm/edm_guidance.py and main/sd_guidance.py; `floor` and `scale` are those of NVlabs/FastGen@34f30e8
fastgen/methods/common_loss.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.diffusion.denoiser import KINDS, Denoiser
from vgm_cli.diffusion.objectives import target_of, weight_of
from vgm_cli.nn.shapes import expand


def dm_gradient(x: Tensor, real: Tensor, fake: Tensor, floor: float = 0.0, scale: Tensor | None = None) -> Tensor:
    """Direction in which generated images x leave the data: (fake - real) / (mean |x - real| + floor), per item.

    x: (B, ...) generated; real, fake: (B, ...) estimates of x0 by the teacher and by the fake score at the same x_t.
    scale: (B,) further weight; DMD's own (eq. 8) is alpha(t), see dmd_weight. Not-a-numbers become 0.
    """
    p_real, p_fake = x - real, x - fake
    size = p_real.abs().flatten(1).mean(1) + floor
    gradient = (p_real - p_fake) / expand(size, x)
    if scale is not None:
        gradient = gradient * expand(scale.to(x.dtype), x)
    return torch.nan_to_num(gradient)


def dm_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient in x is gradient / numel."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def score(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """grad log p(x_t) from an estimate of x0: (B, ...), alpha, sigma (B,)."""
    return -(x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t) ** 2


def dmd_weight(x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """DMD's w_t = sigma^2 / alpha * CS / |real - x|_1 (eq. 8), CS the number of elements: (B,).

    w_t alpha (s_fake - s_real) is dm_gradient with scale = alpha.
    """
    return sigma**2 / alpha / (real - x).abs().flatten(1).mean(1)


def fake_loss(
    view: Denoiser, x: Tensor, t: Tensor, noise: Tensor, weighting: str = "uniform", **cond: Tensor
) -> Tensor:
    """Denoising error of the fake score on generated x (B, ...), t (B,) host times: scalar.

    The error is of what the network predicts (eps of a DDPM, u of a flow, EDM's weighted x0 of F); weighting: see
    vgm_cli.diffusion.objectives.weight_of. Variance channels of a learned sigma are left alone.
    """
    t = t.double()
    x_t = view.path.add_noise(x, noise, t)
    kind = view.prediction if view.prediction in KINDS else "x0"
    error = (
        view.predict(x_t, t, kind, **cond).float() - target_of(kind, view.path, x, noise, t, view.sigma_data).float()
    )
    per_item = error.square().flatten(1).mean(1)
    weight = weight_of(weighting, view, t)
    return (per_item if weight is None else per_item * weight.float()).mean()


def generator_gan_loss(logits: Tensor) -> Tensor:
    """softplus(-logit) of generated images: scalar."""
    return F.softplus(-logits).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(fake) + softplus(-real), mean: scalar."""
    return (F.softplus(fake) + F.softplus(-real)).mean()
