"""The samplers that recipes name, for any Denoiser on any path: thin classes around diffusion/solvers/.

Called with (view, request). The path decides where sampling starts (pure noise, or just below where the prediction is
singular) and ends: where sigma(t_min) > 0 the last of the `steps` is the network's estimate of x0. Noise comes from the
request alone, so an image does not depend on its batch. request.guidance_scale guides in one doubled forward within
request.guidance_interval (host times). cfg_channels: leading channels that guidance applies to, None for all.
guidance_rescale: see ClassifierFreeGuidance. `steps` counts grid points; request.info["nfe"] counts evaluations.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion import solvers, timesteps
from vgm_cli.diffusion.denoiser import Denoiser, convert, flow_velocity
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance
from vgm_cli.diffusion.path import DiscreteVPPath, EDMPath
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.ranges import Blocks, Fraction, NonNegative, Positive, Steps, Unbounded, ordered

Grid = Literal["uniform", "logsnr", "quadratic", "karras", "exponential", "leading", "trailing", "linspace"]


@dataclass(kw_only=True)
class GaussianSampler(ABC):
    """What every sampler here shares: guidance, evaluation counts, callbacks."""

    cfg_channels: int | None = None
    guidance_rescale: Fraction = 0.0
    steps: Steps = 50

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape). VgmError: the view is no Denoiser, fewer than one step."""
        if not isinstance(view, Denoiser):
            raise VgmError("this sampler needs a diffusion or flow network", "`vgm ls samplers` shows others", USAGE)
        steps = self.steps if request.steps is None else request.steps
        if steps < 1:
            raise VgmError(f"steps={steps}: at least one is needed", code=USAGE)
        model, before = self.guided(view, request), view.nfe
        x = self.walk(model, request, steps)
        request.info["nfe"] = model.nfe - (before if model is view else 0)
        return x.float()

    def guided(self, view: Denoiser, request: Request) -> Denoiser:
        """The view, guided as the request asks."""
        if request.guidance_scale in (None, 1.0) or not request.cond:
            return view
        assert request.guidance_scale is not None
        interval = request.guidance_interval
        return ClassifierFreeGuidance(view, request.guidance_scale, self.cfg_channels, interval, self.guidance_rescale)

    @abstractmethod
    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        """From noise to data."""


def report(request: Request, total: int) -> Callable[[int, Tensor, Tensor | None], None] | None:
    """A solver's callback that tells the request's."""
    tell = request.callback
    return None if tell is None else lambda i, x, x0: tell(i, total, x, x0)


def default_grid(model: Denoiser) -> Grid:
    """Uniform in t, except where t is the noise level itself."""
    return "karras" if isinstance(model.path, EDMPath) else "uniform"


def reaches_data(model: Denoiser, low: float) -> bool:
    """Whether the state at t = low has no noise left."""
    return float(model.path.sigma(low)) == 0


