"""How strongly a ControlNet steers a sampler: strength, guess mode, resolution weighting, an interval, several at once.

Zhang, Rao and Agrawala 2023 (arXiv 2302.05543), section 3.4. Official code: lllyasviel/ControlNet@ed85cd1
gradio_canny2image.py, cldm/ddim_hacked.py. The solver is any sampler of diffusion networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from vgm_cli.api import Request
from vgm_cli.diffusion.denoiser import Denoiser
from vgm_cli.diffusion.guidance import Guided
from vgm_cli.diffusion.path import Time
from vgm_cli.diffusion.samplers import GaussianSampler, solver_of
from vgm_cli.errors import USAGE, VgmError
from vgm_cli.ranges import NonNegative, Steps

from .model import ControlNet, Summed, keyword

GUESS = 0.825  # of each connection over the next deeper one


class Timed(Guided):
    """A denoiser whose network is steered within an interval of host times alone."""

    def __init__(self, inner: Denoiser, interval: tuple[float, float], scales: Sequence[str]):
        super().__init__(inner)
        self.interval, self.scales = interval, scales

    def raw(self, x_t: Tensor, t: Time, **cond: Any) -> Tensor:
        low, high = self.interval
        times = self.batch_time(x_t, t)
        inside = ((low <= times) & (times <= high)).to(x_t.dtype)[:, None]
        return self.inner_raw(x_t, t, **{k: v * inside if k in self.scales else v for k, v in cond.items()})


@dataclass(kw_only=True)
class ControlSampler:
    """Any solver, its network steered. VgmError: the network takes no hint, a number of scales that it has not.

    strength: factor on what the ControlNet adds; 0 is the base itself, bit for bit. scales: one factor for every
    connection, from the first to the middle, times the strength (13 of Stable Diffusion's). guess: no steering of the
    unconditional half, and weaker connections towards the first (0.825 to the power of their distance from the middle):
    the hint does without a prompt, with guidance_scale 3 to 5. resolution_weighting: the paper's, no steering of the
    unconditional half and each connection times how much smaller its map is. only_middle: of all connections the
    middle one alone. interval: host times (0 data, 1 noise) between which to steer. also: RUN, or several, of
    ControlNets of the same base whose maps are added; also_strength: theirs, one or one for each.
    """

    solver: dict[str, Any] = field(default_factory=lambda: {"name": "ddim"})
    steps: Steps = 20
    strength: NonNegative = 1.0
    scales: tuple[NonNegative, ...] | None = None
    guess: bool = False
    resolution_weighting: bool = False
    only_middle: bool = False
    interval: tuple[NonNegative, NonNegative] | None = None
    also: Any = None
    also_strength: NonNegative | tuple[NonNegative, ...] = 1.0

    def __post_init__(self) -> None:
        if self.guess and self.resolution_weighting:
            raise VgmError("guess mode has weights of its own", "resolution_weighting=false", USAGE)
        self.inner = solver_of(self.solver)
        if not isinstance(self.inner, GaussianSampler):
            raise VgmError(f"{self.solver.get('name')} samples no diffusion network", "solver={name: ddim}", USAGE)

    def __call__(self, view: Denoiser, request: Request) -> Tensor:
        """x0 of (N, *request.shape)."""
        if not isinstance(view, Denoiser) or "hint" not in request.cond:
            raise VgmError("this sampler is of networks that follow a hint", "`vgm ls samplers` shows others", USAGE)
        steps = self.steps if request.steps is None else request.steps
        others = [self.also] if self.also is not None and not isinstance(self.also, list | tuple) else self.also or []
        strengths = self.also_strength if isinstance(self.also_strength, tuple) else (self.also_strength,) * len(others)
        if len(strengths) != len(others):
            raise VgmError(f"also_strength has {len(strengths)} entries for {len(others)} runs", code=USAGE)
        first: Any = view.network
        networks = [first, *(o.model for o in others)]
        check_networks(first, networks[1:])
        cond, null, told = dict(request.cond), dict(request.null), []
        for k, (network, strength) in enumerate(zip(networks, (self.strength, *strengths))):
            own = self.weights(network, strength, request.device)
            told.append(keyword("scales", k))
            cond[told[-1]] = own.expand(len(request), -1)
            if self.guess or self.resolution_weighting:
                null[told[-1]] = torch.zeros_like(own)
        if others:
            view = Denoiser(Summed(networks), view.path, view.prediction, **view.options())
        if self.interval is not None:
            view = Timed(view, self.interval, told)
        asked = request.drawn_by(request.generators)
        asked.cond, asked.null, asked.steps = cond, null, steps
        found: Tensor = self.inner(view, asked)
        return found

    def weights(self, network: Any, strength: float, device: torch.device) -> Tensor:
        """Factors of a network's connections, (1, K), the middle's last. VgmError: another number of scales."""
        smaller = network.downsampling if isinstance(network, ControlNet) else [1] * len(self.scales or [1])
        count = len(smaller)
        own = torch.full((count,), float(strength), device=device)
        if self.scales is not None:
            if len(self.scales) != count:
                raise VgmError(f"scales has {len(self.scales)} entries, the network {count} connections", code=USAGE)
            own = own * torch.tensor(self.scales, device=device)
        if self.guess:
            own = own * GUESS ** torch.arange(count - 1, -1, -1, device=device)
        if self.resolution_weighting:
            own = own * torch.tensor(smaller, device=device)
        if self.only_middle:
            own[:-1] = 0
        return own[None]


def check_networks(first: Any, others: Sequence[Any]) -> None:
    """VgmError: a network that nothing scales, or that does not stand on the first one's base."""
    if "scales" not in signature(first.forward).parameters:
        raise VgmError(f"{type(first).__name__} is no ControlNet", "`vgm ls samplers` shows others", USAGE)
    for other in others:
        if not isinstance(other, ControlNet) or not isinstance(first, ControlNet):
            raise VgmError("also names a network that is no ControlNet", "also=RUN of `vgm train controlnet`", USAGE)
        if (other.skips, other.context_dim, other.in_channels) != (first.skips, first.context_dim, first.in_channels):
            raise VgmError("also names a ControlNet of another U-Net", "ControlNets of one base are added", USAGE)
        if other.unlocked:
            message = "also names a ControlNet with a decoder of its own"
            raise VgmError(message, "sample its run, and add the others to it", USAGE)
