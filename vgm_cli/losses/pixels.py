"""What a decoder says about pixels: Bernoulli, Gaussian and discretised logistic likelihoods.

Kingma & Welling 2013 (arXiv 1312.6114) appendix C; the discretised logistic is Kingma et al. 2016 (arXiv 1606.04934,
appendix A). Pixels are x in [0, 1], levels k / 255; log-probabilities are sums over an item's dimensions, never means.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import unknown

LEVELS = 255
MIN_LOG_SCALE = -7 - math.log(2)  # PixelCNN++'s floor for pixels in [-1, 1]: constant pixels drive the scale to zero


def log_sum(terms: Tensor, event_dims: int) -> Tensor:
    """Sum over the last `event_dims` dimensions."""
    return terms.flatten(-event_dims).sum(-1)


class Likelihood(Protocol):
    """heads: outputs of the decoder per pixel. h and s: (..., C, H, W), s None with one head; x broadcasts against
    them.

    continuous: log_prob is a density, so that an 8-bit image has to be dequantised. s_per_log_scale: s over the
    logarithm of the distribution's scale.
    """

    heads: int
    continuous: bool
    s_per_log_scale: float

    def log_prob(self, x: Tensor, h: Tensor, s: Tensor | None) -> Tensor: ...

    def mean(self, h: Tensor) -> Tensor: ...

    def sample(self, h: Tensor, s: Tensor | None, u: Tensor) -> Tensor: ...


class Bernoulli:
    """h are logits; x may be a probability, then log_prob is the expectation over binary pixels drawn from it."""

    heads, continuous, s_per_log_scale = 1, False, 0.0

    def log_prob(self, x: Tensor, h: Tensor, s: Tensor | None = None) -> Tensor:
        return log_sum(x * h - F.softplus(h), 3)

    def mean(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h)

    def sample(self, h: Tensor, s: Tensor | None, u: Tensor) -> Tensor:
        """u: uniform draws like h."""
        return (u < torch.sigmoid(h)).to(h.dtype)


class Gaussian:
    """N(mean, exp(s)): s is the log-variance. squash: the mean is the sigmoid of h (the paper's Frey faces), else h."""

    heads, continuous, s_per_log_scale = 2, True, 2.0

    def __init__(self, squash: bool = True):
        self.squash = squash

    def mean(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h) if self.squash else h

    def log_prob(self, x: Tensor, h: Tensor, s: Tensor | None) -> Tensor:
        assert s is not None
        return log_sum(-0.5 * (math.log(2 * math.pi) + s + (x - self.mean(h)).square() * torch.exp(-s)), 3)

    def sample(self, h: Tensor, s: Tensor | None, u: Tensor) -> Tensor:
        assert s is not None
        eps = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).to(h.dtype)
        return (self.mean(h) + torch.exp(0.5 * s) * eps).clamp(0, 1)


class DiscretisedLogistic:
    """A logistic distribution rounded to the levels k / 255, its tails given to 0 and 255; s is the log-scale, not
    below MIN_LOG_SCALE."""

    heads, continuous, s_per_log_scale = 2, False, 1.0

    def __init__(self, squash: bool = True):
        self.squash = squash

    def mean(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h) if self.squash else h

    def log_prob(self, x: Tensor, h: Tensor, s: Tensor | None) -> Tensor:
        assert s is not None
        centred, inverse = x - self.mean(h), torch.exp(-s.clamp(min=MIN_LOG_SCALE))
        upper, lower = (centred + 0.5 / LEVELS) * inverse, (centred - 0.5 / LEVELS) * inverse
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no cancellation however narrow the bin
        width = torch.log(-torch.expm1(-inverse / LEVELS))
        above, below = F.logsigmoid(upper), F.logsigmoid(-lower)
        inside = above + below + width
        first, last = x < 0.5 / LEVELS, x > 1 - 0.5 / LEVELS
        return log_sum(torch.where(first, above, torch.where(last, below, inside)), 3)

    def sample(self, h: Tensor, s: Tensor | None, u: Tensor) -> Tensor:
        assert s is not None
        x = self.mean(h) + torch.exp(s.clamp(min=MIN_LOG_SCALE)) * torch.logit(u.clamp(1e-6, 1 - 1e-6))
        return (x * LEVELS).round().clamp(0, LEVELS) / LEVELS


LIKELIHOODS = ("bernoulli", "gaussian", "discretised-logistic")


def make_likelihood(name: str, squash: bool) -> Likelihood:
    if name == "bernoulli":
        return Bernoulli()
    if name == "gaussian":
        return Gaussian(squash)
    if name == "discretised-logistic":
        return DiscretisedLogistic(squash)
    raise unknown("likelihood", name, LIKELIHOODS)
