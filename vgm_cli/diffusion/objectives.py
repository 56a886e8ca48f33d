"""One denoising objective for every Gaussian path, prediction, loss weight and distribution of times.

The loss is w(lambda) times a squared error (Kingma & Gao 2023, 2303.00848); schedule and prediction change only where
training looks and what the network outputs. Configurations of it: DDPM's simple loss (vp-discrete, eps, uniform), v
(Salimans & Ho 2022), min-SNR-5 (Hang et al. 2023, 2303.09556), VDM++'s sigmoid, EDM (edm, F, edm, edm-lognormal),
flow matching with SD3's logit-normal times (linear, velocity, uniform, logit-normal).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.diffusion.denoiser import Denoiser, affine, x0_from
from vgm_cli.diffusion.path import DiscreteVPPath, EDMPath, Path, make_path
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nn.shapes import expand
from vgm_cli.ranges import NonNegative, Positive

Weighting = Literal["uniform", "x0", "eps", "v", "velocity", "snr", "min-snr-5", "edm", "sigmoid"]
TimeSampling = Literal["uniform", "logit-normal", "edm-lognormal", "cosine", "logsnr"]


def target_of(kind: str, path: Path, x0: Tensor, noise: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """What a perfect network of that kind would output: x0, noise (B, ...), t (B,) -> (B, ...), float64."""
    x0, noise = x0.double(), noise.double()
    alpha, sigma = expand(path.alpha(t), x0), expand(path.sigma(t), x0)
    if kind == "x0":
        return x0
    if kind == "eps":
        return noise
    if kind == "score":
        return -noise / sigma
    if kind == "v":
        return alpha * noise - sigma * x0
    if kind == "velocity":
        return expand(path.alpha_prime(t), x0) * x0 + expand(path.sigma_prime(t), x0) * noise
    skip, out = (expand(c, x0) for c in x0_from(kind, path, t, sigma_data))
    return (x0 - skip * (alpha * x0 + sigma * noise)) / out


def weight_of(weighting: str, model: Denoiser, t: Tensor, sigmoid_bias: float = 2.0) -> Tensor | None:
    """Factor on the squared error of the network's own prediction: t (B,) float64 -> (B,); None for 1.

    uniform: none, the network's own space. x0, eps, v, velocity: as if the error were measured there. snr, min-snr-5,
    edm: SNR, min(SNR, 5), EDM's (s^2 + sd^2) / (s sd)^2 times the error of x0. sigmoid: VDM++'s sigmoid(bias - lambda)
    times the error of eps. VgmError: unknown name.
    """
    if weighting not in get_args(Weighting):
        raise unknown("weighting", weighting, get_args(Weighting))
    if weighting in ("uniform", model.prediction):
        return None
    path, sigma_data = model.path, model.sigma_data

    def error_in(kind: str) -> Tensor:
        return affine(model.prediction, kind, path, t, sigma_data)[1] ** 2

    if weighting in ("x0", "eps", "v", "velocity"):
        return error_in(weighting)
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    if weighting == "snr":
        return error_in("eps")
    if weighting == "sigmoid":
        return torch.sigmoid(sigmoid_bias - path.logsnr(t)) * error_in("eps")
    if weighting == "edm":
        return error_in("F")
    return snr.clamp(max=5.0) * error_in("x0")


def output_and_target(model: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
    """What the network gives for x0 (B, ...) noised to host times t (B,), and what a perfect one would: like x0.

    VgmError: the network's output has another shape.
    """
    t = t.double()
    x_t = model.path.add_noise(x0.double(), noise.double(), t).to(x0.dtype)
    output = model.raw(x_t, t, **cond)
    if output.shape != x_t.shape:
        raise VgmError(
            f"the network gives {tuple(output.shape[1:])} for {tuple(x_t.shape[1:])}", "learn_sigma=false", USAGE
        )
    target = target_of(model.prediction, model.path, x0, noise, t, model.sigma_data)
    return output, -target if model.prediction == "velocity" and model.time == "reversed" else target


def gaussian_losses(
    model: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, weighting: str = "uniform", **cond: Any
) -> tuple[Tensor, Tensor]:
    """Weighted and plain mean squared error of the network's prediction, per item: (B,), (B,).

    x0, noise: (B, ...), t: (B,) host times. VgmError: the network's output has another shape.
    """
    output, target = output_and_target(model, x0, t, noise, **cond)
    plain = (output.float() - target.float()).square().flatten(1).mean(1)
    weight = weight_of(weighting, model, t.double())
    return plain if weight is None else plain * weight.float(), plain


def usual_time(path: Path) -> str:
    """What networks on a path are usually told: Denoiser's `time`."""
    usual: Mapping[type[Path], str] = {DiscreteVPPath: "index", EDMPath: "edm"}
    return usual.get(type(path), "unit")


