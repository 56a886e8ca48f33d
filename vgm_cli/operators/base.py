"""What a degradation is: A, its adjoint, and the linear algebra that restoration methods ask of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vgm_cli.errors import USAGE, VgmError
from vgm_cli.nn.shapes import expand
from vgm_cli.operators.noise import Clean, Noise
from vgm_cli.operators.resize import resized

RCOND = 1e-4  # singular values below this share of the largest one count as 0 in the pseudo-inverse


@dataclass(frozen=True)
class SVD:
    """The singular value decomposition A = U S V^T of a linear operator, as functions instead of matrices.

    Images x are (B, C, H, W), and so are coefficients, which may be complex. singular: the values S, broadcastable to
    (B, C, H, W), 0 where A sees nothing. Vt: x -> coefficients (B, C, H, W). V: the inverse. Ut: measurement y (B,
    *measurement_shape) -> coefficients (B, C, H, W), 0 where `singular` is 0.
    """

    singular: Tensor
    V: Callable[[Tensor], Tensor]
    Vt: Callable[[Tensor], Tensor]
    Ut: Callable[[Tensor], Tensor]


class Operator(ABC):
    """A degradation y = A(x) of images x: (B, C, H, W) in [-1, 1].

    Constructor keywords are the settings; `bind` makes the operator of a batch. linear: A is a matrix, so `adjoint`,
    `ridge` and `svd` exist. has_pinv: `pinv` exists. latent: x are a codec's latents. is_drawn: parts of A are random,
    so that an already degraded image needs a file of them.
    """

    name: str = ""
    linear: bool = True
    latent: bool = False
    is_drawn: bool = False
    shape: tuple[int, int, int]
    items: int = 0
    first: int = 0
    noise: Noise = Clean()

    def bind(
        self,
        shape: Sequence[int],
        generators: Sequence[torch.Generator],
        noise: Noise | None = None,
        first: int = 0,
    ) -> Operator:
        """The operator for one batch: one item per generator, images of `shape` (C, H, W), random parts drawn.

        first: the number of the first item, for masks and kernels that are read from a folder. VgmError: the settings
        do not fit the shape.
        """
        bound = copy.copy(self)
        bound.__dict__.pop("svd", None)
        channels, height, width = shape
        bound.shape, bound.first, bound.noise = (channels, height, width), first, noise or Clean()
        bound.items = len(generators)
        bound.prepare(generators)
        return bound

    def prepare(self, generators: Sequence[torch.Generator]) -> None:  # noqa: B027, most need nothing
        """Called by `bind`: compute what depends on self.shape, and draw what is random."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> y: (B, *measurement_shape), noiseless and differentiable."""

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """The shape of one measurement."""
        return tuple(self(torch.zeros(max(self.items, 1), *self.shape))[0].shape)

    def state(self) -> dict[str, Tensor]:
        """What was drawn, such as masks or kernels: tensors with one row per item, for the records."""
        return {}

    # linear algebra

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: (B, *measurement_shape) -> (B, C, H, W). VgmError: the operator is not linear."""
        raise self.not_linear("adjoint")

    @cached_property
    def svd(self) -> SVD:
        """The decomposition of this operator, see SVD for its shapes. VgmError: it is not linear, or too large for
        the form it has."""
        raise self.not_linear("singular value decomposition")

    def ridge(self, y: Tensor, weight: float = 0.0) -> Tensor:
        """A^T (A A^T + weight I)^-1 y: (B, *measurement_shape) -> (B, C, H, W); weight 0 is the pseudo-inverse."""
        s = self.svd.singular.to(y)
        if weight > 0:
            gain = s / (s**2 + weight)
        else:
            gain = torch.where(s > RCOND * s.max(), 1 / s.clamp(min=1e-30), 0)
        return self.svd.V(gain * self.svd.Ut(y))

    @property
    def has_pinv(self) -> bool:
        return self.linear

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y: (B, *measurement_shape) -> (B, C, H, W)."""
        return self.ridge(y)

    def prox(self, x: Tensor, y: Tensor, weight: float) -> Tensor:
        """argmin_u |y - A u|^2 + weight |u - x|^2: (B, C, H, W)."""
        return x + self.ridge(y - self(x), weight)

    @property
    def kept(self) -> Tensor | None:
        """Which pixels of an image its measurement has as they are, (B, 1, H, W) bool, the others being hidden; None:
        the operator does something else."""
        return None

    # pictures

    def baseline(self, y: Tensor) -> Tensor | None:
        """A restoration without a model, (B, C, H, W), to compare with: A^T y or what is usual for the task; None if
        there is none."""
        return self.adjoint(y) if self.linear else y

    def picture(self, y: Tensor) -> Tensor:
        """The measurement as an image (B, C, H, W) to look at."""
        return y

    def enlarged(self, y: Tensor) -> Tensor:
        """The measurement as a network that follows pictures is shown it, (B, C, H, W): a smaller picture is enlarged
        bicubically."""
        seen = y if y.ndim == 4 and y.shape[1] == self.shape[0] else self.picture(y)
        return seen if seen.shape[2:] == self.shape[1:] else resized(seen, self.shape[1:])

    def not_linear(self, what: str) -> VgmError:
        return VgmError(f"{self.name or type(self).__name__} is not linear: it has no {what}", "--method dps", USAGE)


def mirrored(index: Tensor, n: int) -> Tensor:
    """Positions outside 0..n - 1 reflected back, the border pixel not repeated, as often as it takes."""
    period = max(2 * n - 2, 1)
    index = index.remainder(period)
    return torch.where(index < n, index, period - index)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Tensor, steps: int = 200, tolerance: float = 1e-6
) -> Tensor:
    """Solve apply(u) = b per item for a symmetric positive definite `apply`; b: (B, ...)."""

    def dot(p: Tensor, q: Tensor) -> Tensor:
        return expand((p * q).flatten(1).sum(1), p)

    u, r = torch.zeros_like(b), b
    p, old = r, dot(r, r)
    goal = tolerance**2 * old
    for _ in range(steps):
        if bool((old <= goal).all()):
            break
        q = apply(p)
        step = torch.where(old > goal, old / dot(p, q).clamp(min=1e-30), 0)
        u, r = u + step * p, r - step * q
        new = dot(r, r)
        p, old = r + new / old.clamp(min=1e-30) * p, new
    return u
