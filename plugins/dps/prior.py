"""Any Gaussian network as what DPS samples from: a discrete variance-preserving chain of denoising steps.

A network of DDPM's discrete steps keeps its own betas, prediction and learned variance, so that the official code's
numbers come out; a learned variance that leaves its range (x0 networks do, by far) is clipped to it, unless
variance=learned_range is asked for. Every other network (flow matching, EDM, continuous VP) is asked for x0 at the
noise level of each step: x / sqrt(1 + s^2) of variance-exploding data at level s is the chain's x_t with
alpha-bar = 1 / (1 + s^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

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

QUANTILE = 0.95


def dynamic_threshold(x0: Tensor) -> Tensor:
    """x0 times the 0.95 quantile of its magnitude per item: the official code multiplies where Imagen divides."""
    return x0 * x0.abs().flatten(1).quantile(QUANTILE, dim=1).view(-1, *[1] * (x0.ndim - 1))


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


def prior_of(
    view: Any,
    steps: int | str,
    cond: dict[str, Tensor],
    clip: bool = True,
    threshold: bool = False,
    variance: Variance | None = None,
    keep: Callable[[int], list[int]] | None = None,
) -> Prior:
    """The prior that a view is. steps: N, "a,b,c" or "ddimN" of the original ones. keep: picks them from their number.

    VgmError: the view is no Denoiser.
    """
    if not isinstance(view, Denoiser):
        raise VgmError("restoring needs a diffusion or flow network", "train one, e.g. `vgm train dps`", USAGE)
    path = view.path
    if isinstance(path, DiscreteVPPath):
        betas = path.betas.cpu().numpy()
        count, own = len(betas), view.prediction in get_args(Mean)
        learned = view.learned_sigma and own

        mean: Mean = view.prediction if own else "x0"  # type: ignore[assignment]
        default: Variance = "learned_range" if learned else "fixed_small"
        usual: Variance = (view.variance if own else None) or default  # type: ignore[assignment]
        clipped = variance is None and usual == "learned_range"
        variance = variance or usual

        def model(x: Tensor, t: Tensor) -> Tensor:
            at = path.t_of_timestep(t)
            if not own:
                return view.predict(x, at, "x0", **cond)
            output = view.raw(x, at, **cond)
            if not learned or not clipped:
                return output
            prediction, values = view.split(output, x)
            assert values is not None
            return torch.cat([prediction, values.clamp(-1, 1)], dim=1)
    else:
        betas = named_betas("linear", 1000)
        levels = torch.from_numpy(DiscreteDiffusion(betas).tables["sqrt_recipm1_alphas_cumprod"])
        highest = level_range(path, *view.t_range())[1]
        count = int((levels <= highest * (1 + 1e-6)).sum())

        def model(x: Tensor, t: Tensor) -> Tensor:
            s = levels.to(x.device)[t]
            return view.denoise_ve(x * (1 + s**2).sqrt().to(x.dtype).view(-1, 1, 1, 1), s, **cond)

        mean, variance = "x0", variance or "fixed_small"
    kept = space_timesteps(count, steps) if keep is None else keep(count)
    assert variance is not None
    process = DiscreteDiffusion(betas, mean, variance, keep=kept)
    return Prior(process, model, clip, threshold)
