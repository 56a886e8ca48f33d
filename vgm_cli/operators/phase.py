"""Phase retrieval: Chung et al. 2022 (DPS), section 4; DPS2022/diffusion-posterior-sampling@effbde7."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.ranges import Positive, Whole


class PhaseRetrieval(Operator):
    """|centred orthonormal FFT of the image framed by zeros|. Shifts and the image turned by 180 degrees look alike to
    it, hence `--tries 4`.

    oversample: the frame is int(32 * oversample) pixels, 64 at the paper's 2.0, whatever the image's size, as in the
    official code. pad: another frame.
    """

    name = "phase-retrieval"
    linear = False

    def __init__(self, oversample: Positive = 2.0, pad: Whole | None = None):
        self.pad = int(oversample / 8.0 * 256) if pad is None else pad
        if self.pad < 0:
            raise VgmError(f"a frame of {self.pad} pixels", "oversample=2", USAGE)

    def __call__(self, x: Tensor) -> Tensor:
        framed = F.pad(x, (self.pad,) * 4)
        spectrum = torch.fft.fft2(torch.fft.ifftshift(framed, dim=(-2, -1)), norm="ortho")
        return torch.fft.fftshift(spectrum, dim=(-2, -1)).abs()

    def baseline(self, y: Tensor) -> None:
        return None

    def picture(self, y: Tensor) -> Tensor:
        """ln(1 + amplitude), scaled to the image's range and size."""
        log = torch.log1p(y.clamp(min=0))
        log = log / log.amax((1, 2, 3), keepdim=True).clamp(min=1e-12) * 2 - 1
        return F.adaptive_avg_pool2d(log, self.shape[1:])
