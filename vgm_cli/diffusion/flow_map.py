"""Flow maps: networks that jump along the probability flow, from one time to any cleaner one, in a single evaluation.

One view for every few-step network: consistency models (Song et al. 2023, 2303.01469), distribution matching (Yin et
al. 2024), continuous-time consistency (Lu & Song 2025, 2410.11081), average velocities (Geng et al. 2025, 2505.13447).
With x0 what the network estimates at (x_t, t), a jump is a DDIM step, exact where the estimate is constant along the
flow: x_s = alpha(s) x0 + sigma(s) eps with x_t = alpha(t) x0 + sigma(t) eps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser, Network, convert
from vgm_cli.diffusion.path import DiscreteVPPath, EDMPath, Time
from vgm_cli.diffusion.solvers.common import Callback, notify
from vgm_cli.diffusion.timesteps import karras, level_range, time_grid
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.shapes import expand
from vgm_cli.ranges import NonNegative, Steps

Boundary = Literal["none", "skip", "trig"]
SecondTime = Literal["end", "difference"]


def skip_scales(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in at sigma: EDM's, moved so that c_skip = 1 and c_out = 0 at sigma_min.

    The denominator of c_out is not moved: as in openai/consistency_models@e32b69e cm/karras_diffusion.py.
    """
    c_skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    c_out = (sigma - sigma_min) * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    return c_skip, c_out, 1 / (sigma**2 + sigma_data**2) ** 0.5


