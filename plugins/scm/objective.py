"""sCM's objectives: consistency models in continuous time, from a teacher (sCD) or from data (sCT), and the diffusion
training before them. Lu & Song 2025 (2410.11081); there is no official code.

The two public codes are options: NVlabs/FastGen@34f30e8f (preset fastgen) and xandergos/sCM-mnist@2d285393 (preset
mnist); docs/papers/scm.md says where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Phase, Step, TwoTimes
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import Boundary, FlowMap
from vgm_cli.diffusion.guidance import Guidance
from vgm_cli.diffusion.objectives import target_of
from vgm_cli.diffusion.path import TrigPath
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.copying import copy_and_tell
from vgm_cli.ranges import Count, NonNegative, Positive, Whole

from .edm2 import EDM2UNet
from .losses import Tangent, bounded, moved, moved_by_differences, norms, tangent, times_of, weighted
from .view import GuidedStudent, boundary_of, last_time, own_time
from .weight import Head, KnowsError

FIRST = 1e-3  # the earliest time drawn: networks of other predictions give F as a difference over sin(t)
STEEP = 30.0  # dF/dt of a value, root mean square; in training that goes well it stays below 1
EXPLODING = (
    f"the derivative is above {STEEP:g}: training is about to diverge; see Traps in docs/papers/scm.md "
    "(train.precision=fp32, objective.warmup, a network with double normalisation)"
)
LEVELS = {"low": 0.05, "mid": 0.5, "high": 5.0}  # noise levels over sigma_data at which the weight is logged


class OnTrigFlow(ObjectiveBase):
    """What both objectives share: the draws of times, the adaptive weight, a learning rate that falls as EDM2's."""

    forward_mode = True

    def __init__(
        self,
        model: nn.Module,  # the network that is trained
        view: Denoiser,  # the same, as it is asked
        sigma_data: float,  # deviation of the data
        P_mean: float,  # mean of the logarithm of the noise level
        P_std: float,  # its deviation
        weight: Literal["learned", "none"],  # the adaptive weight e^w
        decay_after: int | None,  # step from which the learning rate falls as 1 / sqrt; None: it does not
    ):
        self.model, self.student = model, view
        self.networks: dict[str, nn.Module] = {"model": model}
        self.trig, self.sigma_data = TrigPath(sigma_data), sigma_data
        self.P_mean, self.P_std, self.decay_after = P_mean, P_std, decay_after
        self.last = last_time(view, sigma_data)
        self.learned = weight == "learned"
        self.head = None
        if self.learned and isinstance(model, KnowsError):
            model.reset_log_variance()
        elif self.learned:
            self.head = self.networks["weight"] = Head()
        if isinstance(model, EDM2UNet):
            model.forces_weights = False

    def phases(self) -> list[Phase]:
        return [Phase("main", trains=("model", "weight") if self.head is not None else ("model",))]

    def schedule(self, step: Step) -> Mapping[str, Mapping[str, float]]:
        """1 / sqrt(step / decay_after) from that step on (Karras et al. 2024, eq. 67)."""
        if self.decay_after is None or step.index <= self.decay_after:
            return {}
        return {"main": {"lr": (self.decay_after / step.index) ** 0.5}}

    def times(self, normal: Tensor) -> Tensor:
        """t (B,) float64 of standard normal draws (B,)."""
        return times_of(normal.double(), self.P_mean, self.P_std, self.sigma_data).clamp(FIRST, self.last)

    def F(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The trained network as TrigFlow's: x (B, ...) on that path, t (B,) -> (B, ...)."""
        return self.student.predict_beside(self.trig, x, t, "trig", **cond)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and dx/dt = cos(t) z - sin(t) x0 of the straight way from x0 to z = sigma_data noise: (B, ...) both."""
        x = self.trig.add_noise(x0.double(), noise.double(), t).to(x0.dtype)
        return x, target_of("velocity", self.trig, x0, noise, t, self.sigma_data).to(x0.dtype)

    def log_weight(self, t: Tensor) -> Tensor:
        """w (B,) at TrigFlow times (B,); 0 where nothing is learned."""
        if self.head is not None:
            return self.head(t)
        if self.learned and isinstance(self.model, KnowsError):
            return -self.model.log_variance(self.student.time_argument(own_time(self.student, t, self.sigma_data)))
        return torch.zeros_like(t)

    @torch.no_grad()
    def curve(self, like: Tensor) -> dict[str, Tensor]:
        """The weight at a low, a middle and a high noise level, to be logged."""
        levels = torch.tensor(list(LEVELS.values()), dtype=torch.float64, device=like.device)
        return {f"w_{name}": w for name, w in zip(LEVELS, self.log_weight(levels.atan().clamp(max=self.last)))}

    def before(self) -> None:
        """EDM2's weights are brought to unit length before they are used."""
        if isinstance(self.model, EDM2UNet) and self.model.training:
            self.model.normalise_weights()


class TrigFlow(OnTrigFlow):
    """Diffusion training: e^w |F - (cos(t) z - sin(t) x0) / sigma_data|^2 - w, of a network on TrigFlow's path."""

    forward_mode = False

    def __init__(
        self,
        model: nn.Module,  # F(x (B, C, H, W) of unit deviation, t (B,), **cond), which is trained
        sigma_data: Positive = 0.5,  # deviation of the data
        P_mean: float = -1.0,  # mean of the logarithm of the noise level
        P_std: NonNegative = 1.4,  # its deviation
        weight: Literal["learned", "none"] = "learned",  # the adaptive weight e^w
        decay_after: Count | None = None,  # step from which the learning rate falls as 1 / sqrt; None: it does not
    ):
        path = {"name": "trig", "sigma_data": sigma_data}
        super().__init__(model, Denoiser(model, path, "trig"), sigma_data, P_mean, P_std, weight, decay_after)

    def losses(self, x0: Tensor, noise: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The weighted and the plain error of each item: (B,), (B,). x0, noise: (B, ...), t: (B,)."""
        x, slope = self.noised(x0, noise, t)
        error = (self.F(x, t, **cond).float() - slope / self.sigma_data).square().flatten(1).mean(1)
        w = self.log_weight(t)
        return w.exp() * error - w, error

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network. Logs the plain error and the weight's curve."""
        self.before()
        x0 = batch["x"]
        t, noise = self.times(step.randn((len(x0),), "t")), step.randn(x0.shape, "noise")
        losses, error = self.losses(x0, noise, t, **batch.get("cond", {}))
        return losses.mean().float(), {"mse": error.detach().mean(), **self.curve(x0)}

    def view(self) -> dict[str, Any]:
        return self.student.config()


class SCM(OnTrigFlow):
    """A consistency model in continuous time: F moves by its tangent, the derivative of its own estimate of x0 along a
    teacher's flow (sCD) or along straight ways from data to noise (sCT).

    The student is a copy of any diffusion or flow network, asked on its own path at equal noise level. VgmError: parts
    that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,  # the student
        teacher: Denoiser | None = None,  # distilled, or whose weights training from data starts from; None: from data
        mode: Literal["scd", "sct"] | None = None,  # None: scd with a teacher, sct without
        view: dict[str, Any] | None = None,  # how a network without a teacher is asked; None: on TrigFlow's path
        sigma_data: Positive | None = None,  # deviation of the data; None, or where the network has its own: that
        P_mean: float = -1.0,  # mean of the logarithm of the noise level
        P_std: NonNegative = 1.4,  # its deviation
        warmup: Whole = 10_000,  # steps over which the second part of the tangent grows to its full weight
        tangent: Tangent = "normalise",  # divided by its length, by its root mean square (rms), or cut off (clip)
        c: NonNegative = 0.1,  # added to that length
        weight: Literal["learned", "none"] = "learned",  # the adaptive weight e^w
        prior: bool = False,  # the loss over the noise level once more, as FastGen does
        divide: bool = False,  # the loss over the number of values once more, as FastGen does
        derivative: Literal["joint", "alone", "differences"] = "alone",  # see losses.moved, moved_by_differences
        difference: Positive = 1e-3,  # of times, relative to t, for derivative=differences
        boundary: Boundary | None = None,  # what makes the student the identity without noise; None: see boundary_of
        guidance_scale: NonNegative | None = None,  # of the teacher; None is 1
        guidance_range: tuple[NonNegative, NonNegative] | None = None,  # scales that the student is told, instead
        decay_after: Count | None = None,  # step from which the learning rate falls as 1 / sqrt; None: it does not
    ):
        self.mode = mode or ("sct" if teacher is None else "scd")
        if self.mode == "scd" and teacher is None:
            raise VgmError("mode=scd needs a teacher", "vgm distill scm --teacher RUN, or objective.mode=sct", USAGE)
        if guidance_range is not None and self.mode == "sct":
            raise VgmError("training from data is not guided", "objective.guidance_range=null", USAGE)
        if guidance_range is not None and guidance_range[0] > guidance_range[1]:
            raise VgmError(f"guidance_range={list(guidance_range)} is the wrong way round", code=USAGE)
        tells = isinstance(model, TwoTimes) and model.second_time
        if tells != (guidance_range is not None):
            hint = "model.second_time=true and objective.guidance_range=[1, 2] go together"
            raise VgmError("a student is told its guidance scale where it is trained for several", hint, USAGE)
        config: dict[str, Any] = dict(view or {"path": "trig", "prediction": "trig"})
        if teacher is not None:
            config = teacher.config()
            if tells and isinstance(teacher.network, nn.Module):
                copy_and_tell(teacher.network, model)
        plain = Denoiser.from_config(model, config)
        fixed = plain.prediction in ("F", "trig")  # what such a network gives depends on it
        deviation = plain.sigma_data if fixed or sigma_data is None else sigma_data
        plain = Denoiser.from_config(model, {**config, "sigma_data": deviation})
        boundary = boundary or boundary_of(plain.prediction)
        ends: dict[str, Any] = {"sigma_data": deviation} if boundary == "skip" else {}
        if guidance_range is not None:
            middle = sum(guidance_range) / 2
            student: FlowMap = GuidedStudent(model, plain, boundary, **ends, scale=middle, scales=guidance_range)
        else:
            guided = guidance_scale not in (None, 1.0) and self.mode == "scd"
            student = FlowMap(model, plain, boundary, **ends, guided=guided)
        super().__init__(model, student, deviation, P_mean, P_std, weight, decay_after)
        self.teacher = teacher if self.mode == "scd" else None
        if self.teacher is not None and isinstance(self.teacher.network, nn.Module):
            self.networks["teacher"] = self.teacher.network
            self.last = min(self.last, last_time(self.teacher, deviation))
        self.warmup, self.tangent, self.c = warmup, tangent, c
        self.prior, self.divide, self.derivative, self.difference = prior, divide, derivative, difference
        self.guidance_scale, self.guidance_range = guidance_scale, guidance_range

    def rate(self, index: int) -> float:
        """r of the tangent's second part at step `index`."""
        return min(1.0, index / self.warmup) if self.warmup else 1.0

    @torch.no_grad()
    def slope(
        self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor], null: Mapping[str, Tensor] | None, scale: Tensor | None
    ) -> Tensor:
        """dx/dt (B, ...) of the teacher's flow, guided by scale (B,) where there is one."""
        assert self.teacher is not None
        teacher = self.teacher

        def flow(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            return self.sigma_data * teacher.predict_beside(self.trig, x, t, "trig", **cond)

        if scale is None or not cond:
            return flow(x, t, **cond)
        return Guidance(scale)(flow, x, t, cond, unconditional(teacher.network, cond, null))

    def terms(
        self,
        x0: Tensor,  # (B, ...) data
        noise: Tensor,  # (B, ...)
        t: Tensor,  # (B,)
        r: float,  # weight of the tangent's second part
        cond: Mapping[str, Tensor],  # keywords of the network
        null: Mapping[str, Tensor] | None = None,  # no condition, where the network does not say
        scale: Tensor | None = None,  # (B,) guidance scales
    ) -> dict[str, Tensor]:
        """F, its derivative, dx/dt and the tangent g before it is bounded: (B, ...) each."""
        x, slope = self.noised(x0, noise, t)
        if self.mode == "scd":
            slope = self.slope(x, t, cond, null, scale).to(x.dtype)
        told = {} if scale is None or self.guidance_range is None else {"guidance": scale}

        def F(x: Tensor, t: Tensor) -> Tensor:
            return self.F(x, t, **cond, **told)

        if self.derivative == "differences":
            value, derivative = moved_by_differences(F, x, x0, noise, t, self.trig, self.difference)
        else:
            value, derivative = moved(F, x, t, slope, self.derivative == "joint")
        g = tangent(value, slope, x, derivative, t, r, self.sigma_data)
        return {"x": x, "slope": slope, "F": value, "derivative": derivative, "g": g}

    def losses(self, F: Tensor, g: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the plain error of each item from F and its raw tangent g (B, ...): (B,), (B,)."""
        prior = 1 / (self.sigma_data * t.tan()) if self.prior else None
        return weighted(F, bounded(g, self.tangent, self.c), self.log_weight(t), prior, self.divide)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network. The loss says nothing of how good the network is: watch
        the tangent's length (its mean and its largest), its derivative's root mean square, and the weight."""
        self.before()
        x0 = batch["x"]
        t, noise = self.times(step.randn((len(x0),), "t")), step.randn(x0.shape, "noise")
        scale = None
        if self.guidance_range is not None:
            low, high = self.guidance_range
            scale = low + (high - low) * step.rand(len(x0), "guidance")
        elif self.guidance_scale not in (None, 1.0):
            scale = torch.full((len(x0),), float(self.guidance_scale), device=x0.device)  # type: ignore[arg-type]
        made = self.terms(x0, noise, t, self.rate(step.index), batch.get("cond", {}), batch.get("null"), scale)
        losses, error = self.losses(made["F"], made["g"], t)
        length = norms(made["g"], "rms" if self.tangent == "rms" else "normalise")
        logs = {
            "tangent": length.mean(),
            "tangent_max": length.max(),
            "derivative": made["derivative"].double().square().mean().sqrt(),
            "error": error.detach().mean(),
            **self.curve(x0),
        }
        if self.tangent == "clip":
            logs["clipped"] = (made["g"].abs() > 1).double().mean()
        return losses.mean().float(), {k: v.detach().float() for k, v in logs.items()}

    def remark(self, row: Mapping[str, float]) -> str | None:
        return EXPLODING if row.get("derivative", 0.0) > STEEP else None

    def view(self) -> dict[str, Any]:
        assert isinstance(self.student, FlowMap)
        return self.student.view()