class GaussianObjective(ObjectiveBase):
    """Denoising on any path. VgmError: unknown names."""

    shardable = True

    def __init__(
        self,
        model: nn.Module,  # the network that is trained: (x, t, y) -> like x
        path: str | dict[str, Any] = "vp-discrete",  # a name or {"name": ..., options}
        prediction: Literal["eps", "x0", "v", "velocity", "score", "F"] = "eps",  # what the network gives
        weighting: Weighting = "uniform",  # of the noise levels, see weight_of
        time_sampling: TimeSampling = "uniform",  # how noise levels are drawn, see `times`
        time: str | None = None,  # how the network is told the time, see Denoiser; None: as usual for the path
        time_scale: Positive = 1.0,  # factor on what it is told
        input_scale: str | None = None,  # what it is fed, see Denoiser
        sigma_data: Positive | None = None,  # deviation of the data in F; None: the path's
        time_mean: float | None = None,  # of the normal draw; None: 0, of edm-lognormal -1.2
        time_std: NonNegative | None = None,  # of the normal draw; None: 1, of edm-lognormal 1.2
    ):
        if time_sampling not in get_args(TimeSampling):
            raise unknown("time sampling", time_sampling, get_args(TimeSampling))
        self.path = make_path(path)
        time = time or usual_time(self.path)
        keywords: dict[str, Any] = {"time": time, "time_scale": time_scale, "sigma_data": sigma_data}
        self.denoiser = Denoiser(model, self.path, prediction, input_scale=input_scale, **keywords)
        self.model, self.networks = model, {"model": model}
        self.weighting, self.time_sampling = weighting, time_sampling
        edm = time_sampling == "edm-lognormal"
        self.time_mean = (-1.2 if edm else 0.0) if time_mean is None else time_mean
        self.time_std = (1.2 if edm else 1.0) if time_std is None else time_std
        weight_of(weighting, self.denoiser, torch.tensor([0.5 * self.path.t_max], dtype=torch.float64))

    def times(self, n: int, step: Step) -> Tensor:
        """Host times (n,) float64, within the ends that the prediction allows.

        uniform: in t (in the index on discrete paths). logit-normal: t is the sigmoid of a normal draw. edm-lognormal:
        sigma / alpha is its exponential. cosine: the log-SNR of the cosine schedule. logsnr: uniform log-SNR between
        the path's ends, at most +-20.
        """
        low, high = self.denoiser.t_range()
        if self.time_sampling in ("logit-normal", "edm-lognormal"):
            normal = step.randn((n,), "t").double() * self.time_std + self.time_mean
            t = torch.sigmoid(normal) if self.time_sampling == "logit-normal" else self.path.t_of_ve_sigma(normal.exp())
            return t if isinstance(self.path, EDMPath) else t.clamp(low, high)
        u = step.rand(n, "t").double()
        if self.time_sampling == "cosine":
            return self.path.t_of_logsnr(-2 * torch.tan(math.pi / 2 * u.clamp(1e-4, 1 - 1e-4)).log()).clamp(low, high)
        if self.time_sampling == "logsnr":
            first, last = (float(self.path.logsnr(t).clamp(-20, 20)) for t in (low, high))
            return self.path.t_of_logsnr(first + u * (last - first)).clamp(low, high)
        if isinstance(self.path, DiscreteVPPath):
            return self.path.t_of_timestep((u * self.path.steps).floor().clamp(max=self.path.steps - 1))
        return low + u * (high - low)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network. Logs the unweighted error as mse."""
        x0 = batch["x"]
        t, noise = self.times(len(x0), step), step.randn(x0.shape, "noise")
        losses, plain = gaussian_losses(self.denoiser, x0, t, noise, self.weighting, **batch.get("cond", {}))
        return losses.mean(), {"mse": plain.detach().mean()}

    def view(self) -> dict[str, Any]:
        return self.denoiser.config()
