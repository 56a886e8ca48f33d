"""log p(x) of a model with few latents by hybrid Monte Carlo (Kingma & Welling 2013, appendix D).

Half of a chain's draws from the posterior fit a Gaussian q(z), the other half estimate 1 / p(x) = E[q(z) / p(x, z)].
Reliable below about five latents only, as the paper says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import bounds

LogDensity = Callable[[Tensor], Tensor]


def leapfrog(log_density: LogDensity, z: Tensor, momentum: Tensor, step: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`steps` leapfrog steps of unit mass: z, momentum (B, D), step (B, 1)."""

    def force(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(log_density(z).sum(), z)[0]

    momentum = momentum + 0.5 * step * force(z)
    for i in range(steps):
        z = z + step * momentum
        momentum = momentum + (0.5 if i == steps - 1 else 1.0) * step * force(z)
    return z, momentum


@torch.no_grad()
def chain(
    log_density: LogDensity, z: Tensor, randn: Callable[[], Tensor], rand: Callable[[], Tensor], step: float = 0.1,
    steps: int = 10, adapt: int = 0, target: float = 0.9,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Endless states z (B, D) and acceptance (B,) of B independent chains.

    randn: momenta (B, D), called once per iteration, rand: (B,) uniform, called twice: steps are of 50 to 100 % of a
    chain's size, since equal ones would go round and round in a Gaussian. During the first `adapt` iterations every
    chain's step size grows by 2 % or shrinks by 2 % * target / (1 - target), towards accepting a share `target`.
    """
    size = z.new_full((len(z), 1), step)
    current = log_density(z)
    count = 0
    while True:
        momentum, shrink = randn(), 1 - 0.5 * rand()[:, None]
        proposed, end = leapfrog(log_density, z, momentum, shrink * size, steps)
        density = log_density(proposed)
        change = density - current - 0.5 * (end.square() - momentum.square()).sum(1)
        accept = rand().log() < change  # false where the integration diverged
        z = torch.where(accept[:, None], proposed, z)
        current = torch.where(accept, density, current)
        if count < adapt:
            down = 1 - 0.02 * target / (1 - target)
            size = size * torch.where(accept, 1.02, down)[:, None]
        count += 1
        yield z, accept


def log_px_by_hmc(
    log_px: LogDensity, z: Tensor, generators: list[torch.Generator], samples: int = 500, burn_in: int = 200,
    steps: int = 8,
) -> Tensor:  # fmt: skip
    """log p(x) of B items in nats, (B,). log_px(z): log p(x | z), (..., B, D) -> (..., B). generators: one per item.

    Chains start at z (B, D), the encoder's mean; 2 * `samples` states follow the burn-in, during which step sizes
    adapt.
    """

    def joint(z: Tensor) -> Tensor:
        return log_px(z) + bounds.log_normal(z)

    def randn() -> Tensor:
        return torch.stack([torch.randn(z.shape[1], generator=g) for g in generators]).to(z)

    def rand() -> Tensor:
        return torch.stack([torch.rand((), generator=g) for g in generators]).to(z)

    with torch.no_grad():
        states = chain(joint, z, randn, rand, steps=steps, adapt=burn_in)
        kept = [next(states)[0] for _ in range(burn_in + 2 * samples)][burn_in:]
        fit, rest = torch.stack(kept[:samples]).double(), torch.stack(kept[samples:])
        centred = fit - fit.mean(0)
        covariance = torch.einsum("lbi,lbj->bij", centred, centred) / (samples - 1)
        eye = torch.eye(z.shape[1], device=z.device)
        q = torch.distributions.MultivariateNormal(fit.mean(0), covariance + 1e-9 * eye)
        found = log_px(rest)
        terms = bounds.Terms(found.double(), bounds.log_normal(rest.double()), found, found[0])
        return bounds.from_posterior_samples(q.log_prob(rest.double()), terms)
