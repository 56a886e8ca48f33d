"""The path of a discrete process, made continuous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli.diffusion.discrete.betas import named_betas
from vgm_cli.diffusion.path.base import Path, Time, as_time, softplus


class DiscreteVPPath(Path):
    """DDPM's discrete steps made continuous: index i (0 least noisy) sits at t = (i + 1) / steps, data at t = 0.

    ln alpha-bar is linear between steps, so alpha and sigma are the official ones at every integer index. schedule,
    beta_start, beta_end: see discrete.named_betas; betas: given ones instead. zero_terminal_snr: rescaled so that the
    last step is noise (Lin et al. 2023), its alpha-bar kept at 2^-24 as in diffusers. VgmError: unknown schedule.
    """

    name = "vp-discrete"

    def __init__(
        self,
        schedule: str = "linear",
        steps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
        betas: Sequence[float] | None = None,
    ):
        self.schedule, self.beta_start, self.beta_end = schedule, beta_start, beta_end
        self.zero_terminal_snr, self.given = zero_terminal_snr, betas is not None
        values = named_betas(schedule, steps, beta_start, beta_end) if betas is None else np.asarray(betas, np.float64)
        self.steps = len(values)
        self.t_min = 1 / self.steps
        log_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-values))])
        if zero_terminal_snr:
            root = np.exp(log_bar[1:] / 2)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            log_bar[1:] = np.log(np.maximum(root**2, 2.0**-24))
        self.log_alpha_bar = torch.from_numpy(log_bar)  # (steps + 1,), entry 0 is data
        self.betas = -torch.expm1(self.log_alpha_bar.diff())  # (steps,) float64

    def options(self) -> dict[str, Any]:
        if self.given:
            return {"betas": self.betas.tolist()}
        named = {"schedule": self.schedule, "steps": self.steps}
        optional = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        optional["zero_terminal_snr"] = self.zero_terminal_snr or None
        return named | {k: v for k, v in optional.items() if v is not None}

    @property
    def alphas_cumprod(self) -> Tensor:
        """(steps,) float64."""
        return self.log_alpha_bar[1:].exp()

    def position(self, t: Time) -> Tensor:
        """t * steps in float64, snapped to the integer it stands for."""
        at = as_time(t).double() * self.steps
        near = at.round()
        return torch.where((at - near).abs() < 1e-4, near, at)  # float32 times are off by up to 6e-5 steps

    def timestep(self, t: Time) -> Tensor:
        """The network's index in [0, steps - 1], fractional between steps: float64."""
        return (self.position(t) - 1).clamp(0, self.steps - 1)

    def t_of_timestep(self, index: Time) -> Tensor:
        """The time of an index."""
        return (as_time(index).double() + 1) / self.steps

    def _log_bar(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """ln alpha-bar, its slope in t (of the interval below), and t as a tensor."""
        t = as_time(t)
        at = self.position(t).clamp(0, self.steps)
        table = self.log_alpha_bar.to(at.device)
        upper = at.ceil().clamp(min=1).long()
        low, high = table[upper - 1], table[upper]
        w = at - (upper - 1)
        return torch.where(w == 1, high, low + w * (high - low)), (high - low) * self.steps, t

    def alpha(self, t: Time) -> Tensor:
        bar, _, t = self._log_bar(t)
        return torch.exp(bar / 2).to(t.dtype)

    def sigma(self, t: Time) -> Tensor:
        bar, _, t = self._log_bar(t)
        return (-torch.expm1(bar)).sqrt().to(t.dtype)

    def alpha_prime(self, t: Time) -> Tensor:
        bar, slope, t = self._log_bar(t)
        return (torch.exp(bar / 2) * slope / 2).to(t.dtype)

    def sigma_prime(self, t: Time) -> Tensor:
        bar, slope, t = self._log_bar(t)
        return (-bar.exp() * slope / (2 * (-torch.expm1(bar)).sqrt())).to(t.dtype)

    def logsnr(self, t: Time) -> Tensor:
        bar, _, t = self._log_bar(t)
        return (bar - (-torch.expm1(bar)).log()).to(t.dtype)

    def t_of_logsnr(self, l: Time) -> Tensor:
        l = as_time(l)
        bar = -softplus(-l.double())
        table = self.log_alpha_bar.to(l.device)
        upper = torch.searchsorted(-table, -bar.contiguous()).clamp(1, self.steps)
        low, high = table[upper - 1], table[upper]
        return ((upper - 1 + ((bar - low) / (high - low)).clamp(0, 1)) / self.steps).to(l.dtype)
