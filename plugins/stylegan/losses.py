"""Losses and regularisers of StyleGAN, as functions of networks, images and draws.

Karras et al. 2019 (arXiv 1812.04948), app. C, and 2020 (arXiv 1912.04958), sec. 3.2; Goodfellow et al. 2014;
Mescheder et al. 2018 (arXiv 1801.04406); Gulrajani et al. 2017 (arXiv 1704.00028). Official code:
NVlabs/stylegan@1e0d5c7 training/loss.py, NVlabs/stylegan2-ada-pytorch@d72cc7d training/loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Scores = Callable[[Tensor], Tensor]


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: -log sigmoid(D(fake)) of every score."""
    return F.softplus(-fake)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(real)) - log(1 - sigmoid(D(fake)))."""
    return F.softplus(-real) + F.softplus(fake)


def input_gradient(scores: Scores, x: Tensor) -> tuple[Tensor, Tensor]:
    """(scores of x, their gradient with respect to x, itself differentiable)."""
    x = x.detach().requires_grad_(True)
    out = scores(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out, gradient.float()


def r1_penalty(scores: Scores, real: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, squared norm of the gradient at every real image (B,)); the loss is gamma / 2 of its mean."""
    out, gradient = input_gradient(scores, real)
    return out, gradient.square().sum((1, 2, 3))


def gradient_penalty(scores: Scores, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """WGAN-GP: (|gradient| - 1)^2 at mix * real + (1 - mix) * fake, mix: (B, 1, 1, 1) in [0, 1) -> (B,)."""
    _, gradient = input_gradient(scores, torch.lerp(fake, real, mix))
    return (gradient.flatten(1).norm(dim=1) - 1).square()


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """|J^T y| of the map from ws (B, layers, w_dim) to images (B, C, H, W), y: noise, standard normal -> (B,).

    y is divided by sqrt(H W); squares are summed over w and averaged over layers.
    """
    h, w = images.shape[2:]
    (gradient,) = torch.autograd.grad((images * noise).sum() / math.sqrt(h * w), ws, create_graph=True)
    return gradient.float().square().sum(2).mean(1).sqrt()


def path_penalty(lengths: Tensor, mean: Tensor, decay: float = 0.01) -> tuple[Tensor, Tensor]:
    """(squared deviation of every length from their running mean, new mean); the mean moves first, with a gradient."""
    mean = torch.lerp(mean, lengths.mean(), decay)
    return (lengths - mean).square(), mean


def fade_reals(x: Tensor, lod: float) -> Tensor:
    """Real images at a level of detail of progressive growing, at full size: (B, C, H, W).

    Blurred to what the networks make: averaged to the level's side, between two levels cross-faded with the lower.
    """
    factor, before = 2 ** int(lod), lod - int(lod)
    x = F.avg_pool2d(x, factor) if factor > 1 else x
    if before > 0:
        x = torch.lerp(x, F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest"), before)
    return F.interpolate(x, scale_factor=factor, mode="nearest") if factor > 1 else x


def level_of_detail(images: float, top: float, train_kimg: float, fade_kimg: float) -> float:
    """Progressive growing after `images` real images: starts at lod `top`, trains a level for train_kimg thousand
    images, fades the next in for fade_kimg, until lod 0."""
    phase = (train_kimg + fade_kimg) * 1000
    if phase <= 0:
        return 0.0
    done = int(images // phase)
    lod = top - done
    if fade_kimg > 0:
        lod -= max(images - done * phase - train_kimg * 1000, 0.0) / (fade_kimg * 1000)
    return max(lod, 0.0)
