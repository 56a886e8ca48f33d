"""Stochastic interpolants: paths, conversions between velocity, score and noise, losses. Ma et al. 2024 (2401.08740).

Behaviour of willisma/SiT@947f95b transport/. Convention of this plugin, opposite to the host's: t = 0 is NOISE, t = 1
is DATA, x_t = alpha(t) x1 + sigma(t) x0. t is (B,) in [0, 1] or already broadcastable to x.
Deviations: a diffusion form is evaluated only when used, "increasing-decreasing" is spelt so, "constant" works, and
sample_eps keeps its default when only train_eps is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.shapes import expand

Prediction = Literal["velocity", "score", "noise"]
Weight = Literal["velocity", "likelihood"]
Form = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]
Network = Callable[[Tensor, Tensor], Tensor]


class Linear:
    """alpha = t, sigma = 1 - t."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and its derivative."""
        return t, torch.ones_like(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma(t) and its derivative."""
        return 1 - t, -torch.ones_like(t)

    def alpha_ratio(self, t: Tensor) -> Tensor:
        """alpha'(t) / alpha(t), in a stable form."""
        return 1 / t

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of the probability flow dx/dt = -a + b score(x, t)."""
        t = expand(t, x)
        ratio, (sigma, d_sigma) = self.alpha_ratio(t), self.sigma(t)
        return -(ratio * x), ratio * sigma**2 - sigma * d_sigma

    def diffusion(self, x: Tensor, t: Tensor, form: str = "sigma", norm: float = 1.0) -> Tensor:
        """The diffusion coefficient w_t of the SDE, chosen freely after training: (B, 1, ...)."""
        t = expand(t, x)
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "SBDM":
            return norm * self.drift(x, t)[1]
        if form == "sigma":
            return norm * self.sigma(t)[0]
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
        if form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t) ** 2
        raise unknown("diffusion form", form, get_args(Form))

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        t = expand(t, x)
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        ratio = alpha / d_alpha
        return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        t = expand(t, x)
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        ratio = alpha / d_alpha
        return (ratio * velocity - x) / (ratio * d_sigma - sigma)

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        a, b = self.drift(x, t)
        return b * score - a

    def data_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The x1 that x and its velocity point to."""
        t = expand(t, x)
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        return (d_sigma * x - sigma * velocity) / (d_sigma * alpha - sigma * d_alpha)

    def plan(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and its velocity u_t, both like x1."""
        t = expand(t, x1)
        (alpha, d_alpha), (sigma, d_sigma) = self.alpha(t), self.sigma(t)
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0


class GVP(Linear):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(t * math.pi / 2), math.pi / 2 * torch.cos(t * math.pi / 2)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t * math.pi / 2), -math.pi / 2 * torch.sin(t * math.pi / 2)

    def alpha_ratio(self, t: Tensor) -> Tensor:
        return math.pi / (2 * torch.tan(t * math.pi / 2))


class VP(Linear):
    """The variance-preserving diffusion with beta from 0.1 (data) to 20 (noise)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.exp(self.log_alpha(t))
        return alpha, alpha * self.alpha_ratio(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        square = torch.exp(2 * self.log_alpha(t))
        sigma = torch.sqrt(1 - square)
        return sigma, square * (2 * self.alpha_ratio(t)) / (-2 * sigma)

    def alpha_ratio(self, t: Tensor) -> Tensor:
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = expand(t, x)
        beta = self.beta_min + (1 - t) * (self.beta_max - self.beta_min)
        return -0.5 * beta * x, beta / 2


PATHS: dict[str, type[Linear]] = {"linear": Linear, "gvp": GVP, "vp": VP}


@dataclass
class Transport:
    """A path, what the network predicts on it, the loss weight, and the ends of time that are left out.

    path: linear | gvp | vp (any case). weight: None, or "velocity" ((b/sigma)^2) or "likelihood" (b/sigma^2) for score
    and noise prediction. train_eps, sample_eps: None for the paper's (1e-5 / 1e-3 on VP; 1e-3 for score and noise on
    the others; velocity on those needs none, whatever is given). VgmError: unknown names.
    """

    path: str = "linear"
    prediction: str = "velocity"
    weight: str | None = None
    train_eps: float | None = None
    sample_eps: float | None = None

    def __post_init__(self) -> None:
        if self.path.lower() not in PATHS:
            raise unknown("path", self.path, PATHS)
        if self.prediction not in ("velocity", "score", "noise"):
            raise unknown("prediction", self.prediction, ("velocity", "score", "noise"))
        if self.weight not in (None, "velocity", "likelihood"):
            raise unknown("loss weight", str(self.weight), ("velocity", "likelihood"))
        self.plan = PATHS[self.path.lower()]()
        vp = isinstance(self.plan, VP)
        if not vp and self.prediction == "velocity":
            self.train_eps = self.sample_eps = 0.0  # stable everywhere
        self.train_eps = (1e-5 if vp else 1e-3) if self.train_eps is None else self.train_eps
        self.sample_eps = 1e-3 if self.sample_eps is None else self.sample_eps

    def interval(
        self,
        train: bool = True,
        sde: bool = False,
        form: str = "SBDM",
        last_step_size: float = 0.0,
        reverse: bool = False,
    ) -> tuple[float, float]:
        """The (t0, t1) that is trained on or integrated over; an SDE's last step goes from t1 to 1."""
        eps = self.train_eps if train else self.sample_eps
        assert eps is not None
        t0, t1 = 0.0, 1.0
        end = 1 - (last_step_size if sde and last_step_size else eps)
        if isinstance(self.plan, VP):
            t1 = end
        elif self.prediction != "velocity" or sde:
            t0 = eps if (form == "SBDM" and sde) or self.prediction != "velocity" else 0.0
            t1 = end
        return (1 - t0, 1 - t1) if reverse else (t0, t1)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The probability flow's drift from the network's output at (x, t)."""
        if self.prediction == "velocity":
            return output
        return self.plan.velocity_from_score(self.score(output, x, t), x, t)

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) from the network's output at (x, t)."""
        if self.prediction == "velocity":
            return self.plan.score_from_velocity(output, x, t)
        return output if self.prediction == "score" else output / -self.plan.sigma(expand(t, x))[0]

    def losses(self, model: Network, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Per-sample losses (B,). x1: data (B, C, ...); x0: noise, like x1; t: (B,). VgmError: the output's shape."""
        x, velocity = self.plan.plan(t, x0, x1)
        output = model(x, t)
        if output.shape != x.shape:
            raise VgmError(
                f"the network gives {tuple(output.shape[1:])} for {tuple(x.shape[1:])}",
                "model.learn_sigma=false, or model.name=sit, which throws the variance half away",
                USAGE,
            )
        if self.prediction == "velocity":
            error = output - velocity
        elif self.prediction == "noise":
            error = output - x0
        else:
            error = output * self.plan.sigma(expand(t, x))[0] + x0
        square = error.float() ** 2
        if self.weight is not None and self.prediction != "velocity":
            _, b = self.plan.drift(x, t)
            sigma, _ = self.plan.sigma(expand(t, x))
            square = square * ((b / sigma) ** 2 if self.weight == "velocity" else b / sigma**2)
        return square.flatten(1).mean(1)


# -- the host's view -------------------------------------------------------------------------------------------------


HOST_PATHS: dict[str, dict[str, Any]] = {  # the same coefficients with the host's time 1 - t
    "linear": {"name": "linear"},
    "gvp": {"name": "cosine"},
    "vp": {"name": "vp", "beta_min": 0.1, "beta_max": 20.0},
}


def view_of(transport: Transport) -> dict[str, Any]:
    """How the host's Denoiser reads a network trained on this transport: the network is told 1 - t, and a velocity is
    the derivative in that time, so minus the host's."""
    prediction = "eps" if transport.prediction == "noise" else transport.prediction
    path = HOST_PATHS[transport.path.lower()]
    return {"name": "denoiser", "path": path, "prediction": prediction, "time": "reversed"}


def transport_of(view: Any, sample_eps: float | None = None) -> Transport:
    """The transport that a Denoiser's network was trained on. VgmError: it was trained on something else."""
    names = {path["name"]: name for name, path in HOST_PATHS.items()}
    scaled = getattr(view, "time_scale", 1.0) != 1.0  # a rectified flow's network is told 999 t
    if getattr(view, "time", None) != "reversed" or scaled or view.path.name not in names:
        raise VgmError("this sampler is for networks trained by flow-matching", "`vgm ls samplers` shows others", USAGE)
    prediction = "noise" if view.prediction == "eps" else view.prediction
    return Transport(names[view.path.name], prediction, sample_eps=sample_eps)
