"""The sampler of SDXL-Turbo and SD-Turbo: one to four ancestral steps at a few entries of the noise schedule.

Behaviour of Stability-AI/generative-models@0ad7de9 scripts/demo/turbo.py (SubstepSampler); img2img as diffusers' SDXL
pipeline runs it (guidance off, int(steps * strength) steps). Written in the coordinates alpha x0 + sigma eps, so that a
flow can begin at pure noise, where sigma / alpha is infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap, level_times
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.diffusion.solvers.common import Callback, notify
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import each
from vgm_cli.ranges import Fraction, NonNegative, Steps, Whole


def entries(view: Denoiser, table: int, places: list[int]) -> list[float]:
    """Host times of entries of a table of `table` noise levels, 0 the noisiest: of a discrete process its timesteps, as
    many as there are entries, evenly spaced from the last."""
    if isinstance(view.path, DiscreteVPPath):
        index = np.linspace(view.path.steps - 1, 0, table, endpoint=False).astype(int)[places]
        return view.path.t_of_timestep(torch.from_numpy(index)).tolist()  # type: ignore[no-any-return]
    return level_times(view, table).flip(0)[places].tolist()  # type: ignore[no-any-return]


def ancestral(
    predict: Callable[[Tensor, float], Tensor],  # (x, i) -> x0 at the i-th level
    x: Tensor,  # (N, ...) at the first level
    alphas: Tensor,  # (n + 1,) float64, the last of data
    sigmas: Tensor,  # (n + 1,) float64, the last of data
    eta: float = 1.0,  # share of the noise that is renewed
    noise: Callable[[], Tensor] | None = None,  # standard normal, like x; not asked for where none is added
    callback: Callback = None,  # (i, x, x0)
) -> Tensor:
    """Ancestral Euler steps between levels: (N, ...).

    In variance-exploding coordinates with r the next sigma / alpha and q the present one, r^2 = down^2 + up^2 with
    up = min(r, eta r sqrt(1 - (r / q)^2)); x goes to x0 + down eps + up noise.
    """
    for i in range(len(alphas) - 1):
        x0 = predict(x, i)
        notify(callback, i, x, x0)
        eps = (x.double() - alphas[i] * x0.double()) / sigmas[i]
        level = sigmas[i + 1] / alphas[i + 1]
        ratio = level * alphas[i] / sigmas[i]
        up = torch.minimum(level, eta * level * (1 - ratio**2).sqrt())
        moved = x0.double() + (level**2 - up**2).sqrt() * eps
        if noise is not None and up > 0:
            moved = moved + up * noise().double()
        x = (alphas[i + 1] * moved).to(x0.dtype)
    return x


@dataclass(kw_only=True)
class TurboSampler:
    """One to four steps of a distilled network, and img2img where a strength is given: int(steps * strength) of `steps`
    evenly spaced steps, from given pictures with noise of the first of them.

    A network that says its times is asked at the first `steps` of those. Guidance is in the weights: there is none
    here. VgmError: guidance is asked for, more steps than there are times, a strength that leaves no step.
    """

    steps: Steps = 1  # evaluations; of img2img, those of strength 1
    substeps: tuple[Whole, ...] = (0, 100, 200, 300)  # entries of the table, for networks that do not say their times
    table: Steps = 1000  # noise levels of the table, its first entry being the noisiest
    eta: NonNegative = 1.0  # share of the noise that is renewed at every step; 0: none is
    strength: Fraction | None = None  # of img2img; None: from noise

    def __call__(self, view: Any, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        if not isinstance(view, Denoiser):
            raise VgmError("this sampler needs a diffusion or flow network", "`vgm ls samplers` shows others", USAGE)
        if request.guidance_scale not in (None, 0.0, 1.0):
            message = f"guidance_scale={request.guidance_scale:g}: turbo networks are sampled without guidance"
            hint = "leave --guidance-scale away: distillation put it into the weights, more of it burns the pictures"
            raise VgmError(message, hint, USAGE)
        steps = self.steps if request.steps is None else request.steps
        first = 0 if self.strength is None else steps - self.kept(steps)
        times = (self.sampled if self.strength is None else self.spread)(view, steps)[first:]
        at = torch.tensor(times, dtype=torch.float64)
        alphas = torch.cat([view.path.alpha(at), torch.ones(1, dtype=torch.float64)])
        sigmas = torch.cat([view.path.sigma(at), torch.zeros(1, dtype=torch.float64)])
        before, callback = view.nfe, request.callback
        x = ancestral(
            lambda x, i: view.predict(x, each(x, times[int(i)]), "x0", **request.cond),
            self.start(request, float(alphas[0]), float(sigmas[0])),
            alphas,
            sigmas,
            self.eta,
            request.randn,
            None if callback is None else lambda i, x, x0: callback(i, len(times), x, x0),
        )
        request.info["nfe"] = view.nfe - before
        return x.float()

    def kept(self, steps: int) -> int:
        """How many of the steps img2img makes. VgmError: none."""
        made = int(steps * (self.strength or 0.0))
        if made < 1:
            message = f"strength={self.strength:g} of {steps} step{'s' * (steps > 1)} leaves none to make"
            raise VgmError(message, "int(steps * strength) must be at least 1: steps=2 strength=0.5", USAGE)
        return made

    def sampled(self, view: Denoiser, steps: int) -> list[float]:
        """The first host times at which the network is asked, from noise. VgmError: there are fewer."""
        own = view.times if isinstance(view, FlowMap) else None
        known = own or entries(view, self.table, list(self.substeps_of()))
        if steps > len(known):
            hint = f"steps of 1 to {len(known)}; `--sampler ddim` takes any number"
            raise VgmError(f"{steps} steps of a network for {len(known)}", hint, USAGE)
        return known[:steps]

    def spread(self, view: Denoiser, steps: int) -> list[float]:
        """Host times of so many steps over the whole schedule, noise first. VgmError: more than the network has."""
        own = view.times if isinstance(view, FlowMap) else None
        count = len(own) if own else self.table
        if steps > count:
            raise VgmError(f"{steps} steps of {count}", f"steps of 1 to {count}", USAGE)
        places = [k * count // steps for k in range(steps)]
        return [own[k] for k in places] if own else entries(view, self.table, places)

    def substeps_of(self) -> tuple[int, ...]:
        """VgmError: they do not ascend within the table."""
        if any(b <= a for a, b in zip(self.substeps, self.substeps[1:])) or self.substeps[-1] >= self.table:
            raise VgmError(f"substeps={list(self.substeps)} of {self.table}", "they ascend, below table", USAGE)
        return self.substeps

    def start(self, request: Request, alpha: float, sigma: float) -> Tensor:
        """Noise of the deviation that noise and an image of unit variance have at the first level; of img2img the
        pictures at that level. VgmError: there are none."""
        if self.strength is None:
            return request.randn() * (alpha**2 + sigma**2) ** 0.5
        if request.images is None:
            raise VgmError("img2img starts from pictures", "--input FILES, or strength=null", USAGE)
        rows = [i % len(request.images) for i in request.index]
        return alpha * request.images[rows].to(request.device) + sigma * request.randn()
