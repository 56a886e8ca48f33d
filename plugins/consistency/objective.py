"""Consistency distillation (CD), consistency training (CT, iCT) and progressive distillation.

Song et al. 2023 (2303.01469), alg. 2, 3; Song & Dhariwal 2023 (2310.14189). Order of a step (loss, optimizer, target)
and its schedules: openai/consistency_models@e32b69e cm/train_util.py. The target is not an average for evaluation:
those are the recipe's `train.ema`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step
from vgm_cli.conditioning import Conditions
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance, guided_teacher
from vgm_cli.diffusion.timesteps import level_range
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.precision import full_precision
from vgm_cli.ranges import Count, Fraction, NonNegative, Positive, Width, ordered

from .function import RHO, SIGMA_MAX, SIGMA_MIN, edm_view, level_of
from .losses import Distance, Weighting, consistency_loss, distance, piq_like, progressive_loss, weight_of
from .schedules import ScaleMode, TargetMode, draw_pairs, scales, target_ema


class Consistency(ObjectiveBase):
    """With a teacher its distillation, without one training from data.

    VgmError: parts that do not go together.
    """

    def __init__(
        self,
        model: nn.Module,  # the student
        teacher: Denoiser | None = None,  # distilled; None: training from data
        lpips: nn.Module | None = None,  # role of the perceptual distance
        conditions: Conditions | None = None,  # what the networks are told
        mode: Literal["cd", "ct", "progdist"] | None = None,  # None: cd with a teacher, ct without
        solver: Literal["heun", "euler"] = "heun",  # of the teacher's ODE step
        guidance_scale: NonNegative | None = None,  # of the teacher; None is 1
        view: dict[str, Any] | None = None,  # how a network without a teacher is asked; None: as the official ones
        scale_mode: ScaleMode = "fixed",  # how the number of levels grows, see schedules.scales
        start_scales: Width = 40,  # levels at first
        end_scales: Width = 40,  # levels at last
        total_steps: Count | None = None,  # over which they grow; None: the run's
        steps_per_stage: Count = 50_000,  # of progressive distillation and iCT
        target: TargetMode = "fixed",  # which weights the target has, see schedules.target_ema
        target_decay: Fraction = 0.95,  # of the target's average at first
        distance: Distance = "l2",  # lpips needs the role of that name
        weighting: Weighting = "uniform",  # of the levels, see losses
        huber_c: Positive | None = None,  # of pseudo-huber; None: iCT's
        time_sampling: Literal["uniform", "lognormal"] = "uniform",  # of neighbouring levels; lognormal: iCT's
        P_mean: float = -1.1,  # of ln sigma, for lognormal
        P_std: NonNegative = 2.0,  # of ln sigma, for lognormal
        sigma_min: Positive | None = None,  # None: 0.002, or the teacher's where that is above
        sigma_max: Positive | None = None,  # None: 80, or the teacher's where that is below
        rho: Positive = RHO,  # of the levels
        sigma_data: Positive | None = None,  # of the boundary scalings; None: the view's
    ):
        ordered(sigma_min, sigma_max, "sigma_min, sigma_max")
        self.mode = mode or ("ct" if teacher is None else "cd")
        if (teacher is None) != (self.mode == "ct"):
            raise VgmError(f"mode={self.mode} {'needs a' if teacher is None else 'has no'} teacher", code=USAGE)
        if distance == "lpips" and lpips is None:
            hint = "roles.lpips={name: lpips, vgg: FILE, heads: FILE}, or objective.distance=l2"
            raise VgmError("distance=lpips needs the role lpips", hint, USAGE)
        if (scale_mode == "progdist") != (self.mode == "progdist"):
            raise VgmError("mode=progdist and scale_mode=progdist go together", code=USAGE)
        if start_scales < 2 or end_scales < start_scales - (scale_mode == "progdist") * start_scales:
            raise VgmError(f"start_scales={start_scales}, end_scales={end_scales}: 2 <= start <= end", code=USAGE)
        target_ema(target, scale_mode, 0, 1, target_decay, start_scales, end_scales)
        self.model, self.networks = model, {"model": model}
        config = teacher.config() if teacher is not None else edm_view() | (view or {})
        with torch.device("cpu"):  # numbers, also when the networks are built without memory
            known = Denoiser.from_config(model, config)
            low, high = level_range(known.path, *known.t_range())
        self.sigma_min = max(low, SIGMA_MIN) if sigma_min is None else sigma_min
        self.sigma_max = min(high, SIGMA_MAX) if sigma_max is None else sigma_max
        self.rho = rho
        ends: dict[str, Any] = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "sigma_data": sigma_data}
        self.student = FlowMap(model, config, "skip", **ends)
        self.target_mode, self.target_decay = target, target_decay
        self.copy = None
        if self.mode != "progdist" and target != "none":
            self.copy = copy.deepcopy(model).requires_grad_(False)
        self.target = self.student if self.copy is None else FlowMap(self.copy, config, "skip", **ends)
        self.plain, self.teacher, self.own_teacher = known, teacher, None
        if teacher is not None:
            assert isinstance(teacher.network, nn.Module)
            self.networks["teacher"] = teacher.network
            if self.mode == "progdist":
                self.own_teacher = teacher.network
            else:
                self.teacher = guided_teacher(teacher, guidance_scale, conditions)
        self.solver, self.distance, self.weighting = solver, distance, weighting
        self.lpips, self.huber_c = lpips, huber_c
        self.perceptual = None if lpips is None else piq_like(lpips)
        self.scale_mode, self.start_scales, self.end_scales = scale_mode, start_scales, end_scales
        self.total_steps, self.steps_per_stage = total_steps, steps_per_stage
        self.time_sampling, self.P_mean, self.P_std = time_sampling, P_mean, P_std

    def to(self, device: torch.device) -> None:
        """Move what is not among the networks, in the student's memory format."""
        for network in (self.copy, self.lpips):
            if network is not None:
                network.to(device)
        formats = {p.is_contiguous(memory_format=torch.channels_last) for p in self.model.parameters() if p.ndim == 4}
        if self.copy is not None and formats == {True}:
            self.copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def count(self, index: int, total: int) -> int:
        """N(k): the number of noise levels at step `index` of `total`."""
        total = self.total_steps or max(total, 1)
        return scales(
            self.scale_mode, min(index, total), total, self.start_scales, self.end_scales, self.steps_per_stage
        )

    def level(self, index: Tensor, count: int) -> Tensor:
        """(B,) float64 levels of descending indices."""
        return level_of(index, count, self.sigma_min, self.sigma_max, self.rho)

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the networks. Logs the distance before its weight, and N.

        Without half precision where the network predicts eps or the score: its x0 is off by sigma times the rounding.
        """
        sensitive = self.plain.prediction in ("eps", "score")
        with full_precision(batch["x"].device) if sensitive else nullcontext():
            return self.loss_of(batch, step)

    def loss_of(self, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        x0, cond, n = batch["x"], batch.get("cond", {}), self.count(step.index, step.total)
        noise, uniform = step.randn(x0.shape, "noise"), step.rand(len(x0), "level")
        sigma_data = self.student.boundary_data
        if isinstance(self.teacher, ClassifierFreeGuidance):
            self.teacher.null = batch.get("null")

        def measure(a: Tensor, b: Tensor) -> Tensor:
            return distance(self.distance, a, b, self.perceptual, self.huber_c)

        if self.mode == "progdist":
            assert self.teacher is not None
            i = draw_pairs(uniform, n + 1)
            t, t2, t3 = (self.level(i + shift, n + 1) for shift in (0, 0.5, 1))
            far = progressive_loss(
                self.plain.denoise_ve, self.teacher.denoise_ve, x0, noise, (t, t2, t3), measure, **cond
            )
        else:
            ascending = None
            if self.time_sampling == "lognormal":
                ascending = self.level(torch.arange(n - 1, -1, -1, device=x0.device), n)
            i = draw_pairs(uniform, n, ascending, self.P_mean, self.P_std)
            t, t2 = self.level(i, n), self.level(i + 1, n)
            if self.copy is not None:
                self.copy.train(self.model.training)
            far = consistency_loss(
                self.student.denoise_ve,
                self.target.denoise_ve,
                x0,
                noise,
                t,
                t2,
                None if self.mode == "ct" else self.teacher.denoise_ve,  # type: ignore[union-attr]
                self.solver == "heun",
                measure,
                **cond,
            )
        loss = far * weight_of(self.weighting, t, t2, sigma_data).float()
        return loss.mean(), {"distance": far.detach().mean(), "scales": torch.tensor(float(n))}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """The target follows the student; a student of progressive distillation becomes the next teacher."""
        total = self.total_steps or max(step.total, 1)
        if self.copy is not None:
            mu = target_ema(
                self.target_mode, self.scale_mode, min(step.index, total), total, self.target_decay,
                self.start_scales, self.end_scales,
            )  # fmt: skip
            torch._foreach_lerp_(list(self.copy.parameters()), list(self.model.parameters()), 1 - mu)
            for own, new in zip(self.copy.buffers(), self.model.buffers()):
                own.copy_(new)
        if self.own_teacher is not None and self.count(step.index + 1, total) < self.count(step.index, total):
            self.own_teacher.load_state_dict(self.model.state_dict())

    def view(self) -> dict[str, Any]:
        return self.plain.config() if self.mode == "progdist" else self.student.view()

    def state_dict(self) -> dict[str, Tensor]:
        kept = self.copy if self.copy is not None else self.own_teacher
        return {} if kept is None else {f"target.{k}": v for k, v in kept.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        kept = self.copy if self.copy is not None else self.own_teacher
        if kept is not None:
            kept.load_state_dict({k.removeprefix("target."): v for k, v in state.items()})
