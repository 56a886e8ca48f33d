"""Zero-shot editing: every estimate of x0 is made to agree with what is known before it is noised again.

Song et al. 2023 (2303.01469), alg. 4 and app. D; openai/consistency_models@e32b69e (iterative_inpainting,
iterative_colorization, iterative_superres). The official code changes coefficients in an orthonormal basis; a
projection P says the same without one: x0 + P (known - x0). Images: (B, C, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser, no_denoiser
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Positive, Steps

from .function import RHO
from .sampling import LEVELS, Function, Levels, levels_of, multistep, spread

LUMA = (0.2989, 0.5870, 0.1140)
Projection = Callable[[Tensor], Tensor]


def keep(mask: Tensor) -> Projection:
    """Inpainting: pixels where mask (B or 1, C or 1, H, W) is 1."""
    return lambda x: x * mask


def grey(x: Tensor) -> Tensor:
    """Colorization: the part of the three channels along the luma vector."""
    q = torch.tensor(LUMA, dtype=x.dtype, device=x.device)
    q = q / q.norm()
    return torch.einsum("bchw,c,d->bdhw", x, q, q)


def coarse(patch: int = 8) -> Projection:
    """Super-resolution: means of patch x patch pixels. VgmError: the side does not divide."""

    def means(x: Tensor) -> Tensor:
        if x.shape[-1] % patch or x.shape[-2] % patch:
            raise VgmError(f"patches of {patch} do not divide {tuple(x.shape[2:])} pixels", code=USAGE)
        return F.interpolate(F.avg_pool2d(x, patch), scale_factor=patch, mode="nearest")

    return means


def edit(
    f: Function,
    known: Tensor,
    project: Projection,
    x: Tensor,
    ts: Sequence[float],
    noise: Callable[[], Tensor],
    grid: int = 40,
    levels: Levels = LEVELS,
) -> Tensor:
    """Images that agree with project(known). x: pure noise of level sigma_max; ts, noise, grid: see multistep."""

    def change(x0: Tensor) -> Tensor:
        x0 = x0.clamp(-1, 1)
        return x0 + project(known - x0)

    return multistep(f, x, ts, noise, grid, levels, change)


@dataclass(kw_only=True)
class ConsistencyEditing:
    """The same for `vgm restore`, with any operator A that has a pseudo-inverse: x0 + A^+ (y - A x0).

    steps, ts, grid: see ConsistencySampler. clip: estimates to [-1, 1] first, as officially. VgmError: an operator
    without a pseudo-inverse, or no measurement.
    """

    steps: Steps = 10
    ts: tuple[int, ...] | None = None
    grid: int = 40
    rho: Positive = RHO
    clip: bool = True

    def accepts(self, model: Any, codec: Any) -> str | None:
        """Consistency models, and any other diffusion or flow network; None, or why not."""
        return no_denoiser(model)

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        operator, y = request.operator, request.measurement
        if operator is None or y is None:
            raise VgmError(
                "consistency editing needs something to agree with", "vgm restore --method consistency-edit", USAGE
            )
        if not operator.has_pinv:
            raise VgmError(f"{operator.name} has no pseudo-inverse", "--method dps takes any operator", USAGE)
        levels, before = levels_of(view, self.rho), view.nfe
        steps = request.steps or self.steps
        grid = max(self.grid, steps + 1)

        residuals: list[Tensor] = []

        def change(x0: Tensor) -> Tensor:
            x0 = x0.clamp(-1, 1) if self.clip else x0
            missing = y - operator(x0)
            residuals.append(missing.flatten(1).norm(dim=1).float().cpu())
            return x0 + operator.pinv(missing)

        def f(x: Tensor, sigma: Tensor) -> Tensor:
            return view.denoise_ve(x, sigma, **request.cond)

        ts = self.ts if self.ts and request.steps is None and grid == self.grid else spread(steps, grid)
        x = multistep(f, request.randn() * levels[1], ts, request.randn, grid, levels, change, request.callback)
        request.info["nfe"], request.info["residual"] = view.nfe - before, residuals
        return x.float()
