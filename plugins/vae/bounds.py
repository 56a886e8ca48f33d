"""Bounds and estimates of log p(x) for z ~ N(mu, exp(logvar)), as pure functions of the log-densities.

Kingma & Welling 2013 (arXiv 1312.6114): closed-form KL (appendix B), both SGVB estimators (eq. 6 and 7), the minibatch
estimate (eq. 8), the estimator of appendix D. Burda et al. 2015 (arXiv 1509.00519): importance-weighted bound.
Samples of z lie on a leading axis: L draws for B items are (L, B, D), their log-densities (L, B).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


class Terms(NamedTuple):
    """Log-densities of L posterior draws, (L, B) each, and the negative KL divergence (B,)."""

    log_px: Tensor
    log_prior: Tensor
    log_q: Tensor
    neg_kl: Tensor

    @property
    def log_w(self) -> Tensor:
        """log p(x, z) - log q(z | x): (L, B)."""
        return self.log_px + self.log_prior - self.log_q


def neg_kl_per_dim(mu: Tensor, logvar: Tensor) -> Tensor:
    """-KL(N(mu, exp(logvar)) || N(0, 1)) of every dimension, appendix B: like mu."""
    return 0.5 * (1 + logvar - mu.square() - logvar.exp())


def neg_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """(..., D) -> (...)."""
    return neg_kl_per_dim(mu, logvar).sum(-1)


def reparameterise(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + sigma eps: mu, logvar (B, D), eps (L, B, D) -> (L, B, D)."""
    return mu + torch.exp(0.5 * logvar) * eps


def log_normal(z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | None = None) -> Tensor:
    """log N(z; mu, exp(logvar)) summed over the last dimension; logvar None for unit variance."""
    if logvar is None:
        return -0.5 * (LOG_2PI + (z - mu).square()).sum(-1)
    return -0.5 * (LOG_2PI + logvar + (z - mu).square() * torch.exp(-logvar)).sum(-1)


def log_mean_exp(x: Tensor, dim: int = 0) -> Tensor:
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


def estimator_a(terms: Terms) -> Tensor:
    """Eq. 6, everything by sampling: (B,)."""
    return terms.log_w.mean(0)


def estimator_b(terms: Terms) -> Tensor:
    """Eq. 7, the KL divergence in closed form: (B,)."""
    return terms.neg_kl + terms.log_px.mean(0)


def importance_weighted(terms: Terms) -> Tensor:
    """log 1/L sum_l p(x, z_l) / q(z_l | x), the IWAE bound: (B,)."""
    return log_mean_exp(terms.log_w)


def iwae_surrogate(terms: Terms) -> Tensor:
    """sum_l w~_l log w_l with the normalised weights w~ held fixed: the gradient of the IWAE bound, not its value."""
    weights = torch.softmax(terms.log_w.detach(), 0)
    return (weights * terms.log_w).sum(0)


def minibatch(bound: Tensor, dataset_size: int) -> Tensor:
    """Eq. 8: the bound of the whole set estimated from a minibatch's (B,): ()."""
    return dataset_size / len(bound) * bound.sum()


def from_posterior_samples(log_density: Tensor, terms: Terms) -> Tensor:
    """Appendix D: log p(x) from draws of the true posterior, (B,).

    1 / p(x) is the posterior mean of q(z) / (p(z) p(x | z)) for any normalised q; log_density (L, B): log q of a
    density fitted to other posterior draws.
    """
    return -log_mean_exp(log_density - terms.log_prior - terms.log_px)
