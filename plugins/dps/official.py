"""The projections of DPS2022/diffusion-posterior-sampling@effbde7 guided_diffusion/measurements.py, for parity.

Its "transpose" of blur and inpainting is the identity and that of super-resolution nearest enlargement; its projection
(I - A^T A) y - A x has another sign than the MCG paper's, so x itself is lost where it is not measured. `vgm restore`
uses conditioning.projection instead unless told projection=official.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.operators.base import Operator
from vgm_cli.operators.inpainting import Inpainting
from vgm_cli.operators.separable import Denoising, SuperResolution


def transpose(operator: Operator, y: Tensor) -> Tensor:
    """What the official code takes for A^T. VgmError: a reduction by no whole number."""
    if not isinstance(operator, SuperResolution):
        return y
    size = tuple(round(n * operator.scale) for n in y.shape[-2:])
    if size != operator.shape[1:]:
        raise VgmError("the official projection enlarges by whole numbers", "projection=pinv", USAGE)
    return F.interpolate(y, size, mode="nearest")


def ortho_project(operator: Operator, y: Tensor) -> Tensor:
    """(I - A^T A) y with that transpose."""
    if isinstance(operator, Denoising):
        return y
    measured = operator(y)
    return y - (measured if isinstance(operator, Inpainting) else transpose(operator, measured))


def project(operator: Operator, x: Tensor, y: Tensor) -> Tensor:
    """x: (B, C, H, W), y: (B, *measurement_shape) -> (B, C, H, W)."""
    if isinstance(operator, Denoising):
        return x
    if isinstance(operator, SuperResolution):
        return x - transpose(operator, operator(x)) + transpose(operator, y)
    if not operator.linear:
        return x + y - operator(x)
    return ortho_project(operator, y) - operator(x)
