"""Pictures of how samples come about: states and estimates from noise to image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.engine.checkpoint import Loaded
from vgm_cli.engine.sample import loop as generate
from vgm_cli.engine.sample.loop import Plan
from vgm_cli.engine.tokens import TokenCodec
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.images import make_grid

TRACED_ITEMS, TRACED_STEPS = 8, 12


def trace_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}-trace.png")


def trace(loaded: Loaded, plan: Plan, device: torch.device) -> np.ndarray:
    """A picture of how the first samples form. Each takes two rows, x_t and the estimate of x_0, from noise to image,
    with the time above each column. VgmError: the sampler reports no steps."""
    seen: list[tuple[Tensor, Tensor | None, float | None]] = []

    def watch(i: int, total: int, x: Tensor, x0: Tensor | None) -> None:
        at = getattr(loaded.view, "asked_at", None)
        seen.append((x, x0, None if at is None else float(at.flatten()[0])))

    n = min(plan.n, TRACED_ITEMS)
    for _ in generate.stream(loaded, replace(plan, batch_size=max(n, 1), judge=None), device, 0, n, callback=watch):
        pass
    if not seen:
        text = f"the sampler {plan.sampler['name']} reports no steps to trace"
        raise VgmError(text, "a diffusion or flow sampler does", FAILED)
    chosen = sorted({round(k * (len(seen) - 1) / (TRACED_STEPS - 1)) for k in range(TRACED_STEPS)})
    strips = {"x_t": [seen[k][0] for k in chosen]}
    if all(seen[k][1] is not None for k in chosen):
        strips["estimate"] = [seen[k][1] for k in chosen]  # type: ignore[misc]
    rows = [
        shown(loaded, torch.stack([x[i].float() for x in strip]), device) for i in range(n) for strip in strips.values()
    ]
    letter = "sigma" if getattr(getattr(loaded.view, "path", None), "t_max", 1) > 1 else "t"
    times = [f"step {k + 1}" if seen[k][2] is None else f"{letter} {seen[k][2]:.3g}" for k in chosen]
    return make_grid(torch.cat(rows), len(chosen), rows=list(strips) * n, columns=times, block=len(strips))


@torch.no_grad()
def shown(loaded: Loaded, x: Tensor, device: torch.device) -> Tensor:
    """States (B, ...) as pictures: latents are decoded, and noise is scaled into the visible range. Ids that are no
    code of the codec, those that a model has yet to choose, are grey."""
    x = x.to(device)
    if isinstance(loaded.codec, TokenCodec):
        unknown = x >= loaded.codec.vocab_size
        x = loaded.codec.decode(x.masked_fill(unknown, 0))
        if unknown.ndim == 3 and unknown.any():
            grey = F.interpolate(unknown[:, None].float(), x.shape[-2:])
            x = torch.where(grey > 0, 0.0, x)
    elif loaded.codec is not None:
        x = loaded.codec.decode(x)
    else:
        x = x / x.flatten(1).abs().amax(1).clamp(min=1.0).view(-1, 1, 1, 1)
    return x.float().cpu()