class FlowMap(Denoiser):
    """A Denoiser whose estimate of x0 is where a jump ends, on the path of any network. VgmError: unknown names."""

    def __init__(
        self,
        network: Network,  # network(x (B, ...), t (B,), **cond) -> (B, ...)
        denoiser: Denoiser | Mapping[str, Any],  # how the network is asked and read, or the config of one
        boundary: Boundary = "none",  # what makes a jump to the end the identity there, see `interpret`
        sigma_min: float = 0.002,  # noise level (sigma / alpha) of the end, of the boundary "skip"
        sigma_max: float = 80.0,  # noise level at which sampling starts, of the boundary "skip"
        sigma_data: float | None = None,  # of the boundary "skip"; None: the denoiser's
        times: Sequence[float] | None = None,  # host times at which it was trained to be asked, noise first; None: all
        second_time: SecondTime | None = None,  # network(x, t, s=..., **cond): the time of the end, or t minus it
        guided: bool = False,  # guidance is in its weights, so that none may be added
    ):
        inner = denoiser if isinstance(denoiser, Denoiser) else Denoiser.from_config(network, denoiser)
        super().__init__(network, inner.path, inner.prediction, **inner.options())
        if boundary not in get_args(Boundary):
            raise unknown("boundary", boundary, get_args(Boundary))
        if second_time is not None and second_time not in get_args(SecondTime):
            raise unknown("second time", second_time, get_args(SecondTime))
        if boundary == "trig" and self.prediction in ("x0", "x_prev"):
            raise VgmError(f"a network of {self.prediction} is not the identity without noise", "boundary=skip", USAGE)
        self.boundary, self.sigma_min, self.sigma_max = boundary, sigma_min, sigma_max
        self.boundary_data = self.sigma_data if sigma_data is None else sigma_data
        self.times = None if times is None else list(times)
        self.second_time, self.guided = second_time, guided

    def view(self) -> dict[str, Any]:
        """What a checkpoint stores; the host builds this class again from it."""
        view: dict[str, Any] = {"name": "flow-map", "denoiser": self.config(), "boundary": self.boundary}
        if self.boundary == "skip":
            view |= {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
            view |= {"sigma_data": self.boundary_data} if self.boundary_data != self.sigma_data else {}
        optional = {"times": self.times, "second_time": self.second_time, "guided": self.guided or None}
        return view | {k: v for k, v in optional.items() if v is not None}

    # -- where jumps start and end

    def end(self) -> float:
        """The host time at which x is data: that of sigma_min with the boundary "skip", else the path's cleanest."""
        return float(self.path.t_of_ve_sigma(self.sigma_min)) if self.boundary == "skip" else self.path.t_min

    def start(self) -> float:
        """The host time at which sampling starts: the first of `times`, that of sigma_max, or the noisiest there is."""
        if self.times:
            return self.times[0]
        high = self.t_range()[1]
        return min(float(self.path.t_of_ve_sigma(self.sigma_max)), high) if self.boundary == "skip" else high

    def noise_scale(self, t: float | None = None) -> float:
        """Deviation of the pure noise that stands for x_t where sampling starts, at t (None: `start`): sigma, but
        sqrt(alpha^2 + sigma^2) where a network that scales data down was trained to start before they are gone."""
        t = self.start() if t is None else t
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        pure = t >= self.t_range()[1] or alpha == 1.0 or self.boundary == "skip"
        return sigma if pure else (alpha**2 + sigma**2) ** 0.5

    # -- jumps

    def raw(self, x_t: Tensor, t: Time, *, s: Time | None = None, **cond: Any) -> Tensor:
        """As Denoiser's. s: (B,) or a number, the end of the jump that a network of two times is told; None is t."""
        if self.second_time is None:
            return super().raw(x_t, t, **cond)
        start = self.batch_time(x_t, t)
        end = start if s is None else self.batch_time(x_t, s)
        second = self.time_argument(end)
        if self.second_time == "difference":
            second = self.time_argument(start) - second
        return super().raw(x_t, start, s=second, **cond)

    def interpret(self, output: Tensor, x_t: Tensor, t: Time, to: str = "x0") -> Tensor:
        """A raw output as the end of a jump, or as what that implies: (B, C, ...).

        none: the network's own x0. trig: the same, of a network whose x0 is x_t without noise (TrigFlow's cos(t) x -
        sin(t) F, and every prediction but x0). skip: the output is read as EDM's F, and x0 is c_skip x + c_out F with
        skip_scales: the official consistency function of networks that predict F, and for others their own x0 but for
        a shift of sigma_min.
        """
        if self.boundary != "skip":
            return super().interpret(output, x_t, t, to)
        t = self.batch_time(x_t, t)
        if self.prediction == "F" and self.boundary_data == self.sigma_data:
            F = super().interpret(output, x_t, t, "F")
        else:
            x0 = super().interpret(output, x_t, t, "x0")
            F = convert(x0, x_t, t, self.path, "x0", "F", self.boundary_data)
        sigma, x = self.path.ve_sigma(t), x_t.double() / expand(self.path.alpha(t), x_t)
        c_skip, c_out, _ = skip_scales(sigma, self.boundary_data, self.sigma_min)
        f = (expand(c_skip, x) * x + expand(c_out, x) * F.double()).to(F.dtype)
        return convert(f, x_t, t, self.path, "x0", to, self.sigma_data)

    def jump(self, x: Tensor, t: Time, s: Time | None = None, **cond: Any) -> Tensor:
        """x_s (B, ...) from x at t, one evaluation. t, s: (B,) or numbers, s <= t; None: the end, which is data.

        A velocity that a network of two times gives is the average one on the way from t to s, so that the jump is
        x - (t - s) u on every path (Geng et al. 2025, eq. 12).
        """
        t, end = self.batch_time(x, t), self.end()
        if self.second_time is not None and self.prediction == "velocity":
            s = self.batch_time(x, end if s is None else s)
            u = self.interpret(self.raw(x, t, s=s, **cond), x, t, "velocity")
            return x - expand((t - s).to(x.dtype), x) * u
        x0 = self.interpret(self.raw(x, t, s=end if s is None else s, **cond), x, t)
        if s is None:
            return x0
        s = self.batch_time(x, s)
        ratio = self.path.sigma(s) / self.path.sigma(t)
        kept = self.path.alpha(s) - ratio * self.path.alpha(t)
        moved = (expand(ratio, x) * x.double() + expand(kept, x) * x0.double()).to(x0.dtype)
        return torch.where(expand(s <= end, x), x0, moved)

    def renoise(self, x: Tensor, s: Time, noise: Tensor) -> Tensor:
        """x_s (B, ...) from data x, with so much noise (B, ...) added that the level at the end becomes that at s."""
        s = self.batch_time(x, s)
        if self.boundary != "skip":
            return self.path.add_noise(x, noise, s)
        end = self.batch_time(x, self.end())
        ratio = self.path.alpha(s) / self.path.alpha(end)
        deviation = (self.path.sigma(s) ** 2 - (ratio * self.path.sigma(end)) ** 2).clamp(min=0).sqrt()
        return (expand(ratio, x) * x + expand(deviation, x) * noise).to(x.dtype)

    def along(
        self,
        x: Tensor,
        times: Sequence[float],
        noise: Callable[[], Tensor] | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
        callback: Callback = None,
        **cond: Any,
    ) -> Tensor:
        """Data (B, ...) from x at times[0], evaluated at each of the times. noise(): like x, added after every jump to
        data but the last; None: jumps go from time to time. change, callback: see few_step."""
        end = self.end()

        def jump(x: Tensor, t: float, s: float) -> Tensor:
            return self.jump(x, t, None if s <= end else s, **cond)

        def add_noise(x0: Tensor, s: float) -> Tensor:
            return x0 if noise is None or s <= end else self.renoise(x0, s, noise())

        renoise = None if noise is None else add_noise
        return few_step(jump, x, [*times, end], renoise=renoise, change=change, callback=callback)

    def times_of(self, steps: int | None = None) -> list[float]:
        """Host times at which `steps` evaluations are made, noise first. Of trained `times` the first ones; else evenly
        spaced, on EDM's path by Karras et al.'s rule. VgmError: more than were trained."""
        if self.times is not None:
            if (steps or 0) > len(self.times):
                raise VgmError(f"{steps} steps of a network trained for {len(self.times)}", "times=[...]", USAGE)
            return self.times[: steps or len(self.times)]
        low, _ = level_range(self.path, *self.t_range())
        grid = "karras" if self.path.name == "edm" else "uniform"
        low = max(self.end(), float(self.path.t_of_ve_sigma(low))) if grid == "karras" else self.end()
        return time_grid(self.path, steps or 1, grid, low=low, high=self.start())[:-1].tolist()


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


def few_step(
    jump: Callable[[Tensor, float, float], Tensor],
    x: Tensor,
    times: Sequence[float],
    *,
    renoise: Callable[[Tensor, float], Tensor] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
    callback: Callback = None,
) -> Tensor:
    """Data from x at times[0], in len(times) - 1 evaluations; times descend, the last is that of data.

    jump(x, t, s) gives x at s. renoise(x0, s): every jump goes to data, and noise is added up to the next time (the
    multistep sampling of consistency models; it decides what there is to add at the last one); None: jumps go from time
    to time. change: of every estimate of x0 (clipping, editing).
    """
    for i, (t, s) in enumerate(pairwise(times)):
        end = times[-1] if renoise is not None else s
        reached = jump(x, t, end)
        if end == times[-1] and change is not None:
            reached = change(reached)
        notify(callback, i, x, reached if end == times[-1] else None)
        x = reached if renoise is None else renoise(reached, s)
    return x


@dataclass(kw_only=True)
class FewStepSampler:
    """A few jumps of a few-step network; of any other Denoiser a jump is a DDIM step.

    Guidance is in the weights of few-step networks: there is none here. VgmError: the view is no Denoiser, times that
    do not descend on its path.
    """

    steps: Steps | None = None  # evaluations; None: as many as there are times, else one
    times: tuple[NonNegative, ...] | None = None  # host times of the evaluations, noise first; None: see times_of
    renoise: Literal["fresh", "none"] = "fresh"  # fresh noise after every jump to data, or jumps from time to time
    clip: bool = False  # estimates of x0 to [-1, 1], for pixels

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        if not isinstance(view, Denoiser):
            raise VgmError("this sampler needs a diffusion or flow network", "`vgm ls samplers` shows others", USAGE)
        flow = view if isinstance(view, FlowMap) else FlowMap(view.network, view)
        times, before, callback = self.times_for(flow, request.steps or self.steps), flow.nfe, request.callback
        end, top = flow.end(), flow.path.t_max
        if times[0] > top or times[-1] < end or any(s >= t for t, s in pairwise(times)):
            raise VgmError(f"times {times} do not descend within [{end:g}, {top:g}]", "sampler.times=null", USAGE)
        x = flow.along(
            request.randn() * flow.noise_scale(times[0]),
            times,
            request.randn if self.renoise == "fresh" else None,
            (lambda x0: x0.clamp(-1, 1)) if self.clip else None,
            None if callback is None else lambda i, x, x0: callback(i, len(times), x, x0),
            **request.cond,
        )
        request.info["nfe"] = flow.nfe - before
        return x.float()

    def times_for(self, flow: FlowMap, steps: int | None) -> list[float]:
        """Host times of so many evaluations, noise first."""
        return list(self.times) if self.times and steps in (None, len(self.times)) else flow.times_of(steps)
