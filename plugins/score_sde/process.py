"""How a host view of a network is an SDE of this paper, with its score, in the network's own range of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.path import DiscreteVPPath, Path, SubVPPath, VEPath, VPPath
from vgm_cli.diffusion.solvers import dopri5
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import expand

from .predictors import scaled
from .sde import EPS, SDE, Kind


def sde_of(path: Path, steps: int, unit: bool = False) -> SDE:
    """The SDE of a path, in so many steps. unit: of images in [0, 1], whose noise is half as large. VgmError: another
    paper's path."""
    if isinstance(path, VEPath):
        half = 2 if unit else 1
        return SDE(kind="ve", steps=steps, sigma_min=path.sigma_min / half, sigma_max=path.sigma_max / half)
    if isinstance(path, VPPath):  # sub-VP is one, too
        kind: Kind = "subvp" if isinstance(path, SubVPPath) else "vp"
        return SDE(kind=kind, steps=steps, beta_min=path.beta_min, beta_max=path.beta_max)
    if isinstance(path, DiscreteVPPath) and path.schedule == "linear" and not path.zero_terminal_snr:
        rates = path.betas * path.steps
        return SDE(kind="vp", steps=steps, beta_min=float(rates[0]), beta_max=float(rates[-1]))
    hint = "--sampler pc takes any path; `vgm ls samplers` shows others"
    raise VgmError(f"this sampler is for VE, VP and sub-VP, the network is on the path {path.name}", hint, USAGE)


@dataclass
class Process:
    """An SDE and the score of a network on it. States x (B, ...) are in the network's own range: [0, 1] with unit,
    else [-1, 1]. cond: keywords of the network."""

    view: Denoiser
    sde: SDE
    cond: dict[str, Any]

    @classmethod
    def of(cls, view: Denoiser, steps: int, cond: dict[str, Any] | None = None) -> Process:
        """VgmError: the network is on another path."""
        return cls(view, sde_of(view.path, steps, view.data_range == "unit"), cond or {})

    @property
    def unit(self) -> bool:
        return self.view.data_range == "unit"

    @property
    def eps(self) -> float:
        """Where sampling ends: officially 1e-5 of VE, 1e-3 of the others."""
        return EPS if self.sde.kind == "ve" else 1e-3

    def out_of(self, x: Tensor, t: Tensor) -> Tensor:
        """A state at times t (B,) as the host sees it."""
        return 2 * x - expand(self.view.path.alpha(t.double()), x).to(x.dtype) if self.unit else x

    def into(self, x: Tensor) -> Tensor:
        """Images (B, ...) in [-1, 1], in the network's range."""
        return (x + 1) / 2 if self.unit else x

    def images(self, x: Tensor) -> Tensor:
        """The inverse of `into`."""
        return 2 * x - 1 if self.unit else x

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x): (B, ...). Networks of discrete steps are asked between them, as officially, and their score
        takes the deviation of the step below."""
        path = self.view.path
        if isinstance(path, DiscreteVPPath):
            label = t.float() * (path.steps - 1)
            eps = self.view.predict(x, path.t_of_timestep(label), "eps", **self.cond)
            deviations = (1 - path.alphas_cumprod).sqrt().to(x.device)
            return -eps / expand(deviations[label.long()], eps).to(eps.dtype)
        score = self.view.predict(self.out_of(x, t), t, "score", **self.cond)
        return 2 * score if self.unit else score

    def flow(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability flow at float64 states: (B, ...). The network sees float32."""
        f, g = self.sde.coefficients(t)
        return scaled(f, x) - scaled(g**2 / 2, self.score(x.float(), t).to(x.dtype))

    def encode(self, x: Tensor, *, eps: float = EPS, rtol: float = 1e-5, atol: float = 1e-5) -> Tensor:
        """The latent codes (B, ...) of images in the network's range: noise, to which the flow takes them."""
        return dopri5(self.flow, x.double(), eps, 1.0, rtol=rtol, atol=atol).float()

    def decode(
        self, z: Tensor, *, eps: float | None = None, rtol: float = 1e-5, atol: float = 1e-5, callback: Any = None
    ) -> Tensor:
        """The images (B, ...), in the network's range, of latent codes. callback: as of the host's ODE solvers."""
        end = self.eps if eps is None else eps

        def x0_of(x: Tensor, t: Tensor, slope: Tensor) -> Tensor:
            f, g = self.sde.coefficients(t)
            score = scaled(2 / g**2, scaled(f, x) - slope)
            alpha, sigma = self.sde.path.alpha(t), self.sde.path.sigma(t)
            return self.images(scaled(1 / alpha, x + scaled(sigma**2, score)))

        return dopri5(
            self.flow, z.double(), 1.0, end, rtol=rtol, atol=atol, callback=callback, x0_of=x0_of if callback else None
        ).float()

    def denoised(self, x: Tensor, t: float) -> Tensor:
        """The mean of one step of reverse diffusion from the last time on: the official last touch of an ODE."""
        times = torch.full((len(x),), t, device=x.device)
        return x - self.sde.reverse_step(x, times, self.score(x, times))[0]
