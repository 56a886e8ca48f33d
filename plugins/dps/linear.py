"""DDRM, PiGDM and DiffPIR: restoration of linear degradations through the operator's SVD or its regularised inverse.

Kawar et al. 2022 (DDRM, 2201.11793), Song et al. 2023 (PiGDM, ICLR), Zhu et al. 2023 (DiffPIR, 2305.08995), whose
formulas are written here in the prior's variance-preserving chain; weights and step sequences as in
NVlabs/RED-diff@cdf18c9 algos/ and yuanzhi-zhu/DiffPIR@13c3c76. Deviation: every walk starts from pure noise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.ranges import NonNegative, Positive, Steps

from .conditioning import distance
from .prior import Prior
from .sampler import Restorer, Walk, finish, need_pinv


def split_variance(s: Tensor, level: float, sigma_y: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors like s, per singular direction: the noise-to-signal ratio sigma_y / s; whether it is measured at
    all (s > 0); whether the measurement is less noisy than the state at noise `level`."""
    seen = s > 0
    nsr = torch.where(seen, sigma_y / s.clamp(min=1e-30), torch.inf)
    return nsr, seen, seen & (level >= nsr)


def ddrm_start(ybar: Tensor, s: Tensor, level: float, sigma_y: float, z: Tensor) -> Tensor:
    """DDRM eq. 6 in variance-exploding units: coefficients at the highest level. z: standard normal coefficients."""
    nsr, _, better = split_variance(s, level, sigma_y)
    return torch.where(better, ybar + (level**2 - torch.where(better, nsr, 0) ** 2).sqrt() * z, level * z)


def ddrm_step(
    xbar: Tensor,
    xbar0: Tensor,
    ybar: Tensor,
    s: Tensor,
    level: float,
    level_next: float,
    sigma_y: float,
    z: Tensor,
    eta: float = 0.85,
    etab: float = 1.0,
) -> Tensor:
    """DDRM eq. 7-8: coefficients at level_next from those at level. xbar0: of the denoised estimate at `level`."""
    nsr, seen, better = split_variance(s, level_next, sigma_y)
    keep = math.sqrt(1 - eta**2)
    hidden = xbar0 + keep * level_next * (xbar - xbar0) / level + eta * level_next * z
    finite = torch.where(seen & (nsr > 0), nsr, 1)
    worse = xbar0 + keep * level_next * (ybar - xbar0) / finite + eta * level_next * z
    spread = (level_next**2 - (etab * torch.where(better, nsr, 0)) ** 2).clamp(min=0).sqrt()
    known = (1 - etab) * xbar0 + etab * ybar + spread * z
    return torch.where(better, known, torch.where(seen, worse, hidden))


class DDRM(Restorer):
    """Denoising diffusion restoration models: every singular direction of A is sampled at its own noise level.

    eta: share of fresh noise where nothing is measured, etab: weight of the measurement where it is good.
    cutoff: singular values below this share of the largest count as unmeasured.
    """

    name = "ddrm"

    def __init__(
        self,
        steps: Steps | str = 20,
        eta: NonNegative = 0.85,
        etab: NonNegative = 1.0,
        cutoff: NonNegative = 1e-3,
        clip: bool | None = None,
    ):
        super().__init__(steps, clip)
        if not (0 <= eta <= 1 and 0 <= etab <= 1):
            raise VgmError(f"eta={eta}, etab={etab} lie between 0 and 1", "the paper's: eta=0.85 etab=1", USAGE)
        self.eta, self.etab, self.cutoff = eta, etab, cutoff

    def check(self, operator: Operator) -> None:
        if not operator.linear:
            hint = "--method dps, or a prior of pixels" if operator.latent else "--method dps"
            raise VgmError(f"ddrm decomposes linear degradations, {operator.name} is not linear", hint, USAGE)

    def restore(self, view: Any, request: Request, operator: Operator, y: Tensor) -> Tensor:
        prior = self.prior(view, request, operator)
        return finish(view, request, prior.steps, self.states(prior, request, operator, y))

    def states(self, prior: Prior, request: Request, operator: Operator, y: Tensor) -> Walk:
        svd, sigma_y, top = operator.svd, operator.noise.sigma, prior.steps - 1
        s = svd.singular.to(y)
        s = torch.where(s > self.cutoff * s.max(), s, 0)
        ybar = torch.where(s > 0, svd.Ut(y) / s.clamp(min=1e-30), 0)
        level = prior.level(top)
        xbar = ddrm_start(ybar, s, level, sigma_y, svd.Vt(request.randn()))
        for i in reversed(range(prior.steps)):
            level, level_next = prior.level(i), prior.level(i - 1)
            x0 = prior.x0(svd.V(xbar) * math.sqrt(prior.alpha_bar(i)), i)
            z = svd.Vt(request.randn())
            xbar = ddrm_step(xbar, svd.Vt(x0), ybar, s, level, level_next, sigma_y, z, self.eta, self.etab)
            yield svd.V(xbar) * math.sqrt(prior.alpha_bar(i - 1)), x0, distance(operator, x0, y)


