"""Any Gaussian network as what DPS samples from: a discrete variance-preserving chain of denoising steps.

A network of DDPM's discrete steps keeps its own betas, prediction and learned variance, so that the official code's
numbers come out; a learned variance that leaves its range (x0 networks do, by far) is clipped to it, unless
variance=learned_range is asked for. Every other network (flow matching, EDM, continuous VP) is asked for x0 at the
noise level of each step: x / sqrt(1 + s^2) of variance-exploding data at level s is the chain's x_t with
alpha-bar = 1 / (1 + s^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.discrete import (
    DiscreteDiffusion,
    Mean,
    Network,
    Posterior,
    Variance,
    named_betas,
    space_timesteps,
)
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.diffusion.timesteps import level_range
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import expand

QUANTILE = 0.95
UNCLIPPED = 160.0  # level above which x0 = (x - sigma eps) / alpha of latents, which nothing clips, is mostly error


def dynamic_threshold(x0: Tensor) -> Tensor:
    """x0 times the 0.95 quantile of its magnitude per item: the official code multiplies where Imagen divides."""
    return x0 * expand(x0.abs().flatten(1).quantile(QUANTILE, dim=1), x0)


class Prior:
    """A network and the chain it is walked along.

    model(x, t) gives the chain's prediction at the original timestep t. clip: x0 to [-1, 1]. threshold: dynamic, before
    the clip.
    """

    def __init__(self, process: DiscreteDiffusion, model: Network, clip: bool = True, threshold: bool = False):
        self.process, self.model, self.clip = process, model, clip
        self.denoised_fn = dynamic_threshold if threshold else None

    @property
    def steps(self) -> int:
        return self.process.steps

    def index(self, x: Tensor, i: int) -> Tensor:
        return torch.full((len(x),), i, device=x.device)

    def posterior(self, x: Tensor, i: int) -> Posterior:
        """p(x_{i-1} | x_i) with the x0 it is made of; x: (B, C, H, W)."""
        t = self.index(x, i)
        output = self.model(x, self.process.model_timesteps(t))
        return self.process.p_mean_variance(output, x, t, self.clip, self.denoised_fn)

    def x0(self, x: Tensor, i: int) -> Tensor:
        return self.posterior(x, i).x0

    def alpha_bar(self, i: int) -> float:
        """Of step i; 1 before the first (i = -1)."""
        return float(self.process.tables["alphas_cumprod"][i]) if i >= 0 else 1.0

    def level(self, i: int) -> float:
        """sigma / alpha of step i."""
        return ((1 - self.alpha_bar(i)) / self.alpha_bar(i)) ** 0.5


Chain = tuple[np.ndarray, Mean, Variance, float, Network]  # betas, prediction, variance, highest level, model


def own_chain(view: Denoiser, path: DiscreteVPPath, cond: dict[str, Tensor], variance: Variance | None) -> Chain:
    """The chain that a network of discrete steps was trained on."""
    raw = view.prediction in get_args(Mean)
    mean: Mean = view.prediction if raw else "x0"  # type: ignore[assignment]
    learned = view.learned_sigma and raw
    usual: Variance = (view.variance if raw else None) or ("learned_range" if learned else "fixed_small")  # type: ignore[assignment]
    used = variance or usual

    def model(x: Tensor, t: Tensor) -> Tensor:
        at = path.t_of_timestep(t)
        if not raw:
            return view.predict(x, at, "x0", **cond)
        prediction, values = view.split(view.raw(x, at, **cond), x)
        if values is None or not used.startswith("learned"):
            return prediction
        in_range = values.clamp(-1, 1) if variance is None and used == "learned_range" else values
        return torch.cat([prediction, in_range], dim=1)

    return path.betas.cpu().numpy(), mean, used, math.inf, model


def matched_chain(view: Denoiser, cond: dict[str, Tensor], variance: Variance | None) -> Chain:
    """DDPM's chain, on which a network of any path is asked at the noise level of each step."""
    betas = named_betas("linear", 1000)
    levels = torch.from_numpy(DiscreteDiffusion(betas).tables["sqrt_recipm1_alphas_cumprod"])

    def model(x: Tensor, t: Tensor) -> Tensor:
        s = levels.to(x.device)[t]
        return view.denoise_ve(x * (1 + s**2).sqrt().to(x.dtype).view(-1, 1, 1, 1), s, **cond)

    return betas, "x0", variance or "fixed_small", level_range(view.path, *view.t_range())[1], model


def prior_of(
    view: Any,
    steps: int | str,
    cond: dict[str, Tensor],
    clip: bool = True,
    threshold: bool = False,
    variance: Variance | None = None,
    highest: float = math.inf,
    space: Callable[[int, Any], list[int]] = space_timesteps,
) -> Prior:
    """The prior that a view is. steps: N, "a,b,c" or "ddimN" of the original ones. variance: None for the usual one.

    highest: noise level (sigma / alpha) that the chain starts below. space: picks `steps` of so many. VgmError: the
    view is no Denoiser.
    """
    if not isinstance(view, Denoiser):
        raise VgmError("restoring needs a diffusion or flow network", "train one, e.g. `vgm train dps`", USAGE)
    if isinstance(view.path, DiscreteVPPath):
        betas, mean, variance, top, model = own_chain(view, view.path, cond, variance)
    else:
        betas, mean, variance, top, model = matched_chain(view, cond, variance)
    levels = DiscreteDiffusion(betas).tables["sqrt_recipm1_alphas_cumprod"]
    count = int((levels <= min(top, highest) * (1 + 1e-6)).sum())
    if isinstance(steps, int) and count < steps <= len(betas):
        steps = count  # all there are below the highest level
    process = DiscreteDiffusion(betas, mean, variance, keep=space(count, steps))
    return Prior(process, model, clip, threshold)
