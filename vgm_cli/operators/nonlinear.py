"""Nonlinear deblurring: frames averaged before the camera's response, or the learned blur of the DPS paper.

Nah et al. 2017 (GoPro, 1612.02177) for the response curve; Tran et al. 2021 (2104.00317) for the learned one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.operators.motion import MotionDeblurring
from vgm_cli.ranges import Fraction, NonNegative, Width


class NonlinearDeblurring(Operator):
    """Motion blur of linear light: (K x^gamma)^(1 / gamma) of pixels x in [0, 1], with K of MotionDeblurring.

    With `weights`, the official network (KernelWizard, GOPRO_wVAE.pth) blurs instead: colour images of 256 pixels, each
    by a code of its own, code_scale * N(0, 1).
    """

    name = "nonlinear-deblurring"
    linear = False

    def __init__(
        self,
        kernel_size: Width = 61,  # side of the blur's kernel in pixels
        intensity: Fraction = 0.5,  # how crooked the motion is, in [0, 1]
        kernel: str | None = None,  # file of a kernel, instead of a drawn one
        gamma: NonNegative = 2.2,  # exponent of the response curve
        weights: str | None = None,  # file of the official network; None: the blur above
        code_scale: NonNegative = 1.2,  # standard deviation of the network's codes
        resample: bool = False,  # a new code at every call (official: guidance blurs differently)
    ):
        if gamma <= 0:
            raise VgmError(f"gamma={gamma} is above 0", "gamma=2.2", USAGE)
        self.blur = MotionDeblurring(kernel_size, intensity, kernel)
        self.gamma, self.weights, self.code_scale, self.resample = gamma, weights, code_scale, resample

    @property
    def is_drawn(self) -> bool:  # type: ignore[override]
        """Kernel or code come from no file."""
        return self.weights is not None or self.blur.is_drawn

    def prepare(self, generators: Sequence[torch.Generator]) -> None:
        if self.weights is None:
            self.bound = self.blur.bind(self.shape, generators, first=self.first)
            return
        from vgm_cli.operators.kernel_wizard import load

        if self.shape != (3, 256, 256):
            raise VgmError("the learned blur takes colour images of 256x256 pixels", "without weights= any size", USAGE)
        self.network, self.generators = load(self.weights), list(generators)
        self.codes = self.draw_codes()

    def draw_codes(self) -> Tensor:
        """(B, 512, 2, 2)."""
        return self.code_scale * torch.stack([torch.randn(512, 2, 2, generator=g) for g in self.generators])

    def __call__(self, x: Tensor) -> Tensor:
        unit = (x + 1) / 2
        if self.weights is None:
            light = self.bound(unit.clamp(0, 1) ** self.gamma).clamp(min=0)
            return (light + 1e-4) ** (1 / self.gamma) * 2 - 1  # the offset keeps the root's slope finite in the dark
        codes = self.draw_codes() if self.resample else self.codes
        return (self.network.to(x.device)(unit, codes.to(x)[: len(x)]) * 2 - 1).clamp(-1, 1)

    def state(self) -> dict[str, Tensor]:
        return self.bound.state() if self.weights is None else {"code": self.codes}
