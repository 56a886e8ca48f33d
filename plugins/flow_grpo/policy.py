"""The denoising step as a Gaussian policy, roll-outs of it, and the loss on them. Pure functions.

Flow time: sigma = 1 noise, 0 data, x = (1 - sigma) x0 + sigma eps, v = eps - x0. Liu et al. 2025, section 4;
yifan123/flow_grpo@ac4c86e flow_grpo/diffusers_patch/sd3_sde_with_logprob.py and scripts/train_sd3.py. All in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.diffusion.timesteps import flow_sigmas

Kind = Literal["sde", "cps"]


class Transition(NamedTuple):
    """p(x' | x) = N(mean, scale^2). mean: (B, ...); std: the diffusion coefficient, in which the KL is measured; scale:
    the standard deviation of x', std sqrt(-dt) of an SDE step. std, scale: (B, 1, ...)."""

    mean: Tensor
    std: Tensor
    scale: Tensor


def levels(steps: int, shift: float = 3.0) -> Tensor:
    """(steps + 1,) float32 from 1 to 0: the grid of SD3's scheduler, whose last step is tiny."""
    return F.pad(torch.from_numpy(flow_sigmas(steps, shift=shift)).float(), (0, 1))


def transition(
    x: Tensor, v: Tensor, sigmas: Tensor, index: Tensor, noise_level: float, kind: Kind = "sde"
) -> Transition:
    """One step down from sigmas[index]. x, v: (B, ...); sigmas: (steps + 1,); index: (B,) int64.

    sde: dx = (v + std^2 / (2 sigma) (x + (1 - sigma) v)) dt + std dW with std = noise_level sqrt(sigma / (1 - sigma)),
    where sigmas[1] stands in for a sigma of 1 in the denominator. cps: coefficients-preserving sampling (2509.05952),
    std = sigma' sin(noise_level pi / 2). A noise level of 0 is the ODE's Euler step for both.
    """
    x, v = promote(x), promote(v)
    sigmas = sigmas.to(x)
    column = (-1, *[1] * (x.ndim - 1))
    sigma, following = sigmas[index].view(column), sigmas[index + 1].view(column)
    if kind == "cps":
        std = following * math.sin(noise_level * math.pi / 2)
        x0, noise = x - sigma * v, x + (1 - sigma) * v
        return Transition(x0 * (1 - following) + noise * (following**2 - std**2).sqrt(), std, std)
    dt = following - sigma
    std = (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt() * noise_level
    pull = std**2 / (2 * sigma)
    return Transition(x * (1 + pull * dt) + v * (1 + pull * (1 - sigma)) * dt, std, std * (-dt).sqrt())


def log_prob(x_next: Tensor, step: Transition, kind: Kind = "sde") -> Tensor:
    """Log-density of x_next (B, ...), averaged over its elements, not summed: (B,). cps: without the constants."""
    square = (promote(x_next).detach() - step.mean) ** 2
    if kind == "cps":
        return -square.flatten(1).mean(1)
    density = -square / (2 * step.scale**2) - step.scale.log() - math.log(math.sqrt(2 * math.pi))
    return density.flatten(1).mean(1)


def promote(x: Tensor) -> Tensor:
    """float32 at least: half precision overflows in the mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- roll-outs -------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """latents: steps + 1 of (B, ...), noise first; log_probs: {step: (B,)} of the steps that were noisy."""

    latents: list[Tensor]
    log_probs: dict[int, Tensor]


@torch.no_grad()
def roll_out(
    velocity: Callable[[Tensor, int], Tensor],
    x: Tensor,
    sigmas: Tensor,
    noise_level: float,
    noisy: Sequence[int],
    draw: Callable[[int], Tensor],
    kind: Kind = "sde",
) -> Rollout:
    """Sample from noise x (B, ...) to data, keeping every state and the log-probability of every noisy step.

    velocity(x, i): (B, ...) at level sigmas[i]. noisy: numbers of the steps that follow the SDE; the others follow the
    ODE. draw(i): standard normal (B, ...) of step i.
    """
    latents, log_probs = [x], {}
    for i in range(len(sigmas) - 1):
        index = torch.full((len(x),), i, device=x.device)
        step = transition(x, velocity(x, i), sigmas, index, noise_level if i in noisy else 0.0, kind)
        x = step.mean
        if i in noisy:
            x = x + step.scale * draw(i)
            log_probs[i] = log_prob(x, step, kind)
        latents.append(x)
    return Rollout(latents, log_probs)


# -- the loss --------------------------------------------------------------------------------------------------------


def policy_loss(
    log_p: Tensor, old: Tensor, advantage: Tensor, clip_range: float, advantage_clip: float = 5.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate -min(A r, A clip(r)) and what to log. log_p, old, advantage: (B,)."""
    advantage = advantage.clamp(-advantage_clip, advantage_clip)
    ratio = (log_p - old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
    outside = (ratio.detach() - 1).abs() > clip_range
    logs = {
        "policy_loss": loss.detach(),
        "ratio": ratio.detach().mean(),
        "approx_kl": 0.5 * (log_p - old).detach().square().mean(),
        "clip_fraction": outside.float().mean(),
    }
    return loss, logs


def kl_to(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """Mean of (mean - reference)^2 / (2 std^2) over elements: mean, reference (B, ...), std (B, 1, ...) -> (B,). As in
    the official code, std is the diffusion coefficient, without the step's sqrt(-dt)."""
    return (mean - reference).square().flatten(1).mean(1) / (2 * std.flatten(1)[:, 0] ** 2)