def stops(model: Denoiser, steps: int, grid: str | None, need_alpha: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Times at which the network is evaluated (n,), and alphas, sigmas (n + 1,) that end with data (1, 0).

    On discrete paths grid may be a spacing of the integer timesteps. need_alpha: start where alpha > 0.
    """
    low, high = model.t_range()
    if need_alpha and float(model.path.alpha(high)) == 0:
        high -= 1e-3
    if grid in timesteps.SPACINGS:
        if not isinstance(model.path, DiscreteVPPath):
            raise VgmError(f"grid={grid} spaces discrete timesteps, this path is continuous", "grid=uniform", USAGE)
        times = model.path.t_of_timestep(
            torch.from_numpy(timesteps.spaced_timesteps(steps, model.path.steps, str(grid)).copy())
        )
    else:
        grid = grid or default_grid(model)
        if reaches_data(model, low):
            times = timesteps.time_grid(model.path, steps, grid, low, high)[:-1]
        elif steps == 1:
            times = torch.tensor([high], dtype=torch.float64)
        else:
            times = timesteps.time_grid(model.path, steps - 1, grid, low, high)
    alphas = torch.cat([model.path.alpha(times), torch.ones(1, dtype=torch.float64)])
    sigmas = torch.cat([model.path.sigma(times), torch.zeros(1, dtype=torch.float64)])
    return times, alphas, sigmas


Clip = bool | float | Literal["dynamic"]


def clip_of(clip: Clip) -> Callable[[Tensor], Tensor] | None:
    """x0 clipped to [-1, 1], to +-clip, or to each image's own quantile ("dynamic": Saharia et al. 2022)."""
    if clip == "dynamic":
        return solvers.dynamic_threshold
    edge = float(clip)
    return (lambda x0: x0.clamp(-edge, edge)) if edge else None


@dataclass(kw_only=True)
class ODESampler(GaussianSampler):
    """Probability-flow ODE in t: dx/dt = u. method: euler, midpoint, heun, rk4 on a grid, or dopri5 to rtol, atol.

    grid: None is uniform in t (EDM's path: karras).
    """

    method: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "heun"
    grid: Grid | None = None
    rtol: Positive = 1e-5
    atol: Positive = 1e-5

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        low, high = model.t_range()
        whole = reaches_data(model, low)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return model.predict(x, t, "velocity", **request.cond)

        def x0_of(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
            return convert(v, x, t, model.path, "velocity", "x0")

        x = request.randn() * model.path.sigma(high)
        tell: dict[str, Any] = {"callback": report(request, steps), "x0_of": x0_of}
        if self.method == "dopri5":
            x = solvers.dopri5(velocity, x, high, low, rtol=self.rtol, atol=self.atol, **tell)
        elif whole or steps > 1:
            grid = self.grid or default_grid(model)
            times = timesteps.time_grid(model.path, steps if whole else steps - 1, grid, low, high)
            x = solvers.ODE[self.method][0](velocity, x, times, **tell)
        else:
            low = high
        return x if whole else model.predict(x, low, "x0", **request.cond)


@dataclass(kw_only=True)
class EulerSampler(ODESampler):
    method: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "euler"


@dataclass(kw_only=True)
class Dopri5Sampler(ODESampler):
    method: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "dopri5"


@dataclass(kw_only=True)
class SDESampler(GaussianSampler):
    """Reverse SDE. form: "g" e^2 = scale g(t)^2 (scale 1: the exact time reversal), "sigma" e^2 = scale sigma(t)."""

    steps: Steps = 250
    form: Literal["g", "sigma"] = "g"
    scale: NonNegative = 1.0
    grid: Grid | None = None

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        path = model.path
        times, _, _ = stops(model, steps, self.grid, need_alpha=True)
        low = model.t_range()[0]
        whole = reaches_data(model, low)
        if whole:
            times = torch.cat([times, times.new_full((1,), low)])

        def drift_score(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            x0, eps = model.predict_both(x, t, **request.cond)
            return path.alpha_prime(t) * x0 + path.sigma_prime(t) * eps, -eps / path.sigma(t)

        def diffusion(t: Tensor) -> Tensor:
            return (self.scale * (path.g2(t) if self.form == "g" else path.sigma(t))).sqrt()

        def x0_of(x: Tensor, t: Tensor, score: Tensor) -> Tensor:
            return convert(score, x, t, path, "score", "x0")

        x = request.randn() * path.sigma(times[0])
        tell: dict[str, Any] = {"callback": report(request, steps), "x0_of": x0_of}
        x = solvers.reverse_sde(drift_score, x, times, diffusion, noise=request.randn, **tell)
        return x if whole else model.predict(x, times[-1], "x0", **request.cond)


@dataclass(kw_only=True)
class DDIMSampler(GaussianSampler):
    """DDIM, eta = 0 deterministic to 1 as noisy as DDPM. clip: see clip_of.

    grid: None is "trailing" timesteps on discrete paths, uniform in t on the others.
    """

    eta: NonNegative = 0.0
    clip: Clip = False
    grid: Grid | None = None

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        grid = self.grid or ("trailing" if isinstance(model.path, DiscreteVPPath) else None)
        times, alphas, sigmas = stops(model, steps, grid)

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return model.predict_both(x, times[i], **request.cond)

        noise = request.randn if self.eta else None
        keywords: dict[str, Any] = {"clip": clip_of(self.clip), "noise": noise, "callback": report(request, steps)}
        return solvers.ddim(predict, request.randn() * sigmas[0], alphas, sigmas, eta=self.eta, **keywords)


@dataclass(kw_only=True)
class AncestralSampler(GaussianSampler):
    """DDPM's ancestral sampling. variance: of the noise, fixed_small (the posterior's) or fixed_large (the
    transition's). clip, grid: as DDIM's."""

    steps: Steps = 250
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    clip: Clip = False
    grid: Grid | None = None

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        grid = self.grid or ("trailing" if isinstance(model.path, DiscreteVPPath) else None)
        times, alphas, sigmas = stops(model, steps, grid, need_alpha=True)

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return model.predict_both(x, times[i], **request.cond)

        return solvers.ddpm(
            predict,
            request.randn() * sigmas[0],
            alphas,
            sigmas,
            variance=self.variance,
            clip=clip_of(self.clip),
            noise=request.randn,
            callback=report(request, steps),
        )


@dataclass(kw_only=True)
class DPMSolverSampler(GaussianSampler):
    """Multistep DPM-Solver(++) in the path's own coordinates; sde- algorithms have orders 1 and 2."""

    steps: Steps = 20
    order: Literal[1, 2, 3] = 2
    algorithm: Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    grid: Grid | None = "logsnr"

    def __post_init__(self) -> None:
        if self.order == 3 and self.algorithm.startswith("sde"):
            raise VgmError("third-order SDE steps do not converge in this family", "order=2, or dpmpp-3m-sde", USAGE)

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        data = self.algorithm.endswith("++")
        times, alphas, sigmas = stops(model, steps, self.grid, need_alpha=not data)
        if not data:  # eps is not extrapolated to sigma = 0: the last stop's estimate of x0 ends it
            alphas, sigmas = alphas[:-1], sigmas[:-1]

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return model.predict_both(x, times[i], **request.cond)

        x = solvers.dpm_solver(
            predict,
            request.randn() * sigmas[0],
            alphas,
            sigmas,
            order=self.order,
            algorithm=self.algorithm,
            solver_type=self.solver_type,
            lower_order_final=self.lower_order_final,
            euler_at_final=self.euler_at_final,
            noise=request.randn if self.algorithm.startswith("sde") else None,
            callback=report(request, steps),
        )
        return x if data else model.predict(x, times[-1], "x0", **request.cond)


@dataclass(kw_only=True)
class UniPCSampler(GaussianSampler):
    """UniPC in the path's own coordinates. disable_corrector: steps left uncorrected."""

    steps: Steps = 20
    order: Literal[1, 2, 3] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    grid: Grid | None = "logsnr"

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        times, alphas, sigmas = stops(model, steps, self.grid, need_alpha=True)

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return model.predict_both(x, times[i], **request.cond)

        return solvers.unipc(
            predict,
            request.randn() * sigmas[0],
            alphas,
            sigmas,
            order=self.order,
            solver_type=self.solver_type,
            lower_order_final=True if self.solver_type == "bh1" else self.lower_order_final,
            disable_corrector=self.disable_corrector,
            callback=report(request, steps),
        )


@dataclass(kw_only=True)
class KDiffusionSampler(GaussianSampler):
    """k-diffusion's samplers in VE coordinates: solver is a key of solvers.K_DIFFUSION, dpm_fast or dpm_adaptive.

    schedule, rho: noise levels from sigma_max to sigma_min, None for the path's (timesteps.level_range). The other
    options go to the solver where given. VgmError: unknown solver, schedule, or an option that the solver lacks.
    """

    steps: Steps = 25
    solver: str = "dpmpp_2m"
    schedule: Literal["karras", "exponential", "polyexponential", "vp"] = "karras"
    rho: Positive | None = None
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    eta: NonNegative | None = None
    s_noise: NonNegative | None = None
    s_churn: NonNegative | None = None
    s_tmin: NonNegative | None = None
    s_tmax: Unbounded | None = None
    r: float | None = None
    order: int | None = None
    solver_type: Literal["midpoint", "heun"] | None = None
    rtol: Positive | None = None
    atol: Positive | None = None

    def __post_init__(self) -> None:
        ordered(self.sigma_min, self.sigma_max, "sigma_min, sigma_max")
        known: dict[str, Callable[..., Tensor]] = {
            **solvers.K_DIFFUSION,
            "dpm_fast": solvers.dpm_fast,
            "dpm_adaptive": solvers.dpm_adaptive,
        }
        self.solver = self.solver.replace("-", "_")
        if self.solver not in known:
            raise unknown("solver", self.solver, known)
        self.function = known[self.solver]
        self.takes = inspect.signature(self.function).parameters
        names = ("eta", "s_noise", "s_churn", "s_tmin", "s_tmax", "r", "order", "solver_type", "rtol", "atol")
        self.options = {k: getattr(self, k) for k in names if getattr(self, k) is not None}
        for key in self.options:
            if key not in self.takes:
                raise unknown("option", key, [n for n in names if n in self.takes], f"solver '{self.solver}'")

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        if self.solver == "dpm_adaptive" and len(request) > 1:  # its step size would depend on the batch
            return torch.cat([self.walk(model, item, steps) for item in each(request)])
        low, high = timesteps.level_range(model.path, *model.t_range())
        low, high = self.sigma_min or low, self.sigma_max or high

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model.denoise_ve(x, sigma, **request.cond)

        keywords: dict[str, Any] = {**self.options, "callback": report(request, steps)}
        if "noise" in self.takes:
            keywords["noise"] = request.randn
        if self.solver in ("dpm_fast", "dpm_adaptive"):
            counts = (steps,) if self.solver == "dpm_fast" else ()
            x = self.function(denoise, request.randn() * high, low, high, *counts, dtype=torch.float64, **keywords)
            return denoise(x, torch.full((len(x),), low, dtype=torch.float64))
        sigmas = self.sigmas(steps, low, high)
        return self.function(denoise, request.randn() * sigmas[0], sigmas, **keywords)

    def sigmas(self, steps: int, low: float, high: float) -> Tensor:
        """(steps + 1,) float64, the last 0."""
        if self.schedule == "vp":
            return timesteps.vp(steps, dtype=torch.float64)
        rho = {} if self.rho is None or self.schedule == "exponential" else {"rho": self.rho}
        return getattr(timesteps, self.schedule)(steps, low, high, dtype=torch.float64, **rho)


def each(request: Request) -> list[Request]:
    """One request per item, sharing the item's generator."""
    return [
        replace(request, generators=[g], cond={k: v[i : i + 1] for k, v in request.cond.items()})
        for i, g in enumerate(request.generators)
    ]


@dataclass(kw_only=True)
class DPMpp2MSampler(KDiffusionSampler):
    solver: str = "dpmpp_2m"


@dataclass(kw_only=True)
class DPMpp2MSDESampler(KDiffusionSampler):
    solver: str = "dpmpp_2m_sde"


@dataclass(kw_only=True)
class DPMpp3MSDESampler(KDiffusionSampler):
    solver: str = "dpmpp_3m_sde"


@dataclass(kw_only=True)
class EulerAncestralSampler(KDiffusionSampler):
    solver: str = "euler_ancestral"


@dataclass(kw_only=True)
class EDMSampler(GaussianSampler):
    """EDM's Heun sampler, stochastic with S_churn > 0: float64 states. sigma_min, sigma_max: None for the path's."""

    steps: Steps = 18
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    rho: Positive = 7.0
    S_churn: NonNegative = 0.0
    S_min: NonNegative = 0.0
    S_max: Unbounded = math.inf
    S_noise: NonNegative = 1.0

    def __post_init__(self) -> None:
        ordered(self.sigma_min, self.sigma_max, "sigma_min, sigma_max")

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        low, high = timesteps.level_range(model.path, *model.t_range())

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model.denoise_ve(x, sigma, **request.cond)

        return self.solve(
            denoise,
            request.randn(),
            num_steps=steps,
            sigma_min=self.sigma_min or low,
            sigma_max=self.sigma_max or high,
            rho=self.rho,
            S_churn=self.S_churn,
            S_min=self.S_min,
            S_max=self.S_max,
            S_noise=self.S_noise,
            noise=request.randn,
            callback=report(request, steps),
        )

    def solve(self, denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, **keywords: Any) -> Tensor:
        return solvers.edm_heun(denoise, latents, **keywords)


@dataclass(kw_only=True)
class EDMAblationSampler(EDMSampler):
    """EDM's generalised sampler (Karras et al. 2022, app. D): any pairing of the choices of table 1.

    solver: euler, or heun of parameter alpha (1: Heun, 0.5: midpoint). discretization: the time steps. schedule:
    sigma(t). scaling: s(t).
    """

    solver: Literal["euler", "heun"] = "heun"
    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm"
    schedule: Literal["vp", "ve", "linear"] = "linear"
    scaling: Literal["vp", "none"] = "none"
    alpha: float = 1.0

    def solve(self, denoise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, **keywords: Any) -> Tensor:
        names = ("solver", "discretization", "schedule", "scaling", "alpha")
        return solvers.edm_ablation(denoise, latents, **{n: getattr(self, n) for n in names}, **keywords)


@dataclass(kw_only=True)
class FlowEulerSampler(GaussianSampler):
    """Euler on the flow (1 - s) x0 + s eps at shifted levels s; networks of other paths are asked at equal noise level.

    shift: SD3's, above 1 spends more steps on noise. stochastic: each step renoises its estimate of x0.
    """

    steps: Steps = 28
    shift: Positive = 1.0
    stochastic: bool = False

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        levels = timesteps.shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64).numpy(), self.shift)
        sigmas = torch.from_numpy(levels)
        cond: dict[str, Any] = request.cond

        def velocity(x: Tensor, i: int) -> Tensor:
            return flow_velocity(model, x, sigmas[i], **cond)

        noise, tell = request.randn if self.stochastic else None, report(request, steps)
        return solvers.flow_euler(
            velocity, request.randn(), sigmas, stochastic=self.stochastic, noise=noise, callback=tell
        )


@dataclass(kw_only=True)
class PCSampler(GaussianSampler):
    """Score-SDE's predictor-corrector: Langevin steps at signal-to-noise ratio `snr` before each step down."""

    steps: Steps = 1000
    predictor: Literal["reverse-diffusion", "ancestral", "none"] = "reverse-diffusion"
    corrector_steps: Blocks = 1
    snr: Positive = 0.16
    grid: Grid | None = None

    def walk(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        times, alphas, sigmas = stops(model, steps, self.grid, need_alpha=True)

        def score(x: Tensor, i: int) -> Tensor:
            return model.predict(x, times[i], "score", **request.cond)

        return solvers.predictor_corrector(
            score,
            request.randn() * sigmas[0],
            alphas,
            sigmas,
            predictor=self.predictor,
            corrector_steps=self.corrector_steps,
            snr=self.snr,
            noise=request.randn,
            callback=report(request, steps),
        )
