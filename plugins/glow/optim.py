"""The Adamax variant that Glow was trained with (openai/glow@91b2c57 optim.py).

It divides by the running maximum of |g| but keeps Adam's bias correction sqrt(1 - beta2^t) / (1 - beta1^t), so the
first steps are much smaller than Adamax's. beta2 is 1 - 1 / (steps per epoch), the same as the decay of the Polyak
average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GlowAdamax(torch.optim.Optimizer):
    """m = b1 m + (1 - b1) g; u = max(b2 u, |g|); w = (1 - weight_decay) w - lr c_t m / (u + eps)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99),
                 eps: float = 1e-8, weight_decay: float = 0.0):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(group, params)
        return loss

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), "m": torch.zeros_like(p), "u": torch.zeros_like(p)}
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]  # all of them, see step
        m, u = [s["m"] for s in states], [s["u"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(u, beta2)
        torch._foreach_maximum_(u, torch._foreach_abs(grads))  # type: ignore[arg-type]  # the stub knows numbers alone
        t = states[0]["step"].item()
        rate = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["weight_decay"])
        torch._foreach_addcdiv_(params, m, torch._foreach_add(u, group["eps"]), value=-rate)
