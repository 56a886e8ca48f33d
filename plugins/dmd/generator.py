"""The student as a generator: one step, or a few with fresh noise in between.

Yin et al. 2024 (2311.18828, 2405.14867 sec. 4.4, 4.5); behaviour of tianweiy/DMD2@8d8fa55 main/sd_unified_model.py
(sample_backward) and its demo loops. Times are the host's: 0 data, path.t_max noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser, Network
from vgm_cli.diffusion.path import DiscreteVPPath, EDMPath
from vgm_cli.diffusion.timesteps import karras
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Steps

# sigma / alpha at index 399 of Stable Diffusion's process, where DMD2's one-step SDXL is asked: dividing an error in
# eps by the alpha of pure noise (0.07 in Stable Diffusion, 0.006 in DDPM) would drown the image
EPS_LEVEL = 1.16


def level_times(view: Denoiser, n: int = 1000, rho: float = 7.0) -> Tensor:
    """The host times of the noise levels 0 (cleanest) to n - 1: (n,) float64.

    Discrete paths: their own steps, whatever n. EDM's: Karras et al.'s levels. Others: uniform in t.
    """
    if isinstance(view.path, DiscreteVPPath):
        return view.path.t_of_timestep(torch.arange(view.path.steps))
    low, high = view.t_range()
    if isinstance(view.path, EDMPath):
        return karras(n, low, high, rho, dtype=torch.float64)[:-1].flip(0)
    return torch.linspace(low, high, n, dtype=torch.float64)


def denoising_times(view: Denoiser, steps: int, first: float | None = None, count: int | None = None) -> list[float]:
    """Times at which a generator of `steps` steps is asked, noise first: every 1000/steps-th level from the last.

    first: the first one; None is pure noise, except for one step of a network that predicts eps or the score, which is
    asked at EPS_LEVEL. count: of the `count` cleanest levels alone (DMD2's denoising_timestep), None of all. VgmError:
    more steps than levels.
    """
    levels = level_times(view)[:count]
    if not 1 <= steps <= len(levels):
        raise VgmError(f"denoising_steps={steps} of {len(levels)} levels", "1 to 4 are usual", USAGE)
    interval = len(levels) // steps
    times = levels[torch.arange(len(levels) - 1, -1, -interval)[:steps]].tolist()
    if first is not None:
        times[0] = first
    elif steps == 1 and view.prediction in ("eps", "score"):
        times[0] = float(view.path.t_of_ve_sigma(EPS_LEVEL))
    return times


class Generator(Denoiser):
    """A Denoiser that knows the times at which it was trained to give images.

    denoiser: a Denoiser or its config. times: host times, noise first.
    """

    def __init__(self, network: Network, denoiser: Denoiser | Mapping[str, Any], times: Sequence[float]):
        config = denoiser.config() if isinstance(denoiser, Denoiser) else denoiser
        self.__dict__.update(Denoiser.from_config(network, config).__dict__)
        self.times = list(times)

    def view(self) -> dict[str, Any]:
        """What a checkpoint stores; the host builds this class again from it."""
        return {"name": "dmd", "denoiser": self.config(), "times": self.times}

    def noise_scale(self) -> float:
        """Of the standard normal input: sigma at pure noise, 1 where a VP network is asked at a cleaner time."""
        t = self.times[0]
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        return sigma if t >= self.t_range()[1] or alpha == 1.0 else (alpha**2 + sigma**2) ** 0.5

    def generate(self, x_t: Tensor, i: int, **cond: Any) -> Tensor:
        """Images (B, ...) from the input x_t of step i."""
        return self.predict(x_t, self.times[i], "x0", **cond)

    def renoise(self, x0: Tensor, i: int, noise: Tensor) -> Tensor:
        """The input of step i from images and noise (B, ...)."""
        t = torch.full((len(x0),), self.times[i], dtype=torch.float64, device=x0.device)
        return self.path.add_noise(x0, noise, t)

    def walk(
        self,
        x: Tensor,
        steps: int,
        noise: Callable[[], Tensor],
        tell: Callable[[int, Tensor], None] | None = None,
        **cond: Any,
    ) -> list[Tensor]:
        """The images of the first `steps` steps from the first step's input x (B, ...); noise() between two of them.
        tell(i, image): called after every step."""
        images: list[Tensor] = []
        for i in range(steps):
            images.append(self.generate(x if i == 0 else self.renoise(images[-1], i, noise()), i, **cond))
            if tell is not None:
                tell(i, images[-1])
        return images


@dataclass(kw_only=True)
class GeneratorSampler:
    """The student's own sampling. steps: None for as many as it was trained with; fewer stop early, more are spread
    as in training. Guidance is already in the weights. VgmError: the view is no Denoiser."""

    steps: Steps | None = None

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        if not isinstance(view, Denoiser):
            raise VgmError("this sampler needs a diffusion or flow network", "`vgm ls samplers` shows others", USAGE)
        steps = request.steps or self.steps
        trained = view.times if isinstance(view, Generator) else denoising_times(view, steps or 1)
        times = trained if steps is None or steps <= len(trained) else denoising_times(view, steps)
        generator = Generator(view.network, view, times)
        wanted = steps or len(times)
        watch = request.callback
        tell = None if watch is None else lambda i, x0: watch(i, wanted, x0, x0)
        noise = request.randn() * generator.noise_scale()
        images = generator.walk(noise, wanted, request.randn, tell, **request.cond)
        request.info["nfe"] = generator.nfe
        return images[-1].float()
