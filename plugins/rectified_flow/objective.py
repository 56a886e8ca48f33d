"""Training of rectified flows: the first one, reflow, distillation. Liu, Gong & Liu 2023 (2209.03003), sec. 2, alg. 1.

Behaviour of gnobitab/RectifiedFlow@5a1fd4d ImageGeneration/{losses,run_lib_reflow}.py. Deviations: pairs may be
conditional and guided; stored pairs are drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step, send
from vgm_cli.conditioning import Conditions
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.guidance import ClassifierFreeGuidance
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import NonNegative, Positive, Steps

from .flow import EPS, Loss, Schedule, Velocity, euler, flow_losses, times
from .pairs import Pairs, Part, read_pairs


def velocity_of(view: Denoiser, **cond: Tensor) -> Velocity:
    """A host view of any network, in this plugin's time and direction."""
    return lambda x, t: -view.predict(x, 1 - t.double(), "velocity", **cond)


class RectifiedFlow(ObjectiveBase):
    """Regression on x1 - z0 along the line between noise z0 and data x1.

    The pairs are independent, unless the batch couples them by "z0". noise_scale: standard deviation of z0. eps: time
    left out at the noise. reduce_mean: mean over an image (all published runs), false: half the sum. time_scale: the
    network is told time_scale * t.
    """

    def __init__(
        self,
        model: nn.Module,
        noise_scale: Positive = 1.0,
        eps: NonNegative = EPS,
        reduce_mean: bool = True,
        time_scale: Positive = 999.0,
    ):
        if not 0 < eps < 1:
            raise VgmError(f"eps={eps} is not between 0 and 1", code=USAGE)
        self.model, self.networks = model, {"model": model}
        self.noise_scale, self.eps, self.reduce_mean, self.time_scale = noise_scale, eps, reduce_mean, time_scale
        self.t_schedule: Schedule = "uniform"
        self.loss_kind: Loss = "l2"
        self.perceptual: nn.Module | None = None
        self.learned_sigma = False  # True: the second half of the network's channels is thrown away

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network, z0: like x, optional. Logs the velocity's squared error
        as mse."""
        x1, n, k = batch["x"], len(batch["x"]), self.t_schedule
        z0 = batch["z0"] if "z0" in batch else step.randn(x1.shape, "noise") * self.noise_scale
        t = times(step.randint(k, n, "t") if isinstance(k, int) else step.rand(n, "t"), k, self.eps)
        cond = batch.get("cond", {})

        def velocity(x: Tensor, s: Tensor) -> Tensor:
            v = self.model(x, s * self.time_scale, **cond)
            return v[:, : x.shape[1]] if self.learned_sigma else v

        losses, plain = flow_losses(velocity, z0, x1, t, self.loss_kind, self.reduce_mean, self.perceptual)
        return losses.mean(), {"mse": plain.detach().mean()}

    def view(self) -> dict[str, Any]:
        path: dict[str, Any] = {"name": "linear", "t_max": 1 - self.eps}
        if self.noise_scale != 1:
            path["noise_scale"] = self.noise_scale
        view: dict[str, Any] = {"name": "denoiser", "path": path, "prediction": "velocity", "time": "reversed"}
        if self.learned_sigma:
            view["learned_sigma"] = True
        return view | ({"time_scale": self.time_scale} if self.time_scale != 1 else {})


class Reflow(RectifiedFlow):
    """Rectified flow trained on pairs (z0, x1) of a teacher's flow, instead of independent noise and data.

    Pairs come from the first of three places that is given: `pair_folder`; the recipe's `pairs:` node, made by the
    teacher before training and cached; or the teacher itself, which makes fresh ones for every step. t_schedule says at
    which times the flow is trained: uniform straightens it, t0 distills it to one Euler step, a number k to k steps,
    and t1 learns the way back in one step. VgmError: no source of pairs, or a loss without the network that it needs.
    """

    def __init__(
        self,
        model: nn.Module,  # the flow that is trained
        teacher: nn.Module | Denoiser | None = None,  # the flow that makes pairs, frozen
        perceptual: nn.Module | None = None,  # distance of the lpips losses
        pairs: Mapping[str, Tensor] | None = None,  # {"z", "x"} of the pairs: node, and its conditions
        conditions: Conditions | None = None,  # of the recipe, for pairs that the teacher makes
        t_schedule: Literal["uniform", "t0", "t1"] | int = "uniform",  # times that are trained, see above
        loss: Loss = "l2",  # lpips and lpips+l2 need t_schedule=t0 and the role perceptual
        pair_folder: str | None = None,  # folders with z0.npy, z1.npy (y.npy), as officially stored
        teacher_steps: Steps = 20,  # Euler steps of fresh pairs
        teacher_precision: Literal["fp32", "bf16"] = "fp32",  # arithmetic of fresh pairs
        guidance_scale: NonNegative | None = None,  # of the teacher; None: not guided
        noise_scale: Positive = 1.0,  # standard deviation of the noise at t = 0
        eps: NonNegative = EPS,  # times are drawn from [eps, 1]
        reduce_mean: bool = True,  # the loss is a mean over values; false: half their sum
        time_scale: Positive = 999.0,  # the network is told time_scale * t
    ):
        super().__init__(model, noise_scale, eps, reduce_mean, time_scale)
        times(torch.zeros(1, device="cpu"), t_schedule, eps)  # a wrong schedule is told now
        if loss != "l2" and (t_schedule != "t0" or perceptual is None):
            raise VgmError(f"loss={loss} is for t_schedule=t0 and needs the role perceptual", code=USAGE)
        if teacher is None and pairs is None and pair_folder is None:
            raise VgmError("reflow needs a teacher or its pairs", "vgm distill rectified-flow --teacher RUN", USAGE)
        if teacher is not None and not isinstance(teacher, Denoiser):
            teacher = Denoiser.from_config(teacher, self.view())
        self.teacher, self.perceptual, self.t_schedule, self.loss_kind = teacher, perceptual, t_schedule, loss
        self.learned_sigma = teacher is not None and teacher.learned_sigma  # the student is made like its teacher
        self.teacher_steps, self.teacher_precision = teacher_steps, teacher_precision
        self.guidance_scale = guidance_scale
        self.conditions = conditions
        self.pairs: Pairs | None = None
        if pair_folder is not None:
            self.pairs = read_pairs(Path(pair_folder))
        elif pairs is not None:
            cond = {k: v for k, v in pairs.items() if k not in ("z", "x")}
            self.pairs = Pairs([Part(pairs["z"] * noise_scale, pairs["x"], cond)])
        self.networks = {"model": model}
        if perceptual is not None:
            self.networks["perceptual"] = perceptual.requires_grad_(False)
        if teacher is not None:
            assert isinstance(teacher.network, nn.Module)
            self.networks["teacher"] = teacher.network.requires_grad_(False)

    def experience(self, batch: Batch, step: Step) -> Iterable[Batch]:
        """One batch of pairs as large as `batch`, which gives the shape and, for fresh pairs, the labels.

        VgmError: stored pairs of another shape than the data.
        """
        x = batch["x"]
        if self.pairs is None:
            z0 = step.randn(x.shape, "noise") * self.noise_scale
            return [{**batch, "z0": z0, "x": self.generate(z0, batch.get("cond", {}), batch.get("null"))}]
        z0, x1, cond = self.pairs.take(step.on_cpu().randint(len(self.pairs), len(x), "pair"))
        if x1.shape[1:] != x.shape[1:]:
            raise VgmError(f"the pairs are {tuple(x1.shape[1:])}, the data {tuple(x.shape[1:])}", code=USAGE)
        pair = {"z0": send(z0, x.device), "x": send(x1, x.device)}
        if not cond:
            return [pair]
        cond = {k: send(v, x.device) for k, v in cond.items()}
        return [self.conditions.known(pair, cond, step) if self.conditions else {**pair, "cond": cond}]

    @torch.no_grad()
    def generate(self, z0: Tensor, cond: Mapping[str, Tensor], null: dict[str, Tensor] | None = None) -> Tensor:
        """Where the teacher's flow takes z0: (B, ...)."""
        view = self.teacher
        assert view is not None
        if self.guidance_scale not in (None, 1.0) and cond:
            view = ClassifierFreeGuidance(view, float(self.guidance_scale or 1.0), null=null)
        with torch.autocast(z0.device.type, torch.bfloat16, enabled=self.teacher_precision == "bf16"):
            return euler(velocity_of(view, **cond), z0, self.teacher_steps, eps=self.eps).float()
