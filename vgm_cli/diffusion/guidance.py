"""Guidance as wrappers around a Denoiser: the same interface, another estimate.

Every prediction is affine in every other with the same z and t, so guiding the network's own output guides all of them
alike (Gao et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.diffusion.denoiser import KINDS, Denoiser, affine
from vgm_cli.diffusion.path import Time, expand
from vgm_cli.errors import USAGE, VgmError


class Guided(Denoiser):
    """A Denoiser that looks like `inner` in all but its raw output, which subclasses change."""

    def __init__(self, inner: Denoiser):
        self.__dict__.update(inner.__dict__)
        self.inner = inner
        self.nfe = 0


class ClassifierFreeGuidance(Guided):
    """u + scale (c - u), conditional and unconditional in one doubled forward (Ho & Salimans 2022, 2207.12598).

    channels: how many leading channels are guided, None for all (DiT's released samples: 3); the others, the variance
    included, are the conditional ones. interval: host times between which to guide (Kynkaanniemi et al. 2024), else
    conditional only. rescale: pull the standard deviation back towards the conditional one's (Lin et al. 2023). detach:
    no gradient through the unconditional half.
    VgmError: the network has no null_condition.
    """

    def __init__(
        self,
        inner: Denoiser,
        scale: float,
        channels: int | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        detach: bool = False,
    ):
        super().__init__(inner)
        if not hasattr(inner.network, "null_condition"):
            raise VgmError("this network has no null class to be guided away from", "guidance_scale=1", USAGE)
        self.scale, self.channels, self.interval, self.rescale = scale, channels, interval, rescale
        self.detach = detach

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        scale: float | Tensor = self.scale
        if self.interval is not None:
            low, high = self.interval
            times = self.batch_time(x_t, t)
            inside = (low <= times) & (times <= high)
            if not bool(inside.any()):
                self.nfe += 1
                return self.inner.raw(x_t, t, **cond)
            scale = expand(torch.where(inside, self.scale, 1.0).to(x_t.dtype), x_t)
        null = self.network.null_condition(cond)  # type: ignore[attr-defined]
        both = {k: torch.cat([v, null[k]]) for k, v in cond.items()}
        times = self.batch_time(x_t, t)
        c, u = self.inner.raw(torch.cat([x_t, x_t]), torch.cat([times, times]), **both).chunk(2)
        u = u.detach() if self.detach else u
        self.nfe += 2
        k = x_t.shape[1] if self.channels is None else self.channels
        guided = u[:, :k] + scale * (c[:, :k] - u[:, :k])
        if self.rescale:
            ratio = expand(c[:, :k].flatten(1).std(1) / guided.flatten(1).std(1), guided)
            guided = guided * (self.rescale * ratio + 1 - self.rescale)
        return torch.cat([guided, c[:, k:]], dim=1)


class ClassifierGuidance(Guided):
    """Adds scale * d/dx log p(y | x_t) to the score (Dhariwal & Nichol 2021, 2105.05233).

    classifier(x_t, t) gives logits (B, classes) and is told the network's own time; cond["y"] names the class.
    """

    def __init__(self, inner: Denoiser, classifier: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0):
        super().__init__(inner)
        if inner.prediction not in KINDS:
            raise VgmError(f"classifier guidance does not read {inner.prediction}", "a network of eps or x0", USAGE)
        self.classifier, self.scale = classifier, scale

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        output = self.inner.raw(x_t, t, **cond)
        self.nfe += 1
        times = self.batch_time(x_t, t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            log_p = F.log_softmax(self.classifier(x, self.time_argument(times)).float(), dim=-1)
            gradient = torch.autograd.grad(log_p.gather(1, cond["y"][:, None]).sum(), x)[0]
        _, per_score = affine("score", self.prediction, self.path, times, self.sigma_data)
        sign = -1.0 if self.prediction == "velocity" and self.time == "reversed" else 1.0
        pred, rest = self.split(output, x_t)
        pred = pred + (sign * self.scale * expand(per_score, x_t)).to(pred.dtype) * gradient
        return pred if rest is None else torch.cat([pred, rest], dim=1)


class Autoguidance(Guided):
    """weak + scale (strong - weak): guided by a worse version of itself (Karras et al. 2024, 2406.02507)."""

    def __init__(self, inner: Denoiser, weak: Denoiser, scale: float):
        super().__init__(inner)
        if inner.prediction not in KINDS:
            raise VgmError(f"autoguidance does not read {inner.prediction}", "a network of eps or x0", USAGE)
        self.weak, self.scale = weak, scale

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        strong, rest = self.split(self.inner.raw(x_t, t, **cond), x_t)
        weak = self.weak.predict(x_t, t, self.prediction, **cond)
        if self.prediction == "velocity" and self.time == "reversed":
            weak = -weak
        self.nfe += 2
        guided = weak + self.scale * (strong - weak)
        return guided if rest is None else torch.cat([guided, rest], dim=1)
