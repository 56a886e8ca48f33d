"""The betas of discrete processes by name, and which steps a shorter process keeps.

Ho et al., DDPM (2006.11239); Nichol & Dhariwal, IDDPM (2102.09672); behaviour of openai/guided-diffusion@22e0df8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vgm_cli.errors import USAGE, VgmError, unknown
from vgm_cli.limits import check_levels

SCHEDULES = (
    "linear",
    "cosine",
    "squaredcos_cap_v2",
    "quad",
    "scaled_linear",
    "sqrt",
    "const",
    "warmup10",
    "warmup50",
    "jsd",
)


def named_betas(
    schedule: str, steps: int, beta_start: float | None = None, beta_end: float | None = None
) -> np.ndarray:
    """The betas of a named schedule: (steps,) float64.

    "linear" without ends is Ho et al.'s 1e-4..0.02 scaled by 1000 / steps, so that it stays alike for any length; given
    ends are used as they are. "cosine" (alias "squaredcos_cap_v2") is IDDPM eq. 17 with betas capped at 0.999. "quad"
    (alias "scaled_linear", LDM's and Stable Diffusion's "linear") is linear in sqrt(beta), LDM's "sqrt" in beta^2.
    VgmError: unknown name.
    """
    check_levels(steps)
    if schedule in ("cosine", "squaredcos_cap_v2"):
        return betas_for_alpha_bar(steps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)
    scale = 1000 / steps if schedule == "linear" else 1.0
    start = scale * 0.0001 if beta_start is None else beta_start
    end = scale * 0.02 if beta_end is None else beta_end
    if schedule == "linear":
        return np.linspace(start, end, steps, dtype=np.float64)
    if schedule in ("quad", "scaled_linear"):
        return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    if schedule == "sqrt":
        return np.linspace(start, end, steps, dtype=np.float64) ** 0.5
    if schedule == "jsd":  # 1/T, 1/(T-1), ..., 1
        return 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)
    if schedule in ("const", "warmup10", "warmup50"):
        betas = np.full(steps, end, dtype=np.float64)
        warm = int(steps * {"const": 0.0, "warmup10": 0.1, "warmup50": 0.5}[schedule])
        betas[:warm] = np.linspace(start, end, warm, dtype=np.float64)
        return betas
    raise unknown("beta schedule", schedule, SCHEDULES)


def betas_for_alpha_bar(steps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999) -> np.ndarray:
    """Betas whose cumulative product of (1 - beta) follows alpha_bar(t), t in [0, 1]: (steps,) float64."""
    ends = [(i / steps, (i + 1) / steps) for i in range(steps)]
    return np.array([min(1 - alpha_bar(b) / alpha_bar(a), max_beta) for a, b in ends])


def space_timesteps(steps: int, sections: str | int | Sequence[int]) -> list[int]:
    """The timesteps of a `steps`-step process that a respaced one keeps, ascending.

    sections: N, "N" or "a,b,c" (that many from each equal part, first and last of a part included), "ddimN" (integer
    stride from 0). VgmError: a part has fewer steps than wanted, or no integer stride gives N.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        wanted = int(sections.removeprefix("ddim"))
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return list(range(0, steps, stride))
        raise VgmError(f"no integer stride takes {wanted} of {steps} steps", f"try {wanted} without 'ddim'", USAGE)
    if isinstance(sections, str):
        counts = [int(s) for s in sections.split(",")]
    else:
        counts = [sections] if isinstance(sections, int) else list(sections)
    kept: list[int] = []
    first = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 0 <= count <= size:
            raise VgmError(f"cannot take {count} steps from a section of {size}", f"at most {size}", USAGE)
        step = (size - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0
        for _ in range(count):
            kept.append(first + round(at))  # half to even, on a running sum: both decide the official indices
            at += step
        first += size
    if not kept:
        raise VgmError("a respaced process keeps at least one step", code=USAGE)
    return sorted(set(kept))