class PiGDM(Restorer):
    """Pseudoinverse guidance: the measurement's score under x0 ~ N(estimate, r^2) moves the x0 of each DDIM step.

    g = (A^T (A A^T + sigma_y^2 / r^2)^-1 (y - A x0))^T d x0 / d x_t with r^2 = 1 - alpha-bar, weighted by
    sqrt(alpha-bar); without noise the inverse becomes A^+, so degradations that only have a pseudo-inverse (jpeg) work
    too. eta: DDIM's share of noise.
    """

    name = "pigdm"

    def __init__(self, steps: Steps | str = 100, eta: NonNegative = 1.0, clip: bool | None = None):
        super().__init__(steps, clip)
        self.eta = eta

    def check(self, operator: Operator) -> None:
        need_pinv(operator, self.name)

    def restore(self, view: Any, request: Request, operator: Operator, y: Tensor) -> Tensor:
        prior = self.prior(view, request, operator)
        return finish(view, request, prior.steps, self.states(prior, request, operator, y))

    def residual(self, operator: Operator, x0: Tensor, y: Tensor, r2: float) -> Tensor:
        """A^T (A A^T + sigma_y^2 / r2)^-1 (y - A x0), or A^+ y - A^+ A x0."""
        if not operator.linear:
            return operator.pinv(y) - operator.pinv(operator(x0))
        return operator.ridge(y - operator(x0), operator.noise.sigma**2 / r2)

    def states(self, prior: Prior, request: Request, operator: Operator, y: Tensor) -> Walk:
        x = request.randn()
        for i in reversed(range(prior.steps)):
            now, later = prior.alpha_bar(i), prior.alpha_bar(i - 1)
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                x0 = prior.x0(x, i)
                with torch.no_grad():
                    pull = self.residual(operator, x0.detach(), y, 1 - now)
                g = torch.autograd.grad((pull * x0).sum(), x)[0]
            x, x0 = x.detach(), x0.detach()
            eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
            c1 = self.eta * math.sqrt((1 - now / later) * (1 - later) / (1 - now))
            c2 = math.sqrt(max(1 - later - c1**2, 0))
            x = math.sqrt(later) * (x0 + math.sqrt(now) * g) + c1 * request.randn() + c2 * eps
            yield x, x0, distance(operator, x0, y)


def quadratic_steps(count: int, steps: int) -> list[int]:
    """DiffPIR's subsequence, floor(sqrt of `steps` numbers from 0 to count^2) counted from noise: denser near data."""
    at = np.sqrt(np.linspace(0, count**2, steps)).astype(int)
    return sorted({count - 1 - min(int(i), count - 1) for i in at})


class DiffPIR(Restorer):
    """Plug-and-play: each estimate of x0 is pulled to the measurement in closed form, then noised again.

    lam: weight of the prior (3 to 25); the noise it is multiplied with is measured on [0, 1], as in the official code.
    zeta: share of fresh noise. Latents take the closed form between the codec's decoder and encoder.
    """

    name = "diffpir"

    def __init__(self, steps: Steps = 100, lam: Positive = 7.0, zeta: NonNegative = 0.1, clip: bool | None = None):
        super().__init__(steps, clip)
        if not 0 <= zeta <= 1:
            raise VgmError(f"zeta={zeta} lies between 0 and 1", "the paper's: zeta=0.1", USAGE)
        self.lam, self.zeta = lam, zeta

    def check(self, operator: Operator) -> None:
        inner = getattr(operator, "inner", operator)
        if not inner.linear:
            raise VgmError(f"diffpir solves linear degradations, {inner.name} is not linear", "--method dps", USAGE)

    def restore(self, view: Any, request: Request, operator: Operator, y: Tensor) -> Tensor:
        prior = self.prior(view, request, operator, space=quadratic_steps)
        return finish(view, request, prior.steps, self.states(prior, request, operator, y))

    def states(self, prior: Prior, request: Request, operator: Operator, y: Tensor) -> Walk:
        sigma_y = max(operator.noise.sigma / 2, 1e-3)  # noiseless measurements are trusted, not infinitely
        x = request.randn()
        for i in reversed(range(prior.steps)):
            now, later = prior.alpha_bar(i), prior.alpha_bar(i - 1)
            estimate = prior.x0(x, i)
            x0 = operator.prox(estimate, y, self.lam * sigma_y**2 / prior.level(i) ** 2)
            eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
            fresh = math.sqrt(1 - self.zeta) * eps + math.sqrt(self.zeta) * request.randn()
            x = math.sqrt(later) * x0 + math.sqrt(1 - later) * fresh
            yield x, x0, distance(operator, estimate, y)
