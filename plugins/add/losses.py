"""The formulas of adversarial diffusion distillation as pure functions; every draw is made by the caller.

Sauer et al. 2023 (2311.17042), eq. 1 to 6; noise-free score distillation: Katzir et al. 2023 (2310.17590). There is no
official code: what the paper leaves open, and the choices made here, are listed in docs/papers/add.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.diffusion.path import DiscreteVPPath, Path
from vgm_cli.nn.shapes import along, expand

Weighting = Literal["exponential", "sds", "nfsd"]
Reduction = Literal["mean", "sum"]

# -- adversarial -------------------------------------------------------------------------------------------------------


def hinge_losses(real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The discriminator's two terms, E max(0, 1 - logit) of real and E max(0, 1 + logit) of generated images, each
    summed over the heads. real, fake: logits of every head, of any shape."""
    of_real = [F.relu(1.0 - logits).mean() for logits in real]
    of_fake = [F.relu(1.0 + logits).mean() for logits in fake]
    return torch.stack(of_real).sum(), torch.stack(of_fake).sum()


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """-E logit, summed over the heads: scalar."""
    return -torch.stack([logits.mean() for logits in fake]).sum()


def feature_penalty(logits: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """R1 on what the heads see: |d sum(logits) / d features|^2 (summed over an image's values, averaged over the B
    images), summed over the heads: scalar, differentiable in the heads' weights.

    features: (B, ...) of every head, which require gradients; logits: what the heads made of them.
    """
    total = torch.stack([x.sum() for x in logits]).sum()
    gradients = torch.autograd.grad(total, list(features), create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1).mean() for g in gradients]).sum()


# -- the student's inputs ----------------------------------------------------------------------------------------------


def student_levels(student: FlowMap, s: Tensor, pure: bool = True) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the student's inputs at host times s (B,): (B,) float64 each.

    pure: at the noisiest time there is nothing of the image (zero terminal signal-to-noise ratio), whatever the path
    leaves of it there; the noise then has the deviation that noise and an image of unit variance would have.
    """
    s = s.double()
    alpha, sigma = student.path.alpha(s), student.path.sigma(s)
    if not pure:
        return alpha, sigma
    last = s >= student.t_range()[1]
    return torch.where(last, 0.0, alpha), torch.where(last, (alpha**2 + sigma**2).sqrt(), sigma)


def student_input(student: FlowMap, x0: Tensor, noise: Tensor, s: Tensor, pure: bool = True) -> Tensor:
    """x_s = alpha_s x0 + sigma_s noise (B, ...), see student_levels."""
    alpha, sigma = student_levels(student, s, pure)
    return (expand(alpha, x0) * x0 + expand(sigma, x0) * noise).to(x0.dtype)


# -- distillation ------------------------------------------------------------------------------------------------------


def preserving(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the variance-preserving path at the noise level that `path` has at t (B,): the path's own where
    it is one, so that weights depend on the noise level alone."""
    alpha, sigma = path.alpha(t.double()), path.sigma(t.double())
    norm = (alpha**2 + sigma**2).sqrt()
    return alpha / norm, sigma / norm


def target_weight(weighting: Weighting, alpha: Tensor, sigma: Tensor) -> Tensor:
    """c(t) (B,) of variance-preserving levels (B,): alpha, or with sds alpha sigma / 2, which makes the gradient that
    of score distillation with w(t) = sigma^2."""
    return alpha if weighting == "exponential" else 0.5 * alpha * sigma


def distance(a: Tensor, b: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared distance of every item of a and b (B, ...), summed over its values or their mean: (B,)."""
    squares = (a - b).square().flatten(1)
    return squares.mean(1) if reduction == "mean" else squares.sum(1)


def teacher_target(teacher: Denoiser, x_t: Tensor, t: Tensor, steps: int = 1, **cond: Tensor) -> Tensor:
    """The teacher's x0 (B, ...) from x_t at host times t (B,): one estimate, or `steps` DDIM steps at times that divide
    the way from t to data evenly. No gradients."""
    path = teacher.path
    with torch.no_grad():
        now = t.double()
        for left in range(steps - 1, 0, -1):
            x0, eps = teacher.predict_both(x_t, now, **cond)
            now = path.t_min + (t.double() - path.t_min) * (left / steps)
            if isinstance(path, DiscreteVPPath):
                now = path.t_of_timestep(path.timestep(now).round())
            x_t = along(path.alpha(now), x0) * x0 + along(path.sigma(now), x0) * eps
        return teacher.predict(x_t, now, "x0", **cond)


def nfsd_gradient(
    cond: Tensor,  # the teacher's eps (B, ...) with the condition
    null: Tensor,  # without one
    negative: Tensor,  # with the negative prompt
    low: Tensor,  # (B,) bool: the noise is so weak that the estimate without a condition is itself the direction
    weight: Tensor,  # w(t), (B,)
    scale: float = 7.5,  # of the condition's direction
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of noise-free score distillation with respect to the student's image, w(t) (delta_D + scale
    delta_C), and both directions: (B, ...) each. The noise that was added does not appear in it, which is the
    difference to score distillation."""
    delta_c = cond - null
    delta_d = torch.where(expand(low, null), null, null - negative)
    return along(weight, null) * (delta_d + scale * delta_c), delta_d, delta_c


def surrogate(gradient: Tensor, x: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Items' losses (B,) whose gradient in x (B, ...) is `gradient`, with "mean" divided by the number of values."""
    products = (gradient.detach() * x).flatten(1)
    return products.mean(1) if reduction == "mean" else products.sum(1)
