"""What the variational bound of a discrete process is made of (Ho et al. 2020; Nichol & Dhariwal 2021, eq. 4-7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, elementwise with broadcasting."""
    logvar2 = torch.as_tensor(logvar2, dtype=logvar1.dtype, device=logvar1.device)
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """log p of 8-bit values scaled to [-1, 1] under a Gaussian integrated over each value's bin, in nats, like x.

    The outermost bins reach to infinity; probabilities are floored at 1e-12.
    """
    centered, inv_std = x - means, torch.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_std * (centered + 1.0 / 255.0))
    cdf_min = approx_standard_normal_cdf(inv_std * (centered - 1.0 / 255.0))
    log_plus = cdf_plus.clamp(min=1e-12).log()
    log_rest = (1.0 - cdf_min).clamp(min=1e-12).log()
    log_bin = (cdf_plus - cdf_min).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_plus, torch.where(x > 0.999, log_rest, log_bin))


def mean_flat(x: Tensor) -> Tensor:
    """Mean over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def bound_term(
    x0: Tensor, t: Tensor, true_mean: Tensor, true_log_variance: Tensor, mean: Tensor, log_variance: Tensor
) -> Tensor:
    """One term of the variational bound in bits per dimension: (B,).

    x0: (B, ...). t: (B,) indices. true_*: of q(x_{t-1} | x_t, x0); mean, log_variance: of p(x_{t-1} | x_t). It is the
    KL divergence between them for t > 0, and the decoder's negative log-likelihood of x0 at t = 0.
    """
    kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance)) / math.log(2.0)
    log_scales = (0.5 * log_variance).expand_as(x0)
    decoder = -mean_flat(discretized_gaussian_log_likelihood(x0, mean, log_scales)) / math.log(2.0)
    return torch.where(t == 0, decoder, kl)
