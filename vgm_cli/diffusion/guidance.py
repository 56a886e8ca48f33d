"""Guidance: away from a worse estimate, or up a classifier's gradient.

Every prediction is affine in every other with the same z and t, so guiding the network's own output guides all of them
alike (Gao et al. 2024); logits are guided by the same formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.api import HasClasses, NullCondition
from vgm_cli.conditioning import Conditions, unconditional
from vgm_cli.diffusion.denoiser import KINDS, OF_UNIT, Denoiser, affine
from vgm_cli.diffusion.path import Time
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import each, expand

Scale = float | Tensor | Callable[[Tensor], Tensor]
Cond = Mapping[str, Tensor]


def extrapolate(outputs: Sequence[Tensor], scales: Sequence[float | Tensor]) -> Tensor:
    """o_0 + s_1 (o_1 - o_0) + s_2 (o_2 - o_1) + ..., each o_i shaped alike.

    outputs go from the one to be guided away from (unconditional, a worse network) to the wanted one. One scale is
    classifier-free guidance; two guide by two conditions apart, such as a picture and a text. A scale of 1 everywhere
    gives the last output.
    """
    result = outputs[0]
    for (before, after), scale in zip(pairwise(outputs), scales, strict=True):
        result = result + scale * (after - before)
    return result


@dataclass(frozen=True)
class Guidance:
    """How an output is guided away from a worse one: u + scale (c - u) (Ho & Salimans 2022, 2207.12598).

    It knows nothing of what is guided: `combine` takes the two outputs of any network, logits (B, V) included, and a
    call takes a network and both of its conditions, which it evaluates in one doubled batch.
    """

    scale: Scale = 1.0  # 1 is no guidance; a function of the times (B,) gives one for each item
    channels: int | None = None  # leading channels that are guided, None for all (DiT's released samples: 3)
    interval: tuple[float, float] | None = None  # times between which to guide (Kynkaanniemi et al. 2024)
    rescale: float = 0.0  # pull the deviation back towards the conditional one's, 0 to 1 (Lin et al. 2023)
    detach: bool = False  # no gradient through the worse output

    def active(self, times: Tensor) -> bool:
        """Whether any of the times (B,) is guided, so that the worse output is needed."""
        if self.interval is None:
            return True
        low, high = self.interval
        return bool(((low <= times) & (times <= high)).any())

    def scale_at(self, times: Tensor, like: Tensor) -> float | Tensor:
        """The scale at times (B,): a number, or a tensor that broadcasts against `like` (B, ...). 1 outside of the
        interval."""
        scale = self.scale(times) if callable(self.scale) else self.scale
        if self.interval is not None:
            low, high = self.interval
            scale = torch.where((low <= times) & (times <= high), scale, 1.0)
        return expand(scale.to(like.dtype), like) if isinstance(scale, Tensor) else scale

    def combine(
        self, wanted: Tensor, worse: Tensor, times: Tensor | None = None, channels: int | None = None
    ) -> Tensor:
        """The guided output (B, C, ...) of two (B, C, ...).

        times: (B,), for an interval or a scale that changes. channels: that can be guided where self.channels does not
        say, None for all. The others are the wanted output's.
        """
        worse = worse.detach() if self.detach else worse
        channels = channels if self.channels is None else self.channels
        k = wanted.shape[1] if channels is None else channels
        c, u = wanted[:, :k], worse[:, :k]
        scale = self.scale_at(each(wanted, 0.0) if times is None else times, c)
        guided = extrapolate((u, c), (scale,))
        if self.rescale:
            ratio = expand(c.flatten(1).std(1) / guided.flatten(1).std(1), guided)
            guided = guided * (self.rescale * ratio + 1 - self.rescale)
        return torch.cat([guided, wanted[:, k:]], dim=1) if k < wanted.shape[1] else guided

    def __call__(
        self, network: Callable[..., Tensor], x: Tensor, t: Tensor, cond: Cond, null: Cond, times: Tensor | None = None
    ) -> Tensor:
        """network(x, t, **cond) (B, C, ...) guided away from network(x, t, **null), both in one batch.

        t: (B,), what the network is told. times: (B,), what interval and scale look at; None is t. Where no time is
        guided the network is evaluated once. Output channels beyond those of x (a learned variance) are not guided.
        """
        times = t if times is None else times
        if not self.active(times):
            return network(x, t, **cond)
        both = {k: torch.cat([v, null[k]]) for k, v in cond.items()}
        wanted, worse = network(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return self.combine(wanted, worse, times, x.shape[1])


def check_null(network: Any) -> None:
    """VgmError: the network has no unconditional half to be guided away from."""
    if not isinstance(network, NullCondition):
        raise VgmError("this network has no null class to be guided away from", "guidance_scale=1", USAGE)


class Guided(Denoiser):
    """A Denoiser that shows `inner` with another raw output, which subclasses compute."""

    def __init__(self, inner: Denoiser):
        super().__init__(inner.network, inner.path, inner.prediction, **inner.options())
        self.inner = inner

    def inner_raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        """The inner raw output, its evaluations counted here too."""
        before = self.inner.nfe
        output = self.inner.raw(x_t, t, **cond)
        self.nfe += self.inner.nfe - before
        return output

    def interpret(self, output: Tensor, x_t: Tensor, t: Time, to: str = "x0") -> Tensor:
        return self.inner.interpret(output, x_t, t, to)


class ClassifierFreeGuidance(Guided):
    """A Denoiser guided away from its own unconditional estimate. VgmError: nothing says what no condition is."""

    def __init__(
        self,
        inner: Denoiser,  # what is guided
        scale: Scale,  # 1 is no guidance; a function of the times (B,) gives one for each item
        channels: int | None = None,  # leading channels that are guided; None: all
        interval: tuple[float, float] | None = None,  # host times between which to guide; None: all
        rescale: float = 0.0,  # pull the deviation back towards the conditional one's, 0 to 1
        detach: bool = False,  # no gradient through the unconditional half
        null: dict[str, Tensor] | None = None,  # no condition, where the network does not say; {}: set later
    ):
        super().__init__(inner)
        if null is None:
            check_null(inner.network)
        self.guidance, self.null = Guidance(scale, channels, interval, rescale, detach), null

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        times = self.batch_time(x_t, t)
        self.nfe += 2 if self.guidance.active(times) else 1
        return self.guidance(self.inner.raw, x_t, times, cond, unconditional(self.network, cond, self.null))


def guided_teacher(teacher: Denoiser, scale: float | None, conditions: Conditions | None) -> Denoiser:
    """A teacher guided by `scale`, or itself where that is None or 1; its `null` is to be set for every batch.

    VgmError: neither the network nor the conditions that it is told say what no condition is.
    """
    if scale in (None, 1.0):
        return teacher
    parts = () if conditions is None else conditions.parts.values()
    told = any(part.guided and isinstance(part.condition, nn.Module) for part in parts)  # it has a null of its own
    return ClassifierFreeGuidance(teacher, scale, null={} if told else None)


class Autoguidance(Guided):
    """A Denoiser guided away from a worse version of itself (Karras et al. 2024, 2406.02507): a smaller network, or the
    same one trained for shorter. weak: a Denoiser on any path. VgmError: a prediction that cannot be converted."""

    def __init__(self, inner: Denoiser, weak: Denoiser, scale: Scale, interval: tuple[float, float] | None = None):
        super().__init__(inner)
        if inner.prediction not in KINDS:
            raise VgmError(f"autoguidance does not read {inner.prediction}", "a network of eps or x0", USAGE)
        self.weak, self.guidance = weak, Guidance(scale, interval=interval)

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        times = self.batch_time(x_t, t)
        strong, rest = self.split(self.inner_raw(x_t, t, **cond), x_t)
        if self.guidance.active(times):
            weak = self.weak.predict_beside(self.path, x_t, times, self.prediction, **cond)
            weak = self.to_range(weak, times)
            if self.prediction == "velocity" and self.time == "reversed":
                weak = -weak
            self.nfe += 1
            strong = self.guidance.combine(strong, weak.to(strong.dtype), times)
        return strong if rest is None else torch.cat([strong, rest], dim=1)


class ClassifierGuidance(Guided):
    """Adds scale * d/dx log p(y | x_t) to the score (Dhariwal & Nichol 2021, 2105.05233).

    classifier(x_t, t) gives logits (B, classes), is told the network's own time and sees images in the network's range.
    y: (B,), the class of every item. VgmError: a prediction that cannot be converted.
    """

    def __init__(self, inner: Denoiser, classifier: Callable[[Tensor, Tensor], Tensor], y: Tensor, scale: float = 1.0):
        super().__init__(inner)
        if inner.prediction not in KINDS:
            raise VgmError(f"classifier guidance does not read {inner.prediction}", "a network of eps or x0", USAGE)
        self.classifier, self.y, self.scale = classifier, y, scale

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        told = {k: v for k, v in cond.items() if k != "y" or tells_classes(self.network)}
        output = self.inner_raw(x_t, t, **told)
        times = self.batch_time(x_t, t)

        def seen(x: Tensor, t: Tensor) -> Tensor:
            return self.classifier(self.in_range(x, times), t)

        gradient = classifier_gradient(seen, self.y)(x_t, self.time_argument(times))
        _, per_score = affine("score", self.prediction, self.path, times, self.sigma_data)
        sign = -1.0 if self.prediction == "velocity" and self.time == "reversed" else 1.0
        pred, rest = self.split(output, x_t)
        slope = sign * self.scale / (1.0 if self.data_range == "centered" else OF_UNIT[self.prediction])
        pred = pred + (slope * expand(per_score, x_t)).to(pred.dtype) * gradient
        return pred if rest is None else torch.cat([pred, rest], dim=1)


def tells_classes(network: Any) -> bool:
    """Whether a network is told labels: those that do not say it are given what they are asked with."""
    return not isinstance(network, HasClasses) or bool(network.num_classes)


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor], y: Tensor, scale: float = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """cond_fn(x, t) = scale * d/dx log p(y | x_t), from a classifier of noisy images giving logits (B, classes)."""

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            log_p = F.log_softmax(classifier(x, t).float(), dim=-1)
            return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0] * scale

    return cond_fn
