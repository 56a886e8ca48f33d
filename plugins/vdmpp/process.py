"""VDM's process as the host sees it: a path whose schedule is the network's own, the view of it, and its sampler.

The host's images take the values k / 127.5 - 1 in [-1, 1]; VDM's network sees f = 2 (k + 1/2) / 256 - 1, which is
255 / 256 of that. The factor is part of the path's alpha, so that everything of the host works on its own images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion import solvers
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.likelihood import level_logits, pixel_levels
from vgm_cli.diffusion.path import Path, Time, as_time
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Steps

from .gamma import Gamma, Tap
from .model import VDM


class GammaPath(Path):
    """alpha^2 = scale^2 sigmoid(-gamma(t)), sigma^2 = sigmoid(gamma(t)) of a schedule; gradients reach its parameters.

    The schedule is stored with its network, so that `config` names the path and does not rebuild it. tap: see Gamma.
    """

    name = "vdm"
    tap: Tap | None = None

    def __init__(self, gamma: Gamma, scale: float = 1.0):
        self.gamma, self.scale = gamma, scale

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def gamma_of(self, t: Time) -> tuple[Tensor, Tensor]:
        """gamma(t) and its derivative."""
        found: tuple[Tensor, Tensor] = self.gamma(as_time(t), self.tap)
        return found

    def alpha(self, t: Time) -> Tensor:
        return self.scale * torch.sigmoid(-self.gamma_of(t)[0]).sqrt()

    def sigma(self, t: Time) -> Tensor:
        return torch.sigmoid(self.gamma_of(t)[0]).sqrt()

    def alpha_prime(self, t: Time) -> Tensor:
        gamma, slope = self.gamma_of(t)
        return -0.5 * self.scale * torch.sigmoid(-gamma).sqrt() * torch.sigmoid(gamma) * slope

    def sigma_prime(self, t: Time) -> Tensor:
        gamma, slope = self.gamma_of(t)
        return 0.5 * torch.sigmoid(gamma).sqrt() * torch.sigmoid(-gamma) * slope

    def logsnr(self, t: Time) -> Tensor:
        return 2 * math.log(self.scale) - self.gamma_of(t)[0]

    def t_of_logsnr(self, l: Time) -> Tensor:
        l = as_time(l)
        return self.gamma.inverse(2 * math.log(self.scale) - l).to(l)


class VDMDenoiser(Denoiser):
    """A VDM as a denoiser on its own learned schedule; it predicts eps and is told the log-SNR of what it sees.

    VgmError: the network is no VDM.
    """

    def __init__(self, network: VDM):
        if not isinstance(network, VDM):
            raise VgmError("this view is for the model vdm, which holds its schedule", "view.name=denoiser", USAGE)
        path = GammaPath(network.gamma, (network.levels - 1) / network.levels)
        super().__init__(network, path, "eps", time="logsnr")
        self.path: GammaPath = path

    def time_argument(self, t: Tensor) -> Tensor:
        return -self.path.gamma_of(t.double())[0].float()

    def config(self) -> dict[str, Any]:
        return {"name": "vdm"}


@dataclass(kw_only=True)
class VDMSampler:
    """Ancestral sampling from t = 1 to 0 in equal steps of the learned schedule, then the decoder.

    steps: T; one network evaluation each. decode: the likeliest value of every pixel, or a draw ("sample"), or "none":
    the clean image that is left at t = 0, noise of exp(gamma_0 / 2) in it.
    """

    steps: Steps = 1000
    decode: Literal["argmax", "sample", "none"] = "argmax"

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """(N, *request.shape) in [-1, 1]. VgmError: the view is no VDM."""
        if not isinstance(view, VDMDenoiser):
            raise VgmError("this sampler is for the model vdm", "ancestral samples from other denoisers", USAGE)
        steps = self.steps if request.steps is None else request.steps
        if steps < 1:
            raise VgmError(f"steps={steps}: at least one is needed", code=USAGE)
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=request.device)
        before, callback = view.nfe, request.callback

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return view.predict_both(x, times[i], **request.cond)

        z = solvers.ddpm(
            predict,
            request.randn(),
            view.path.alpha(times),
            view.path.sigma(times),
            final_noise=True,
            noise=request.randn,
            callback=None if callback is None else lambda i, x, x0: callback(i, steps, x, x0),
        )
        request.info["nfe"] = view.nfe - before
        return self.decoded(z, view, request)

    def decoded(self, z: Tensor, view: VDMDenoiser, request: Request) -> Tensor:
        """Pixels of z at t = 0."""
        path, zero = view.path, torch.zeros(1, dtype=torch.float64, device=z.device)
        clean, spread = (z / path.alpha(zero)).float(), path.ve_sigma(zero).float()
        if self.decode == "none":
            return clean
        levels = pixel_levels(view.network.levels, z.device)  # type: ignore[attr-defined]
        if self.decode == "argmax":
            return levels[((clean[..., None] - levels).abs()).argmin(-1)]
        chance = level_logits(clean, spread, levels).softmax(-1).cumsum(-1)
        return levels[(request.rand(request.shape)[..., None] > chance).sum(-1).clamp(max=len(levels) - 1)]
