"""The two objectives: VDM++'s weighted loss of any denoiser, and VDM's variational bound with its learned schedule.

Kingma & Gao, NeurIPS 2023 (arXiv 2303.00848); Kingma et al., NeurIPS 2021 (arXiv 2107.00630), whose official code is
google-research/vdm@dc27b98a. There is no published code of the former.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, LearnsVariance, ObjectiveBase, Phase, Step
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.likelihood import eps_errors, pixel_levels, pixel_nats, prior_nats
from vgm_cli.diffusion.objectives import usual_time
from vgm_cli.diffusion.path import make_path
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.collectives import gather
from vgm_cli.ranges import Count, Decay, Positive, Side, Whole

from .densities import Adaptive, Learned, make_density
from .gamma import Monotone
from .model import VDM
from .process import VDMDenoiser
from .weightings import Weight, make_weight, shift_of

Schedule = Literal["adaptive", "learned", "cosine", "flow", "edm", "linear"]


def weighted_losses(
    model: Denoiser, x: Tensor, l: Tensor, p: Tensor, noise: Tensor, weight: Weight, **cond: Any
) -> tuple[Tensor, Tensor]:
    """w / (2 p) ||eps_hat - eps||^2 of each item at its log-SNR, nats where w = 1, and the squared error: (B,), (B,).

    l, p: (B,), log-SNRs and the density that they were drawn from. Whatever the network predicts, the weight is on eps.
    """
    errors = eps_errors(model, x, model.path.t_of_logsnr(l), noise, **cond)
    return 0.5 * weight(l) / p * errors, errors


class WeightedELBO(ObjectiveBase):
    """1/2 int w(lambda) E||eps_hat - eps||^2 dlambda per dimension, for any denoiser and prediction.

    The weight is always on the error of eps; where noise levels are drawn changes the variance alone. VgmError: unknown
    names, ends the wrong way round or beyond what the path reaches, a network with variance channels.
    """

    def __init__(
        self,
        model: nn.Module,  # the network that is trained: (x, t, **cond) -> like x
        weighting: str | dict[str, Any] = "sigmoid",  # of weightings.WEIGHTINGS, or {name: sigmoid, bias: 1}
        prediction: Literal["eps", "v", "x0", "F", "velocity", "score"] = "v",  # what the network gives
        schedule: Schedule = "adaptive",  # adaptive: by a histogram of the loss; learned: by a monotone network
        logsnr_min: float = -15.0,  # the noisy end of the integral; the paper's is not known
        logsnr_max: float = 15.0,  # the clean end; the paper's is not known
        resolution: Side | None = None,  # of the images: moves weight and fixed schedules by 2 ln(64 / side)
        bins: Count = 100,  # of the adaptive schedule's histogram
        decay: Decay = 0.999,  # of the moving average in each of its bins
        low_discrepancy: bool = True,  # draws are spread evenly over the batch, see Step.stratified
        path: str | dict[str, Any] = "cosine",  # what the network sees at a log-SNR: a name or {"name": ..., options}
        time: str | None = None,  # how the network is told the time, see Denoiser; None: as usual for the path
        time_scale: Positive = 1.0,  # factor on what it is told
        input_scale: str | None = None,  # what it is fed, see Denoiser
        sigma_data: Positive | None = None,  # deviation of the data in F; None: the path's
    ):
        if isinstance(model, LearnsVariance) and model.learn_sigma:
            raise VgmError("this objective trains no variance channels", "model.learn_sigma=false", USAGE)
        reached = make_path(path)
        self.denoiser = Denoiser(
            model,
            reached,
            prediction,
            time=time or usual_time(reached),
            time_scale=time_scale,
            input_scale=input_scale,
            sigma_data=sigma_data,
        )
        shift = shift_of(resolution)
        self.weight = make_weight(weighting, shift)
        self.model, self.networks = model, {"model": model}
        network = None
        if schedule == "learned":
            network = Monotone(-logsnr_max, -logsnr_min, learn_ends=False)
            self.networks["schedule"] = network
        self.density = make_density(schedule, logsnr_min, logsnr_max, shift, bins, decay, network)
        with torch.device("cpu"):  # a recipe is checked on the meta device
            most, least = (float(reached.logsnr(t)) for t in (reached.t_min, reached.t_max))
        if logsnr_min < least - 1e-6 or logsnr_max > most + 1e-6:
            raise VgmError(
                f"the path {reached.name} reaches log-SNRs from {least:.4g} to {most:.4g}, not"
                f" {logsnr_min:g} to {logsnr_max:g}",
                "change objective.logsnr_min and objective.logsnr_max, or take path=cosine",
                USAGE,
            )
        self.low_discrepancy = low_discrepancy
        self.shardable = schedule != "learned"
        self._seen: list[Tensor] = []

    def phases(self) -> list[Phase]:
        return [Phase("main", trains=tuple(self.networks))]

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log-SNRs, densities, and where a learned schedule finds each draw's loss when its gradient comes back."""
        if not isinstance(self.density, Learned):
            return *self.density.draw(u), {}
        found: dict[str, Tensor] = {}
        return *self.density.draw(u, lambda gradient: 2 * found["losses"] * gradient), found

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network. Logs the error of eps, and the variance of one draw's
        loss beside what it would be with the cosine and with a uniform density, estimated from the same draws."""
        x0 = batch["x"]
        u = step.stratified(len(x0), "t") if self.low_discrepancy else step.rand(len(x0), "t")
        l, p, found = self.draw(u)
        noise, dim = step.randn(x0.shape, "noise"), x0[0].numel()
        nats, errors = weighted_losses(self.denoiser, x0, l, p, noise, self.weight, **batch.get("cond", {}))
        losses = nats / dim
        with torch.no_grad():
            found["losses"] = losses.detach()
            values = self.weight(l) * errors / dim
            if isinstance(self.density, Adaptive):
                self._seen.append(torch.stack([l, values.double()], dim=1))
            logs = {"eps_mse": errors.mean() / dim, **self.variances(l, p, values)}
        return losses.mean().float(), logs

    def variances(self, l: Tensor, p: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Var of v / (2 p), relative to the squared mean: under p itself, and under other densities q between the same
        ends by importance weights, E_q[(v / q)^2] = E_p[v^2 / (p q)]."""
        low, high = self.density.low, self.density.high
        mean = (values / p).mean() ** 2
        others = {name: make_density(name, low, high, 0.0, 1, 0.0) for name in ("cosine", "linear")}
        logs = {"variance": (values / p).square().mean() / mean - 1}
        logs |= {f"variance_{n}": (values**2 / (p * q.density(l))).mean() / mean - 1 for n, q in others.items()}
        return logs

    def after_step(self, step: Step) -> None:
        """The whole batch's errors, in its order, move the histogram of every process."""
        if not self._seen:
            return
        assert isinstance(self.density, Adaptive)
        rows = torch.stack(self._seen)  # (micros, B, 2)
        self._seen.clear()
        l, values = gather(rows[None]).transpose(0, 1).reshape(-1, 2).unbind(1)
        self.density.update(l, values)

    def view(self) -> dict[str, Any]:
        return self.denoiser.config()

    def state_dict(self) -> dict[str, Tensor]:
        return self.density.state_dict() if isinstance(self.density, Adaptive) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if isinstance(self.density, Adaptive):
            self.density.load_state_dict(state)
        else:
            super().load_state_dict(state)


