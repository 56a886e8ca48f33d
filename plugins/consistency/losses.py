"""Consistency losses as pure functions; every draw is made by the caller. Networks come as f(x, sigma, **cond) -> x0.

Song et al. 2023 (2303.01469), alg. 2 and 3; openai/consistency_models@e32b69e cm/karras_diffusion.py. Pseudo-Huber and
iCT's weight: Song & Dhariwal 2023 (2310.14189), eq. 5, 7. x: (B, C, H, W), levels t > t2: (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgm_cli.losses.pseudo_huber import pseudo_huber
from vgm_cli.nn.shapes import along

Distance = Literal["l1", "l2", "l2-32", "lpips", "pseudo-huber"]
Weighting = Literal["uniform", "snr", "snr+1", "karras", "truncated-snr", "ict"]
Function = Callable[..., Tensor]


def distance(kind: Distance, a: Tensor, b: Tensor, lpips: Function | None = None, c: float | None = None) -> Tensor:
    """Distance of image batches a, b (B, C, H, W) per item: (B,).

    l1, l2: means over pixels; l2-32: after bilinear resizing to 32. lpips: lpips(a, b) gives (B,) or (B, 1, 1, 1) for
    images in [0, 1], as piq's (see piq_like); below 256 pixels they are resized to 224 first. pseudo-huber, c: see
    vgm_cli.losses.pseudo_huber.
    """
    if kind == "l1":
        return (a - b).abs().flatten(1).mean(1)
    if kind == "l2-32":
        a, b = (F.interpolate(v, size=32, mode="bilinear") for v in (a, b))
    if kind in ("l2", "l2-32"):
        return (a - b).square().flatten(1).mean(1)
    if kind == "pseudo-huber":
        return pseudo_huber(a, b, c)
    assert lpips is not None
    if a.shape[-1] < 256:
        a, b = (F.interpolate(v, size=224, mode="bilinear") for v in (a, b))
    return lpips((a + 1) / 2, (b + 1) / 2).flatten()


def piq_like(lpips: nn.Module) -> Function:
    """The host's LPIPS as the official code calls piq's: images in [0, 1], means where VGG16 has maxima."""
    for parent in list(lpips.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride))
    return lambda a, b: lpips(2 * a - 1, 2 * b - 1)


def weight_of(weighting: Weighting, t: Tensor, t2: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Factor on the distance, with SNR = 1 / t^2; ict: 1 / (t - t2). (B,)."""
    snr = t**-2
    if weighting == "uniform":
        return torch.ones_like(t)
    if weighting == "snr":
        return snr
    if weighting == "snr+1":
        return snr + 1
    if weighting == "karras":
        return snr + 1 / sigma_data**2
    if weighting == "truncated-snr":
        return snr.clamp(min=1)
    return 1 / (t - t2)


@torch.no_grad()
def ode_step(denoise: Function, x: Tensor, t: Tensor, t2: Tensor, heun: bool = True, **cond: Any) -> Tensor:
    """x at t carried to t2 along dx / dt = (x - denoise(x, t)) / t: one Euler or Heun step."""
    d = (x - denoise(x, t, **cond)) / along(t, x)
    step = x + d * along(t2 - t, x)
    if not heun:
        return step
    d2 = (step - denoise(step, t2, **cond)) / along(t2, x)
    return x + (d + d2) * along((t2 - t) / 2, x)


@contextmanager
def same_dropout(device: torch.device) -> Iterator[None]:
    """Draws from torch's global stream inside the block are those that follow it again."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def consistency_loss(
    student: Function,
    target: Function,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    t2: Tensor,
    teacher: Function | None = None,
    heun: bool = True,
    measure: Callable[[Tensor, Tensor], Tensor] | None = None,
    **cond: Any,
) -> Tensor:
    """Distance between the student at x_t and the target at the neighbouring x_t2, per item: (B,), unweighted.

    teacher: consistency distillation, x_t2 by one of its ODE steps; None: consistency training, x0 + t2 noise. Both
    networks see the same dropout. measure: of two batches, None is l2.
    """
    x_t = x0 + noise * along(t, x0)
    if teacher is None:
        x_t2 = x0 + noise * along(t2, x0)
    else:
        x_t2 = ode_step(teacher, x_t, t, t2, heun, **cond)
    with torch.no_grad(), same_dropout(x0.device):
        wanted = target(x_t2, t2, **cond).detach()
    torch.clear_autocast_cache()  # it holds half-precision weights that no gradient flows through
    got = student(x_t, t, **cond)
    return (measure or (lambda a, b: distance("l2", a, b)))(got.float(), wanted.float())


def progressive_loss(
    student: Function,
    teacher: Function,
    x0: Tensor,
    noise: Tensor,
    levels: tuple[Tensor, Tensor, Tensor],
    measure: Callable[[Tensor, Tensor], Tensor] | None = None,
    **cond: Any,
) -> Tensor:
    """Progressive distillation (Salimans & Ho 2022): the student's one Euler step from t to t3 is the teacher's two
    over t2. levels: t > t2 > t3, (B,) each. Distance per item: (B,), unweighted."""
    t, t2, t3 = levels
    x_t = x0 + noise * along(t, x0)
    x_t3 = ode_step(teacher, ode_step(teacher, x_t, t, t2, False, **cond), t2, t3, False, **cond)
    wanted = x_t - along(t, x0) * (x_t3 - x_t) / along(t3 - t, x0)
    return (measure or (lambda a, b: distance("l2", a, b)))(student(x_t, t, **cond).float(), wanted.float())
