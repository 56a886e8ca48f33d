"""MeanFlow's objective: a network of average velocities, from scratch or from a trained flow. Geng et al. 2025.

The condition is dropped here and not by the host (conditions.class.dropout is 0 in the recipes): officially the rows
without a condition are rows with r = t. The three codes and their settings are keywords: Gsunshine/meanflow (rows:
first), Gsunshine/py-meanflow (presets cifar10-v0, cifar10-v1) and zhuyu-cs/MeanFlow (rows: coin, squared, norm_eps
0.001).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgm_cli.api import Batch, ObjectiveBase, Step, TwoTimes
from vgm_cli.conditioning import unconditional
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.flow_map import FlowMap
from vgm_cli.diffusion.objectives import target_of as path_target
from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.nets.song_unet import SongUNet
from vgm_cli.nn.copying import copy_and_tell
from vgm_cli.nn.shapes import expand
from vgm_cli.ranges import Fraction, NonNegative, Positive, fit

from .augment import AugmentPipe
from .losses import (
    Order,
    adaptive,
    average_velocity,
    guided_velocity,
    logs_of,
    pairs_of_times,
    summed,
    target_of,
)

STEEP = 100.0  # du/dt, root mean square of its values, which is below 10 in training that goes well
EXPLODING = (
    f"du_dt is above {STEEP:g}: training is about to diverge; see Traps in docs/papers/meanflow.md "
    "(train.precision=fp32, objective.guidance_from, objective.equal, model.qknorm)"
)


class MeanFlow(ObjectiveBase):
    """Regression of u(z, r, t) on v - (t - r) du/dt, whose solution jumps from any time to any other in one evaluation.

    VgmError: a network that is told one time only, parts that do not go together.
    """

    forward_mode = True

    def __init__(
        self,
        model: nn.Module,  # u (B, C, H, W) of (x, t (B,), s=t - r (B,), **cond), which is trained
        teacher: Denoiser | None = None,  # a flow network of one time, whose weights training starts from
        path: str | dict[str, Any] | None = None,  # from data to noise; None: linear, or the teacher's
        times: Literal["logit-normal", "uniform"] = "logit-normal",  # how the two times are drawn
        P_mean: float = -0.4,  # of the normal draw whose sigmoid is a time
        P_std: NonNegative = 1.0,  # its deviation
        r_mean: float | None = None,  # of the second draw; None: P_mean
        r_std: NonNegative | None = None,  # of the second draw; None: P_std
        order: Order = "sort",  # how two draws become r <= t, see pairs_of_times
        equal: Fraction = 0.75,  # share of rows with r = t
        rows: Literal["first", "coin"] = "first",  # the first of the batch are equal, or each by a coin; see `drawn`
        dropped: Fraction = 0.1,  # share of rows whose condition is left out, which are not guided; see `drawn`
        omega: NonNegative = 1.0,  # weight of the path's velocity in the target: guidance, see guided_velocity
        kappa: Fraction = 0.0,  # weight of the network's own velocity there; the scale is omega / (1 - kappa)
        guidance_interval: tuple[float, float] = (0.0, 1.0),  # times t that are guided
        guidance_from: Fraction = 0.0,  # part of the training before which nothing is guided
        norm_p: NonNegative = 1.0,  # power of the adaptive weight; 0: none
        norm_eps: Positive = 0.01,  # added to the error inside that weight
        squared: bool = False,  # the error is squared first, see adaptive
        derivative: Literal["joint", "alone"] = "joint",  # with the value in one pass, or by itself: less memory
        augment: dict[str, float] | None = None,  # of AugmentPipe, of which the network is told; None: none
    ):
        if not (isinstance(model, TwoTimes) and model.second_time):
            hint = "model.name=meanflow, or model.second_time=true"
            raise VgmError("MeanFlow needs a network that is told two times", hint, USAGE)
        if kappa == 1:
            raise VgmError("kappa=1: the guidance scale omega / (1 - kappa) is infinite", code=USAGE)
        self.guided = omega != 1 or kappa > 0
        self.model, self.networks = model, {"model": model}
        config: Mapping[str, Any] = {"path": path or "linear", "prediction": "velocity"}
        if teacher is not None:
            if teacher.prediction != "velocity" or path is not None:
                raise VgmError("the teacher must predict velocities, on its own path", "objective.path=null", USAGE)
            assert isinstance(teacher.network, nn.Module)
            copy_and_tell(teacher.network, model)
            config = teacher.config()
        self.flow = FlowMap(model, config, second_time="difference", guided=self.guided)
        self.draws, self.order = times, order
        self.means = (P_mean, P_mean if r_mean is None else r_mean)
        self.stds = (P_std, P_std if r_std is None else r_std)
        self.equal, self.rows, self.dropped = equal, rows, dropped
        self.omega, self.kappa, self.interval = omega, kappa, guidance_interval
        self.guidance_from = guidance_from
        self.norm_p, self.norm_eps, self.squared, self.joint = norm_p, norm_eps, squared, derivative == "joint"
        self.augment = pipe_of(augment, model)

    # -- draws

    def times(self, first: Tensor, second: Tensor, equal: Tensor) -> tuple[Tensor, Tensor]:
        """(t, r), each (B,), of two draws (B,): standard normal ones, or uniform ones where times are uniform."""
        low, high = self.flow.t_range()
        found = []
        for draw, mean, std in zip((first, second), self.means, self.stds):
            time = draw if self.draws == "uniform" else torch.sigmoid(draw * std + mean)
            found.append(time.clamp(low, high))
        return pairs_of_times(found[0], found[1], equal, self.order)

    def drawn(self, n: int, step: Step) -> tuple[Tensor, Tensor]:
        """(equal, dropped), each (B,) bool: rows with r = t, and rows without their condition.

        first: the first rows of the global batch in both, as in the official code: a share of them is equal, and as
        many are dropped as a coin for each row says, so that dropped rows are equal ones. coin: each by a coin.
        """
        if self.rows == "coin":
            return step.rand(n, "equal") < self.equal, step.rand(n, "dropped") < self.dropped
        numbers, total = step.rows(n)
        coins = torch.rand(total, generator=step.generator("dropped"))
        return self.first(torch.tensor(numbers), total, int((coins < self.dropped).sum()))

    def first(self, rows: Tensor, total: int, dropped: int) -> tuple[Tensor, Tensor]:
        """(equal, dropped) of the rows by number, of `total`: the first int(total * equal), and the first `dropped`."""
        return rows < int(total * self.equal), rows < dropped

    # -- loss

    def velocity(self, z: Tensor, t: Tensor, r: Tensor, **cond: Any) -> Tensor:
        """u (B, ...) from t to r, from data to noise whatever the network's own direction is."""
        return self.flow.interpret(self.flow.raw(z, t, s=r, **cond), z, t, "velocity")

    def terms(
        self,
        x: Tensor,  # (B, ...) data
        noise: Tensor,  # (B, ...)
        t: Tensor,  # (B,)
        r: Tensor,  # (B,)
        apart: Tensor,  # (B,) bool on the CPU: r < t
        cond: Mapping[str, Tensor],  # keywords of the network
        dropped: Tensor,  # (B,) bool: rows whose condition is left out
        null: Mapping[str, Tensor] | None = None,  # no condition, where the network does not say
        told: Mapping[str, Tensor] | None = None,  # keywords that are no condition
        guided: bool = True,  # whether guidance has begun
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, what it is drawn to, du/dt and the path's velocity: (B, ...) each."""
        told = dict(told or {})
        path, at = self.flow.path, t.double()
        z = path.add_noise(x.double(), noise.double(), at).to(x.dtype)
        plain = v = path_target("velocity", path, x, noise, at, self.flow.sigma_data).to(x.dtype)
        if cond and (self.dropped or self.guided):
            none = unconditional(self.model, cond, null)
            if guided and self.guided:
                asked, worse = {**cond, **told}, {**none, **told}
                v = guided_velocity(self.velocity, z, t, v, asked, worse, self.omega, self.kappa, self.interval)
                v = torch.where(expand(dropped | equal_rows(cond, none), v), plain, v)
            cond = {k: torch.where(expand(dropped, c), none[k], c) for k, c in cond.items()}
        u, du = average_velocity(self.velocity, z, t, r, v, apart, {**cond, **told}, self.joint)
        return u, target_of(v, du, t, r), du, plain

    def loss(self, phase: str, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """batch x: (B, C, H, W), cond: keywords of the network. The loss is about 1 whatever is learned (norm_p = 1):
        see the logs, which are logs_of's."""
        x, told, n = batch["x"], {}, len(batch["x"])
        if self.augment is not None:
            x, told["augment"] = self.augment(x, lambda kind, name, k: drawn_by(step, kind, name, n, k))
        cpu = step.on_cpu()  # which rows need a derivative is read there
        equal, dropped = self.drawn(n, cpu)
        draw = cpu.rand if self.draws == "uniform" else cpu.randn
        t, r = self.times(draw((n,), "t"), draw((n,), "r"), equal)
        apart, noise = r < t, step.randn(x.shape, "noise")
        t, r, dropped = (v.to(x.device, non_blocking=True) for v in (t, r, dropped))
        begun = step.index >= self.guidance_from * step.total
        cond, null = batch.get("cond", {}), batch.get("null")
        u, target, du, _ = self.terms(x, noise, t, r, apart, cond, dropped, null, told, begun)
        raw = summed((u - target).float())
        loss = adaptive(raw, self.norm_p, self.norm_eps, self.squared).mean()
        return loss, logs_of(raw, du, apart)

    def remark(self, row: Mapping[str, float]) -> str | None:
        return EXPLODING if row.get("du_dt", 0.0) > STEEP else None

    def view(self) -> dict[str, Any]:
        return self.flow.view()


def equal_rows(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """(B,) bool: rows in which all the keywords are the same, such as those that the host has dropped already."""
    return torch.stack([(v == b[k]).flatten(1).all(1) if v.ndim > 1 else v == b[k] for k, v in a.items()]).all(0)


def drawn_by(step: Step, kind: str, name: str, n: int, k: int) -> Tensor:
    """An augmentation's draw (n, k) of a step, see augment.Draw."""
    name = f"augment.{name}"
    if kind == "normal":
        return step.randn((n, k), name)
    uniform = step.rand((n, k), name)
    return uniform if kind == "uniform" else (uniform < 0.5).float()


def pipe_of(config: Mapping[str, float] | None, model: nn.Module) -> AugmentPipe | None:
    """The augmentation of a recipe. VgmError: unknown key, or another number of labels than the network is told."""
    if config is None:
        return None
    known = [f.name for f in dataclasses.fields(AugmentPipe)]
    for key in config:
        if key not in known:
            raise unknown("key", key, known, "objective.augment")
    pipe = AugmentPipe(**{k: fit(v, NonNegative, f"objective.augment.{k}") for k, v in config.items()})
    wanted = model.augment_dim if isinstance(model, SongUNet) else 0
    if wanted != pipe.labels:
        hint = f"model.name=meanflow-unet model.augment_dim={pipe.labels}"
        raise VgmError(f"the augmentation gives {pipe.labels} labels, the network is told {wanted}", hint, USAGE)
    return pipe