class VariationalBound(ObjectiveBase):
    """VDM: bits per dimension of 8-bit images, the schedule and its ends being learned with the network.

    timesteps:  T of the discrete loss; 0 is continuous time.
    antithetic: times are spread evenly over the batch (Step.stratified), not independent.
    minimise:   what moves the schedule between its ends: elbo, whose gradient there is noise around 0 in continuous
                time (the official code), or variance, the square of each draw's diffusion loss (the paper's appendix
                I.2; no public code has it). The ends always follow the bound.
    VgmError: the model is no vdm; `variance` of a schedule that moves its ends.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: Whole = 0,
        antithetic: bool = True,
        minimise: Literal["elbo", "variance"] = "elbo",
    ):
        self.denoiser = VDMDenoiser(model)  # type: ignore[arg-type]  # refuses other networks
        assert isinstance(model, VDM)
        if minimise == "variance" and isinstance(model.gamma, Monotone) and not model.gamma.pinned:
            raise VgmError(
                "a schedule that moves its ends cannot be trained for the variance alone", "model.pinned=true", USAGE
            )
        self.model, self.networks = model, {"model": model}
        self.timesteps, self.antithetic, self.minimise = timesteps, antithetic, minimise

    def parts(
        self, x: Tensor, u: Tensor, noise: Tensor, noise_0: Tensor, variance: bool = False, **cond: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Diffusion, prior and reconstruction terms in nats, (B,) each. x: (B, C, H, W) in [-1, 1]; u: (B,) in [0, 1);
        noise, noise_0: like x, for z_t and z_0. variance: the schedule's shape gets that gradient."""
        found: dict[str, Tensor] = {}
        view, dim = VDMDenoiser(self.model), x[0].numel()
        if variance:
            view.path.tap = lambda gradient: 2 * found["losses"] * gradient
        t, ends = u.double(), torch.tensor([0.0, 1.0], dtype=torch.float64, device=x.device)
        if self.timesteps:
            t = (t * self.timesteps).ceil() / self.timesteps
            gamma, before = (view.path.gamma_of(at)[0] for at in (t, t - 1 / self.timesteps))
            weight = self.timesteps * torch.expm1(gamma - before)
        else:
            weight = view.path.gamma_of(t)[1]
        diffusion = 0.5 * weight * eps_errors(view, x, t, noise, **cond)
        found["losses"] = diffusion.detach() / (dim * math.log(2))
        view.path.tap = None  # the ends follow the bound
        prior = prior_nats(view.path, x, ends[1:], std=1.0)
        return diffusion, prior, pixel_nats(view.path, x, ends[:1], noise_0, pixel_levels(self.model.levels, x.device))

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W) of 8-bit pixels. Logs the parts in bits per dimension, and the schedule's ends."""
        x = batch["x"].float()
        u = step.stratified(len(x), "t") if self.antithetic else step.rand(len(x), "t")
        draws = step.randn(x.shape, "noise"), step.randn(x.shape, "noise_0")
        parts = self.parts(x, u, *draws, variance=self.minimise == "variance")
        diffusion, prior, reconstruction = (p.mean().float() / (x[0].numel() * math.log(2)) for p in parts)
        ends = self.model.gamma(torch.tensor([0.0, 1.0], device=x.device))[0].detach()
        logs = {"diffusion": diffusion, "prior": prior, "reconstruction": reconstruction}
        return diffusion + prior + reconstruction, {
            **{k: v.detach() for k, v in logs.items()},
            "gamma_0": ends[0],
            "gamma_1": ends[1],
        }

    def view(self) -> dict[str, Any]:
        return self.denoiser.config()
