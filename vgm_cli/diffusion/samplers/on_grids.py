"""Samplers on a grid of the path's own alpha and sigma: DDIM, ancestral, DPM-Solver, UniPC, predictor-corrector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion import solvers
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.path import DiscreteVPPath
from vgm_cli.diffusion.samplers.base import (
    Clip,
    GaussianSampler,
    Grid,
    clip_of,
    grid_of,
    report,
)
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import Blocks, NonNegative, Positive, Steps


@dataclass(kw_only=True)
class DDIMSampler(GaussianSampler):
    """DDIM, eta = 0 deterministic to 1 as noisy as DDPM. clip: see clip_of.

    grid: None is "trailing" timesteps on discrete paths, uniform in t on the others.
    """

    eta: NonNegative = 0.0
    clip: Clip = False
    grid: Grid | None = None

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        grid = self.grid or ("trailing" if isinstance(model.path, DiscreteVPPath) else None)
        times, alphas, sigmas = grid_of(model, steps, grid)

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

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        grid = self.grid or ("trailing" if isinstance(model.path, DiscreteVPPath) else None)
        times, alphas, sigmas = grid_of(model, steps, grid, need_alpha=True)

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

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        data = self.algorithm.endswith("++")
        times, alphas, sigmas = grid_of(model, steps, self.grid, need_alpha=not data)
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

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        times, alphas, sigmas = grid_of(model, steps, self.grid, need_alpha=True)

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
class PCSampler(GaussianSampler):
    """Score-SDE's predictor-corrector: Langevin steps at signal-to-noise ratio `snr` before each step down."""

    steps: Steps = 1000
    predictor: Literal["reverse-diffusion", "ancestral", "none"] = "reverse-diffusion"
    corrector_steps: Blocks = 1
    snr: Positive = 0.16
    grid: Grid | None = None

    def solve(self, model: Denoiser, request: Request, steps: int) -> Tensor:
        times, alphas, sigmas = grid_of(model, steps, self.grid, need_alpha=True)

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
