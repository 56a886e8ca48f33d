"""Easy consistency tuning: a consistency model in discrete time whose steps shrink. Geng et al. 2024 (2406.14548).

What sCM is compared with, as NVlabs/FastGen@34f30e8f has it (fastgen/methods/consistency_model/CM.py). Levels t > r are
sigma / alpha, x (B, ...) is in those coordinates, and a network is a function D(x, sigma (B,)) -> x0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.diffusion.jvp import SameDraws
from vgm_cli.diffusion.solvers.common import slope
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.losses.pseudo_huber import pseudo_huber
from vgm_cli.nn.shapes import along, expand
from vgm_cli.ranges import Count, Decay, NonNegative, Positive

from .view import boundary_of, highest

Network = Callable[[Tensor, Tensor], Tensor]
Weighting = Literal["default", "c_out", "c_out_sq", "sigma_sq", "sqrt", "one"]


def nearer(t: Tensor, ratio: float, least: float = 0.002) -> Tensor:
    """r (B,) = t - t (1 - ratio) (1 + 8 sigmoid(-t)), at least `least`: ratio 0 is data, 1 is t itself."""
    return (t - t * (1 - ratio) * (1 + 8 * torch.sigmoid(-t))).clamp(min=least)


def ratio_at(stage: int, q: float = 2.0, largest: float = 0.999) -> float:
    """1 - q^-(stage + 1): half the way at first, less in every stage."""
    return min(1 - q ** -(stage + 1.0), largest)


def weight_of(kind: Weighting, t: Tensor, r: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(B,) factors on the distance. c_out: over EDM's c_out. VgmError: unknown name."""
    if kind not in get_args(Weighting):
        raise unknown("weighting", kind, get_args(Weighting))
    if kind in ("c_out", "c_out_sq"):
        c_out = t * sigma_data / (t**2 + sigma_data**2).sqrt()
        return 1 / c_out if kind == "c_out" else c_out**-2
    if kind == "sigma_sq":
        return t**-2
    return {"default": 1 / (t - r), "sqrt": (t - r) ** -0.5, "one": torch.ones_like(t)}[kind]


def distances(
    student: Network,
    x0: Tensor,  # (B, ...)
    noise: Tensor,  # (B, ...)
    t: Tensor,  # (B,)
    r: Tensor,  # (B,)
    teacher: Network | None = None,  # x_r by one Euler step of its flow; None: the same x0 and noise
    huber: float = 0.0,  # where the square of the pseudo-Huber distance ends; 0: the plain length
    squared: bool = False,  # the length's square, where huber is 0
) -> tuple[Tensor, Tensor]:
    """Distance (B,), float64, of the estimates at t and at r, the latter without a gradient and with the same dropout;
    and the estimate at t (B, ...)."""
    x = x0 + along(t, x0) * noise
    if teacher is None:
        before = x0 + along(r, x0) * noise
    else:
        with torch.no_grad():
            before = x - along(t - r, x) * slope(x, expand(t.to(x.dtype), x), teacher(x, t))
    replay = SameDraws(x0.device)
    with replay, torch.no_grad():
        wanted = student(before, r)
    with replay:
        got = student(x, t)
    if huber:
        return pseudo_huber(got.double(), wanted.double(), huber), got
    length = torch.linalg.vector_norm((got.double() - wanted.double()).flatten(1), dim=1)
    return length**2 if squared else length, got


class ECT(ObjectiveBase):
    """Consistency distillation with a teacher, consistency training without, at levels that come nearer stage by stage.

    VgmError: unknown names.
    """

    def __init__(
        self,
        model: nn.Module,  # the student
        teacher: Denoiser | None = None,  # distilled; None: from data
        view: dict[str, Any] | None = None,  # how a network without a teacher is asked; None: as EDM's
        distill: bool | None = None,  # x_r by the teacher; None: where there is one. It says how to ask in any case
        P_mean: float = -1.1,  # mean of the logarithm of the level
        P_std: NonNegative = 2.0,  # its deviation
        sigma_min: Positive = 0.002,  # the least level
        sigma_max: Positive = 80.0,  # the largest, at most what the network knows
        stages: Count = 8,  # parts of the run, each halving what is left between r and t
        q: Positive = 2.0,  # in place of halving
        largest: Decay = 0.999,  # the ratio never comes nearer to 1
        weighting: Weighting = "default",  # of the distance, see weight_of
        huber: NonNegative = 1e-8,  # see distances
        squared: bool = False,  # see distances
        guidance_scale: NonNegative | None = None,  # of the teacher; None is 1
    ):
        self.distill = teacher is not None if distill is None else distill
        if self.distill and teacher is None:
            raise VgmError("distill=true needs a teacher", "vgm distill ect --teacher RUN", USAGE)
        config = teacher.config() if teacher is not None else {"path": "edm", "prediction": "F", "time": "edm"}
        plain = Denoiser.from_config(model, {**config, **((view or {}) if teacher is None else {})})
        boundary = boundary_of(plain.prediction)
        ends: dict[str, Any] = {"sigma_min": sigma_min, "sigma_max": sigma_max} if boundary == "skip" else {}
        self.student = FlowMap(
            model, plain, boundary, **ends, guided=self.distill and guidance_scale not in (None, 1.0)
        )
        self.model, self.networks = model, {"model": model}
        self.teacher = teacher if self.distill else None
        if self.teacher is not None and isinstance(self.teacher.network, nn.Module):
            self.networks["teacher"] = self.teacher.network
        self.P_mean, self.P_std = P_mean, P_std
        self.least, self.most = sigma_min, min(sigma_max, highest(self.student))
        self.stages, self.q, self.largest = stages, q, largest
        self.weighting, self.huber, self.squared = weighting, huber, squared
        self.guidance_scale = guidance_scale
        weight_of(weighting, torch.ones(1), torch.zeros(1))

    def ratio(self, step: Step) -> float:
        """How near r is to t in this step."""
        stage = min(step.index * self.stages // max(step.total, 1), self.stages - 1)
        return ratio_at(stage, self.q, self.largest)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the networks. Logs the plain distance and the ratio r / t."""
        x0, cond, null = batch["x"], batch.get("cond", {}), batch.get("null")
        normal = step.randn((len(x0),), "t").double()
        t = (normal * self.P_std + self.P_mean).exp().clamp(2 * self.least, self.most)
        r, noise = nearer(t, self.ratio(step), self.least), step.randn(x0.shape, "noise")

        def taught(x: Tensor, sigma: Tensor) -> Tensor:
            assert self.teacher is not None
            if self.guidance_scale in (None, 1.0) or not cond:
                return self.teacher.denoise_ve(x, sigma, **cond)
            worse = unconditional(self.teacher.network, cond, null)
            return Guidance(float(self.guidance_scale))(self.teacher.denoise_ve, x, sigma, cond, worse)  # type: ignore[arg-type]

        far, _ = distances(
            lambda x, sigma: self.student.denoise_ve(x, sigma, **cond),
            x0,
            noise,
            t,
            r,
            taught if self.teacher is not None else None,
            self.huber,
            self.squared,
        )
        loss = far * weight_of(self.weighting, t, r, self.student.boundary_data)
        return loss.mean().float(), {"distance": far.detach().mean().float(), "ratio": (r / t).mean().float()}

    def view(self) -> dict[str, Any]:
        return self.student.view()
