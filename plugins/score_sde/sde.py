"""The SDEs of Song et al. 2021 (2011.13456), sec. 3 and app. B to D, as the official code discretises them.

Behaviour of yang-song/score_sde_pytorch@cb1f359 sde_lib.py. t runs from 0 (data) to 1 (noise); drift, diffusion and
marginals are those of the host's paths (vgm_cli/diffusion/path). Here are the rules of N steps, which are formulas of
their own and not the paths' values at t: the step that belongs to a time is its truncated index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from vgm_cli.diffusion.path import Path, SubVPPath, VEPath, VPPath
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import expand

Kind = Literal["ve", "vp", "subvp"]
Score = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t (B,)) -> grad log p_t(x) (B, ...)
EPS = 1e-5  # training and likelihoods leave out times below
LABELS = 999.0  # networks of continuous VP and sub-VP are told so many times t


@dataclass(frozen=True, kw_only=True)
class SDE:
    """dx = f(t) x dt + g(t) dw in N = `steps` steps. Images are x (B, ...), times t (B,) in [0, 1], float32 as
    officially: a time's index is its float32 product with N - 1, truncated."""

    kind: Kind = "vp"
    steps: int = 1000  # N
    sigma_min: float = 0.01  # of ve: noise at t = 0
    sigma_max: float = 50.0  # of ve: noise at t = 1
    beta_min: float = 0.1  # of vp and subvp: rate of noise at t = 0
    beta_max: float = 20.0  # of vp and subvp: rate of noise at t = 1

    @cached_property
    def path(self) -> Path:
        if self.kind == "ve":
            return VEPath(self.sigma_min, self.sigma_max)
        return {"vp": VPPath, "subvp": SubVPPath}[self.kind](self.beta_min, self.beta_max)

    @cached_property
    def sigmas(self) -> Tensor:
        """The ladder of ve, ascending: (N,) float64."""
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.linspace(*ends, self.steps, dtype=torch.float64).exp()

    @cached_property
    def betas(self) -> Tensor:
        """DDPM's of vp and subvp: (N,) float64. VgmError: so few steps that one would take more than everything."""
        if self.beta_max >= self.steps:
            text = f"{self.steps} steps of this process are too few: the last would take away more than there is"
            raise VgmError(text, f"more than {self.beta_max:g} steps, predictor=euler-maruyama, or an ODE", USAGE)
        return torch.linspace(self.beta_min / self.steps, self.beta_max / self.steps, self.steps, dtype=torch.float64)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(N,) float64."""
        return (1 - self.betas).cumprod(0)

    @property
    def prior_std(self) -> float:
        """Deviation of the noise that sampling starts from."""
        return self.sigma_max if self.kind == "ve" else 1.0

    # in continuous time

    def marginal(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation (B,) of x_t given x_0 = x."""
        t = t.double()
        return (expand(self.path.alpha(t), x) * x).to(x.dtype), self.path.sigma(t).to(x.dtype)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f(t) and g(t): (B,) float64 each."""
        t = t.double()
        return self.path.f(t), self.path.g2(t).sqrt()

    def prior_nats(self, z: Tensor) -> Tensor:
        """log density of the prior at z (B, ...): (B,)."""
        std, dim = self.prior_std, z[0].numel()
        return -dim * math.log(std * math.sqrt(2 * math.pi)) - z.flatten(1).square().sum(1) / (2 * std**2)

    # in N steps

    def index(self, t: Tensor) -> Tensor:
        """The steps (B,) int64 that times belong to."""
        return (t.float() * (self.steps - 1)).long()

    def at(self, table: Tensor, t: Tensor) -> Tensor:
        """Entries (B,) of a table (N,) at times."""
        return table.to(t.device)[self.index(t)]

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of ve: the ladder's level at times, and the next lower one, 0 below the first: (B,) each."""
        i = self.index(t)
        ladder = torch.cat([torch.zeros(1, dtype=torch.float64), self.sigmas]).to(t.device)
        return ladder[i + 1], ladder[i]

    def step(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, G) (B,) each of the forward step x + f x + G z: DDPM's of vp, SMLD's of ve, Euler's of subvp."""
        if self.kind == "ve":
            high, low = self.levels(t)
            return torch.zeros_like(high), (high**2 - low**2).sqrt()
        if self.kind == "vp":
            beta = self.at(self.betas, t)
            return (1 - beta).sqrt() - 1, beta.sqrt()
        f, g = self.coefficients(t)
        return f / self.steps, g / math.sqrt(self.steps)

    def reverse_step(self, x: Tensor, t: Tensor, score: Tensor, flow: bool = False) -> tuple[Tensor, Tensor]:
        """(f (B, ...), G (B,)) of the step back x - f + G z. score: (B, ...) at x. flow: of the ODE, without noise."""
        f, g = self.step(t)
        drift = (expand(f, x) * x).to(x.dtype) - (expand(g**2, x) * (0.5 if flow else 1.0)).to(x.dtype) * score
        return drift, torch.zeros_like(g) if flow else g

    def reverse_drift(self, x: Tensor, t: Tensor, score: Tensor, flow: bool = False) -> tuple[Tensor, Tensor]:
        """(drift (B, ...), diffusion (B,)) of the reverse-time SDE, or of the probability flow."""
        f, g = self.coefficients(t)
        drift = (expand(f, x) * x).to(x.dtype) - (expand(g**2, x) * (0.5 if flow else 1.0)).to(x.dtype) * score
        return drift, torch.zeros_like(g) if flow else g

    # what networks are told

    def labels(self, t: Tensor, continuous: bool) -> Tensor:
        """What a network of these data is told at times t: (B,) float32, or int64 entries of ve's descending ladder."""
        if self.kind == "ve":
            if continuous:
                return self.path.sigma(t.double()).float()
            return ((1 - t.float()) * (self.steps - 1)).round().long()
        return t.float() * (LABELS if continuous else self.steps - 1)

    def score(self, output: Tensor, t: Tensor, continuous: bool) -> Tensor:
        """The score that a network's output (B, ...) at times t means: itself of ve, else -output / std."""
        if self.kind == "ve":
            return output
        if continuous:
            std = self.path.sigma(t.double())
        else:
            table = (1 - self.alphas_cumprod).sqrt().to(t.device)
            std = table[self.labels(t, continuous).long()]
        return -output / expand(std, output).to(output.dtype)
